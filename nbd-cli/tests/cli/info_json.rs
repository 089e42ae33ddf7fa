//! `info --json` has nbdinfo's keys, in its order, with its values.

use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

/// Keys in the order of the text, with their values. Keys that only newer versions of nbdinfo know
/// and the guess at the content are left out; the URI has different spellings.
fn entries(json: &str) -> Vec<(String, String)> {
    const DIFFERENT: [&str; 4] = ["extended", "can_block_status_payload", "content", "uri"];
    let mut entries = Vec::new();
    for line in json.lines() {
        if let Some((key, value)) = line.trim().split_once("\": ") {
            let key = key.trim_start_matches('"').to_owned();
            if !DIFFERENT.contains(&key.as_str()) {
                entries.push((key, value.trim().trim_end_matches(',').to_owned()));
            }
        } else if line.contains(':') {
            // A list of contexts, one per line.
            entries.push(("context".to_owned(), line.trim().trim_end_matches(',').to_owned()));
        }
    }
    entries
}

#[track_caller]
fn agrees(nbdinfo: &std::path::Path, options: &[&str], server: &Server) {
    let arguments = [options, &["--json", server.uri()]].concat();
    let theirs = peer(nbdinfo, &arguments);
    let ours = nbd_cli(&[&["info"], &arguments[..]].concat()).success();
    serde_json::from_str::<serde_json::Value>(&ours).expect("valid JSON");
    assert_eq!(entries(&ours), entries(&theirs), "{theirs}");
}

#[test]
fn it_agrees_about_qemu_nbd() {
    tools!(nbdinfo = "nbdinfo", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let arguments = ["-f", "raw", "-A", "-D", "a \"quoted\" text", disk.path()];
    let server = Server::qemu_nbd(&qemu_nbd, "disk", &arguments);
    agrees(&nbdinfo, &[], &server);
    agrees(&nbdinfo, &["--list"], &server);
}

#[test]
fn it_agrees_about_a_read_only_disk() {
    tools!(nbdinfo = "nbdinfo", qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let server = Server::qemu_nbd(&qemu_nbd, "ro", &["-f", "raw", "-r", disk.path()]);
    agrees(&nbdinfo, &[], &server);
}

#[test]
fn it_agrees_about_nbdkit() {
    tools!(nbdinfo = "nbdinfo", nbdkit = "nbdkit");
    for arguments in [
        &["memory", "1000001"][..],
        &["--filter=blocksize-policy", "memory", "1G", "blocksize-minimum=4096"],
        &["--no-sr", "memory", "64M"],
        &["--mask-handshake=0", "memory", "64M"],
        &["-r", "memory", "0"],
    ] {
        agrees(&nbdinfo, &[], &Server::nbdkit(&nbdkit, arguments));
    }
}

#[test]
fn nbd_server_is_described_with_its_size() {
    tools!(nbd_server = "nbd-server");
    let disk = Disk::sparse();
    let server = Server::nbd_server(&nbd_server, "disk", disk.path());
    // Asked with INFO it says 0, and nbdinfo believes it.
    let text = nbd_cli(&["info", "--json", server.uri()]).success();
    let info: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
    assert_eq!(info["structured"], false, "{text}");
    assert_eq!(info["exports"][0]["export-size"], 8 << 20, "{text}");
}

#[test]
fn it_agrees_about_our_own_server() {
    tools!(nbdinfo = "nbdinfo");
    let disk = Disk::sparse();
    agrees(&nbdinfo, &[], &Server::ours(&["-D", "described", "-A", "--name=n", disk.path()]));
    agrees(&nbdinfo, &["--list"], &Server::ours(&["a=memory:1M", "b=memory:3G"]));
}
