//! New encrypted images, by `image create`, `image convert` and the form of qemu-img.

use std::path::Path;
use std::process::Command;

use crate::support::image::decrypted;
use crate::support::qemu_img::{ours, words};
use crate::support::{Disk, nbd_cli, run, says};
use crate::tools;

const PASSPHRASE: &str = "never-in-any-log";

fn key_of(disk: &Disk) -> String {
    let key = disk.beside("key");
    std::fs::write(&key, PASSPHRASE).expect("room");
    key
}

#[test]
fn an_encrypted_image_is_created_converted_and_opened_by_qemu() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let key = key_of(&disk);
    for format in ["qcow2", "luks"] {
        let [new, copy] = ["new", "copy"].map(|name| disk.beside(&format!("{name}.{format}")));
        let key_file = ["--key-file", &key, "--iter-time", "10ms"];
        let create = ["-vv", "image", "create", "--format", format, "--encrypt", &new, "4M"];
        let created = nbd_cli(&[&create[..], &key_file].concat());
        assert_eq!(created.code, Some(0), "{created:?}");
        assert!(!format!("{created:?}").contains(PASSPHRASE), "{created:?}");
        assert_eq!(decrypted(&disk, &qemu_img, format, &new, &key).len(), 4 << 20);
        let new_key = ["--encrypt", "--new-key-file", &key, "--iter-time", "10ms"];
        let convert = ["image", "convert", "-O", format, disk.path(), &copy];
        nbd_cli(&[&convert[..], &new_key].concat()).success();
        assert!(decrypted(&disk, &qemu_img, format, &copy, &key) == disk.content());
        nbd_cli(&["image", "compare", "--key-file", &key, &copy, disk.path()]).success();
    }
}

#[test]
fn an_encrypted_image_is_made_only_with_its_key_and_where_it_is_possible() {
    let disk = Disk::sparse();
    let (key, new) = (key_of(&disk), disk.beside("new"));
    let create = |rest: &[&str]| nbd_cli(&[&["image", "create", &new, "1M"], rest].concat());
    says(create(&["--format", "luks"]), &["--key-file"]);
    says(create(&["--key-file", &key]), &["--encrypt"]);
    says(create(&["--encrypt", "--key-file", &key]), &["only qcow2 images and LUKS volumes"]);
    says(create(&["--format", "luks", "--key-file", "/dev/null"]), &["is empty"]);
    let convert = ["image", "convert", "-O", "luks", disk.path(), &new];
    says(nbd_cli(&convert), &["--new-key-file"]);
    assert!(!Path::new(&new).exists());
}

#[test]
fn the_form_of_qemu_img_makes_encrypted_images_and_reports_them_alike() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let key = key_of(&disk);
    let secret = format!("--object secret,id=s,file={key}");
    for (format, options) in [
        ("qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        ("luks", "key-secret=s,iter-time=10,cipher-alg=aes-256"),
        // As OpenStack says it.
        (
            "luks",
            "key-secret=s,cipher-alg=aes-256,cipher-mode=xts,hash-alg=sha256,iter-time=10,\
             ivgen-alg=plain64,ivgen-hash-alg=sha256",
        ),
        (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=metadata",
        ),
        (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=falloc",
        ),
        (
            "qcow2",
            "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10,preallocation=full",
        ),
        ("luks", "key-secret=s,iter-time=10,preallocation=falloc"),
        ("luks", "key-secret=s,iter-time=10,preallocation=full"),
    ] {
        let directory = tempfile::tempdir().expect("room");
        let here = directory.path();
        let create = words(&format!("create {secret} -f {format} -o {options} new 4M"));
        let mine = ours(here, &create);
        assert_eq!(mine.code, Some(0), "{mine:?}");
        let theirs = run(Command::new(&qemu_img).args(&create).current_dir(here));
        assert_eq!(mine.stdout, theirs.stdout);
        let from = disk.path();
        let line = format!("convert {secret} -O {format} -o {options} -f raw {from} copy");
        let copied = ours(here, &words(&line));
        assert_eq!(copied.code, Some(0), "{copied:?}");
        let copy = here.join("copy");
        let copy = copy.to_str().expect("text");
        assert!(decrypted(&disk, &qemu_img, format, copy, &key) == disk.content());
        let sizes = words(&format!("measure {secret} -O {format} -o {options} --size 4M"));
        let (mine, theirs) =
            (ours(here, &sizes), run(Command::new(&qemu_img).args(&sizes).current_dir(here)));
        assert_eq!(mine.stdout, theirs.stdout);
    }
}

#[test]
fn an_encrypted_overlay_that_is_converted_upon_a_base_has_only_what_differs_and_hides_it() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let key = key_of(&disk);
    let directory = tempfile::tempdir().expect("room");
    let here = directory.path();
    let mut content = disk.content().to_vec();
    std::fs::write(here.join("base.raw"), &content).expect("room");
    let secret_text = b"what differs is a secret".repeat(100);
    content[70_000..70_000 + secret_text.len()].copy_from_slice(&secret_text);
    // Data of the base becomes zero, which must not show it.
    content[..65536].fill(0);
    std::fs::write(here.join("source.raw"), &content).expect("room");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let line = format!(
        "convert --object secret,id=s,file={key} -f raw -O qcow2 -o {options} -B base.raw -F raw \
         source.raw copy"
    );
    let copied = ours(here, &words(&line));
    assert_eq!(copied.code, Some(0), "{copied:?}");
    let copy = here.join("copy");
    let bytes = std::fs::read(&copy).expect("the copy");
    assert!(!bytes.windows(24).any(|window| window == &secret_text[..24]), "plain text");
    assert!(bytes.len() < 3 << 20, "{} bytes: more than what differs", bytes.len());
    let copy = copy.to_str().expect("text");
    assert!(decrypted(&disk, &qemu_img, "qcow2", copy, &key) == content);
}

#[test]
fn options_of_encryption_that_are_incomplete_or_not_made_are_refused_by_the_form_of_qemu_img() {
    let directory = tempfile::tempdir().expect("room");
    for (options, part) in [
        ("-f qcow2 -o encrypt.key-secret=s", "'encrypt.format' is missing"),
        ("-f qcow2 -o encrypt.format=luks", "'encrypt.key-secret' is required"),
        ("-f qcow2 -o encrypt.format=luks,encrypt.key-secret=t", "No secret with id 't'"),
        ("-f qcow2 -o encrypt.format=aes,encrypt.key-secret=s", "old AES"),
        ("-f qcow2 -o encryption=on,encrypt.key-secret=s", "old AES"),
        ("-f qcow2 -o encrypt.format=nosuch,encrypt.key-secret=s", "does not accept value"),
        ("-f luks", "'key-secret' is required"),
        ("-f luks -o key-secret=s,cipher-alg=twofish-256", "only 'aes-256'"),
        ("-f luks -o key-secret=s,iter-time=600001", "does not accept value '600001'"),
        ("-f luks -o key-secret=s,preallocation=metadata", "does not accept value"),
        ("-f raw -o key-secret=s", "Invalid parameter 'key-secret'"),
    ] {
        let line = format!("create --object secret,id=s,data=never-shown {options} new 1M");
        let outcome = ours(directory.path(), &words(&line));
        assert_eq!(outcome.code, Some(1), "{line}: {outcome:?}");
        assert!(outcome.stderr.contains(part), "{line}: {outcome:?}");
        assert!(!format!("{outcome:?}").contains("never-shown"), "{outcome:?}");
        assert!(!directory.path().join("new").exists());
    }
}
