//! Bitmaps and encryption in `image info` and `measure`, beside qemu-img.

use std::path::Path;

use serde_json::Value;

use crate::support::image::{info, json, ours};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

#[test]
fn dirty_bitmaps_are_listed_and_measured_as_qemu_img_does() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1G"]);
    let bitmaps = |path: &str| info(&qemu_img, path)["format-specific"]["data"]["bitmaps"].clone();
    let look = || ours(&["info", "--json", &image])["format-specific"]["data"]["bitmaps"].clone();
    // Without any there is no such key.
    assert_eq!((look(), bitmaps(&image)), (Value::Null, Value::Null));
    let measure = |tool: Option<&Path>, more: &[&str]| -> Value {
        match tool {
            Some(tool) => {
                let all = [&["measure", "--output=json", "-O", "qcow2"], more, &[&image]].concat();
                json(tool, &all)
            }
            None => ours(&[&["measure", "--json", "-O", "qcow2"], more, &[&image]].concat()),
        }
    };
    assert_eq!(measure(None, &[])["bitmaps"], measure(Some(&qemu_img), &[])["bitmaps"]);
    for (name, more) in [
        ("virtnbdbackup.0", &[][..]),
        ("fine", &["-g", "512"]),
        ("asleep", &["--disable", "-g", "1M"]),
    ] {
        peer(&qemu_img, &[&["bitmap", "--add"], more, &[&image, name]].concat());
    }
    assert_eq!(look(), bitmaps(&image));
    assert_eq!(measure(None, &[])["bitmaps"], measure(Some(&qemu_img), &[])["bitmaps"]);
    let small = measure(None, &["--cluster-size", "4K"]);
    let expected = measure(Some(&qemu_img), &["-o", "cluster_size=4k"]);
    assert_eq!(small["bitmaps"], expected["bitmaps"]);
    // Neither a raw image nor one of version 2 has any.
    assert_eq!(measure(None, &["--compat", "0.10"])["bitmaps"], Value::Null);
    let raw = ours(&["measure", "--json", "-O", "raw", &image]);
    assert_eq!(raw["bitmaps"], Value::Null);
    let text = nbd_cli(&["image", "info", &image]).success();
    for part in ["virtnbdbackup.0, granularity 64K (auto)", "asleep, granularity 1M\n"] {
        assert!(text.contains(part), "{text}");
    }
    let text = nbd_cli(&["image", "measure", "-O", "qcow2", &image]).success();
    assert!(text.contains("bitmaps: "), "{text}");
}

#[test]
fn a_bitmap_whose_bits_a_checkpoint_has_moved_is_not_listed_as_complete() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "1G"]);
    peer(&qemu_img, &["bitmap", "--add", &image, "daily"]);
    peer(&qemu_img, &["bitmap", "--add", "--disable", &image, "daily.checkpoint"]);
    let report = ours(&["info", "--json", &image]);
    let bitmaps = &report["format-specific"]["data"]["bitmaps"];
    assert_eq!(bitmaps[0]["frozen"], "daily.checkpoint", "{bitmaps}");
    assert_eq!(bitmaps[1].get("frozen"), None, "{bitmaps}");
    let text = nbd_cli(&["image", "info", &image]).success();
    assert!(
        text.contains("(auto), incomplete: 'daily.checkpoint' contains its frozen bits\n"),
        "{text}"
    );
}

#[test]
fn an_encrypted_image_is_described_as_qemu_img_describes_it_and_nothing_else() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    for (name, format, options) in [
        ("a.qcow2", "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        ("b.qcow2", "qcow2", "encrypt.format=aes,encrypt.key-secret=s"),
        ("c.luks", "luks", "key-secret=s,iter-time=10"),
        (
            "d.luks",
            "luks",
            "key-secret=s,iter-time=10,cipher-mode=cbc,ivgen-alg=essiv,ivgen-hash-alg=sha256",
        ),
    ] {
        let image = disk.beside(name);
        let secret = ["create", "-q", "--object", "secret,id=s,data=abc"];
        let made = ["-f", format, "-o", options, &image, "4M"];
        peer(&qemu_img, &[&secret[..], &made].concat());
        let mut said = ours(&["info", "--json", &image]);
        let expected = info(&qemu_img, &image);
        let data = said["format-specific"]["data"].as_object_mut().expect("an object");
        // Ours alone: qemu-img knows the first version only.
        data.remove("version");
        if let Some(Value::Object(encrypt)) = data.get_mut("encrypt") {
            encrypt.remove("version");
        }
        for key in ["format", "virtual-size", "encrypted", "cluster-size", "format-specific"] {
            assert_eq!(said[key], expected[key], "{name}: {key}");
        }
        let text = nbd_cli(&["image", "info", &image]).success();
        let method = if name == "b.qcow2" { "aes" } else { "luks version 1" };
        assert!(text.contains("encryption:") && text.contains(method), "{text}");
        for command in [&["map", &image][..], &["convert", &image, &disk.beside("new")]] {
            let outcome = nbd_cli(&[&["image"], command].concat());
            says(outcome, &["ncrypted", "--key-file"]);
        }
        // The name of a backing file is not encrypted.
        let outcome = nbd_cli(&["image", "rebase", "--unsafe", "--no-backing", &image]);
        assert_eq!(outcome.stderr.contains("ncrypted"), format == "luks", "{outcome:?}");
        let serve = nbd_cli(&["serve", "--read-only", "--run", "true", &image]);
        assert!(serve.stderr.contains("ncrypted"), "{serve:?}");
    }
}

#[test]
fn a_luks_container_of_version_2_is_described() {
    let disk = Disk::sparse();
    let mut bytes = vec![0; 1 << 20];
    bytes[..16].copy_from_slice(b"LUKS\xba\xbe\0\x02\0\0\0\0\0\0\x40\0");
    bytes[168..172].copy_from_slice(b"7f3a");
    let text = br#"{"segments":{"0":{"type":"crypt","offset":"65536","size":"dynamic"}}}"#;
    bytes[4096..4096 + text.len()].copy_from_slice(text);
    let image = disk.beside("image.luks");
    std::fs::write(&image, bytes).expect("room");
    let said = ours(&["info", "--json", &image]);
    assert_eq!((&said["format"], &said["encrypted"]), (&"luks".into(), &true.into()));
    assert_eq!(said["virtual-size"], (1 << 20) - 65536);
    assert_eq!(said["format-specific"]["data"]["uuid"], "7f3a");
}

#[test]
fn an_encryption_header_that_leads_nowhere_does_not_keep_an_image_from_being_described() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    let options = "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10";
    let secret = ["create", "-q", "--object", "secret,id=s,data=abc", "-f", "qcow2"];
    peer(&qemu_img, &[&secret[..], &["-o", options, &image, "4M"]].concat());
    let mut bytes = std::fs::read(&image).expect("the image");
    let magic = bytes.windows(4).position(|word| word == [0x05, 0x37, 0xbe, 0x77]);
    let place = magic.expect("the extension") + 8;
    for offset in [u64::MAX, 1 << 40, 64] {
        bytes[place..place + 8].copy_from_slice(&offset.to_be_bytes());
        std::fs::write(&image, &bytes).expect("room");
        let said = ours(&["info", "--json", &image]);
        assert_eq!(said["encrypted"], true);
        assert_eq!(said["format-specific"]["data"]["encrypt"]["format"], "luks");
    }
}

#[test]
fn a_chain_with_encrypted_layers_is_described_as_qemu_img_describes_it() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let create = ["create", "-q", "--object", "secret,id=s,data=abc"];
    for (base, format, options) in [
        ("a.qcow2", "qcow2", "encrypt.format=luks,encrypt.key-secret=s,encrypt.iter-time=10"),
        ("b.qcow2", "qcow2", "encrypt.format=aes,encrypt.key-secret=s"),
        ("c.luks", "luks", "key-secret=s,iter-time=10"),
    ] {
        let below = disk.beside(base);
        let made = ["-f", format, "-o", options, &below, "4M"];
        peer(&qemu_img, &[&create[..], &made].concat());
        let [middle, top] = ["middle", "top"].map(|name| disk.beside(&format!("{base}.{name}")));
        let overlay = ["create", "-q", "-u", "-f", "qcow2", "-F"];
        peer(&qemu_img, &[&overlay[..], &[format, "-b", base, &middle, "4M"]].concat());
        peer(&qemu_img, &[&overlay[..], &["qcow2", "-b", &middle, &top, "4M"]].concat());
        let said = ours(&["info", "--json", "--backing-chain", &top]);
        let expected = json(&qemu_img, &["info", "--output=json", "--backing-chain", &top]);
        let (said, expected) = (said.as_array().expect("layers"), expected.as_array());
        assert_eq!(said.len(), 3, "{said:?}");
        for (said, expected) in said.iter().zip(expected.expect("layers")) {
            for key in ["filename", "format", "virtual-size", "encrypted", "backing-filename"] {
                assert_eq!(said[key], expected[key], "{base}: {key}");
            }
        }
        let text = nbd_cli(&["image", "info", "--backing-chain", &top]).success();
        let last = text.split("\n\n").last().expect("a layer");
        assert!(last.contains(&below) && last.contains("\nencryption: "), "{text}");
        let drawn = nbd_cli(&["image", "info", "--graph", &top]).success();
        assert!(drawn.contains("encrypted"), "{drawn}");
        // What needs the disk says which layer is in the way.
        let new = disk.beside("new");
        for command in [
            &["map", &top][..],
            &["measure", "-O", "qcow2", &top],
            &["convert", &top, &new],
            &["commit", &middle],
        ] {
            says(nbd_cli(&[&["image"], command].concat()), &[base, "ncrypted"]);
        }
        let compared = nbd_cli(&["image", "compare", &top, &top]);
        assert!(compared.code == Some(2) && compared.stderr.contains(base), "{compared:?}");
        nbd_cli(&["image", "check", &top]).success();
        // The bitmaps of a layer are its own.
        nbd_cli(&["bitmap", "list", &top]).success();
    }
}

#[test]
fn a_chain_whose_last_layer_is_not_the_luks_container_it_is_said_to_be_is_refused() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    let [base, top] = ["base.qcow2", "top.qcow2"].map(|name| disk.beside(name));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, "4M"]);
    let overlay = ["create", "-q", "-u", "-f", "qcow2", "-F", "luks", "-b", &base, &top, "4M"];
    peer(&qemu_img, &overlay);
    let outcome = nbd_cli(&["image", "info", "--backing-chain", &top]);
    says(outcome, &[&base, "no LUKS header"]);
}

#[test]
fn the_facts_of_other_formats_are_those_of_qemu_img_and_more() {
    tools!(qemu_img = "qemu-img");
    let disk = Disk::sparse();
    for (format, options, facts) in [
        ("vdi", "static=off", &["block size:        1M", "subformat:         dynamic"][..]),
        ("vdi", "static=on", &["subformat:         fixed", "blocks in file:    8"]),
        ("vpc", "force_size=on", &["block size:        2M", "subformat:         dynamic", "qem2"]),
        ("vpc", "subformat=fixed", &["subformat:         fixed", "241 cylinders, 4 heads", "qemu"]),
        ("vhdx", "block_size=1M", &["block size:        1M", "sector size:       512"]),
        ("vhdx", "subformat=fixed", &["subformat:         fixed", "empty (1M)"]),
        ("vmdk", "", &["monolithicSparse", "SPARSE, 8.0 MiB, grains of 64K, "]),
        ("vmdk", "subformat=monolithicFlat", &["monolithicFlat", "FLAT, 8.0 MiB, ", "-flat.vmdk"]),
        ("vmdk", "subformat=streamOptimized", &["grains of 64K, compressed, "]),
        ("vmdk", "subformat=twoGbMaxExtentSparse", &["SPARSE, 8.0 MiB, ", "-s001.vmdk"]),
        ("qed", "", &["block size:        64K"]),
        ("qcow", "", &["block size:        4K"]),
        ("parallels", "", &["block size:        1M"]),
    ] {
        let name = format!("{format}-{}.{format}", options.replace([',', '='], "-"));
        let path = disk.beside(&name);
        let given = if options.is_empty() { vec![] } else { vec!["-o", options] };
        let create = [&["create", "-q", "-f", format][..], &given, &[&path, "8M"]].concat();
        peer(&qemu_img, &create);
        let text = nbd_cli(&["image", "info", &path]).success();
        for fact in facts {
            assert!(text.contains(fact), "{format} {options}: {fact}: {text}");
        }
        let theirs = json(&qemu_img, &["info", "--output=json", "-f", format, &path]);
        let as_qemu = ["qemu-img", "info", "--output=json", "-f", format, &path];
        let as_qemu = nbd_cli(&as_qemu).json();
        for key in ["format", "virtual-size", "cluster-size", "dirty-flag"] {
            assert_eq!(as_qemu[key], theirs[key], "{format} {options}: {key}");
        }
        assert_eq!(as_qemu["format-specific"], theirs["format-specific"], "{format} {options}");
        if format == "vmdk" {
            // QEMU does not say the type of an extent in the image's own file.
            let mut mine = ours(&["info", "--json", &path]);
            let mut expected = theirs["format-specific"].clone();
            // The files of extents are opened in the form of qemu-img only.
            if options.ends_with("ExtentSparse") {
                let extent = expected.pointer_mut("/data/extents/0").and_then(Value::as_object_mut);
                extent.expect("an extent").remove("cluster-size");
            }
            let kinds = [&mut mine["format-specific"], &mut expected]
                .map(|specific| specific.pointer_mut("/data/extents/0/format").map(Value::take));
            assert!(matches!(kinds[0].as_ref().and_then(Value::as_str), Some("FLAT" | "SPARSE")));
            assert_eq!(mine["format-specific"], expected, "{options}");
        }
    }
}
