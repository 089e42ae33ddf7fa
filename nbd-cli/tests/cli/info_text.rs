//! `info` as text.

use crate::support::{Disk, Server, nbd_cli, peer};
use crate::tools;

#[test]
fn it_reads_as_nbdinfo_does() {
    tools!(nbdinfo = "nbdinfo", nbdkit = "nbdkit");
    let server = Server::nbdkit(&nbdkit, &["--no-sr", "memory", "1G"]);
    let theirs = peer(&nbdinfo, &["--no-content", server.uri()]);
    let ours = nbd_cli(&["info", "--no-content", server.uri()]).success();
    let ours: Vec<_> =
        ours.lines().filter(|line| !line.contains("can_block_status_payload")).collect();
    assert_eq!(ours, theirs.lines().collect::<Vec<_>>());
}

#[test]
fn our_server_is_described_in_full() {
    let disk = Disk::sparse();
    let server = Server::ours(&["--name", "disk", "--description", "the disk", disk.path()]);
    let text = nbd_cli(&["info", server.uri()]).success();
    for line in [
        "protocol: newstyle-fixed without TLS, using extended packets",
        "export=\"disk\":",
        "\tdescription: the disk",
        "\texport-size: 8388608 (8M)",
        "\tcontent: data",
        "\tcontexts:",
        "\t\tbase:allocation",
        "\tis_read_only: false",
        "\tcan_multi_conn: true",
        "\tcan_block_status_payload: true",
    ] {
        assert!(text.lines().any(|found| found == line), "{line} is missing in:\n{text}");
    }
}

#[test]
fn the_content_is_guessed_by_the_first_bytes() {
    let disk = Disk::sparse();
    let image = disk.blank("boot.img", 1 << 20);
    let mut sector = [0; 512];
    sector[510..].copy_from_slice(b"\x55\xaa");
    std::fs::write(&image, sector).expect("a boot sector");
    let server = Server::ours(&[&image]);
    let with = nbd_cli(&["info", server.uri()]).success();
    assert!(with.contains("content: DOS/MBR boot sector"), "{with}");
    let without = nbd_cli(&["info", "--no-content", server.uri()]).success();
    assert!(!without.contains("content:"), "{without}");
}
