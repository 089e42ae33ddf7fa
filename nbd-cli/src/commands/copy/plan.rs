//! The order of work: which parts of the source are read and which are known to be zero.

use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{ExtentKind, HostOffset, Storage as _};
use nbd_client::ExtentStream;
use nbd_proto::wire::AllocationFlags;

use super::zero::Content;
use crate::error::CommandError;

/// Longest pieces.
#[derive(Clone, Copy, Debug)]
pub(super) struct Lengths {
    /// Of data; a multiple of the alignment.
    pub(super) data: u64,
    /// Of zeroes; a multiple of the alignment, or larger than the disk.
    pub(super) zeroes: u64,
}

/// A part of the disk for one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Piece {
    pub(super) offset: u64,
    pub(super) length: u64,
    pub(super) content: Content,
}

/// Where knowledge about holes comes from.
pub(super) enum Extents {
    /// There is none: everything is read.
    Unknown,
    /// A server's block status.
    Server(ExtentStream),
    /// A file's SEEK_DATA and SEEK_HOLE.
    File(Arc<FileStorage>),
}

/// Cuts the disk into pieces, front to back.
pub(super) struct Plan {
    size: u64,
    /// Every boundary between pieces is a multiple of this power of two.
    alignment: u64,
    longest: Lengths,
    extents: Extents,
    /// Where the next piece begins.
    at: u64,
    /// Up to where the content is known, and what it is.
    known: (u64, Content),
}

impl Plan {
    /// A plan for `size` bytes. `alignment` is a power of two.
    pub(super) fn new(size: u64, alignment: u64, longest: Lengths, extents: Extents) -> Self {
        Self { size, alignment, longest, extents, at: 0, known: (0, Content::Data) }
    }

    /// The next piece, or `None` at the end of the disk.
    pub(super) async fn next(&mut self) -> Result<Option<Piece>, CommandError> {
        if self.at >= self.size {
            return Ok(None);
        }
        if self.at >= self.known.0 {
            self.known = self.look().await?;
        }
        let (end, content) = self.known;
        let longest = match content {
            Content::Data => self.longest.data - self.at % self.longest.data,
            Content::Zero => self.longest.zeroes,
        };
        let offset = self.at;
        let length = (end - offset).min(longest);
        self.at += length;
        Ok(Some(Piece { offset, length, content }))
    }

    /// Finds out what stands at the current offset and up to where.
    async fn look(&mut self) -> Result<(u64, Content), CommandError> {
        let (end, content) = self.extents.at(self.at, self.size).await?;
        // Only whole blocks count as zero; a block that is zero in part is data.
        if end >= self.size {
            return Ok((self.size, content));
        }
        let end_of_whole_blocks = end - end % self.alignment;
        if content == Content::Zero && end_of_whole_blocks > self.at {
            return Ok((end_of_whole_blocks, Content::Zero));
        }
        let end = end.next_multiple_of(self.alignment);
        Ok((end.min(self.size), Content::Data))
    }
}

impl Extents {
    /// The end (above `at`) and content of the extent that holds the byte `at`.
    async fn at(&mut self, at: u64, size: u64) -> Result<(u64, Content), CommandError> {
        match self {
            Self::Unknown => Ok((size, Content::Data)),
            Self::File(file) => {
                let found = file.next_extent(HostOffset::new(at), size - at).map_err(|error| {
                    CommandError::new(format!("cannot find holes at offset {at}: {error}"))
                })?;
                let content = match found.kind {
                    ExtentKind::Data => Content::Data,
                    ExtentKind::Hole | ExtentKind::Zero => Content::Zero,
                };
                // An empty answer would stop the plan.
                Ok((at.saturating_add(found.length.max(1)).min(size), content))
            }
            Self::Server(extents) => loop {
                let extent = match extents.next().await {
                    Some(Ok(extent)) => extent,
                    Some(Err(error)) => {
                        return Err(CommandError::new(format!(
                            "the server cannot tell its holes at offset {at}: {error}; try \
                             --no-extents"
                        )));
                    }
                    // It knows no more: the rest is read.
                    None => return Ok((size, Content::Data)),
                };
                let end = extent.offset.saturating_add(extent.length).min(size);
                if end <= at {
                    continue;
                }
                // A hole that does not read as zero may hold anything.
                let zero = extent.flags & AllocationFlags::STATE_ZERO.bits() != 0;
                return Ok((end, if zero { Content::Zero } else { Content::Data }));
            },
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::{Access, Locking};

    use super::*;

    const LONGEST: Lengths = Lengths { data: 65_536, zeroes: 256 << 20 };

    async fn pieces(mut plan: Plan) -> Vec<Piece> {
        let mut pieces = Vec::new();
        while let Some(piece) = plan.next().await.unwrap() {
            pieces.push(piece);
        }
        pieces
    }

    #[tokio::test]
    async fn pieces_cover_the_disk_without_gaps() {
        let plan = Plan::new(1_000_001, 1, LONGEST, Extents::Unknown);
        let mut at = 0;
        for piece in pieces(plan).await {
            assert_eq!(piece.offset, at);
            assert!((1..=65_536).contains(&piece.length));
            at += piece.length;
        }
        assert_eq!(at, 1_000_001);
    }

    #[tokio::test]
    async fn holes_are_shrunk_to_whole_blocks() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("sparse");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 4096 * 5).unwrap();
        let storage = FileStorage::open(&path, Access::ReadOnly, Locking::Off).unwrap();
        let plan = Plan::new(1 << 20, 65_536, LONGEST, Extents::File(Arc::new(storage)));
        let zero = Piece { offset: 65_536, length: (1 << 20) - 65_536, content: Content::Zero };
        let data = Piece { offset: 0, length: 65_536, content: Content::Data };
        // A file system without holes reports data throughout.
        let found = pieces(plan).await;
        assert!(found == [data, zero] || found.iter().all(|p| p.content == Content::Data));
    }

    #[tokio::test]
    async fn an_empty_disk_has_no_pieces() {
        assert!(pieces(Plan::new(0, 1, LONGEST, Extents::Unknown)).await.is_empty());
    }
}
