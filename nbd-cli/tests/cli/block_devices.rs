//! Images on block devices.

use std::process::Command;

use crate::support::{Disk, Outcome, Server, nbd_cli, peer, run};
use crate::tools;

/// A loop device that is detached when the test ends.
struct LoopDevice(String);

impl LoopDevice {
    /// A device of so many MiB, full of old bytes. `None` where there are none: only root has them.
    fn with_old_content(folder: &Disk, mebibytes: usize) -> Option<Self> {
        let file = folder.beside(&format!("device-{mebibytes}"));
        std::fs::write(&file, vec![0xaa; mebibytes << 20]).expect("room");
        let attached = Command::new("losetup").args(["--find", "--show", &file]).output();
        match attached {
            Ok(output) if output.status.success() => {
                Some(Self(String::from_utf8(output.stdout).expect("text").trim().to_owned()))
            }
            other => {
                eprintln!("skipped: no loop device: {other:?}");
                None
            }
        }
    }
}

impl Drop for LoopDevice {
    fn drop(&mut self) {
        let _ = Command::new("losetup").args(["--detach", &self.0]).status();
    }
}

/// The error of a run; none advises to remove a device.
#[track_caller]
fn refused(outcome: Outcome, parts: &[&str]) {
    let said = outcome.failure();
    assert!(parts.iter().all(|part| said.contains(part)) && !said.contains("remove"), "{said}");
}

#[test]
fn an_image_is_made_on_a_device_and_nothing_old_shows() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let folder = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&folder, 16) else { return };
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
        nbd_cli(&["copy", folder.path(), server.uri()]).success();
        server.end();
        peer(&qemu_img, &["compare", "-f", "raw", "-F", "qcow2", folder.path(), device]);
        peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
    }
    refused(
        nbd_cli(&["image", "create", "-f", "qcow2", "--preallocation", "metadata", device, "8M"]),
        &["block device", "full"],
    );
    nbd_cli(&["image", "create", "-f", "raw", device, "8M"]).success();
    let info = nbd_cli(&["image", "info", "--json", device]).success();
    assert!(info.contains("raw"), "{info}");
}

#[test]
fn a_disk_is_converted_and_restored_onto_a_device() {
    tools!(qemu_img = "qemu-img");
    let folder = Disk::sparse();
    let Some(device) = LoopDevice::with_old_content(&folder, 17) else { return };
    let device = device.0.as_str();
    let commands: [(&str, &[&str]); 5] = [
        ("qcow2", &["image", "convert", "-O", "qcow2"]),
        ("qcow2", &["image", "convert", "-O", "qcow2", "--compress", "--flush"]),
        ("raw", &["image", "convert", "-O", "raw"]),
        ("qcow2", &["restore", "-f", "raw", "-O", "qcow2", "--verify", "--quiet"]),
        ("raw", &["restore", "-f", "raw", "--verify", "--quiet"]),
    ];
    for (format, command) in commands {
        nbd_cli(&[command, &[folder.path(), device]].concat()).success();
        if format == "qcow2" {
            peer(&qemu_img, &["check", "-q", "-f", "qcow2", device]);
            peer(&qemu_img, &["compare", "-f", "raw", "-F", format, folder.path(), device]);
        } else {
            let bytes = std::fs::read(device).expect("root");
            assert!(bytes[..8 << 20] == *folder.content(), "{command:?}");
            assert!(bytes[8 << 20..9 << 20] != *folder.content(), "what is beyond stays");
        }
    }
}

#[test]
fn a_device_that_is_too_small_is_said_to_be_so() {
    tools!(qemu_img = "qemu-img");
    let folder = Disk::sparse();
    let full = folder.beside("full.img");
    std::fs::write(&full, vec![7; 8 << 20]).expect("room");
    let Some(device) = LoopDevice::with_old_content(&folder, 4) else { return };
    let device = device.0.as_str();
    for command in [
        &["image", "convert", "-O", "qcow2", &full, device][..],
        &["restore", "-f", "raw", "-O", "qcow2", &full, device],
    ] {
        refused(nbd_cli(command), &[device, "no space", "there is no image on"]);
        let info = nbd_cli(&["image", "info", "--json", device]).success();
        assert!(info.contains("\"raw\""), "what is there does not look whole: {info}");
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
    let mounted = folder.beside("mounted");
    std::fs::create_dir(&mounted).expect("a folder");
    if Command::new("mount").args([device, &mounted]).status().is_ok_and(|status| status.success())
    {
        let create = nbd_cli(&["image", "create", "-f", "qcow2", device, "1M"]);
        let ended = Command::new("umount").arg(&mounted).status();
        refused(create, &[device, "mounted"]);
        assert!(ended.is_ok_and(|status| status.success()));
    }
    let _ = qemu_img;
}
