//! Passphrases of encrypted images are added, replaced and removed: `cryptsetup` and QEMU see the
//! change, and whenever it is interrupted, a passphrase opens the disk.

use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{FailingStorage, Fault, Loss, Recorder};
use imgfmt::{
    Access, BackupIdentity, CreateOptions, Durability, Encryption, Error, ErrorKind, Format, Image,
    KeyChange, KeysChanged, LuksSlot, NewKey, OpenOptions, Passphrase, Repair, Uuid,
};

use crate::common::{Random, at, has_tool, run, text};
use crate::luks_vs_peers::QUICK;

const MIB: u64 = 1 << 20;
/// The size of the disks in bytes.
const SIZE: u64 = 64 << 10;
const SLOTS_START: usize = 208;
const SLOT_LENGTH: usize = 48;

fn passphrase(text: &str) -> Passphrase {
    Passphrase::new(text.into())
}

fn quick(text: &str) -> NewKey {
    NewKey::new(passphrase(text)).iteration_time(Duration::ZERO)
}

fn add(text: &str, slot: Option<u32>) -> KeyChange {
    KeyChange::Add { key: quick(text), slot }
}

fn replace(old: &str, new: &str) -> KeyChange {
    KeyChange::Replace { old: passphrase(old), key: quick(new) }
}

fn remove(old: &str) -> KeyChange {
    KeyChange::Remove(passphrase(old))
}

fn with(passphrases: &[&str]) -> OpenOptions {
    let options = OpenOptions::new();
    passphrases.iter().fold(options, |options, text| options.passphrase(passphrase(text)))
}

/// An encrypted disk in a directory of its own, which the passphrase "first" opens.
struct Disk {
    directory: tempfile::TempDir,
    path: PathBuf,
    format: Format,
}

impl Disk {
    fn new(format: Format) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        let mut options = CreateOptions::new(format, SIZE);
        options.encryption = Some(quick("first"));
        let image = Image::create(&path, &options).unwrap();
        image.write_at(at(0), &[7; SIZE as usize], Durability::Cached).unwrap();
        image.close().unwrap();
        Self { directory, path, format }
    }

    fn change(&self, given: &[&str], change: &KeyChange) -> imgfmt::Result<KeysChanged> {
        Image::change_keys(&self.path, &with(given), change)
    }

    fn refused(&self, given: &[&str], change: &KeyChange) -> Error {
        let before = std::fs::read(&self.path).unwrap();
        let error = self.change(given, change).unwrap_err();
        assert!(std::fs::read(&self.path).unwrap() == before, "{error}");
        error
    }

    fn slots(&self) -> Vec<LuksSlot> {
        let info = Image::inspect_file(&self.path, &OpenOptions::new()).unwrap();
        let Some(Encryption::Luks(Some(luks))) = info.encryption else { panic!("no header") };
        luks.details.unwrap().slots
    }

    fn active(&self) -> Vec<usize> {
        let slots = self.slots().into_iter().enumerate();
        slots.filter(|(_, slot)| slot.is_active).map(|(number, _)| number).collect()
    }

    /// Whether the disk is opened here, by QEMU and by `cryptsetup`, which must say the same.
    fn is_opened_by(&self, secret: &str) -> bool {
        let bytes = std::fs::read(&self.path).unwrap();
        let here = opens(&bytes, secret);
        let key = self.directory.path().join("key");
        std::fs::write(&key, secret).unwrap();
        if has_tool("qemu-io") {
            assert_eq!(self.is_read_by_qemu(&key), here, "QEMU, {secret}");
        }
        if self.format == Format::Luks && has_tool("cryptsetup") {
            let mut command = std::process::Command::new("cryptsetup");
            command.args(["open", "--test-passphrase", "--key-file", text(&key), text(&self.path)]);
            let output = command.output().unwrap();
            assert_eq!(output.status.success(), here, "cryptsetup, {secret}: {output:?}");
        }
        here
    }

    fn is_read_by_qemu(&self, key: &Path) -> bool {
        let name = if self.format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
        let driver = format!("driver={},{name}=s,file.filename={}", self.format, text(&self.path));
        let mut command = std::process::Command::new("qemu-io");
        command.args(["--object", &format!("secret,id=s,file={}", text(key)), "-r"]);
        command.args(["--image-opts", &driver, "-c", "read -P 7 0 64k"]);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stdout);
        output.status.success() && said.contains("read 65536") && !said.contains("failed")
    }
}

/// Whether the passphrase opens these bytes, whose disk must then be unchanged.
fn opens(bytes: &[u8], secret: &str) -> bool {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    match Image::from_storage(storage as _, &with(&[secret])) {
        Ok(image) => {
            let mut content = vec![0; SIZE as usize];
            image.read_at(at(0), &mut content).unwrap();
            assert!(content.iter().all(|byte| *byte == 7), "opened by a wrong key");
            true
        }
        Err(error) => {
            assert_eq!(error.kind(), ErrorKind::KeyRequired, "{error}");
            false
        }
    }
}

#[test]
fn passphrases_are_added_replaced_and_removed_as_cryptsetup_and_qemu_see_it() {
    for format in [Format::Luks, Format::Qcow2] {
        let disk = Disk::new(format);
        assert_eq!(disk.change(&["first"], &add("second", None)).unwrap().added, Some(1));
        // The salt of this one lies in two sectors.
        assert_eq!(disk.change(&["second"], &add("third", Some(6))).unwrap().added, Some(6));
        for secret in ["first", "second", "third"] {
            assert!(disk.is_opened_by(secret), "{format}: {secret}");
        }
        let changed = disk.change(&[], &replace("first", "fourth")).unwrap();
        assert_eq!((changed.added, changed.removed), (Some(2), vec![0]));
        assert!(!disk.is_opened_by("first") && disk.is_opened_by("fourth"), "{format}");
        let removed = disk.change(&["wrong", "second"], &remove("third")).unwrap();
        assert_eq!((removed.added, removed.removed), (None, vec![6]));
        assert!(!disk.is_opened_by("third") && disk.is_opened_by("second"), "{format}");
        let removed = disk.change(&["fourth"], &KeyChange::RemoveSlot(1)).unwrap();
        assert_eq!(removed.removed, [1]);
        assert!(!disk.is_opened_by("second") && disk.is_opened_by("fourth"), "{format}");
        assert_eq!(disk.active(), [2]);
        if format == Format::Qcow2 {
            let report = Image::check_file(&disk.path, &OpenOptions::new(), Repair::None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
        }
    }
}

#[test]
fn volumes_of_cryptsetup_keep_their_ciphers_and_hashes() {
    if !has_tool("cryptsetup") {
        return;
    }
    for (cipher, bits, hash) in
        [("aes-xts-plain64", "512", "sha512"), ("aes-cbc-essiv:sha256", "256", "sha1")]
    {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk");
        std::fs::File::create(&path).unwrap().set_len(6 * MIB).unwrap();
        let key = directory.path().join("first");
        std::fs::write(&key, "first").unwrap();
        let costs = ["--pbkdf-force-iterations", "1000", "-c", cipher, "-s", bits, "-h", hash];
        let start = ["luksFormat", "-q", "--type", "luks1"];
        run("cryptsetup", &[&start[..], &costs, &[text(&path), text(&key)]].concat());
        let changed = Image::change_keys(&path, &with(&["first"]), &add("second", Some(7)));
        assert_eq!(changed.unwrap().added, Some(7));
        std::fs::write(&key, "second").unwrap();
        let test = ["open", "--test-passphrase", "-S", "7", "--key-file", text(&key), text(&path)];
        run("cryptsetup", &test);
        run("cryptsetup", &["luksDump", text(&path)]);
        // And the reverse: it removes ours.
        run("cryptsetup", &["luksRemoveKey", "-q", text(&path), text(&key)]);
        assert!(Image::open(&path, &with(&["second"])).is_err());
        drop(Image::open(&path, &with(&["first"])).unwrap());
    }
}

#[test]
fn a_passphrase_in_several_slots_is_removed_from_all_of_them() {
    let disk = Disk::new(Format::Luks);
    disk.change(&["first"], &add("twice", None)).unwrap();
    disk.change(&["first"], &add("twice", Some(4))).unwrap();
    assert_eq!(disk.change(&["first"], &remove("twice")).unwrap().removed, [1, 4]);
    // The same passphrase again, with another salt.
    let changed = disk.change(&[], &replace("first", "first")).unwrap();
    assert_eq!((changed.added, changed.removed), (Some(1), vec![0]));
    assert!(disk.is_opened_by("first"));
}

/// A backup in an encrypted image stays the one upon which the next is made.
#[test]
fn a_change_of_keys_is_no_change_of_a_backup() {
    let disk = Disk::new(Format::Qcow2);
    let identity = BackupIdentity::new(Uuid::random().unwrap(), SIZE);
    Image::seal_backup(&disk.path, &OpenOptions::new(), &identity).unwrap();
    disk.change(&[], &replace("first", "second")).unwrap();
    let info = Image::inspect_file(&disk.path, &OpenOptions::new()).unwrap();
    let backup = info.qcow2.unwrap().backup.unwrap();
    assert!(backup.is_unchanged && backup.identity == identity, "{backup:?}");
}

#[test]
fn nothing_is_left_of_a_removed_slot() {
    let disk = Disk::new(Format::Luks);
    disk.change(&["first"], &add("second", None)).unwrap();
    let before = std::fs::read(&disk.path).unwrap();
    disk.change(&["second"], &remove("first")).unwrap();
    let mut after = std::fs::read(&disk.path).unwrap();
    let material = disk.slots()[0].key_offset as usize..disk.slots()[1].key_offset as usize;
    let sectors = after[material.clone()].chunks(512).zip(before[material].chunks(512));
    let unchanged = sectors.filter(|(after, before)| after == before).count();
    // Padding up to the next slot.
    assert!(unchanged <= 8, "{unchanged} sectors of the key material are as they were");
    let slot = SLOTS_START..SLOTS_START + SLOT_LENGTH;
    assert!(after[slot.clone()][4..40].iter().all(|byte| *byte == 0), "the salt is there");
    after[slot.clone()].copy_from_slice(&before[slot]);
    assert!(!opens(&after, "first"), "its key is still there");
}

#[test]
fn what_would_lose_the_disk_or_cannot_be_done_is_refused_and_changes_nothing() {
    let disk = Disk::new(Format::Luks);
    let says = |given: &[&str], change: &KeyChange, kind, part: &str| {
        let error = disk.refused(given, change);
        assert!(error.kind() == kind && error.to_string().contains(part), "{error}");
    };
    let invalid = ErrorKind::InvalidInput;
    says(&["first"], &remove("first"), invalid, "last key slots in use");
    says(&["first"], &KeyChange::RemoveSlot(0), invalid, "last key slots in use");
    says(&["first"], &KeyChange::RemoveSlot(3), invalid, "not in use");
    says(&["first"], &KeyChange::RemoveSlot(8), invalid, "not in use");
    says(&["first"], &add("x", Some(8)), invalid, "0 to 7");
    says(&["first"], &add("x", Some(0)), ErrorKind::AlreadyExists, "in use");
    says(&["first"], &add("", None), invalid, "is empty");
    says(&[], &add("x", None), ErrorKind::KeyRequired, "no passphrase");
    says(&["wrong"], &add("x", None), ErrorKind::KeyRequired, "opens none");
    says(&["first"], &remove("wrong"), ErrorKind::KeyRequired, "opens none");
    says(&[], &replace("wrong", "x"), ErrorKind::KeyRequired, "opens none");
    disk.change(&["first"], &add("second", None)).unwrap();
    // Only a passphrase that stays proves that the disk is not lost.
    says(&["first"], &remove("first"), ErrorKind::KeyRequired, "stays");
    says(&["first"], &KeyChange::RemoveSlot(0), ErrorKind::KeyRequired, "stays");
    says(&[], &KeyChange::RemoveSlot(0), ErrorKind::KeyRequired, "stays");
    for number in 2..8 {
        assert_eq!(disk.change(&["first"], &add("more", None)).unwrap().added, Some(number));
    }
    says(&["first"], &add("x", None), ErrorKind::NoSpace, "in use");
    says(&[], &replace("first", "x"), ErrorKind::NoSpace, "in use");
}

#[test]
fn an_image_in_use_or_without_key_slots_here_is_refused() {
    let disk = Disk::new(Format::Qcow2);
    let open = Image::open(&disk.path, &with(&["first"]).access(Access::ReadWrite)).unwrap();
    assert_eq!(disk.refused(&["first"], &add("x", None)).kind(), ErrorKind::Busy);
    drop(open);
    let plain = disk.directory.path().join("plain");
    for format in [Format::Raw, Format::Qcow2] {
        drop(Image::create(&plain, &CreateOptions::new(format, MIB)).unwrap());
        let options = with(&["first"]).format(format);
        let error = Image::change_keys(&plain, &options, &add("x", None)).unwrap_err();
        assert!(error.to_string().contains("not encrypted with LUKS"), "{error}");
        std::fs::remove_file(&plain).unwrap();
    }
    if has_tool("cryptsetup") {
        std::fs::File::create(&plain).unwrap().set_len(20 * MIB).unwrap();
        let key = disk.directory.path().join("first");
        std::fs::write(&key, "first").unwrap();
        let start = ["luksFormat", "-q", "--type", "luks2", "--pbkdf", "pbkdf2"];
        let rest = ["--pbkdf-force-iterations", "1000", text(&plain), text(&key)];
        run("cryptsetup", &[&start[..], &rest].concat());
        let error = Image::change_keys(&plain, &with(&["first"]), &add("x", None)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(error.to_string().contains("luksAddKey"), "{error}");
    }
}

/// A header that lies about the places of its slots does not make a key go over something else.
#[test]
fn slots_that_overlap_something_are_neither_written_nor_wiped() {
    let disk = Disk::new(Format::Luks);
    disk.change(&["first"], &add("second", None)).unwrap();
    let good = std::fs::read(&disk.path).unwrap();
    let place = |number: usize| SLOTS_START + number * SLOT_LENGTH + 40;
    // In sectors: in slot 0, in slot 1, in the header, over the end of the header, and in the data.
    for start in [8_u32, 600, 1, 4000, 5000, u32::MAX] {
        let mut bytes = good.clone();
        bytes[place(2)..place(2) + 4].copy_from_slice(&start.to_be_bytes());
        std::fs::write(&disk.path, bytes).unwrap();
        let error = disk.refused(&["first"], &add("x", None));
        assert!(error.to_string().contains("overlaps"), "{start}: {error}");
    }
    // Slot 0 is in slot 1, which a removal would destroy.
    let mut bytes = good.clone();
    let first = bytes[place(0)..place(0) + 4].to_vec();
    bytes[place(1)..place(1) + 4].copy_from_slice(&first);
    std::fs::write(&disk.path, bytes).unwrap();
    let error = disk.refused(&["first"], &KeyChange::RemoveSlot(1));
    assert!(error.to_string().contains("overlaps"), "{error}");
    // One stripe does not protect a key.
    let mut bytes = good;
    bytes[place(2) + 4..place(2) + 8].copy_from_slice(&1_u32.to_be_bytes());
    std::fs::write(&disk.path, bytes).unwrap();
    let error = disk.refused(&["first"], &add("x", None));
    assert!(error.to_string().contains("stripes"), "{error}");
}

/// The changes, the passphrases that are given, those that open the disk at every moment, and those
/// of which at least one does.
type Case = (KeyChange, &'static [&'static str], &'static [&'static str], [&'static str; 2]);

fn cases() -> [Case; 4] {
    [
        (add("new", None), &["first"], &["first", "second"], ["first"; 2]),
        // Its salt lies in two sectors.
        (add("new", Some(6)), &["second"], &["first", "second"], ["first"; 2]),
        (replace("first", "new"), &[], &["second"], ["first", "new"]),
        (remove("first"), &["second"], &["second"], ["second"; 2]),
    ]
}

/// The bytes of a disk with two passphrases that are quickly tried, if the tools are there.
fn two_keys(format: Format) -> Option<Vec<u8>> {
    if !["cryptsetup", "qemu-img"].into_iter().all(has_tool) {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let [path, first, second] = ["disk", "first", "second"].map(|name| directory.path().join(name));
    std::fs::write(&first, "first").unwrap();
    std::fs::write(&second, "second").unwrap();
    let (path, first, second) = (text(&path), text(&first), text(&second));
    if format == Format::Luks {
        std::fs::File::create(path).unwrap().set_len(2_068_480 + SIZE).unwrap();
        let start = ["luksFormat", "-q", "--type", "luks1", "--align-payload", "4040"];
        run("cryptsetup", &[&start[..], &QUICK, &[path, first]].concat());
        let add = ["luksAddKey", "-q", "--key-file", first];
        run("cryptsetup", &[&add[..], &QUICK, &[path, second]].concat());
    } else {
        let secrets = [("s", first), ("n", second)]
            .map(|(id, file)| ["--object".to_owned(), format!("secret,id={id},file={file}")]);
        let secrets: Vec<&str> = secrets.iter().flatten().map(String::as_str).collect();
        let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
        let rest = ["-q", "-f", "qcow2", "-o", options, path, "64k"];
        run("qemu-img", &[&["create"], &secrets[..], &rest].concat());
        let options = "encrypt.state=active,encrypt.new-secret=n,encrypt.iter-time=10";
        let driver = format!("driver=qcow2,encrypt.key-secret=s,file.filename={path}");
        let rest = ["-o", options, "--image-opts", &driver];
        run("qemu-img", &[&["amend"], &secrets[..], &rest].concat());
    }
    let image = Image::open(path, &with(&["first"]).access(Access::ReadWrite)).unwrap();
    image.write_at(at(0), &[7; SIZE as usize], Durability::Cached).unwrap();
    image.close().unwrap();
    Some(std::fs::read(path).unwrap())
}

#[test]
fn a_crash_at_any_write_leaves_a_passphrase_that_opens_the_disk() {
    let mut random = Random::new("a crash while keys change");
    for format in [Format::Luks, Format::Qcow2] {
        let Some(bytes) = two_keys(format) else { return };
        for (change, given, always, either) in cases() {
            let recorder = Recorder::new();
            let storage = recorder.storage(&bytes);
            let target = Arc::clone(&storage) as _;
            Image::change_keys_of_storage(&target, &with(given), &change).unwrap();
            let (end, mut seen) = (recorder.position(), Vec::new());
            // Opening works alike in both formats.
            let losses = if format == Format::Luks { &Loss::ALL[..] } else { &[Loss::SomeSectors] };
            for position in 0..=end {
                for loss in losses {
                    let left = storage.after_crash(position, *loss, &mut |n| random.below(n));
                    if seen.contains(&left) {
                        continue;
                    }
                    seen.push(left.clone());
                    let what = format!("{format}, {change:?}, {position} of {end}, {loss:?}");
                    let (first, more) = always.split_first().unwrap();
                    assert!(opens(&left, first), "{what}: {first}");
                    if format == Format::Luks {
                        assert!(more.iter().all(|secret| opens(&left, secret)), "{what}");
                        assert!(either.iter().any(|secret| opens(&left, secret)), "{what}");
                        assert_removed_is_gone(&left, &bytes, &what);
                        assert_listed_is_there(&left, &what);
                    }
                }
            }
            if !always.contains(&"first") {
                assert!(!opens(&storage.content(), "first"), "{change:?}");
            }
        }
    }
}

/// A slot that is marked as not in use, and was, has no key.
fn assert_removed_is_gone(left: &[u8], before: &[u8], what: &str) {
    let slot = SLOTS_START..SLOTS_START + SLOT_LENGTH;
    if left[slot.clone()][..4] != [0, 0, 0xde, 0xad] {
        return;
    }
    let mut revived = left.to_vec();
    revived[slot.clone()].copy_from_slice(&before[slot]);
    assert!(!opens(&revived, "first"), "{what}: the removed key is still there");
}

/// The first slot opens, if it is listed as one that does.
fn assert_listed_is_there(left: &[u8], what: &str) {
    let slot = slots_in(left)[0];
    if slot.is_active && !slot.is_being_removed {
        assert!(opens(left, "first"), "{what}: it is listed, and has no key");
    }
}

fn slots_in(bytes: &[u8]) -> Vec<LuksSlot> {
    let storage = Arc::new(MemoryStorage::from_bytes(bytes));
    let info = Image::inspect_storage(storage as _, &OpenOptions::new()).unwrap();
    let Some(Encryption::Luks(Some(luks))) = info.encryption else { panic!("no header") };
    luks.details.unwrap().slots
}

#[test]
fn a_removal_that_was_interrupted_is_seen_and_completed() {
    let disk = Disk::new(Format::Luks);
    disk.change(&["first"], &add("second", Some(6))).unwrap();
    let bytes = std::fs::read(&disk.path).unwrap();
    let recorder = Recorder::new();
    let storage = recorder.storage(&bytes);
    let target = Arc::clone(&storage) as _;
    Image::change_keys_of_storage(&target, &with(&["first"]), &remove("second")).unwrap();
    let mut interrupted = 0;
    for position in 0..=recorder.position() {
        let left = storage.after_crash(position, Loss::Nothing, &mut |_| 0);
        let slot = slots_in(&left)[6];
        assert_eq!(slot.is_active && !slot.is_being_removed, opens(&left, "second"), "{position}");
        if !slot.is_being_removed {
            continue;
        }
        interrupted += 1;
        let add = add("third", Some(6));
        for (change, opened) in [(&KeyChange::RemoveSlot(6), false), (&add, true)] {
            std::fs::write(&disk.path, &left).unwrap();
            disk.change(&["first"], change).unwrap();
            let slot = disk.slots()[6];
            assert_eq!((slot.is_active, slot.is_being_removed), (opened, false), "{position}");
            assert!(disk.is_opened_by("first") && disk.is_opened_by("third") == opened);
        }
    }
    assert!(interrupted > 1, "{interrupted}");
}

#[test]
fn an_error_at_any_call_leaves_a_passphrase_that_opens_the_disk() {
    let Some(bytes) = two_keys(Format::Luks) else { return };
    for (change, given, always, _) in cases() {
        let mut index = 0;
        loop {
            let memory = Arc::new(MemoryStorage::from_bytes(&bytes));
            let failing = FailingStorage::new(Arc::clone(&memory) as _);
            failing.set_fault(Some(Fault { calls: index..index + 1, code: 5 }));
            let target = Arc::clone(&failing) as _;
            let changed = Image::change_keys_of_storage(&target, &with(given), &change);
            if failing.failed() == 0 {
                changed.unwrap();
                break;
            }
            let mut left = vec![0; bytes.len()];
            imgfmt::Storage::read_exact_at(&*memory, imgfmt::HostOffset::new(0), &mut left)
                .unwrap();
            assert!(opens(&left, always[0]), "{change:?}, call {index}");
            // Another slot than the one that could not be read may have opened it.
            if changed.is_ok() && !always.contains(&"first") {
                assert!(!opens(&left, "first"), "{change:?}, call {index}");
            }
            index += 1;
        }
        assert!(index > 5, "{change:?}");
    }
}
