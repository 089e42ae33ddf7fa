//! A crash after every single write of a change: the disk becomes smaller (in one step, so that the
//! old disk is found or the new one, with at worst leaks), or snapshots of version 2 images change,
//! which have no mark that could tell the next one who opens them to repair anything.

use imgfmt::testing::Loss;
use imgfmt::{Access, Durability, Image, OpenOptions, Shrink};

use crate::common::{Random, at, qemu};
use crate::judge::subjects::{
    Made, OnTrial, Start, Subject, Tolerance, check_snapshots, options, qemu_check,
};

const SIZE: u64 = 256 << 10;

type Change = fn(&mut Image);

fn content(made: &Made, options: &OpenOptions) -> Vec<u8> {
    let image = Image::open(&made.path, &options.clone().access(Access::ReadOnly)).unwrap();
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

/// Crashes after every write that `change` makes, with any of what is not on disk lost, and lets
/// `check` look at what is left.
fn at_every_step(
    made: &Made,
    random: &mut Random,
    change: impl FnOnce(&mut Image),
    mut check: impl FnMut(&str),
) {
    let trial = OnTrial::new(made);
    let mut image = trial.open().unwrap();
    let begin = trial.recorder.position();
    change(&mut image);
    let end = trial.recorder.position();
    for position in begin..=end {
        let loss = Loss::ALL[random.below(4) as usize];
        trial.crash(made, position, loss, random);
        check(&format!("{loss:?} lost after {} of {}", position - begin, end - begin));
    }
}

#[test]
fn a_disk_that_becomes_smaller_is_the_old_one_or_the_new_one() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash while shrinking");
    for (subject, size) in [
        // The new end goes through an L2 table, which covers 32 KiB.
        (Subject::new("cluster_size=512", Start::Used), SIZE / 2 + 5 * 512),
        // The new end is where a table ends.
        (Subject::new("cluster_size=512", Start::Used), SIZE / 2),
        // Tables and clusters are shared with snapshots.
        (Subject::new("cluster_size=512", Start::Snapshots), SIZE / 4 + 7 * 512),
        (Subject::new("cluster_size=4096,compat=0.10", Start::Used), 100 << 10),
        (Subject::new("cluster_size=512", Start::Compressed), SIZE / 2 + 512),
        (Subject::new("cluster_size=16384,extended_l2=on", Start::Overlay), 33 << 10),
        (Subject::new("cluster_size=4096,data_file=DIR/data.raw", Start::Used), 100 << 10),
        (Subject::new("cluster_size=4096", Start::Used), 0),
    ] {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let before = made.content.clone();
        let after = before[..size as usize].to_vec();
        let (mut old, mut new) = (0, 0);
        let shrink = |image: &mut Image| image.resize(size, Shrink::Allow).unwrap();
        at_every_step(&made, &mut random, shrink, |what| {
            let what = format!("{subject:?} to {size}: {what}");
            qemu_check(&made.path, Tolerance::Leaks, &what);
            let found = content(&made, &options());
            *(if found.len() == before.len() { &mut old } else { &mut new }) += 1;
            assert!(found == before || found == after, "{what}: neither the old nor the new disk");
            check_snapshots(&made, &what);
        });
        assert!(old > 0 && new > 0, "{subject:?}: {old} times the old disk, {new} times the new");
    }
}

#[test]
fn snapshots_of_version_2_survive_whatever_is_done_with_the_image_after_a_crash() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("crash of version 2");
    let subject = Subject::new("cluster_size=4096,compat=0.10", Start::Snapshots);
    let changes: [(&str, Change); 3] = [
        ("create", |image| image.create_snapshot("third").unwrap()),
        ("apply", |image| image.apply_snapshot("first").unwrap()),
        ("delete", |image| image.delete_snapshot("second").unwrap()),
    ];
    for (name, change) in changes {
        let directory = tempfile::tempdir().unwrap();
        let made = subject.make(directory.path(), SIZE, &mut random);
        let find = |name: &str| made.snapshots.iter().find(|(found, _)| found == name);
        let after = match name {
            "apply" => &find("first").unwrap().1,
            _ => &made.content,
        };
        at_every_step(&made, &mut random, change, |what| {
            let what = format!("{name}: {what}");
            // Refcounts and COPIED bits cannot change at once, and nothing tells to repair them.
            qemu_check(&made.path, Tolerance::CopiedFlags, &what);
            let found = content(&made, &options());
            assert!(found == made.content || found == *after, "{what}: neither state");
            let shown = snapshots(&made);
            for (snapshot, expected) in &shown {
                let known = find(snapshot).map_or(&made.content, |(_, content)| content);
                assert!(expected == known, "{what}: '{snapshot}' has changed");
            }
            assert!(shown.len() >= 2 || name == "delete", "{what}: a snapshot is lost");
            overwrite(&made);
            assert!(snapshots(&made) == shown, "{what}: written over what a snapshot shares");
        });
    }
}

/// Names and contents of all snapshots.
fn snapshots(made: &Made) -> Vec<(String, Vec<u8>)> {
    let info = Image::inspect_file(&made.path, &options()).unwrap();
    let names = info.qcow2.unwrap().snapshots.into_iter().map(|snapshot| snapshot.name);
    names.map(|name| (name.clone(), content(made, &options().snapshot(name)))).collect()
}

/// Writes everywhere, as the next user of the image may.
fn overwrite(made: &Made) {
    let image = Image::open(&made.path, &options()).unwrap();
    let data = vec![0x5a; image.size() as usize - 512];
    image.write_at(at(0), &data, Durability::Cached).unwrap();
    image.close().unwrap();
}
