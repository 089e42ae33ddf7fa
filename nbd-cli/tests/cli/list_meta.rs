//! `list-meta`: the metadata contexts of an export.

use crate::support::{Disk, Server, nbd_cli};
use crate::tools;

#[test]
fn queries_choose_among_the_contexts_of_qemu_nbd() {
    tools!(qemu_nbd = "qemu-nbd");
    let disk = Disk::sparse();
    let server = Server::qemu_nbd(&qemu_nbd, "x", &["-f", "raw", "-A", disk.path()]);
    let list =
        |queries: &[&str]| nbd_cli(&[&["list-meta", server.uri()], queries].concat()).success();
    assert_eq!(list(&[]), "base:allocation\nqemu:allocation-depth\n");
    assert_eq!(list(&["qemu:"]), "qemu:allocation-depth\n");
    assert_eq!(list(&["base:allocation"]), "base:allocation\n");
    assert_eq!(list(&["nothing:like-this"]), "");
}

#[test]
fn json_names_the_export() {
    let disk = Disk::sparse();
    let server = Server::ours(&["-A", "--name", "d", disk.path()]);
    let text = nbd_cli(&["list-meta", "--json", server.uri()]).success();
    let json: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
    assert_eq!(
        json,
        serde_json::json!({
            "export-name": "d",
            "contexts": ["base:allocation", "qemu:allocation-depth"],
        })
    );
}

#[test]
fn a_server_without_contexts_lists_none() {
    tools!(nbd_server = "nbd-server");
    let disk = Disk::sparse();
    let server = Server::nbd_server(&nbd_server, "disk", disk.path());
    let outcome = nbd_cli(&["list-meta", server.uri()]);
    // It does not know the option; that is said.
    assert_eq!((outcome.code, outcome.stdout.as_str()), (Some(1), ""), "{outcome:?}");
}
