//! `map`: text, JSON and totals are nbdinfo's.

use std::io::Read as _;
use std::process::{Command, Stdio};

use crate::support::{Disk, PROGRAM, Server, nbd_cli, peer};
use crate::tools;

fn words(text: &str) -> Vec<Vec<&str>> {
    text.lines().map(|line| line.split_whitespace().collect()).collect()
}

#[track_caller]
fn agrees(nbdinfo: &std::path::Path, server: &Server) {
    let theirs = peer(nbdinfo, &["--map", server.uri()]);
    let ours = nbd_cli(&["map", server.uri()]).success();
    assert_eq!(words(&ours), words(&theirs));
    let theirs = peer(nbdinfo, &["--map", "--totals", server.uri()]);
    let ours = nbd_cli(&["map", "--totals", server.uri()]).success();
    assert_eq!(words(&ours), words(&theirs));
    for options in [&[][..], &["--totals"]] {
        let theirs = peer(nbdinfo, &[&["--map", "--json"], options, &[server.uri()]].concat());
        let ours = nbd_cli(&[&["map", "--json"], options, &[server.uri()]].concat()).success();
        let [ours, theirs] = [&ours, &theirs]
            .map(|text| serde_json::from_str::<serde_json::Value>(text).expect("valid JSON"));
        if options.is_empty() {
            assert_eq!(ours, theirs);
        } else {
            // nbdinfo rounds the percentage.
            let sizes = |value: &serde_json::Value| -> Vec<_> {
                let list = value.as_array().expect("a list");
                list.iter().map(|total| (total["size"].clone(), total["type"].clone())).collect()
            };
            assert_eq!(sizes(&ours), sizes(&theirs));
        }
    }
}

#[test]
fn it_agrees_about_qemu_nbd() {
    tools!(nbdinfo = "nbdinfo", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    agrees(&nbdinfo, &Server::qemu_nbd(&qemu_nbd, "x", &["-f", "raw", disk.path()]));
}

#[test]
fn it_agrees_about_nbdkit_with_many_extents() {
    tools!(nbdinfo = "nbdinfo", nbdkit = "nbdkit");
    let server = Server::nbdkit(&nbdkit, &["data", "( @32768 1 @+32767 )*200", "size=64M"]);
    agrees(&nbdinfo, &server);
}

#[test]
fn it_agrees_about_our_own_server() {
    tools!(nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    agrees(&nbdinfo, &Server::ours(&[disk.path()]));
}

#[test]
fn a_context_that_is_not_there_is_an_error() {
    let server = Server::ours(&["memory:1M"]);
    let outcome = nbd_cli(&["map", "--context", "qemu:dirty-bitmap:b", server.uri()]);
    assert!(outcome.failure().contains("does not offer"));
    let outcome = nbd_cli(&["map", "--context", "nonsense", server.uri()]);
    assert!(outcome.failure().contains("base:allocation"));
}

#[test]
fn a_reader_that_closes_the_pipe_is_no_error() {
    tools!(nbdkit = "nbdkit");
    let server = Server::nbdkit(&nbdkit, &["data", "( @32768 1 @+32767 )*2000", "size=1G"]);
    let mut child = Command::new(PROGRAM)
        .args(["map", server.uri()])
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("nbd-cli");
    drop(child.stdout.take());
    let mut said = String::new();
    child.stderr.take().expect("its errors").read_to_string(&mut said).expect("text");
    assert_eq!(child.wait().expect("its end").code(), Some(0), "{said}");
    assert_eq!(said, "");
}
