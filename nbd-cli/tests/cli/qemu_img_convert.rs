//! `qemu-img convert` of several sources, beside QEMU's own.

use crate::support::qemu_img::{compare_all, ours, words};

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
    // The only compressed cluster is at the end of the file.
    let mut bytes = std::fs::read(here.join("b.qcow2")).unwrap();
    let end = bytes.iter().rposition(|byte| *byte != 0).unwrap();
    bytes[end - 40..=end].fill(0xff);
    std::fs::write(here.join("b.qcow2"), bytes).unwrap();
    let outcome = ours(here, &words("convert a.img b.qcow2 new.img"));
    assert_eq!(outcome.code, Some(1), "{outcome:?}");
    assert!(outcome.stderr.contains("b.qcow2"), "{outcome:?}");
    assert!(!here.join("new.img").exists() && !here.join("new.img.partial").exists());
}
