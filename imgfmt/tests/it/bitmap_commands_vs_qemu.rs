//! Every command on bitmaps, given by QEMU or by us in any order: after each both see the same.

use std::collections::BTreeMap;
use std::path::Path;

use imgfmt::{Access, BitmapChange, Durability, Image, OpenOptions, Recording};

use crate::common::bitmaps::{Model, dirty};
use crate::common::{Random, at, qemu, run, text};

const SIZE: u64 = (20 << 20) + 512;
const NAMES: [&str; 4] = ["a", "b", "c", "d"];
const STEPS: usize = 40;

#[derive(Debug)]
struct Expected {
    model: Model,
    recording: Recording,
}

/// A command, and the program that carries it out.
#[derive(Clone, Debug)]
enum Step {
    Change(BitmapChange),
    Write(u64, u64),
}

#[test]
fn commands_of_qemu_and_of_ours_take_turns_on_one_image() {
    if !qemu::has_qemu() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.qcow2");
    let mut random = Random::new("commands_of_qemu_and_of_ours_take_turns_on_one_image");
    qemu::create(&path, ["", "cluster_size=4k"][random.below(2) as usize], &SIZE.to_string());
    let mut expected = BTreeMap::new();
    for number in 0..STEPS {
        let step = choose(&mut random, &expected);
        let by_qemu = random.below(2) == 0;
        println!("{number}: {} {step:?}", if by_qemu { "qemu" } else { "ours" });
        if by_qemu {
            by_qemu_img(&path, &step);
        } else {
            by_us(&path, &step);
        }
        note(&mut expected, &step);
        // The map takes QEMU a server, so only one of them; ours sees all.
        let chosen = random.below(NAMES.len() as u64) as usize;
        compare(&path, &expected, &NAMES[chosen..=chosen]);
    }
    compare(&path, &expected, &NAMES);
}

fn choose(random: &mut Random, expected: &BTreeMap<&'static str, Expected>) -> Step {
    let pick = |random: &mut Random| NAMES[random.below(NAMES.len() as u64) as usize];
    loop {
        let name = pick(random);
        let there = expected.contains_key(name);
        let name = name.to_owned();
        let change = match random.below(10) {
            0..=5 if !there => {
                let recording = [Recording::Enabled, Recording::Disabled][random.below(2) as usize];
                BitmapChange::Add { name, granularity: 512 << random.below(12), recording }
            }
            0 if there => BitmapChange::Remove { name },
            1 if there => BitmapChange::Clear { name },
            2 if there => BitmapChange::Enable { name },
            3 if there => BitmapChange::Disable { name },
            4 | 5 if there => {
                let from = pick(random);
                if from == name || !expected.contains_key(from) {
                    continue;
                }
                BitmapChange::Merge { into: name, from: from.to_owned() }
            }
            6.. => {
                let length = 512 * (1 + random.below(300));
                return Step::Write(512 * random.below((SIZE - length) / 512), length);
            }
            _ => continue,
        };
        return Step::Change(change);
    }
}

fn by_qemu_img(path: &Path, step: &Step) {
    let path_text = text(path);
    let bitmap = |words: &[&str]| drop(run("qemu-img", &[&["bitmap"][..], words].concat()));
    match step {
        Step::Write(offset, length) => {
            qemu::io(path, "qcow2", &[format!("write {offset} {length}")]);
        }
        Step::Change(BitmapChange::Add { name, granularity, recording }) => {
            let granularity = granularity.to_string();
            let state = match recording {
                Recording::Enabled => "--enable",
                Recording::Disabled => "--disable",
            };
            bitmap(&["--add", state, "-g", &granularity, path_text, name]);
        }
        Step::Change(BitmapChange::Remove { name }) => bitmap(&["--remove", path_text, name]),
        Step::Change(BitmapChange::Clear { name }) => bitmap(&["--clear", path_text, name]),
        Step::Change(BitmapChange::Enable { name }) => bitmap(&["--enable", path_text, name]),
        Step::Change(BitmapChange::Disable { name }) => bitmap(&["--disable", path_text, name]),
        Step::Change(BitmapChange::Merge { into, from }) => {
            bitmap(&["--merge", from, path_text, into]);
        }
        Step::Change(other) => panic!("not among the steps: {other:?}"),
    }
}

fn by_us(path: &Path, step: &Step) {
    let image = Image::open(path, &OpenOptions::new().access(Access::ReadWrite)).unwrap();
    match step {
        Step::Write(offset, length) => {
            let data = vec![7; *length as usize];
            image.write_at(at(*offset), &data, Durability::Cached).unwrap();
        }
        Step::Change(change) => image.bitmap_transaction(std::slice::from_ref(change)).unwrap(),
    }
    image.close().unwrap();
}

fn note(expected: &mut BTreeMap<&'static str, Expected>, step: &Step) {
    let known = |name: &str| *NAMES.iter().find(|known| **known == name).unwrap();
    match step {
        Step::Write(offset, length) => {
            let recording = |bitmap: &&mut Expected| bitmap.recording == Recording::Enabled;
            expected
                .values_mut()
                .filter(recording)
                .for_each(|bitmap| bitmap.model.set(*offset, *length));
        }
        Step::Change(BitmapChange::Add { name, granularity, recording }) => {
            let model = Model::new(SIZE, *granularity);
            expected.insert(known(name), Expected { model, recording: *recording });
        }
        Step::Change(BitmapChange::Remove { name }) => drop(expected.remove(known(name))),
        Step::Change(BitmapChange::Clear { name }) => {
            expected.get_mut(known(name)).unwrap().model.bits.fill(false);
        }
        Step::Change(BitmapChange::Enable { name }) => {
            expected.get_mut(known(name)).unwrap().recording = Recording::Enabled;
        }
        Step::Change(BitmapChange::Disable { name }) => {
            expected.get_mut(known(name)).unwrap().recording = Recording::Disabled;
        }
        Step::Change(BitmapChange::Merge { into, from }) => {
            let parts = expected[known(from)].model.dirty();
            let into = &mut expected.get_mut(known(into)).unwrap().model;
            parts.into_iter().for_each(|(offset, length)| into.set(offset, length));
        }
        Step::Change(other) => panic!("not among the steps: {other:?}"),
    }
}

/// Checks what both say: we about every bitmap, QEMU about the bits of those in `mapped`.
fn compare(path: &Path, expected: &BTreeMap<&'static str, Expected>, mapped: &[&str]) {
    qemu::check(path);
    assert_eq!(listed_by_qemu(path), listed(expected));
    let image = Image::open(path, &OpenOptions::new()).unwrap();
    let mut found: Vec<_> = image
        .bitmaps()
        .into_iter()
        .map(|bitmap| (bitmap.name, bitmap.granularity, bitmap.recording == Recording::Enabled))
        .collect();
    found.sort();
    assert_eq!(found, listed(expected));
    for (name, bitmap) in expected {
        assert_eq!(dirty(&image, name), bitmap.model.dirty(), "{name}");
    }
    drop(image);
    for name in mapped {
        if let Some(bitmap) = expected.get(name) {
            assert_eq!(qemu::dirty(path, name), bitmap.model.dirty(), "{name}, says QEMU");
        }
    }
}

/// Name, granularity, and whether it notes changes.
type Listed = Vec<(String, u64, bool)>;

fn listed(expected: &BTreeMap<&'static str, Expected>) -> Listed {
    let of = |(name, bitmap): (&&str, &Expected)| {
        let is_enabled = bitmap.recording == Recording::Enabled;
        ((*name).to_owned(), bitmap.model.granularity, is_enabled)
    };
    expected.iter().map(of).collect()
}

fn listed_by_qemu(path: &Path) -> Listed {
    let info = run("qemu-img", &["info", text(path)]);
    let (mut found, mut is_enabled, mut name) = (Vec::new(), false, String::new());
    let bitmaps = info.lines().skip_while(|line| line.trim() != "bitmaps:");
    for line in bitmaps.map(str::trim) {
        assert!(!line.contains("in-use"), "{info}");
        if line == "flags:" {
            is_enabled = false;
        } else if line.ends_with(": auto") {
            is_enabled = true;
        } else if let Some(text) = line.strip_prefix("name: ") {
            name = text.to_owned();
        } else if let Some(granularity) = line.strip_prefix("granularity: ") {
            found.push((std::mem::take(&mut name), granularity.parse().unwrap(), is_enabled));
        }
    }
    found.sort();
    found
}
