//! `serve --takeover`: clients keep the disk that they have, or the old server.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::Duration;

use crate::support::qemu_nbd::wait_until;
use crate::support::{PROGRAM, Server, nbd_cli, run};
use crate::takeover::{Place, SIZE};

/// A place with a second disk of the same size.
fn two_disks() -> (Place, String) {
    let place = Place::raw();
    let other = place.text("other.raw");
    nbd_cli(&["image", "create", "-f", "raw", &other, SIZE]).success();
    (place, other)
}

fn is_empty(disk: &str) -> bool {
    fs::read(disk).expect("the disk").iter().all(|byte| *byte == 0)
}

#[test]
fn a_disk_that_would_be_another_one_is_not_taken_over() {
    let (mut place, other) = two_disks();
    let server = place.serve();
    let load = place.load(&["--duration", "1s"]);
    let disk = std::mem::replace(&mut place.disk, other.clone());
    refused(&place, "would be another disk");
    load.assert_verified();
    assert!(is_empty(&other), "it was written");
    // Under another name it does not concern the clients.
    place.disk = disk;
    place.more.push(format!("other={other}"));
    place.take_over(server).end();
}

#[test]
fn clients_of_the_default_export_keep_their_disk_if_another_one_is_the_default() {
    let (mut place, other) = two_disks();
    let disk = place.disk.clone();
    place.more.push(format!("first={disk}"));
    place.disk = format!("second={other}");
    let server = place.serve();
    let mut load = place.load(&["--duration", "2s"]);
    wait_until("the load writes", || !is_empty(&disk));
    place.more.pop();
    place.more.push(format!("second={other}"));
    place.disk = format!("first={disk}");
    let server = place.take_over(server);
    assert!(!load.has_ended(), "the load has ended before the takeover");
    load.assert_verified();
    server.end();
    assert!(is_empty(&other), "the clients went over to another disk");
}

#[test]
fn clients_of_an_export_without_a_name_keep_their_disk_when_it_gets_a_name_or_their_server() {
    let (mut place, other) = two_disks();
    let server = place.serve();
    let mut load = place.load(&["--duration", "2s"]);
    let disk = std::mem::replace(&mut place.disk, format!("vm={other}"));
    refused(&place, "would be another disk");
    wait_until("the load writes", || !is_empty(&disk));
    place.disk = format!("vm={disk}");
    let server = place.take_over(server);
    assert!(!load.has_ended(), "the load has ended before the takeover");
    load.assert_verified();
    server.end();
    assert!(is_empty(&other), "the clients went over to another disk");
}

/// Another server does not take over, and the control socket is there at every moment.
#[track_caller]
fn refused(place: &Place, why: &str) {
    let (control, ended) = (place.path("control"), AtomicBool::new(false));
    let outcome = std::thread::scope(|scope| {
        let connecting = scope.spawn(|| {
            let mut count = 0;
            while !ended.load(Ordering::SeqCst) || count == 0 {
                UnixStream::connect(&control).map_err(|error| (error, count))?;
                count += 1;
                std::thread::sleep(Duration::from_millis(1));
            }
            Ok::<_, (std::io::Error, u32)>(())
        });
        let outcome = run(&mut place.taking_over());
        ended.store(true, Ordering::SeqCst);
        connecting.join().expect("no panic").expect("the control socket is there");
        outcome
    });
    assert!(outcome.code == Some(1) && outcome.stderr.contains(why), "{outcome:?}");
    // The next request is carried out by the server that goes on.
    nbd_cli(&["control", &place.text("control"), "list"]).success();
}

#[test]
fn a_disk_on_another_server_is_not_taken_over_as_that_of_a_third_one() {
    let mut place = Place::new("unused", &[]);
    let [one, other] = ["one", "other"].map(|name| {
        let socket = place.text(name);
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "memory:1M", "--socket", &socket]);
        (Server::start(&mut command, place.path(name)), format!("nbd+unix:///?socket={socket}"))
    });
    place.disk = format!("vm={}", one.1);
    let server = place.serve();
    place.disk = format!("vm={}", other.1);
    refused(&place, "would be another disk");
    place.disk = "vm=memory:1M".to_owned();
    refused(&place, "would be another disk");
    place.disk = format!("vm={}", one.1);
    place.take_over(server).end();
    one.0.end();
    other.0.end();
}

#[test]
fn a_layer_on_another_server_is_not_taken_over_as_that_of_a_third_one() {
    let place = Place::new("overlay.qcow2", &["--trust-image"]);
    let [one, other] = ["one", "other"].map(|name| {
        let socket = place.text(name);
        let mut command = Command::new(PROGRAM);
        command.args(["serve", "memory:1M", "--socket", &socket]);
        (Server::start(&mut command, place.path(name)), format!("nbd+unix:///?socket={socket}"))
    });
    let create = ["image", "create", "-f", "qcow2", "-F", "raw", "-b", &one.1, &place.disk];
    nbd_cli(&create).success();
    let server = place.serve();
    // As a program that ignores locks can do at any moment.
    let pointed_at = |uri: &str| {
        let rebase = ["image", "rebase", "-u", "-F", "raw", "-b", uri, &place.text("copy")];
        fs::copy(&place.disk, place.path("copy")).expect("a copy");
        nbd_cli(&rebase).success();
        // In place, so that it is the same file.
        let bytes = fs::read(place.path("copy")).expect("a file");
        fs::write(&place.disk, bytes).expect("the same file");
    };
    pointed_at(&other.1);
    refused(&place, "would be another disk: its source was");
    pointed_at(&one.1);
    place.take_over(server).end();
    one.0.end();
    other.0.end();
}

#[test]
fn another_state_or_format_of_the_same_file_is_another_disk() {
    let mut place = Place::new("disk.qcow2", &["--snapshot", "one"]);
    nbd_cli(&["image", "create", "-f", "qcow2", &place.disk, SIZE]).success();
    for name in ["one", "two"] {
        nbd_cli(&["image", "snapshot", "create", &place.disk, name]).success();
    }
    let server = place.serve();
    let other_options: [&[&str]; 4] =
        [&["--snapshot", "two"], &[], &["--format", "raw"], &["--temporary"]];
    for options in other_options {
        let options = options.iter().map(|&option| option.to_owned()).collect();
        let more = std::mem::replace(&mut place.more, options);
        refused(&place, "would be another disk");
        place.more = more;
    }
    place.take_over(server).end();
}

/// Asks to take over, and waits until the server has closed its images.
fn until_images_are_closed(control: &str) -> UnixStream {
    let mut successor = UnixStream::connect(control).expect("the control socket");
    successor.set_read_timeout(Some(Duration::from_secs(60))).expect("a limit");
    successor.write_all(b"{\"command\":\"takeover\"}\n").expect("a request");
    // "Complete", without a payload.
    let last = b"NBTO\0\0\0\x03\0\0\0\0\0\0\0\0";
    let mut received = Vec::new();
    let mut buffer = [0; 4096];
    while !received.ends_with(last) {
        let count = successor.read(&mut buffer).expect("what is handed over");
        assert_ne!(count, 0, "{}", String::from_utf8_lossy(&received));
        received.extend_from_slice(&buffer[..count]);
    }
    successor
}

#[test]
fn a_file_that_was_renamed_while_it_was_closed_is_not_opened_again_nor_what_is_in_its_place() {
    let (mut place, other) = two_disks();
    place.more.push(format!("kept={other}"));
    let server = place.serve();
    let successor = until_images_are_closed(&place.text("control"));
    let [elsewhere, copy] = [place.text("elsewhere"), place.disk.clone()];
    fs::rename(&place.disk, &elsewhere).expect("another name");
    fs::copy(&elsewhere, &copy).expect("another file");
    drop(successor);
    let uri = |name: &str| format!("nbd+unix:///{name}?socket={}", place.text("socket"));
    wait_until("the server goes on", || nbd_cli(&["info", &uri("kept")]).code == Some(0));
    let listed = nbd_cli(&["info", "--list", &uri("")]).success();
    assert_eq!(listed.matches("export=").count(), 1, "{listed}");
    server.end();
    assert!(is_empty(&copy));
}

#[test]
fn a_takeover_that_fails_keeps_clients_that_came_before_a_rule_was_tightened() {
    let place = Place::raw();
    let [socket, control, config] = ["socket", "control", "config"].map(|name| place.text(name));
    let write = |rule: &str| {
        let disk = &place.disk;
        let text = format!(
            "socket = {socket:?}\ncontrol = {control:?}\n[[export]]\nname = \"vm\"\n\
             source = {disk:?}\nformat = \"raw\"\n{rule}"
        );
        fs::write(&config, text).expect("the configuration");
    };
    write("");
    let mut command = Command::new(PROGRAM);
    let server = Server::start(command.args(["serve", "--config", &config]), place.path("socket"));
    let mut load = place.load(&["--duration", "2s", "--reconnect", "0"]);
    wait_until("the load writes", || !is_empty(&place.disk));
    write("allow = [\"user:4294967294\"]\n");
    nbd_cli(&["control", &control, "reload"]).success();
    let uri = format!("nbd+unix:///vm?socket={socket}");
    assert_eq!(nbd_cli(&["info", &uri]).code, Some(1), "it is not let in any more");
    drop(until_images_are_closed(&control));
    wait_until("the server goes on", || nbd_cli(&["control", &control, "list"]).code == Some(0));
    assert!(!load.has_ended(), "the load has ended before the takeover");
    load.assert_verified();
    assert_eq!(nbd_cli(&["info", &uri]).code, Some(1), "the rule is still there");
    server.end();
}
