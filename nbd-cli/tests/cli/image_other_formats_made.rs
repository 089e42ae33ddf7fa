//! Images of other programs' formats that commands make: how large they are, and that a failure
//! leaves nothing of them.

use std::fs;
use std::os::unix::fs::FileExt as _;
use std::process::{Command, Stdio};

use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::support::qemu_nbd::{Foreground, ours, wait_until};
use crate::support::{PROGRAM, Server, in_foreground, nbd_cli, run};
use crate::tools;

const KINDS: &[(&str, &str)] = &[
    ("vdi", "static=off"),
    ("vdi", "static=on"),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed"),
    ("vhdx", "block_size=1M"),
    ("vhdx", "subformat=fixed"),
    ("vmdk", "subformat=monolithicSparse"),
    ("vmdk", "subformat=streamOptimized"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
];

/// A disk with data at its start, in its middle and at its end.
fn source(directory: &std::path::Path) -> String {
    let path = directory.join("disk.img");
    let file = fs::File::create(&path).expect("a file");
    for start in [0, 10 << 20, 20 << 20] {
        file.write_all_at(&[7; 512], start).expect("room");
    }
    path.to_str().expect("text").to_owned()
}

#[test]
fn a_converted_image_is_as_large_as_was_measured_and_holds_the_disk() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for (format, option) in KINDS {
        let to = directory.path().join(format!("{format}-{option}"));
        let to = to.to_str().expect("text");
        nbd_cli(&["image", "convert", "-O", format, "-o", option, &from, to]).success();
        nbd_cli(&["image", "compare", "-f", "raw", "-F", format, &from, to]).success();
        let measure = ["image", "measure", "--json", "-O", format, "-o", option, "--format", "raw"];
        let measured = nbd_cli(&[&measure[..], &[&from]].concat()).success();
        let measured: Value = serde_json::from_str(&measured).expect("JSON");
        // Of all its files.
        let files = fs::read_dir(directory.path()).expect("a directory");
        let files = files.map(|file| file.expect("a file").path());
        let own = files.filter(|path| path.to_str().is_some_and(|path| path.starts_with(to)));
        let length: u64 = own.map(|path| path.metadata().expect("a file").len()).sum();
        let required = measured["required"].as_u64().expect("a number");
        match *option {
            // What compression saves is not known.
            "subformat=streamOptimized" => assert!(length < required, "{format} {option}"),
            // A descriptor has the names of files.
            _ => assert!(length.abs_diff(required) < 200, "{format} {option}: {length} {required}"),
        }
        let whole = measured["fully-allocated"].as_u64().expect("a number");
        assert!(whole >= required && whole > 20 << 20, "{format} {option}: {whole}");
    }
}

#[test]
fn a_file_that_cannot_grow_leaves_nothing() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let bytes: Vec<u8> =
        (0..20 << 20).map(|place: u32| (place.wrapping_mul(place) >> 7) as u8).collect();
    fs::write(&from, bytes).expect("room");
    for (format, option) in KINDS {
        let to = directory.path().join("new");
        let mut limited = Command::new("sh");
        limited.args(["-c", "ulimit -f 4096; trap '' XFSZ; exec \"$@\"", "sh", PROGRAM, "image"]);
        limited.args(["convert", "-O", format, "-o", option, &from]).arg(&to);
        let outcome = run(&mut limited);
        assert_eq!(outcome.code, Some(1), "{format} {option}: {outcome:?}");
        assert!(outcome.stderr.contains("would become larger"), "{format} {option}: {outcome:?}");
        assert_eq!(
            fs::read_dir(directory.path()).expect("a directory").count(),
            1,
            "{format} {option}"
        );
    }
}

#[test]
fn an_interrupted_conversion_leaves_nothing() {
    tools!(nbdkit = "nbdkit");
    for (format, option) in KINDS {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::nbdkit(&nbdkit, &["--filter=delay", "pattern", "64M", "rdelay=3600"]);
        let to = directory.path().join("new");
        let mut command = in_foreground();
        command.args(["image", "convert", "-O", format, "-o", option]).arg(server.uri()).arg(&to);
        let mut child = command.stderr(Stdio::null()).spawn().expect("nbd-cli");
        let partial = directory.path().join("new.partial");
        wait_until("the command is at work", || partial.exists());
        kill_process(Pid::from_child(&child), Signal::TERM).expect("it runs");
        assert!(!child.wait().expect("a child").success(), "{format} {option}");
        assert_eq!(
            fs::read_dir(directory.path()).expect("a directory").count(),
            0,
            "{format} {option}"
        );
    }
}

#[test]
fn a_kill_leaves_nothing_that_is_opened_as_a_disk_in_several_files() {
    tools!(nbdkit = "nbdkit");
    for subformat in ["monolithicFlat", "twoGbMaxExtentSparse", "twoGbMaxExtentFlat"] {
        let directory = tempfile::tempdir().expect("a directory");
        let server = Server::nbdkit(&nbdkit, &["--filter=delay", "pattern", "64M", "rdelay=3600"]);
        let to = directory.path().join("new.vmdk");
        let mut command = in_foreground();
        let option = format!("subformat={subformat}");
        command.args(["image", "convert", "-O", "vmdk", "-o", &option]).arg(server.uri()).arg(&to);
        let mut child = command.stderr(Stdio::null()).spawn().expect("nbd-cli");
        let is_made = || fs::read_dir(directory.path()).expect("a directory").count() == 2;
        wait_until("the command is at work", is_made);
        kill_process(Pid::from_child(&child), Signal::KILL).expect("it runs");
        assert!(!child.wait().expect("a child").success());
        for file in fs::read_dir(directory.path()).expect("a directory") {
            let path = file.expect("a file").path();
            let name = path.to_str().expect("text");
            assert!(name.ends_with(".partial"), "{name}");
            let opened = nbd_cli(&["image", "compare", "-f", "vmdk", "-F", "vmdk", name, name]);
            assert_eq!(opened.code, Some(2), "{opened:?}");
        }
    }
}

#[test]
fn files_of_the_names_of_parts_are_kept_unless_the_whole_disk_is_replaced() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (to, part) = (path("disk.vmdk"), path("disk-flat.vmdk"));
    fs::write(&part, "mine").expect("room");
    let flat = ["-O", "vmdk", "-o", "subformat=monolithicFlat", &from, &to];
    let create = ["image", "create", "-f", "vmdk", "-o", "subformat=monolithicFlat", &to, "1M"];
    for command in [
        [&["image", "convert"], &flat[..]].concat(),
        create.to_vec(),
        [&["qemu-img", "convert"], &flat[..]].concat(),
    ] {
        let outcome = nbd_cli(&command);
        assert_eq!(outcome.code, Some(1), "{outcome:?}");
        assert!(outcome.stderr.contains("disk-flat.vmdk"), "{outcome:?}");
        assert_eq!(fs::read(&part).expect("it is there"), b"mine");
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 2);
    }
    fs::remove_file(&part).expect("it is there");
    nbd_cli(&create).success();
    assert!(nbd_cli(&create).stderr.contains("there is a file of that name"));
    let replace = [&["qemu-img", "convert", "-f", "raw"], &flat[..]].concat();
    nbd_cli(&replace).success();
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "vmdk", &from, &to]).success();
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 3);
    // While its part is in use, both stay.
    let before = [&to, &part].map(|path| fs::read(path).expect("it is there"));
    let user = imgfmt::storage::FileStorage::open(
        part.as_ref(),
        imgfmt::Access::ReadWrite,
        imgfmt::Locking::On,
    );
    let user = user.expect("it is not in use");
    let outcome = nbd_cli(&replace);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("open for writing"), "{outcome:?}");
    drop(user);
    assert!([&to, &part].map(|path| fs::read(path).expect("it is there")) == before);
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 3);
}

#[test]
fn files_of_the_names_of_parts_that_are_none_of_the_replaced_image_are_kept() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (to, part) = (path("disk.vmdk"), path("disk-flat.vmdk"));
    nbd_cli(&["image", "create", "-f", "vmdk", &to, "1M"]).success();
    fs::write(&part, "mine").expect("room");
    let before = fs::read(&to).expect("it is there");
    let flat = ["-f", "raw", "-O", "vmdk", "-o", "subformat=monolithicFlat", &from, &to];
    let outcome = nbd_cli(&[&["qemu-img", "convert"], &flat[..]].concat());
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("disk-flat.vmdk"), "{outcome:?}");
    assert_eq!(fs::read(&part).expect("it is there"), b"mine");
    assert!(fs::read(&to).expect("it is there") == before);
    assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 3);
}

#[test]
fn image_create_and_convert_take_the_options_of_vmdk_that_qemu_img_has() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (base, top, copy) = (path("base.vmdk"), path("top.vmdk"), path("copy.vmdk"));
    nbd_cli(&["image", "convert", "-O", "vmdk", &from, &base]).success();
    let over = "backing_file=base.vmdk,backing_fmt=vmdk,adapter_type=lsilogic,zeroed_grain=on";
    nbd_cli(&["image", "create", "-f", "vmdk", "-o", over, &top]).success();
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "vmdk", &from, &top]).success();
    let over = "subformat=twoGbMaxExtentSparse,backing_file=base.vmdk,compat6=on,toolsversion=7";
    nbd_cli(&["image", "convert", "-O", "vmdk", "-o", over, &from, &copy]).success();
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "vmdk", &from, &copy]).success();
    // It has nothing of its own.
    assert!(fs::metadata(path("copy-s001.vmdk")).expect("its part").len() <= 65536);
    fs::remove_file(&top).expect("it is there");
    let flags = ["-b", "base.vmdk", "-F", "vmdk", &top];
    nbd_cli(&[&["image", "create", "-f", "vmdk"], &flags[..]].concat()).success();
    nbd_cli(&["image", "compare", "-f", "raw", "-F", "vmdk", &from, &top]).success();
    fs::remove_file(&top).expect("it is there");
    let twice = [&["image", "create", "-f", "vmdk", "-o", "backing_file=x"], &flags[..]].concat();
    assert!(nbd_cli(&twice).stderr.contains("given once"));
    let wrong = ["image", "create", "-f", "vmdk", "-b", &from, "-F", "raw", &top];
    assert!(nbd_cli(&wrong).stderr.contains("is a VMDK"));
}

#[test]
fn an_existing_image_is_not_written_into_and_the_command_says_so() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    for (format, option) in KINDS {
        let to = directory.path().join(format!("{format}-{option}"));
        let name = to.to_str().expect("text");
        nbd_cli(&["image", "convert", "-O", format, "-o", option, &from, name]).success();
        let before = fs::read(&to).expect("it is there");
        for command in ["image", "qemu-img"] {
            let outcome = nbd_cli(&[command, "convert", "-n", "-O", format, &from, name]);
            assert_eq!(outcome.code, Some(1), "{format}: {outcome:?}");
            assert!(outcome.stderr.contains("is not written into"), "{format}: {outcome:?}");
        }
        assert!(fs::read(&to).expect("it is there") == before, "{format}");
    }
}

#[test]
fn the_qemu_img_front_end_makes_what_qemu_img_makes() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    for format in ["vdi", "vpc", "vhdx", "vmdk"] {
        let to = path(format);
        let options = ["qemu-img", "convert", "-f", "raw", "-S", "0", "-O", format, &from, &to];
        nbd_cli(&options).success();
    }
    let to = path("by-geometry");
    let operands = [format!("if={from}"), format!("of={to}")];
    nbd_cli(&["qemu-img", "dd", "-f", "raw", "-O", "vpc", &operands[0], &operands[1]]).success();
    let sizes = [path("vpc"), to].map(|path| {
        let info = nbd_cli(&["image", "info", "--json", &path]).success();
        let info: Value = serde_json::from_str(&info).expect("JSON");
        info["virtual-size"].as_u64()
    });
    assert_eq!(sizes[0], sizes[1], "both by the geometry");
}

#[test]
fn a_backup_is_not_restored_to_a_format_that_restore_does_not_write() {
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let to = directory.path().join("disk.vdi");
    let to = to.to_str().expect("text");
    let outcome = nbd_cli(&["restore", "-f", "raw", "-O", "vdi", &from, to]);
    assert_ne!(outcome.code, Some(0), "{outcome:?}");
    assert!(outcome.stderr.contains("image convert"), "{outcome:?}");
}

#[test]
fn the_disks_of_an_archive_are_sources_of_commands() {
    tools!(tar = "tar");
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let stream = ["image", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", &from];
    nbd_cli(&[&stream[..], &[&path("disk.vmdk")]].concat()).success();
    let mut pack = Command::new(tar);
    let archive = path("machine.ova");
    run(pack.args(["-C", &path("."), "-cf", &archive, "disk.img", "disk.vmdk"])).success();
    let disk = format!("{archive}:disk.vmdk");
    for name in [disk.clone(), format!("{archive}:2")] {
        nbd_cli(&["image", "compare", "-f", "raw", &from, &name]).success();
        let info = nbd_cli(&["image", "info", "--json", &name]).success();
        let info: Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(
            (info["format"].as_str(), info["virtual-size"].as_u64()),
            (Some("vmdk"), Some((20 << 20) + 512))
        );
        nbd_cli(&["image", "map", &name]).success();
        nbd_cli(&["image", "measure", "-O", "qcow2", &name]).success();
        nbd_cli(&["serve", "--read-only", "--run", "true", &name]).success();
        let copy = path("copy.qcow2");
        nbd_cli(&["image", "convert", "-O", "qcow2", &name, &copy]).success();
        nbd_cli(&["image", "compare", "-f", "raw", &from, &copy]).success();
        fs::remove_file(copy).expect("a file");
        nbd_cli(&["qemu-img", "compare", "-f", "raw", &from, &name]).success();
    }
    nbd_cli(&["image", "compare", "-f", "raw", &from, &archive]).success();
    nbd_cli(&["image", "resize", &disk, "+1M"]).failure();
    // As for QEMU, the archive itself is a raw disk.
    let info = nbd_cli(&["qemu-img", "info", "--output=json", &archive]).success();
    assert!(info.contains("\"format\": \"raw\""), "{info}");
}

#[test]
fn the_manifest_of_an_archive_is_verified_and_what_is_wrong_is_named() {
    tools!(tar = "tar", openssl = "openssl");
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let stream = ["image", "convert", "-O", "vmdk", "-o", "subformat=streamOptimized", &from];
    nbd_cli(&[&stream[..], &[&path("a disk.vmdk")]].concat()).success();
    let descriptor = "<Envelope><File id='a' href='a%20disk.vmdk'/><Disk fileRef='a'/></Envelope>";
    fs::write(path("machine.ovf"), descriptor).expect("room");
    let archive = path("machine.ova");
    let pack = |members: &[&str]| {
        drop(fs::remove_file(&archive));
        let mut pack = Command::new(&tar);
        run(pack.args(["-C", &path("."), "-cf", &archive]).args(members)).success();
    };
    let all = ["machine.ovf", "machine.mf", "a disk.vmdk"];
    // Without a manifest only the disk can be checked.
    pack(&all[..1]);
    nbd_cli(&["image", "check", &archive]).failure();
    pack(&["machine.ovf", "a disk.vmdk"]);
    let checked = nbd_cli(&["image", "check", &archive]).success();
    assert_eq!(checked, "no errors were found\n");
    for digest in ["-sha1", "-sha256", "-sha512"] {
        let mut make = Command::new(&openssl);
        let files = ["dgst", digest, "machine.ovf", "a disk.vmdk"];
        let manifest = run(make.current_dir(directory.path()).args(files)).success();
        fs::write(path("machine.mf"), manifest).expect("room");
        pack(&all);
        let checked = nbd_cli(&["image", "check", &archive]).success();
        let expected = "all 2 files are as the manifest 'machine.mf' says\nno errors were found\n";
        assert_eq!(checked, expected, "{digest}");
        let report = nbd_cli(&["image", "check", "--json", &archive]).success();
        let report: Value = serde_json::from_str(&report).expect("JSON");
        assert_eq!(report["files"][1]["filename"], "a disk.vmdk");
        assert_eq!(report["files"][1]["digest"], digest[1..]);
        assert_eq!(report["files"][1]["state"], "ok");
    }
    // One byte of the disk is another one; the same of an archive that lost its end.
    let sound = fs::read(&archive).expect("the archive");
    let place = sound.windows(4).position(|bytes| bytes == b"KDMV").expect("the disk") + 3000;
    let mut changed = sound;
    changed[place] ^= 1;
    fs::write(&archive, &changed).expect("room");
    let outcome = nbd_cli(&["image", "check", &archive]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    assert!(outcome.stdout.contains("'a disk.vmdk' has another digest"), "{outcome:?}");
    assert!(outcome.stdout.contains("1 of 2 files are not"), "{outcome:?}");
    pack(&["machine.ovf", "machine.mf", "disk.img"]);
    let outcome = nbd_cli(&["image", "check", &archive]);
    assert_eq!(outcome.code, Some(2), "{outcome:?}");
    for found in ["'a disk.vmdk' is in the manifest", "'disk.img' is in the archive"] {
        assert!(outcome.stdout.contains(found), "{outcome:?}");
    }
    // A manifest that makes no sense is said to, and nothing else needs it.
    fs::write(path("machine.mf"), "SHA1(machine.ovf)= 12\n").expect("room");
    pack(&all);
    let outcome = nbd_cli(&["image", "check", &archive]);
    assert!(outcome.stderr.contains("line 1 makes no sense"), "{outcome:?}");
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    nbd_cli(&["image", "compare", "-f", "raw", &from, &archive]).success();
    nbd_cli(&["serve", "--read-only", "--run", "true", &archive]).success();
}

#[test]
fn the_form_of_qemu_nbd_serves_an_archive_and_a_fixed_vhd_as_they_are() {
    tools!(tar = "tar");
    let directory = tempfile::tempdir().expect("a directory");
    let from = source(directory.path());
    let path = |name: &str| directory.path().join(name).to_str().expect("text").to_owned();
    let (archive, vhd) = (path("machine.ova"), path("disk.vhd"));
    let mut pack = Command::new(tar);
    run(pack.args(["-C", &path("."), "-cf", &archive, "disk.img"])).success();
    let options = "subformat=fixed,force_size=on";
    nbd_cli(&["image", "convert", "-f", "raw", "-O", "vpc", "-o", options, &from, &vhd]).success();
    let size = |arguments: &[&str]| {
        let server = Foreground::start(ours(), &[&["-r", "-t"], arguments].concat());
        let size = nbd_cli(&["info", "--size", &server.uri("")]).success();
        size.trim().parse::<u64>().expect("a number")
    };
    let length = |path: &str| fs::metadata(path).expect("a file").len();
    for file in [&archive, &vhd] {
        assert_eq!(size(&[file]), length(file), "{file}");
        let image = ["driver=raw,file.driver=file,file.filename=", file].concat();
        assert_eq!(size(&["--image-opts", &image]), length(file), "{file}");
    }
    let member = format!("{archive}:disk.img");
    assert_eq!(size(&[&member]), length(&from));
    assert_eq!(size(&["-f", "vpc", &vhd]), length(&from));
    // Elsewhere their names tell what they are.
    for name in [&archive, &vhd] {
        let info = nbd_cli(&["image", "info", "--json", name]).success();
        let info: Value = serde_json::from_str(&info).expect("JSON");
        assert_eq!(info["virtual-size"], length(&from));
    }
}
