//! The formats that can be opened, and access to the functions that only one of them has.

use std::ffi::OsString;
use std::path::PathBuf;
use std::sync::Arc;

use crate::error::Result;
use crate::foreign_info::FormatDetails;
use crate::format::Format;
use crate::formats::{ForeignImage, Identity, Parent};
use crate::layer::{Layer, WritableLayer};
use crate::ordered_lock::{OrderedMutex, OrderedRwLock, rank};
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::storage::{FileIdentity, Storage};

/// An open image of a known format.
#[derive(Debug)]
pub(crate) enum Driver {
    Raw(Raw),
    Qcow2(Box<Qcow2>),
    Foreign(Foreign),
    New(NewImage),
}

/// An open image of a format that is only read.
#[derive(Debug)]
pub(crate) struct Foreign {
    pub(crate) format: Format,
    pub(crate) image: Box<dyn ForeignImage>,
}

/// A new image of a format that is otherwise only read. It is open until it is complete.
#[derive(Debug)]
pub(crate) struct NewImage {
    pub(crate) format: Format,
    pub(crate) image: Box<dyn WritableLayer>,
}

/// A layer below the image, which the layer above it reads.
#[derive(Clone, Debug)]
pub(crate) enum BackingLayer {
    Raw(Arc<Raw>),
    Qcow2(Arc<Qcow2>),
    Foreign(Arc<dyn ForeignImage>),
    New(Arc<dyn WritableLayer>),
}

/// An open image with everything below it.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Dropped first, and then the others from the top to the bottom, so that no layer drops the
    /// next one: a long chain must not decide how much stack that takes.
    pub(crate) top: Driver,
    /// Replaced as a whole when layers are taken away.
    layers: OrderedRwLock<{ rank::LAYERS }, Arc<Layers>>,
    /// Held while layers are taken away.
    pub(crate) detaching: OrderedMutex<{ rank::DETACHING }, ()>,
}

/// The layers of an open image, and what they are stored in.
#[derive(Debug)]
pub(crate) struct Layers {
    /// From the one below the image to the last one.
    pub(crate) below: Vec<BackingLayer>,
    /// The files of all layers that were opened by a name.
    pub(crate) files: Vec<NamedFile>,
    /// Other files and storages that were opened, as they are called where they are named, each
    /// with the number of its layer.
    pub(crate) others: Vec<(usize, PathBuf)>,
    /// The files and the formats of all layers, from the top to the bottom.
    pub(crate) opened: Vec<LayerFile>,
}

/// What a layer is stored in.
#[derive(Clone, Copy, Debug)]
pub(crate) struct LayerFile {
    pub(crate) identity: Option<FileIdentity>,
    pub(crate) format: Format,
}

/// A file that was opened by a name.
#[derive(Clone, Debug)]
pub(crate) struct NamedFile {
    /// The number of its layer: 0 is the image's own.
    pub(crate) layer: usize,
    pub(crate) path: PathBuf,
    pub(crate) identity: FileIdentity,
}

impl Driver {
    pub(crate) fn layer(&self) -> &dyn Layer {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => &**qcow2,
            Self::Foreign(foreign) => &*foreign.image,
            Self::New(new) => &*new.image,
        }
    }

    /// The image, if its format is one that can be written.
    pub(crate) fn writable(&self) -> Option<&dyn WritableLayer> {
        match self {
            Self::Raw(raw) => Some(raw),
            Self::Qcow2(qcow2) => Some(&**qcow2),
            Self::Foreign(_) => None,
            Self::New(new) => Some(&*new.image),
        }
    }

    pub(crate) fn writable_mut(&mut self) -> Option<&mut dyn WritableLayer> {
        match self {
            Self::Raw(raw) => Some(raw),
            Self::Qcow2(qcow2) => Some(&mut **qcow2),
            Self::Foreign(_) => None,
            Self::New(new) => Some(&mut *new.image),
        }
    }

    /// Makes the last preparations for writing, once the whole chain has been opened.
    pub(crate) fn begin_writing(&mut self) -> Result<()> {
        self.qcow2_mut().map_or(Ok(()), Qcow2::begin_writing)
    }

    /// Puts a layer below it that stays there.
    pub(crate) fn fix_backing(&mut self, below: &BackingLayer) {
        match self {
            // Nothing is ever below it.
            Self::Raw(_) | Self::New(_) => {}
            Self::Qcow2(qcow2) => qcow2.fix_backing(below.layer()),
            Self::Foreign(foreign) => foreign.image.attach_parent(below.layer()),
        }
    }

    /// Puts a layer below it, the first of these, which can be taken away if the format allows
    /// that; the others are below that one.
    pub(crate) fn attach_backing(&mut self, below: &[BackingLayer]) {
        match (self, below.first()) {
            (Self::Qcow2(qcow2), _) => {
                qcow2.attach_backing(&below.iter().map(BackingLayer::layer).collect());
            }
            (other, Some(first)) => other.fix_backing(first),
            (_, None) => {}
        }
    }

    /// What the layer below must be known by.
    pub(crate) fn parent_identity(&self) -> Option<Identity> {
        match self {
            Self::Raw(_) | Self::Qcow2(_) | Self::New(_) => None,
            Self::Foreign(foreign) => foreign.image.parent()?.identity,
        }
    }

    /// The name and the format that the image records of the layer below it.
    pub(crate) fn recorded_backing(&self) -> (Option<OsString>, Option<String>) {
        match self {
            Self::Raw(_) | Self::New(_) => (None, None),
            Self::Qcow2(qcow2) => {
                qcow2.backing_name().map_or((None, None), |(name, format)| (Some(name), format))
            }
            Self::Foreign(foreign) => foreign.image.parent().map_or((None, None), Parent::recorded),
        }
    }

    /// The size of its blocks and what it says of itself, if its format is one that is only read.
    pub(crate) fn foreign_facts(&self) -> (Option<u64>, Option<FormatDetails>) {
        match self {
            Self::Raw(_) | Self::Qcow2(_) | Self::New(_) => (None, None),
            Self::Foreign(foreign) => (foreign.image.block_size(), foreign.image.details()),
        }
    }

    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw(raw) => raw.format(),
            Self::Qcow2(_) => Format::Qcow2,
            Self::Foreign(foreign) => foreign.format,
            Self::New(new) => new.format,
        }
    }

    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) | Self::Foreign(_) | Self::New(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }

    pub(crate) fn qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        match self {
            Self::Raw(_) | Self::Foreign(_) | Self::New(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }

    /// The storage whose bytes are always the disk's, at the same offsets, if there is one.
    pub(crate) fn raw_storage(&self) -> Option<&dyn Storage> {
        match self {
            Self::Raw(raw) => Some(raw.storage()),
            Self::Qcow2(_) | Self::Foreign(_) | Self::New(_) => None,
        }
    }
}

impl From<Driver> for BackingLayer {
    fn from(driver: Driver) -> Self {
        match driver {
            Driver::Raw(raw) => Self::Raw(Arc::new(raw)),
            Driver::Qcow2(qcow2) => Self::Qcow2(Arc::from(qcow2)),
            Driver::Foreign(foreign) => Self::Foreign(Arc::from(foreign.image)),
            Driver::New(new) => Self::New(Arc::from(new.image)),
        }
    }
}

impl BackingLayer {
    pub(crate) fn layer(&self) -> Arc<dyn Layer> {
        match self {
            Self::Raw(raw) => Arc::clone(raw) as _,
            Self::Qcow2(qcow2) => Arc::clone(qcow2) as _,
            Self::Foreign(image) => Arc::clone(image) as _,
            Self::New(image) => Arc::clone(image) as _,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
            Self::Foreign(image) => image.size(),
            Self::New(image) => image.size(),
        }
    }

    /// What a child knows it by, if its format has that.
    pub(crate) fn identity(&self) -> Option<Identity> {
        match self {
            Self::Raw(_) | Self::Qcow2(_) | Self::New(_) => None,
            Self::Foreign(image) => image.identity(),
        }
    }

    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) | Self::Foreign(_) | Self::New(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }
}

impl Chain {
    pub(crate) fn new(top: Driver, layers: Layers) -> Self {
        let (layers, detaching) = (OrderedRwLock::new(Arc::new(layers)), OrderedMutex::default());
        Self { top, layers, detaching }
    }

    /// The present layers.
    pub(crate) fn layers(&self) -> Arc<Layers> {
        Arc::clone(&self.layers.read())
    }

    pub(crate) fn layers_mut(&mut self) -> Option<&mut Layers> {
        Arc::get_mut(self.layers.get_mut())
    }

    /// Sets the layers that are left, and returns those before.
    pub(crate) fn replace_layers(&self, left: Layers) -> Arc<Layers> {
        std::mem::replace(&mut *self.layers.write(), Arc::new(left))
    }

    /// The qcow2 images of the chain from the top on; `None` stands for a layer of another format.
    pub(crate) fn qcow2_layers<'a>(
        &'a self,
        layers: &'a Layers,
    ) -> impl Iterator<Item = Option<&'a Qcow2>> {
        std::iter::once(self.top.qcow2()).chain(layers.below.iter().map(BackingLayer::qcow2))
    }
}

impl Layers {
    /// All layers below the image, in order.
    pub(crate) fn all_below(&self) -> Arc<[Arc<dyn Layer>]> {
        self.below.iter().map(BackingLayer::layer).collect()
    }

    /// The layers without those of the numbers from 1 to before `base`.
    pub(crate) fn without(&self, base: usize) -> Self {
        let is_left = |layer: usize| layer == 0 || layer >= base;
        let number = |layer: usize| if layer == 0 { 0 } else { layer + 1 - base };
        let files = self.files.iter().filter(|file| is_left(file.layer));
        let others = self.others.iter().filter(|(layer, _)| is_left(*layer));
        let opened = self.opened.iter().enumerate().filter(|(layer, _)| is_left(*layer));
        Self {
            below: self.below.iter().skip(base - 1).cloned().collect(),
            files: files.map(|it| NamedFile { layer: number(it.layer), ..it.clone() }).collect(),
            others: others.map(|(layer, path)| (number(*layer), path.clone())).collect(),
            opened: opened.map(|(_, file)| *file).collect(),
        }
    }
}
