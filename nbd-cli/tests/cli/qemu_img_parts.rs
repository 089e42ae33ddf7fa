//! Images in parts of files in the qemu-img form: the options `offset` and `size` of QEMU's driver
//! `raw`. In `parts.img`, a qcow2 image is at 1.5 MiB, in 1 MiB; what is around it must never
//! change.

use std::os::unix::fs::FileExt as _;

use crate::support::qemu_img::{compare_all, ours, words};

/// A part that is a qcow2 image, as options and as a name.
const QCOW2: &str =
    "driver=qcow2,file.driver=raw,file.offset=1536k,file.size=1M,file.file.filename=parts.img";
const QCOW2_NAME: &str = "json:{'driver':'qcow2','file':{'driver':'raw','offset':1572864,\
                          'size':1048576,'file':{'driver':'file','filename':'parts.img'}}}";

fn compare(cases: &str) {
    compare_all(&cases.replace("QCOW2NAME", QCOW2_NAME).replace("QCOW2", QCOW2));
}

#[test]
fn parts_of_files_are_read_as_by_qemu() {
    compare(
        r"
        check --image-opts QCOW2
        check --output=json QCOW2NAME
        map --output=json --image-opts QCOW2
        map --output=json QCOW2NAME
        map --output=json --image-opts driver=raw,offset=128k,size=512k,file.filename=raw.img
        map --output=json json:{'driver':'raw','offset':131072,'file':{'driver':'file','filename':'raw.img'}}
        map --output=json --image-opts driver=raw,offset=1M,file.driver=raw,file.offset=512k,file.size=2M,file.file.filename=parts.img
        compare --image-opts QCOW2 driver=qcow2,file.filename=disk.qcow2
        compare QCOW2NAME disk.qcow2
        compare --image-opts driver=raw,offset=1M,file.filename=parts.img driver=raw,offset=512,file.filename=parts.img
        measure --output=json -O qcow2 --image-opts QCOW2
        measure --output=json -O raw --image-opts driver=raw,offset=1024,file.filename=odd.img
        convert -O raw --image-opts QCOW2 new.img => new.img
        convert -O qcow2 QCOW2NAME new.qcow2 => new.qcow2
        map --output=json --image-opts driver=raw,offset=512,file.filename=odd.img
        measure --output=json -O qcow2 --image-opts driver=raw,offset=512,file.filename=odd.img
        convert -O raw --image-opts driver=raw,offset=130k,size=100k,file.filename=raw.img new.img => new.img
        convert -O raw -T none --image-opts driver=raw,offset=130k,size=100k,file.filename=raw.img new.img => new.img
        dd -O raw bs=64k skip=1 count=4 if=QCOW2NAME of=new.img => new.img
        snapshot -l --image-opts QCOW2
        ",
    );
}

/// Where the offset is not a multiple of 512, QEMU 10.0 shows holes that are not there, or does not
/// end.
#[test]
fn a_part_can_begin_anywhere() {
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let mut bytes = vec![0; 300_000];
    bytes[131_072..200_100].fill(7);
    bytes[299_999] = 9;
    let file = std::fs::File::create(here.join("disk.img")).expect("room");
    file.write_all_at(&bytes[131_072..200_100], 131_072).expect("room");
    file.write_all_at(&[9], 299_999).expect("room");
    for (offset, more) in [(1, ""), (100, "-T none"), (131_071, ""), (299_999, "")] {
        let options = format!("driver=raw,offset={offset},file.filename=disk.img");
        let line = format!("convert -O raw {more} --image-opts {options} new.img");
        ours(here, &words(&line)).success();
        let mut expected = bytes[offset..].to_vec();
        // The file has whole sectors, and so has the part.
        let whole = (bytes.len().next_multiple_of(512) - offset).next_multiple_of(512);
        expected.resize(whole, 0);
        assert!(std::fs::read(here.join("new.img")).expect("the disk") == expected, "{line}");
    }
}

#[test]
fn a_part_of_a_file_can_be_a_backing_file() {
    compare(
        r"
        create -q -f qcow2 -b QCOW2NAME -F qcow2 new.qcow2; map --output=json new.qcow2; convert -O raw new.qcow2 new.img => new.img
        create -q -f qcow2 -u -b json:{'driver':'raw','offset':512,'size':512,'file':{'driver':'file','filename':'raw.img'}} -F raw new.qcow2 1M; convert -O raw new.qcow2 new.img => new.img
        convert -O raw --image-opts driver=qcow2,file.filename=orphan.qcow2,backing.driver=raw,backing.offset=130k,backing.file.filename=raw.img new.img => new.img
        convert -O raw --image-opts driver=qcow2,file.filename=orphan.qcow2,backing.driver=raw,backing.offset=9M,backing.file.filename=raw.img new.img
        ",
    );
}

#[test]
fn parts_of_files_are_written_and_nothing_around_them() {
    compare(
        r"
        convert -n --target-image-opts raw.img driver=raw,offset=64k,size=1M,file.filename=parts.img => parts.img
        convert -n --target-image-opts raw.img driver=raw,offset=1000,file.filename=parts.img => parts.img
        convert -n --target-image-opts raw.img driver=raw,offset=2560k,file.driver=raw,file.offset=512k,file.file.filename=parts.img => parts.img
        convert -n --target-image-opts -f raw raw.img QCOW2; check -q --image-opts QCOW2; compare --image-opts driver=raw,file.filename=raw.img QCOW2; compare --image-opts driver=raw,size=1536k,file.filename=parts.img driver=raw,offset=2560k,file.filename=parts.img
        resize --image-opts driver=raw,offset=1M,file.filename=parts.img 5M => parts.img
        snapshot -c one --image-opts QCOW2; check -q --image-opts QCOW2; compare --image-opts driver=raw,size=1536k,file.filename=parts.img driver=raw,offset=2560k,file.filename=parts.img
        bitmap --add --image-opts QCOW2 b; check -q --image-opts QCOW2
        ",
    );
}

#[test]
fn parts_that_are_not_in_their_file_are_refused() {
    compare(
        r"
        map --image-opts driver=raw,offset=2M,file.filename=raw.img
        map --image-opts driver=raw,size=2M,file.filename=raw.img
        map --image-opts driver=raw,offset=512,size=1M,file.filename=raw.img
        map --image-opts driver=raw,size=1000,file.filename=raw.img
        map --image-opts driver=raw,offset=-1,file.filename=raw.img
        map --image-opts driver=raw,offset=9223372036854775808,size=9223372036854775808,file.filename=raw.img
        map --image-opts driver=raw,offset=18446744073709551615,file.filename=raw.img
        map --image-opts driver=raw,size=1M,file.driver=raw,file.size=512k,file.file.filename=raw.img
        check --image-opts driver=qcow2,file.driver=raw,file.offset=9M,file.file.filename=parts.img
        check --image-opts driver=qcow2,file.driver=raw,file.offset=1M,file.file.filename=parts.img
        convert -n --target-image-opts raw.img driver=raw,offset=3584k,file.filename=parts.img => parts.img
        convert -n --target-image-opts raw.img driver=raw,offset=1M,size=512k,file.filename=parts.img => parts.img
        convert -n --target-image-opts raw.img driver=raw,offset=9M,file.filename=parts.img => parts.img
        convert -n --target-image-opts -f raw big.img QCOW2; compare --image-opts driver=raw,size=1536k,file.filename=parts.img driver=raw,offset=2560k,file.filename=parts.img
        resize --image-opts driver=raw,offset=1M,size=1M,file.filename=parts.img 2M => parts.img
        ",
    );
}
