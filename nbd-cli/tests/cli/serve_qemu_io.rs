//! qemu-io as the judge of our server: every kind of request.

use std::os::unix::fs::FileExt as _;

use crate::support::{Disk, Server, is_sparse_here, peer};
use crate::tools;

#[test]
fn requests_of_every_kind_do_what_they_say() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.blank("blank.img", 16 << 20);
    let server = Server::ours(&["--format", "raw", &image]);
    let text = peer(
        &qemu_io,
        &[
            "-f",
            "raw",
            "-c",
            "write -P 17 0 1M",
            "-c",
            "write -P 18 4097 513",
            "-c",
            "write -f -P 19 2M 64k",
            "-c",
            "write -z 64k 64k",
            "-c",
            "write -z -u 256k 64k",
            "-c",
            "discard 512k 128k",
            "-c",
            "aio_write -P 20 3M 1M",
            "-c",
            "aio_write -P 21 5M 2M",
            "-c",
            "aio_flush",
            "-c",
            "read -P 17 0 4097",
            "-c",
            "read -P 18 4097 513",
            "-c",
            "read -P 17 4610 60926",
            "-c",
            "read -P 0 64k 64k",
            "-c",
            "read -P 0 256k 64k",
            "-c",
            "read -P 19 2M 64k",
            "-c",
            "read -P 20 3M 1M",
            "-c",
            "read -P 21 5M 2M",
            "-c",
            "read -P 0 8M 8M",
            "-c",
            "flush",
            server.uri(),
        ],
    );
    assert!(!text.contains("failed"), "{text}");
    server.end();
    let file = std::fs::File::open(&image).expect("the image");
    let mut byte = [0];
    for (offset, expected) in [(0, 17), (4097, 18), (2 << 20, 19), (5 << 20, 21), (8 << 20, 0)] {
        file.read_exact_at(&mut byte, offset).expect("a byte");
        assert_eq!(byte[0], expected, "offset {offset}");
    }
}

#[test]
fn discarded_space_is_given_back() {
    tools!(qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let full = disk.beside("full.img");
    std::fs::write(&full, vec![7; 8 << 20]).expect("room");
    let server = Server::ours(&[&full]);
    peer(&qemu_io, &["-f", "raw", "-d", "unmap", "-c", "discard 0 6M", server.uri()]);
    server.end();
    assert!(allocated(&full) <= 3 << 20, "{}", allocated(&full));
}
