//! The order of work: the parts of the source to be read, and those known to be zero.

use std::sync::Arc;

use imgfmt::storage::FileStorage;
use imgfmt::{GuestOffset, GuestRange, HostOffset, Image, Storage as _};
use nbd_client::ExtentStream;

use super::content::{Content, allocated, content_of};
use super::dirty::DirtyExtents;
use crate::error::{JobError, JobErrorKind};

/// Longest ranges.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Lengths {
    /// Of data; a multiple of the alignment.
    pub(crate) data: u64,
    /// Of zeroes; a multiple of the alignment, or larger than the disk.
    pub(crate) zeroes: u64,
}

/// A part of the disk for one task.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct PlannedRange {
    pub(crate) offset: u64,
    pub(crate) length: u64,
    pub(crate) content: Content,
    /// The layer of an image that has it, as in [`imgfmt::Extent`]; 0 if a part of it may be
    /// another layer's; 1 for other sources.
    pub(crate) depth: u32,
}

/// The source of information about holes.
pub(crate) enum Extents {
    /// None: everything is read.
    Unknown,
    /// A server's block status.
    Server(ExtentStream),
    /// A file's SEEK_DATA and SEEK_HOLE.
    File(Arc<FileStorage>),
    /// An image's own tables.
    Image(ImageExtents),
    /// A server's dirty bitmap, and its block status of the dirty ranges.
    Dirty(Box<DirtyExtents>),
    /// The tables of an image: what it does not have itself is unchanged.
    #[cfg(feature = "object-storage")]
    TopOfImage(ImageExtents),
    /// What a task tells, front to back: the end of each part, and its content.
    #[cfg(feature = "object-storage")]
    Told(tokio::sync::mpsc::Receiver<Result<(u64, Content), JobError>>),
}

/// The extents of an image, front to back.
pub(crate) struct ImageExtents(imgfmt::Extents<Arc<Image>>);

impl ImageExtents {
    /// From `start` (in bytes) on.
    pub(crate) fn new(image: &Arc<Image>, start: u64) -> Self {
        let (start, end) = (GuestOffset::new(start), GuestOffset::new(image.size()));
        Self(image.shared_extents(GuestRange::between(start, end).unwrap_or_default()))
    }

    /// The extent that holds the byte `at`, which never goes back.
    fn at(&mut self, at: u64) -> Result<Known, JobError> {
        for extent in self.0.by_ref() {
            let extent = extent.map_err(|error| JobError::image(JobErrorKind::Source, error))?;
            let end = extent.range.end().bytes();
            if end > at {
                return Ok(Known { end, content: content_of(extent.kind), depth: extent.depth });
            }
        }
        // After an error, which another task has.
        Err(JobError::source(format!("the map of the image ends at byte {at}")))
    }
}

/// What is known about a part of the disk.
#[derive(Clone, Copy)]
pub(super) struct Known {
    end: u64,
    content: Content,
    depth: u32,
}

impl Known {
    /// A part of a source without layers.
    fn new(end: u64, content: Content) -> Self {
        Self { end, content, depth: 1 }
    }
}

/// Cuts the disk into ranges, front to back.
pub(crate) struct Plan {
    size: u64,
    /// Every boundary between ranges is a multiple of this power of two.
    alignment: u64,
    longest: Lengths,
    /// Absent while a task waits for an answer.
    extents: Option<Extents>,
    /// Start of the next range.
    at: u64,
    /// The known part.
    known: Known,
}

impl Plan {
    /// Creates a plan for the bytes from `start` to `size`. `alignment` is a power of two.
    pub(crate) fn new(
        start: u64,
        size: u64,
        alignment: u64,
        longest: Lengths,
        extents: Extents,
    ) -> Self {
        Self {
            size,
            alignment,
            longest,
            extents: Some(extents),
            at: start,
            known: Known::new(start, Content::Data),
        }
    }

    /// Returns the start of the next range, in bytes.
    pub(crate) fn position(&self) -> u64 {
        self.at
    }

    /// Returns the next range if that takes no waiting for another program.
    pub(super) fn step(&mut self) -> Result<Step, JobError> {
        if self.at >= self.size {
            return Ok(Step::Next(None));
        }
        if self.at >= self.known.end {
            let local = self.extents.as_mut().and_then(|it| it.local(self.at, self.size));
            let Some(known) = local else { return Ok(Step::Look) };
            self.known = self.whole_blocks(known?);
        }
        let Known { end, content, depth } = self.known;
        let longest = match content {
            Content::Data => self.longest.data - self.at % self.longest.data,
            Content::Zero | Content::Unchanged => self.longest.zeroes,
        };
        let offset = self.at;
        let length = (end - offset).min(longest);
        self.at += length;
        Ok(Step::Next(Some(PlannedRange { offset, length, content, depth })))
    }

    /// Takes out what has to be waited for, unless the answer is there or the disk has ended.
    ///
    /// # Errors
    ///
    /// The task that took it out before was stopped.
    pub(super) fn begin_look(&mut self) -> Result<Option<Look>, JobError> {
        if self.at < self.known.end || self.at >= self.size {
            return Ok(None);
        }
        let extents = self.extents.take();
        let extents = extents.ok_or_else(|| JobError::source("the copy was stopped"))?;
        Ok(Some(Look { extents, at: self.at, size: self.size }))
    }

    /// Puts it back, with the answer.
    pub(super) fn end_look(
        &mut self,
        look: Look,
        answer: Result<Known, JobError>,
    ) -> Result<(), JobError> {
        self.extents = Some(look.extents);
        self.known = self.whole_blocks(answer?);
        Ok(())
    }

    /// Only whole blocks count as zero or unchanged; a partly zero or unchanged block is data.
    fn whole_blocks(&self, known: Known) -> Known {
        let Known { end, content, depth } = known;
        if end >= self.size {
            return Known { end: self.size, content, depth };
        }
        let end_of_whole_blocks = end - end % self.alignment;
        if content != Content::Data && end_of_whole_blocks > self.at {
            return Known { end: end_of_whole_blocks, content, depth };
        }
        let end_of_block = end.next_multiple_of(self.alignment);
        let is_mixed = end_of_block > end && matches!(self.extents, Some(Extents::Image(_)));
        let depth = if is_mixed { 0 } else { depth };
        Known { end: end_of_block.min(self.size), content: Content::Data, depth }
    }
}

/// What [`Plan::step`] found.
pub(super) enum Step {
    /// The next range, or the end of the disk.
    Next(Option<PlannedRange>),
    /// Another program has to be waited for.
    Look,
}

/// A question to another program.
pub(super) struct Look {
    extents: Extents,
    at: u64,
    size: u64,
}

impl Look {
    pub(super) async fn answer(&mut self) -> Result<Known, JobError> {
        self.extents.at(self.at, self.size).await
    }
}

impl Extents {
    /// Returns the extent that holds the byte `at`, as [`at`](Self::at) does, of what this process
    /// knows itself.
    fn local(&mut self, at: u64, size: u64) -> Option<Result<Known, JobError>> {
        Some(match self {
            Self::Unknown => Ok(Known::new(size, Content::Data)),
            Self::File(file) => match file.next_extent(HostOffset::new(at), size - at) {
                Ok(found) => {
                    // An empty answer would stall the plan.
                    let end = at.saturating_add(found.length.max(1)).min(size);
                    Ok(Known::new(end, content_of(found.kind)))
                }
                Err(error) => {
                    Err(JobError::source(format!("cannot find holes at offset {at}: {error}")))
                }
            },
            Self::Image(extents) => {
                extents.at(at).map(|known| Known { end: known.end.min(size), ..known })
            }
            #[cfg(feature = "object-storage")]
            Self::TopOfImage(extents) => extents.at(at).map(|known| {
                // What is known to be zero needs no base, which may be of a smaller disk.
                let is_own = known.depth == 1 || known.content == Content::Zero;
                let content = if is_own { known.content } else { Content::Unchanged };
                Known::new(known.end.min(size), content)
            }),
            _ => return None,
        })
    }

    /// Returns the extent that holds the byte `at`; its end is above that.
    async fn at(&mut self, at: u64, size: u64) -> Result<Known, JobError> {
        if let Some(known) = self.local(at, size) {
            return known;
        }
        match self {
            Self::Dirty(extents) => {
                let (end, content) = extents.at(at, size).await?;
                Ok(Known::new(end, content))
            }
            #[cfg(feature = "object-storage")]
            Self::Told(told) => loop {
                let part = told.recv().await.unwrap_or_else(|| {
                    Err(JobError::source(format!("the map of the disk ends at byte {at}")))
                });
                let (end, content) = part?;
                if end > at {
                    return Ok(Known::new(end.min(size), content));
                }
            },
            Self::Server(extents) => loop {
                let extent = match extents.next().await {
                    Some(Ok(extent)) => extent,
                    Some(Err(error)) => {
                        return Err(JobError::source(format!(
                            "the server cannot tell its holes at offset {at}: {error}; try \
                             --no-extents"
                        )));
                    }
                    // The server reports no more: the rest is read.
                    None => return Ok(Known::new(size, Content::Data)),
                };
                let end = extent.offset.saturating_add(extent.length).min(size);
                if end <= at {
                    continue;
                }
                return Ok(Known::new(end, allocated(&extent)));
            },
            _ => Ok(Known::new(size, Content::Data)),
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::{Access, Locking};

    use super::*;
    use crate::copy::shared_plan::SharedPlan;

    const LONGEST: Lengths = Lengths { data: 65_536, zeroes: 256 << 20 };

    async fn ranges(plan: Plan) -> Vec<PlannedRange> {
        let plan = SharedPlan::new(plan);
        let mut ranges = Vec::new();
        while let Some(range) = plan.next(|_| {}).await.unwrap() {
            ranges.push(range);
        }
        ranges
    }

    #[tokio::test]
    async fn pieces_cover_the_disk_without_gaps() {
        let plan = Plan::new(0, 1_000_001, 1, LONGEST, Extents::Unknown);
        let mut at = 0;
        for range in ranges(plan).await {
            assert_eq!(range.offset, at);
            assert!((1..=65_536).contains(&range.length));
            at += range.length;
        }
        assert_eq!(at, 1_000_001);
    }

    #[tokio::test]
    async fn holes_are_shrunk_to_whole_blocks() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("sparse");
        let file = std::fs::File::create(&path).unwrap();
        file.set_len(1 << 20).unwrap();
        std::os::unix::fs::FileExt::write_all_at(&file, b"x", 4096 * 5).unwrap();
        let storage = FileStorage::open(&path, Access::ReadOnly, Locking::Off).unwrap();
        let plan = Plan::new(0, 1 << 20, 65_536, LONGEST, Extents::File(Arc::new(storage)));
        let zero = PlannedRange {
            offset: 65_536,
            length: (1 << 20) - 65_536,
            content: Content::Zero,
            depth: 1,
        };
        let data = PlannedRange { offset: 0, length: 65_536, content: Content::Data, depth: 1 };
        // A file system without holes reports data throughout.
        let found = ranges(plan).await;
        assert!(found == [data, zero] || found.iter().all(|p| p.content == Content::Data));
    }

    #[tokio::test]
    async fn an_empty_disk_has_no_pieces() {
        assert!(ranges(Plan::new(0, 0, 1, LONGEST, Extents::Unknown)).await.is_empty());
    }
}
