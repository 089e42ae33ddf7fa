//! Images get another version, other refcounts or another size in place, beside QEMU and with
//! crashes.

use std::path::Path;
use std::sync::Arc;

use crate::common::{Random, qemu, run, text};
use imgfmt::storage::MemoryStorage;
use imgfmt::testing::{Loss, Recorder};
use imgfmt::{
    Amendment, ErrorKind, Image, LazyRefcounts, OpenOptions, OpenPolicy, Qcow2Version, Repair,
    Storage,
};

const SIZE: u64 = 1 << 20;

fn amendment(change: impl FnOnce(&mut Amendment)) -> Amendment {
    let mut amendment = Amendment::default();
    change(&mut amendment);
    amendment
}

fn to_v2() -> Amendment {
    amendment(|it| it.version = Some(Qcow2Version::V2))
}

fn width(bits: u32) -> Amendment {
    amendment(|it| it.refcount_bits = Some(bits))
}

fn info(path: &Path) -> String {
    run("qemu-img", &["info", "--output=json", text(path)])
}

/// An image with data, zeroes above data, zeroes above nothing and discarded parts.
fn image(random: &mut Random, path: &Path, options: &str) {
    qemu::create(path, options, &SIZE.to_string());
    let mut commands = qemu::random_commands(random, SIZE, 20);
    commands
        .extend(["write -z 0 70k", "write -P 3 512k 64k", "write -z -u 512k 64k"].map(Into::into));
    qemu::io(path, "qcow2", &commands);
}

#[test]
fn version_3_becomes_version_2_with_the_same_disk_and_back() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("to version 2");
    let options = OpenOptions::new().policy(OpenPolicy::any_file());
    for kind in ["cluster_size=512", "cluster_size=64k", "cluster_size=4k,preallocation=metadata"] {
        for base in [false, true] {
            let directory = tempfile::tempdir().unwrap();
            let path = directory.path().join("new.qcow2");
            if base && !kind.contains("preallocation") {
                let below = directory.path().join("base.qcow2");
                qemu::create(&below, "", &SIZE.to_string());
                qemu::io(&below, "qcow2", &["write -P 9 0 1M".to_owned()]);
                let create =
                    ["create", "-q", "-f", "qcow2", "-F", "qcow2", "-b", "base.qcow2", "-o"];
                run("qemu-img", &[&create[..], &[kind, text(&path)]].concat());
                let mut commands = qemu::random_commands(&mut random, SIZE, 20);
                commands.push("write -z 0 70k".to_owned());
                qemu::io(&path, "qcow2", &commands);
            } else {
                image(&mut random, &path, kind);
            }
            let before = qemu::content(&path, "qcow2");
            Image::amend(&path, &options, &to_v2()).unwrap();
            qemu::check(&path);
            assert!(info(&path).contains("\"compat\": \"0.10\""), "{}", info(&path));
            assert!(qemu::content(&path, "qcow2") == before, "{kind}, {base}");
            Image::amend(&path, &options, &amendment(|it| it.version = Some(Qcow2Version::V3)))
                .unwrap();
            qemu::check(&path);
            assert!(info(&path).contains("\"compat\": \"1.1\""));
            assert!(qemu::content(&path, "qcow2") == before, "{kind}, {base}");
        }
    }
}

#[test]
fn refcounts_of_every_width_are_made_and_found_sound_by_qemu() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("refcount widths");
    let options = OpenOptions::new();
    let directory = tempfile::tempdir().unwrap();
    for cluster in ["512", "64k"] {
        let path = directory.path().join(format!("{cluster}.qcow2"));
        image(&mut random, &path, &format!("cluster_size={cluster}"));
        run("qemu-img", &["bitmap", "--add", text(&path), "daily"]);
        qemu::io(&path, "qcow2", &qemu::random_commands(&mut random, SIZE, 5));
        let before = qemu::content(&path, "qcow2");
        for bits in [1, 64, 2, 32, 4, 8, 16] {
            Image::amend(&path, &options, &width(bits)).unwrap();
            qemu::check(&path);
            let info = info(&path);
            assert!(info.contains(&format!("\"refcount-bits\": {bits}")), "{info}");
            assert!(info.contains("\"daily\"") && !info.contains("in-use"), "{info}");
            assert!(qemu::content(&path, "qcow2") == before, "{cluster}, {bits}");
        }
        // Two snapshots and the present state share clusters.
        for name in ["one", "two"] {
            run("qemu-img", &["snapshot", "-c", name, text(&path)]);
        }
        let kept = std::fs::read(&path).unwrap();
        let error = Image::amend(&path, &options, &width(1)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::Unsupported, "{error}");
        assert!(std::fs::read(&path).unwrap() == kept, "nothing has changed");
        Image::amend(&path, &options, &width(2)).unwrap();
        qemu::check(&path);
        run("qemu-img", &["snapshot", "-d", "one", text(&path)]);
        qemu::check(&path);
    }
}

#[test]
fn what_version_2_cannot_have_is_refused_by_name_and_nothing_changes() {
    if !qemu::has_qemu() {
        return;
    }
    let options = OpenOptions::new();
    let directory = tempfile::tempdir().unwrap();
    for (kind, words) in [
        ("extended_l2=on", "subclusters"),
        ("compression_type=zstd", "zlib"),
        ("refcount_bits=8", "16 bits"),
    ] {
        let path = directory.path().join("image.qcow2");
        qemu::create(&path, kind, "1M");
        let before = std::fs::read(&path).unwrap();
        let error = Image::amend(&path, &options, &to_v2()).unwrap_err().to_string();
        assert!(error.contains(words), "{error}");
        assert!(std::fs::read(&path).unwrap() == before, "{kind}");
        std::fs::remove_file(&path).unwrap();
    }
    let path = directory.path().join("image.qcow2");
    qemu::create(&path, "", "1M");
    run("qemu-img", &["bitmap", "--add", text(&path), "daily"]);
    let error = Image::amend(&path, &options, &to_v2()).unwrap_err().to_string();
    assert!(error.contains("dirty bitmaps"), "{error}");
    run("qemu-img", &["bitmap", "--remove", text(&path), "daily"]);
    run("qemu-img", &["snapshot", "-c", "one", text(&path)]);
    let error = Image::amend(&path, &options, &to_v2()).unwrap_err().to_string();
    assert!(error.contains("snapshots"), "{error}");
    run("qemu-img", &["snapshot", "-d", "one", text(&path)]);
    let lazy = amendment(|it| {
        it.version = Some(Qcow2Version::V2);
        it.lazy_refcounts = Some(LazyRefcounts::On);
    });
    assert_eq!(Image::amend(&path, &options, &lazy).unwrap_err().kind(), ErrorKind::InvalidInput);
    let smaller = amendment(|it| it.size = Some(512 << 10));
    assert_eq!(
        Image::amend(&path, &options, &smaller).unwrap_err().kind(),
        ErrorKind::InvalidInput
    );
    for bits in [0, 3, 128] {
        let error = Image::amend(&path, &options, &width(bits)).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput);
    }
    // All at once.
    let all = amendment(|it| {
        it.version = Some(Qcow2Version::V3);
        it.refcount_bits = Some(32);
        it.size = Some(2 << 20);
        it.lazy_refcounts = Some(LazyRefcounts::On);
    });
    Image::amend(&path, &options, &all).unwrap();
    qemu::check(&path);
    let info = info(&path);
    for part in ["\"refcount-bits\": 32", "\"virtual-size\": 2097152", "\"lazy-refcounts\": true"] {
        assert!(info.contains(part), "{info}");
    }
}

fn content(storage: Arc<dyn Storage>) -> Vec<u8> {
    let image = Image::from_storage(storage, &OpenOptions::new()).unwrap();
    let mut content = vec![0; SIZE as usize];
    image.read_at(0.into(), &mut content).unwrap();
    content
}

#[test]
fn whatever_instant_it_is_interrupted_at_the_disk_is_the_same_and_nothing_is_damaged() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("amend interrupted");
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("image.qcow2");
    image(&mut random, &path, "cluster_size=512");
    let bytes = std::fs::read(&path).unwrap();
    let before = content(Arc::new(MemoryStorage::from_bytes(&bytes)));
    let amendments = [
        to_v2(),
        width(64),
        width(1),
        amendment(|it| it.size = Some(3 << 20)),
        amendment(|it| {
            it.refcount_bits = Some(8);
            it.size = Some(2 << 20);
            it.lazy_refcounts = Some(LazyRefcounts::On);
        }),
    ];
    for amendment in amendments {
        let recorder = Recorder::new();
        let storage = recorder.storage(&bytes);
        let amended: Arc<dyn Storage> = storage.clone();
        Image::amend_storage(&amended, &OpenOptions::new(), &amendment).unwrap();
        let positions = recorder.position();
        for position in 0..=positions {
            for loss in Loss::ALL {
                let left = storage.after_crash(position, loss, &mut |bound| random.below(bound));
                let left: Arc<dyn Storage> = Arc::new(MemoryStorage::from_bytes(&left));
                let what = format!("{amendment:?}, {position} of {positions}, {loss:?}");
                assert!(content(left.clone()) == before, "{what}");
                let options = OpenOptions::new();
                let report = Image::check_storage(left.clone(), &options, Repair::None).unwrap();
                assert_eq!(report.corruptions, 0, "{what}: {report:?}");
                if position % 16 == 0 {
                    // It can be done again.
                    Image::amend_storage(&left, &options, &amendment).unwrap();
                    assert!(content(left) == before, "{what}");
                }
            }
        }
    }
}
