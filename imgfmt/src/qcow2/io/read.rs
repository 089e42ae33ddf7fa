//! Mapping a range of the disk: through the tables, and through the layers below.

use std::sync::Arc;

use crate::decompression;
use crate::error::Result;
use crate::layer::{Backing, Walk};
use crate::mapping::{Content, Encoded, FileSpan, Form, Holes, Mapped};
use crate::qcow2::image::Qcow2;
use crate::qcow2::io::compress;
use crate::qcow2::on_disk::l2::{Compressed, Subcluster};
use crate::units::{GuestOffset, GuestRange, HostOffset};

/// The cost of finding a mapped range, in addition to its entries, in entries.
const EFFORT_OF_PIECE: u64 = 1;

/// What came of a part without content.
enum Below {
    Mapped(Mapped),
    /// The layer below was replaced meanwhile, this many times in all.
    Changed(u64),
}

impl Qcow2 {
    pub(in crate::qcow2) fn map_range(
        &self,
        range: GuestRange,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        let (mut position, end) = (range.offset(), range.end());
        let mut changes = self.backing.changes();
        while position < end {
            let Some(piece) = self.mapping.piece(position, end, walk.lookup)? else {
                return Ok(Mapped::WouldBlock);
            };
            walk.spend(piece.entries + EFFORT_OF_PIECE);
            position = piece.range.end();
            let mapped = match piece.content {
                Subcluster::Stored(host) => self.map_stored(piece.range, host, walk)?,
                Subcluster::Zero => walk.push(self, piece.range, Content::Hole)?,
                Subcluster::Unallocated => match self.map_below(piece.range, changes, walk)? {
                    Below::Mapped(mapped) => mapped,
                    Below::Changed(now) => {
                        // What the layer provided is here now.
                        (changes, position) = (now, piece.range.offset());
                        continue;
                    }
                },
                Subcluster::Compressed(Compressed { offset, length }) => {
                    let encoded = Encoded::compressed(offset, length);
                    walk.push(self, piece.range, Content::Encoded(encoded))?
                }
            };
            if mapped != Mapped::Complete {
                return Ok(mapped);
            }
            if walk.is_tired() && position < end {
                return Ok(Mapped::Partial);
            }
        }
        Ok(Mapped::Complete)
    }

    /// Maps a part that was found to have no content here when the slot had changed `changes`
    /// times.
    fn map_below(&self, range: GuestRange, changes: u64, walk: &mut Walk<'_>) -> Result<Below> {
        let Some(attached) = self.backing.attached() else {
            return Backing::map(self.backing.fixed(), self, range, walk).map(Below::Mapped);
        };
        if attached.changes() != changes {
            return Ok(Below::Changed(attached.changes()));
        }
        if walk.is_reader() {
            self.backing.wanted.note(range.offset().bytes());
        }
        Backing::map(attached.backing(), self, range, walk).map(Below::Mapped)
    }

    /// Looks for holes of the file only where clusters were preallocated.
    fn map_stored(
        &self,
        range: GuestRange,
        host: HostOffset,
        walk: &mut Walk<'_>,
    ) -> Result<Mapped> {
        if let Some(form) = self.data.form() {
            let encoded = Encoded { offset: host, length: range.length(), form };
            return walk.push(self, range, Content::Encoded(encoded));
        }
        let file = FileSpan {
            storage: self.data.storage()?,
            offset: host,
            may_pass_end: true,
            may_have_holes: false,
            is_file_content: !self.data.is_encrypted(),
        };
        match walk.holes == Holes::Told && self.preallocated.may_be(walk.lookup) {
            true => walk.push_file(self, range, file, Content::Zero),
            false => walk.push(self, range, Content::File(file)),
        }
    }

    /// Reads what was mapped as encoded.
    pub(in crate::qcow2) fn read_encoded(
        &self,
        Encoded { offset, length, form }: Encoded,
        guest: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
        match form {
            Form::Compressed => self.read_compressed(Compressed { offset, length }, guest, buffer),
            Form::Encrypted => self.data.read_old_aes(offset, guest, buffer),
        }
    }

    /// Reads a part of compressed clusters.
    fn read_compressed(
        &self,
        Compressed { offset, length }: Compressed,
        guest: GuestOffset,
        buffer: &mut [u8],
    ) -> Result<()> {
        let geometry = self.geometry();
        let mut start = geometry.in_cluster(guest) as usize;
        // Only a damaged image has consecutive clusters with the same entry.
        for part in buffer.chunks_mut(geometry.cluster_size() as usize - start) {
            let cluster = self.decompressed(Compressed { offset, length }, guest)?;
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
        let read = self
            .metadata
            .file
            .read_at(compressed.offset, &mut input)
            .map_err(|error| self.metadata.io("read", error, guest))?;
        let mut cluster = vec![0; self.geometry().cluster_size() as usize];
        let _begun = decompression::begin();
        compress::decompress(self.metadata.header().compression, &input[..read], &mut cluster)
            .map_err(|detail| self.metadata.corrupt(detail, guest.bytes()))?;
        let cluster: Arc<[u8]> = cluster.into();
        self.clusters.decompressed.keep(compressed, &cluster);
        Ok(cluster)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::create_options::CreateOptions;
    use crate::format::Format;
    use crate::image::Image;
    use crate::jobs::{JobContext, stream_in_place};
    use crate::layer::Layer;
    use crate::mapping::{Lookup, Mapping};

    /// Of a reader that was stopped between its look into the tables and that at the layer below.
    #[test]
    fn a_part_is_looked_up_again_if_the_layer_below_went_after_the_lookup() {
        let directory = tempfile::tempdir().unwrap();
        let [base, top] = ["base.raw", "top.qcow2"].map(|name| directory.path().join(name));
        std::fs::write(&base, [1; 4096]).unwrap();
        let image = Image::create(&top, &CreateOptions::overlay("base.raw", Format::Raw)).unwrap();
        let qcow2 = image.qcow2().unwrap();
        let (start, end) = (GuestOffset::new(0), GuestOffset::new(4096));
        let before = qcow2.backing.changes();
        let piece = qcow2.mapping.piece(start, end, Lookup::MayRead).unwrap().unwrap();
        assert_eq!(piece.content, Subcluster::Unallocated);
        stream_in_place(&image, None, &JobContext::default()).unwrap();
        let mut shown = 0;
        let mut visit = |_: &dyn Layer, _: Mapping<'_>| {
            shown += 1;
            Ok(true)
        };
        let mut walk = Walk::new(Holes::AsData, Lookup::MayRead, &mut visit);
        let below = qcow2.map_below(piece.range, before, &mut walk).unwrap();
        let Below::Changed(now) = below else { panic!("what was below is taken for zeroes") };
        assert_eq!((now, shown), (before + 1, 0));
        let mut bytes = [0; 4096];
        image.read_at(start, &mut bytes).unwrap();
        assert_eq!(bytes, [1; 4096]);
    }
}
