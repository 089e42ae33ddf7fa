//! Chains of hundreds of layers.

use crate::support::image::{are_equal, write};
use crate::support::{Disk, PROGRAM, nbd_cli, peer, says, tool};
use crate::tools;

/// Makes layers one above the other; returns the uppermost.
fn layers(disk: &Disk, count: usize) -> String {
    let layer = |number| disk.beside(&format!("{number}.qcow2"));
    let base = ["-b", disk.path(), "-F", "raw", &layer(1)];
    nbd_cli(&[&["image", "create", "-f", "qcow2"][..], &base].concat()).success();
    for number in 2..=count {
        let below = format!("{}.qcow2", number - 1);
        let new = ["-b", &below, "-F", "qcow2", &layer(number)];
        nbd_cli(&[&["image", "create", "-f", "qcow2"][..], &new].concat()).success();
    }
    layer(count)
}

#[test]
fn a_chain_of_200_layers_is_made_mapped_converted_and_served() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let disk = Disk::sparse();
    let top = layers(&disk, 200);
    write(&qemu_io, &disk.beside("77.qcow2"), "write -P 7 100k 10k");
    let map = nbd_cli(&["image", "map", "--json", &top]).success();
    let map: serde_json::Value = serde_json::from_str(&map).expect("JSON");
    let depths: Vec<_> = map.as_array().expect("parts").iter().map(|part| &part["depth"]).collect();
    assert!(depths.contains(&&123.into()) && depths.contains(&&200.into()), "{depths:?}");
    let copy = disk.beside("copy.img");
    nbd_cli(&["image", "convert", &top, &copy]).success();
    are_equal(&qemu_img, &copy, &top);
    let compare = format!("{} compare -f raw -F raw \"$uri\" {copy}", qemu_img.display());
    nbd_cli(&["serve", "--read-only", "--run", &compare, &top]).success();
    let info = nbd_cli(&["image", "info", "--backing-chain", "--json", &top]).success();
    assert_eq!(info.matches("\"virtual-size\"").count(), 201);
}

#[test]
fn a_layer_that_could_not_be_read_is_not_made() {
    let Some(qemu_img) = tool("qemu-img") else { return };
    let disk = Disk::sparse();
    let layer = |number| disk.beside(&format!("{number:04}"));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &layer(1), "8M"]);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", "0001", "-F", "qcow2", &layer(2)]);
    let template = std::fs::read(layer(2)).expect("the overlay");
    let place = template.windows(4).position(|part| part == b"0001").expect("the name");
    for number in 3..=500 {
        let mut bytes = template.clone();
        bytes[place..place + 4].copy_from_slice(format!("{:04}", number - 1).as_bytes());
        std::fs::write(layer(number), bytes).expect("room");
    }
    let new = disk.beside("new.qcow2");
    let create =
        |backing| nbd_cli(&["image", "create", "-f", "qcow2", "-b", backing, "-F", "qcow2", &new]);
    says(create("0500"), &["0500", "more than 500 layers"]);
    assert!(!std::path::Path::new(&new).exists());
    let unsafely =
        ["qemu-img", "create", "-q", "-u", "-f", "qcow2", "-b", "0500", "-F", "qcow2", &new, "8M"];
    assert!(nbd_cli(&unsafely).stderr.contains("more than 500 layers"));
    assert!(!std::path::Path::new(&new).exists());
    create("0499").success();
    nbd_cli(&["image", "map", &new]).success();
    for rebase in [&["rebase", "-u"][..], &["rebase"]] {
        let all = [&["image"], rebase, &["-b", "0500", "-F", "qcow2", &new]].concat();
        says(nbd_cli(&all), &["more than 500 layers"]);
    }
    nbd_cli(&["image", "map", &new]).success();
    let (source, target) = (disk.beside("source.qcow2"), disk.beside("backup.qcow2"));
    nbd_cli(&["image", "create", "-f", "qcow2", &source, "8M"]).success();
    nbd_cli(&["bitmap", "add", &source, "b"]).success();
    let backup =
        format!("{PROGRAM} backup --trust-base -B b --base {} \"$uri\" {target}", layer(500));
    let outcome = nbd_cli(&["serve", "--read-only", "--bitmap", "b", "--run", &backup, &source]);
    says(outcome, &["more than 500 layers"]);
    assert!(!std::path::Path::new(&target).exists());
}
