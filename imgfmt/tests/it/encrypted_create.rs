//! New encrypted images: LUKS volumes and qcow2 with LUKS, which QEMU, `cryptsetup` and nbdkit
//! open, and into which nothing gets unencrypted.

use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use imgfmt::jobs::{Background, Clusters, ConvertOptions, JobContext, convert};
use imgfmt::{
    Access, BackingFile, BackingOptions, CreateOptions, DataFile, Durability, Encryption,
    ErrorKind, ExpectedEncryption, Format, Image, L2Entries, NewKey, OpenOptions, Passphrase,
    Preallocation, Qcow2Version, Repair,
};

use crate::common::{Random, at, has_tool, run, text};
use crate::luks_vs_peers::{PASSPHRASE, change, content};

const MIB: u64 = 1 << 20;
/// What must not be seen in a file.
const SECRET: &[u8] = b"the secret plain text";
/// The length of a LUKS header as QEMU makes it, with its key material.
const HEADER: u64 = 2_068_480;

/// Chooses options of a new image.
type Choose = fn(&mut CreateOptions);

struct Place {
    directory: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let directory = tempfile::tempdir().unwrap();
        std::fs::write(directory.path().join("key"), PASSPHRASE).unwrap();
        Self { directory }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn secret(&self) -> String {
        format!("secret,id=s,file={}", text(&self.path("key")))
    }

    fn driver(&self, path: &Path, format: Format) -> String {
        let key = if format == Format::Luks { "key-secret" } else { "encrypt.key-secret" };
        format!("driver={format},{key}=s,file.filename={}", text(path))
    }

    /// The content, as QEMU decrypts it.
    fn decrypted(&self, path: &Path, format: Format) -> Vec<u8> {
        let (copy, secret, driver) =
            (self.path("decrypted"), self.secret(), self.driver(path, format));
        let start = ["convert", "--object", &secret, "--image-opts", &driver];
        run("qemu-img", &[&start[..], &["-O", "raw", text(&copy)]].concat());
        std::fs::read(copy).unwrap()
    }
}

fn new_key() -> NewKey {
    NewKey::new(Passphrase::new(PASSPHRASE.into())).iteration_time(Duration::from_millis(10))
}

fn encrypted(format: Format, size: u64) -> CreateOptions {
    let mut options = CreateOptions::new(format, size);
    options.encryption = Some(new_key());
    options
}

fn opening(format: Format, access: Access) -> OpenOptions {
    let passphrase = Passphrase::new(PASSPHRASE.into());
    OpenOptions::new().format(format).access(access).passphrase(passphrase)
}

/// The secret, over and over again.
fn secret(length: u64) -> Vec<u8> {
    SECRET.iter().copied().cycle().take(length as usize).collect()
}

fn assert_no_plain_text(path: &Path) {
    let bytes = std::fs::read(path).unwrap();
    assert!(!bytes.windows(SECRET.len()).any(|window| window == SECRET), "{}", path.display());
}

#[test]
fn new_encrypted_images_are_read_and_written_by_qemu_and_here() {
    if ["qemu-img", "qemu-io"].into_iter().any(|tool| !has_tool(tool)) {
        return;
    }
    let mut random = Random::new("new encrypted images");
    let kinds: [(&str, Format, Choose); 6] = [
        ("luks", Format::Luks, |_| {}),
        ("default", Format::Qcow2, |_| {}),
        ("subclusters", Format::Qcow2, |options| options.l2_entries = L2Entries::Extended),
        ("tiny", Format::Qcow2, |options| options.cluster_size = 512),
        ("large", Format::Qcow2, |options| options.cluster_size = 2 << 20),
        ("old", Format::Qcow2, |options| options.version = Qcow2Version::V2),
    ];
    for (name, format, choose) in kinds {
        let (place, size) = (Place::new(), 3 * MIB);
        let path = place.path(name);
        let mut options = encrypted(format, size);
        choose(&mut options);
        let image = Image::create(&path, &options).unwrap();
        let mut model = vec![0; size as usize];
        if format == Format::Luks {
            // It reads as noise before.
            image.write_at(at(0), &model, Durability::Cached).unwrap();
        }
        image.write_at(at(70_001), &secret(200_000), Durability::Cached).unwrap();
        model[70_001..270_001].copy_from_slice(&secret(200_000));
        change(&image, &mut model, &mut random);
        image.close().unwrap();
        assert_no_plain_text(&path);
        assert!(place.decrypted(&path, format) == model, "{name}");
        let (secret, driver) = (place.secret(), place.driver(&path, format));
        let write = ["--object", &secret, "--image-opts", &driver, "-c", "write -P 77 512 70000"];
        run("qemu-io", &write);
        model[512..70_512].fill(77);
        if format == Format::Qcow2 {
            run("qemu-img", &["check", "-q", "--object", &secret, "--image-opts", &driver]);
            let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
            assert_eq!((report.corruptions, report.leaks), (0, 0), "{name}: {report:?}");
        } else {
            assert_eq!(std::fs::metadata(&path).unwrap().len(), HEADER + size);
        }
        let image = Image::open(&path, &opening(format, Access::ReadWrite)).unwrap();
        assert!(content(&image) == model, "{name}");
    }
}

#[test]
fn the_header_says_what_qemu_says_in_its_own() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    let (ours, theirs) = (place.path("ours"), place.path("theirs"));
    drop(Image::create(&ours, &encrypted(Format::Luks, MIB)).unwrap());
    let secret = place.secret();
    let start = ["create", "-q", "-f", "luks", "--object", &secret];
    run(
        "qemu-img",
        &[&start[..], &["-o", "key-secret=s,iter-time=10", text(&theirs), "1M"]].concat(),
    );
    // All but salts, digests, numbers of iterations and the UUID.
    let fields = [ours, theirs].map(|path| {
        let info = Image::inspect_file(path, &OpenOptions::new()).unwrap();
        let Some(Encryption::Luks(Some(luks))) = info.encryption else { panic!("no header") };
        let details = luks.details.unwrap();
        let slots: Vec<_> = details
            .slots
            .iter()
            .map(|slot| (slot.is_active, slot.key_offset, slot.stripes))
            .collect();
        let names = [details.cipher, details.cipher_mode, details.iv_generator, details.hash];
        (luks.version, luks.payload_offset, names, slots)
    });
    assert_eq!(fields[0], fields[1]);
}

#[test]
fn cryptsetup_and_nbdkit_open_a_new_volume() {
    let place = Place::new();
    let path = place.path("disk.luks");
    let image = Image::create(&path, &encrypted(Format::Luks, 2 * MIB)).unwrap();
    image.write_at(at(0), &secret(2 * MIB), Durability::Cached).unwrap();
    image.close().unwrap();
    assert_no_plain_text(&path);
    let key = place.path("key");
    if has_tool("cryptsetup") {
        run("cryptsetup", &["luksDump", text(&path)]);
        let test = ["open", "--test-passphrase", "--key-file", text(&key), text(&path)];
        run("cryptsetup", &test);
        std::fs::write(place.path("wrong"), "wrong").unwrap();
        let wrong = place.path("wrong");
        let test = ["open", "--test-passphrase", "--key-file", text(&wrong), text(&path)];
        assert!(!Command::new("cryptsetup").args(test).output().unwrap().status.success());
    }
    if ["nbdkit", "nbdcopy"].into_iter().all(has_tool) {
        let copy = place.path("copy");
        let passphrase = format!("passphrase=+{}", text(&key));
        let copying = format!("nbdcopy \"$uri\" '{}'", text(&copy));
        let rest = ["file", text(&path), "--filter=luks", &passphrase, "--run", &copying];
        run("nbdkit", &[&["-U", "-", "--exit-with-parent"][..], &rest].concat());
        assert!(std::fs::read(copy).unwrap() == secret(2 * MIB));
    }
}

#[test]
fn copies_into_new_encrypted_images_are_whole_and_leave_no_plain_text() {
    if !has_tool("qemu-img") {
        return;
    }
    let place = Place::new();
    // Data, then zeroes, then data.
    let mut disk = secret(3 * MIB);
    disk[MIB as usize..2 * MIB as usize].fill(0);
    std::fs::write(place.path("disk.raw"), &disk).unwrap();
    let raw = OpenOptions::new().format(Format::Raw);
    let source = Image::open(place.path("disk.raw"), &raw).unwrap();
    for (name, format, preallocation) in [
        ("a.qcow2", Format::Qcow2, Preallocation::Off),
        ("full.qcow2", Format::Qcow2, Preallocation::Full),
        ("a.luks", Format::Luks, Preallocation::Off),
        ("full.luks", Format::Luks, Preallocation::Full),
        ("falloc.luks", Format::Luks, Preallocation::Falloc),
    ] {
        let path = place.path(name);
        let mut options = encrypted(format, 3 * MIB);
        options.preallocation = preallocation;
        let image = Image::create(&path, &options).unwrap();
        if preallocation == Preallocation::Full {
            assert!(content(&image).iter().all(|byte| *byte == 0), "{name}");
        }
        let mut options = ConvertOptions::default();
        options.clusters = Clusters::Compressed;
        if format == Format::Luks {
            (options.background, options.clusters) = (Background::Unknown, Clusters::Plain);
        }
        convert(&source, &image, &options, &JobContext::default()).unwrap();
        image.close().unwrap();
        assert_no_plain_text(&path);
        assert!(place.decrypted(&path, format) == disk, "{name}");
    }
}

#[test]
fn an_encrypted_overlay_keeps_what_is_written_to_it_secret() {
    let place = Place::new();
    std::fs::write(place.path("base.raw"), vec![5; MIB as usize]).unwrap();
    let mut options = encrypted(Format::Qcow2, MIB);
    options.backing = Some(("base.raw".into(), Format::Raw));
    let path = place.path("overlay.qcow2");
    let image = Image::create(&path, &options).unwrap();
    image.write_at(at(1000), &secret(100_000), Durability::Cached).unwrap();
    let mut model = vec![5; MIB as usize];
    model[1000..101_000].copy_from_slice(&secret(100_000));
    assert!(content(&image) == model);
    image.close().unwrap();
    assert_no_plain_text(&path);
    if has_tool("qemu-img") {
        assert!(place.decrypted(&path, Format::Qcow2) == model);
    }
}

#[test]
fn encrypted_images_are_preallocated_in_every_way_and_qemu_sees_the_same() {
    let mut random = Random::new("preallocated and encrypted");
    for (format, preallocation) in [
        (Format::Qcow2, Preallocation::Metadata),
        (Format::Qcow2, Preallocation::Falloc),
        (Format::Qcow2, Preallocation::Full),
        (Format::Luks, Preallocation::Falloc),
        (Format::Luks, Preallocation::Full),
    ] {
        let (place, what) = (Place::new(), format!("{format} {preallocation:?}"));
        let path = place.path("image");
        let mut options = encrypted(format, 3 * MIB);
        options.preallocation = preallocation;
        let image = Image::create(&path, &options).unwrap();
        let metadata = std::fs::metadata(&path).unwrap();
        assert!(metadata.len() >= 5 * MIB - MIB / 32, "{what}: {}", metadata.len());
        let space = std::os::unix::fs::MetadataExt::blocks(&metadata) * 512;
        let is_sparse = preallocation == Preallocation::Metadata;
        assert_eq!(space < 3 * MIB, is_sparse, "{what}: {space}");
        // What is set aside is noise, as in QEMU.
        let mut model = content(&image);
        let is_zero = model.iter().all(|byte| *byte == 0);
        assert_eq!(is_zero, preallocation == Preallocation::Full, "{what}");
        change(&image, &mut model, &mut random);
        image.close().unwrap();
        let image = Image::open(&path, &opening(format, Access::ReadOnly)).unwrap();
        assert!(content(&image) == model, "{what}");
        drop(image);
        if has_tool("qemu-img") {
            assert!(place.decrypted(&path, format) == model, "{what}");
            let (secret, driver) = (place.secret(), place.driver(&path, format));
            if format == Format::Qcow2 {
                run("qemu-img", &["check", "-q", "--object", &secret, "--image-opts", &driver]);
            }
        }
    }
}

#[test]
fn encryption_that_is_not_possible_is_refused_before_there_is_a_file() {
    let place = Place::new();
    let path = place.path("new");
    let refused = |options: &CreateOptions| {
        let error = Image::create(&path, options).unwrap_err();
        assert!(!path.exists(), "{error}");
        error
    };
    let error = refused(&CreateOptions::new(Format::Luks, MIB));
    assert_eq!(error.kind(), ErrorKind::KeyRequired, "{error}");
    let changes: [(Format, Choose); 7] = [
        (Format::Raw, |_| {}),
        (Format::Vdi, |_| {}),
        (Format::Luks, |options| options.size = Some(1000)),
        (Format::Luks, |options| options.size = Some(i64::MAX as u64 / 512 * 512)),
        (Format::Luks, |options| options.preallocation = Preallocation::Metadata),
        (Format::Qcow2, |options| options.data_file = Some(("d".into(), DataFile::Plain))),
        (Format::Qcow2, |options| {
            options.encryption = Some(NewKey::new(Passphrase::new(Vec::new())));
        }),
    ];
    for (format, change) in changes {
        let mut options = encrypted(format, MIB);
        change(&mut options);
        let error = refused(&options);
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
    }
}

#[test]
fn a_plain_image_that_is_said_to_be_encrypted_is_refused_and_may_be_below_one_that_is() {
    let place = Place::new();
    drop(Image::create(place.path("base"), &CreateOptions::new(Format::Qcow2, MIB)).unwrap());
    let mut create = encrypted(Format::Qcow2, MIB);
    create.backing = Some(("base".into(), Format::Qcow2));
    drop(Image::create(place.path("overlay"), &create).unwrap());
    for access in [Access::ReadOnly, Access::ReadWrite] {
        let mut options = opening(Format::Qcow2, access);
        options.encryption = ExpectedEncryption::Luks;
        let error = Image::open(place.path("base"), &options).unwrap_err();
        assert!(error.to_string().contains("No encryption in image header"), "{error}");
        drop(Image::open(place.path("overlay"), &options).unwrap());
        let mut below = BackingOptions::default();
        below.encryption = ExpectedEncryption::Luks;
        options.backing = BackingFile::Given(Box::new(below));
        assert!(Image::open(place.path("overlay"), &options).is_err());
    }
}
