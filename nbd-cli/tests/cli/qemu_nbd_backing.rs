//! Backing files that driver options give in place of the one in the image's header.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_nbd::{Foreground, ours};
use crate::support::{Disk, Outcome, image, nbd_cli, peer, run, says};
use crate::tools;

/// The image at the top; its header names `base.qcow2`.
const TOP: &str = r#""driver":"qcow2","file":{"driver":"file","filename":"DIR/top.qcow2"}"#;
/// An image whose header names nothing.
const ALONE: &str = r#""driver":"qcow2","file":{"driver":"file","filename":"DIR/alone.qcow2"}"#;
/// An image whose header names `other.qcow2`.
const MID: &str = r#""driver":"qcow2","file":{"driver":"file","filename":"DIR/mid.qcow2"}"#;
const BASE: &str = r#"{"driver":"qcow2","file":{"driver":"file","filename":"DIR/base.qcow2"}}"#;

/// A directory with these images, each with one cluster of its own.
fn images(qemu_img: &Path, qemu_io: &Path) -> Disk {
    let disk = Disk::sparse();
    for (pattern, name, backing) in [
        (1, "base", None),
        (2, "other", None),
        (3, "mid", Some("other.qcow2")),
        (4, "top", Some("base.qcow2")),
        (5, "alone", None),
    ] {
        let path = disk.beside(&format!("{name}.qcow2"));
        match backing {
            None => peer(qemu_img, &["create", "-f", "qcow2", &path, "1M"]),
            Some(below) => {
                peer(qemu_img, &["create", "-f", "qcow2", "-b", below, "-F", "qcow2", &path])
            }
        };
        image::write(qemu_io, &path, &format!("write -P {pattern} {}k 64k", pattern * 64));
    }
    disk
}

fn directory(disk: &Disk) -> String {
    let parent = Path::new(disk.path()).parent().expect("a directory");
    parent.to_str().expect("a plain name").to_owned()
}

/// Names with their parts filled in.
fn filled(disk: &Disk, text: &str) -> String {
    let text = text.replace("TOP", TOP).replace("ALONE", ALONE).replace("MID", MID);
    text.replace("BASE", BASE).replace("DISK", disk.path()).replace("DIR", &directory(disk))
}

/// Options for the one that is served.
const SERVED: &[&[&str]] = &[
    &["json:{TOP}"],
    &["json:{TOP,\"backing\":{MID}}"],
    &[
        "json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"file.driver\":\"file\",\"file.filename\":\"DIR/mid.qcow2\"}}",
    ],
    &["json:{TOP,\"backing.driver\":\"qcow2\",\"backing.file.filename\":\"DIR/mid.qcow2\"}"],
    &["json:{TOP,\"backing.file.filename\":\"DIR/mid.qcow2\"}"],
    &["json:{TOP,\"backing\":{MID},\"backing.file.filename\":\"DIR/other.qcow2\"}"],
    &["json:{TOP,\"backing\":{MID,\"backing\":null}}"],
    &["json:{TOP,\"backing\":{MID,\"backing\":BASE}}"],
    &[
        "json:{TOP,\"backing\":{MID,\"node-name\":\"n\",\"read-only\":false,\"l2-cache-size\":65536}}",
    ],
    &["json:{TOP,\"backing\":{\"file\":{\"driver\":\"file\",\"filename\":\"DIR/other.qcow2\"}}}"],
    &["json:{TOP,\"backing\":{\"node-name\":\"n\"}}"],
    &["json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"file\":{\"locking\":\"off\"}}}"],
    &[
        "json:{TOP,\"backing\":{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"DISK\"}}}",
    ],
    &[
        "json:{TOP,\"backing\":{\"driver\":\"raw\",\"offset\":1048576,\"size\":65536,\"file\":{\"driver\":\"file\",\"filename\":\"DISK\"}}}",
    ],
    &["json:{TOP,\"backing\":{}}"],
    &["json:{TOP,\"backing\":{MID,\"backing\":{}}}"],
    // The depth that a driver above the image tells, alone and with a temporary layer.
    &["json:{\"driver\":\"raw\",\"file\":{TOP}}"],
    &["json:{\"driver\":\"raw\",\"offset\":65536,\"size\":262144,\"file\":{TOP}}"],
    &["-s", "json:{\"driver\":\"raw\",\"file\":{TOP}}"],
    &["-o", "512", "json:{TOP}"],
    &["-s", "-o", "512", "json:{TOP}"],
    &["-s", "json:{TOP}"],
    &["-s", "-f", "raw", "DISK"],
    &["json:{ALONE,\"backing\":BASE}"],
    &["json:{ALONE,\"backing\":{\"file\":{\"driver\":\"file\",\"filename\":\"DIR/mid.qcow2\"}}}"],
    &["json:{\"file\":{\"driver\":\"file\",\"filename\":\"DIR/top.qcow2\"},\"backing\":{MID}}"],
    &[
        "--image-opts",
        "driver=qcow2,file.filename=DIR/top.qcow2,backing.file.filename=DIR/mid.qcow2",
    ],
    &["--image-opts", "driver=qcow2,file.filename=DIR/top.qcow2,backing.driver=qcow2"],
];

#[test]
fn a_backing_file_among_the_options_takes_the_place_of_the_one_in_the_header() {
    tools!(theirs = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io", nbdinfo = "nbdinfo");
    let disk = images(&qemu_img, &qemu_io);
    for options in SERVED {
        let options: Vec<_> = options.iter().map(|word| filled(&disk, word)).collect();
        let options: Vec<_> = options.iter().map(String::as_str).collect();
        let accesses: &[&[&str]] =
            if options.contains(&"-s") { &[&["-r"], &[]] } else { &[&["-r"]] };
        for access in accesses {
            let words = [&["-t", "-A", "-e", "5"], *access, &options[..]].concat();
            let copy = disk.beside("copy.img");
            let mut seen = Vec::new();
            for program in [Command::new(&theirs), ours()] {
                let server = Foreground::start(program, &words);
                let uri = server.uri("");
                let depths = peer(&nbdinfo, &["--map=qemu:allocation-depth", &uri]);
                let writable = run(Command::new(&nbdinfo).args(["--is", "writable", &uri])).code;
                peer(&qemu_img, &["convert", "-f", "raw", "-O", "raw", &uri, &copy]);
                seen.push((depths, writable, std::fs::read(&copy).expect("the copy")));
            }
            assert_eq!((&seen[0].0, seen[0].1), (&seen[1].0, seen[1].1), "{words:?}");
            assert!(seen[0].2 == seen[1].2, "different bytes: {words:?}");
        }
    }
}

/// Options that both refuse, and a word of ours about the reason.
const REFUSED: &[(&str, &str)] = &[
    ("json:{TOP,\"backing\":\"node\"}", "'node'"),
    ("json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"file\":\"node\"}}", "node"),
    ("json:{ALONE,\"backing\":{\"driver\":\"qcow2\"}}", "no file"),
    ("json:{ALONE,\"backing\":{}}", "no file"),
    ("json:{TOP,\"backing\":{ALONE,\"backing\":{}}}", "no file"),
    ("json:{TOP,\"backing\":{\"driver\":\"nosuch\"}}", "'nosuch'"),
    ("json:{TOP,\"backing\":{MID,\"bogus\":1}}", "'bogus'"),
    ("json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"filename\":\"DIR/mid.qcow2\"}}", "'filename'"),
    (
        "json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"DIR/missing\"}}}",
        "missing",
    ),
    (
        "json:{TOP,\"backing\":{\"driver\":\"qcow2\",\"file\":{\"driver\":\"file\",\"filename\":\"DISK\"}}}",
        "qcow2",
    ),
    (
        "json:{\"driver\":\"raw\",\"file\":{\"driver\":\"file\",\"filename\":\"DISK\"},\"backing\":BASE}",
        "backing",
    ),
];

#[test]
fn a_backing_file_that_cannot_be_found_or_has_unknown_options_is_refused() {
    tools!(theirs = "qemu-nbd", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = images(&qemu_img, &qemu_io);
    for (name, reason) in REFUSED {
        let name = filled(&disk, name);
        let Outcome { code, stderr, .. } = run(Command::new(&theirs).args(["-r", &name]));
        assert_eq!(code, Some(1), "{name}: {stderr}");
        let Outcome { code, stderr, .. } = run(ours().args(["-r", &name]));
        assert_eq!(code, Some(1), "{name}: {stderr}");
        assert!(stderr.contains(reason), "'{reason}' is missing in: {stderr}");
    }
}

#[test]
fn writes_above_a_given_backing_file_copy_from_it_and_leave_it_and_the_header_alone() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = images(&qemu_img, &qemu_io);
    let name = filled(&disk, "json:{TOP,\"backing\":{MID}}");
    let below = ["base", "other", "mid"].map(|name| disk.beside(&format!("{name}.qcow2")));
    let before = below.clone().map(|path| std::fs::read(path).expect("an image"));
    let (first, second) = (disk.beside("before.img"), disk.beside("after.img"));
    peer(&qemu_img, &["convert", "-O", "raw", &name, &first]);
    for (mode, kept) in [("-s", false), ("-t", true)] {
        let server = Foreground::start(ours(), &["-t", mode, &name]);
        // Parts of clusters that are below, in each layer and in none.
        for offset in [64, 128, 192, 256, 512] {
            let write = format!("write -P 9 {offset}k 4k");
            peer(&qemu_io, &["-f", "raw", "-c", &write, &server.uri("")]);
        }
        drop(server);
        let mut expected = std::fs::read(&first).expect("the disk");
        for offset in [64, 128, 192, 256, 512_usize].into_iter().filter(|_| kept) {
            expected[offset << 10..][..4096].fill(9);
        }
        peer(&qemu_img, &["convert", "-O", "raw", &name, &second]);
        assert!(std::fs::read(&second).expect("the disk") == expected, "{mode}");
    }
    assert!(below.map(|path| std::fs::read(path).expect("an image")) == before);
    let about = image::info(&qemu_img, &disk.beside("top.qcow2"));
    assert_eq!(about["backing-filename"], "base.qcow2");
    image::is_clean(&qemu_img, &disk.beside("top.qcow2"));
}

#[test]
fn image_commands_take_names_with_a_given_backing_file() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = images(&qemu_img, &qemu_io);
    let name = filled(&disk, "json:{TOP,\"backing\":{MID,\"backing\":BASE}}");
    let (theirs, ours) = (disk.beside("theirs.img"), disk.beside("ours.img"));
    peer(&qemu_img, &["convert", "-O", "raw", &name, &theirs]);
    nbd_cli(&["image", "convert", "-O", "raw", &name, &ours]).success();
    assert!(std::fs::read(&theirs).expect("a copy") == std::fs::read(&ours).expect("a copy"));
    let chain = image::ours(&["info", "--json", "--backing-chain", &name]);
    let files: Vec<_> = chain
        .as_array()
        .expect("a list")
        .iter()
        .map(|layer| {
            layer["filename"].as_str().and_then(|name| name.rsplit('/').next()).expect("a name")
        })
        .collect();
    assert_eq!(files, ["top.qcow2", "mid.qcow2", "base.qcow2"]);
    let theirs = image::json(&qemu_img, &["map", "--output=json", &name]);
    let depths = |map: &serde_json::Value| -> Vec<_> {
        let parts = map.as_array().expect("a list").iter();
        parts.map(|part| (part["start"].clone(), part["depth"].clone())).collect()
    };
    assert_eq!(depths(&image::ours(&["map", "--json", &name])), depths(&theirs));
    let Outcome { code, stderr, .. } = nbd_cli(&["copy", &name, "null:"]);
    assert_eq!(code, Some(1), "{stderr}");
    assert!(stderr.contains("image convert"), "{stderr}");
}

#[test]
fn a_name_in_an_image_that_gives_backing_files_is_followed_where_the_policy_allows_all_of_them() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = images(&qemu_img, &qemu_io);
    let elsewhere = tempfile::tempdir().expect("a directory");
    let outside = elsewhere.path().join("base.qcow2");
    std::fs::copy(disk.beside("base.qcow2"), &outside).expect("room");
    let secret = format!(
        "json:{{{},\"backing\":{{\"driver\":\"qcow2\",\"file\":{{\"driver\":\"file\",\"filename\":\"{}\"}}}}}}",
        filled(&disk, "MID"),
        outside.display()
    );
    for (name, trust) in
        [(filled(&disk, "json:{MID,\"backing\":BASE}"), &[][..]), (secret, &["--trust-image"])]
    {
        let overlay = disk.beside("overlay.qcow2");
        let _ = std::fs::remove_file(&overlay);
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &name, "-F", "qcow2", &overlay]);
        let (theirs, ours) = (disk.beside("theirs.img"), disk.beside("ours.img"));
        peer(&qemu_img, &["convert", "-O", "raw", &overlay, &theirs]);
        let convert = ["image", "convert", "-O", "raw", &overlay, &ours];
        if !trust.is_empty() {
            says(nbd_cli(&convert), &["base.qcow2", "--trust-image"]);
        }
        nbd_cli(&[&convert, trust].concat()).success();
        assert!(std::fs::read(&theirs).expect("a copy") == std::fs::read(&ours).expect("a copy"));
        let chain = ["info", "--json", "--backing-chain", &overlay];
        let chain = image::ours(&[&chain, trust].concat());
        assert_eq!(chain.as_array().map(Vec::len), Some(3), "{chain}");
        std::fs::remove_file(&ours).expect("the copy");
    }
}
