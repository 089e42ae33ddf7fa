//! Takes layers below an open image away.

use std::ffi::OsStr;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use super::Image;
use crate::access::Access;
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::layer::WritableLayer as _;

/// How long requests that still read the layers are waited for.
const TIME_TO_CLOSE: Duration = Duration::from_secs(10);
const LOOK: Duration = Duration::from_millis(1);

/// The layer that becomes the backing file, of those that are below an image.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct NewBase<'a> {
    /// Its depth: that of the present backing file is 2.
    pub depth: u32,
    /// The name by which the header refers to it.
    pub name: &'a OsStr,
}

impl Image {
    /// How often layers below were taken away.
    pub(crate) fn backing_changes(&self) -> u64 {
        self.qcow2().map_or(0, |image| image.backing_changes())
    }

    /// Whether the header names a backing file that is not open.
    pub(crate) fn ignores_backing(&self) -> bool {
        self.chain.top.recorded_backing().0.is_some() && self.chain.layers().below.is_empty()
    }

    /// Takes the layers between the image and `base` away, or all, while the image is in use. The
    /// image has everything that they provide, and layers were taken away `changes` times before.
    /// Waits until requests that read the layers have ended, so that their files are closed; at
    /// most 10 s.
    pub(crate) fn detach_below(&self, base: Option<NewBase<'_>>, changes: u64) -> Result<()> {
        self.check_change("detach the backing file of", crate::units::GuestOffset::new(0), 0)?;
        let refuse = |detail| {
            Err(self.name(Error::new(ErrorKind::Busy, "detach the backing file of", detail)))
        };
        let Some(image) = self.qcow2() else { return refuse("it is not a qcow2 image") };
        let _detaching = self.chain.detaching.lock();
        let layers = self.chain.layers();
        if image.backing_changes() != changes {
            return refuse("layers below it were taken away meanwhile; try again");
        }
        let first = base.map_or(layers.opened.len(), |base| base.depth as usize - 1);
        let name = match base {
            None => None,
            Some(base) => match layers.opened.get(first) {
                Some(file) => Some((base.name, file.format)),
                None => return refuse("the base is not one of the layers below it"),
            },
        };
        let left = layers.without(first);
        let detached = image.detach_backing(&left.all_below(), name);
        detached.map_err(|error| self.name(error))?;
        let gone: Vec<_> =
            layers.below.iter().take(first - 1).map(|it| Arc::downgrade(&it.layer())).collect();
        drop((self.chain.replace_layers(left), layers));
        let deadline = Instant::now() + TIME_TO_CLOSE;
        while gone.iter().any(|layer| layer.strong_count() > 0) && Instant::now() < deadline {
            sleep(LOOK);
        }
        Ok(())
    }

    /// Closes the image, and then makes `backing` its backing file, or none, before its file is
    /// closed and unlocked. The image must have everything that another backing file would show
    /// differently. If the process is interrupted, it has the old or the new name; where the header
    /// has no space for both, see [`change_backing_file`](Self::change_backing_file).
    ///
    /// # Errors
    ///
    /// As [`close`](Self::close) and [`change_backing_file`](Self::change_backing_file). The image
    /// is closed nevertheless.
    pub fn close_with_backing(self, backing: Option<(&OsStr, Format)>) -> Result<()> {
        let named = |error: Error| self.name(error);
        let (Access::ReadWrite, Some(image)) = (self.access, self.qcow2()) else {
            let detail = "it is not a qcow2 image that was opened for writing";
            let what = "change the backing file of";
            return Err(named(Error::new(ErrorKind::Unsupported, what, detail)));
        };
        image.close().and_then(|()| image.rename_backing(backing)).map_err(named)
    }
}
