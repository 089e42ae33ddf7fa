//! New images in exports of servers, in the qemu-img form: as for OVA files, of which qemu-nbd
//! serves a part.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{ours, words};
use crate::support::{Outcome, Server, run};
use crate::tools;

/// Where the part that is served begins, in bytes.
const START: usize = 1 << 20;

/// A disk of 4 MiB with 1 MiB of data that cannot be compressed much, and zeroes.
fn make_source(path: &Path) {
    let mut state = 1_u64;
    let mut noise = vec![0; 1 << 20];
    for byte in &mut noise {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    let mut disk = vec![0; 4 << 20];
    disk[1 << 20..2 << 20].copy_from_slice(&noise);
    disk[3 << 20..][..100].fill(7);
    std::fs::write(path, disk).expect("room");
}

/// A file of which a part of `size` bytes is served, with bytes before and after it.
fn serve_part(tool: &Path, file: &Path, size: usize) -> Server {
    std::fs::write(file, vec![0xaa; START + size + 4096]).expect("room");
    let options = format!("driver=raw,offset={START},size={size},file.filename={}", file.display());
    Server::qemu_nbd(tool, "", &["--image-opts", &options])
}

/// What is around the part.
fn around(file: &Path, size: usize) -> bool {
    let bytes = std::fs::read(file).expect("the file");
    let is_kept = |part: &[u8]| part.iter().all(|byte| *byte == 0xaa);
    bytes.len() == START + size + 4096
        && is_kept(&bytes[..START])
        && is_kept(&bytes[START + size..])
}

fn theirs(directory: &Path, line: &str) -> Outcome {
    run(Command::new("qemu-img").args(words(line)).current_dir(directory))
}

fn required(directory: &Path, options: &str) -> usize {
    let line = format!("measure --output=json -f raw -O qcow2 {options} source.img");
    let report = theirs(directory, &line).success();
    let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
    report["required"].as_u64().expect("a number") as usize
}

#[test]
fn a_new_image_fits_into_the_part_that_was_measured_for_it() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    make_source(&here.join("source.img"));
    for (options, more) in [
        ("", ""),
        ("-o cluster_size=4k", ""),
        ("-o compat=0.10", ""),
        ("-o extended_l2=on,cluster_size=128k", "-m 16 -W"),
        ("", "-c"),
        ("-o compression_type=zstd", "-c -p"),
        ("-o preallocation=full", ""),
    ] {
        let size = match options.contains("preallocation") {
            true => 8 << 20,
            false => required(here, options),
        };
        let file = here.join("machine.ova");
        let server = serve_part(&qemu_nbd, &file, size);
        let uri = server.uri();
        // Twice: what is there does not matter.
        for _ in 0..2 {
            let line = format!("convert -f raw -O qcow2 {options} {more} source.img {uri}");
            ours(here, &words(&line)).success();
            for judge in
                [format!("check {uri}"), format!("compare -f raw -F qcow2 source.img {uri}")]
            {
                let said = theirs(here, &judge);
                assert_eq!(said.code, Some(0), "{line}: {judge}: {said:?}");
            }
        }
        assert!(around(&file, size), "{options} {more}");
    }
}

#[test]
fn an_export_that_is_too_small_stays_as_it_is() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    make_source(&here.join("source.img"));
    let file = here.join("machine.ova");
    let size = required(here, "") - 512;
    let server = serve_part(&qemu_nbd, &file, size);
    let uri = server.uri();
    for (line, part) in [
        (format!("convert -f raw -O qcow2 source.img {uri}"), "it does not fit"),
        (format!("create -f qcow2 {uri} 8P"), "too large"),
        (format!("create -f qcow2 -o cluster_size=2M {uri} 1G"), "takes up"),
        (format!("create -f raw {uri} 1G"), "takes up"),
        (format!("create -f vmdk {uri} 1M"), "made in files only"),
        (format!("create -f qcow2 -o data_file=d {uri} 1M"), "data file"),
        (format!("create -f qcow2 -b source.img -F raw {uri}"), "source.img"),
    ] {
        let refused = ours(here, &words(&line));
        assert_eq!(refused.code, Some(1), "{line}: {refused:?}");
        assert!(refused.stderr.contains(part), "{line}: {refused:?}");
    }
    let bytes = std::fs::read(&file).expect("the file");
    assert!(bytes.iter().all(|byte| *byte == 0xaa), "it has changed");
}

#[test]
fn an_image_that_is_not_complete_does_not_open() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    make_source(&here.join("source.img"));
    let file = here.join("machine.ova");
    // The metadata fits, and not the data, of which the size is not known before.
    let size = 512 << 10;
    let server = serve_part(&qemu_nbd, &file, size);
    let uri = server.uri();
    let failed = ours(here, &words(&format!("convert -c -f raw -O qcow2 source.img {uri}")));
    assert_eq!(failed.code, Some(1), "{failed:?}");
    assert!(failed.stderr.contains("marked as incomplete: run the command again"), "{failed:?}");
    for line in [format!("info {uri}"), format!("check {uri}"), format!("map {uri}")] {
        let (theirs, ours) = (theirs(here, &line), ours(here, &words(&line)));
        assert!(theirs.code != Some(0) && ours.code != Some(0), "{line}: {theirs:?} {ours:?}");
        assert!(theirs.stderr.contains("incomplete"), "{line}: {theirs:?}");
        assert!(ours.stderr.contains("incomplete"), "{line}: {ours:?}");
    }
    assert!(around(&file, size));
    ours(here, &words(&format!("create -q -f qcow2 {uri} 1M"))).success();
    assert_eq!(theirs(here, &format!("check {uri}")).code, Some(0));
}

#[test]
fn empty_images_are_made_in_exports_as_by_qemu() {
    tools!(_qemu_img = "qemu-img", qemu_nbd = "qemu-nbd");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    make_source(&here.join("source.img"));
    let base = here.join("source.img").display().to_string();
    let file = here.join("machine.ova");
    let server = serve_part(&qemu_nbd, &file, 4 << 20);
    let uri = server.uri();
    for options in [
        "-f qcow2 URI 64M".to_owned(),
        "-f qcow2 -o cluster_size=1k,lazy_refcounts=on URI 1M".to_owned(),
        format!("-f qcow2 -b {base} -F raw URI"),
        format!("-f qcow2 -b {base} -F raw URI 8M"),
        "-f raw URI 1M".to_owned(),
    ] {
        let line = format!("create {}", options.replace("URI", uri));
        let expected = theirs(here, &line).success();
        assert_eq!(ours(here, &words(&line)).success(), expected, "{line}");
        let format = if options.contains("raw URI") { "raw" } else { "qcow2" };
        let info = theirs(here, &format!("info {uri}")).success();
        assert!(info.contains(&format!("file format: {format}\n")), "{line}: {info}");
        if format == "qcow2" {
            assert_eq!(theirs(here, &format!("check {uri}")).code, Some(0), "{line}");
        }
    }
    assert!(around(&file, 4 << 20));
}
