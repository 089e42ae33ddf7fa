//! Encrypted images: served, converted and described with a key file, and not without.

use std::path::Path;

use crate::support::image::decrypted;
use crate::support::qemu_nbd::qemu_nbd;
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

pub(crate) const PASSPHRASE: &str = "never-in-any-log";

/// A volume of QEMU with the content of the disk, and the name of its key file.
pub(crate) fn volume(disk: &Disk, qemu_img: &Path) -> (String, String) {
    let [image, key] = ["disk.luks", "key"].map(|name| disk.beside(name));
    std::fs::write(&key, PASSPHRASE).expect("room");
    let secret = format!("secret,id=s,file={key}");
    let start = ["convert", "--object", &secret, "-f", "raw", "-O", "luks"];
    let rest = ["-o", "key-secret=s,iter-time=10", disk.path(), &image];
    peer(qemu_img, &[&start[..], &rest].concat());
    (image, key)
}

#[test]
fn an_encrypted_disk_is_served_read_and_written_with_its_key_file() {
    tools!(qemu_img = "qemu-img", _qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let copy = disk.beside("copy");
    // Everything at trace level: no passphrase is in it.
    let reads = format!("qemu-img convert -f raw -O raw \"$uri\" '{copy}'");
    let start = ["-vv", "serve", "--read-only", "--key-file", &key, "--run", &reads, &image];
    let outcome = nbd_cli(&start);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(!format!("{outcome:?}").contains(PASSPHRASE), "{outcome:?}");
    disk.assert_equals(&copy);
    // Unaligned, small and large, in place of data and of zeroes.
    let writes = "qemu-io -f raw -c 'write -P 7 512 70000' -c 'write -z 1M 300k' \
                  -c 'write -P 9 2000 3' -c 'write -P 5 3M 600k' -c 'discard 100k 64k' \
                  -c 'read -P 7 512 1488' -c 'read -P 9 2000 3' -c flush \"$uri\"";
    let outcome = nbd_cli(&["serve", "--key-file", &key, "--run", writes, &image]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(!outcome.stdout.contains("verification failed"), "{outcome:?}");
    let found = decrypted(&disk, &qemu_img, "luks", &image, &key);
    let mut expected = disk.content().to_vec();
    expected[512..70512].fill(7);
    expected[1 << 20..(1 << 20) + (300 << 10)].fill(0);
    expected[2000..2003].fill(9);
    expected[3 << 20..(3 << 20) + (600 << 10)].fill(5);
    assert!(found[..expected.len()] == expected);
}

#[test]
fn an_encrypted_disk_is_converted_compared_and_mapped_with_its_key_file() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let copy = disk.beside("copy.raw");
    nbd_cli(&["image", "convert", "-O", "raw", "--key-file", &key, &image, &copy]).success();
    disk.assert_equals(&copy);
    let compare = ["image", "compare", "--key-file", &key, &image, disk.path()];
    nbd_cli(&compare).success();
    nbd_cli(&["image", "map", "--key-file", &key, &image]).success();
    // An overlay over it.
    let overlay = disk.beside("overlay.qcow2");
    let create = ["create", "-q", "-u", "-f", "qcow2", "-F", "luks", "-b", &image, &overlay, "4M"];
    peer(&qemu_img, &create);
    nbd_cli(&["image", "map", "--key-file", &key, &overlay]).success();
}

#[test]
fn the_map_of_an_encrypted_disk_leads_to_no_ciphertext() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (luks, key) = volume(&disk, &qemu_img);
    let secret = format!("secret,id=s,file={key}");
    let qcow2 = disk.beside("disk.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let start = ["convert", "--object", &secret, "-f", "raw", "-O", "qcow2", "-o", options];
    peer(&qemu_img, &[&start[..], &[disk.path(), &qcow2]].concat());
    let old = old_aes(&disk, &qemu_img, &key);
    let keys = [
        (&luks, "driver=luks,key-secret=s"),
        (&qcow2, "driver=qcow2,encrypt.key-secret=s"),
        (&old, "driver=qcow2,encrypt.key-secret=s"),
    ];
    for (image, driver) in keys {
        let driver = format!("{driver},file.filename={image}");
        let map = ["map", "--output=json", "--object", &secret, "--image-opts", &driver];
        let theirs: serde_json::Value =
            serde_json::from_slice(&peer(&qemu_img, &map).into_bytes()).expect("a map of qemu-img");
        let map = ["image", "map", "--json", "--key-file", &key, image];
        let ours = nbd_cli(&map).json();
        let data = |map: &serde_json::Value| -> Vec<(u64, u64)> {
            let parts = map.as_array().expect("an array").iter();
            assert!(parts.clone().all(|part| part.get("offset").is_none()), "{map}");
            let data = parts.filter(|part| part["data"] == true);
            data.map(|part| (part["start"].as_u64(), part["length"].as_u64()))
                .map(|(start, length)| (start.expect("a number"), length.expect("a number")))
                .collect()
        };
        assert_eq!(data(&ours), data(&theirs), "{image}");
        assert!(!data(&ours).is_empty());
    }
}

/// A qcow2 image with the old AES encryption and the content of the disk.
fn old_aes(disk: &Disk, qemu_img: &Path, key: &str) -> String {
    let image = disk.beside("old.qcow2");
    let secret = format!("secret,id=s,file={key}");
    let start = ["convert", "-q", "--object", &secret, "-f", "raw", "-O", "qcow2"];
    let options = ["-o", "encrypt.format=aes,encrypt.key-secret=s", disk.path(), &image];
    peer(qemu_img, &[&start[..], &options].concat());
    image
}

#[test]
fn an_image_with_the_old_aes_is_read_in_every_way_and_written_in_none() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let key = disk.beside("key");
    std::fs::write(&key, PASSPHRASE).expect("room");
    let image = old_aes(&disk, &qemu_img, &key);
    let secret = format!("secret,id=s,file={key}");
    let driver = format!("driver=qcow2,encrypt.key-secret=s,file.filename={image}");
    // What is written after the snapshot is not in it.
    let snapshot = ["snapshot", "--object", &secret, "--image-opts", "-c", "before", &driver];
    peer(&qemu_img, &snapshot);
    let write = ["--object", &secret, "-c", "write -P 9 64k 1M", "--image-opts", &driver];
    peer(&qemu_io, &write);
    let mut content = disk.content().to_vec();
    content[64 << 10..(64 << 10) + (1 << 20)].fill(9);
    let now = disk.beside("now.raw");
    std::fs::write(&now, &content).expect("room");
    let before = std::fs::read(&image).expect("the image");
    let copy = |name: &str| disk.beside(name);
    let is_now = |copy: &str| assert!(std::fs::read(copy).expect("a copy") == content, "{copy}");

    let served = copy("served");
    let reads = format!("qemu-img convert -f raw -O raw \"$uri\" '{served}'");
    let serve = ["-vv", "serve", "--read-only", "--key-file", &key, "--run", &reads, &image];
    let outcome = nbd_cli(&serve);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    assert!(!format!("{outcome:?}").contains(PASSPHRASE), "{outcome:?}");
    is_now(&served);
    // Past the page cache too, where others bytes of a file are read by a ring.
    let direct = ["serve", "--read-only", "--cache", "none", "--key-file", &key, "--run", &reads];
    std::fs::remove_file(&served).expect("it is there");
    nbd_cli(&[&direct[..], &[&image]].concat()).success();
    is_now(&served);

    let [converted, snapshot, new] = ["converted", "snapshot", "new.qcow2"].map(copy);
    let convert = ["image", "convert", "--key-file", &key];
    nbd_cli(&[&convert[..], &[&image, &converted]].concat()).success();
    is_now(&converted);
    nbd_cli(&[&convert[..], &["--snapshot", "before", &image, &snapshot]].concat()).success();
    disk.assert_equals(&snapshot);
    let encrypted = ["-O", "qcow2", "--encrypt", "--new-key-file", &key, "--iter-time", "10ms"];
    nbd_cli(&[&convert[..], &encrypted, &[&image, &new]].concat()).success();
    nbd_cli(&["image", "compare", "--key-file", &key, &new, &now]).success();

    let by_qemu_nbd = copy("by-qemu-nbd");
    let socket = disk.beside("socket");
    let outcome =
        qemu_nbd(&["--fork", "-r", "-k", &socket, "--object", &secret, "--image-opts", &driver]);
    assert_eq!(outcome.code, Some(0), "{outcome:?}");
    let uri = format!("nbd+unix:///?socket={socket}");
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "raw", &uri, &by_qemu_nbd]);
    is_now(&by_qemu_nbd);

    says(
        nbd_cli(&["serve", "--key-file", &key, "--run", "true", &image]),
        &["old AES", "read-only"],
    );
    says(nbd_cli(&["image", "resize", "--key-file", &key, &image, "+1M"]), &["old AES"]);
    says(nbd_cli(&["image", "map", &image]), &["no passphrase", "--key-file"]);
    assert!(std::fs::read(&image).expect("the image") == before, "it was written");
}

#[test]
fn the_form_of_qemu_nbd_takes_secrets_as_qemu_does() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let secret = format!("secret,id=s,file={key}");
    let qcow2 = disk.beside("disk.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let start = ["convert", "--object", &secret, "-f", "raw", "-O", "qcow2", "-o", options];
    peer(&qemu_img, &[&start[..], &[disk.path(), &qcow2]].concat());
    let luks = format!("driver=luks,key-secret=s,file.filename={image}");
    let qcow2 = format!("driver=qcow2,encrypt.key-secret=s,file.filename={qcow2}");
    let data = format!("secret,id=s,data={PASSPHRASE}");
    // The same in base64.
    let base64 = "secret,id=s,format=base64,data=bmV2ZXItaW4tYW55LWxvZw==".to_owned();
    let cases = [(&secret, &luks), (&data, &luks), (&base64, &qcow2), (&secret, &qcow2)];
    for (round, (secret, driver)) in cases.into_iter().enumerate() {
        let socket = disk.beside(&format!("socket{round}"));
        let arguments = ["--fork", "-k", &socket, "--object", secret, "--image-opts", driver];
        let outcome = qemu_nbd(&arguments);
        assert_eq!(outcome.code, Some(0), "{outcome:?}");
        let uri = format!("nbd+unix:///?socket={socket}");
        let write = ["-f", "raw", "-c", "write -P 7 1000 3000", "-c", "read -P 7 1000 3000", &uri];
        // The server ends with its client.
        peer(&qemu_io, &write);
    }
    // A plain image that is said to be encrypted takes in nothing.
    let plain = disk.beside("plain.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &plain, "1M"]);
    let said =
        format!("driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename={plain}");
    let outcome = qemu_nbd(&["--object", &data, "--image-opts", &said]);
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("No encryption in image header"), "{outcome:?}");
    let wrong = ["--object", &data, "--image-opts", "driver=luks,key-secret=t,file.filename=x"];
    let outcome = qemu_nbd(&wrong);
    assert!(outcome.stderr.contains("No secret with id 't'"), "{outcome:?}");
}

#[test]
fn without_the_right_key_the_option_is_named_and_nothing_happens() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let (image, key) = volume(&disk, &qemu_img);
    let wrong = disk.beside("wrong");
    std::fs::write(&wrong, format!("{PASSPHRASE}\n")).expect("room");
    let new = disk.beside("new");
    says(nbd_cli(&["image", "convert", &image, &new]), &["no passphrase", "--key-file"]);
    let outcome = nbd_cli(&["image", "convert", "--key-file", &wrong, &image, &new]);
    says(
        outcome,
        &["opens none of its key slots", "line break, which is a part of its passphrase"],
    );
    assert!(!Path::new(&new).exists());
    let create = ["image", "create", "-f", "qcow2", "-b", &image, "-F", "luks", &new];
    says(nbd_cli(&create), &["no passphrase was given", "--key-file"]);
    assert!(!Path::new(&new).exists());
    // Both are tried.
    let both = ["--key-file", &wrong, "--key-file", &key];
    nbd_cli(&[&["image", "map"][..], &both, &[&image]].concat()).success();
    let outcome = nbd_cli(&["image", "map", "--key-file", "/nowhere", &image]);
    says(outcome, &["'/nowhere' does not exist; check the path"]);
}
