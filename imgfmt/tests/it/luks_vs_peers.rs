//! Encrypted volumes of `cryptsetup` and QEMU are read and written as they do it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use imgfmt::{
    Access, Content, Durability, ErrorKind, Format, Image, OpenOptions, Passphrase, Shrink, Speed,
    TryWrite, ZeroMode,
};

use crate::common::{Random, at, has_tool, range, run, text};

pub(crate) const PASSPHRASE: &str = "correct horse";
const MIB: u64 = 1 << 20;
/// What `cryptsetup` needs before the data while it encrypts in place.
const HEADER_ROOM: u64 = 32 * MIB;

/// A volume in a directory of its own, and its passphrase in a file beside it.
pub(crate) struct Volume {
    directory: tempfile::TempDir,
    pub(crate) path: PathBuf,
}

impl Volume {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("key"), PASSPHRASE).unwrap();
        Self { path: directory.path().join("disk.luks"), directory }
    }

    fn beside(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    pub(crate) fn open(&self, access: Access) -> imgfmt::Result<Image> {
        Image::open(&self.path, &options(access))
    }

    /// An empty volume made by `cryptsetup`, of `size` bytes with its header.
    pub(crate) fn by_cryptsetup(size: u64, arguments: &[&str]) -> Self {
        let volume = Self::new();
        std::fs::File::create(&volume.path).unwrap().set_len(size).unwrap();
        let key = volume.beside("key");
        let all = [&["luksFormat", "-q"], arguments, &[text(&volume.path), text(&key)]].concat();
        run("cryptsetup", &all);
        volume
    }

    /// A volume of version 2 with this content, which `cryptsetup` has encrypted.
    fn with_content(content: &[u8], arguments: &[&str]) -> Self {
        let volume = Self::new();
        std::fs::write(&volume.path, content).unwrap();
        let file = std::fs::OpenOptions::new().write(true).open(&volume.path).unwrap();
        file.set_len(content.len() as u64 + HEADER_ROOM).unwrap();
        let (path, key) = (text(&volume.path), volume.beside("key"));
        let start =
            ["reencrypt", "--encrypt", "-q", "--type", "luks2", "--reduce-device-size", "32M"];
        run("cryptsetup", &[&start[..], &["--key-file", text(&key)], arguments, &[path]].concat());
        volume
    }

    /// The content, as `cryptsetup` decrypts it: of version 2.
    fn decrypted_by_cryptsetup(&self) -> Vec<u8> {
        let copy = self.beside("decrypted");
        std::fs::copy(&self.path, &copy).unwrap();
        let (header, key) = (self.beside("header"), self.beside("key"));
        let start = ["reencrypt", "--decrypt", "-q", "--force-offline-reencrypt"];
        let rest = ["--header", text(&header), "--key-file", text(&key), text(&copy)];
        run("cryptsetup", &[&start[..], &rest].concat());
        std::fs::read(copy).unwrap()
    }

    fn secret(&self) -> String {
        format!("secret,id=s,file={}", text(&self.beside("key")))
    }

    fn driver(&self) -> String {
        format!("driver=luks,key-secret=s,file.filename={}", text(&self.path))
    }

    /// The content, as QEMU decrypts it: of version 1.
    fn decrypted_by_qemu(&self) -> Vec<u8> {
        let copy = self.beside("decrypted");
        let (secret, driver) = (self.secret(), self.driver());
        let start = ["convert", "--object", &secret, "--image-opts", &driver];
        run("qemu-img", &[&start[..], &["-O", "raw", text(&copy)]].concat());
        std::fs::read(copy).unwrap()
    }

    /// Random writes by QEMU.
    fn write_by_qemu(&self, random: &mut Random, size: u64) {
        let (secret, driver) = (self.secret(), self.driver());
        let mut arguments = vec!["--object".to_owned(), secret, "--image-opts".to_owned(), driver];
        for _ in 0..12 {
            let offset = random.below(size / 512) * 512;
            let length = ((random.below(300) + 1) * 512).min(size - offset);
            let pattern = random.below(255) + 1;
            arguments.extend(["-c".into(), format!("write -P {pattern} {offset} {length}")]);
        }
        run("qemu-io", &arguments.iter().map(|argument| &**argument).collect::<Vec<_>>());
    }
}

pub(crate) fn options(access: Access) -> OpenOptions {
    let passphrase = Passphrase::new(PASSPHRASE.into());
    OpenOptions::new().format(Format::Luks).access(access).passphrase(passphrase)
}

pub(crate) fn content(image: &Image) -> Vec<u8> {
    let mut content = vec![0; image.size() as usize];
    image.read_at(at(0), &mut content).unwrap();
    content
}

/// Random writes, zeroes and discards of any alignment, and the same in memory.
pub(crate) fn change(image: &Image, model: &mut [u8], random: &mut Random) {
    for _ in 0..30 {
        // Whole sectors of all volumes, or any bytes.
        let unit = if random.below(2) == 0 { 4096 } else { 1 };
        let offset = random.below(model.len() as u64) / unit * unit;
        let longest = if random.below(4) == 0 { 2 * MIB } else { 9000 };
        let length = (random.below(longest) + 1).next_multiple_of(unit);
        let length = length.min(model.len() as u64 - offset);
        let part = &mut model[offset as usize..(offset + length) as usize];
        let asked = range(offset, length);
        match random.below(8) {
            0 => {
                let mode =
                    if random.below(2) == 0 { ZeroMode::MayUnmap } else { ZeroMode::KeepAllocated };
                image.write_zeroes(asked, mode, Speed::Any, Durability::Cached).unwrap();
                part.fill(0);
            }
            1 => {
                image.discard(asked, Durability::Cached).unwrap();
                image.read_at(at(offset), part).unwrap();
            }
            _ => {
                part.copy_from_slice(&random.bytes(part.len()));
                let durability =
                    if random.below(4) == 0 { Durability::Fua } else { Durability::Cached };
                let is_tried = durability == Durability::Cached
                    && image.try_write_at(at(offset), part).unwrap() == TryWrite::Complete;
                if !is_tried {
                    image.write_at(at(offset), part, durability).unwrap();
                }
            }
        }
        let (start, end) = (random.below(model.len() as u64), random.below(model.len() as u64));
        let (start, end) = (start.min(end) as usize, start.max(end) as usize);
        let mut found = vec![0; end - start];
        image.read_at(at(start as u64), &mut found).unwrap();
        assert!(found == model[start..end], "{start}..{end}");
    }
}

/// Costs that a test can afford, for all the kinds that `cryptsetup` makes.
pub(crate) const QUICK: [&str; 2] = ["--pbkdf-force-iterations", "1000"];
const VERSION_1: &[&[&str]] = &[
    &["-c", "aes-xts-plain64", "-s", "512", "-h", "sha256"],
    &["-c", "aes-xts-plain64", "-s", "256", "-h", "sha512"],
    &["-c", "aes-xts-plain", "-s", "512", "-h", "sha1"],
    &["-c", "aes-cbc-essiv:sha256", "-s", "256", "-h", "sha256"],
    &["-c", "aes-cbc-plain64", "-s", "128", "-h", "sha384"],
    &["-c", "aes-cbc-plain", "-s", "256", "-h", "sha224"],
];

#[test]
fn volumes_of_version_1_are_read_and_written_as_qemu_does() {
    if !["cryptsetup", "qemu-img", "qemu-io"].into_iter().all(has_tool) {
        return;
    }
    let mut random = Random::new("luks1");
    for kind in VERSION_1 {
        println!("{kind:?}");
        let arguments = [&["--type", "luks1"], &QUICK[..], kind].concat();
        let volume = Volume::by_cryptsetup(6 * MIB, &arguments);
        let image = volume.open(Access::ReadWrite).unwrap();
        let size = image.size();
        assert_eq!(image.format(), Format::Luks);
        image.close().unwrap();
        volume.write_by_qemu(&mut random, size);
        let mut model = volume.decrypted_by_qemu();
        let image = volume.open(Access::ReadWrite).unwrap();
        assert!(content(&image) == model);
        change(&image, &mut model, &mut random);
        image.close().unwrap();
        assert!(volume.decrypted_by_qemu() == model);
    }
}

#[test]
fn volumes_that_qemu_makes_are_read_and_written_as_it_does() {
    if !["qemu-img", "qemu-io"].into_iter().all(has_tool) {
        return;
    }
    let mut random = Random::new("luks of qemu");
    for kind in [
        "",
        ",cipher-alg=aes-128,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        // A hash that is recorded and not used.
        ",cipher-alg=aes-256,cipher-mode=xts,ivgen-alg=plain64,ivgen-hash-alg=sha256",
    ] {
        let volume = Volume::new();
        let options = format!("key-secret=s,iter-time=10{kind}");
        let secret = volume.secret();
        let start = ["create", "-q", "-f", "luks", "--object", &secret, "-o", &options];
        run("qemu-img", &[&start[..], &[text(&volume.path), "3M"]].concat());
        volume.write_by_qemu(&mut random, 3 * MIB);
        let mut model = volume.decrypted_by_qemu();
        let image = volume.open(Access::ReadWrite).unwrap();
        assert!(content(&image) == model, "{kind}");
        change(&image, &mut model, &mut random);
        image.close().unwrap();
        assert!(volume.decrypted_by_qemu() == model, "{kind}");
    }
}

#[test]
fn volumes_of_version_2_are_read_and_written_as_cryptsetup_does() {
    if !has_tool("cryptsetup") {
        return;
    }
    let mut random = Random::new("luks2");
    for kind in [
        "--sector-size 4096 --pbkdf argon2id --pbkdf-memory 32",
        "--sector-size 512 --pbkdf argon2i --pbkdf-memory 64 --cipher aes-xts-plain64 -s 256",
        "--sector-size 2048 --pbkdf pbkdf2 --hash sha512",
        "--sector-size 1024 --pbkdf pbkdf2 --hash sha1 --cipher aes-cbc-essiv:sha256 -s 256",
        "--sector-size 4096 --pbkdf pbkdf2 --hash ripemd160 --cipher aes-cbc-plain64 -s 128",
    ] {
        println!("{kind}");
        let mut model = random.bytes(3 * MIB as usize);
        let iterations = if kind.contains("pbkdf2") { "1000" } else { "4" };
        let kind: Vec<&str> = kind.split(' ').collect();
        let arguments = [&["--pbkdf-force-iterations", iterations][..], &kind].concat();
        let volume = Volume::with_content(&model, &arguments);
        let image = volume.open(Access::ReadWrite).unwrap();
        assert!(content(&image)[..model.len()] == model);
        let rest = image.size() as usize - model.len();
        let mut all = content(&image);
        change(&image, &mut all, &mut random);
        image.close().unwrap();
        model.copy_from_slice(&all[..3 * MIB as usize]);
        let found = volume.decrypted_by_cryptsetup();
        assert!(found[..all.len()] == all, "{rest} bytes behind");
    }
}

#[test]
fn nbdkit_reads_what_was_written() {
    if !["cryptsetup", "nbdkit", "qemu-img"].into_iter().all(has_tool) {
        return;
    }
    let mut random = Random::new("luks of nbdkit");
    let arguments = [&["--type", "luks1"], &QUICK[..]].concat();
    let volume = Volume::by_cryptsetup(6 * MIB, &arguments);
    let image = volume.open(Access::ReadWrite).unwrap();
    let mut model = content(&image);
    change(&image, &mut model, &mut random);
    image.close().unwrap();
    let copy = volume.beside("copy");
    let passphrase = format!("passphrase=+{}", text(&volume.beside("key")));
    let then = format!("qemu-img convert -f raw -O raw \"$uri\" '{}'", text(&copy));
    let start = ["-U", "-", "-r", "--filter=luks", "file", text(&volume.path), &passphrase];
    run("nbdkit", &[&start[..], &["--run", &then]].concat());
    assert!(std::fs::read(copy).unwrap() == model);
}

#[test]
fn without_the_right_passphrase_nothing_is_opened() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(18 * MIB, &["--pbkdf", "pbkdf2", QUICK[0], QUICK[1]]);
    let plain = OpenOptions::new();
    let wrong = plain.clone().passphrase(Passphrase::new(b"wrong".to_vec()));
    let line = format!("{PASSPHRASE}\n").into_bytes();
    for options in [plain, wrong.clone(), wrong.clone().passphrase(Passphrase::new(line))] {
        let error = Image::open(&volume.path, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::KeyRequired, "{error}");
        assert!(!format!("{error} {options:?}").contains("wrong"), "it shows a passphrase");
    }
    let right = wrong.passphrase(Passphrase::new(PASSPHRASE.into()));
    let image = Image::open(&volume.path, &right).unwrap();
    assert_eq!((image.format(), image.size()), (Format::Luks, 2 * MIB));
    let said = Image::inspect_file(&volume.path, &OpenOptions::new()).unwrap();
    assert_eq!((said.format, said.size), (Format::Luks, 2 * MIB), "without any passphrase");
}

#[test]
fn the_ciphertext_is_not_handed_out() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(6 * MIB, &["--type", "luks1", QUICK[0], QUICK[1]]);
    let image = volume.open(Access::ReadWrite).unwrap();
    let map = image.map_read(range(0, image.size())).unwrap();
    for mapping in map.mappings() {
        let Content::File(span) = mapping.content else { panic!("{mapping:?}") };
        assert!(span.storage.as_fd().is_none() && span.storage.read_fd().is_none());
    }
    assert!(image.map_write(at(0), 4096).unwrap().is_none());
}

#[test]
fn threads_that_share_a_sector_do_not_disturb_each_other() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(6 * MIB, &["--type", "luks1", QUICK[0], QUICK[1]]);
    let image = Arc::new(volume.open(Access::ReadWrite).unwrap());
    std::thread::scope(|scope| {
        for thread in 0..8u8 {
            let image = Arc::clone(&image);
            scope.spawn(move || {
                for round in 0..200u64 {
                    let offset = at(round * 512 + u64::from(thread) * 64);
                    image.write_at(offset, &[thread + 1; 64], Durability::Cached).unwrap();
                    let mut found = [0; 64];
                    image.read_at(offset, &mut found).unwrap();
                    assert_eq!(found, [thread + 1; 64]);
                }
            });
        }
    });
    let expected = (0..200 * 512).map(|index| (index % 512 / 64 + 1) as u8);
    assert!(content(&image)[..200 * 512].iter().copied().eq(expected));
}

#[test]
fn a_larger_disk_reads_as_zero_at_its_end() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(6 * MIB, &["--type", "luks1", QUICK[0], QUICK[1]]);
    let mut image = volume.open(Access::ReadWrite).unwrap();
    let before = content(&image);
    image.resize(5 * MIB, Shrink::Refuse).unwrap();
    image.close().unwrap();
    let after = content(&volume.open(Access::ReadOnly).unwrap());
    assert!(after[..before.len()] == before);
    assert!(after.len() as u64 == 5 * MIB && after[before.len()..].iter().all(|byte| *byte == 0));
}

/// Changes bytes of a file.
fn spoil(path: &Path, offset: u64, bytes: &[u8]) {
    use std::os::unix::fs::FileExt as _;
    let file = std::fs::OpenOptions::new().write(true).open(path).unwrap();
    file.write_all_at(bytes, offset).unwrap();
}

#[test]
fn the_second_header_of_version_2_serves_when_the_first_is_damaged() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(18 * MIB, &["--pbkdf", "pbkdf2", QUICK[0], QUICK[1]]);
    let before = content(&volume.open(Access::ReadOnly).unwrap());
    for (offset, bytes) in [(5000, &b"damage"[..]), (448, b"checksum"), (0, &[0; 4096])] {
        spoil(&volume.path, offset, bytes);
        assert!(content(&volume.open(Access::ReadOnly).unwrap()) == before, "{offset}");
    }
    spoil(&volume.path, 16384 + 5000, b"damage");
    let error = volume.open(Access::ReadOnly).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
}

#[test]
fn volumes_that_need_what_is_not_known_here_are_refused() {
    if !has_tool("cryptsetup") {
        return;
    }
    // A re-encryption that has only begun.
    let volume = Volume::with_content(
        &[7; 1 << 20],
        &["--init-only", "--pbkdf", "pbkdf2", QUICK[0], QUICK[1]],
    );
    let error = volume.open(Access::ReadWrite).unwrap_err();
    assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
}

/// A header may say anything: it is refused, or a passphrase is wrong, but nothing else happens.
#[test]
fn damaged_headers_of_version_1_are_refused_or_harmless() {
    if !has_tool("cryptsetup") {
        return;
    }
    let volume = Volume::by_cryptsetup(6 * MIB, &["--type", "luks1", QUICK[0], QUICK[1]]);
    let original = std::fs::read(&volume.path).unwrap();
    let field = |offset: usize, value: u32| {
        let mut bytes = original.clone();
        bytes[offset..offset + 4].copy_from_slice(&value.to_be_bytes());
        std::fs::write(&volume.path, bytes).unwrap();
        volume.open(Access::ReadWrite).map(drop)
    };
    // Start of the data, length of the key, iterations of the digest and of the slot, state of the
    // slot, place of its material, stripes.
    for offset in [104, 108, 164, 212, 208, 248, 252] {
        for value in [0, 1, 0x7fff_ffff, u32::MAX] {
            let opened = field(offset, value);
            assert!(opened.is_err(), "{offset} {value:#x}");
        }
    }
    assert!(field(104, 4096).is_ok(), "the original one");
}
