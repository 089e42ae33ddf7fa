//! An image is not put below itself, and an image of such a chain is repaired.

use std::path::Path;

use crate::support::{Disk, nbd_cli, says};

#[test]
fn a_backing_file_that_leads_back_to_the_image_is_refused_by_every_command() {
    let disk = Disk::sparse();
    let [a, b, new] = ["a.qcow2", "b.qcow2", "new.qcow2"].map(|name| disk.beside(name));
    nbd_cli(&["image", "create", "-f", "qcow2", &a, "8M"]).success();
    nbd_cli(&["image", "create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", &b]).success();
    let json = |file: &str| format!("json:{{\"driver\":\"file\",\"filename\":\"{file}\"}}");
    let before = std::fs::read(&a).expect("the image");
    for below in ["a.qcow2", "b.qcow2", &a, &b, &format!("file:{a}"), &json(&a), &json(&b)] {
        let backing = ["-b", below, "-F", "qcow2", &a];
        for unsafely in [&["-u"][..], &[]] {
            let ours = [&["image", "rebase"], unsafely, &backing].concat();
            says(nbd_cli(&ours), &[&a, "would lead back to itself"]);
            let others = nbd_cli(&[&["qemu-img", "rebase"], unsafely, &backing].concat());
            assert_eq!(others.code, Some(1));
            assert!(others.stderr.contains("would lead back to itself"), "{others:?}");
        }
    }
    let create = ["qemu-img", "create", "-q", "-f", "qcow2", "-F", "qcow2"];
    let refused = |arguments: &[&str]| {
        let outcome = nbd_cli(&[&create[..], arguments].concat());
        assert!(outcome.stderr.contains("would lead back to itself"), "{outcome:?}");
    };
    refused(&["-b", "b.qcow2", &a, "8M"]);
    refused(&["-u", "-b", "b.qcow2", &a, "8M"]);
    refused(&["-u", "-b", "new.qcow2", &new, "8M"]);
    let convert = ["qemu-img", "convert", "-O", "qcow2", "-F", "qcow2", "-B", "b.qcow2"];
    let outcome = nbd_cli(&[&convert[..], &[&disk.beside("b.qcow2"), &a]].concat());
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(!Path::new(&new).exists());
    assert!(std::fs::read(&a).expect("the image") == before);
}

#[test]
fn an_image_of_a_circular_chain_gets_another_backing_file() {
    let disk = Disk::sparse();
    let [a, b, c] = ["a.qcow2", "b.qcow2", "c.qcow2"].map(|name| disk.beside(name));
    for program in [&["image", "rebase"], &["qemu-img", "rebase"]] {
        for path in [&a, &c] {
            let _ = std::fs::remove_file(path);
            nbd_cli(&["image", "create", "-f", "qcow2", path, "8M"]).success();
        }
        let _ = std::fs::remove_file(&b);
        nbd_cli(&["image", "create", "-f", "qcow2", "-b", "a.qcow2", "-F", "qcow2", &b]).success();
        // The name that closes the chain is taken afterwards.
        let set = |path: &str, below: &str| {
            nbd_cli(&[&program[..], &["-u", "-b", below, "-F", "qcow2", path]].concat())
        };
        set(&a, "link.qcow2").success();
        let link = disk.beside("link.qcow2");
        std::os::unix::fs::symlink("b.qcow2", &link).expect("a link");
        says(nbd_cli(&["image", "map", &a]), &["leads back to itself"]);
        set(&a, "c.qcow2").success();
        nbd_cli(&["image", "map", &b]).success();
        std::fs::remove_file(link).expect("a link");
    }
}
