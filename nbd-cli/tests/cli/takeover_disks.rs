//! `serve --takeover`: clients keep the disk that they have, or the old server.

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::process::Command;
use std::time::Duration;

use crate::support::{PROGRAM, Server, nbd_cli, run};
use crate::takeover::{Place, SIZE, patiently};

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
    let outcome = run(&mut place.taking_over());
    let is_said = outcome.stderr.contains("would be another disk");
    assert!(outcome.code == Some(1) && is_said, "{outcome:?}");
    load.assert_verified();
    assert!(is_empty(&other), "it was written");
    // Under another name it is no matter of the clients'.
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
    patiently(|| (!is_empty(&disk)).then_some(()));
    place.more.pop();
    place.more.push(format!("second={other}"));
    place.disk = format!("first={disk}");
    let server = place.take_over(server);
    assert!(!load.has_ended(), "the load has ended before the takeover");
    load.assert_verified();
    server.end();
    assert!(is_empty(&other), "the clients went over to another disk");
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
    patiently(|| (nbd_cli(&["info", &uri("kept")]).code == Some(0)).then_some(()));
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
    patiently(|| (!is_empty(&place.disk)).then_some(()));
    write("allow = [\"user:4294967294\"]\n");
    nbd_cli(&["control", &control, "reload"]).success();
    let uri = format!("nbd+unix:///vm?socket={socket}");
    assert_eq!(nbd_cli(&["info", &uri]).code, Some(1), "it is not let in any more");
    drop(until_images_are_closed(&control));
    patiently(|| (nbd_cli(&["control", &control, "list"]).code == Some(0)).then_some(()));
    assert!(!load.has_ended(), "the load has ended before the takeover");
    load.assert_verified();
    assert_eq!(nbd_cli(&["info", &uri]).code, Some(1), "the rule is still there");
    server.end();
}
