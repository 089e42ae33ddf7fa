//! Images of other programs' formats, made and filled at random by QEMU, are read and mapped
//! exactly as QEMU does.
//!
//! `IMGFMT_FORMAT_ROUNDS` sets how many of each kind.

use std::path::Path;

use imgfmt::{Access, Content, ErrorKind, Format, Image, OpenOptions, OpenPolicy};

use crate::chains_vs_qemu::{Layer, compare_data, compare_maps, compare_parts};
use crate::common::{self, Random, qemu, run, text};
use crate::judge::subjects::rounds;

const SECTOR: u64 = 512;

/// The kinds of images that QEMU makes: format and options.
pub(crate) const KINDS: &[(&str, &str)] = &[
    ("vdi", ""),
    ("vdi", "static=on"),
    ("vmdk", ""),
    ("vmdk", "zeroed_grain=on"),
    ("vmdk", "subformat=monolithicFlat"),
    ("vmdk", "subformat=twoGbMaxExtentSparse"),
    ("vmdk", "subformat=twoGbMaxExtentFlat"),
    ("vpc", ""),
    ("vpc", "force_size=on"),
    ("vpc", "subformat=fixed,force_size=on"),
    ("qed", ""),
    ("qed", "cluster_size=4096,table_size=2"),
    ("qcow", ""),
    ("parallels", ""),
    ("parallels", "cluster_size=4096"),
];

pub(crate) fn has_tools() -> bool {
    ["qemu-img", "qemu-io", "qemu-nbd", "nbdinfo"].into_iter().all(common::has_tool)
}

/// Makes an image of a kind with random content.
pub(crate) fn make(
    path: &Path,
    (format, options): (&'static str, &str),
    size: u64,
    random: &mut Random,
) -> Layer {
    let size_text = size.to_string();
    let mut arguments = vec!["create", "-q", "-f", format];
    if !options.is_empty() {
        arguments.extend(["-o", options]);
    }
    arguments.extend([text(path), &size_text]);
    run("qemu-img", &arguments);
    // One that is compressed, where the format can.
    let compressed = (format == "qcow" && size >= 4096).then(|| "write -c -P 99 0 4096".to_owned());
    let commands = (0..12).map(|_| {
        // Blocks of 1 MiB and more are to stay free, too.
        let offset = random.below(size / SECTOR) * SECTOR;
        let length = ((random.below(300) + 1) * SECTOR).min(size - offset);
        match random.below(6) {
            0 => format!("write -z {offset} {length}"),
            _ => format!("write -P {} {offset} {length}", random.below(255) + 1),
        }
    });
    qemu::io(path, format, &compressed.into_iter().chain(commands).collect::<Vec<_>>());
    // Some sizes are rounded up. The last one in the text is the image's, not its file's.
    let info = run("qemu-img", &["info", "--output=json", "-f", format, text(path)]);
    let (_, rest) = info.rsplit_once("\"virtual-size\": ").unwrap();
    let digits: String = rest.chars().take_while(char::is_ascii_digit).collect();
    let size = digits.parse().unwrap();
    Layer { path: path.to_owned(), format, size, how: format!("{format} {options} {size}") }
}

#[test]
fn random_images_are_read_and_mapped_as_qemu_does() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("formats");
    for round in 0..rounds("IMGFMT_FORMAT_ROUNDS", 2) {
        for kind in KINDS {
            let directory = tempfile::tempdir().unwrap();
            let size = (random.below(30 << 11) + 1) * SECTOR;
            let path = directory.path().join(format!("disk.{}", kind.0));
            let layer = make(&path, *kind, size, &mut random);
            let what = format!("round {round}: {}", layer.how);
            println!("{what}");
            let format = Format::from_name(layer.format).unwrap();
            let options = OpenOptions::new().format(format);
            let image = Image::open(&layer.path, &options).unwrap();
            assert_eq!((image.format(), image.size()), (format, layer.size), "{what}");
            compare_data(&image, &layer, &mut random, &what);
            compare_parts(&image, &mut random, &what);
            compare_maps(&image, &layer, &what);
            let info = Image::inspect_file(&layer.path, &OpenOptions::new()).unwrap();
            assert_eq!((info.format, info.size), (format, layer.size), "{what}: probed");
        }
    }
}

#[test]
fn an_image_that_qemu_img_converts_comes_back() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("converted");
    let directory = tempfile::tempdir().unwrap();
    let raw = directory.path().join("disk.raw");
    let mut content = vec![0; 9 << 20];
    for _ in 0..20 {
        let start = random.below(content.len() as u64) as usize;
        let end = (start + random.below(500_000) as usize).min(content.len());
        content[start..end].fill(random.below(255) as u8 + 1);
    }
    std::fs::write(&raw, &content).unwrap();
    for (format, options) in KINDS {
        let path = directory.path().join(format!("disk.{format}"));
        let mut arguments = vec!["convert", "-f", "raw", "-O", format];
        if !options.is_empty() {
            arguments.extend(["-o", options]);
        }
        arguments.extend([text(&raw), text(&path)]);
        run("qemu-img", &arguments);
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let mut found = vec![0xee; image.size() as usize];
        image.read_at(common::at(0), &mut found).unwrap();
        let (found, rest) = found.split_at(content.len());
        assert!(found == content && rest.iter().all(|byte| *byte == 0), "{format} {options}");
    }
}

#[test]
fn an_image_that_is_only_read_is_not_opened_for_writing() {
    if !has_tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for kind in KINDS {
        let path = directory.path().join(format!("disk.{}", kind.0));
        make(&path, *kind, 1 << 20, &mut Random::seeded(1));
        let before = std::fs::read(&path).unwrap();
        let options = OpenOptions::new().access(Access::ReadWrite);
        let error = Image::open(&path, &options).unwrap_err();
        assert_eq!(error.kind(), ErrorKind::ReadOnly, "{error}");
        assert!(error.to_string().contains("image convert -O qcow2"), "{error}");
        assert!(std::fs::read(&path).unwrap() == before, "it was changed");
    }
}

#[test]
fn an_overlay_of_any_format_shows_its_backing_file() {
    if !has_tools() {
        return;
    }
    let mut random = Random::new("overlays");
    for top in ["qed", "qcow"] {
        for below in [("raw", ""), ("qcow2", ""), ("vdi", ""), ("qed", "")] {
            let directory = tempfile::tempdir().unwrap();
            let (base, path) = (directory.path().join("base"), directory.path().join("top"));
            make(&base, below, 5 << 20, &mut random);
            let backing = ["-b", "base", "-F", below.0];
            let create = [&["create", "-q", "-f", top][..], &backing, &[text(&path), "6M"]];
            run("qemu-img", &create.concat());
            qemu::io(&path, top, &qemu::random_commands(&mut random, 6 << 20, 6));
            let layer =
                Layer { path, format: top, size: 6 << 20, how: format!("{top} over {below:?}") };
            // Neither format says the format below it, unless that is raw.
            let options = OpenOptions::new().policy(OpenPolicy::new().allow_format_probe());
            let image = Image::open(&layer.path, &options).unwrap();
            assert_eq!(image.layer_sizes(), [6 << 20, 5 << 20]);
            compare_data(&image, &layer, &mut random, &layer.how);
            compare_parts(&image, &mut random, &layer.how);
            compare_maps(&image, &layer, &layer.how);
            let result = Image::open(&layer.path, &OpenOptions::new());
            match below.0 == "raw" && top == "qed" {
                true => assert!(result.is_ok(), "{result:?}"),
                false => assert_eq!(result.unwrap_err().kind(), ErrorKind::PolicyDenied),
            }
        }
    }
}

thread_local! {
    /// Decompressions that have begun, and that have ended.
    static DECOMPRESSIONS: std::cell::Cell<(u32, u32)> = const { std::cell::Cell::new((0, 0)) };
}

struct Decompressing;

impl Drop for Decompressing {
    fn drop(&mut self) {
        DECOMPRESSIONS.set((DECOMPRESSIONS.get().0, DECOMPRESSIONS.get().1 + 1));
    }
}

#[test]
fn a_thread_is_told_before_it_decompresses() {
    if !has_tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    let source = directory.path().join("source");
    std::fs::write(&source, [7; 1 << 20]).unwrap();
    imgfmt::before_decompression(|| {
        DECOMPRESSIONS.set((DECOMPRESSIONS.get().0 + 1, DECOMPRESSIONS.get().1));
        Box::new(Decompressing)
    });
    for (format, options) in [
        ("qcow2", "compression_type=zlib"),
        ("qcow2", "compression_type=zstd"),
        ("vmdk", "subformat=streamOptimized"),
        ("qcow", ""),
    ] {
        let path = directory.path().join(format);
        let (from, to) = (text(&source), text(&path));
        if format == "qcow" {
            // qemu-img does not make compressed ones.
            run("qemu-img", &["create", "-q", "-f", format, to, "1M"]);
            qemu::io(&path, format, &["write -c -P 7 0 4096".to_owned()]);
        } else {
            run("qemu-img", &["convert", "-c", "-f", "raw", "-O", format, "-o", options, from, to]);
        }
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        DECOMPRESSIONS.set((0, 0));
        let mut found = vec![0; 512];
        image.read_at(common::at(0), &mut found).unwrap();
        assert!(found.iter().all(|byte| *byte == 7));
        assert_eq!(DECOMPRESSIONS.get(), (1, 1), "{format}: {options}");
    }
}

#[test]
fn compressed_clusters_of_any_format_are_read() {
    if !has_tools() {
        return;
    }
    let directory = tempfile::tempdir().unwrap();
    for (format, cluster) in [("qcow", 4096)] {
        let path = directory.path().join(format);
        run("qemu-img", &["create", "-q", "-f", format, text(&path), "1M"]);
        let write =
            |number: u64| format!("write -c -P {} {} {cluster}", number + 1, number * cluster);
        qemu::io(&path, format, &(0..9).map(write).collect::<Vec<_>>());
        let image = Image::open(&path, &OpenOptions::new()).unwrap();
        let map = image.map_read(common::range(0, 9 * cluster)).unwrap();
        for mapping in map.mappings() {
            assert!(matches!(mapping.content, Content::Encoded(_)), "{mapping:?}");
        }
        for number in 0..9 {
            let mut found = vec![0; cluster as usize - 100];
            image.read_at(common::at(number * cluster + 50), &mut found).unwrap();
            assert!(found.iter().all(|byte| *byte == number as u8 + 1), "{format}: {number}");
        }
        let mut whole = vec![0; 1 << 20];
        image.read_at(common::at(0), &mut whole).unwrap();
        assert!(whole == qemu::content(&path, format), "{format}");
    }
}
