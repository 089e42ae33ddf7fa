//! VHDX, the format of Hyper-V (MS-VHDX, version 1): fixed, dynamic and differencing images.
//!
//! A table has 8 bytes for each block of the disk: bits 0 to 2 its state, bits 20 to 63 its place
//! in the file in MiB. After the blocks of each chunk, which are 2^23 sectors, it has an entry for
//! the bitmap of the chunk: a bit for each sector, 1 if the image has it, and 0 if its parent does.

mod crc32c;
mod header;
mod log;
mod metadata;
mod new;
mod overlay;

use std::path::Path;
use std::sync::Arc;

use self::header::{Header, MIB, Regions};
use self::metadata::Metadata;
pub(super) use self::new::plan;
use super::blocks::{BlockImage, Blocks, Piece, Place};
use super::file::{Cursor, ImageFile};
use super::foreign::{ForeignImage, Identity, Opening, Parent};
use crate::error::Result;
use crate::foreign_info::{FormatDetails, ImageKind, VhdxInfo};
use crate::storage::Storage;

const SIGNATURE: &[u8] = b"vhdxfile";

/// The sectors that a bitmap covers, and its length in bytes.
const CHUNK_SECTORS: u64 = 1 << 23;
const BITMAP_LENGTH: u64 = CHUNK_SECTORS / 8;

/// Most words of a bitmap that are looked at for one piece.
const WORDS_MAX: usize = 64;

/// The states of a block.
mod state {
    pub(super) const NOT_PRESENT: u64 = 0;
    pub(super) const UNDEFINED: u64 = 1;
    pub(super) const ZERO: u64 = 2;
    pub(super) const UNMAPPED: u64 = 3;
    /// The same in version 0.95 of the specification.
    pub(super) const UNMAPPED_095: u64 = 5;
    /// Of a bitmap, too: it is there.
    pub(super) const FULLY_PRESENT: u64 = 6;
    pub(super) const PARTIALLY_PRESENT: u64 = 7;
}

/// Whether a file that begins so is an image.
pub(super) fn starts(start: &[u8]) -> bool {
    start.starts_with(SIGNATURE)
}

pub(super) fn open(opening: Opening<'_>) -> Result<Box<dyn ForeignImage>> {
    let file = ImageFile::new(opening.storage, opening.path)?;
    if !starts(&file.start()?) {
        return Err(file.invalid("it does not begin as a VHDX image"));
    }
    let header = Header::read(&file)?;
    let file = match log::replay(&header, &file)? {
        Some(overlay) => ImageFile::new(Arc::new(overlay), opening.path)?,
        None => file,
    };
    Ok(BlockImage::boxed(Vhdx::open(file, &header)?))
}

/// Makes the changes that the log of an image holds, and says in its headers that it holds none;
/// returns whether it held any. An interruption at any time leaves an image with the same disk.
pub(crate) fn replay_log(storage: &Arc<dyn Storage>, path: Option<&Path>) -> Result<bool> {
    let file = ImageFile::new(Arc::clone(storage), path)?;
    if !starts(&file.start()?) {
        return Err(file.invalid("it does not begin as a VHDX image"));
    }
    let header = Header::read(&file)?;
    let Some(overlay) = log::replay(&header, &file)? else { return Ok(false) };
    let overlay = Arc::new(overlay);
    // What cannot be read with the changes stays as it is.
    Vhdx::open(ImageFile::new(Arc::clone(&overlay) as Arc<dyn Storage>, path)?, &header)?;
    overlay.write_out().map_err(|error| file.io("write the changes of the log to", error, 0))?;
    Header::clear_log(&file)?;
    Ok(true)
}

/// An open image.
#[derive(Debug)]
struct Vhdx {
    file: ImageFile,
    metadata: Metadata,
    /// Where the table of blocks is.
    bat: u64,
    /// How many blocks there are before each entry for a bitmap.
    chunk_ratio: u64,
    identity: Identity,
    log_is_in_use: bool,
    log_size: u64,
}

impl Vhdx {
    fn open(file: ImageFile, header: &Header) -> Result<Self> {
        let regions = Regions::read(&file)?;
        let metadata = Metadata::read(regions.metadata, &file)?;
        let chunk_ratio = CHUNK_SECTORS * metadata.sector / metadata.block_size;
        let blocks = metadata.size.div_ceil(metadata.block_size);
        let entries = match metadata.parent {
            Some(_) => blocks.div_ceil(chunk_ratio) * (chunk_ratio + 1),
            None => blocks + blocks.saturating_sub(1) / chunk_ratio,
        };
        if regions.bat.length / 8 < entries {
            return Err(file.invalid("its table of blocks is too short for its disk"));
        }
        let identity = Identity(header.data_write);
        Ok(Self {
            file,
            metadata,
            bat: regions.bat.offset,
            chunk_ratio,
            identity,
            log_is_in_use: header.log.is_some(),
            log_size: header.log_length,
        })
    }

    /// The entry of the table with a number: the state, and where in the file.
    fn entry(
        &self,
        cursor: &mut Cursor<'_>,
        number: u64,
        guest: u64,
    ) -> Result<Option<(u64, u64)>> {
        let entry = cursor.u64_le(self.bat + number * 8, guest)?;
        // 44 bits of MiB fit into 64.
        Ok(entry.map(|entry| (entry & 7, (entry >> 20) * MIB)))
    }

    /// What there is from an offset of a block on that only has some of its sectors; it lies at
    /// `place` of the file.
    fn find_sectors(
        &self,
        cursor: &mut Cursor<'_>,
        place: u64,
        guest: u64,
    ) -> Result<Option<Piece>> {
        let Metadata { block_size, sector, .. } = self.metadata;
        let chunk = guest / block_size / self.chunk_ratio;
        let number = chunk * (self.chunk_ratio + 1) + self.chunk_ratio;
        let Some((state, bitmap)) = self.entry(cursor, number, guest)? else { return Ok(None) };
        if state != state::FULLY_PRESENT || !self.file.has(bitmap, BITMAP_LENGTH) {
            return Err(self
                .file
                .corrupt("a block has only some of its sectors, and no bitmap", guest));
        }
        let first = guest / sector % CHUNK_SECTORS;
        let mut is_present = None;
        let mut count = 0;
        for word in (first / 64..CHUNK_SECTORS / 64).take(WORDS_MAX) {
            let Some(bits) = cursor.u64_le(bitmap + word * 8, guest)? else { return Ok(None) };
            let skipped = if count == 0 { first % 64 } else { 0 };
            let bits = bits >> skipped;
            let is_set = *is_present.get_or_insert(bits & 1 == 1);
            let same = if is_set { bits.trailing_ones() } else { bits.trailing_zeros() };
            // Zeroes were shifted in above.
            let same = u64::from(same).min(64 - skipped);
            count += same;
            if skipped + same < 64 {
                break;
            }
        }
        let length = (count * sector - guest % sector).min(block_size - guest % block_size);
        let place = match is_present {
            Some(true) => Place::Stored(place.saturating_add(guest % block_size)),
            _ => Place::Absent,
        };
        Ok(Some(Piece { length, place }))
    }
}

impl Blocks for Vhdx {
    fn size(&self) -> u64 {
        self.metadata.size
    }

    fn file(&self) -> &ImageFile {
        &self.file
    }

    fn find(&self, cursor: &mut Cursor<'_>, guest: u64) -> Result<Option<Piece>> {
        let block_size = self.metadata.block_size;
        let (block, within) = (guest / block_size, guest % block_size);
        let number = block + block / self.chunk_ratio;
        let Some((state, place)) = self.entry(cursor, number, guest)? else { return Ok(None) };
        if matches!(state, state::FULLY_PRESENT | state::PARTIALLY_PRESENT) && place < MIB {
            return Err(self.file.corrupt("its table takes the headers for a block", guest));
        }
        let has_parent = self.metadata.parent.is_some();
        let place = match state {
            state::NOT_PRESENT if has_parent => Place::Absent,
            state::NOT_PRESENT | state::UNDEFINED | state::ZERO => Place::Zero,
            state::UNMAPPED | state::UNMAPPED_095 => Place::Zero,
            state::FULLY_PRESENT => Place::Stored(place.saturating_add(within)),
            state::PARTIALLY_PRESENT if has_parent => {
                return self.find_sectors(cursor, place, guest);
            }
            state => {
                let detail = format!("its table has a block of the state {state}");
                return Err(self.file.corrupt(detail, guest));
            }
        };
        Ok(Some(Piece { length: block_size - within, place }))
    }

    fn is_preallocated(&self) -> bool {
        self.metadata.is_fixed
    }

    fn parent(&self) -> Option<&Parent> {
        self.metadata.parent.as_ref()
    }

    fn block_size(&self) -> Option<u64> {
        Some(self.metadata.block_size)
    }

    fn details(&self) -> Option<FormatDetails> {
        let kind = match (&self.metadata.parent, self.metadata.is_fixed) {
            (Some(_), _) => ImageKind::Differencing,
            (None, true) => ImageKind::Fixed,
            (None, false) => ImageKind::Dynamic,
        };
        Some(FormatDetails::Vhdx(VhdxInfo {
            kind,
            logical_sector_size: self.metadata.sector,
            log_is_in_use: self.log_is_in_use,
            log_size: self.log_size,
        }))
    }

    fn identity(&self) -> Option<Identity> {
        Some(self.identity)
    }
}
