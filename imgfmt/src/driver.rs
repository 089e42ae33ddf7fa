//! The formats that can be opened, and access to the functions that only one of them has.

use std::path::PathBuf;
use std::sync::Arc;

use crate::format::Format;
use crate::layer::{Layer, WritableLayer};
use crate::qcow2::Qcow2;
use crate::raw::Raw;
use crate::storage::{FileIdentity, Storage};

/// An open image of a known format.
#[derive(Debug)]
pub(crate) enum Driver {
    Raw(Raw),
    Qcow2(Box<Qcow2>),
}

/// A layer below the image, which the layer above it reads.
#[derive(Clone, Debug)]
pub(crate) enum BackingLayer {
    Raw(Arc<Raw>),
    Qcow2(Arc<Qcow2>),
}

/// An open image with everything below it.
#[derive(Debug)]
pub(crate) struct Chain {
    /// Dropped first, and then the others from the top to the bottom, so that no layer drops the next
    /// one: a long chain must not decide how much stack that takes.
    pub(crate) top: Driver,
    /// From the one below the image to the last one.
    pub(crate) below: Vec<BackingLayer>,
    /// Those of all layers that were opened by a name.
    pub(crate) files: Vec<NamedFile>,
}

/// A file that was opened by a name.
#[derive(Clone, Debug)]
pub(crate) struct NamedFile {
    pub(crate) path: PathBuf,
    pub(crate) identity: FileIdentity,
}

impl Driver {
    pub(crate) fn layer(&self) -> &dyn Layer {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => &**qcow2,
        }
    }

    pub(crate) fn writable(&self) -> &dyn WritableLayer {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => &**qcow2,
        }
    }

    pub(crate) fn writable_mut(&mut self) -> &mut dyn WritableLayer {
        match self {
            Self::Raw(raw) => raw,
            Self::Qcow2(qcow2) => &mut **qcow2,
        }
    }

    pub(crate) fn format(&self) -> Format {
        match self {
            Self::Raw(_) => Format::Raw,
            Self::Qcow2(_) => Format::Qcow2,
        }
    }

    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }

    pub(crate) fn qcow2_mut(&mut self) -> Option<&mut Qcow2> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }

    /// The storage whose bytes are always the disk's, at the same offsets, if there is one.
    pub(crate) fn raw_storage(&self) -> Option<&dyn Storage> {
        match self {
            Self::Raw(raw) => Some(raw.storage()),
            Self::Qcow2(_) => None,
        }
    }
}

impl From<Driver> for BackingLayer {
    fn from(driver: Driver) -> Self {
        match driver {
            Driver::Raw(raw) => Self::Raw(Arc::new(raw)),
            Driver::Qcow2(qcow2) => Self::Qcow2(Arc::from(qcow2)),
        }
    }
}

impl BackingLayer {
    pub(crate) fn layer(&self) -> Arc<dyn Layer> {
        match self {
            Self::Raw(raw) => Arc::clone(raw) as _,
            Self::Qcow2(qcow2) => Arc::clone(qcow2) as _,
        }
    }

    pub(crate) fn size(&self) -> u64 {
        match self {
            Self::Raw(raw) => raw.size(),
            Self::Qcow2(qcow2) => qcow2.size(),
        }
    }

    pub(crate) fn qcow2(&self) -> Option<&Qcow2> {
        match self {
            Self::Raw(_) => None,
            Self::Qcow2(qcow2) => Some(qcow2),
        }
    }
}

impl Chain {
    /// The qcow2 images of the chain from the top on; `None` stands for a layer of another format.
    pub(crate) fn qcow2_layers(&self) -> impl Iterator<Item = Option<&Qcow2>> {
        std::iter::once(self.top.qcow2()).chain(self.below.iter().map(BackingLayer::qcow2))
    }
}
