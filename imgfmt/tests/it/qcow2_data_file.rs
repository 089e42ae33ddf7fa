//! What can be changed about an image whose data lies in a file of its own, as with QEMU.

use imgfmt::{Access, Durability, Format, Image, OpenOptions, Shrink};

use crate::common::{at, qemu, run, text};

fn open(path: &std::path::Path) -> Image {
    let options = OpenOptions::new().format(Format::Qcow2).access(Access::ReadWrite);
    Image::open(path, &options).unwrap()
}

#[test]
fn an_image_and_its_data_file_are_resized_together() {
    if !qemu::has_qemu() {
        return;
    }
    for raw in ["off", "on"] {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        let data = directory.path().join("disk.raw");
        let options = format!("data_file={},data_file_raw={raw}", text(&data));
        qemu::create(&path, &options, "1M");
        let mut image = open(&path);
        image.write_at(at(0), &vec![5; 1 << 20], Durability::Cached).unwrap();
        image.resize((700 << 10) + 512, Shrink::Allow).unwrap();
        image.resize(3 << 20, Shrink::Refuse).unwrap();
        image.write_at(at(2 << 20), &[6; 4096], Durability::Cached).unwrap();
        image.close().unwrap();
        let mut expected = vec![0; 3 << 20];
        expected[..(700 << 10) + 512].fill(5);
        expected[2 << 20..(2 << 20) + 4096].fill(6);
        assert!(qemu::content(&path, "qcow2") == expected, "raw {raw}");
        if raw == "on" {
            assert!(std::fs::read(&data).unwrap() == expected, "the data file is the disk");
        }
        run("qemu-img", &["check", "-q", text(&path)]);
    }
}

#[test]
fn snapshots_of_images_with_a_data_file_are_refused_as_qemu_refuses_them() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let data = directory.path().join("disk.raw");
    qemu::create(&path, &format!("data_file={}", text(&data)), "1M");
    let arguments = ["snapshot", "-c", "one", text(&path)];
    let qemu = std::process::Command::new("qemu-img").args(arguments).output().unwrap();
    assert!(!qemu.status.success(), "QEMU can do it by now");
    let error = open(&path).create_snapshot("one").unwrap_err();
    assert!(error.to_string().contains("data file"), "{error}");
    run("qemu-img", &["check", "-q", text(&path)]);
}
