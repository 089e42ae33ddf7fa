//! `image amend` beside `qemu-img amend`.

use crate::support::image::{info, is_clean, write};
use crate::support::{Disk, nbd_cli, peer, says};
use crate::tools;

#[test]
fn options_are_taken_as_qemu_img_writes_them() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = Disk::sparse();
    let (ours, theirs) = (directory.beside("ours.qcow2"), directory.beside("theirs.qcow2"));
    for image in [&ours, &theirs] {
        peer(&qemu_img, &["create", "-q", "-f", "qcow2", image, "8M"]);
        write(&qemu_io, image, "write -P 7 1M 1M");
        write(&qemu_io, image, "write -z 4M 1M");
    }
    let steps = [
        "compat=v2",
        "size=9M",
        "compat=1.1",
        "lazy_refcounts=on",
        "lazy_refcounts=off,size=9437184",
        "refcount_bits=16,compat=0.10",
        "compat=v3",
    ];
    for options in steps {
        nbd_cli(&["image", "amend", "-o", options, &ours]).success();
        peer(&qemu_img, &["amend", "-q", "-f", "qcow2", "-o", options, &theirs]);
        is_clean(&qemu_img, &ours);
        peer(&qemu_img, &["compare", &ours, &theirs]);
        let about = |image: &str| {
            let all = info(&qemu_img, image);
            let mut data = all["format-specific"]["data"].clone();
            if let Some(data) = data.as_object_mut() {
                data.remove("corrupt");
            }
            (data, all["virtual-size"].clone())
        };
        assert_eq!(about(&ours), about(&theirs), "{options}");
    }
    // QEMU takes many seconds for other widths.
    nbd_cli(&["image", "amend", "-o", "refcount_bits=1", &ours]).success();
    nbd_cli(&["image", "amend", "-o", "compat=0.10,refcount_bits=16", &ours]).success();
    is_clean(&qemu_img, &ours);
    peer(&qemu_img, &["compare", &ours, &theirs]);
    nbd_cli(&["image", "amend", "-o", "compat=1.1", &ours]).success();
    let long = ["image", "amend", "--refcount-bits", "32", "--size", "10M", "--json", &ours];
    let said = nbd_cli(&long).success();
    assert!(said.contains("10485760"), "{said}");
    is_clean(&qemu_img, &ours);
}

#[test]
fn what_cannot_be_amended_is_refused_by_name_with_advice() {
    tools!(qemu_img = "qemu-img");
    let directory = Disk::sparse();
    let image = directory.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    let before = std::fs::read(&image).expect("the image");
    let refused: [(&[&str], &[&str]); 9] = [
        (&["-o", "backing_file=x.qcow2"], &["backing_file", "image rebase"]),
        (&["-o", "backing_fmt=raw,compat=v2"], &["backing_fmt", "image rebase"]),
        (&["-o", "data_file=x"], &["data_file"]),
        (&["-o", "data_file_raw=on"], &["data_file_raw", "--data-file-raw"]),
        (&["-o", "preallocation=full"], &["preallocation", "image convert"]),
        (&["-o", "encrypt.state=active"], &["encrypt.state", "encrypted"]),
        (&["-o", "refcount_bits=many"], &["many", "refcount_bits"]),
        (&["-o", "nonsense=1"], &["nonsense", "no such option"]),
        (&["--size", "4M"], &["image resize --shrink"]),
    ];
    for (options, words) in refused {
        says(nbd_cli(&[&["image", "amend"], options, &[&image]].concat()), words);
        assert!(std::fs::read(&image).expect("the image") == before, "{options:?}");
    }
}
