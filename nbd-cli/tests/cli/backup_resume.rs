//! An interrupted backup resumes where it ended.

use std::path::Path;

use serde_json::Value;

use crate::backup_chain::{disk_with_bitmap, serve};
use crate::support::image::{are_equal, is_clean, json, write};
use crate::support::{Disk, Server, nbd_cli, says};
use crate::tools;

#[test]
fn an_incremental_backup_is_resumed_behind_what_was_copied() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let disk = disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let (full, second) = (directory.beside("full.qcow2"), directory.beside("second.qcow2"));
    let server = serve(&qemu_nbd, &disk);
    nbd_cli(&["backup", server.uri(), &full]).success();
    server.end();

    write(&qemu_io, &disk, "write -P 9 8M 4M");
    write(&qemu_io, &disk, "write -z 3M 1M");
    write(&qemu_io, &disk, "write -P 10 40M 64k");
    // The last part cannot be read at first.
    let bad = host_offset(&qemu_img, &disk, 40 << 20) / 512;
    let image = format!(
        "driver=qcow2,file.driver=blkdebug,file.image.driver=file,file.image.filename={disk},\
         file.inject-error.0.event=read_aio,file.inject-error.0.errno=5,\
         file.inject-error.0.sector={bad}"
    );
    let arguments = ["-B", "b0", "-r", "--image-opts", &image];
    let socket = directory.beside("socket");
    let server = Server::qemu_nbd_at(&qemu_nbd, "disk", Path::new(&socket), &arguments);
    let backup = |uri: &str, more: &[&str]| {
        let arguments = [
            "backup",
            "--json",
            "-R",
            "1",
            "--reconnect",
            "1ms",
            "-B",
            "b0",
            "-b",
            &full,
            uri,
            &second,
        ];
        nbd_cli(&[&arguments[..], more].concat())
    };
    says(backup(server.uri(), &[]), &["failed", "second.qcow2.partial", "--resume"]);
    assert!(!Path::new(&second).exists());
    says(backup(server.uri(), &[]), &["interrupted", "--resume", "--restart"]);
    server.end();

    // The same address, as resuming demands.
    let arguments = ["-r", "-B", "b0", "-f", "qcow2", &disk];
    let server = Server::qemu_nbd_at(&qemu_nbd, "disk", Path::new(&socket), &arguments);
    let report = backup(server.uri(), &["--resume"]).json();
    server.end();
    let number = |what: &str| report[what].as_u64().expect("a number");
    assert!(number("resumed-at") >= 12 << 20, "{report}");
    assert_eq!(number("copied"), 64 << 10, "{report}");
    is_clean(&qemu_img, &second);
    are_equal(&qemu_img, &disk, &second);
    // The part that was copied before is part of what is recorded.
    let said = nbd_cli(&["restore", "--json", &second, "null:"]).success();
    let report: Value = serde_json::from_str(&said).expect("JSON");
    assert_eq!(report["checked"], 2, "{report}");
}

#[test]
fn only_the_same_backup_is_resumed() {
    let directory = Disk::sparse();
    let target = directory.beside("full.qcow2");
    let server = Server::ours(&["--read-only", directory.path()]);
    says(nbd_cli(&["backup", "--resume", server.uri(), &target]), &["nothing to resume"]);
    // As an interruption leaves them.
    let (partial, record) = (format!("{target}.partial"), format!("{target}.partial.json"));
    nbd_cli(&["backup", "--quiet", server.uri(), &target]).success();
    std::fs::rename(&target, &partial).expect("a rename");
    let resume = || nbd_cli(&["backup", "--quiet", "--resume", server.uri(), &target]);
    says(resume(), &["cannot resume", "partial.json", "--restart"]);
    for text in [
        "",
        "{}",
        "[1]",
        r#"{"version":1,"source":"x","size":8388608,"bitmap":null,"base":null,"done":99999999999}"#,
        r#"{"version":1,"source":"x","size":8388608,"bitmap":null,"base":null,"done":1}"#,
    ] {
        std::fs::write(&record, text).expect("room");
        says(resume(), &["cannot resume", "is damaged", "--restart"]);
    }
    let record_of = |source: &str| {
        let record = serde_json::json!({"version": 1, "source": source, "size": 8 << 20,
            "bitmap": null, "base": null, "done": 1 << 20});
        record.to_string()
    };
    std::fs::write(&record, record_of("nbd://elsewhere/")).expect("room");
    says(resume(), &["cannot resume", "its source was nbd://elsewhere/"]);
    std::fs::write(&record, record_of(server.uri())).expect("room");
    resume().success();
    assert!(!Path::new(&record).exists() && !Path::new(&partial).exists());
    nbd_cli(&["restore", &target, &directory.beside("restored.img")]).success();
    directory.assert_equals(directory.beside("restored.img"));
}

/// Where the guest's bytes from that offset on are in the file.
fn host_offset(qemu_img: &Path, disk: &str, guest: u64) -> u64 {
    let map = json(qemu_img, &["map", "--output=json", disk]);
    let extents = map.as_array().expect("a list");
    let found = extents.iter().find(|extent| extent["start"].as_u64() == Some(guest));
    found.and_then(|extent| extent["offset"].as_u64()).expect("an extent of its own")
}
