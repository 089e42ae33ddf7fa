//! This crate and QEMU keep each other from using one image in ways that contradict.

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::Command;

use imgfmt::{Access, ErrorKind, Format, Image, Locking, OpenOptions};

use crate::common::{Background, has_tool, text, wait_until};

fn options(access: Access) -> OpenOptions {
    OpenOptions::new().format(Format::Raw).access(access)
}

fn disk() -> tempfile::NamedTempFile {
    let file = tempfile::NamedTempFile::new().unwrap();
    file.as_file().set_len(1 << 20).unwrap();
    file
}

fn qemu_io_can_open(path: &Path, read_only: bool) -> bool {
    let mut command = Command::new("qemu-io");
    if read_only {
        command.arg("-r");
    }
    command.args(["-f", "raw", "-c", "length"]).arg(path).output().unwrap().status.success()
}

#[test]
fn two_of_us_may_read_but_nobody_may_write_meanwhile() {
    let file = disk();
    let one = Image::open(file.path(), &options(Access::ReadOnly)).unwrap();
    let two = Image::open(file.path(), &options(Access::ReadOnly)).unwrap();
    let error = Image::open(file.path(), &options(Access::ReadWrite)).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    drop((one, two));
    let writer = Image::open(file.path(), &options(Access::ReadWrite)).unwrap();
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = Image::open(file.path(), &options(access)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy);
        let said = error.to_string();
        assert!(said.contains(text(file.path())) && said.contains("this process has"), "{said}");
    }
    let unlocked = options(Access::ReadOnly).locking(Locking::Off);
    Image::open(file.path(), &unlocked).unwrap();
    drop(writer);
    Image::open(file.path(), &options(Access::ReadWrite)).unwrap();
}

#[test]
fn one_process_never_writes_to_a_file_twice_not_even_with_locks_off() {
    let file = disk();
    let unlocked = |access| Image::open(file.path(), &options(access).locking(Locking::Off));
    let link = file.path().with_extension("link");
    std::fs::hard_link(file.path(), &link).unwrap();
    let writer = unlocked(Access::ReadWrite).unwrap();
    let error = unlocked(Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Busy);
    assert!(error.to_string().contains("this process"), "{error}");
    let by_link = options(Access::ReadWrite).locking(Locking::Off);
    assert_eq!(Image::open(&link, &by_link).unwrap_err().kind(), ErrorKind::Busy);
    std::fs::remove_file(&link).unwrap();
    unlocked(Access::ReadOnly).unwrap();
    writer.close().unwrap();
    unlocked(Access::ReadWrite).unwrap();
}

#[test]
fn qemu_respects_our_locks() {
    if !has_tool("qemu-io") {
        return;
    }
    let file = disk();
    let writer = Image::open(file.path(), &options(Access::ReadWrite)).unwrap();
    // For raw files qemu-io shares everything when it only reads, so reading is not refused.
    assert!(!qemu_io_can_open(file.path(), false));
    drop(writer);
    let reader = Image::open(file.path(), &options(Access::ReadOnly)).unwrap();
    assert!(qemu_io_can_open(file.path(), true));
    assert!(!qemu_io_can_open(file.path(), false));
    drop(reader);
    assert!(qemu_io_can_open(file.path(), false));
}

fn greets(socket: &Path) -> bool {
    let mut magic = [0; 8];
    let greeting = UnixStream::connect(socket).and_then(|mut it| it.read_exact(&mut magic));
    greeting.is_ok() && magic == *b"NBDMAGIC"
}

#[test]
fn we_respect_the_locks_of_qemu() {
    if !has_tool("qemu-nbd") {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk");
    let socket = directory.path().join("socket");
    std::fs::File::create(&path).and_then(|file| file.set_len(1 << 20)).unwrap();
    let arguments = ["-t", "-f", "raw", "-k", text(&socket), text(&path)];
    let server = Background::start("qemu-nbd", &arguments);
    // It listens before it opens and locks the image, and greets only behind that.
    wait_until("the start of qemu-nbd", || greets(&socket));
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let error = Image::open(&path, &options(access)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Busy, "{error}");
    }
    drop(server);
    Image::open(&path, &options(Access::ReadWrite)).unwrap();
}

#[test]
fn who_shares_an_image_reads_beside_a_writer_and_keeps_nobody_from_writing() {
    let file = disk();
    let shared = options(Access::ReadOnly).locking(Locking::Shared);
    let reader = Image::open(file.path(), &shared).unwrap();
    let writer = Image::open(file.path(), &options(Access::ReadWrite)).unwrap();
    Image::open(file.path(), &shared).unwrap();
    let error = Image::open(file.path(), &options(Access::ReadOnly)).unwrap_err();
    assert!(error.could_be_shared());
    let error = Image::open(file.path(), &options(Access::ReadWrite)).unwrap_err();
    assert!(!error.could_be_shared());
    drop(writer);
    if has_tool("qemu-io") {
        assert!(qemu_io_can_open(file.path(), false));
    }
    let both = options(Access::ReadWrite).locking(Locking::Shared);
    assert_eq!(Image::open(file.path(), &both).unwrap_err().kind(), ErrorKind::InvalidInput);
    drop(reader);
}
