//! The example of the crate, and what it leaves.

use imgfmt::{GuestOffset, Image, OpenOptions};

#[path = "../../examples/new_image.rs"]
#[allow(dead_code)] // Its main function is not called.
mod new_image;

#[test]
fn an_image_made_by_the_example_is_sound_and_has_what_was_written() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let report = new_image::run(&path).unwrap();
    assert_eq!((report.leaks, report.corruptions, report.allocated_clusters), (0, 0, 1));
    let disk = Image::open(&path, &OpenOptions::new()).unwrap();
    let mut greeting = [0; 5];
    disk.read_at(GuestOffset::new(1 << 20), &mut greeting).unwrap();
    assert_eq!((disk.size(), &greeting), (1 << 30, b"hello"));
    assert!(new_image::run(&path).is_err(), "an existing file is not replaced");
}
