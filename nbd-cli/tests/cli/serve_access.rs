//! Who may use an export, and how much of it.

use std::process::Command;

use crate::support::tls::credentials::add_psk_user;
use crate::support::{Server, nbd_cli, peer, run};
use crate::tools;

/// This user, and one that it is not.
fn users() -> (u32, u32) {
    let user = rustix::process::geteuid().as_raw();
    (user, user + 1)
}

#[test]
fn a_client_sees_the_exports_it_may_use_and_no_others() {
    let (this, other) = users();
    let group = rustix::process::getegid().as_raw();
    let rules = [
        format!("ours=user:{this}"),
        format!("theirs=user:{other}"),
        format!("group=group:{group}"),
    ];
    let mut arguments =
        vec!["ours=memory:1M", "theirs=memory:1M", "group=memory:1M", "any=memory:1M"];
    for rule in &rules {
        arguments.extend(["--allow", rule]);
    }
    let server = Server::ours(&arguments);
    let listed = nbd_cli(&["info", "--list", "--json", &server.uri_of("")]).success();
    for (name, expected) in [("ours", true), ("group", true), ("any", true), ("theirs", false)] {
        assert_eq!(listed.contains(&format!("\"{name}\"")), expected, "{name}: {listed}");
        let uri = server.uri_of(name);
        assert_eq!(nbd_cli(&["info", "--size", &uri]).code == Some(0), expected, "{name}");
    }
    let denied = nbd_cli(&["info", &server.uri_of("theirs")]).failure();
    let unknown = nbd_cli(&["info", &server.uri_of("no-export")]).failure();
    assert_eq!(denied.replace("theirs", "no-export"), unknown);
}

#[test]
fn some_clients_may_only_read() {
    let (this, other) = users();
    for (allowed, read, code) in [
        (None, format!("user:{this}"), 0),
        (None, format!("user:{other}"), 2),
        (Some(format!("user:{this}")), "others".to_owned(), 2),
        (Some(format!("user:{other}")), "others".to_owned(), 0),
        (Some(format!("user:{this}")), format!("vm=user:{this}"), 0),
    ] {
        let mut arguments = vec!["vm=memory:1M", "--readonly-for", &read];
        if let Some(allowed) = &allowed {
            arguments.extend(["--allow", allowed]);
        }
        let server = Server::ours(&arguments);
        let asked = nbd_cli(&["info", "--is", "read-only", server.uri()]);
        assert_eq!(asked.code, Some(code), "{allowed:?} {read}");
        server.end();
    }
}

#[test]
fn exports_that_are_added_later_have_the_rules_too() {
    let (_, other) = users();
    let directory = tempfile::tempdir().expect("a directory");
    let control = directory.path().join("control");
    let control = control.to_str().expect("a plain name");
    let (all, later) = (format!("user:{other}"), "late=others");
    let arguments =
        ["--control", control, "--allow", &all, "--readonly-for", later, "vm=memory:1M"];
    let server = Server::ours(&arguments);
    assert_eq!(nbd_cli(&["info", server.uri()]).code, Some(1));
    for name in ["late", "later"] {
        nbd_cli(&["control", control, "add-export", name, "memory:1M"]).success();
    }
    nbd_cli(&["info", "--is", "read-only", &server.uri_of("late")]).success();
    assert_eq!(nbd_cli(&["info", &server.uri_of("later")]).code, Some(1));
    server.end();
}

#[test]
fn a_key_decides_what_its_user_may_do() {
    tools!(nbdinfo = "nbdinfo", _psktool = "psktool");
    let directory = tempfile::tempdir().expect("a directory");
    let file = directory.path().join("keys.psk");
    add_psk_user(&file, "alice");
    add_psk_user(&file, "bob");
    let keys = file.to_str().expect("a plain name");
    let rules = ["--allow", "tls:alice", "--readonly-for", "tls:bo?", "--tls-psk", keys];
    let server = Server::ours(&[&rules[..], &["vm=memory:1M"]].concat());
    for (user, expected) in [("alice", Some(2)), ("bob", Some(0))] {
        let socket = server.socket().display();
        let uri = format!("nbds+unix://{user}@/vm?socket={socket}&tls-psk-file={keys}");
        let asked = run(Command::new(&nbdinfo).args(["--is", "read-only", &uri]));
        assert_eq!(asked.code, expected, "{user}: {asked:?}");
    }
    server.end();
}

#[test]
fn a_client_has_as_many_connections_as_it_may() {
    let server = Server::ours(&["--client-connections", "2", "vm=memory:1M"]);
    let copy = |connections| nbd_cli(&["copy", "-C", connections, server.uri(), "null:"]);
    copy("2").success();
    let held = nbd_cli(&[
        "serve",
        "--run",
        &format!("{} info --size $uri", crate::support::PROGRAM),
        "--export-connections",
        "1",
        "memory:1M",
    ]);
    assert_eq!(held.success(), "1048576\n");
}

#[test]
fn what_is_copied_within_quotas_is_complete() {
    tools!(nbdcopy = "nbdcopy");
    let disk = crate::support::Disk::sparse();
    let quotas = [
        "--client-rate",
        "64M",
        "--client-iops",
        "5000",
        "--export-rate",
        "64M",
        "--export-iops",
        "5000",
    ];
    let server = Server::ours(&[&quotas[..], &["-f", "raw", "--read-only", disk.path()]].concat());
    let copy = disk.beside("copy.img");
    peer(&nbdcopy, &[server.uri(), &copy]);
    disk.assert_equals(copy);
    server.end();
}

#[test]
fn rules_that_protect_nothing_are_refused() {
    for (arguments, parts) in [
        (&["--allow", "user:no-such-user"][..], &["--allow", "no user 'no-such-user'"][..]),
        (&["--allow", "10.0.0.1/8"], &["write 10.0.0.0/8"]),
        (&["--allow", "tls:alice"], &["--tls-psk"]),
        (&["--allow", "data=::1"], &["'data' is not the name of an export"]),
        (&["--allow", "others"], &["--readonly-for"]),
        (&["--client-rate", "0"], &["--client-rate", "at least one byte"]),
    ] {
        let outcome = nbd_cli(&[&["serve"], arguments, &["vm=memory:1M"]].concat());
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(parts.iter().all(|part| outcome.stderr.contains(part)), "{outcome:?}");
    }
}
