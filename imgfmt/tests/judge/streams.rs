//! Overlays into which the layers below are streamed, and what the tests of that look at.

use std::path::{Path, PathBuf};

use imgfmt::Image;

use super::subjects::{Made, Start, Subject};
use crate::common::{Random, at, qemu, run, text};

/// Size of a disk in bytes: neither whole clusters nor whole pages.
pub const SIZE: u64 = (1 << 20) + 1536;

pub const SUBJECTS: [Subject; 7] = [
    Subject::new("", Start::Overlay),
    Subject::new("cluster_size=512", Start::Overlay),
    Subject::new("compat=0.10", Start::Overlay),
    Subject::new("cluster_size=4096,compat=0.10", Start::RawOverlay),
    Subject::new("cluster_size=16384,extended_l2=on", Start::Overlay),
    Subject::new("extended_l2=on", Start::RawOverlay),
    Subject::new("cluster_size=4096,data_file=DIR/data.raw", Start::Overlay),
];

/// The whole disk.
pub fn read(image: &Image) -> Vec<u8> {
    let mut bytes = vec![0xee; image.size() as usize];
    image.read_at(at(0), &mut bytes).unwrap();
    bytes
}

pub fn remove_base(made: &Made) {
    for format in ["raw", "qcow2"] {
        let _ = std::fs::remove_file(made.path.with_extension(format!("base.{format}")));
    }
}

/// Three layers: the disk, `middle.qcow2`, which is shorter, and `base.qcow2` or `base.raw`.
pub fn three_layers(
    directory: &Path,
    options: &str,
    base_format: &str,
    random: &mut Random,
) -> [PathBuf; 3] {
    let base = format!("base.{base_format}");
    let paths = ["top.qcow2", "middle.qcow2", &base].map(|name| directory.join(name));
    let [top, middle, base] = &paths;
    let short = SIZE / 2 / 512 * 512;
    run("qemu-img", &["create", "-q", "-f", base_format, text(base), &SIZE.to_string()]);
    qemu::create_overlay(middle, "", base, base_format, &short.to_string());
    qemu::create_overlay(top, options, middle, "qcow2", &SIZE.to_string());
    for (path, format, size) in
        [(base, base_format, SIZE), (middle, "qcow2", short), (top, "qcow2", SIZE)]
    {
        qemu::io(path, format, &qemu::random_commands(random, size, 6));
    }
    paths
}
