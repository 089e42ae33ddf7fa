//! Paths that are not those of images give one clear sentence and never hang.

use std::os::unix::net::UnixListener;

use imgfmt::{ErrorKind, Image, OpenOptions};

use crate::common;

fn message(path: &std::path::Path, kind: ErrorKind) -> String {
    let error = Image::open(path, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), kind, "{error}");
    let message = error.to_string();
    assert!(message.contains(path.to_str().unwrap()), "{message}");
    assert!(!message.contains('\n'), "{message}");
    message
}

#[test]
fn what_is_no_image_is_named_for_what_it_is() {
    let directory = tempfile::tempdir().unwrap();
    assert!(message(directory.path(), ErrorKind::InvalidFormat).contains("a directory"));
    let socket = directory.path().join("socket");
    let _listener = UnixListener::bind(&socket).unwrap();
    assert!(message(&socket, ErrorKind::InvalidFormat).contains("a socket"));
    let missing = directory.path().join("missing");
    assert!(message(&missing, ErrorKind::NotFound).contains("no such file"));
    let null = std::path::Path::new("/dev/null");
    assert!(message(null, ErrorKind::InvalidFormat).contains("a character device"));
    if common::has_tool("mkfifo") {
        let pipe = directory.path().join("pipe");
        common::run("mkfifo", &[common::text(&pipe)]);
        assert!(message(&pipe, ErrorKind::InvalidFormat).contains("a pipe"));
    }
}

#[test]
fn a_foreign_image_is_not_taken_for_raw() {
    let file = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(file.path(), b"Bochs Virtual HD Image\0").unwrap();
    assert!(message(file.path(), ErrorKind::Unsupported).contains("Bochs"));
    // One that is read, but cut off.
    std::fs::write(file.path(), b"KDMV\0\0\0\0").unwrap();
    message(file.path(), ErrorKind::InvalidFormat);
}
