//! qcow2 images with the old AES encryption, as QEMU still makes them: read, and never written.

use std::path::{Path, PathBuf};

use imgfmt::{
    Access, CreateOptions, ErrorKind, ExpectedEncryption, Format, Image, OpenOptions, Passphrase,
    Repair,
};

use crate::common::{Random, at, has_tool, run, text};
use crate::luks_vs_peers::content;

const SIZE: u64 = 2 << 20;

/// An image that QEMU has filled, whose passphrase is in the file "key" beside it.
fn image(directory: &Path, passphrase: &str, options: &str, random: &mut Random) -> PathBuf {
    let [path, key] = ["disk.qcow2", "key"].map(|name| directory.join(name));
    std::fs::write(&key, passphrase).unwrap();
    let secret = format!("secret,id=s,file={}", text(&key));
    let all = format!("encrypt.format=aes,encrypt.key-secret=s,{options}");
    let start = ["create", "-q", "-f", "qcow2", "--object", &secret, "-o", &all];
    run("qemu-img", &[&start[..], &[text(&path), &SIZE.to_string()]].concat());
    let driver = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(&path));
    let mut arguments = vec!["--object".to_owned(), secret, "--image-opts".to_owned(), driver];
    for _ in 0..12 {
        let offset = random.below(SIZE / 512) * 512;
        let length = ((random.below(300) + 1) * 512).min(SIZE - offset);
        let command = format!("write -P {} {offset} {length}", random.below(255) + 1);
        arguments.extend(["-c".into(), command]);
    }
    run("qemu-io", &arguments.iter().map(String::as_str).collect::<Vec<_>>());
    path
}

fn decrypted_by_qemu(path: &Path) -> Vec<u8> {
    let directory = path.parent().unwrap();
    let copy = directory.join("copy");
    let secret = format!("secret,id=s,file={}", text(&directory.join("key")));
    let driver = format!("driver=qcow2,encrypt.key-secret=s,file.filename={}", text(path));
    let start = ["convert", "--object", &secret, "--image-opts", &driver];
    run("qemu-img", &[&start[..], &["-O", "raw", text(&copy)]].concat());
    std::fs::read(copy).unwrap()
}

fn with(passphrase: &str) -> OpenOptions {
    OpenOptions::new().format(Format::Qcow2).passphrase(Passphrase::new(passphrase.into()))
}

#[test]
fn an_image_with_the_old_aes_is_read_as_qemu_reads_it() {
    if ["qemu-img", "qemu-io"].into_iter().any(|tool| !has_tool(tool)) {
        return;
    }
    let mut random = Random::new("the old AES");
    // Shorter than a key, as long as one, and longer, of which only the beginning counts.
    for (passphrase, options) in [
        ("x", "cluster_size=64k"),
        ("sixteen letters!", "cluster_size=512,compat=0.10"),
        ("more than sixteen letters", "extended_l2=on,cluster_size=64k"),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let path = image(directory.path(), passphrase, options, &mut random);
        let expected = decrypted_by_qemu(&path);
        let open = Image::open(&path, &with(passphrase)).unwrap();
        assert!(content(&open) == expected, "{options}");
        for _ in 0..50 {
            let offset = random.below(SIZE);
            let mut part = vec![0; (random.below(150_000).min(SIZE - offset - 1) + 1) as usize];
            open.read_at(at(offset), &mut part).unwrap();
            let place = offset as usize..offset as usize + part.len();
            assert!(part == expected[place.clone()], "{options}: {place:?}");
        }
        drop(open);
        // Below another image.
        let mut overlay = CreateOptions::overlay("disk.qcow2", Format::Qcow2);
        overlay.open = with(passphrase);
        let above = Image::create(directory.path().join("overlay"), &overlay).unwrap();
        assert!(content(&above) == expected, "{options}, below");
    }
}

#[test]
fn an_image_with_the_old_aes_is_not_written_and_its_passphrase_not_guessed() {
    if ["qemu-img", "qemu-io"].into_iter().any(|tool| !has_tool(tool)) {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = image(directory.path(), "x", "cluster_size=64k", &mut Random::new("the old AES"));
    let before = std::fs::read(&path).unwrap();
    let refused = |options: &OpenOptions, kind, part: &str| {
        let error = Image::open(&path, options).unwrap_err();
        assert!(error.kind() == kind && error.to_string().contains(part), "{error}");
    };
    refused(&with("x").access(Access::ReadWrite), ErrorKind::ReadOnly, "convert");
    let several = with("x").passphrase(Passphrase::new(b"y".to_vec()));
    refused(&several, ErrorKind::KeyRequired, "only that one");
    refused(&OpenOptions::new(), ErrorKind::KeyRequired, "no passphrase");
    let mut luks = with("x");
    luks.encryption = ExpectedEncryption::Luks;
    refused(&luks, ErrorKind::InvalidInput, "'luks'");
    // What needs no key.
    let report = Image::check_file(&path, &OpenOptions::new(), Repair::None).unwrap();
    assert_eq!(report.corruptions, 0);
    assert!(Image::check_file(&path, &OpenOptions::new(), Repair::All).is_err());
    assert!(std::fs::read(&path).unwrap() == before);
}
