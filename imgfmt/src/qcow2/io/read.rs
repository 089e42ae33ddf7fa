//! Reading: the pieces that [`map`](crate::qcow2::map::lookup) found, moved with no lock held.

use std::sync::Arc;

use crate::error::Result;
use crate::extent::ExtentKind;
use crate::mapping::{Holes, Mapping};
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::compress;
use crate::qcow2::map::lookup::{Lookup, Piece, span};
use crate::qcow2::on_disk::l2::{Compressed, Content};
use crate::storage::TryRead;
use crate::units::{GuestOffset, GuestRange, HostOffset};

impl Qcow2 {
    pub(in crate::qcow2) fn read_range(
        &self,
        offset: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
        let base = offset.bytes();
        let range = span(base, base + buffer.len() as u64);
        self.mapping.for_each_piece(range, Lookup::MayRead, |piece| {
            let start = (piece.range.offset().bytes() - base) as usize;
            let part = &mut buffer[start..start + piece.range.length() as usize];
            self.read_piece(piece, part).map(|()| true)
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
                    .map_err(|error| self.metadata.io("read", error, guest))?;
                // What lies behind the end of the file was never written.
                buffer[read..].fill(0);
            }
            Content::Compressed(compressed) => self.read_compressed(compressed, guest, buffer)?,
        }
        Ok(())
    }

    /// Reads what this layer has not got.
    pub(in crate::qcow2) fn read_backing(
        &self,
        guest: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
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
        if let Some(cluster) = self.clusters.decompressed.get(compressed) {
            return Ok(cluster);
        }
        let mut input = vec![0; compressed.length as usize];
        let offset = HostOffset::new(compressed.offset);
        let read = self
            .metadata
            .file
            .read_at(offset, &mut input)
            .map_err(|error| self.metadata.io("read", error, guest))?;
        let mut cluster = vec![0; self.geometry().cluster_size() as usize];
        compress::decompress(self.metadata.header().compression, &input[..read], &mut cluster)
            .map_err(|detail| self.metadata.corrupt(detail, guest.bytes()))?;
        let cluster: Arc<[u8]> = cluster.into();
        self.clusters.decompressed.keep(compressed, &cluster);
        Ok(cluster)
    }

    pub(in crate::qcow2) fn try_read_range(
        &self,
        offset: GuestOffset,
        buffer: &mut [u8],
        holes: Holes,
    ) -> Result<TryRead> {
        let base = offset.bytes();
        let range = span(base, base + buffer.len() as u64);
        let mut outcome = TryRead::Complete;
        let mapped = self.mapping.for_each_piece(range, Lookup::CachedOnly, |piece| {
            let start = (piece.range.offset().bytes() - base) as usize;
            let part = &mut buffer[start..start + piece.range.length() as usize];
            outcome = self.try_read_piece(piece, part, holes)?;
            Ok(outcome == TryRead::Complete)
        })?;
        Ok(if mapped { outcome } else { TryRead::WouldBlock })
    }

    fn try_read_piece(&self, piece: &Piece, buffer: &mut [u8], holes: Holes) -> Result<TryRead> {
        let guest = piece.range.offset();
        match (piece.content, &self.backing) {
            (Content::Zero, _) | (Content::Unallocated, None) => Ok(zeroes(buffer, holes)),
            (Content::Unallocated, Some(backing)) => {
                let available = backing.size.saturating_sub(guest.bytes()).min(buffer.len() as u64);
                let (inside, behind) = buffer.split_at_mut(available as usize);
                match (inside.is_empty(), zeroes(behind, holes)) {
                    (true, outcome) | (_, outcome @ TryRead::Sparse) => Ok(outcome),
                    _ => backing.driver.try_read_at(guest, inside, holes),
                }
            }
            (Content::Stored(host), _) if !self.is_told(host, buffer.len() as u64, holes) => {
                Ok(TryRead::WouldBlock)
            }
            (Content::Stored(host), _) => {
                match self.data.try_read_at(HostOffset::new(host), buffer) {
                    // The last cluster may go on behind the end of the file: see `read_piece`.
                    Err(error) if error.kind() == std::io::ErrorKind::UnexpectedEof => {
                        Ok(TryRead::WouldBlock)
                    }
                    result => result.map_err(|error| self.metadata.io("read", error, guest)),
                }
            }
            (Content::Compressed(_), _) => Ok(TryRead::WouldBlock),
        }
    }

    /// Whether holes of the file have no say in what is told of stored bytes, as far as that is
    /// known without waiting. They have one only where clusters were allocated before they were
    /// written.
    fn is_told(&self, host: u64, length: u64, holes: Holes) -> bool {
        holes == Holes::AsData
            || self.preallocated.get() == Some(&false)
            || self.data.is_known_data(HostOffset::new(host), length)
    }

    /// Appends what a range consists of; false if that cannot be told without waiting.
    pub(in crate::qcow2) fn push_mappings(
        &self,
        range: GuestRange,
        holes: Holes,
        lookup: Lookup,
        mappings: &mut Vec<Mapping>,
    ) -> Result<bool> {
        let length =
            self.data.len().map_err(|error| self.metadata.io("map", error, range.offset()))?;
        let mut complete = true;
        let mapped = self.mapping.for_each_piece(range, lookup, |piece| {
            match piece.content {
                Content::Stored(host) if self.is_told(host, piece.range.length(), holes) => {
                    self.push_stored(piece.range, host, length, holes, mappings);
                }
                Content::Stored(_) if lookup == Lookup::CachedOnly => complete = false,
                Content::Stored(host) => {
                    self.push_stored_with_holes(piece.range, host, length, mappings)?;
                }
                Content::Zero => mappings.push(Mapping::Zero { range: piece.range }),
                Content::Compressed(_) => mappings.push(Mapping::Encoded { range: piece.range }),
                Content::Unallocated => {
                    complete = self.push_backing_mappings(piece.range, holes, lookup, mappings)?;
                }
            }
            Ok(complete)
        })?;
        Ok(mapped && complete)
    }

    /// Appends stored data; the part behind the end of the file reads as zero, but is no hole.
    fn push_stored(
        &self,
        range: GuestRange,
        host: u64,
        length: u64,
        holes: Holes,
        mappings: &mut Vec<Mapping>,
    ) {
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
            mappings.push(match holes {
                Holes::AsData => Mapping::Zero { range: behind },
                Holes::Told => Mapping::Encoded { range: behind },
            });
        }
    }

    /// As `push_stored`, of clusters that may never have been written.
    fn push_stored_with_holes(
        &self,
        range: GuestRange,
        host: u64,
        length: u64,
        mappings: &mut Vec<Mapping>,
    ) -> Result<()> {
        if !self.is_preallocated() {
            self.push_stored(range, host, length, Holes::Told, mappings);
            return Ok(());
        }
        let end = range.end().bytes();
        let mut start = range.offset().bytes();
        while start < end {
            let host = host + (start - range.offset().bytes());
            let Some(inside) = length.checked_sub(host).filter(|inside| *inside > 0) else { break };
            let most = inside.min(end - start);
            let found = self.data.next_extent(HostOffset::new(host), most);
            let found =
                found.map_err(|error| self.metadata.io("look for holes in", error, range.offset()));
            let found = found?;
            let part = span(start, start + found.length.clamp(1, most));
            match found.kind {
                ExtentKind::Data => self.push_stored(part, host, length, Holes::Told, mappings),
                _ => mappings.push(Mapping::Zero { range: part }),
            }
            start = part.end().bytes();
        }
        let behind = span(start, end);
        if !behind.is_empty() {
            mappings.push(Mapping::Zero { range: behind });
        }
        Ok(())
    }

    fn push_backing_mappings(
        &self,
        range: GuestRange,
        holes: Holes,
        lookup: Lookup,
        mappings: &mut Vec<Mapping>,
    ) -> Result<bool> {
        let backing_size = self.backing.as_ref().map_or(0, |backing| backing.size);
        let inside = range.intersection(span(0, backing_size));
        if let Some(backing) = &self.backing
            && !inside.is_empty()
        {
            // Backing files are open read-only: their places never move and need no lease.
            let Some(lease) = backing.driver.map_read(inside, holes, lookup)? else {
                return Ok(false);
            };
            mappings.extend_from_slice(lease.mappings());
        }
        let behind = span(range.offset().bytes().max(backing_size), range.end().bytes());
        if !behind.is_empty() {
            mappings.push(Mapping::Zero { range: behind });
        }
        Ok(true)
    }
}

/// What a read that does not wait makes of a part that reads as zero.
fn zeroes(buffer: &mut [u8], holes: Holes) -> TryRead {
    match holes {
        Holes::Told if !buffer.is_empty() => TryRead::Sparse,
        _ => {
            buffer.fill(0);
            TryRead::Complete
        }
    }
}
