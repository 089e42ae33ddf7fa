//! `copy` keeps holes and turns zeroes into holes, and options switch off both.

use crate::support::{Disk, Server, is_sparse_here, nbd_cli};

#[test]
fn holes_stay_holes_in_files_and_on_servers() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let copied = disk.beside("copy.img");
    nbd_cli(&["copy", disk.path(), &copied]).success();
    assert!(allocated(&copied) <= 2 << 20, "{}", allocated(&copied));
    // What was there before is punched out.
    let full = disk.beside("full.img");
    std::fs::write(&full, vec![7; 8 << 20]).expect("room");
    let server = Server::ours(&[&full]);
    nbd_cli(&["copy", disk.path(), server.uri()]).success();
    server.end();
    disk.assert_equals(&full);
    assert!(allocated(&full) <= 2 << 20, "{}", allocated(&full));
}

#[test]
fn zeroes_become_holes_unless_nobody_looks_for_them() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let full = disk.beside("full.img");
    std::fs::write(&full, disk.content()).expect("room");
    assert!(allocated(&full) >= 8 << 20);
    let copied = disk.beside("copy.img");
    nbd_cli(&["copy", &full, &copied]).success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) <= 2 << 20, "{}", allocated(&copied));
    nbd_cli(&["copy", "--sparse", "0", &full, &copied]).success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) >= 8 << 20, "{}", allocated(&copied));
}

#[test]
fn without_extents_everything_is_read_and_zeroes_are_still_found() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let copied = disk.beside("copy.img");
    let server = Server::ours(&["--read-only", disk.path()]);
    nbd_cli(&["copy", "--no-extents", server.uri(), &copied]).success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) <= 2 << 20, "{}", allocated(&copied));
}

#[test]
fn allocated_fills_the_destination() {
    let disk = Disk::sparse();
    let Some(allocated) = is_sparse_here(&disk) else { return };
    let copied = disk.beside("copy.img");
    nbd_cli(&["copy", "--allocated", disk.path(), &copied]).success();
    disk.assert_equals(&copied);
    assert!(allocated(&copied) >= 8 << 20, "{}", allocated(&copied));
    let blank = disk.blank("blank.img", 8 << 20);
    let server = Server::ours(&[&blank]);
    nbd_cli(&["copy", "--allocated", disk.path(), server.uri()]).success();
    server.end();
    disk.assert_equals(&blank);
    assert!(allocated(&blank) >= 8 << 20, "{}", allocated(&blank));
}

#[test]
fn a_destination_said_to_be_zero_gets_no_zeroes() {
    let disk = Disk::sparse();
    let other = disk.beside("other.img");
    std::fs::write(&other, vec![7; 8 << 20]).expect("room");
    let server = Server::ours(&[&other]);
    nbd_cli(&["copy", "--destination-is-zero", disk.path(), server.uri()]).success();
    server.end();
    let found = std::fs::read(&other).expect("the disk");
    assert!(found[..1 << 20] == disk.content()[..1 << 20], "data is written");
    assert!(found[1 << 20..4 << 20].iter().all(|&byte| byte == 7), "zeroes are not");
}
