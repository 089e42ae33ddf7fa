//! A backup file says which backup it is and whether it is unchanged.

use std::path::{Path, PathBuf};
use std::time::Duration;

use imgfmt::{
    Access, BackupBase, BackupIdentity, ContentSum, CreateOptions, Durability, Format, Image,
    KeyChange, NewKey, OpenOptions, Passphrase, Shrink, Speed, Uuid, ZeroMode,
};

use crate::common::{at, qemu, range, run, text};

pub(crate) const SIZE: u64 = 4 << 20;
pub(crate) const PART: u64 = 64 << 10;

pub(crate) fn disk(directory: &Path) -> PathBuf {
    let path = directory.join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, SIZE)).unwrap();
    let image = writable(&path);
    write(&image, 0);
    image.close().unwrap();
    path
}

pub(crate) fn writable(path: &Path) -> Image {
    Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap()
}

pub(crate) fn write(image: &Image, part: u64) {
    image.write_at(at(part * PART), &[7; 512], Durability::Cached).unwrap();
}

fn is_unchanged(path: &Path) -> Option<bool> {
    let about = Image::inspect_file(path, &OpenOptions::new()).unwrap();
    about.qcow2.unwrap().backup.map(|backup| backup.is_unchanged)
}

fn identity() -> BackupIdentity {
    let mut identity = BackupIdentity::new(Uuid::random().unwrap(), SIZE - 1);
    identity.base = BackupBase::Backup(Uuid::random().unwrap());
    identity.bitmap = Some("daily".into());
    identity.export = "vm".into();
    identity
}

#[test]
fn a_sealed_file_says_which_backup_it_is_until_it_is_changed() {
    let directory = tempfile::tempdir().unwrap();
    let path = disk(directory.path());
    assert_eq!(is_unchanged(&path), None);
    let identity = identity();
    Image::seal_backup(&path, &OpenOptions::new(), &identity).unwrap();
    let image = Image::open(&path, &OpenOptions::new()).unwrap();
    let found = image.backups_of_chain();
    assert_eq!(found.len(), 1);
    assert_eq!(found[0].1.as_ref().unwrap().identity, identity);
    drop(image);
    assert_eq!(is_unchanged(&path), Some(true));

    // To look at it, to open it for writing, to rename it and to copy it does not change it.
    let length = std::fs::metadata(&path).unwrap().len();
    writable(&path).close().unwrap();
    assert_eq!(is_unchanged(&path), Some(true));
    let (renamed, copy) = (directory.path().join("renamed"), directory.path().join("copy"));
    std::fs::rename(&path, &renamed).unwrap();
    assert_eq!(is_unchanged(&renamed), Some(true));
    std::fs::copy(&renamed, &copy).unwrap();
    assert_eq!(is_unchanged(&copy), Some(true));
    std::fs::rename(&renamed, &path).unwrap();
    // Bytes that somebody changes in place are seen where the file system says when a file was
    // made.
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, b"x", length - 1).unwrap();
    if file.metadata().unwrap().created().is_ok() {
        assert_eq!(is_unchanged(&path), Some(false));
    }

    type Change = fn(&mut Image);
    let changes: [Change; 6] = [
        |image| write(image, 0),
        |image| drop(image.try_write_at(at(0), &[1; 512]).map(|_| write(image, 1))),
        |image| image.discard(range(0, PART), Durability::Cached).unwrap(),
        |image| {
            let zero = range(0, PART);
            let mode = ZeroMode::MayUnmap;
            image.write_zeroes(zero, mode, Speed::Any, Durability::Cached).unwrap();
        },
        |image| image.resize(SIZE + 512, Shrink::Refuse).unwrap(),
        |image| image.clear().unwrap(),
    ];
    for (number, change) in changes.into_iter().enumerate() {
        Image::seal_backup(&path, &OpenOptions::new(), &identity).unwrap();
        let mut image = writable(&path);
        change(&mut image);
        image.flush().unwrap();
        // Also if it is not closed.
        assert_eq!(is_unchanged_now(&path), Some(false), "change {number}");
        image.close().unwrap();
        assert_eq!(is_unchanged(&path), Some(false), "change {number}, closed");
    }
    Image::seal_backup(&path, &OpenOptions::new(), &identity).unwrap();
    let file = std::fs::File::options().write(true).open(&path).unwrap();
    file.set_len(length - 512).unwrap();
    assert_eq!(is_unchanged(&path), Some(false), "cut off");
    let copy = directory.path().join("cut");
    std::fs::copy(&path, &copy).unwrap();
    assert_eq!(is_unchanged(&copy), Some(false), "a copy of what was cut off");
}

#[test]
fn in_an_encrypted_file_the_sum_is_hidden_without_the_key() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let passphrase = |text: &str| Passphrase::new(text.into());
    let key = |text: &str| NewKey::new(passphrase(text)).iteration_time(Duration::ZERO);
    let mut create = CreateOptions::new(Format::Qcow2, SIZE);
    create.encryption = Some(key("x"));
    drop(Image::create(&path, &create).unwrap());
    let with = |text: &str| OpenOptions::new().passphrase(passphrase(text));
    let open = |text: &str| Image::open(&path, &with(text)).unwrap();
    let sum = ContentSum::from_bytes([0x5a; 32]);
    let mut identity = identity();
    let (image, other) = (open("x"), Uuid::random().unwrap());
    let mask = image.sum_mask(identity.id).unwrap();
    assert_ne!(image.sum_mask(other).unwrap().apply(sum), mask.apply(sum));
    identity.content = Some(mask.apply(sum));
    drop(image);
    Image::seal_backup(&path, &OpenOptions::new(), &identity).unwrap();
    let found = |text: &str| open(text).backups_of_chain()[0].1.clone().unwrap();
    assert_eq!(found("x").identity.content, Some(sum));
    // Only in the file itself.
    let about = Image::inspect_file(&path, &OpenOptions::new()).unwrap().qcow2.unwrap();
    assert_eq!(about.backup.unwrap().identity, identity);
    assert!(!std::fs::read(&path).unwrap().windows(32).any(|window| window == sum.bytes()));
    let change = KeyChange::Replace { old: passphrase("x"), key: key("y") };
    Image::change_keys(&path, &OpenOptions::new(), &change).unwrap();
    let after = found("y");
    assert_eq!((after.identity.content, after.is_unchanged), (Some(sum), true));
}

/// As [`is_unchanged`], of an image that is open.
fn is_unchanged_now(path: &Path) -> Option<bool> {
    let options = OpenOptions::new().locking(imgfmt::Locking::Off);
    let about = Image::inspect_file(path, &options).unwrap();
    about.qcow2.unwrap().backup.map(|backup| backup.is_unchanged)
}

#[test]
fn qemu_uses_a_sealed_file_keeps_what_it_is_and_makes_it_count_as_changed() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let base = disk(directory.path());
    let top = directory.path().join("top.qcow2");
    Image::create(&top, &CreateOptions::overlay("disk.qcow2", Format::Qcow2)).unwrap();
    let (first, second) = (identity(), identity());
    let seal = || {
        Image::seal_backup(&base, &OpenOptions::new(), &first).unwrap();
        Image::seal_backup(&top, &OpenOptions::new(), &second).unwrap();
    };
    let id = |path: &Path| {
        let about = Image::inspect_file(path, &OpenOptions::new()).unwrap();
        about.qcow2.unwrap().backup.map(|backup| (backup.identity.id, backup.is_unchanged))
    };
    seal();
    run("qemu-img", &["info", "--backing-chain", text(&top)]);
    run("qemu-img", &["check", "-q", text(&top)]);
    let copy = directory.path().join("copy.qcow2");
    run("qemu-img", &["convert", "-O", "qcow2", text(&top), text(&copy)]);
    assert_eq!(id(&top), Some((second.id, true)), "who only reads changes nothing");
    assert_eq!(id(&copy), None, "a converted one is another file");
    for command in [
        &["rebase", "-u", "-b", "disk.qcow2", "-F", "qcow2"][..],
        &["amend", "-f", "qcow2", "-o", "lazy_refcounts=on"],
        &["snapshot", "-c", "x"],
        &["resize", "-q"],
        &["check", "-q", "-r", "all"],
        &["commit", "-q"],
        &["rebase", "-b", ""],
    ] {
        seal();
        let size: &[&str] = if command[0] == "resize" { &["+64k"] } else { &[] };
        run("qemu-img", &[command, &[text(&top)], size].concat());
        assert_eq!(id(&top), Some((second.id, false)), "{command:?}");
        run("qemu-img", &["check", "-q", text(&top)]);
        let was_committed_to = command[0] == "commit";
        assert_eq!(id(&base), Some((first.id, !was_committed_to)), "{command:?}");
    }
}
