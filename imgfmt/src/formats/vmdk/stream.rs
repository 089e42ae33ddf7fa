//! New VMDK images whose grains are compressed (`streamOptimized`), as archives (OVA) contain them.
//!
//! The file is written once from the start to the end: header, descriptor, the grains in the order
//! of the disk, each table behind its grains, the directory, a copy of the header that says where
//! that is, and the mark of the end. What is not a grain has a marker of a sector before it:
//!
//! | offset | size | field, little-endian |
//! | ---: | ---: | --- |
//! | 0 | 8 | length of what follows, in sectors |
//! | 8 | 4 | 0: it is not a grain |
//! | 12 | 4 | 0 the end, 1 a table, 2 the directory, 3 the footer |
//!
//! An image without a grain, as `create` makes it, has its directory and all its tables at the
//! start, without markers. QEMU writes into such images, and takes sector 0 for a grain whose table
//! is missing; a directory at the end would not be found behind what it appends.

use std::io;
use std::sync::Arc;

use super::descriptor::SECTOR;
use super::new::{
    DESCRIPTOR, DESCRIPTOR_SECTORS, GRAIN, Header, SECTORS_MAX, TABLE_GRAINS, descriptor,
    directory_of, extent_line, fits,
};
use super::sparse::{DIRECTORY_AT_END, MARKER_LENGTH};
use crate::error::{Error, ErrorKind, Result};
use crate::formats::new::{InOrder, NewForeign, Planned};
use crate::layer::{FilledInOrder, Layer, Walk, WritableLayer};
use crate::mapping::Mapped;
use crate::ordered_lock::{OrderedMutex, rank};
use crate::storage::{Capabilities, Durability, Speed, Storage, TryWrite, ZeroMode};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// Where the grains begin, in bytes.
const DATA: u64 = 64 << 10;

/// Version 3, whose grains are compressed and have markers.
const VERSION: u32 = 3;
const FLAGS: u32 = 1 | 1 << 16 | 1 << 17;

/// Where the last grain begins at most: tables name sectors with 32 bits, and are behind their
/// grains.
const END_MAX: u64 = SECTORS_MAX * SECTOR - (1 << 30);

/// What a marker announces.
#[derive(Clone, Copy)]
enum Marker {
    End = 0,
    Table = 1,
    Directory = 2,
    Footer = 3,
}

pub(super) fn plan(new: &NewForeign<'_>, size: u64) -> Result<Planned> {
    let tables = size.div_ceil(GRAIN * TABLE_GRAINS);
    let mut header = Header::new(size, VERSION);
    header.set_flags(FLAGS);
    header.set_compressed();
    let text = descriptor(new, size, "streamOptimized", &extent_line(new, size))?;
    fits(&text)?;
    let directory = (tables * 4).next_multiple_of(SECTOR);
    // What compression saves is not known in advance.
    let length = move |count| {
        let tables_length = tables * (SECTOR + TABLE_GRAINS * 4);
        DATA + count * (GRAIN + SECTOR) + tables_length + directory + 4 * SECTOR
    };
    let begin =
        move |storage, _, _: fn() -> bool| Ok(Stream::begin(storage, size, header, text) as _);
    let (length, begin) = (Box::new(length), Box::new(begin));
    let (in_order, extents) = (InOrder::Always, Vec::new());
    Ok(Planned { size, block_size: GRAIN, length, in_order, extents, begin })
}

/// A new image that is written from the start to the end.
#[derive(Debug)]
struct Stream {
    storage: Arc<dyn Storage>,
    size: u64,
    header: Header,
    descriptor: Vec<u8>,
    written: OrderedMutex<{ rank::NEW_IMAGE }, Written>,
}

#[derive(Debug)]
struct Written {
    /// The length of the file in bytes: 0 until there is a grain, or that none comes is known.
    end: u64,
    /// No grain before this one can be written any more.
    next: u64,
    /// The sectors of the grains of the table that `next` belongs to.
    table: Vec<u32>,
    /// The sectors of the tables.
    directory: Vec<u32>,
    is_finished: bool,
    /// Whether an operation has failed: data is then missing that its user wanted to write.
    has_failed: bool,
}

impl Stream {
    fn begin(
        storage: Arc<dyn Storage>,
        size: u64,
        header: Header,
        descriptor: Vec<u8>,
    ) -> Box<Self> {
        let written = Written {
            end: 0,
            next: 0,
            table: Vec::new(),
            directory: vec![0; size.div_ceil(GRAIN * TABLE_GRAINS) as usize],
            is_finished: false,
            has_failed: false,
        };
        Box::new(Self { storage, size, header, descriptor, written: OrderedMutex::new(written) })
    }

    /// The header and the descriptor, with the sector of the directory and where grains begin.
    fn start(&self, directory: u64, data: u64) -> Vec<u8> {
        let mut header = Header(self.header.0.clone());
        header.set_places(None, directory, data / SECTOR);
        let mut start = header.0;
        start.extend_from_slice(&self.descriptor);
        start.resize(((DESCRIPTOR + DESCRIPTOR_SECTORS) * SECTOR) as usize, 0);
        start
    }

    /// Writes at the end; returns the sector. After an error, the end is where it was.
    fn push(&self, written: &mut Written, bytes: &[u8]) -> io::Result<u32> {
        let sector = written.end / SECTOR;
        let padding = bytes.len().next_multiple_of(SECTOR as usize) - bytes.len();
        let padded = match padding {
            0 => None,
            _ => Some([bytes, &vec![0; padding]].concat()),
        };
        let bytes = padded.as_deref().unwrap_or(bytes);
        self.storage.write_at(HostOffset::new(written.end), bytes, Durability::Cached)?;
        written.end += bytes.len() as u64;
        Ok(sector as u32)
    }

    /// Writes a marker and what it announces; returns the sector of the latter.
    fn push_marked(&self, written: &mut Written, marker: Marker, bytes: &[u8]) -> io::Result<u32> {
        let mut marked = vec![0; SECTOR as usize];
        let length = (bytes.len() as u64).div_ceil(SECTOR);
        marked[..8].copy_from_slice(&length.to_le_bytes());
        marked[12..16].copy_from_slice(&(marker as u32).to_le_bytes());
        marked.extend_from_slice(bytes);
        Ok(self.push(written, &marked)? + 1)
    }

    /// Writes the table of the grains before `next`, if there is any in it.
    fn end_table(&self, written: &mut Written) -> io::Result<()> {
        if written.table.is_empty() {
            return Ok(());
        }
        let mut table = written.table.clone();
        table.resize(TABLE_GRAINS as usize, 0);
        let sector = self.push_marked(written, Marker::Table, &in_bytes(&table))?;
        let number = (written.next - 1) / TABLE_GRAINS;
        if let Some(entry) = written.directory.get_mut(number as usize) {
            *entry = sector;
        }
        // Until here it can be done again.
        written.table.clear();
        Ok(())
    }

    /// Writes a grain that was encoded.
    fn push_grain(&self, written: &mut Written, grain: u64, encoded: &[u8]) -> io::Result<()> {
        if written.next > 0 && grain / TABLE_GRAINS != (written.next - 1) / TABLE_GRAINS {
            self.end_table(written)?;
        }
        let sector = self.push(written, encoded)?;
        written.table.resize((grain % TABLE_GRAINS) as usize, 0);
        written.table.push(sector);
        written.next = grain + 1;
        Ok(())
    }

    fn finish(&self) -> io::Result<()> {
        let mut written = self.written.lock();
        if written.is_finished {
            return Ok(());
        }
        self.end_table(&mut written)?;
        let end = written.end;
        let finished = match end {
            0 => self.push_empty(&mut written),
            _ => self.push_end(&mut written),
        };
        match finished {
            Ok(()) => written.is_finished = true,
            // So that it can be done again.
            Err(_) => written.end = end,
        }
        finished
    }

    /// Writes an image without grains.
    fn push_empty(&self, written: &mut Written) -> io::Result<()> {
        let place = DESCRIPTOR + DESCRIPTOR_SECTORS;
        let count = written.directory.len() as u64;
        let tables = place + (count * 4).div_ceil(SECTOR);
        let data = (tables * SECTOR + count * TABLE_GRAINS * 4).next_multiple_of(GRAIN);
        let mut start = self.start(place, data);
        start.extend(directory_of(tables, count));
        self.push(written, &start)?;
        let zeroes = vec![0; GRAIN as usize];
        while written.end < data {
            let length = (data - written.end).min(GRAIN);
            self.push(written, &zeroes[..length as usize])?;
        }
        Ok(())
    }

    /// Writes what is behind the last table.
    fn push_end(&self, written: &mut Written) -> io::Result<()> {
        let directory = in_bytes(&written.directory);
        let sector = self.push_marked(written, Marker::Directory, &directory)?;
        let mut footer = Header(self.header.0.clone());
        footer.set_places(None, sector.into(), DATA / SECTOR);
        self.push_marked(written, Marker::Footer, &footer.0)?;
        self.push_marked(written, Marker::End, &[])?;
        Ok(())
    }

    /// Appends a grain; after an error this can be repeated.
    fn append_grain(&self, offset: GuestOffset, encoded: &[u8]) -> Result<()> {
        let mut written = self.written.lock();
        let grain = offset.bytes() / GRAIN;
        if grain < written.next || written.is_finished {
            return Err(out_of_order(offset));
        }
        if written.end > END_MAX {
            let detail = "the file would become larger than its format allows";
            return Err(Error::new(ErrorKind::NoSpace, "write to", detail));
        }
        let started = match written.end {
            0 => {
                let mut start = self.start(DIRECTORY_AT_END, DATA);
                start.resize(DATA as usize, 0);
                self.push(&mut written, &start).map(drop)
            }
            _ => Ok(()),
        };
        started
            .and_then(|()| self.push_grain(&mut written, grain, encoded))
            .map_err(io)
            .map_err(|error| error.at(offset.bytes()))
    }

    /// Appends the grains that are not zero.
    fn append_all(&self, offset: GuestOffset, data: &[u8]) -> Result<()> {
        let (start, end) = (offset.bytes(), offset.bytes() + data.len() as u64);
        if start % GRAIN != 0 || end % GRAIN != 0 && end != self.size {
            return Err(out_of_order(offset));
        }
        for (grain, data) in (start / GRAIN..).zip(data.chunks(GRAIN as usize)) {
            if !crate::zero::is_zero(data) {
                self.append_grain(GuestOffset::new(grain * GRAIN), &encode(grain, data)?)?;
            }
        }
        Ok(())
    }

    /// Notes an error: without [`close`](WritableLayer::close), the file then remains incomplete.
    fn noted<T>(&self, result: Result<T>) -> Result<T> {
        if result.is_err() {
            self.written.lock().has_failed = true;
        }
        result
    }
}

fn in_bytes(sectors: &[u32]) -> Vec<u8> {
    sectors.iter().flat_map(|sector| sector.to_le_bytes()).collect()
}

/// A grain with its marker, compressed.
fn encode(grain: u64, data: &[u8]) -> Result<Vec<u8>> {
    // The last one is as long as the others.
    let padded = (data.len() < GRAIN as usize).then(|| {
        let mut padded = data.to_vec();
        padded.resize(GRAIN as usize, 0);
        padded
    });
    let data = padded.as_deref().unwrap_or(data);
    let mut deflater = flate2::Compress::new(flate2::Compression::default(), true);
    let mut encoded = vec![0; MARKER_LENGTH + 2 * GRAIN as usize];
    let finished =
        deflater.compress(data, &mut encoded[MARKER_LENGTH..], flate2::FlushCompress::Finish);
    if !matches!(finished, Ok(flate2::Status::StreamEnd)) {
        let detail = "a grain could not be compressed";
        return Err(Error::new(ErrorKind::Io, "write to", detail).at(grain * GRAIN));
    }
    let length = deflater.total_out();
    encoded[..8].copy_from_slice(&(grain * GRAIN / SECTOR).to_le_bytes());
    encoded[8..MARKER_LENGTH].copy_from_slice(&(length as u32).to_le_bytes());
    encoded.truncate(MARKER_LENGTH + length as usize);
    Ok(encoded)
}

impl Layer for Stream {
    fn size(&self) -> u64 {
        self.size
    }

    fn map(&self, range: GuestRange, _: &mut Walk<'_>) -> Result<Mapped> {
        let detail = "an image of compressed grains is read when it is complete";
        Err(Error::new(ErrorKind::Unsupported, "read", detail).at(range.offset().bytes()))
    }
}

impl FilledInOrder for Stream {
    fn unit(&self) -> u64 {
        GRAIN
    }

    fn encode(&self, offset: GuestOffset, data: &[u8]) -> Result<Vec<u8>> {
        self.noted(encode(offset.bytes() / GRAIN, data))
    }

    fn append(&self, offset: GuestOffset, encoded: &[u8]) -> Result<()> {
        self.noted(self.append_grain(offset, encoded))
    }
}

impl WritableLayer for Stream {
    fn capabilities(&self) -> Capabilities {
        let preferred_size = GRAIN as u32;
        Capabilities { minimum_size: preferred_size, preferred_size, ..Capabilities::default() }
    }

    fn filled_in_order(&self) -> Option<&dyn FilledInOrder> {
        Some(self)
    }

    fn write_at(&self, offset: GuestOffset, data: &[u8], durability: Durability) -> Result<()> {
        self.noted(self.append_all(offset, data))?;
        self.flush_if(durability)
    }

    fn try_write_at(&self, _: GuestOffset, _: &[u8]) -> Result<TryWrite> {
        Ok(TryWrite::WouldBlock)
    }

    fn write_zeroes(&self, range: GuestRange, _: ZeroMode, _: Speed) -> Result<()> {
        // What is not written is zero.
        let is_behind = range.offset().bytes() >= self.written.lock().next * GRAIN;
        self.noted(match is_behind {
            true => Ok(()),
            false => Err(out_of_order(range.offset())),
        })
    }

    fn discard(&self, _: GuestRange) -> Result<()> {
        Ok(())
    }

    /// The image is complete only when it is closed.
    fn flush(&self) -> Result<()> {
        self.noted(self.storage.sync().map_err(io))
    }

    fn close(&self) -> Result<()> {
        self.noted(self.finish().map_err(io))?;
        self.flush()
    }

    fn resize(&mut self, _: u64) -> Result<()> {
        let detail = "the size of a new image of this format cannot be changed";
        Err(Error::new(ErrorKind::Unsupported, "resize", detail))
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        let has_failed = self.written.lock().has_failed;
        // A caller that has to know whether this works closes the image. One that lacks data must
        // not look complete.
        if !has_failed {
            let _ = self.finish();
        }
    }
}

fn out_of_order(offset: GuestOffset) -> Error {
    let detail = "an image of compressed grains is written in whole grains of 64 KiB, from the start to \
                  the end, each once";
    Error::new(ErrorKind::Unsupported, "write to", detail).at(offset.bytes())
}

fn io(error: io::Error) -> Error {
    Error::from_io("write to", error)
}

#[cfg(test)]
mod tests;
