//! The layers of an image, and the files they are in.

use std::path::{Path, PathBuf};

use super::Image;
use crate::driver::BackingLayer;
use crate::format::Format;
use crate::storage::FileIdentity;

impl Image {
    /// Returns the sizes of the disks of all layers in bytes, from the image itself to the last
    /// backing file. [`Extent::depth`](crate::Extent::depth) 1 is the first of them. A layer may be
    /// shorter than those above it; it reads as zero beyond its end.
    ///
    /// ```
    /// use imgfmt::{CreateOptions, Format, Image};
    ///
    /// # fn main() -> imgfmt::Result<()> {
    /// # let directory = tempfile::tempdir().expect("a directory for the example");
    /// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
    /// Image::create(&base, &CreateOptions::new(Format::Raw, 1 << 20))?;
    /// let mut larger = CreateOptions::overlay("base.img", Format::Raw);
    /// larger.size = Some(3 << 20);
    /// assert_eq!(Image::create(&top, &larger)?.layer_sizes(), [3 << 20, 1 << 20]);
    /// # Ok(())
    /// # }
    /// ```
    pub fn layer_sizes(&self) -> Vec<u64> {
        let layers = self.chain.layers();
        let below = layers.below.iter().map(BackingLayer::size);
        std::iter::once(self.size()).chain(below).collect()
    }

    /// Returns the depth of the layer below the image that is stored in the file at `path`, and the
    /// format of that layer: the backing file has depth 2. `None` if no layer is; layers on servers
    /// have no file. Blocks.
    pub fn layer_in(&self, path: &Path) -> Option<(u32, Format)> {
        let identity = FileIdentity::of(path)?;
        let layers = self.chain.layers();
        let mut below = layers.opened.iter().zip(1..).skip(1);
        let found = below.find(|(layer, _)| layer.identity == Some(identity));
        found.map(|(layer, depth)| (depth, layer.format))
    }

    /// Returns for each layer whether its data is encrypted in its file. The image itself is first.
    pub fn encrypted_layers(&self) -> Vec<bool> {
        let layers = self.chain.layers();
        let images = self.chain.qcow2_layers(&layers).zip(&layers.opened);
        images
            .map(|(image, file)| match image {
                Some(image) => image.is_encrypted(),
                None => file.format == Format::Luks,
            })
            .collect()
    }

    /// Returns the paths of the files that were opened, each with the identity of the opened file:
    /// the image, its data file and all layers below.
    pub fn files(&self) -> Vec<(PathBuf, FileIdentity)> {
        let layers = self.chain.layers();
        layers.files.iter().map(|file| (file.path.clone(), file.identity)).collect()
    }

    /// Returns the paths of the files of the image itself: its own, and then its data file or
    /// extents.
    pub fn own_files(&self) -> Vec<PathBuf> {
        let layers = self.chain.layers();
        let own = layers.files.iter().filter(|file| file.layer == 0);
        own.map(|file| file.path.clone()).collect()
    }

    /// Returns what else than named files the image consists of, from the top to the bottom, as it
    /// is called in the image above: the URI of a layer on a server. A storage that the caller has
    /// opened has the path that it was given with, or an empty one.
    pub fn other_layers(&self) -> Vec<PathBuf> {
        self.chain.layers().others.iter().map(|(_, path)| path.clone()).collect()
    }
}
