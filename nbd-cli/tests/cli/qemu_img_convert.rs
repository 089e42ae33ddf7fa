//! `qemu-img convert` beside QEMU's own: several sources, overlays, unreadable parts.

use std::os::unix::fs::MetadataExt as _;
use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, words};
use crate::support::{Server, run};
use crate::tools;

#[test]
fn several_sources_are_joined_alike() {
    compare_all(
        "
        convert raw.img disk.qcow2 new.img => new.img
        convert -p -O qcow2 raw.img top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 odd.img raw.img odd.img longer.qcow2 new.qcow2 => new.qcow2
        convert odd.img odd.img new.img => new.img
        convert -c -O qcow2 disk.qcow2 packed.qcow2 new.qcow2 => new.qcow2
        convert -O vpc empty.img disk.qcow2 new.vhd ; convert -O raw new.vhd new.img => new.img
        convert -f qcow2 disk.qcow2 disk.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 raw.img big.img => big.img
        convert -O raw raw.img disk.qcow2 raw.img => raw.img
        convert --image-opts driver=raw,file.filename=raw.img driver=qcow2,file.filename=disk.qcow2 new.img => new.img
        convert -n -O raw disk.qcow2 disk.qcow2 raw.img
        convert -n -O qcow2 -o cluster_size=64k raw.img disk.qcow2 => disk.qcow2
        convert -f qcow2 disk.qcow2 raw.img new.img
        convert raw.img nosuch.img new.img
        convert -l first snap.qcow2 snap.qcow2 new.img
        convert --bitmaps -O qcow2 bitmaps.qcow2 bitmaps.qcow2 new.qcow2
        ",
    );
}

#[test]
fn an_unreadable_one_of_several_sources_is_named_and_leaves_no_target() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::write(here.join("a.img"), vec![7; 65536]).unwrap();
    for line in ["convert -c -O qcow2 a.img b.qcow2", "convert a.img b.qcow2 whole.img"] {
        ours(here, &words(line)).success();
    }
    assert_eq!(std::fs::read(here.join("whole.img")).unwrap(), vec![7; 2 * 65536]);
    damage_last(&here.join("b.qcow2"));
    let outcome = ours(here, &words("convert a.img b.qcow2 new.img"));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("b.qcow2"), "{outcome:?}");
    assert!(!here.join("new.img").exists() && !here.join("new.img.partial").exists());
}

/// Damages the compressed cluster at the end of an image.
fn damage_last(image: &Path) {
    let mut bytes = std::fs::read(image).expect("the image");
    let end = bytes.iter().rposition(|byte| *byte != 0).expect("its last byte");
    bytes[end - 40..=end].fill(0xff);
    std::fs::write(image, bytes).expect("the image");
}

#[test]
fn overlays_are_made_alike() {
    compare_all(
        "
        convert -O qcow2 -B disk.qcow2 -F qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -p -O qcow2 -B raw.img -F raw longer.qcow2 new.qcow2 => new.qcow2
        convert -c -O qcow2 -B raw.img -F raw longer.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o cluster_size=4k -B disk.qcow2 -F qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o compat=0.10 -B disk.qcow2 -F qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o extended_l2=on -B disk.qcow2 -F qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o backing_file=disk.qcow2,backing_fmt=qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -o backing_fmt=qcow2 -B disk.qcow2 top.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -B disk.qcow2 -F qcow2 old.qcow2 new.qcow2 => new.qcow2
        convert -O qcow2 -B odd.img -F raw raw.img new.qcow2 => new.qcow2
        convert -O qcow2 -B ../raw.img -F raw sub/up.qcow2 sub/new.qcow2 => sub/new.qcow2
        convert -O qcow2 -B disk.qcow2 -F qcow2 top.qcow2 top.qcow2 => top.qcow2
        convert -n -O qcow2 -B disk.qcow2 -F qcow2 disk.qcow2 top.qcow2
        convert -n -O raw -B disk.qcow2 -F qcow2 disk.qcow2 big.img
        convert -n -S 0 -O raw disk.qcow2 raw.img => raw.img
        convert -n -S 0 -O qcow2 raw.img disk.qcow2 => disk.qcow2
        convert -O qcow2 -B disk.qcow2 top.qcow2 new.qcow2
        convert -O qcow2 -F qcow2 top.qcow2 new.qcow2
        convert -n -O qcow2 -B disk.qcow2 raw.img top.qcow2
        convert -O raw -B disk.qcow2 -F qcow2 top.qcow2 new.img
        convert -O vmdk -B disk.qcow2 -F qcow2 top.qcow2 new.vmdk
        convert -O qcow2 -B nosuch.img -F raw top.qcow2 new.qcow2
        convert -O qcow2 -B disk.qcow2 -F nosuch top.qcow2 new.qcow2
        convert -O qcow2 -B disk.qcow2 -F qcow2 top.qcow2 top.qcow2 new.qcow2
        convert -O qcow2 -o data_file=x,data_file_raw=on -B disk.qcow2 -F qcow2 top.qcow2 new.qcow2
        convert --salvage -C disk.qcow2 new.img
        convert --salvage disk.qcow2 new.img => new.img
        ",
    );
}

#[test]
fn an_overlay_has_only_what_differs_from_any_base() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let (mut base, mut disk) = (vec![1; 8 << 20], vec![1; 8 << 20]);
    // Data over zero, zero over data, and other data; the disk ends after its base.
    base[1 << 20..2 << 20].fill(0);
    disk[1 << 20..2 << 20].fill(0);
    disk[(1 << 20) + 5] = 9;
    disk[3 << 20..(3 << 20) + 65536].fill(0);
    disk[(5 << 20) - 1] = 7;
    base.truncate(7 << 20);
    std::fs::write(here.join("base.img"), base).unwrap();
    std::fs::write(here.join("disk.img"), disk).unwrap();
    for options in ["-m 1", "-m 8 -c", "-o compat=0.10"] {
        let line = format!("convert {options} -O qcow2 -B base.img -F raw disk.img new.qcow2");
        ours(here, &words(&line)).success();
        for program in ["compare -f qcow2 -F raw new.qcow2 disk.img", "check new.qcow2"] {
            run(Command::new("qemu-img").args(words(program)).current_dir(here)).success();
        }
        let map = ours(here, &words("map --output=json new.qcow2")).success();
        let map: serde_json::Value = serde_json::from_str(&map).unwrap();
        let own = map.as_array().unwrap().iter().filter(|part| part["depth"] == 0);
        let own: u64 = own.map(|part| part["length"].as_u64().unwrap()).sum();
        // A cluster each, and what is beyond the base.
        assert_eq!(own, 3 * 65536 + (1 << 20), "{options}: {map}");
    }
}

#[test]
fn a_base_is_not_replaced_by_an_overlay_of_it() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    std::fs::write(here.join("disk.img"), vec![3; 65536]).unwrap();
    for line in [
        "convert -O qcow2 disk.img base.qcow2",
        "create -q -f qcow2 -b base.qcow2 -F qcow2 middle.qcow2",
    ] {
        ours(here, &words(line)).success();
    }
    let before = std::fs::read(here.join("base.qcow2")).unwrap();
    let line = "convert -O qcow2 -B middle.qcow2 -F qcow2 disk.img base.qcow2";
    let outcome = ours(here, &words(line));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert_eq!(std::fs::read(here.join("base.qcow2")).unwrap(), before);
    assert!(!here.join("base.qcow2.partial").exists());
}

#[test]
fn what_cannot_be_read_is_zero_after_a_salvage_and_reported_unless_quiet() {
    tools!(_qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let mut disk = vec![7; 3 * 65536];
    std::fs::write(here.join("disk.img"), &disk).unwrap();
    ours(here, &words("convert -c -m 1 -O qcow2 disk.img bad.qcow2")).success();
    damage_last(&here.join("bad.qcow2"));
    // The last one is damaged.
    disk[2 * 65536..].fill(0);
    for (quiet, warns) in [("", true), ("-q", false)] {
        let line = format!("convert {quiet} --salvage bad.qcow2 new.img");
        let mine = ours(here, &words(&line));
        let saved = std::fs::read(here.join("new.img")).unwrap();
        let theirs = run(Command::new("qemu-img").args(words(&line)).current_dir(here));
        assert_eq!((mine.code, theirs.code), (Some(0), Some(0)), "{mine:?} {theirs:?}");
        assert_eq!((mine.stderr.is_empty(), theirs.stderr.is_empty()), (!warns, !warns));
        assert!(!warns || mine.stderr.contains("error while reading offset 131072"), "{mine:?}");
        assert!(saved == disk && std::fs::read(here.join("new.img")).unwrap() == disk);
    }
    let outcome = ours(here, &words("convert bad.qcow2 other.img"));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(!here.join("other.img").exists());
}

#[test]
fn what_cannot_be_read_of_an_image_on_a_server_is_zero_after_a_salvage() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let mut disk = vec![7; 3 * 65536];
    std::fs::write(here.join("disk.img"), &disk).unwrap();
    ours(here, &words("convert -c -m 1 -O qcow2 disk.img bad.qcow2")).success();
    damage_last(&here.join("bad.qcow2"));
    disk[2 * 65536..].fill(0);
    let image = here.join("bad.qcow2").display().to_string();
    // The image as an export, byte for byte, and its disk as one, of which the server cannot read a
    // part.
    for (format, line) in [("raw", "-f qcow2"), ("qcow2", "-f raw")] {
        let server = Server::ours(&["--read-only", "--format", format, &image]);
        let line = format!("convert {line} --salvage {} new.img", server.uri());
        let outcome = ours(here, &words(&line));
        assert_eq!(outcome.code, Some(0), "{line}: {outcome:?}");
        assert!(outcome.stderr.contains("error while reading offset 131072"), "{outcome:?}");
        assert!(std::fs::read(here.join("new.img")).unwrap() == disk, "{line}");
        let outcome = ours(here, &words(&line.replace("--salvage ", "")));
        assert_eq!(outcome.code, Some(1), "{line}: {outcome:?}");
    }
}

#[test]
fn without_sparseness_zeroes_take_space_in_an_existing_target() {
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    for name in ["disk.img", "target.img"] {
        std::fs::File::create(here.join(name)).unwrap().set_len(1 << 20).unwrap();
    }
    let target = here.join("target.img");
    ours(here, &words("convert -n -S 0 -O raw disk.img target.img")).success();
    assert_eq!(std::fs::read(&target).unwrap(), vec![0; 1 << 20]);
    assert!(std::fs::metadata(&target).unwrap().blocks() >= 2048);
}
