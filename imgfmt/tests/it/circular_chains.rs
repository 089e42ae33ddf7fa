//! A backing file with which an image could not be opened any more is refused.

use std::ffi::OsStr;
use std::path::{Path, PathBuf};

use imgfmt::{BackingFile, CreateOptions, ErrorKind, Format, Image, OpenOptions, OpenPolicy};
use tempfile::TempDir;

const SIZE: u64 = 1 << 20;

/// A directory with the image `a` and, above it, `b` and `c`.
fn chain() -> TempDir {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    Image::create(path("a"), &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    for (name, below) in [("b", "a"), ("c", "b")] {
        Image::create(path(name), &CreateOptions::overlay(below, Format::Qcow2)).unwrap();
    }
    directory
}

fn set(path: &Path, name: impl AsRef<OsStr>, format: Format) -> imgfmt::Result<()> {
    Image::change_backing_file(path, &OpenOptions::new(), Some((name.as_ref(), format)))
}

/// Refused, and nothing has changed.
#[track_caller]
fn is_refused(path: &Path, name: impl AsRef<OsStr>, format: Format) {
    let before = std::fs::read(path).unwrap();
    let error = set(path, name, format).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidInput);
    assert!(error.to_string().contains("would lead back to itself"), "{error}");
    assert_eq!(error.path(), Some(path));
    assert!(std::fs::read(path).unwrap() == before);
}

#[test]
fn an_image_is_not_put_below_itself_by_any_of_its_names() {
    let directory = chain();
    let a = directory.path().join("a");
    std::os::unix::fs::symlink("a", directory.path().join("link")).unwrap();
    std::fs::hard_link(&a, directory.path().join("other")).unwrap();
    let names: [PathBuf; 5] = [
        "a".into(),
        "./a".into(),
        a.clone(),
        format!("file:{}", a.display()).into(),
        "link".into(),
    ];
    for name in &names {
        for format in [Format::Qcow2, Format::Raw] {
            is_refused(&a, name, format);
        }
    }
    is_refused(&a, "other", Format::Qcow2);
    is_refused(&directory.path().join("link"), "a", Format::Qcow2);
    // The contents of the file, and no image above anything.
    set(&a, directory.path().join("c"), Format::Raw).unwrap();
}

#[test]
fn a_chain_is_not_closed_over_other_layers() {
    let directory = chain();
    let path = |name: &str| directory.path().join(name);
    is_refused(&path("a"), "b", Format::Qcow2);
    is_refused(&path("a"), "c", Format::Qcow2);
    // Layers of other directories, which the policy forbids today.
    let inner = directory.path().join("inner");
    std::fs::create_dir(&inner).unwrap();
    let d = inner.join("d");
    let mut options = CreateOptions::overlay("../c", Format::Qcow2);
    options.open = OpenOptions::new().policy(OpenPolicy::any_file());
    Image::create(&d, &options).unwrap();
    is_refused(&path("a"), "inner/d", Format::Qcow2);
    // What is missing leads nowhere.
    set(&path("a"), "missing", Format::Qcow2).unwrap();
}

#[test]
fn the_image_of_a_circle_gets_another_backing_file() {
    let directory = chain();
    let path = |name: &str| directory.path().join(name);
    // As other programs leave it.
    set(&path("a"), "e", Format::Qcow2).unwrap();
    std::fs::rename(path("c"), path("e")).unwrap();
    Image::open(path("a"), &OpenOptions::new()).unwrap_err();
    is_refused(&path("a"), "b", Format::Qcow2);
    Image::create(path("base"), &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    set(&path("a"), "base", Format::Qcow2).unwrap();
    Image::open(path("e"), &OpenOptions::new()).unwrap();
    set(&path("a"), "e2", Format::Qcow2).unwrap();
    std::fs::rename(path("e"), path("e2")).unwrap();
    Image::change_backing_file(path("a"), &OpenOptions::new(), None).unwrap();
    Image::open(path("e2"), &OpenOptions::new()).unwrap();
}

#[test]
fn no_image_is_made_that_would_be_below_itself() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let unsafely = |below: &str| {
        let mut options = CreateOptions::overlay(below, Format::Qcow2);
        options.open = OpenOptions::new().backing(BackingFile::Ignored);
        options.size = Some(SIZE);
        options
    };
    let is_refused = |name: &str, options: &CreateOptions| {
        let error = Image::create(path(name), options).unwrap_err();
        assert!(error.to_string().contains("would lead back to itself"), "{error}");
        assert!(!path(name).exists());
    };
    is_refused("new", &unsafely("new"));
    is_refused("new", &unsafely("./new"));
    Image::create(path("over missing"), &unsafely("new")).unwrap();
    is_refused("new", &unsafely("over missing"));
    // Under a temporary name.
    let mut options = unsafely("over missing");
    options.foreign.final_name = Some("new".into());
    is_refused("new.partial", &options);
    std::fs::write(path("new"), "").unwrap();
    is_refused("new.partial", &options);
    let mut options = CreateOptions::overlay("over missing", Format::Qcow2);
    std::fs::remove_file(path("new")).unwrap();
    Image::create(path("new"), &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    options.foreign.final_name = Some("new".into());
    is_refused("new.partial", &options);
    options.foreign.final_name = None;
    Image::create(path("new.partial"), &options).unwrap();
}
