//! Images on block devices.

use std::collections::BTreeMap;
use std::io::Read as _;
use std::path::Path;
use std::process::{Command, Stdio};
use std::time::Instant;

use rustix::process::{Pid, Signal, kill_process};

use crate::backup_chain;
use crate::support::image::{self, info};
use crate::support::loop_device::LoopDevice;
use crate::support::qemu_nbd::wait_until;
use crate::support::{Disk, Outcome, PROGRAM, Server, in_foreground, nbd_cli, peer, run};
use crate::tools;

/// The error of a run; none advises to remove a device.
#[track_caller]
fn refused(outcome: Outcome, parts: &[&str]) {
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    let said = outcome.stderr.lines().last().unwrap_or_default();
    assert!(parts.iter().all(|part| said.contains(part)) && !said.contains("remove"), "{said}");
}

#[test]
fn an_image_is_made_on_a_device_and_nothing_old_shows() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 16) else { return };
    let device = device.0.as_str();
    for options in [&[][..], &["--compat", "0.10"], &["--preallocation", "full"]] {
        // What is there first is an image with data of its own.
        peer(
            &qemu_img,
            &["create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", device, "8M"],
        );
        peer(&qemu_io, &["-f", "qcow2", "-c", "write -P 0x55 0 8M", device]);
        let create = [&["image", "create", "-f", "qcow2"], options, &[device, "8M"]].concat();
        nbd_cli(&create).success();
        peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
        let zero = ["-f", "qcow2", "-c", "read -P 0 0 8M", device];
        assert!(!peer(&qemu_io, &zero).contains("failed"), "{options:?}");
        let server = Server::ours(&["--format", "qcow2", device]);
        nbd_cli(&["copy", directory.path(), server.uri()]).success();
        server.end();
        peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", directory.path(), device]);
        peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
    }
    refused(
        nbd_cli(&["image", "create", "-f", "qcow2", "--preallocation", "metadata", device, "8M"]),
        &["a device or an export has its space already", "full"],
    );
    nbd_cli(&["image", "create", "-f", "raw", device, "8M"]).success();
    let info = nbd_cli(&["image", "info", "--json", device]).success();
    assert!(info.contains("raw"), "{info}");
}

#[test]
fn a_disk_is_converted_and_restored_onto_a_device() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 17) else { return };
    let device = device.0.as_str();
    let commands: [(&str, &[&str]); 5] = [
        ("qcow2", &["image", "convert", "-O", "qcow2"]),
        ("qcow2", &["image", "convert", "-O", "qcow2", "--compress", "--flush"]),
        ("raw", &["image", "convert", "-O", "raw"]),
        ("qcow2", &["restore", "-f", "raw", "-O", "qcow2", "--verify", "--quiet"]),
        ("raw", &["restore", "-f", "raw", "--verify", "--quiet"]),
    ];
    for (format, command) in commands {
        nbd_cli(&[command, &[directory.path(), device]].concat()).success();
        if format == "qcow2" {
            peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
            peer(&qemu_img, &["compare", "-f", "raw", "-F", format, directory.path(), device]);
        } else {
            let bytes = std::fs::read(device).expect("root");
            assert!(bytes[..8 << 20] == *directory.content(), "{command:?}");
            assert!(bytes[8 << 20..9 << 20] != *directory.content(), "what is beyond stays");
        }
    }
}

#[test]
fn a_disk_is_not_written_over_itself_through_a_loop_device() {
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 18) else { return };
    let (device, file) = (device.0.as_str(), directory.beside("device-18"));
    let other = directory.beside("other");
    std::fs::hard_link(&file, &other).expect("another name");
    let old = std::fs::read(&file).expect("a file");
    for command in [
        &["copy", &file, device][..],
        // With two names it would be emptied first.
        &["copy", device, &file],
        &["image", "convert", "-f", "raw", "-O", "raw", &file, device],
        &["image", "convert", "-f", "raw", "-O", "qcow2", &other, device],
        &["restore", "-f", "raw", &file, device],
        &["restore", "-f", "raw", "-O", "qcow2", &file, device],
    ] {
        refused(nbd_cli(command), &["the source", "give another destination"]);
        assert!(std::fs::read(&file).expect("a file") == old, "{command:?}");
    }
}

#[test]
fn a_disk_is_not_written_over_itself_through_a_stack_of_devices() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let image = directory.beside("image.qcow2");
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", directory.path(), &image]);
    let Some(below) = LoopDevice::on(&image) else { return };
    let (Some(above), Some(beside)) = (LoopDevice::on(&below.0), LoopDevice::on(&image)) else {
        return;
    };
    let [below, above, beside] = [&below, &above, &beside].map(|device| device.0.as_str());
    let old = std::fs::read(&image).expect("a file");
    let raw = ["image", "convert", "-f", "raw", "-O", "raw"];
    let qcow2 = ["image", "convert", "-n", "-O", "qcow2"];
    let form = |command: &'static str| ["qemu-img", command, "-f", "raw", "-O", "raw"];
    for (from, to) in [(&*image, above), (above, below), (below, beside), (above, &image)] {
        let mut commands = vec![[&qcow2[..], &[from, to]].concat(), vec!["copy", from, to]];
        let operands = [format!("if={from}"), format!("of={to}")];
        // A file would be replaced by another one, and the device keep what it has.
        if to != image {
            commands.push([&raw[..], &[from, to]].concat());
            commands.push(vec!["restore", "-f", "raw", from, to]);
            // Several sources, and a part of one.
            commands.push([&form("convert")[..], &[directory.path(), from, to]].concat());
            commands.push([&form("dd")[..], &["count=1", &operands[0], &operands[1]]].concat());
        }
        for command in commands {
            refused(nbd_cli(&command), &["the source", "give another destination"]);
            assert!(std::fs::read(&image).expect("a file") == old, "{command:?}");
        }
    }
    let create = ["image", "create", "-f", "qcow2", "-F", "qcow2", "-b"];
    for (backing, to) in [(&*image, above), (beside, below)] {
        let command = [&create[..], &[backing, to]].concat();
        refused(nbd_cli(&command), &[to, "backing file"]);
        assert!(std::fs::read(&image).expect("a file") == old, "{command:?}");
    }
}

#[test]
fn the_form_of_qemu_img_writes_overlays_and_parts_of_disks_onto_a_device() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 17) else { return };
    let device = device.0.as_str();
    let [base, other] = ["base.qcow2", "other.img"].map(|name| directory.beside(name));
    let disk = directory.path();
    nbd_cli(&["image", "convert", "-f", "raw", "-O", "qcow2", disk, &base]).success();
    let mut changed = directory.content().to_vec();
    changed[3 << 20..][..65536].fill(9);
    changed[5 << 20..][..1 << 20].fill(0);
    std::fs::write(&other, &changed).expect("room");
    let convert = ["qemu-img", "convert", "-f", "raw", "-O", "qcow2", "-B", &base, "-F", "qcow2"];
    nbd_cli(&[&convert[..], &[&other, device]].concat()).success();
    peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", &other, device]);
    assert_eq!(info(&qemu_img, device)["backing-filename"], *base);

    let before = std::fs::read(device).expect("root");
    let operands = [format!("if={other}"), format!("of={device}")];
    let part = ["bs=1M", "skip=2", "count=5", &*operands[0], &operands[1]];
    nbd_cli(&[&["qemu-img", "dd", "-f", "raw", "-O", "raw"], &part[..]].concat()).success();
    let after = std::fs::read(device).expect("root");
    assert!(after[..3 << 20] == changed[2 << 20..5 << 20], "zeroes are written too");
    assert!(after[3 << 20..] == before[3 << 20..], "what is beyond stays");
    nbd_cli(&[&["qemu-img", "dd", "-f", "raw", "-O", "qcow2"], &part[..]].concat()).success();
    peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
    let piece = directory.beside("piece.img");
    std::fs::write(&piece, &changed[2 << 20..5 << 20]).expect("room");
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", &piece, device]);
    // What does not fit changes nothing.
    let large = directory.blank("large.img", 64 << 20);
    let operands = [format!("if={large}"), format!("of={device}")];
    let all = ["qemu-img", "dd", "-f", "raw", "-O", "raw", &operands[0], &operands[1]];
    refused(nbd_cli(&all), &["does not fit"]);
    peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", &piece, device]);
}

/// After a power loss a part of a disk would otherwise be taken for the whole.
#[test]
fn an_unsafe_conversion_marks_a_device_as_incomplete_durably() {
    tools!(strace = "strace");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 17) else { return };
    let log = directory.beside("strace.log");
    for format in ["raw", "qcow2"] {
        let trace = ["-f", "-o", &log, "-e", "trace=fsync,fdatasync", PROGRAM, "image", "convert"];
        let convert = ["-q", "-t", "unsafe", "-O", format, directory.path(), &device.0];
        peer(&strace, &[&trace[..], &convert].concat());
        let syncs = std::fs::read_to_string(&log).expect("a log").matches("sync(").count();
        assert!(syncs >= 2, "{format}: {syncs}");
    }
}

#[test]
fn a_device_that_is_too_small_is_said_to_be_so() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let full = directory.beside("full.img");
    std::fs::write(&full, vec![7; 8 << 20]).expect("room");
    let Some(device) = LoopDevice::with_old_content(&directory, 4) else { return };
    let device = device.0.as_str();
    for command in [
        &["image", "convert", "-O", "qcow2", &full, device][..],
        &["restore", "-f", "raw", "-O", "qcow2", &full, device],
    ] {
        let outcome = nbd_cli(command);
        assert!(outcome.stderr.contains("is overwritten, and lost even if"), "{outcome:?}");
        refused(outcome, &[device, "no space", "the previous data on", "marked as incomplete"]);
        refused(nbd_cli(&["image", "info", device]), &[device, "incomplete"]);
        let said = run(Command::new(&qemu_img).args(["info", device]));
        assert!(said.stderr.contains("incomplete: its writer was interrupted"), "{said:?}");
    }
    for command in [
        &["image", "convert", "-O", "raw", &full, device][..],
        &["restore", "-f", "raw", &full, device],
        &["copy", &full, device],
        &["image", "create", "-f", "raw", device, "8M"],
        &["image", "create", "-f", "qcow2", "--cluster-size", "2M", device, "1G"],
    ] {
        refused(nbd_cli(command), &[device]);
    }
    // A device that the kernel uses is left alone.
    tools!(mkfs = "mkfs.ext4");
    run(Command::new(mkfs).args(["-q", "-F", device])).success();
    let mounted = directory.beside("mounted");
    let small = directory.blank("small.img", 1 << 20);
    std::fs::create_dir(&mounted).expect("a directory");
    if Command::new("mount").args([device, &mounted]).status().is_ok_and(|status| status.success())
    {
        let commands: [&[&str]; 5] = [
            &["image", "create", "-f", "qcow2", device, "1M"],
            &["image", "convert", "-O", "qcow2", &small, device],
            &["image", "convert", "-O", "raw", &small, device],
            &["restore", "-f", "raw", &small, device],
            &["copy", &small, device],
        ];
        let outcomes = commands.map(nbd_cli);
        let ended = Command::new("umount").arg(&mounted).status();
        outcomes.into_iter().for_each(|outcome| refused(outcome, &[device, "mounted"]));
        assert!(ended.is_ok_and(|status| status.success()));
    }
}

/// What is on a device before it is overwritten: an image that can be told from what comes then.
fn with_old_image(
    directory: &Disk,
    device: &str,
    [qemu_img, qemu_io]: [&Path; 2],
) -> (Vec<u8>, String) {
    let old = directory.beside("old.img");
    std::fs::write(&old, vec![0x55; 1 << 20]).expect("room");
    peer(qemu_img, &["create", "-q", "-f", "qcow2", device, "1M"]);
    peer(qemu_io, &["-f", "qcow2", "-c", "write -P 0x55 0 1M", device]);
    (std::fs::read(device).expect("root"), old)
}

/// Checks that a device holds the old image, all of the new disk, or neither and says so.
#[track_caller]
fn judge(qemu_img: &Path, device: &str, format: &str, [old, new]: [&str; 2]) -> &'static str {
    let ours = nbd_cli(&["image", "info", "--json", device]);
    let theirs = run(Command::new(qemu_img).args(["info", device]));
    if ours.code == Some(1) {
        assert!(ours.stderr.contains("incomplete"), "{ours:?}");
        assert!(theirs.stderr.contains("incomplete"), "{theirs:?}");
        return "incomplete";
    }
    let is = |disk: &str, format: &str| {
        let mut compare = Command::new(qemu_img);
        compare.args(["compare", "-f", "raw", "-F", format, disk, device]);
        run(&mut compare).code == Some(0)
    };
    if is(old, "qcow2") {
        return "old";
    }
    // A raw device is larger than the disk; what is beyond is not zero.
    let content = std::fs::read(device).expect("root");
    let new_content = std::fs::read(new).expect("the disk");
    let is_new = match format {
        "raw" => content.starts_with(&new_content),
        _ => is(new, format),
    };
    assert!(is_new, "{format}: {ours:?}");
    "new"
}

#[test]
fn a_command_that_is_killed_never_leaves_part_of_a_disk_that_looks_whole() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 17) else { return };
    let device = device.0.as_str();
    let zero = directory.blank("zero.img", 8 << 20);
    let (before, old) = with_old_image(&directory, device, [&qemu_img, &qemu_io]);
    let full = ["image", "create", "-f", "qcow2", "--preallocation", "full"];
    let size = ["8M"];
    let commands: [(&str, &[&str], &[&str]); 6] = [
        ("qcow2", &["image", "convert", "-O", "qcow2", directory.path()], &[]),
        ("raw", &["image", "convert", "-O", "raw", directory.path()], &[]),
        ("qcow2", &["restore", "-f", "raw", "-O", "qcow2", "--verify", directory.path()], &[]),
        ("raw", &["restore", "-f", "raw", "--verify", directory.path()], &[]),
        ("raw", &["copy", directory.path()], &[]),
        ("qcow2", &full, &size),
    ];
    let mut seen = BTreeMap::new();
    for (format, command, behind) in commands {
        let new = if behind.is_empty() { directory.path() } else { &zero };
        let arguments = [command, &[device], behind].concat();
        let mut takes = None;
        for moment in 0..16 {
            std::fs::write(device, &before).expect("root");
            let began = Instant::now();
            let mut child = Command::new(PROGRAM)
                .args(&arguments)
                .stdout(Stdio::null())
                .stderr(Stdio::null())
                .spawn()
                .expect("the program");
            match takes {
                // The first run is to the end.
                None => assert!(child.wait().expect("its end").success(), "{arguments:?}"),
                Some(takes) => {
                    std::thread::sleep(takes * moment / 16);
                    child.kill().expect("it is ours");
                    child.wait().expect("its end");
                }
            }
            let found = judge(&qemu_img, device, format, [&old, new]);
            *seen.entry(found).or_insert(0) += 1;
            if takes.is_none() {
                assert_eq!(found, "new", "{arguments:?}");
                takes = Some(began.elapsed());
            }
        }
    }
    eprintln!("{seen:?}");
}

/// Whether the header of an image says that its disk is incomplete.
fn is_marked(path: &str) -> bool {
    let mut header = [0; 80];
    let read = std::fs::File::open(path).and_then(|mut file| file.read_exact(&mut header));
    read.expect("a header");
    header[72] & 0x80 != 0
}

/// Overwrites the image at `path`, which has an internal snapshot, and is killed.
fn overwritten_and_killed(directory: &Disk, path: &str, tools: [&Path; 3], signal: Signal) {
    let [qemu_img, qemu_io, nbdkit] = tools;
    peer(qemu_img, &["create", "-q", "-f", "qcow2", path, "8M"]);
    image::write(qemu_io, path, "write -P 7 0 8M");
    peer(qemu_img, &["snapshot", "-c", "before", path]);
    let slow = Server::nbdkit(nbdkit, &["--filter=delay", "pattern", "8M", "rdelay=3600"]);
    let convert = ["image", "convert", "-n", "-O", "qcow2"];
    let mut command = in_foreground();
    command.args(convert).args([slow.uri(), path]).stdin(Stdio::null()).stderr(Stdio::null());
    let mut child = command.spawn().expect("nbd-cli");
    wait_until("it is marked", || is_marked(path));
    kill_process(Pid::from_child(&child), signal).expect("it runs");
    child.wait().expect("its end");
    refused(nbd_cli(&["image", "map", path]), &[path, "incomplete", "run that command again"]);
    let theirs = run(Command::new(qemu_img).args(["info", path]));
    assert_eq!(theirs.code, Some(1), "{theirs:?}");
    // An overlay above it is refused as well.
    let overlay = directory.beside("overlay.qcow2");
    peer(
        qemu_img,
        &["create", "-q", "-u", "-f", "qcow2", "-b", path, "-F", "qcow2", &overlay, "8M"],
    );
    let above =
        ["image", "convert", "--trust-image", "-n", "-O", "qcow2", directory.path(), &overlay];
    refused(nbd_cli(&above), &["incomplete"]);

    nbd_cli(&[&convert[..], &[directory.path(), path]].concat()).success();
    assert!(!is_marked(path));
    image::is_clean(qemu_img, path);
    image::are_equal(qemu_img, path, directory.path());
    nbd_cli(&["image", "snapshot", "apply", path, "before"]).success();
    image::write(qemu_io, path, "read -P 7 0 8M");
}

#[test]
fn an_image_that_is_being_overwritten_when_the_command_is_killed_is_refused_until_that_is_done() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", nbdkit = "nbdkit");
    let directory = Disk::sparse();
    let tools: [&Path; 3] = [&qemu_img, &qemu_io, &nbdkit];
    for signal in [Signal::KILL, Signal::TERM] {
        overwritten_and_killed(&directory, &directory.beside("image.qcow2"), tools, signal);
    }
    let Some(device) = LoopDevice::with_old_content(&directory, 24) else { return };
    overwritten_and_killed(&directory, &device.0, tools, Signal::KILL);
}

#[test]
fn backups_are_made_on_devices_and_restored_from_them() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let Some(full) = LoopDevice::with_old_content(&directory, 17) else { return };
    let Some(second) = LoopDevice::with_old_content(&directory, 18) else { return };
    let (full, second) = (full.0.as_str(), second.0.as_str());
    let disk = backup_chain::disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = backup_chain::serve(&qemu_nbd, &disk);
    refused(nbd_cli(&["backup", "--resume", server.uri(), full]), &[full, "--resume"]);
    let said = nbd_cli(&["backup", "--verify", server.uri(), full]);
    assert!(said.stderr.contains("is overwritten, and lost even if"), "{said:?}");
    said.success();
    server.end();
    peer(&qemu_img, &["check", "-q", full]);
    peer(&qemu_img, &["compare", &disk, full]);

    backup_chain::change(&qemu_io, &disk);
    let server = backup_chain::serve(&qemu_nbd, &disk);
    let increment = ["backup", "--verify=all", "--bitmap", "b0", "--base", full, server.uri()];
    // Nothing has happened to it, but nobody could tell.
    refused(
        nbd_cli(&[&increment[..], &[second]].concat()),
        &[full, "block device", "--trust-base"],
    );
    // Never over the base itself.
    let before = std::fs::read(full).expect("root");
    refused(
        nbd_cli(&[&increment[..], &["--trust-base", full]].concat()),
        &[full, "another target"],
    );
    let upon_itself = ["image", "create", "-f", "qcow2", "-b", full, "-F", "qcow2", full];
    refused(nbd_cli(&upon_itself), &[full, "backing file"]);
    assert!(std::fs::read(full).expect("root") == before, "nothing was written");
    let unchanged = std::fs::read(second).expect("root");
    assert!(unchanged.iter().all(|byte| *byte == 0xaa), "nothing was written");
    nbd_cli(&[&increment[..], &["--trust-base", second]].concat()).success();
    let file = directory.beside("second.qcow2");
    nbd_cli(&[&increment[..], &["--trust-base", &file]].concat()).success();
    // Upon a file, on a device.
    let base = directory.beside("base.qcow2");
    nbd_cli(&["backup", server.uri(), &base]).success();
    server.end();
    for newest in [second, &file] {
        peer(&qemu_img, &["check", "-q", newest]);
        peer(&qemu_img, &["compare", &disk, newest]);
        let restored = directory.beside("restored.img");
        if newest == file {
            // Its base is not in its directory.
            refused(nbd_cli(&["restore", newest, &restored]), &["--trust-image"]);
        }
        nbd_cli(&["restore", "--trust-image", "--verify", newest, &restored]).success();
        peer(&qemu_img, &["compare", &disk, &restored]);
        std::fs::remove_file(&restored).expect("it is there");
    }
    // The bitmap says too much for this base, which does no harm.
    let server = backup_chain::serve(&qemu_nbd, &disk);
    let upon_file = ["backup", "--bitmap", "b0", "--base", &base, server.uri(), second];
    nbd_cli(&upon_file).success();
    server.end();
    let about = info(&qemu_img, second);
    assert_eq!(about["backing-filename"], base.as_str(), "{about}");
    peer(&qemu_img, &["compare", &disk, second]);
}

#[test]
fn a_backup_that_does_not_fit_on_a_device_leaves_no_image() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let directory = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&directory, 3) else { return };
    let device = device.0.as_str();
    let disk = backup_chain::disk_with_bitmap(&directory, &qemu_img, &qemu_io);
    let server = backup_chain::serve(&qemu_nbd, &disk);
    let outcome = nbd_cli(&["backup", server.uri(), device]);
    server.end();
    refused(outcome, &[device, "no space", "the previous data on", "marked as incomplete"]);
    refused(nbd_cli(&["image", "info", device]), &[device, "incomplete"]);
    refused(nbd_cli(&["restore", device, &directory.beside("x.img")]), &[device, "incomplete"]);
}
