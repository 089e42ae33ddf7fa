//! VMDK, the format of VMware ("Virtual Disk Format 5.0"): disks in one file or in several.
//!
//! The disk consists of [extents](descriptor::ExtentLine) that follow each other: files with its
//! bytes as they are, [sparse] ones, and zeroes. A descriptor lists them and names the image below;
//! it is a file of its own, or lies in the only extent.

mod descriptor;
mod esx;
mod grain;
mod new;
mod sparse;
mod split;
mod stream;

use std::collections::HashMap;
use std::ffi::OsString;
use std::io;
use std::path::Path;
use std::sync::Arc;

use self::descriptor::{Descriptor, ExtentKind, ExtentLine, SECTOR, SPARSE};
use self::grain::Grains;
use self::new::SECTORS_MAX;
use self::sparse::{HOSTED_MAGIC, HostedHeader, Lookups, Sparse};
use super::blocks::{Piece, Place, Source, lacks};
use super::file::ImageFile;
use super::foreign::{ForeignImage, Identity, OpenFile, Opening, Parent};
use super::new::{NewForeign, Planned, too_large};
use crate::create_options::invalid;
use crate::error::{Error, ErrorKind, Result};
use crate::foreign_info::{FormatDetails, VmdkExtent, VmdkInfo};
use crate::foreign_options::Subformat;
use crate::layer::{Backing, Layer, Walk};
use crate::mapping::{Encoded, Lookup, Mapped};
use crate::storage::Storage;
use crate::units::{GuestOffset, GuestRange, span};

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(&HOSTED_MAGIC) || is_of_esx(start) || descriptor::starts(start)
}

/// Whether this is a sparse extent of ESX, which only a descriptor makes a disk of.
fn is_of_esx(start: &[u8]) -> bool {
    [esx::COWD_MAGIC, esx::SPACE_EFFICIENT_MAGIC].iter().any(|magic| start.starts_with(magic))
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let Opening { storage, path, files } = opening;
    let file = Arc::new(ImageFile::new(storage, path)?);
    let start = file.start()?;
    if is_of_esx(&start) {
        return Err(file.unsupported(PART));
    }
    if !start.starts_with(&HOSTED_MAGIC) {
        let length = file.len();
        return Ok(Box::new(Vmdk::described(file, (0, length), path, files)?));
    }
    let header = HostedHeader::read(&file)?;
    let Some(place) = header.descriptor() else {
        return Err(file.unsupported(PART));
    };
    if header.capacity() == 0 {
        return Ok(Box::new(Vmdk::described(file, place, path, files)?));
    }
    let mut descriptor = Descriptor::read(place, &file)?;
    if descriptor.extents.len() > 1 {
        return Err(file.unsupported("it names several extents, but lies in one of them"));
    }
    // It names this file, which may be called otherwise now.
    descriptor.extents.clear();
    let sparse = Sparse::hosted(Arc::clone(&file), &header)?;
    let extent = Extent { start: 0, end: sparse.capacity, data: Data::Sparse(Box::new(sparse)) };
    Ok(Box::new(Vmdk::new(file, descriptor, vec![extent])))
}

/// Plans a new image.
pub(super) fn plan(new: &NewForeign<'_>) -> Result<Planned> {
    let size = new.size_in(SECTOR)?;
    let options = new.options;
    let is_flat = options.subformat == Subformat::Fixed;
    let is_single = !is_flat && !options.split_extents;
    if is_single && size / SECTOR > SECTORS_MAX {
        return Err(too_large(size, "VMDK in one file", "2 TiB"));
    }
    if is_flat && (new.parent.is_some() || options.zeroed_grains) {
        return Err(invalid("a flat VMDK has neither a backing file nor zeroed grains"));
    }
    if size == 0 {
        return Err(invalid("a VMDK of 0 bytes is not possible: nothing could open it"));
    }
    match options.subformat {
        Subformat::StreamOptimized if new.parent.is_some() => {
            Err(invalid("a VMDK of compressed grains is made without a backing file"))
        }
        Subformat::StreamOptimized => stream::plan(new, size),
        Subformat::Dynamic if is_single => new::plan(new, size),
        _ => split::plan(new, size),
    }
}

/// An open image.
#[derive(Debug)]
struct Vmdk {
    /// The one with the descriptor.
    file: Arc<ImageFile>,
    /// Its extents are those that are files of their own.
    descriptor: Descriptor,
    backing: Option<Backing>,
    /// In order, and without gaps; at least one.
    extents: Vec<Extent>,
    grains: Grains,
}

/// A part of the disk, with its place on it in bytes.
#[derive(Debug)]
struct Extent {
    start: u64,
    end: u64,
    data: Data,
}

#[derive(Debug)]
enum Data {
    Zero,
    /// The bytes are those of a file, from an offset on.
    Flat(Arc<ImageFile>, u64),
    Sparse(Box<Sparse>),
    /// It cannot be read, for this reason.
    Barred(&'static str),
}

impl Vmdk {
    fn new(file: Arc<ImageFile>, descriptor: Descriptor, extents: Vec<Extent>) -> Self {
        let grains = extents.iter().filter_map(Extent::compressed_grain).max();
        let grains = Grains::new(grains.unwrap_or(1));
        Self { file, descriptor, backing: None, extents, grains }
    }

    /// Opens a disk by the descriptor at a place of a file, an offset and a length, with the
    /// extents that it names.
    fn described(
        file: Arc<ImageFile>,
        place: (u64, u64),
        path: Option<&Path>,
        files: Option<&mut OpenFile<'_>>,
    ) -> Result<Self> {
        let descriptor = Descriptor::read(place, &file)?;
        let mut opener = files.map(|open| ExtentOpener {
            open,
            directory: path.and_then(Path::parent),
            share: descriptor.extents.len(),
            flat: HashMap::new(),
        });
        let mut extents = Vec::with_capacity(descriptor.extents.len());
        let mut start = 0;
        for line in &descriptor.extents {
            let data = match (&mut opener, line.kind) {
                (_, ExtentKind::Zero) => Data::Zero,
                _ if !line.is_accessible => Data::Barred(NO_ACCESS),
                (None, _) => Data::Barred("the files with its data were not opened"),
                (Some(opener), _) => opener.open(line)?,
            };
            let end = line.length.checked_add(start).filter(|end| *end <= i64::MAX as u64);
            let Some(end) = end else { return Err(file.invalid("its extents are too long")) };
            extents.push(Extent { start, end, data });
            start = end;
        }
        if extents.is_empty() {
            return Err(file.invalid("its descriptor names no extent"));
        }
        Ok(Self::new(file, descriptor, extents))
    }

    /// The extents that a part of the disk lies in, with its part in each.
    fn parts(&self, range: GuestRange) -> impl Iterator<Item = (&Extent, GuestRange)> {
        let first = self.extents.partition_point(|extent| extent.end <= range.offset().bytes());
        let parts = self.extents[first..]
            .iter()
            .map(move |extent| (extent, span(extent.start, extent.end).intersection(range)));
        parts.take_while(|(_, part)| !part.is_empty())
    }
}

/// Opens the files of extents.
struct ExtentOpener<'o, 'f> {
    open: &'o mut OpenFile<'f>,
    directory: Option<&'o Path>,
    /// How many extents share the memory for tables.
    share: usize,
    /// Several parts of a disk may lie in one file.
    flat: HashMap<OsString, Arc<ImageFile>>,
}

impl ExtentOpener<'_, '_> {
    fn open(&mut self, line: &ExtentLine) -> Result<Data> {
        let known = line.names.iter().find_map(|name| self.flat.get(name));
        if let (ExtentKind::Flat, Some(file)) = (line.kind, known) {
            return Ok(Data::Flat(Arc::clone(file), line.offset));
        }
        let (name, storage) = self.storage(&line.names)?;
        let path = self.directory.map(|directory| directory.join(&name));
        let file = Arc::new(ImageFile::sharing(storage, path.as_deref(), self.share)?);
        if line.kind == ExtentKind::Flat {
            self.flat.insert(name, Arc::clone(&file));
            return Ok(Data::Flat(file, line.offset));
        }
        let sparse = open_sparse(file)?;
        if sparse.capacity < line.length {
            let detail = "it is shorter than the descriptor of its disk says";
            return Err(sparse.file.invalid(detail));
        }
        Ok(Data::Sparse(Box::new(sparse)))
    }

    /// Opens the first of the names that there is something for, or else says what is wrong with
    /// the first.
    fn storage(&mut self, names: &[OsString]) -> Result<(OsString, Arc<dyn Storage>)> {
        let mut first_error = None;
        for name in names {
            match (self.open)(name) {
                Ok(storage) => return Ok((name.clone(), storage)),
                Err(error) => _ = first_error.get_or_insert(error),
            }
        }
        let nameless = || Error::new(ErrorKind::InvalidFormat, "open", "an extent has no name");
        Err(first_error.unwrap_or_else(nameless))
    }
}

/// Opens a sparse extent of the kind that it begins as.
fn open_sparse(file: Arc<ImageFile>) -> Result<Sparse> {
    let start = file.start()?;
    if start.starts_with(&HOSTED_MAGIC) {
        let header = HostedHeader::read(&file)?;
        Sparse::hosted(file, &header)
    } else if start.starts_with(esx::COWD_MAGIC) {
        esx::cowd(file)
    } else if start.starts_with(esx::SPACE_EFFICIENT_MAGIC) {
        esx::space_efficient(file)
    } else {
        Err(file.invalid("it has none of the headers that sparse extents have"))
    }
}

impl Extent {
    /// The file with the data of this part of the disk, if it has any.
    fn file(&self) -> Option<&ImageFile> {
        match &self.data {
            Data::Zero | Data::Barred(_) => None,
            Data::Flat(file, _) => Some(file),
            Data::Sparse(sparse) => Some(&sparse.file),
        }
    }

    /// The size of its grains in bytes, if it has any.
    fn grain(&self) -> Option<u64> {
        match &self.data {
            Data::Sparse(sparse) => Some(sparse.grain),
            Data::Zero | Data::Flat(..) | Data::Barred(_) => None,
        }
    }

    /// The size of its grains in bytes, if they are compressed.
    fn compressed_grain(&self) -> Option<u64> {
        match &self.data {
            Data::Sparse(sparse) if sparse.is_compressed() => Some(sparse.grain),
            _ => None,
        }
    }

    /// What there is from an offset of the disk on.
    fn find(&self, lookups: &mut Lookups<'_>, guest: u64) -> Result<Option<Piece>> {
        let offset = guest - self.start;
        let all = |place| Ok(Some(Piece { length: self.end - guest, place }));
        match &self.data {
            Data::Zero => all(Place::Zero),
            Data::Flat(_, start) => all(Place::Stored(start.saturating_add(offset))),
            Data::Sparse(sparse) => sparse.find(lookups, offset, guest),
            Data::Barred(why) => Err(Error::new(ErrorKind::Unsupported, "read", *why).at(guest)),
        }
    }
}

impl Layer for Vmdk {
    fn size(&self) -> u64 {
        self.extents.last().map_or(0, |extent| extent.end)
    }

    fn map(&self, range: GuestRange, walk: &mut Walk<'_>) -> Result<Mapped> {
        for (extent, part) in self.parts(range) {
            let file = extent.file().unwrap_or(&self.file);
            let source = Source {
                layer: self,
                file,
                backing: self.backing.as_ref(),
                is_preallocated: matches!(extent.data, Data::Flat(..)),
            };
            let mut lookups = Lookups::new(file, walk.lookup);
            let mapped = source.map(part, walk, |guest| extent.find(&mut lookups, guest))?;
            if mapped != Mapped::Complete {
                return Ok(mapped);
            }
            if walk.is_tired() && part.end() < range.end() {
                return Ok(Mapped::Partial);
            }
        }
        Ok(Mapped::Complete)
    }

    fn decode(&self, encoded: Encoded, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let guest = offset.bytes();
        let part = self.parts(span(guest, guest + buffer.len() as u64)).next();
        match part.map(|(extent, _)| (&extent.data, guest - extent.start)) {
            Some((Data::Sparse(sparse), offset)) => {
                self.grains.read(sparse, encoded, (offset, guest), buffer)
            }
            _ => Err(self.file.corrupt("only grains of sparse extents are compressed", guest)),
        }
    }

    fn lacks(&self, range: GuestRange, lookup: Lookup) -> Result<Option<bool>> {
        for (extent, part) in self.parts(range) {
            let file = extent.file().unwrap_or(&self.file);
            let mut lookups = Lookups::new(file, lookup);
            match lacks(part, |guest| extent.find(&mut lookups, guest))? {
                Some(true) => {}
                other => return Ok(other),
            }
        }
        Ok(Some(true))
    }

    fn backing(&self) -> Option<&Backing> {
        self.backing.as_ref()
    }

    fn io_error(&self, operation: &'static str, error: io::Error, offset: GuestOffset) -> Error {
        let at = offset.bytes();
        let part = self.parts(span(at, at + 1)).next();
        let file = part.and_then(|(extent, _)| extent.file()).unwrap_or(&self.file);
        file.io(operation, error, at)
    }
}

impl ForeignImage for Vmdk {
    fn parent(&self) -> Option<&Parent> {
        self.descriptor.parent.as_ref()
    }

    fn attach_parent(&mut self, parent: Arc<dyn Layer>) {
        self.backing = Some(Backing::new(parent));
    }

    fn identity(&self) -> Option<Identity> {
        self.descriptor.identity
    }

    /// As in QEMU, none if the grains of its extents differ, or there are none.
    fn block_size(&self) -> Option<u64> {
        let mut grains = self.extents.iter().map(Extent::grain);
        let first = grains.next()??;
        grains.all(|grain| grain == Some(first)).then_some(first)
    }

    fn details(&self) -> Option<FormatDetails> {
        let descriptor = &self.descriptor;
        let lines = descriptor.extents.iter().map(Some).chain(std::iter::repeat(None));
        let extents = self.extents.iter().zip(lines).map(|(extent, line)| VmdkExtent {
            file: line.and_then(|line| line.names.first().cloned()),
            kind: line.map_or(SPARSE, |line| line.word),
            size: extent.end - extent.start,
            grain_size: extent.grain(),
            is_compressed: extent.compressed_grain().is_some(),
        });
        Some(FormatDetails::Vmdk(VmdkInfo {
            create_type: descriptor.create_type.clone(),
            cid: descriptor.cid,
            parent_cid: descriptor.parent_cid,
            extents: extents.collect(),
        }))
    }
}

const PART: &str = "it holds a part of a disk, or what changed since another one: open the descriptor \
                    that names it, a text file whose name ends with .vmdk";

const NO_ACCESS: &str = "the descriptor of the disk allows no access to this part of it";
