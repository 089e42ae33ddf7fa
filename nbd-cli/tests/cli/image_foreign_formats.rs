//! Images of other programs' formats are read where their format is, and otherwise recognised and
//! refused by every command that would treat them as raw disks; the format `raw` opens them anyway.

use std::path::Path;
use std::process::Command;

use imgfmt::Format;

use crate::support::{Disk, Outcome, PROGRAM, nbd_cli, peer, run, says, tool};
use crate::tools;

/// Images that qemu-img makes, with their formats and the names by which they are to be recognised.
fn made(disk: &Disk, qemu_img: &Path) -> Vec<(String, Format, &'static str)> {
    let mut images = Vec::new();
    for (format, options, name) in [
        ("qcow", "", "qcow"),
        ("qed", "", "QED"),
        ("vmdk", "", "VMDK"),
        ("vmdk", "subformat=monolithicFlat", "VMDK"),
        ("vmdk", "subformat=streamOptimized", "VMDK"),
        ("vdi", "", "VDI"),
        ("vpc", "", "VHD"),
        ("vpc", "subformat=fixed,force_size=on", "VHD"),
        ("vhdx", "", "VHDX"),
        ("parallels", "", "Parallels"),
    ] {
        let path = disk.beside(&format!("{}.{format}", images.len()));
        let options = if options.is_empty() { vec![] } else { vec!["-o", options] };
        let arguments = [&["create", "-q", "-f", format][..], &options, &[&path, "4M"]].concat();
        peer(qemu_img, &arguments);
        images.push((path, Format::from_name(format).expect("a format"), name));
    }
    images
}

/// Images of formats that are not read: those that qemu-img can make here, and headers as the
/// formats' specifications have them.
fn images(disk: &Disk, qemu_img: &Path) -> Vec<(String, &'static str)> {
    let refused = |(path, format, name): (String, Format, &'static str)| {
        (!format.is_supported()).then_some((path, name))
    };
    let mut images: Vec<_> = made(disk, qemu_img).into_iter().filter_map(refused).collect();
    let mut dmg = vec![0; 8192];
    dmg[7680..7692].copy_from_slice(b"koly\0\0\0\x04\0\0\x02\0");
    for (file, bytes, name) in [
        ("a.bochs", b"Bochs Virtual HD Image\0".to_vec(), "Bochs"),
        ("a.cloop", b"#!/bin/sh\n#V2.0 Format\nmodprobe cloop\n".to_vec(), "cloop"),
        ("a.dmg", dmg, "DMG"),
    ] {
        let path = disk.beside(file);
        let mut bytes = bytes;
        bytes.resize(8192, 0);
        std::fs::write(&path, bytes).expect("room");
        images.push((path, name));
    }
    images
}

/// Arguments of the commands that open an image whose format they look for.
fn openers<'a>(image: &'a str, new: &'a str, other: &'a str) -> Vec<Vec<&'a str>> {
    vec![
        vec!["image", "map", image],
        vec!["image", "convert", "-O", "qcow2", image, new],
        vec!["image", "resize", image, "+1M"],
        vec!["image", "rebase", "--no-backing", image],
        vec!["image", "rebase", "--unsafe", "--no-backing", image],
        vec!["image", "commit", image],
        vec!["image", "snapshot", "list", image],
        vec!["image", "snapshot", "create", image, "name"],
        vec!["image", "measure", image],
        vec!["bitmap", "list", image],
        vec!["bitmap", "add", image, "name"],
        vec!["restore", image, new],
        vec!["serve", "--read-only", "--run", "true", image],
        vec!["serve", "--run", "true", image],
        vec!["serve", "--temporary", "--run", "true", image],
        vec!["backup", "--bitmap", "b", "--base", image, "nbd+unix:///?socket=/nowhere", new],
        vec!["image", "compare", image, other],
        vec!["image", "compare", other, image],
    ]
}

#[test]
fn no_command_takes_an_image_of_another_format_for_a_raw_disk() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let new = disk.beside("new");
    for (image, name) in images(&disk, &qemu_img) {
        let before = std::fs::read(&image).expect("the image");
        for command in openers(&image, &new, disk.path()) {
            let outcome = nbd_cli(&command);
            let code = match command[1] {
                "compare" => 2,
                _ => 1,
            };
            assert_eq!(outcome.code, Some(code), "{command:?}: {outcome:?}");
            assert_eq!(outcome.stderr.lines().count(), 1, "{command:?}: {outcome:?}");
            let helps = outcome.stderr.contains(name)
                && (command[0] == "backup" || outcome.stderr.contains("ormat raw)"));
            assert!(helps, "{command:?}: {outcome:?}");
            assert!(!Path::new(&new).exists(), "{command:?}");
        }
        // Its exit code says that images of the format cannot be checked.
        let outcome = nbd_cli(&["image", "check", &image]);
        assert_eq!(outcome.code, Some(63), "{outcome:?}");
        assert!(outcome.stderr.contains(name), "{outcome:?}");
        assert!(std::fs::read(&image).expect("the image") == before, "{image} was changed");
        let outcome = qemu_nbd(&[&image]);
        assert!(
            outcome.stderr.contains(name) && outcome.stderr.contains("(-f raw)"),
            "{outcome:?}"
        );
    }
}

#[test]
fn an_image_of_a_format_that_is_read_is_read_by_every_command_and_changed_by_none() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (new, export) = (disk.beside("new"), "nbd+unix:///?socket=/nowhere");
    let read = made(&disk, &qemu_img).into_iter().filter(|(_, format, _)| format.is_supported());
    let read: Vec<_> = read.collect();
    assert!(!read.is_empty());
    for (image, format, name) in read {
        peer(&qemu_io, &["-f", format.name(), "-c", "write -P 7 1M 64k", &image]);
        let before = std::fs::read(&image).expect("the image");
        let info = nbd_cli(&["image", "info", "--json", &image]);
        assert!(info.stdout.contains(&format!("\"format\": \"{format}\"")), "{info:?}");
        let outcome = nbd_cli(&["image", "check", &image]);
        match format {
            Format::Vdi | Format::Vhdx | Format::Vmdk => {
                let has_other_files = outcome.stderr.contains("other files");
                let code = if has_other_files { 63 } else { 0 };
                assert_eq!(outcome.code, Some(code), "{image}: {outcome:?}");
            }
            // Its exit code says that images of the format cannot be checked.
            _ => assert!(outcome.code == Some(63) && outcome.stderr.contains(name), "{outcome:?}"),
        }
        nbd_cli(&["image", "map", &image]).success();
        nbd_cli(&["image", "measure", &image]).success();
        nbd_cli(&["image", "convert", "-O", "qcow2", &image, &new]).success();
        peer(&qemu_img, &["compare", "-f", format.name(), "-F", "qcow2", &image, &new]);
        nbd_cli(&["image", "compare", &image, &new]).success();
        std::fs::remove_file(&new).expect("the copy");
        nbd_cli(&["serve", "--read-only", "--run", "true", &image]).success();
        nbd_cli(&["serve", "--temporary", "--run", "true", &image]).success();
        let overlay = disk.beside("overlay.qcow2");
        let made = ["image", "create", "-f", "qcow2", "-b", &image, "-F", format.name(), &overlay];
        nbd_cli(&made).success();
        nbd_cli(&["image", "compare", &image, &overlay]).success();
        std::fs::remove_file(&overlay).expect("the overlay");
        for command in [
            &["image", "resize", &image, "+1M"][..],
            &["image", "rebase", "--no-backing", &image],
            &["image", "rebase", "--unsafe", "--no-backing", &image],
            &["image", "commit", &image],
            &["image", "snapshot", "create", &image, "name"],
            &["bitmap", "add", &image, "name"],
            &["serve", "--run", "true", &image],
            &["backup", "--bitmap", "b", "--base", &image, export, &new],
        ] {
            let outcome = nbd_cli(command);
            assert_eq!(outcome.code, Some(1), "{command:?}: {outcome:?}");
            assert_eq!(outcome.stderr.lines().count(), 1, "{command:?}: {outcome:?}");
        }
        says(nbd_cli(&["serve", "--run", "true", &image]), &[name, "--read-only", "image convert"]);
        assert!(std::fs::read(&image).expect("the image") == before, "{image} was changed");
        let outcome = qemu_nbd(&["-f", format.name(), &image]);
        assert!(outcome.stderr.contains("can only be read"), "{outcome:?}");
    }
}

fn qemu_nbd(arguments: &[&str]) -> Outcome {
    run(Command::new(PROGRAM).args(["qemu-nbd", "-p", "0"]).args(arguments))
}

#[test]
fn bytes_of_any_format_are_a_raw_disk_if_the_user_says_so() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let new = disk.beside("new");
    for (image, _) in images(&disk, &qemu_img) {
        nbd_cli(&["image", "convert", "--format", "raw", &image, &new]).success();
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&new).unwrap(), "{image}");
        std::fs::remove_file(&new).expect("the copy");
        nbd_cli(&["serve", "--format", "raw", "--run", "true", &image]).success();
        nbd_cli(&["image", "compare", "-f", "raw", "-F", "raw", &image, &image]).success();
    }
}

#[test]
fn a_format_that_cannot_be_read_yet_is_told_from_one_that_does_not_exist() {
    let disk = Disk::sparse();
    for format in ["dmg", "cloop", "bochs"] {
        let outcome = nbd_cli(&["image", "info", "--format", format, disk.path()]);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("cannot be read or written yet"), "{outcome:?}");
        let outcome = qemu_nbd(&["-f", format, disk.path()]);
        assert!(outcome.stderr.contains("cannot be read yet"), "{outcome:?}");
        assert!(outcome.stderr.contains("convert the image"), "{outcome:?}");
    }
    let outcome = nbd_cli(&["image", "info", "--format", "nonsense", disk.path()]);
    assert!(outcome.stderr.contains("[possible values: raw, qcow2, "), "{outcome:?}");
    let outcome = nbd_cli(&["image", "create", "--format", "qed", disk.path(), "1M"]);
    assert!(outcome.stderr.contains("cannot be made"), "{outcome:?}");
}

#[test]
fn a_backing_file_of_another_format_is_named_and_refused() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = (disk.beside("base.bochs"), disk.beside("overlay.qcow2"));
    let mut bytes = b"Bochs Virtual HD Image\0".to_vec();
    bytes.resize(8192, 0);
    std::fs::write(&base, bytes).expect("room");
    let name = ["-u", "-b", &base, "-F", "bochs"];
    peer(&qemu_img, &[&["create", "-q", "-f", "qcow2"][..], &name, &[&overlay, "4M"]].concat());
    says(nbd_cli(&["image", "map", &overlay]), &["Bochs", "image rebase --unsafe"]);
    // With probing allowed, and a header that does not say the format.
    let bytes = std::fs::read(&overlay).expect("the overlay");
    let place = bytes.windows(8).position(|word| word == b"\xe2\x79\x2a\xca\0\0\0\x05");
    let mut bytes = bytes;
    bytes[place.expect("the format's extension")] = 0x77;
    std::fs::write(&overlay, bytes).expect("room");
    says(
        nbd_cli(&["image", "map", "--trust-image", &overlay]),
        &["Bochs", "image rebase --unsafe"],
    );
}

#[test]
fn copying_an_image_file_says_that_its_container_is_copied() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let disk = Disk::sparse();
    for format in ["qcow2", "vdi"] {
        let (image, new) = (disk.beside(format), disk.beside("new"));
        peer(&qemu_img, &["convert", "-O", format, disk.path(), &image]);
        let outcome = nbd_cli(&["copy", &image, &new]);
        assert!(outcome.stderr.contains("nbd-cli image convert"), "{outcome:?}");
        outcome.success();
        assert!(std::fs::read(&image).unwrap() == std::fs::read(&new).unwrap(), "{format}");
    }
    let outcome = nbd_cli(&["copy", disk.path(), &disk.beside("new")]);
    assert_eq!(outcome.stderr, "");
}

#[test]
fn an_overlay_of_another_format_is_not_committed() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = (disk.beside("base.vmdk"), disk.beside("overlay.vmdk"));
    peer(&qemu_img, &["create", "-q", "-f", "vmdk", &base, "8M"]);
    peer(&qemu_img, &["create", "-q", "-f", "vmdk", "-b", &base, "-F", "vmdk", &overlay]);
    let before = std::fs::read(&base).unwrap();
    for commit in ["image", "qemu-img"] {
        let outcome = nbd_cli(&[commit, "commit", &overlay]);
        assert!(outcome.stderr.contains("only qcow2 images"), "{outcome:?}");
    }
    assert!(std::fs::read(&base).unwrap() == before);
}

#[test]
fn a_chain_is_described_through_layers_of_other_formats() {
    tools!(qemu_img = "qemu-img");
    for format in ["qed", "qcow", "vmdk"] {
        let disk = Disk::sparse();
        let [base, middle, top] =
            [format!("base.{format}"), format!("middle.{format}"), "top.qcow2".into()];
        let directory = disk.beside("");
        let directory = Path::new(&directory);
        let within = |arguments: &[&str]| {
            let mut command = Command::new(&qemu_img);
            run(command.current_dir(directory).args(arguments)).success()
        };
        within(&["create", "-q", "-f", format, &base, "8M"]);
        within(&["create", "-q", "-f", format, "-b", &base, "-F", format, &middle]);
        within(&["create", "-q", "-f", "qcow2", "-b", &middle, "-F", format, &top]);
        let chain = ["info", "--backing-chain", "--output", "json", &top];
        let theirs: serde_json::Value = serde_json::from_str(&within(&chain)).expect("JSON");
        let ours = |arguments: &[&str]| {
            run(Command::new(PROGRAM).current_dir(directory).args(arguments)).success()
        };
        let trusted = ours(&["image", "info", "--trust-image", "--backing-chain", "--json", &top]);
        let of_qemu_img = match format {
            // The first two record no format for the layer below.
            "vmdk" => ours(&[&["qemu-img"][..], &chain].concat()),
            _ => trusted.clone(),
        };
        for report in [trusted, of_qemu_img] {
            let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
            let layers = report.as_array().expect("an array");
            assert_eq!(layers.len(), 3, "{report}");
            for (ours, theirs) in layers.iter().zip(theirs.as_array().expect("an array")) {
                let ends = |name: &serde_json::Value| {
                    let name = name.as_str().expect("a name");
                    name.rsplit('/').next().map(str::to_owned)
                };
                assert_eq!(ends(&ours["filename"]), ends(&theirs["filename"]));
                for key in ["format", "backing-filename", "backing-filename-format"] {
                    assert_eq!(ours[key], theirs[key], "{key} of {report}");
                }
            }
        }
        let drawn = ours(&["image", "info", "--trust-image", "--graph", &top]);
        assert!(drawn.contains(&base), "{drawn}");
    }
}
