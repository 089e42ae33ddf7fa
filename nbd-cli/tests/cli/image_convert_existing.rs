//! `image convert --no-create`.

use crate::support::image::{are_equal, is_clean, write};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

#[test]
fn the_disk_that_was_there_is_replaced_zeroes_included() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    write(&qemu_io, &image, "write -P 7 0 8M");
    nbd_cli(&["image", "convert", "-n", "-O", "qcow2", disk.path(), &image]).success();
    is_clean(&qemu_img, &image);
    are_equal(&qemu_img, &image, disk.path());
    let raw = disk.beside("raw.img");
    std::fs::write(&raw, vec![7; 8 << 20]).expect("room");
    nbd_cli(&["image", "convert", "-n", "-O", "raw", &image, &raw]).success();
    disk.assert_equals(&raw);
}

#[test]
fn zeroes_of_a_backing_file_do_not_shine_through() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (base, overlay) = (disk.beside("base.img"), disk.beside("overlay.qcow2"));
    std::fs::write(&base, vec![7; 8 << 20]).expect("room");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", "base.img", "-F", "raw", &overlay]);
    nbd_cli(&["image", "convert", "-n", "-O", "qcow2", disk.path(), &overlay]).success();
    are_equal(&qemu_img, &overlay, disk.path());
    assert!(std::fs::read(&base).expect("the base").iter().all(|&byte| byte == 7));
}

#[test]
fn what_lies_behind_the_source_stays() {
    let disk = Disk::sparse();
    let large = disk.beside("large.img");
    std::fs::write(&large, vec![7; 9 << 20]).expect("room");
    nbd_cli(&["image", "convert", "-n", "-O", "raw", disk.path(), &large]).success();
    let bytes = std::fs::read(&large).expect("the image");
    assert!(bytes[..8 << 20] == *disk.content());
    assert!(bytes.len() == 9 << 20 && bytes[8 << 20..].iter().all(|&byte| byte == 7));
}

#[test]
fn a_disk_known_to_be_zero_gets_no_zeroes() {
    let disk = Disk::sparse();
    let image = disk.beside("image.img");
    std::fs::write(&image, vec![7; 8 << 20]).expect("room");
    let arguments = ["image", "convert", "-n", "--destination-is-zero", "-O", "raw"];
    nbd_cli(&[&arguments[..], &[disk.path(), &image]].concat()).success();
    let bytes = std::fs::read(&image).expect("the image");
    let mut pairs = bytes.iter().zip(disk.content());
    assert!(pairs.all(|(is, should)| is == should || *should == 0 && *is == 7));
    assert!(bytes != disk.content(), "the promise was not relied upon");
}

#[test]
fn options_that_make_no_sense_together_change_nothing() {
    let disk = Disk::sparse();
    let (image, source) = (disk.blank("image.img", 8 << 20), disk.path());
    let convert = |arguments: &[&str], expected: &[&str]| {
        let all = [&["image", "convert"][..], arguments, &[source, &image]].concat();
        says(nbd_cli(&all), expected);
    };
    convert(&["-n"], &["--no-create needs the format", "--output-format"]);
    convert(&["-n", "-O", "raw", "--cluster-size", "64K"], &["--cluster-size", "omit"]);
    convert(&["-n", "-O", "qcow2"], &["image.img"]);
    convert(&["--destination-is-zero"], &["--no-create"]);
    let same = nbd_cli(&["image", "convert", "-n", "-O", "raw", source, source]);
    says(same, &["disk.img"]);
    assert!(std::fs::read(&image).expect("the image").iter().all(|&byte| byte == 0));
    disk.assert_equals(source);
}
