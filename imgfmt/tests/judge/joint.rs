//! An image and its sidecar that crash at the same instant.

use std::path::Path;
use std::sync::Arc;

use imgfmt::testing::{Loss, RecordedDirectory, Recorder, RecordingStorage};
use imgfmt::{BitmapDurability, Image, Storage};

use super::subjects::options;
use crate::common::Random;

/// A boot of the machine that there never was; 36 characters.
pub const BOOT: &str = "11111111-aaaa-bbbb-cccc-dddddddddddd";
pub const SECOND_BOOT: &str = "22222222-aaaa-bbbb-cccc-dddddddddddd";
pub const THIRD_BOOT: &str = "33333333-aaaa-bbbb-cccc-dddddddddddd";

/// Extents of the activity log are that large here, so that there are some hundred.
const EXTENT_BITS: u32 = 12;

/// What is found on a disk.
#[derive(Clone)]
pub struct Files {
    pub image: Vec<u8>,
    pub sidecar: Option<Vec<u8>>,
}

/// An image and its sidecar that are recorded.
pub struct Joint {
    pub recorder: Recorder,
    image: Arc<RecordingStorage>,
    directory: Arc<RecordedDirectory>,
    durability: BitmapDurability,
}

impl Joint {
    /// Records what happens in this boot.
    pub fn new(files: &Files, durability: BitmapDurability, boot: &str) -> Self {
        let recorder = Recorder::new();
        let image = recorder.storage(&files.image);
        // The first storage of a recording is inode 1.
        let sidecar = files.sidecar.as_deref().map(|bytes| adopted(bytes, 1, None));
        let directory = RecordedDirectory::new(&recorder, boot, sidecar.as_deref());
        let directory = Arc::new(directory.with_extent_bits(EXTENT_BITS));
        Self { recorder, image, directory, durability }
    }

    pub fn open(&self) -> imgfmt::Result<Image> {
        self.open_through(|image| image)
    }

    /// Opens the image through another storage above it.
    pub fn open_through(
        &self,
        above: impl FnOnce(Arc<dyn Storage>) -> Arc<dyn Storage>,
    ) -> imgfmt::Result<Image> {
        let options =
            options().bitmap_durability(self.durability).sidecar_directory(&self.directory);
        Image::from_storage(above(Arc::clone(&self.image) as _), &options)
    }

    /// What a crash leaves; every file reorders what was not synced by itself.
    pub fn crash(&self, position: usize, loss: Loss, random: &mut Random) -> Files {
        let mut below = |bound| random.below(bound);
        Files {
            image: self.image.after_crash(position, loss, &mut below),
            sidecar: self.directory.after_crash(position, loss, &mut below),
        }
    }
}

impl Files {
    /// Puts the files on a real disk. What was noted in `boot` was noted in this boot of this
    /// machine.
    pub fn put_down(&self, path: &Path, boot: &str) {
        use std::os::unix::fs::MetadataExt;
        std::fs::write(path, &self.image).unwrap();
        let sidecar_path = path.with_extension("qcow2.dirty");
        let Some(sidecar) = &self.sidecar else {
            let _ = std::fs::remove_file(sidecar_path);
            return;
        };
        let inode = std::fs::metadata(path).unwrap().ino();
        std::fs::write(sidecar_path, adopted(sidecar, inode, Some(boot))).unwrap();
    }
}

/// A sidecar for an image that is now another inode. If it was written in the boot that is named,
/// it says that it was written in this one. One that is damaged stays as it is.
fn adopted(sidecar: &[u8], inode: u64, boot: Option<&str>) -> Vec<u8> {
    let mut bytes = sidecar.to_vec();
    let is_sound =
        bytes.len() > 512 && crc32fast::hash(&bytes[..508]).to_le_bytes() == bytes[508..512];
    if is_sound {
        bytes[104..112].copy_from_slice(&inode.to_le_bytes());
        if boot.is_some_and(|boot| bytes[64..100] == *boot.as_bytes()) {
            let real = std::fs::read_to_string("/proc/sys/kernel/random/boot_id").unwrap();
            bytes[64..100].copy_from_slice(real.trim_end().as_bytes());
        }
        let crc = crc32fast::hash(&bytes[..508]);
        bytes[508..512].copy_from_slice(&crc.to_le_bytes());
    }
    bytes
}
