//! Images of version 2 become version 3 in place.

use imgfmt::{Amendment, ErrorKind, Image, LazyRefcounts, OpenOptions, OpenPolicy, Qcow2Version};

use crate::common::{Random, qemu, run, text};

const SIZE: u64 = 2 << 20;

fn to(version: Qcow2Version) -> Amendment {
    let mut amendment = Amendment::default();
    amendment.version = Some(version);
    amendment
}

fn lazy(lazy: LazyRefcounts) -> Amendment {
    let mut amendment = Amendment::default();
    amendment.lazy_refcounts = Some(lazy);
    amendment
}

#[test]
fn a_version_2_image_becomes_version_3_with_its_disk_snapshots_and_backing_file() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("amend");
    let options = OpenOptions::new().policy(OpenPolicy::any_file());
    let mut deep = "d/".repeat(150);
    deep.push_str("base.qcow2");
    for cluster_size in ["512", "64k"] {
        for base_name in ["", "base.qcow2", &*deep] {
            if cluster_size == "512" && base_name.len() > 200 {
                continue; // QEMU itself has no room for that.
            }
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("old.qcow2");
            let kind = format!("compat=0.10,cluster_size={cluster_size}");
            if base_name.is_empty() {
                qemu::create(&path, &kind, &SIZE.to_string());
            } else {
                let base = directory.path().join(base_name);
                std::fs::create_dir_all(base.parent().unwrap()).unwrap();
                qemu::create(&base, "", &SIZE.to_string());
                qemu::io(&base, "qcow2", &["write -P 7 0 2M".to_owned()]);
                let size = SIZE.to_string();
                let create = ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", base_name, "-o"];
                run("qemu-img", &[&create[..], &[&*kind, text(&path), &*size]].concat());
            }
            qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, SIZE, 10));
            run("qemu-img", &["snapshot", "-c", "one", text(&path)]);
            qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, SIZE, 5));
            let before = qemu::content(&path, "qcow2");
            let error = Image::amend(&path, &options, &lazy(LazyRefcounts::On)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::InvalidInput);
            Image::amend(&path, &options, &to(Qcow2Version::V2)).unwrap();
            Image::amend(&path, &options, &to(Qcow2Version::V3)).unwrap();
            qemu::check(&path);
            assert!(qemu::content(&path, "qcow2") == before, "{cluster_size}, {base_name}");
            let info = run("qemu-img", &["info", "--output=json", text(&path)]);
            assert!(info.contains("\"compat\": \"1.1\""), "{info}");
            assert_eq!(info.contains("base.qcow2"), !base_name.is_empty(), "{info}");
            assert_eq!(
                info.contains("\"backing-filename-format\": \"qcow2\""),
                info.contains("base")
            );
            for (on, said) in [(LazyRefcounts::On, true), (LazyRefcounts::Off, false)] {
                Image::amend(&path, &options, &lazy(on)).unwrap();
                let info = run("qemu-img", &["info", "--output=json", text(&path)]);
                assert_eq!(info.contains("\"lazy-refcounts\": true"), said, "{info}");
            }
            // Now zeroes can be noted, and the snapshot is what it was.
            qemu::io(&path, "qcow2", &["write -z 0 1M".to_owned()]);
            run("qemu-img", &["snapshot", "-a", "one", text(&path)]);
            qemu::check(&path);
            let error = Image::amend(&path, &options, &to(Qcow2Version::V2)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::Unsupported);
        }
    }
}
