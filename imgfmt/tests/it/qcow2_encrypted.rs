//! qcow2 images whose data is encrypted with LUKS: as QEMU reads and writes them, and without a
//! path on which data gets into the file unencrypted.

use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use imgfmt::jobs::{Background, Clusters, ConvertOptions, JobContext, commit, convert, rebase};
use imgfmt::{
    Access, Content, CreateOptions, Durability, ErrorKind, Format, Image, Locking, OpenOptions,
    Passphrase, Repair, Shrink, Speed, ZeroMode,
};

use crate::common::{Random, at, has_tool, range, run, text};
use crate::luks_vs_peers::{PASSPHRASE, change, content};

const MIB: u64 = 1 << 20;
const SIZE: u64 = 6 * MIB;

/// What must not be seen in a file.
const SECRET: &[u8] = b"the secret plain text";

/// The kinds of images, by their options.
const KINDS: [&str; 3] = ["cluster_size=64k", "extended_l2=on,cluster_size=64k", "cluster_size=4k"];

struct Disk {
    directory: tempfile::TempDir,
    path: PathBuf,
}

impl Disk {
    /// A copy of an empty image that QEMU has made: deriving its keys takes it seconds.
    fn of_kind(kind: usize) -> Self {
        static MADE: [OnceLock<Vec<u8>>; KINDS.len()] = [const { OnceLock::new() }; KINDS.len()];
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("key"), PASSPHRASE).unwrap();
        let disk = Self { path: directory.path().join("disk.qcow2"), directory };
        let bytes = MADE[kind].get_or_init(|| {
            let options = KINDS[kind];
            let options =
                format!("encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,{options}");
            let secret = disk.secret();
            let start = ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", &options];
            run("qemu-img", &[&start[..], &[text(&disk.path), &SIZE.to_string()]].concat());
            std::fs::read(&disk.path).unwrap()
        });
        std::fs::write(&disk.path, bytes).unwrap();
        disk
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn secret(&self) -> String {
        format!("secret,id=s,file={}", text(&self.beside("key")))
    }

    fn driver(&self) -> String {
        format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(&self.path))
    }

    fn open(&self, access: Access) -> imgfmt::Result<Image> {
        Image::open(&self.path, &options(access))
    }

    fn change(&self) -> Image {
        self.open(Access::ReadWrite).unwrap()
    }

    fn decrypted_by_qemu(&self) -> Vec<u8> {
        let copy = self.beside("decrypted");
        let (secret, driver) = (self.secret(), self.driver());
        run("qemu-img", &["check", "-q", "--object", &secret, "--image-opts", &driver]);
        let start = ["convert", "--object", &secret, "--image-opts", &driver];
        run("qemu-img", &[&start[..], &["-O", "raw", text(&copy)]].concat());
        std::fs::read(copy).unwrap()
    }

    fn write_by_qemu(&self, random: &mut Random) {
        let (secret, driver) = (self.secret(), self.driver());
        let mut arguments = vec!["--object".to_owned(), secret, "--image-opts".to_owned(), driver];
        for _ in 0..12 {
            let offset = random.below(SIZE / 512) * 512;
            let length = ((random.below(300) + 1) * 512).min(SIZE - offset);
            let command = match random.below(5) {
                0 => format!("write -z {offset} {length}"),
                _ => format!("write -P {} {offset} {length}", random.below(255) + 1),
            };
            arguments.extend(["-c".into(), command]);
        }
        run("qemu-io", &arguments.iter().map(|argument| &**argument).collect::<Vec<_>>());
    }

    /// Nothing of the secret is in the file, though it is on the disk.
    fn assert_secret(&self, path: &str) {
        let bytes = std::fs::read(&self.path).unwrap();
        let found = bytes.windows(SECRET.len()).position(|window| window == SECRET);
        assert_eq!(found, None, "{path}: unencrypted data in the file");
        let disk = self.open(Access::ReadOnly).unwrap();
        let on_disk = content(&disk).windows(SECRET.len()).any(|window| window == SECRET);
        assert!(on_disk, "{path}: it is not on the disk");
    }
}

fn options(access: Access) -> OpenOptions {
    let passphrase = Passphrase::new(PASSPHRASE.into());
    OpenOptions::new().access(access).passphrase(passphrase)
}

fn has_tools() -> bool {
    ["qemu-img", "qemu-io"].into_iter().all(has_tool)
}

/// The secret, over and over again.
fn secret(length: usize) -> Vec<u8> {
    SECRET.iter().copied().cycle().take(length).collect()
}

#[test]
fn random_changes_are_read_and_written_as_qemu_does() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("encrypted qcow2");
    for (kind, name) in KINDS.into_iter().enumerate() {
        println!("{name}");
        let disk = Disk::of_kind(kind);
        disk.write_by_qemu(&mut random);
        let mut model = disk.decrypted_by_qemu();
        let mut image = disk.change();
        assert!(content(&image) == model);
        change(&image, &mut model, &mut random);
        image.create_snapshot("before").unwrap();
        let before = model.clone();
        change(&image, &mut model, &mut random);
        image.flush().unwrap();
        change(&image, &mut model, &mut random);
        image.close().unwrap();
        assert!(disk.decrypted_by_qemu() == model);
        let snapshot = Image::open(&disk.path, &options(Access::ReadOnly).snapshot("before"));
        assert!(content(&snapshot.unwrap()) == before);
        disk.write_by_qemu(&mut random);
        let model = disk.decrypted_by_qemu();
        assert!(content(&disk.open(Access::ReadOnly).unwrap()) == model);
    }
}

#[test]
fn no_write_leaves_plain_text_in_the_file() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(0);
    let image = disk.change();
    // Whole clusters, parts of new ones, of old ones, and what must not be compressed.
    image.write_at(at(0), &secret(200_000), Durability::Fua).unwrap();
    image.write_at(at(700_001), &secret(999), Durability::Cached).unwrap();
    image.write_at(at(700_000 + 5000), &secret(70_000), Durability::Cached).unwrap();
    image.write_compressed(at(MIB), &secret(128 << 10)).unwrap();
    let zeroes = |offset, length| {
        let speed = (ZeroMode::KeepAllocated, Speed::Any);
        image.write_zeroes(range(offset, length), speed.0, speed.1, Durability::Cached).unwrap();
    };
    zeroes(100_000, 70_000);
    zeroes(3, 5);
    image.write_at(at(110_001), &secret(100), Durability::Cached).unwrap();
    assert!(image.map_write(at(0), 512).unwrap().is_none());
    for mapping in image.map_read(range(0, SIZE)).unwrap().mappings() {
        match mapping.content {
            Content::File(span) => {
                assert!(span.storage.as_fd().is_none() && span.storage.read_fd().is_none());
                assert!(span.storage.begin_write(span.offset, 512).is_none());
            }
            Content::Encoded(_) => panic!("compressed: {mapping:?}"),
            _ => {}
        }
    }
    image.close().unwrap();
    disk.assert_secret("writes");
    let model = content(&disk.open(Access::ReadOnly).unwrap());
    assert!(disk.decrypted_by_qemu() == model);
}

#[test]
fn copy_on_write_below_a_snapshot_and_growth_leave_no_plain_text() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(1);
    let mut image = disk.change();
    image.write_at(at(0), &secret(300_000), Durability::Cached).unwrap();
    image.create_snapshot("s").unwrap();
    image.write_at(at(100_000), b"x", Durability::Cached).unwrap();
    image.discard(range(0, 4096), Durability::Cached).unwrap();
    image.resize(SIZE + 100 * 512, Shrink::Refuse).unwrap();
    image.write_at(at(SIZE), &secret(50 * 512), Durability::Cached).unwrap();
    image.resize(SIZE + 200 * 512, Shrink::Refuse).unwrap();
    let model = content(&image);
    image.close().unwrap();
    disk.assert_secret("copy on write");
    assert!(model[SIZE as usize + 50 * 512..].iter().all(|byte| *byte == 0));
    assert!(disk.decrypted_by_qemu() == model);
    let mut image = disk.change();
    image.apply_snapshot("s").unwrap();
    image.close().unwrap();
    disk.assert_secret("applying a snapshot");
}

#[test]
fn jobs_into_an_encrypted_image_leave_no_plain_text() {
    if !has_tools() {
        return;
    }
    // Copying an image into it, with and without compression.
    let source_path = tempfile::NamedTempFile::new().unwrap();
    std::fs::write(source_path.path(), secret(2 * MIB as usize)).unwrap();
    let raw = OpenOptions::new().format(Format::Raw);
    let source = Image::open(source_path.path(), &raw).unwrap();
    for clusters in [Clusters::Plain, Clusters::Compressed] {
        let disk = Disk::of_kind(0);
        let image = disk.change();
        let mut options = ConvertOptions::default();
        (options.background, options.clusters) = (Background::Zero, clusters);
        convert(&source, &image, &options, &JobContext::default()).unwrap();
        image.close().unwrap();
        disk.assert_secret("convert");
        assert!(disk.decrypted_by_qemu()[..2 * MIB as usize] == secret(2 * MIB as usize));
    }
    // Committing a plain overlay into it.
    let disk = Disk::of_kind(0);
    let overlay_path = disk.beside("overlay.qcow2");
    let mut create = CreateOptions::overlay("disk.qcow2", Format::Qcow2);
    create.open = options(Access::ReadWrite);
    let overlay = Image::create(&overlay_path, &create).unwrap();
    overlay.write_at(at(5000), &secret(100_000), Durability::Cached).unwrap();
    overlay.close().unwrap();
    let overlay = options(Access::ReadOnly).locking(Locking::Off);
    let overlay = Image::open(&overlay_path, &overlay).unwrap();
    let mut image = disk.change();
    commit(&overlay, &mut image, 2, &JobContext::default()).unwrap();
    image.close().unwrap();
    disk.assert_secret("commit");
    // Giving it a backing file, writing parts of clusters, and making it stand alone again.
    let disk = Disk::of_kind(0);
    std::fs::write(disk.beside("base.raw"), secret(SIZE as usize)).unwrap();
    let backing = Some(("base.raw".as_ref(), Format::Raw));
    Image::change_backing_file(&disk.path, &options(Access::ReadWrite), backing).unwrap();
    let image = disk.change();
    image.write_at(at(70_000), b"x", Durability::Cached).unwrap();
    image.write_at(at(MIB + 3), &[1; 1000], Durability::Cached).unwrap();
    let before = content(&image);
    rebase(&image, None, Clusters::Plain, &JobContext::default()).unwrap();
    image.close().unwrap();
    Image::change_backing_file(&disk.path, &options(Access::ReadWrite), None).unwrap();
    disk.assert_secret("rebase");
    assert!(disk.decrypted_by_qemu() == before);
}

#[test]
fn without_the_key_an_image_is_checked_and_repaired_but_not_opened() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(0);
    let error = Image::open(&disk.path, &OpenOptions::new()).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::KeyRequired, "{error}");
    let image = disk.change();
    image.write_at(at(0), &[7; 100_000], Durability::Cached).unwrap();
    image.close().unwrap();
    let plain = OpenOptions::new();
    let report = Image::check_file(&disk.path, &plain, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    // Refcounts that say that the LUKS header is free, and that free clusters are in use.
    let place = luks_header(&disk.path);
    let mut bytes = std::fs::read(&disk.path).unwrap();
    let cluster = 65536;
    let table = u64::from_be_bytes(bytes[48..56].try_into().unwrap()) as usize;
    let block = u64::from_be_bytes(bytes[table..table + 8].try_into().unwrap()) as usize;
    let entry = |index: usize| block + 2 * index..block + 2 * index + 2;
    bytes[entry(place / cluster + 3)].fill(0);
    let last = bytes.len() / cluster + 5;
    bytes[entry(last)].copy_from_slice(&[0, 1]);
    std::fs::write(&disk.path, &bytes).unwrap();
    let report = Image::check_file(&disk.path, &plain, Repair::All).unwrap();
    assert!(report.corruptions_repaired > 0, "{report:?}");
    let report = Image::check_file(&disk.path, &plain, Repair::None).unwrap();
    assert_eq!((report.corruptions, report.leaks), (0, 0), "{report:?}");
    assert!(disk.decrypted_by_qemu()[..100_000] == [7; 100_000]);
    // Rebuilding all refcounts keeps it too.
    let mut bytes = std::fs::read(&disk.path).unwrap();
    bytes[table..table + 8].copy_from_slice(&12345u64.to_be_bytes());
    std::fs::write(&disk.path, &bytes).unwrap();
    Image::check_file(&disk.path, &plain, Repair::All).unwrap();
    let image = disk.change();
    image.write_at(at(4 * MIB), &[8; 300_000], Durability::Cached).unwrap();
    image.close().unwrap();
    assert!(disk.decrypted_by_qemu()[..100_000] == [7; 100_000]);
}

/// The offset of the LUKS header in the file.
fn luks_header(path: &Path) -> usize {
    let bytes = std::fs::read(path).unwrap();
    let magic = bytes.windows(4).position(|word| word == [0x05, 0x37, 0xbe, 0x77]).unwrap();
    u64::from_be_bytes(bytes[magic + 8..magic + 16].try_into().unwrap()) as usize
}

#[test]
fn a_guest_cannot_write_into_the_luks_header() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(0);
    let image = disk.change();
    image.write_at(at(0), &[7; 65536], Durability::Cached).unwrap();
    image.close().unwrap();
    let place = luks_header(&disk.path);
    let mut bytes = std::fs::read(&disk.path).unwrap();
    let header = bytes[place..place + 4096].to_vec();
    let l1 = u64::from_be_bytes(bytes[40..48].try_into().unwrap()) as usize;
    let l2 = u64::from_be_bytes(bytes[l1..l1 + 8].try_into().unwrap()) & 0x00ff_ffff_ffff_fe00;
    // Its first entry leads to the header.
    let entry = (1 << 63) | place as u64;
    bytes[l2 as usize..l2 as usize + 8].copy_from_slice(&entry.to_be_bytes());
    std::fs::write(&disk.path, &bytes).unwrap();
    let image = disk.change();
    assert!(image.write_at(at(0), &[9; 4096], Durability::Fua).is_err());
    drop(image);
    assert!(std::fs::read(&disk.path).unwrap()[place..place + 4096] == header);
}

#[test]
fn damaged_places_of_the_luks_header_are_refused() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(0);
    let original = std::fs::read(&disk.path).unwrap();
    let magic = original.windows(4).position(|word| word == [0x05, 0x37, 0xbe, 0x77]).unwrap();
    let past_the_end = original.len() as u64 / 65536 * 65536;
    let offsets = [0, u64::MAX, 1 << 50, 512, past_the_end].map(|value| (8, value));
    let lengths = [0, 512, (16 << 20) + 1, 1 << 39, 1 << 50, u64::MAX].map(|value| (16, value));
    for (offset, value) in offsets.into_iter().chain(lengths) {
        let mut bytes = original.clone();
        bytes[magic + offset..magic + offset + 8].copy_from_slice(&u64::to_be_bytes(value));
        std::fs::write(&disk.path, &bytes).unwrap();
        assert!(disk.open(Access::ReadWrite).is_err(), "{offset} {value}");
        if value != past_the_end {
            // It is not refused for the end of the file alone.
            let file = std::fs::File::options().write(true).open(&disk.path).unwrap();
            file.set_len(1 << 40).unwrap();
            assert!(disk.open(Access::ReadWrite).is_err(), "{offset} {value}");
            file.set_len(original.len() as u64).unwrap();
        }
        let checked = Image::check_file(&disk.path, &OpenOptions::new(), Repair::Leaks);
        let repaired = checked.unwrap().leaks_repaired;
        assert_eq!(repaired, 0, "{offset} {value}: it may be the LUKS header");
        let said = Image::inspect_file(&disk.path, &OpenOptions::new()).unwrap();
        assert!(said.encryption.is_some());
    }
    // No extension at all: nothing is repaired.
    let mut bytes = original;
    bytes[magic] = 0xff;
    std::fs::write(&disk.path, &bytes).unwrap();
    assert!(disk.open(Access::ReadWrite).is_err());
    let checked = Image::check_file(&disk.path, &OpenOptions::new(), Repair::Leaks).unwrap();
    assert_eq!(checked.leaks_repaired, 0, "it may be the LUKS header");
}

#[test]
fn an_image_with_a_luks_header_that_says_it_is_not_encrypted_is_refused_and_keeps_its_keys() {
    if !has_tools() {
        return;
    }
    let disk = Disk::of_kind(0);
    let image = disk.change();
    image.write_at(at(0), &[7; 100_000], Durability::Cached).unwrap();
    image.close().unwrap();
    let sound = std::fs::read(&disk.path).unwrap();
    let mut damaged = sound.clone();
    damaged[32..36].fill(0);
    std::fs::write(&disk.path, &damaged).unwrap();
    let mut command = std::process::Command::new("qemu-io");
    let opened = command.args(["-r", "-c", "read 0 512"]).arg(&disk.path).output().unwrap();
    assert!(!opened.status.success(), "QEMU refuses it too");
    for access in [Access::ReadOnly, Access::ReadWrite] {
        for options in [options(access), OpenOptions::new().access(access)] {
            let error = Image::open(&disk.path, &options).unwrap_err();
            assert!(error.to_string().contains("where a LUKS header is"), "{error}");
        }
    }
    for repair in [Repair::None, Repair::Leaks, Repair::All] {
        let report = Image::check_file(&disk.path, &OpenOptions::new(), repair).unwrap();
        assert_eq!((report.corruptions, report.leaks), (1, 0), "{repair:?}: {report:?}");
        assert!(std::fs::read(&disk.path).unwrap() == damaged, "{repair:?} has written");
    }
    // With the method back, nothing is lost.
    std::fs::write(&disk.path, &sound).unwrap();
    assert!(disk.decrypted_by_qemu()[..100_000] == [7; 100_000]);
}
