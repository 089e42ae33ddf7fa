//! qemu-img as the judge of our server.

use crate::support::{Disk, Server, peer};
use crate::tools;

#[test]
fn info_sees_the_size() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    let info = peer(&qemu_img, &["info", "--output=json", server.uri()]);
    let info: serde_json::Value = serde_json::from_str(&info).expect("valid JSON");
    assert_eq!(info["virtual-size"], 8 << 20);
    assert_eq!(info["format"], "raw");
}

#[test]
fn convert_reads_and_writes_the_same_bytes() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let server = Server::ours(&["--listen", "127.0.0.1:0", disk.path()]);
    let copied = disk.beside("copy.img");
    peer(&qemu_img, &["convert", "-O", "raw", server.uri(), &copied]);
    disk.assert_equals(&copied);

    let target = Server::ours(&["memory:8M"]);
    let arguments = ["convert", "-n", "-f", "raw", "-O", "raw", disk.path(), target.uri()];
    // The lock of our server keeps qemu from opening the file itself for anything but reading.
    peer(&qemu_img, &[&arguments[..1], &["-U"], &arguments[1..]].concat());
    peer(&qemu_img, &["compare", server.uri(), target.uri()]);
}

#[test]
fn map_sees_the_holes() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let server = Server::ours(&["--read-only", disk.path()]);
    let map = |image: &str| -> Vec<(u64, u64, bool)> {
        let text = peer(&qemu_img, &["map", "-f", "raw", "-U", "--output=json", image]);
        let extents: serde_json::Value = serde_json::from_str(&text).expect("valid JSON");
        let number = |extent: &serde_json::Value, key| extent[key].as_u64().expect("a number");
        let list = extents.as_array().expect("a list").iter();
        list.map(|e| (number(e, "start"), number(e, "length"), e["zero"] == true)).collect()
    };
    let remote = map(server.uri());
    server.end();
    assert_eq!(remote, map(disk.path()));
}

#[test]
fn the_default_export_answers_to_the_empty_name_too() {
    tools!(qemu_img = "qemu-img");
    let server = Server::ours(&["--name", "disk", "memory:3M"]);
    for uri in [server.uri(), &server.uri_of("")] {
        let info = peer(&qemu_img, &["info", "--output=json", uri]);
        assert!(info.contains("3145728"), "{info}");
    }
}
