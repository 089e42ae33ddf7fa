//! Writes that need nothing from the disk are made at once, into new space as well.

use imgfmt::{Access, Durability, Format, Image, OpenOptions, OpenPolicy, TryWrite};

use crate::common::{at, qemu, run, text};

const MIB: u64 = 1 << 20;

fn open(path: &std::path::Path) -> Image {
    let options = OpenOptions::new()
        .format(Format::Qcow2)
        .access(Access::ReadWrite)
        .policy(OpenPolicy::any_file());
    Image::open(path, &options).unwrap()
}

/// Writes at some places of clusters that are not there yet, some across two of them.
fn write_at_once(image: &Image, model: &mut [u8]) {
    // The first write makes the L2 table, and looks through it.
    image.write_at(at(0), &[1; 512], Durability::Cached).unwrap();
    model[..512].fill(1);
    for (number, offset) in
        [0, 100_000, 196_608, 262_000, 400_001, 2 * MIB - 5001].iter().enumerate()
    {
        let data = vec![number as u8 + 2; 5000];
        let tried = image.try_write_at(at(*offset), &data).unwrap();
        assert_eq!(tried, TryWrite::Complete, "at {offset}");
        model[*offset as usize..*offset as usize + 5000].copy_from_slice(&data);
    }
}

#[test]
fn new_clusters_of_an_image_and_of_an_overlay_are_written_at_once() {
    if !qemu::has_qemu() {
        return;
    }
    for options in ["", "extended_l2=on", "cluster_size=4096,compat=0.10"] {
        let directory = tempfile::tempdir().unwrap();
        let (base, path) = (directory.path().join("base.raw"), directory.path().join("disk.qcow2"));
        let mut model = vec![0xba; 4 * MIB as usize];
        model[MIB as usize..].fill(0);
        std::fs::write(&base, &model[..2 * MIB as usize]).unwrap();
        qemu::create(&path, options, "4M");
        let image = open(&path);
        let mut empty_model = vec![0; model.len()];
        write_at_once(&image, &mut empty_model);
        image.close().unwrap();
        assert!(qemu::content(&path, "qcow2") == empty_model, "an image with '{options}'");
        run("qemu-img", &["check", "-q", text(&path)]);

        std::fs::remove_file(&path).unwrap();
        let mut arguments = vec!["create", "-q", "-f", "qcow2", "-b", text(&base), "-F", "raw"];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([text(&path), "4M"]);
        run("qemu-img", &arguments);
        let image = open(&path);
        write_at_once(&image, &mut model);
        image.close().unwrap();
        assert!(qemu::content(&path, "qcow2") == model, "an overlay with '{options}'");
        run("qemu-img", &["check", "-q", text(&path)]);
    }
}

#[test]
fn what_is_not_in_memory_is_not_waited_for() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, "", "4M");
    let image = open(&path);
    let tried = image.try_write_at(at(0), &[1; 512]).unwrap();
    assert_eq!(tried, TryWrite::WouldBlock, "there is no L2 table");
    image.write_at(at(0), &[1; 512], Durability::Cached).unwrap();
    image.close().unwrap();
    let image = open(&path);
    let tried = image.try_write_at(at(0), &[2; 512]).unwrap();
    assert_eq!(tried, TryWrite::WouldBlock, "the L2 table has not been read");
    let mut found = [0; 512];
    image.read_at(at(0), &mut found).unwrap();
    assert_eq!(found, [1; 512], "nothing was written");
}
