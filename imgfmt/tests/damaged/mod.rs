//! An image of which one cluster is damaged and the others are not.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used)]

use std::sync::Arc;

use imgfmt::testing::{Recorder, RecordingStorage};
use imgfmt::{Access, Format, Image, OpenOptions};

use crate::common::at;
use crate::handmade::Handmade;

pub const CLUSTER: u64 = 65536;

/// Guest cluster 0 holds sevens, cluster 2 nines, cluster 1 is the one that is damaged.
pub fn sound() -> Handmade {
    let mut image = Handmade::new(16, 1 << 20);
    image.add_data(0, 7);
    image.add_data(2, 9);
    image
}

pub fn open(image: &Handmade, access: Access) -> (Arc<RecordingStorage>, Image) {
    let storage = Recorder::new().storage(&image.bytes);
    let options = OpenOptions::new().format(Format::Qcow2).access(access);
    let disk = Image::from_storage(Arc::clone(&storage) as _, &options).unwrap();
    (storage, disk)
}

pub fn read(disk: &Image, guest_cluster: u64) -> imgfmt::Result<Vec<u8>> {
    let mut bytes = vec![0xee; CLUSTER as usize];
    disk.read_at(at(guest_cluster * CLUSTER), &mut bytes).map(|()| bytes)
}

/// Clusters 0 and 2 must still be there.
pub fn check_others(disk: &Image, what: &str) {
    for (cluster, value) in [(0, 7), (2, 9)] {
        let bytes = read(disk, cluster).unwrap_or_else(|error| panic!("{what}: {error}"));
        assert!(bytes.iter().all(|byte| *byte == value), "{what}: cluster {cluster} is damaged");
    }
}
