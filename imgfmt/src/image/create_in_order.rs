//! Creates images in storages that can only be appended to.

use std::path::Path;
use std::sync::Arc;

use super::Image;
use super::create_foreign::plan_foreign;
use crate::access::Access;
use crate::cache_mode::CacheMode;
use crate::create_options::{CreateOptions, Preallocation, invalid};
use crate::driver::{Chain, Driver, Layers, NewImage};
use crate::error::{Error, ErrorKind, Result};
use crate::format::Format;
use crate::formats::{DiskInOrder, InOrder, OTHER_FORMATS};
use crate::layer::WritableLayer;
use crate::storage::Storage;

/// In descriptors, where the caller gives no name.
const NAME: &str = "disk";

impl Image {
    /// Creates an image in an empty storage to which data is only appended, such as a pipe: a raw
    /// disk, a fixed VHD, or a VMDK of [compressed grains](crate::Subformat::StreamOptimized). Of
    /// `storage` only [`write_at`](Storage::write_at) is called, each time at its end, and
    /// [`sync`](Storage::sync).
    ///
    /// The image is filled from the start to the end, as [`convert`](crate::jobs::convert()) does,
    /// and is complete only when it is [closed](Self::close). It cannot be read. If it is dropped
    /// before, a VMDK is completed as well, unless a call has failed: let the storage refuse writes
    /// if it must not be.
    ///
    /// # Errors
    ///
    /// `InvalidInput` for options that contradict each other or the format, or that need a file;
    /// `Unsupported` for other formats; `Io`.
    pub fn create_in_order(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Self> {
        let image = begin(storage, options)?;
        let top = Driver::New(NewImage { format: options.format, image });
        let (below, files, others, opened) = Default::default();
        let chain = Chain::new(top, Layers { below, files, others, opened });
        let (access, cache) = (Access::ReadWrite, CacheMode::Unsafe);
        Ok(Self { chain, path: None, access, cache, direct: None })
    }
}

fn begin(storage: Arc<dyn Storage>, options: &CreateOptions) -> Result<Box<dyn WritableLayer>> {
    if options.preallocation != Preallocation::Off {
        return Err(invalid("space can be set aside in files only"));
    }
    match options.format {
        Format::Raw => {
            if options.backing.is_some()
                || options.data_file.is_some()
                || options.encryption.is_some()
            {
                let detail = "a raw disk has no backing file, no data file and no encryption";
                return Err(invalid(detail));
            }
            let Some(size) = options.size else { return Err(invalid("a size is needed")) };
            Ok(DiskInOrder::boxed(storage, size, Vec::new()))
        }
        Format::Qcow2 | Format::Luks => Err(cannot(options.format, OTHER_FORMATS)),
        format => {
            let planned = plan_foreign(Path::new(NAME), options, None)?;
            match planned.in_order {
                InOrder::No(instead) => Err(cannot(format, instead)),
                InOrder::Always => (planned.begin)(storage, Vec::new(), options.give_up),
                InOrder::Disk(ending) => Ok(DiskInOrder::boxed(storage, planned.size, ending)),
            }
        }
    }
}

fn cannot(format: Format, instead: &str) -> Error {
    let what = format.description();
    let detail = format!(
        "a {what} image of this kind is not written from the start to the end, as a pipe needs it; {instead}"
    );
    Error::new(ErrorKind::Unsupported, "create", detail)
}
