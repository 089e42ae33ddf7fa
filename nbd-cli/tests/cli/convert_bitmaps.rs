//! `image convert --bitmaps` beside `qemu-img convert --bitmaps`.

use std::path::Path;

use serde_json::Value;

use crate::support::image::{info, is_clean, json, write};
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

/// What qemu-img says about the bitmaps of an image.
fn bitmaps(qemu_img: &Path, image: &str) -> Value {
    info(qemu_img, image)["format-specific"]["data"]["bitmaps"].clone()
}

/// The bits of a bitmap as qemu-nbd serves them.
fn bits(qemu_nbd: &Path, nbdinfo: &Path, image: &str, name: &str) -> Value {
    let server = Server::qemu_nbd(qemu_nbd, "x", &["-r", "-f", "qcow2", "-B", name, image]);
    json(nbdinfo, &["--json", &format!("--map=qemu:dirty-bitmap:{name}"), server.uri()])
}

/// An overlay with bitmaps of every kind, over a base with one of its own.
fn source(directory: &Disk, qemu_img: &Path, qemu_io: &Path) -> String {
    let (base, image) = (directory.beside("base.qcow2"), directory.beside("disk.qcow2"));
    peer(qemu_img, &["create", "-q", "-f", "qcow2", &base, "8M"]);
    peer(qemu_img, &["bitmap", "--add", &base, "of-base"]);
    peer(qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image, "9M"]);
    for (name, granularity) in [("daily", "64k"), ("fine", "512"), ("coarse", "2M")] {
        peer(qemu_img, &["bitmap", "--add", "-g", granularity, &image, name]);
    }
    write(qemu_io, &image, "write -P 1 1M 100k");
    write(qemu_io, &image, "write -P 1 8900k 1k");
    peer(qemu_img, &["bitmap", "--disable", &image, "fine"]);
    peer(qemu_img, &["bitmap", "--add", &image, "empty"]);
    write(qemu_io, &image, "write -P 2 3M 5k");
    peer(qemu_img, &["bitmap", "--clear", &image, "empty"]);
    image
}

#[test]
fn bitmaps_go_along_as_with_qemu_img() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    let directory = Disk::sparse();
    let image = source(&directory, &qemu_img, &qemu_io);
    let theirs = directory.beside("theirs.qcow2");
    peer(&qemu_img, &["convert", "--bitmaps", "-O", "qcow2", &image, &theirs]);
    let existing = directory.beside("existing.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &existing, "9M"]);
    peer(&qemu_img, &["bitmap", "--add", &existing, "own"]);
    let ways: [(&str, &[&str]); 4] = [
        ("ours.qcow2", &[]),
        ("small.qcow2", &["--compress", "--cluster-size", "4k"]),
        ("wide.qcow2", &["--extended-l2", "--flush"]),
        ("existing.qcow2", &["--no-create"]),
    ];
    for (name, options) in ways {
        let ours = directory.beside(name);
        let arguments =
            [&["image", "convert", "-O", "qcow2", "--bitmaps"], options, &[&image, &ours]].concat();
        nbd_cli(&arguments).success();
        is_clean(&qemu_img, &ours);
        peer(&qemu_img, &["compare", &image, &ours]);
        let mut said = bitmaps(&qemu_img, &ours);
        said.as_array_mut().expect("a list").retain(|bitmap| bitmap["name"] != "own");
        assert_eq!(said, bitmaps(&qemu_img, &theirs), "{name}");
        for bitmap in ["daily", "fine", "coarse", "empty"] {
            let bits = |image: &str| bits(&qemu_nbd, &nbdinfo, image, bitmap);
            assert_eq!(bits(&ours), bits(&image), "{name}, {bitmap}");
            assert_eq!(bits(&ours), bits(&theirs), "{name}, {bitmap}");
        }
    }
    // Enabled ones go on recording, for QEMU too.
    let ours = directory.beside("ours.qcow2");
    write(&qemu_io, &ours, "write -P 3 5M 64k");
    let dirty_at_5m = |name: &str| {
        let map = bits(&qemu_nbd, &nbdinfo, &ours, name);
        let extents = map.as_array().expect("a list").clone();
        extents.iter().any(|extent| {
            let number = |what: &str| extent[what].as_u64().expect("a number");
            let range = number("offset")..number("offset") + number("length");
            range.contains(&(5 << 20)) && number("type") == 1
        })
    };
    assert!(dirty_at_5m("daily") && dirty_at_5m("empty") && !dirty_at_5m("fine"));
    // Without the option there are none.
    let plain = directory.beside("plain.qcow2");
    nbd_cli(&["image", "convert", "-O", "qcow2", &image, &plain]).success();
    assert_eq!(bitmaps(&qemu_img, &plain), Value::Null);
}

/// Marks the bitmap of that name as left in use.
fn leave_in_use(image: &str, name: &str) {
    let mut bytes = std::fs::read(image).expect("the image");
    let name = name.as_bytes();
    let is_entry = |at: &usize| {
        bytes[*at..].starts_with(name) && bytes[at - 6..at - 4] == [0, name.len() as u8]
    };
    let places: Vec<usize> = (24..bytes.len() - name.len()).filter(is_entry).collect();
    assert!(!places.is_empty());
    for at in places {
        bytes[at - 9] |= 1;
    }
    std::fs::write(image, bytes).expect("the image");
}

#[test]
fn a_bitmap_that_is_not_reliable_is_an_error_before_anything_is_written_or_left_out() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let image = source(&directory, &qemu_img, &qemu_io);
    leave_in_use(&image, "coarse");
    // As a checkpoint that was cut off leaves it.
    peer(&qemu_img, &["bitmap", "--add", &image, "daily.checkpoint"]);
    peer(&qemu_img, &["bitmap", "--disable", &image, "daily.checkpoint"]);
    let new = directory.beside("new.qcow2");
    let convert = ["image", "convert", "-O", "qcow2", "--bitmaps", &image, &new];
    says(nbd_cli(&convert), &["daily", "checkpoint", "--skip-broken-bitmaps"]);
    assert!(!Path::new(&new).exists() && !Path::new(&format!("{new}.partial")).exists());
    let outcome = nbd_cli(&[&convert[..], &["--skip-broken-bitmaps"]].concat());
    for name in ["'daily'", "'coarse'"] {
        let warns = |line: &str| line.contains("warning") && line.contains(name);
        assert!(outcome.stderr.lines().any(warns), "{outcome:?}");
    }
    outcome.success();
    let said = bitmaps(&qemu_img, &new);
    let names: Vec<_> = said.as_array().expect("a list").iter().map(|it| &it["name"]).collect();
    assert_eq!(names, ["fine", "empty", "daily.checkpoint"]);
    // QEMU calls only the one inconsistent.
    let theirs = directory.beside("theirs.qcow2");
    let convert = ["convert", "--bitmaps", "--skip-broken-bitmaps", "-O", "qcow2", &image, &theirs];
    let outcome = crate::support::run(std::process::Command::new(&qemu_img).args(convert));
    assert!(outcome.stderr.contains("coarse"), "{outcome:?}");
}

#[test]
fn bitmaps_that_cannot_go_along_are_refused_by_name() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let image = source(&directory, &qemu_img, &qemu_io);
    let new = directory.beside("new.qcow2");
    let existing = directory.beside("existing.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &existing, "10M"]);
    let named = directory.beside("named.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &named, "9M"]);
    peer(&qemu_img, &["bitmap", "--add", &named, "coarse"]);
    let before = [&existing, &named].map(|path| std::fs::read(path).expect("an image"));
    let refused: [(&[&str], &[&str]); 7] = [
        (&["--bitmaps", &image, &new], &["--output-format qcow2"]),
        (&["--bitmaps", "-O", "qcow2", "-f", "raw", directory.path(), &new], &["raw", "source"]),
        (&["--bitmaps", "-O", "qcow2", "--compat", "0.10", &image, &new], &["0.10"]),
        (&["--bitmaps", "-O", "qcow2", "-l", "one", &image, &new], &["--snapshot"]),
        (&["--skip-broken-bitmaps", "-O", "qcow2", &image, &new], &["--bitmaps"]),
        (&["--bitmaps", "-n", "-O", "qcow2", &image, &existing], &["one size"]),
        (&["--bitmaps", "-n", "-O", "qcow2", &image, &named], &["'coarse' already"]),
    ];
    for (arguments, parts) in refused {
        let outcome = nbd_cli(&[&["image", "convert"], arguments].concat());
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(parts.iter().all(|part| outcome.stderr.contains(part)), "{outcome:?}");
        assert!(!Path::new(&new).exists(), "{arguments:?}");
    }
    let after = [&existing, &named].map(|path| std::fs::read(path).expect("an image"));
    assert!(before == after, "nothing was written");
}
