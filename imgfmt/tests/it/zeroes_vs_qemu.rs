//! Zeroes and discards leave the same map as QEMU's do: what was zeroed is allocated in its layer,
//! and stays zero when another backing file is put under it.

use std::path::Path;

use imgfmt::{
    Access, CreateOptions, Durability, Format, Image, OpenOptions, OpenPolicy, Speed, ZeroMode,
};

use crate::common::{self, Random, at, qemu, range, run, text};

const SIZE: u64 = (3 << 20) + 512;
const CACHED: Durability = Durability::Cached;

fn open(path: &Path) -> Image {
    let options = OpenOptions::new().access(Access::ReadWrite).policy(OpenPolicy::any_file());
    Image::open(path, &options.format(Format::Qcow2)).unwrap()
}

/// Carries out commands of qemu-io.
fn change(image: &Image, commands: &[String]) {
    for command in commands {
        let words: Vec<&str> = command.split(' ').collect();
        let number = |index: usize| words[words.len() - index].parse::<u64>().unwrap();
        let (offset, length) = (number(2), number(1));
        let zero = |mode| image.write_zeroes(range(offset, length), mode, Speed::Any, CACHED);
        match words[..words.len() - 2] {
            ["write", "-z"] => zero(ZeroMode::KeepAllocated),
            ["write", "-z", "-u"] => zero(ZeroMode::MayUnmap),
            ["discard"] => image.discard(range(offset, length), CACHED),
            ["write", "-P", byte] => {
                let data = vec![byte.parse().unwrap(); length as usize];
                image.write_at(at(offset), &data, CACHED)
            }
            _ => panic!("{command}"),
        }
        .unwrap();
    }
}

type Part = (u64, u64, bool, bool, bool, u64);

/// What qemu-img says of an image: offset, length, whether it is data, present, zero without being
/// data, and depth.
fn map(path: &Path) -> Vec<Part> {
    let said = run("qemu-img", &["map", "--output=json", text(path)]);
    let value = |line: &str, key: &str| {
        let rest = line.split_once(&format!("\"{key}\": ")).unwrap().1;
        rest.split([',', '}']).next().unwrap().to_owned()
    };
    let mut parts: Vec<Part> = Vec::new();
    for line in said.lines() {
        let is = |key| value(line, key) == "true";
        let number = |key| value(line, key).parse::<u64>().unwrap();
        let part = (
            number("start"),
            number("length"),
            is("data"),
            is("present"),
            // Holes of the file within a cluster of data are the file system's.
            is("zero") && !is("data"),
            number("depth"),
        );
        match parts.last_mut() {
            Some(last) if (last.2, last.3, last.4, last.5) == (part.2, part.3, part.4, part.5) => {
                last.1 += part.1;
            }
            _ => parts.push(part),
        }
    }
    parts
}

#[test]
fn the_same_changes_leave_the_same_map() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("zeroes");
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (ours, theirs, base) = (path("ours.qcow2"), path("theirs.qcow2"), path("base.qcow2"));
    qemu::create(&base, "cluster_size=4096", "2M");
    qemu::io(&base, "qcow2", &qemu::random_commands(&mut random, 2 << 20, 20));
    for has_base in [false, true] {
        for kind in [
            "compat=1.1",
            "compat=0.10",
            "cluster_size=4096",
            "cluster_size=2M",
            "extended_l2=on",
            "preallocation=metadata",
        ] {
            if has_base && kind.contains("prealloc") {
                continue;
            }
            for path in [&ours, &theirs] {
                match has_base {
                    true => {
                        qemu::create_overlay(path, kind, &base, "qcow2", &SIZE.to_string());
                    }
                    false => qemu::create(path, kind, &SIZE.to_string()),
                }
            }
            let mut commands = qemu::random_commands(&mut random, SIZE, 12);
            // QEMU discards whole clusters only, we do what we can: compare where both can.
            commands.retain(|command| !command.starts_with("discard"));
            let offset = random.below(48) << 16;
            let middle = commands.len() / 2;
            commands.insert(middle, format!("discard {offset} {}", (SIZE - offset).min(2 << 20)));
            let offset = random.below(2) << 21;
            commands.push(format!("discard {offset} {}", (SIZE - offset).min(2 << 20)));
            // Of a cluster with space QEMU marks also subclusters as zero that were never written;
            // we leave these as they are.
            if kind.contains("extended_l2") {
                commands.retain(|command| !command.starts_with("discard"));
            }
            qemu::io(&theirs, "qcow2", &commands);
            let image = open(&ours);
            change(&image, &commands);
            image.close().unwrap();
            qemu::check(&ours);
            run("qemu-img", &["compare", "-q", text(&ours), text(&theirs)]);
            assert_eq!(map(&ours), map(&theirs), "{kind}, {has_base}: {commands:#?}");
        }
    }
}

#[test]
fn zeroes_stay_when_a_backing_file_is_put_under_them() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = |name: &str| directory.path().join(name);
    let (disk, base, short) = (path("disk.qcow2"), path("base.qcow2"), path("short.qcow2"));
    qemu::create(&base, "", "3M");
    qemu::io(&base, "qcow2", &["write -P 7 0 3M".to_owned()]);
    qemu::create(&short, "", "1M");
    qemu::io(&short, "qcow2", &["write -P 9 64k 4k".to_owned()]);
    // Whole clusters, parts of one, the border of two, over the end of the base, the end of the
    // disk.
    let zeroed = [
        (0, 65536),
        (65536 + 4096, 512),
        (3 * 65536 - 1000, 1500),
        ((1 << 20) - 70_000, 140_000),
        ((2 << 20) - 1, 3),
        (SIZE - 700, 700),
    ];
    let kinds = ["", "cluster_size=4096", "cluster_size=2M", "extended_l2=on"];
    for (kind, has_base) in kinds.iter().flat_map(|kind| [(kind, false), (kind, true)]) {
        for mode in [ZeroMode::MayUnmap, ZeroMode::KeepAllocated] {
            match has_base {
                true => qemu::create_overlay(&disk, kind, &short, "qcow2", &SIZE.to_string()),
                false => qemu::create(&disk, kind, &SIZE.to_string()),
            }
            let image = open(&disk);
            for (offset, length) in zeroed {
                image.write_zeroes(range(offset, length), mode, Speed::Any, CACHED).unwrap();
            }
            image.close().unwrap();
            let options = OpenOptions::new().policy(OpenPolicy::any_file());
            let backing = Some(("base.qcow2".as_ref(), Format::Qcow2));
            Image::change_backing_file(&disk, &options, backing).unwrap();
            qemu::check(&disk);
            let content = qemu::content(&disk, "qcow2");
            for (offset, length) in zeroed {
                let part = &content[offset as usize..(offset + length) as usize];
                assert!(part.iter().all(|byte| *byte == 0), "{kind}, {has_base}, {offset}");
            }
        }
    }
}

#[test]
fn what_others_write_beside_zeroes_of_the_same_cluster_stays() {
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    const CLUSTERS: u64 = 200;
    Image::create(&path, &CreateOptions::new(Format::Qcow2, CLUSTERS << 16)).unwrap();
    let image = open(&path);
    let each = |work: &dyn Fn(u64)| (0..CLUSTERS).for_each(|cluster| work(cluster << 16));
    std::thread::scope(|scope| {
        scope.spawn(|| each(&|start| image.write_at(at(start), &[1; 4096], CACHED).unwrap()));
        scope.spawn(|| {
            each(&|start| {
                let behind = range(start + 4096, 60_000);
                image.write_zeroes(behind, ZeroMode::MayUnmap, Speed::Any, CACHED).unwrap();
            });
        });
    });
    each(&|start| {
        let mut bytes = vec![0; 65536];
        image.read_at(at(start), &mut bytes).unwrap();
        assert!(bytes[..4096] == [1; 4096], "at {start}");
        assert!(bytes[4096..].iter().all(|byte| *byte == 0), "at {start}");
    });
    image.close().unwrap();
}

#[test]
fn a_disk_of_which_nothing_was_written_is_zeroed_within_the_memory_for_tables() {
    const DISK: u64 = 64 << 30;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    Image::create(&path, &CreateOptions::new(Format::Qcow2, DISK)).unwrap();
    let options = OpenOptions::new().access(Access::ReadWrite).format(Format::Qcow2);
    // Eight tables of 128.
    let options = options.metadata_cache_bytes(8 << 16);
    let image = Image::open(&path, &options).unwrap();
    let all = range(0, DISK);
    image.write_zeroes(all, ZeroMode::MayUnmap, Speed::FastOnly, CACHED).unwrap();
    let extents = common::all_extents(&image, all);
    assert!(extents.iter().all(|extent| extent.depth == 1), "{extents:?}");
    assert_eq!(extents.last().unwrap().range.end().bytes(), DISK);
    // What is discarded is given up, and nothing more is noted for it.
    image.discard(all, CACHED).unwrap();
    image.close().unwrap();
    let length = std::fs::metadata(&path).unwrap().len();
    assert!(length < 140 << 16, "{length}");
}
