//! Creating images of other programs' formats.

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::Image;
use super::new_files::{NewFiles, open_below, open_to_write, refuse_contradicting_encryption};
use crate::access::Access;
use crate::cache_mode::CacheMode;
use crate::create_options::{CreateOptions, Preallocation, invalid};
use crate::driver::{BackingLayer, Chain, Driver, Layers, NamedFile, NewImage};
use crate::error::{Error, ErrorKind, Result};
use crate::foreign_options::Subformat;
use crate::format::Format;
use crate::formats::{self, Extents, NewForeign, NewParent, Planned};
use crate::layer::WritableLayer;
use crate::options::OpenOptions;
use crate::storage::{DirectAlignment, Storage as _};

/// Makes new files of another program's format, which are an image when it is closed.
pub(super) fn create_foreign(
    path: &Path,
    options: &CreateOptions,
    open: &OpenOptions,
) -> Result<Image> {
    let named = |error: Error| error.with_path(path);
    let syncs = open.cache != CacheMode::Unsafe;
    let below = below(path, options).map_err(named)?;
    let parent = below.first().zip(options.backing.as_ref()).map(|(layer, (name, _))| NewParent {
        name: name.clone(),
        layer: layer.layer(),
        identity: layer.identity(),
    });
    let mut planned = plan_foreign(path, options, parent).map_err(named)?;
    let mut new = Files { made: NewFiles::new(false), files: Vec::new(), options, open };
    // The name is taken first, and the file filled last.
    new.made.create(path, |_| Ok(()))?;
    let mut extents = Vec::new();
    for (name, extent) in std::mem::take(&mut planned.extents) {
        let path = beside(path, &name, options);
        new.made.create(&path, |_| Ok(()))?;
        extents.push(new.begin(&path, extent, Vec::new())?.0);
    }
    let (image, direct) = new.begin(path, planned, extents)?;
    // Others are complete, and readable, only when they are closed.
    if syncs && image.filled_in_order().is_none() {
        image.flush().map_err(named)?;
    }
    let top = Driver::New(NewImage { format: options.format, image });
    let Files { made, mut files, .. } = new;
    // The image's own is the first.
    files.rotate_right(1);
    let (others, opened) = Default::default();
    let chain = Chain::new(top, Layers { below, files, others, opened });
    let cache = open.cache;
    let image = Image { chain, path: Some(path.into()), access: Access::ReadWrite, cache, direct };
    if (options.give_up)() {
        return Err(named(Error::new(ErrorKind::Io, "create", "it was given up")));
    }
    if syncs {
        made.sync_names()?;
    }
    made.keep();
    Ok(image)
}

/// The files of a new image. Their contents are put on stable storage when there are any.
struct Files<'o> {
    made: NewFiles,
    files: Vec<NamedFile>,
    options: &'o CreateOptions,
    open: &'o OpenOptions,
}

impl Files<'_> {
    /// Begins an image or an extent in a new file.
    fn begin(
        &mut self,
        path: &Path,
        planned: Planned,
        extents: Extents,
    ) -> Result<(Box<dyn WritableLayer>, Option<DirectAlignment>)> {
        let storage = Arc::new(self.open.open_file(path, Access::ReadWrite)?);
        let direct = storage.direct_alignment();
        let identity = storage.identity();
        self.files.extend(identity.map(|identity| NamedFile {
            layer: 0,
            path: path.to_owned(),
            identity,
        }));
        let length = (planned.length)(0);
        let has_data = extents.is_empty();
        let image = (planned.begin)(storage, extents, self.options.give_up);
        let image = image.map_err(|error| error.with_path(path))?;
        if self.options.preallocation != Preallocation::Off && has_data {
            set_space_aside_for(path, length)?;
        }
        Ok((image, direct))
    }
}

/// The path of another file of an image, which is to be called `name` in the end.
fn beside(path: &Path, name: &OsStr, options: &CreateOptions) -> PathBuf {
    let own = path.file_name().unwrap_or_default().as_bytes();
    let finally = options.foreign.final_name.as_deref().unwrap_or_default().as_bytes();
    let mut name = name.to_owned();
    if let Some(ending) = own.strip_prefix(finally).filter(|_| !finally.is_empty()) {
        name.push(OsStr::from_bytes(ending));
    }
    path.with_file_name(name)
}

/// The layers below a new image.
fn below(path: &Path, options: &CreateOptions) -> Result<Vec<BackingLayer>> {
    let Some((name, format)) = &options.backing else { return Ok(Vec::new()) };
    let what = options.format.description();
    if options.format != Format::Vmdk {
        return Err(invalid(format!("a new {what} image has no backing file")));
    }
    if *format != Format::Vmdk {
        let detail =
            format!("the backing file of a VMDK is a VMDK, and not of the format {format}");
        return Err(invalid(detail));
    }
    let chain = open_below(path, name, *format, options)?;
    let layers = chain.layers();
    let first = BackingLayer::from(chain.top);
    Ok(std::iter::once(first).chain(layers.below.iter().cloned()).collect())
}

/// Plans a new image of another program's format, as far as that is possible with these options.
pub(crate) fn plan_foreign(
    path: &Path,
    options: &CreateOptions,
    parent: Option<NewParent>,
) -> Result<Planned> {
    let what = options.format.description();
    let Some(plan) = formats::entry(options.format).and_then(|entry| entry.plan) else {
        let detail = format!("{what} images cannot be made; make a qcow2 image");
        return Err(Error::new(ErrorKind::Unsupported, "create", detail));
    };
    if options.backing.is_some() != parent.is_some() || options.data_file.is_some() {
        let detail = format!("a new {what} image has neither a backing file nor a data file");
        return Err(invalid(detail));
    }
    refuse_contradicting_encryption(options)?;
    let Some(size) = options.size.or_else(|| parent.as_ref().map(|parent| parent.layer.size()))
    else {
        return Err(invalid("a size is needed where no backing file has one"));
    };
    let is_fixed = options.foreign.subformat == Subformat::Fixed;
    match options.preallocation {
        Preallocation::Off => {}
        Preallocation::Falloc if is_fixed => {}
        Preallocation::Falloc => {
            let detail = format!("space can be set aside for fixed {what} images only");
            return Err(invalid(detail));
        }
        Preallocation::Metadata | Preallocation::Full => {
            let detail = format!(
                "this preallocation is not possible for {what} images; make a fixed one, for which \
                 space can be set aside (falloc)"
            );
            return Err(invalid(detail));
        }
    }
    let name = path.file_name().unwrap_or_default().to_owned();
    plan(&NewForeign { size, name, options: &options.foreign, parent })
}

/// Makes the file system allocate the space of a file that will have this length.
fn set_space_aside_for(path: &Path, length: u64) -> Result<()> {
    let set_aside = open_to_write(path).and_then(|file| {
        rustix::fs::fallocate(&file, rustix::fs::FallocateFlags::empty(), 0, length.max(1))
    });
    set_aside.map_err(|error| Error::from_io("set space aside for", error.into()).with_path(path))
}
