//! New VMDK images in several files and over other images: QEMU reads in them what was written and
//! writes the same descriptors; nothing is taken for an image before all of it is there.
//!
//! `IMGFMT_FORMAT_ROUNDS` sets how many of each kind.

use std::path::Path;

use imgfmt::{
    CacheMode, CreateOptions, Durability, ErrorKind, Format, Image, OpenOptions, Preallocation,
    Speed, Subformat, ZeroMode,
};

use crate::common::{Random, at, has_tool, range, run, text};
use crate::judge::subjects::rounds;

/// The subformats in several files, and the files besides the descriptor of a disk of 5 GiB.
const KINDS: [(&str, Subformat, bool, &[&str]); 3] = [
    ("monolithicFlat", Subformat::Fixed, false, &["disk-flat.vmdk"]),
    (
        "twoGbMaxExtentFlat",
        Subformat::Fixed,
        true,
        &["disk-f001.vmdk", "disk-f002.vmdk", "disk-f003.vmdk"],
    ),
    (
        "twoGbMaxExtentSparse",
        Subformat::Dynamic,
        true,
        &["disk-s001.vmdk", "disk-s002.vmdk", "disk-s003.vmdk"],
    ),
];

const SIZE: u64 = 5 << 30;

fn options(subformat: Subformat, is_split: bool, size: u64) -> CreateOptions {
    let mut create = CreateOptions::new(Format::Vmdk, size);
    // Nothing has to survive a crash.
    create.open.cache = CacheMode::Unsafe;
    (create.foreign.subformat, create.foreign.split_extents) = (subformat, is_split);
    create
}

fn files(directory: &Path) -> Vec<String> {
    let entries = std::fs::read_dir(directory).unwrap();
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

#[test]
fn several_files_are_read_by_qemu_and_by_this_crate() {
    let mut random = Random::new("several files");
    for round in 0..rounds("IMGFMT_FORMAT_ROUNDS", 2) {
        for (kind, subformat, is_split, parts) in KINDS {
            let directory = tempfile::tempdir().unwrap();
            let [path, raw] = ["disk.vmdk", "disk.raw"].map(|name| directory.path().join(name));
            let what = format!("round {round}: {kind}");
            let image = Image::create(&path, &options(subformat, is_split, SIZE)).unwrap();
            let model = Image::create(&raw, &CreateOptions::new(Format::Raw, SIZE)).unwrap();
            // At the ends of the files, and anywhere.
            for _ in 0..20 {
                let near = (random.below(3) << 31) + (1 << 20);
                let offset = match random.below(2) {
                    0 => near.saturating_sub(random.below(2 << 20)),
                    _ => random.below(SIZE),
                };
                let length = (random.below(300_000) + 1).min(SIZE - offset);
                if random.below(5) == 0 {
                    for image in [&image, &model] {
                        let part = range(offset, length);
                        let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
                        image.write_zeroes(part, mode, speed, Durability::Cached).unwrap();
                    }
                    continue;
                }
                let bytes = random.bytes(length as usize);
                for image in [&image, &model] {
                    image.write_at(at(offset), &bytes, Durability::Cached).unwrap();
                }
                let mut found = vec![0; bytes.len()];
                image.read_at(at(offset), &mut found).unwrap();
                assert!(found == bytes, "{what}: read while it is filled");
            }
            model.close().unwrap();
            if round % 2 == 0 {
                image.close().unwrap();
            } else {
                drop(image);
            }
            let mut expected = [parts, &["disk.raw", "disk.vmdk"]].concat();
            expected.sort_unstable();
            assert_eq!(files(directory.path()), expected, "{what}");
            if has_tool("qemu-img") {
                run("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", text(&raw), text(&path)]);
                let checked = ["check", "-q", "-f", "vmdk", text(&path)];
                run("qemu-img", &checked);
            }
            let [image, model] =
                [&path, &raw].map(|path| Image::open(path, &OpenOptions::new()).unwrap());
            let context = imgfmt::jobs::JobContext::default();
            let compared = imgfmt::jobs::compare(&image, &model, &Default::default(), &context);
            assert_eq!(compared.unwrap().first_difference, None, "{what}");
        }
    }
}

/// The lines of a descriptor without the identifier of the content.
fn lines(path: &Path) -> Vec<String> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines().filter(|line| !line.starts_with("CID=")).map(str::to_owned).collect()
}

#[test]
fn descriptors_and_files_are_those_that_qemu_makes() {
    if !has_tool("qemu-img") {
        return;
    }
    for (kind, subformat, is_split, parts) in KINDS {
        for (size, count) in [(SIZE, parts.len()), (4 << 30, 2), (512, 1), ((2 << 30) + 512, 2)] {
            let directory = tempfile::tempdir().unwrap();
            let [ours, theirs] = ["ours", "theirs"].map(|name| {
                let folder = directory.path().join(name);
                std::fs::create_dir(&folder).unwrap();
                folder
            });
            let new = |folder: &Path| folder.join("disk.vmdk");
            let image = Image::create(new(&ours), &options(subformat, is_split, size)).unwrap();
            image.close().unwrap();
            let option = format!("subformat={kind}");
            let (path, size) = (new(&theirs), size.to_string());
            run("qemu-img", &["create", "-q", "-f", "vmdk", "-o", &option, text(&path), &size]);
            assert_eq!(lines(&new(&ours)), lines(&new(&theirs)), "{kind} {size}");
            assert_eq!(files(&ours), files(&theirs), "{kind} {size}");
            let count = if is_split { count } else { 1 };
            assert_eq!(files(&ours).len(), count + 1, "{kind} {size}");
            if subformat == Subformat::Fixed {
                for name in files(&ours).iter().filter(|name| *name != "disk.vmdk") {
                    let [one, other] = [&ours, &theirs]
                        .map(|folder| std::fs::metadata(folder.join(name)).unwrap().len());
                    assert_eq!(one, other, "{kind} {size}: {name}");
                }
            }
        }
    }
}

#[test]
fn an_extent_alone_is_no_image_and_the_descriptor_comes_last() {
    for (kind, subformat, is_split, parts) in KINDS {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.vmdk");
        let image = Image::create(&path, &options(subformat, is_split, SIZE)).unwrap();
        image.write_at(at(0), &[7; 4096], Durability::Cached).unwrap();
        assert_eq!(std::fs::metadata(&path).unwrap().len(), 0, "{kind}");
        // As after a crash.
        let vmdk = OpenOptions::new().format(Format::Vmdk);
        for name in parts.iter().chain(&["disk.vmdk"]) {
            assert!(Image::open(directory.path().join(name), &vmdk).is_err(), "{kind}: {name}");
        }
        image.close().unwrap();
        assert_eq!(Image::open(&path, &vmdk).unwrap().size(), SIZE, "{kind}");
        for name in parts {
            assert!(Image::open(directory.path().join(name), &vmdk).is_err(), "{kind}: {name}");
        }
    }
}

#[test]
fn all_files_are_made_or_none_and_those_that_exist_stay() {
    for (kind, subformat, is_split, parts) in KINDS {
        for name in parts {
            let directory = tempfile::tempdir().unwrap();
            std::fs::write(directory.path().join(name), "mine").unwrap();
            let path = directory.path().join("disk.vmdk");
            let error = Image::create(&path, &options(subformat, is_split, SIZE)).unwrap_err();
            assert_eq!(error.kind(), ErrorKind::AlreadyExists, "{kind}: {error}");
            assert!(error.to_string().contains(name), "{kind}: {error}");
            assert_eq!(files(directory.path()), [*name], "{kind}");
            assert_eq!(std::fs::read(directory.path().join(name)).unwrap(), b"mine");
        }
    }
    let directory = tempfile::tempdir().unwrap();
    let refused = |name: &str, create: &CreateOptions, part: &str| {
        let error = Image::create(directory.path().join(name), create).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::InvalidInput, "{error}");
        assert!(error.to_string().contains(part), "{error}");
        assert_eq!(files(directory.path()), [""; 0], "{error}");
    };
    let split = options(Subformat::Dynamic, true, SIZE);
    refused("a\"b.vmdk", &split, "quotes");
    // It could be made, and not be opened.
    refused("a:b.vmdk", &split, "colons");
    refused("json:{}", &split, "colons");
    refused("disk.vmdk", &options(Subformat::Fixed, true, (8 << 40) + 512), "8 TiB");
    let mut flat = options(Subformat::Fixed, false, 1 << 20);
    flat.backing = Some(("nosuch.vmdk".into(), Format::Raw));
    refused("disk.vmdk", &flat, "not of the format raw");
    flat.backing = None;
    flat.foreign.zeroed_grains = true;
    refused("disk.vmdk", &flat, "zeroed grains");
}

#[test]
fn the_space_of_a_flat_image_can_be_set_aside() {
    use std::os::unix::fs::MetadataExt as _;
    let directory = tempfile::tempdir().unwrap();
    let path = directory.path().join("disk.vmdk");
    let mut create = options(Subformat::Fixed, false, 4 << 20);
    create.preallocation = Preallocation::Falloc;
    Image::create(&path, &create).unwrap().close().unwrap();
    let metadata = std::fs::metadata(directory.path().join("disk-flat.vmdk")).unwrap();
    assert_eq!(metadata.len(), 4 << 20);
    assert!(metadata.blocks() * 512 >= 4 << 20);
    assert!(std::fs::metadata(&path).unwrap().len() < 4096);
}

/// Changes a disk at random, and the same of a row of bytes.
fn change(image: &Image, model: &mut [u8], random: &mut Random) {
    for _ in 0..12 {
        let offset = random.below(model.len() as u64);
        let length = (random.below(200_000) + 1).min(model.len() as u64 - offset);
        let part = &mut model[offset as usize..][..length as usize];
        if random.below(4) == 0 {
            let (mode, speed) = (ZeroMode::MayUnmap, Speed::Any);
            image.write_zeroes(range(offset, length), mode, speed, Durability::Cached).unwrap();
            part.fill(0);
        } else {
            part.copy_from_slice(&random.bytes(length as usize));
            image.write_at(at(offset), part, Durability::Cached).unwrap();
        }
    }
}

#[test]
fn an_overlay_shows_what_is_below_it_until_it_is_written() {
    let mut random = Random::new("overlays of VMDK");
    for round in 0..rounds("IMGFMT_FORMAT_ROUNDS", 4) {
        let directory = tempfile::tempdir().unwrap();
        let path = |name: &str| directory.path().join(name);
        let size = (random.below(6 << 11) + 1) * 512;
        let mut model = vec![0; size as usize];
        let base = Image::create(path("0.vmdk"), &options(Subformat::Dynamic, false, size));
        let base = base.unwrap();
        change(&base, &mut model, &mut random);
        base.close().unwrap();
        for layer in 1..4 {
            // The last one is larger than what is below it.
            if layer == 3 {
                model.resize(model.len() + 512 * random.below(4000) as usize, 0);
            }
            let mut create = options(Subformat::Dynamic, random.below(2) == 0, model.len() as u64);
            create.backing = Some((format!("{}.vmdk", layer - 1).into(), Format::Vmdk));
            if layer < 3 {
                create.size = None;
            }
            let name = path(&format!("{layer}.vmdk"));
            let image = Image::create(&name, &create).unwrap();
            let mut found = vec![0xee; model.len()];
            image.read_at(at(0), &mut found).unwrap();
            assert!(found == model, "round {round}: layer {layer} is new");
            change(&image, &mut model, &mut random);
            image.read_at(at(0), &mut found).unwrap();
            assert!(found == model, "round {round}: layer {layer} is read while it is filled");
            image.close().unwrap();
            let image = Image::open(&name, &OpenOptions::new()).unwrap();
            image.read_at(at(0), &mut found).unwrap();
            assert!(found == model, "round {round}: layer {layer}");
            if has_tool("qemu-img") {
                std::fs::write(path("raw"), &model).unwrap();
                let raw = path("raw");
                run("qemu-img", &["compare", "-f", "raw", "-F", "vmdk", text(&raw), text(&name)]);
                run("qemu-img", &["check", "-q", "-f", "vmdk", text(&name)]);
            }
        }
        // The one in the middle is made anew: the one above it must not show that.
        std::fs::remove_file(path("1.vmdk")).unwrap();
        let _ = std::fs::remove_file(path("1-s001.vmdk"));
        let other = Image::create(path("1.vmdk"), &options(Subformat::Dynamic, false, size));
        other.unwrap().close().unwrap();
        let error = Image::open(path("2.vmdk"), &OpenOptions::new()).unwrap_err();
        assert!(error.to_string().contains("another image"), "round {round}: {error}");
    }
}
