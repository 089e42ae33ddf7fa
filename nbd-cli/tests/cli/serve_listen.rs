//! The addresses of `serve --listen`.

use std::process::Command;

use crate::support::qemu_nbd::{Killed, wait_until};
use crate::support::{Disk, PROGRAM, Server, nbd_cli};

/// The interface and address of a link, such as `eth0` and `fe80::1`, if this machine has one.
fn link_local() -> Option<(String, String)> {
    let table = std::fs::read_to_string("/proc/net/if_inet6").ok()?;
    let found = table.lines().find_map(|line| {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [address, _, _, "20", _, interface] = fields[..] else { return None };
        let bits = u128::from_str_radix(address, 16).ok()?;
        Some((interface.to_owned(), std::net::Ipv6Addr::from(bits).to_string()))
    });
    if found.is_none() {
        eprintln!("skipped: there is no link-local address");
    }
    found
}

fn number_of(interface: &str) -> String {
    let path = format!("/sys/class/net/{interface}/ifindex");
    std::fs::read_to_string(path).expect("a number").trim().to_owned()
}

#[test]
fn a_link_local_address_is_listened_on_with_its_zone_by_name_or_number() {
    let Some((interface, address)) = link_local() else { return };
    let disk = Disk::sparse();
    for zone in [interface.clone(), number_of(&interface)] {
        let mut command = Command::new(PROGRAM);
        let listen = format!("[{address}%{zone}]:0");
        command.args(["serve", "--read-only", "--listen", &listen, disk.path()]);
        let server = Server::start(&mut command, "/nonexistent".into());
        let expected = format!("nbd://[{address}%25{interface}]:");
        assert!(server.uri().starts_with(&expected), "{} for {listen}", server.uri());
        let size = nbd_cli(&["info", "--size", server.uri()]).success();
        assert_eq!(size.trim(), disk.content().len().to_string());
    }
}

#[test]
fn the_qemu_nbd_form_binds_to_a_link_local_address() {
    let Some((interface, address)) = link_local() else { return };
    let disk = Disk::sparse();
    let port = free_port();
    let bind = format!("{address}%{interface}");
    let mut command = Command::new(PROGRAM);
    command.args(["qemu-nbd", "-t", "-r", "-f", "raw", "-b", &bind, "-p", &port, disk.path()]);
    let _server = Killed(command.spawn().expect("a program"));
    let uri = format!("nbd://[{address}%25{interface}]:{port}");
    wait_until("it listens", || nbd_cli(&["info", "--size", &uri]).code == Some(0));
}

fn free_port() -> String {
    let listener = std::net::TcpListener::bind("[::]:0").expect("a free port");
    listener.local_addr().expect("its address").port().to_string()
}

#[test]
fn a_port_alone_is_one_of_this_machine() {
    let disk = Disk::sparse();
    for listen in [":0", "0"] {
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "--read-only", "--listen", listen, disk.path()]);
        let server = Server::start(&mut command, "/nonexistent".into());
        assert!(server.uri().starts_with("nbd://127.0.0.1:"), "{}", server.uri());
    }
}

#[test]
fn an_unknown_interface_or_host_is_named_in_a_sentence() {
    let disk = Disk::sparse();
    let metrics = ["serve", "-r", "--listen", ":0", "--metrics", "[fe80::1%nosuchif]:1"];
    for words in [
        &["serve", "-r", "--listen", "[fe80::1%nosuchif]:10809"][..],
        &metrics,
        &["qemu-nbd", "-r", "-f", "raw", "-b", "fe80::1%nosuchif"],
        &["info", "nbd://[fe80::1%25nosuchif]/"],
    ] {
        let file = (words[0] != "info").then_some(disk.path());
        let refused = nbd_cli(&[words, file.as_slice()].concat());
        assert_eq!(refused.code, Some(1), "{refused:?}");
        let why = "this machine has no network interface 'nosuchif'";
        assert!(refused.stderr.contains(why), "{words:?}: {}", refused.stderr);
    }
    let refused = nbd_cli(&["info", "nbd://no-such-host.invalid/"]);
    assert!(refused.stderr.contains("host name 'no-such-host.invalid' cannot be"), "{refused:?}");
}

#[test]
fn a_port_that_does_not_exist_is_named_once() {
    let refused = nbd_cli(&["serve", "--listen", "localhost:99999", "memory:1M"]);
    assert_eq!(refused.code, Some(1), "{refused:?}");
    assert_eq!(refused.stderr.matches("localhost:99999").count(), 1, "{}", refused.stderr);
    assert!(refused.stderr.contains("the port is not a number from 0 to 65535"), "{refused:?}");
}
