//! A sidecar that another program has locked while the image itself is free: a writer waits a
//! moment or is refused, and the bits are still there for the next one.

use std::fs::File;
use std::path::Path;
use std::time::Duration;

use imgfmt::{ErrorKind, Image, Locking, OpenOptions, Repair};

use crate::common::bitmaps::dirty;
use crate::common::{self, text};
use crate::survival::{die_after, disk, has_no_trace, open, options, read_only, reason, sidecar};

/// An image that was in use when its process died.
fn left() -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    let (directory, path) = disk()?;
    die_after(&path, "open:power,write:0:4096,write:65536:512,flush");
    Some((directory, path))
}

fn locked(path: &Path) -> File {
    let file = File::open(sidecar(path)).unwrap();
    file.lock_shared().unwrap();
    file
}

fn is_recovered(path: &Path) {
    let image = open(path);
    assert_eq!(image.bitmap_durability().recovered, ["fine", "coarse"]);
    assert_eq!(dirty(&image, "fine"), [(0, 4096), (65536, 512)]);
    image.close().unwrap();
    has_no_trace(path);
}

#[test]
fn a_writer_is_refused_says_who_holds_it_and_the_bits_are_recovered_later() {
    let Some((_directory, path)) = left() else { return };
    let before = std::fs::read(&path).unwrap();
    let holder = locked(&path);
    let error = Image::open(&path, &options()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    let said = error.to_string();
    for part in [text(&sidecar(&path)), &format!("process {}", std::process::id()), "try again"] {
        assert!(said.contains(part), "no '{part}' in: {said}");
    }
    assert!(std::fs::read(&path).unwrap() == before, "the image was changed");
    drop(holder);
    is_recovered(&path);
}

#[test]
fn a_lock_that_is_held_for_a_moment_costs_no_more_than_that() {
    let Some((_directory, path)) = left() else { return };
    let holder = locked(&path);
    std::thread::scope(|scope| {
        scope.spawn(move || {
            std::thread::sleep(Duration::from_millis(100));
            drop(holder);
        });
        is_recovered(&path);
    });
}

#[test]
fn a_repair_is_refused_and_a_check_is_not() {
    let Some((_directory, path)) = left() else { return };
    let before = std::fs::read(&path).unwrap();
    let holder = locked(&path);
    let options = OpenOptions::new();
    for repair in [Repair::Leaks, Repair::All] {
        let error = Image::check_file(&path, &options, repair).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    Image::check_file(&path, &options, Repair::None).unwrap();
    assert!(std::fs::read(&path).unwrap() == before, "the image was changed");
    drop(holder);
    is_recovered(&path);
}

#[test]
fn a_second_writer_without_locks_of_the_image_does_not_end_the_session_of_the_first() {
    let Some((_directory, path)) = left() else { return };
    let first = open(&path);
    first.write_at(common::at(1 << 20), &[1; 512], imgfmt::Durability::Cached).unwrap();
    let unlocked = options().locking(Locking::Off);
    let error = Image::open(&path, &unlocked).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    let reader = Image::open(&path, &OpenOptions::new().locking(Locking::Off)).unwrap();
    let said = reason(&reader, "fine").unwrap();
    assert!(said.contains("in use"), "{said}");
    drop(reader);
    assert_eq!(dirty(&first, "fine"), [(0, 4096), (65536, 512), (1 << 20, 512)]);
    first.close().unwrap();
    has_no_trace(&path);
    assert!(reason(&read_only(&path), "fine").is_none());
}
