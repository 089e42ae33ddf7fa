//! `-o` of raw and qcow2 images that the image commands make.

use std::os::unix::fs::MetadataExt as _;

use serde_json::Value;

use crate::support::nbd_cli;

#[test]
fn options_of_raw_and_qcow2_images_are_given_in_lists() {
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name).display().to_string();
    let space = |name: &str| std::fs::metadata(path(name)).unwrap().blocks() * 512;
    let (disk, image) = (path("disk.img"), path("disk.qcow2"));
    nbd_cli(&["image", "create", "-o", "preallocation=full", &disk, "1M"]).success();
    assert!(space("disk.img") >= 1 << 20);
    let list = "cluster_size=4k,compat=1.1,compression_type=zstd,refcount_bits=8,lazy_refcounts=on";
    let more = "extended_l2=off,preallocation=falloc";
    let line = ["image", "convert", "-O", "qcow2", "-o", list, "-o", more, &disk, &image];
    nbd_cli(&line).success();
    assert!(space("disk.qcow2") >= 1 << 20);
    let info = nbd_cli(&["image", "info", "--json", &image]).success();
    let info: Value = serde_json::from_str(&info).unwrap();
    assert_eq!(info["cluster-size"], 4096, "{info}");
    let data = &info["format-specific"]["data"];
    assert_eq!((&data["refcount-bits"], &data["lazy-refcounts"]), (&8.into(), &true.into()));
    assert_eq!(data["compression-type"], "zstd");
}

#[test]
fn an_option_that_is_given_twice_is_refused_and_makes_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let [new, source] = ["new", "source"].map(|name| directory.path().join(name));
    let (new, source) = (new.display().to_string(), source.display().to_string());
    nbd_cli(&["image", "create", "-f", "qcow2", &source, "1M"]).success();
    let before = std::fs::read(&source).unwrap();
    let create = ["image", "create", "-f", "qcow2", &new, "1M"];
    let convert = ["image", "convert", "-O", "qcow2", &source, &new];
    let measure = ["image", "measure", "-O", "qcow2", &source];
    let amend = ["image", "amend", &source];
    let cases: [(&[&str], &[&str], &str); 9] = [
        (&create, &["--cluster-size", "4k"], "cluster_size=8k"),
        (&create, &["--refcount-bits", "8"], "refcount_bits=8"),
        (&create, &["--extended-l2"], "extended_l2=off"),
        (&create, &["--lazy-refcounts"], "lazy_refcounts=off"),
        (&create, &["--preallocation", "full"], "compat=1.1,preallocation=off"),
        (&convert, &["--compression-type", "zstd"], "compression_type=zlib"),
        (&measure, &["--compat", "1.1"], "compat=1.1"),
        (&amend, &["--compat", "1.1"], "compat=0.10"),
        (&amend, &["--size", "3M"], "size=2M"),
    ];
    for (command, flag, list) in cases {
        let outcome = nbd_cli(&[command, flag, &["-o", list]].concat());
        assert_eq!(outcome.code, Some(1), "{flag:?} {list}: {outcome:?}");
        assert!(outcome.stderr.contains("give only one"), "{outcome:?}");
        assert!(!std::path::Path::new(&new).exists() && std::fs::read(&source).unwrap() == before);
    }
    nbd_cli(&[&create[..], &["--cluster-size", "4k", "-o", "compat=1.1"]].concat()).success();
}

#[test]
fn options_that_an_image_cannot_have_are_refused_and_make_nothing() {
    let directory = tempfile::tempdir().unwrap();
    let new = directory.path().join("new").display().to_string();
    for (format, list) in [
        ("raw", "preallocation=metadata"),
        ("raw", "cluster_size=4k"),
        ("qcow2", "preallocation=some"),
        ("qcow2", "cluster_size=x"),
        ("qcow2", "compat=3"),
        ("qcow2", "nosuch=1"),
    ] {
        let outcome = nbd_cli(&["image", "create", "-f", format, "-o", list, &new, "1M"]);
        assert_ne!(outcome.code, Some(0), "{format} {list}: {outcome:?}");
        let key = list.split_once('=').unwrap().0;
        assert!(outcome.stderr.contains(key), "{format} {list}: {outcome:?}");
        assert_eq!(std::fs::read_dir(directory.path()).unwrap().count(), 0, "{format} {list}");
    }
}
