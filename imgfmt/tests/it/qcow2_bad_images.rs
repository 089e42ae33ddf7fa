//! Damaged and hostile images are refused with one sentence, unchanged, and never panic.

use std::path::Path;

use imgfmt::{Access, ErrorKind, Image, OpenOptions, OpenPolicy};

use crate::common::{self, Random, at, qemu, range};

fn made(options: &str) -> Option<(tempfile::TempDir, std::path::PathBuf)> {
    if !qemu::has_qemu() {
        return None;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    qemu::create(&path, options, "1M");
    qemu::io(&path, "qcow2", &["write -P 5 0 200k".into(), "write -z 300k 64k".into()]);
    Some((directory, path))
}

fn refusal(path: &Path) -> imgfmt::Error {
    let before = std::fs::read(path).unwrap();
    let error = Image::open(path, &OpenOptions::new()).unwrap_err();
    assert!(!error.to_string().contains('\n'), "{error}");
    assert!(std::fs::read(path).unwrap() == before, "a refused image was changed");
    error
}

#[test]
fn impossible_header_fields_are_refused() {
    let Some((_directory, path)) = made("") else { return };
    let good = std::fs::read(&path).unwrap();
    let cases: [(usize, &[u8], ErrorKind); 19] = [
        (4, &9u32.to_be_bytes(), ErrorKind::Unsupported), // version
        (20, &8u32.to_be_bytes(), ErrorKind::InvalidFormat), // cluster_bits
        (20, &22u32.to_be_bytes(), ErrorKind::InvalidFormat), // cluster_bits
        (20, &u32::MAX.to_be_bytes(), ErrorKind::InvalidFormat), // cluster_bits
        (24, &u64::MAX.to_be_bytes(), ErrorKind::InvalidFormat), // size
        (24, &(1u64 << 63).to_be_bytes(), ErrorKind::InvalidFormat), // size
        (24, &(1u64 << 62).to_be_bytes(), ErrorKind::InvalidFormat), // size: L1 too small
        (32, &2u32.to_be_bytes(), ErrorKind::InvalidFormat), // crypt_method, without a LUKS header
        (32, &1u32.to_be_bytes(), ErrorKind::KeyRequired), // crypt_method: AES
        (36, &u32::MAX.to_be_bytes(), ErrorKind::InvalidFormat), // l1_size
        (40, &(1u64 << 50).to_be_bytes(), ErrorKind::InvalidFormat), // l1_table_offset
        (40, &(u64::MAX - 4).to_be_bytes(), ErrorKind::InvalidFormat), // l1_table_offset
        (48, &(1u64 << 50).to_be_bytes(), ErrorKind::InvalidFormat), // refcount_table_offset
        (56, &0u32.to_be_bytes(), ErrorKind::InvalidFormat), // refcount_table_clusters
        (56, &u32::MAX.to_be_bytes(), ErrorKind::InvalidFormat), // refcount_table_clusters
        (60, &u32::MAX.to_be_bytes(), ErrorKind::InvalidFormat), // nb_snapshots
        (72, &(1u64 << 5).to_be_bytes(), ErrorKind::Unsupported), // unknown incompatible bit
        (96, &7u32.to_be_bytes(), ErrorKind::InvalidFormat), // refcount_order
        (100, &103u32.to_be_bytes(), ErrorKind::InvalidFormat), // header_length
    ];
    for (offset, bytes, kind) in cases {
        let mut bad = good.clone();
        bad[offset..offset + bytes.len()].copy_from_slice(bytes);
        std::fs::write(&path, &bad).unwrap();
        let error = refusal(&path);
        assert_eq!(error.kind(), kind, "field at {offset}: {error}");
    }
    for length in [4, 71, 100, 108] {
        std::fs::write(&path, &good[..length]).unwrap();
        assert_eq!(refusal(&path).kind(), ErrorKind::InvalidFormat, "{length} bytes");
    }
}

#[test]
fn an_unknown_feature_is_named_as_the_image_names_it() {
    let Some((_directory, path)) = made("") else { return };
    let mut bytes = std::fs::read(&path).unwrap();
    bytes[72..80].copy_from_slice(&(1u64 << 9).to_be_bytes());
    std::fs::write(&path, &bytes).unwrap();
    assert!(refusal(&path).to_string().contains("bit 9"));
}

#[test]
fn an_image_that_is_its_own_backing_file_is_named_as_such_and_not_called_busy() {
    for format in ["qcow2", "raw"] {
        let Some((_directory, path)) = made("") else { return };
        common::run(
            "qemu-img",
            &["rebase", "-u", "-f", "qcow2", "-b", "disk.qcow2", "-F", format, common::text(&path)],
        );
        for access in [Access::ReadOnly, Access::ReadWrite] {
            let options = OpenOptions::new().access(access).policy(OpenPolicy::any_file());
            let error = Image::open(&path, &options).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidFormat, "{error}");
            assert!(error.to_string().contains("back to itself"), "{error}");
        }
    }
}

#[test]
fn a_chain_that_leads_back_to_itself_is_refused() {
    let Some((directory, path)) = made("") else { return };
    let other = directory.path().join("other.qcow2");
    qemu::create_overlay(&other, "", &path, "qcow2", "1M");
    common::run(
        "qemu-img",
        &["rebase", "-u", "-f", "qcow2", "-b", "other.qcow2", "-F", "qcow2", common::text(&path)],
    );
    let error = refusal(&path);
    assert_eq!(error.kind(), ErrorKind::InvalidFormat);
    assert!(error.to_string().contains("back to itself"), "{error}");
}

#[test]
fn a_backing_file_needs_to_exist_to_be_allowed_and_to_have_a_format() {
    let Some((directory, path)) = made("") else { return };
    let rebase = |arguments: &[&str]| {
        let mut all = vec!["rebase", "-u", "-f", "qcow2"];
        all.extend(arguments);
        all.push(common::text(&path));
        common::run("qemu-img", &all);
    };
    rebase(&["-b", "missing", "-F", "raw"]);
    assert_eq!(refusal(&path).kind(), ErrorKind::NotFound);
    rebase(&["-b", "/etc/passwd", "-F", "raw"]);
    let error = refusal(&path);
    assert_eq!(error.kind(), ErrorKind::PolicyDenied);
    assert!(error.to_string().contains("/etc/passwd"), "{error}");
    Image::open(&path, &OpenOptions::new().policy(OpenPolicy::any_file())).unwrap();
    rebase(&["-b", "nbd://localhost/x", "-F", "raw"]);
    assert_eq!(refusal(&path).kind(), ErrorKind::PolicyDenied);
    std::fs::write(directory.path().join("base.dmg"), "koly").unwrap();
    rebase(&["-b", "base.dmg", "-F", "dmg"]);
    assert_eq!(refusal(&path).kind(), ErrorKind::Unsupported);
}

#[test]
fn metadata_with_random_damage_never_panics() {
    for options in ["", "extended_l2=on", "cluster_size=512", "compat=0.10"] {
        let Some((_directory, path)) = made(options) else { return };
        let good = std::fs::read(&path).unwrap();
        let mut random = Random::new(options);
        for _ in 0..300 {
            let mut bad = good.clone();
            for _ in 0..=random.below(3) {
                // Most damage goes where metadata is: the words that are not zero.
                let words: Vec<usize> = (0..bad.len() / 8)
                    .filter(|word| bad[word * 8..word * 8 + 8] != [5; 8])
                    .filter(|word| bad[word * 8..word * 8 + 8] != [0; 8] || word % 509 == 0)
                    .collect();
                let word = words[random.below(words.len() as u64) as usize] * 8;
                bad[word + random.below(8) as usize] ^= 1 << random.below(8);
            }
            if random.below(4) == 0 {
                bad.truncate(random.below(bad.len() as u64) as usize);
            }
            std::fs::write(&path, &bad).unwrap();
            let Ok(image) = Image::open(&path, &OpenOptions::new()) else { continue };
            let length = image.size().min(1 << 20);
            let mut buffer = vec![0; length as usize];
            let _ = image.read_at(at(0), &mut buffer);
            let _ = image.try_read_at(at(0), &mut buffer);
            let _ = image.extents(range(0, length)).bounded(2, 1000).count();
            let _ = image.map_read(range(0, length));
        }
    }
}
