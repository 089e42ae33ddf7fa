//! Reading: the pieces that [`map`](super::map) found, moved with no lock held.

use std::sync::{Arc, PoisonError};

use super::Qcow2;
use super::compress;
use super::l2::{Compressed, Content};
use super::map::{Lookup, Piece, span};
use crate::error::{Error, Result};
use crate::mapping::Mapping;
use crate::storage::TryRead;
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// How many decompressed clusters are kept for the reads that follow.
const DECOMPRESSED_MAX: usize = 8;

impl Qcow2 {
    pub(super) fn read_range(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let base = offset.bytes();
        let range = span(base, base + buffer.len() as u64);
        self.for_each_table(range, Lookup::MayRead, |pieces| {
            for piece in pieces {
                let start = (piece.range.offset().bytes() - base) as usize;
                let part = &mut buffer[start..start + piece.range.length() as usize];
                self.read_piece(piece, part)?;
            }
            Ok(true)
        })?;
        Ok(())
    }

    fn read_piece(&self, piece: &Piece, buffer: &mut [u8]) -> Result<()> {
        let guest = piece.range.offset();
        match piece.content {
            Content::Zero => buffer.fill(0),
            Content::Unallocated => self.read_backing(guest, buffer)?,
            Content::Stored(host) => {
                let host = HostOffset::new(host);
                let read = self
                    .data
                    .read_at(host, buffer)
                    .map_err(|error| self.io("read", error, guest))?;
                // What lies behind the end of the file was never written.
                buffer[read..].fill(0);
            }
            Content::Compressed(compressed) => self.read_compressed(compressed, guest, buffer)?,
        }
        Ok(())
    }

    /// Reads what this layer has not got.
    pub(super) fn read_backing(&self, guest: GuestOffset, buffer: &mut [u8]) -> Result<()> {
        let Some(backing) = &self.backing else {
            buffer.fill(0);
            return Ok(());
        };
        let available = backing.size.saturating_sub(guest.bytes()).min(buffer.len() as u64);
        let (inside, behind) = buffer.split_at_mut(available as usize);
        if !inside.is_empty() {
            backing.driver.read_at(guest, inside)?;
        }
        behind.fill(0);
        Ok(())
    }

    fn read_compressed(
        &self,
        compressed: Compressed,
        guest: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
        let geometry = self.geometry();
        let mut start = geometry.in_cluster(guest.bytes()) as usize;
        // Several clusters with the same entry follow each other only in a damaged image.
        for part in buffer.chunks_mut(geometry.cluster_size() as usize - start) {
            let cluster = self.decompressed(compressed, guest)?;
            part.copy_from_slice(&cluster[start..start + part.len()]);
            start = 0;
        }
        Ok(())
    }

    fn decompressed(&self, compressed: Compressed, guest: GuestOffset) -> Result<Arc<[u8]>> {
        {
            let kept = self.decompressed.lock().unwrap_or_else(PoisonError::into_inner);
            if let Some((_, cluster)) = kept.iter().find(|(key, _)| *key == compressed) {
                return Ok(Arc::clone(cluster));
            }
        }
        let mut input = vec![0; compressed.length as usize];
        let offset = HostOffset::new(compressed.offset);
        let read =
            self.file.read_at(offset, &mut input).map_err(|error| self.io("read", error, guest))?;
        let mut cluster = vec![0; self.geometry().cluster_size() as usize];
        compress::decompress(self.header.compression, &input[..read], &mut cluster)
            .map_err(|detail| self.corrupt(detail, guest.bytes()))?;
        let cluster: Arc<[u8]> = cluster.into();
        let mut kept = self.decompressed.lock().unwrap_or_else(PoisonError::into_inner);
        if kept.len() >= DECOMPRESSED_MAX {
            kept.pop_front();
        }
        kept.push_back((compressed, Arc::clone(&cluster)));
        Ok(cluster)
    }

    pub(super) fn try_read_range(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<TryRead> {
        let base = offset.bytes();
        let range = span(base, base + buffer.len() as u64);
        let mut outcome = TryRead::Complete;
        let mapped = self.for_each_table(range, Lookup::CachedOnly, |pieces| {
            for piece in pieces {
                let start = (piece.range.offset().bytes() - base) as usize;
                let part = &mut buffer[start..start + piece.range.length() as usize];
                outcome = self.try_read_piece(piece, part)?;
                if outcome == TryRead::WouldBlock {
                    return Ok(false);
                }
            }
            Ok(true)
        })?;
        Ok(if mapped { outcome } else { TryRead::WouldBlock })
    }

    fn try_read_piece(&self, piece: &Piece, buffer: &mut [u8]) -> Result<TryRead> {
        let guest = piece.range.offset();
        match (piece.content, &self.backing) {
            (Content::Zero, _) | (Content::Unallocated, None) => {
                buffer.fill(0);
                Ok(TryRead::Complete)
            }
            (Content::Unallocated, Some(backing)) => {
                let available = backing.size.saturating_sub(guest.bytes()).min(buffer.len() as u64);
                let (inside, behind) = buffer.split_at_mut(available as usize);
                behind.fill(0);
                match inside.is_empty() {
                    true => Ok(TryRead::Complete),
                    false => backing.driver.try_read_at(guest, inside),
                }
            }
            (Content::Stored(host), _) => {
                match self.data.try_read_at(HostOffset::new(host), buffer) {
                    // The last cluster may go on behind the end of the file: see `read_piece`.
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                        Ok(TryRead::WouldBlock)
                    }
                    result => result.map_err(|error| self.io("read", error, guest)),
                }
            }
            (Content::Compressed(_), _) => Ok(TryRead::WouldBlock),
        }
    }

    pub(super) fn push_mappings(
        &self,
        range: GuestRange,
        mappings: &mut Vec<Mapping>,
    ) -> Result<()> {
        let length = self.data.len().map_err(|error| self.io("map", error, range.offset()))?;
        self.for_each_table(range, Lookup::MayRead, |pieces| {
            for piece in pieces {
                match piece.content {
                    Content::Stored(host) => self.push_stored(piece.range, host, length, mappings),
                    Content::Zero => mappings.push(Mapping::Zero { range: piece.range }),
                    Content::Compressed(_) => {
                        mappings.push(Mapping::Encoded { range: piece.range });
                    }
                    Content::Unallocated => self.push_backing_mappings(piece.range, mappings)?,
                }
            }
            Ok(true)
        })?;
        Ok(())
    }

    /// Appends stored data; the part behind the end of the file reads as zero.
    fn push_stored(&self, range: GuestRange, host: u64, length: u64, mappings: &mut Vec<Mapping>) {
        let start = range.offset().bytes();
        let stop = start + length.saturating_sub(host).min(range.length());
        if stop > start {
            mappings.push(Mapping::File {
                range: span(start, stop),
                storage: Arc::clone(&self.data),
                offset: HostOffset::new(host),
            });
        }
        let behind = span(stop, range.end().bytes());
        if !behind.is_empty() {
            mappings.push(Mapping::Zero { range: behind });
        }
    }

    fn push_backing_mappings(&self, range: GuestRange, mappings: &mut Vec<Mapping>) -> Result<()> {
        let backing_size = self.backing.as_ref().map_or(0, |backing| backing.size);
        let inside = range.intersection(span(0, backing_size));
        if let Some(backing) = &self.backing
            && !inside.is_empty()
        {
            // Backing files are open read-only: their places never move and need no lease.
            mappings.extend_from_slice(backing.driver.map_read(inside)?.mappings());
        }
        let behind = span(range.offset().bytes().max(backing_size), range.end().bytes());
        if !behind.is_empty() {
            mappings.push(Mapping::Zero { range: behind });
        }
        Ok(())
    }

    pub(super) fn io(
        &self,
        operation: &'static str,
        error: std::io::Error,
        guest: GuestOffset,
    ) -> Error {
        self.named(Error::from_io(operation, error).at(guest.bytes()))
    }

    pub(super) fn named(&self, error: Error) -> Error {
        match &self.path {
            Some(path) => error.with_path(path),
            None => error,
        }
    }
}
