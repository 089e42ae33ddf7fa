//! fio as the judge of our server: many random writes in flight, verified.

use std::process::Command;

use crate::support::{Disk, Server, run};
use crate::tools;

fn verify(fio: &std::path::Path, uri: &str) {
    let output = run(Command::new(fio).current_dir(std::env::temp_dir()).args([
        "--name=verify",
        "--ioengine=nbd",
        &format!("--uri={uri}"),
        "--rw=randwrite",
        "--bsrange=512-64k",
        "--bs_unaligned",
        "--iodepth=32",
        "--size=8M",
        "--io_size=16M",
        "--verify=crc32c",
        "--verify_state_save=0",
        "--serialize_overlap=1",
        "--randseed=20261122",
    ]));
    if output.stderr.contains("engine nbd not loadable") {
        assert!(std::env::var_os("CI").is_none(), "fio has no nbd engine");
        eprintln!("skipped: fio has no nbd engine");
        return;
    }
    output.success();
}

#[test]
fn what_was_written_is_read_from_an_image() {
    tools!(fio = "fio");
    let disk = Disk::sparse();
    let image = disk.blank("fio.img", 8 << 20);
    let server = Server::ours(&["--format", "raw", &image]);
    verify(&fio, server.uri());
    server.end();
}

#[test]
fn what_was_written_is_read_from_memory() {
    tools!(fio = "fio");
    let server = Server::ours(&["memory:8M"]);
    verify(&fio, server.uri());
    server.end();
}
