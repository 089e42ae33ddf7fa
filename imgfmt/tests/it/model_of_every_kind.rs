//! Random operations on images of every kind do what they do to a row of bytes; after each closing
//! `qemu-img check` and our own check find nothing, and `qemu-img compare` no difference.
//!
//! Every run covers each value of each dimension and mixes them at random; `IMGFMT_MODEL_ROUNDS`
//! sets how many mixtures.

use imgfmt::{Image, Repair};

use crate::common::{Random, qemu, run, text};
use crate::judge::Model;
use crate::judge::subjects::{
    Made, Start, Subject, Tolerance, check_snapshots, options, qemu_check, rounds,
};

const STARTS: [Start; 6] = [
    Start::Empty,
    Start::Used,
    Start::Snapshots,
    Start::Compressed,
    Start::Overlay,
    Start::RawOverlay,
];

const VARIANTS: [&str; 9] = [
    "compat=0.10",
    "compat=1.1",
    "extended_l2=on",
    "compression_type=zstd",
    "lazy_refcounts=on",
    "preallocation=metadata",
    "extended_l2=on,compression_type=zstd",
    "data_file=DIR/data.raw",
    "data_file=DIR/data.raw,data_file_raw=on",
];

/// The options of a mixture, or nothing where the format does not allow it.
fn mix(cluster_bits: u64, refcount_order: u64, variant: &str, start: Start) -> Option<String> {
    let has_base = matches!(start, Start::Overlay | Start::RawOverlay);
    let is_possible = !(variant.contains("extended_l2") && cluster_bits < 14
        || variant.contains("0.10") && refcount_order != 4
        || variant.contains("data_file") && matches!(start, Start::Compressed | Start::Snapshots)
        || variant.contains("data_file_raw") && has_base
        || variant.contains("preallocation") && (has_base || start == Start::Compressed)
        // A count of 1 bit cannot tell of two references.
        || refcount_order == 0 && matches!(start, Start::Snapshots | Start::Compressed));
    is_possible.then(|| {
        let (size, bits) = (1 << cluster_bits, 1 << refcount_order);
        format!("{variant},cluster_size={size},refcount_bits={bits}")
    })
}

/// Opens, changes and closes an image a few times.
fn change(subject: Subject, cluster_bits: u64, random: &mut Random) {
    let directory = tempfile::tempdir().unwrap();
    let size = match cluster_bits {
        0..=11 => 1 << 20,
        12..=17 => 3 << 20,
        _ => 6 << 20,
    } + 512;
    let made = subject.make(directory.path(), size, random);
    let what = format!("{subject:?}");
    let mut model = Model::new(made.content.clone());
    for _ in 0..2 {
        let image = Image::open(&made.path, &options()).unwrap();
        model.check(&image, &what);
        for _ in 0..30 {
            model.step(&image, random, &what).unwrap();
        }
        model.check(&image, &what);
        image.close().unwrap();
        judge(&made, &model, &what);
    }
}

fn judge(made: &Made, model: &Model, what: &str) {
    qemu_check(&made.path, Tolerance::Nothing, what);
    let report = Image::check_file(&made.path, &options(), Repair::None).unwrap();
    assert_eq!((report.leaks, report.corruptions), (0, 0), "{what}: {:?}", report.messages);
    check_snapshots(made, what);
    let raw = made.path.with_extension("model");
    std::fs::write(&raw, &model.current).unwrap();
    run("qemu-img", &["compare", "-q", "-f", "raw", "-F", "qcow2", text(&raw), text(&made.path)]);
    if what.contains("data_file_raw=on") {
        let data = std::fs::read(&made.data.as_ref().unwrap().0).unwrap();
        assert!(data.starts_with(&model.current), "{what}: the raw data file is not the disk");
    }
}

#[test]
fn images_of_every_kind_behave_like_a_row_of_bytes() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("model");
    let rounds = rounds("IMGFMT_MODEL_ROUNDS", 26);
    for round in 0..rounds {
        // Strides without a common factor, so that all values come up and in new company.
        let cluster_bits = 9 + round % 13;
        let start = STARTS[(round % 6) as usize];
        let (variant, order) = loop {
            let variant = VARIANTS[random.below(9) as usize];
            let order = if round % 2 == 0 { round / 2 % 7 } else { random.below(7) };
            let order = if variant.contains("0.10") { 4 } else { order };
            if mix(cluster_bits, order, variant, start).is_some() {
                break (variant, order);
            }
            if round % 2 == 0 && order == 0 && start != Start::Used {
                break ("compat=1.1", 4);
            }
        };
        let options = mix(cluster_bits, order, variant, start).unwrap();
        let subject = Subject::new(Box::leak(options.into_boxed_str()), start);
        println!("{subject:?}");
        change(subject, cluster_bits, &mut random);
    }
}

#[test]
fn every_variant_is_changed_at_its_usual_size() {
    if !qemu::has_qemu() {
        return;
    }
    let mut random = Random::new("model variants");
    for (number, variant) in VARIANTS.iter().enumerate() {
        let start = STARTS[(number + random.below(6) as usize) % 6];
        let start = if mix(16, 4, variant, start).is_some() { start } else { Start::Used };
        println!("{variant}, {start:?}");
        change(Subject::new(variant, start), 16, &mut random);
    }
}
