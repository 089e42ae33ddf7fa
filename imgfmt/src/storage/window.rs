//! A part of a storage, such as a disk in a tar archive: QEMU's driver `raw` with `offset` and
//! `size`.

use std::io;
use std::sync::Arc;

use super::{
    Capabilities, DirectAlignment, Durability, Speed, Storage, StorageExtent, TryRead, ZeroMode,
    in_whole_blocks,
};
use crate::units::HostOffset;

/// QEMU's block devices consist of these, in bytes.
const SECTOR: u64 = 512;

/// The bytes of a file or another storage in which an image is. The default is all of them.
///
/// This plain value has these two fields and will have no others.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub struct Part {
    /// Where it begins, in bytes.
    pub offset: u64,
    /// Its size, in bytes; `None`: to the end.
    pub size: Option<u64>,
}

impl Part {
    /// Returns whether it is all of the storage.
    #[must_use]
    pub fn is_whole(self) -> bool {
        self == Self::default()
    }

    /// Returns this part of the part `outer` of a storage, as a part of that storage.
    ///
    /// ```
    /// # use imgfmt::storage::Part;
    /// let outer = Part { offset: 512, size: Some(4096) };
    /// let part = Part { offset: 1024, size: None };
    /// assert_eq!(part.within(outer), Ok(Part { offset: 1536, size: Some(3072) }));
    /// assert!(Part { offset: 5120, size: None }.within(outer).is_err());
    /// ```
    ///
    /// # Errors
    ///
    /// A sentence if it is not within `outer`.
    pub fn within(self, outer: Self) -> Result<Self, String> {
        let size = match outer.size {
            None => self.size,
            Some(whole) => Some(self.size_in(whole)?),
        };
        match outer.offset.checked_add(self.offset) {
            Some(offset) => Ok(Self { offset, size }),
            None => Err(format!("Offset {} is out of range", self.offset)),
        }
    }

    /// Returns the size that it has in a storage of `whole` bytes.
    fn size_in(self, whole: u64) -> Result<u64, String> {
        let offset = self.offset;
        match (whole.checked_sub(offset), self.size) {
            (None, _) => Err(format!(
                "Offset {offset} is greater than the size of the containing file ({whole} bytes)"
            )),
            (Some(rest), Some(size)) if size > rest => Err(format!(
                "Offset {offset} and size {size} reach past the end of the containing file ({whole} \
                 bytes)"
            )),
            (Some(rest), size) => Ok(size.unwrap_or(rest)),
        }
    }

    /// Returns this part of a storage, in whole sectors; the storage itself if it is all of it.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if it is not within the storage, or an error of the storage.
    pub fn of(self, storage: Arc<dyn Storage>) -> io::Result<Arc<dyn Storage>> {
        if self.is_whole() {
            return Ok(storage);
        }
        let storage = in_whole_blocks(storage, SECTOR)?;
        let within = self.size_in(storage.len()?);
        within.map_err(|why| io::Error::new(io::ErrorKind::InvalidInput, why))?;
        let part = StorageWindow::new(storage, self.offset, self.size)?;
        in_whole_blocks(Arc::new(part), SECTOR)
    }
}

/// A part of another storage. With a size, it never accesses bytes after the part; without one, it
/// grows with the other storage.
#[derive(Debug)]
pub struct StorageWindow {
    inner: Arc<dyn Storage>,
    offset: u64,
    size: Option<u64>,
}

impl StorageWindow {
    /// Creates the part from `offset` on, of `size` bytes or to the end.
    ///
    /// # Errors
    ///
    /// [`io::ErrorKind::InvalidInput`] if the part is not within `inner`, or an error of it.
    pub fn new(inner: Arc<dyn Storage>, offset: u64, size: Option<u64>) -> io::Result<Self> {
        let length = inner.len()?;
        let end = offset.checked_add(size.unwrap_or(0));
        if end.is_none_or(|end| end > length) {
            let why = "the part is not within the storage";
            return Err(io::Error::new(io::ErrorKind::InvalidInput, why));
        }
        Ok(Self { inner, offset, size })
    }

    /// Returns the offset in the other storage of a range inside the part.
    fn inside(&self, offset: HostOffset, length: u64) -> io::Result<HostOffset> {
        let outside = self
            .size
            .is_some_and(|size| offset.bytes().checked_add(length).is_none_or(|end| end > size));
        match self.offset.checked_add(offset.bytes()) {
            Some(position) if !outside => Ok(HostOffset::new(position)),
            _ => Err(io::ErrorKind::StorageFull.into()),
        }
    }
}

impl Storage for StorageWindow {
    fn len(&self) -> io::Result<u64> {
        match self.size {
            Some(size) => Ok(size),
            None => Ok(self.inner.len()?.saturating_sub(self.offset)),
        }
    }

    fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        let rest = self.len()?.saturating_sub(offset.bytes());
        let length = usize::try_from(rest).unwrap_or(usize::MAX).min(buffer.len());
        if length == 0 {
            return Ok(0);
        }
        self.inner.read_at(self.inside(offset, length as u64)?, &mut buffer[..length])
    }

    fn try_read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<TryRead> {
        match self.inside(offset, buffer.len() as u64) {
            Ok(position) => self.inner.try_read_at(position, buffer),
            // The blocking read determines the size.
            Err(_) => Ok(TryRead::WouldBlock),
        }
    }

    fn write_at(&self, offset: HostOffset, data: &[u8], durability: Durability) -> io::Result<()> {
        self.inner.write_at(self.inside(offset, data.len() as u64)?, data, durability)
    }

    fn set_len(&self, length: u64) -> io::Result<()> {
        match self.size {
            Some(size) if size == length => Ok(()),
            Some(_) => Err(io::ErrorKind::Unsupported.into()),
            None => {
                let whole = self.offset.checked_add(length).ok_or(io::ErrorKind::StorageFull)?;
                self.inner.set_len(whole)
            }
        }
    }

    fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.punch_hole(self.inside(offset, length)?, length)
    }

    fn write_zeroes(
        &self,
        offset: HostOffset,
        length: u64,
        mode: ZeroMode,
        speed: Speed,
    ) -> io::Result<()> {
        self.inner.write_zeroes(self.inside(offset, length)?, length, mode, speed)
    }

    fn sync(&self) -> io::Result<()> {
        self.inner.sync()
    }

    fn capabilities(&self) -> Capabilities {
        self.inner.capabilities()
    }

    fn next_extent(&self, offset: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.inner.next_extent(self.inside(offset, length)?, length)
    }

    fn is_known_data(&self, offset: HostOffset, length: u64) -> bool {
        self.inside(offset, length).is_ok_and(|place| self.inner.is_known_data(place, length))
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.inner.direct_alignment()
    }

    fn readahead(&self, offset: HostOffset, length: u64) -> io::Result<()> {
        self.inner.readahead(self.inside(offset, length)?, length)
    }
}

#[cfg(test)]
mod tests {
    use super::super::MemoryStorage;
    use super::*;

    fn at(offset: u64) -> HostOffset {
        HostOffset::new(offset)
    }

    #[test]
    fn a_part_with_a_size_never_touches_what_follows_it() {
        let whole = Arc::new(MemoryStorage::new(4096));
        whole.write_at(at(0), &[7; 4096], Durability::Cached).unwrap();
        let part = StorageWindow::new(whole.clone(), 512, Some(1024)).unwrap();
        assert_eq!(part.len().unwrap(), 1024);
        part.write_at(at(0), &[1; 1024], Durability::Cached).unwrap();
        let zeroed = part.write_zeroes(at(1000), 100, ZeroMode::KeepAllocated, Speed::Any);
        let refused = [
            part.write_at(at(1023), &[2; 2], Durability::Cached),
            part.write_at(at(u64::MAX), &[2], Durability::Cached),
            zeroed,
            part.punch_hole(at(0), 1025),
            part.set_len(2048),
        ];
        assert!(refused.iter().all(Result::is_err), "{refused:?}");
        let mut all = [0; 4096];
        whole.read_exact_at(at(0), &mut all).unwrap();
        assert!(all[..512].iter().chain(&all[1536..]).all(|byte| *byte == 7));
        assert!(all[512..1536].iter().all(|byte| *byte == 1));
        let mut end = [9; 100];
        assert_eq!(part.read_at(at(1000), &mut end).unwrap(), 24);
        assert_eq!(part.read_at(at(2000), &mut end).unwrap(), 0);
        assert_eq!(part.try_read_at(at(1000), &mut end).unwrap(), TryRead::WouldBlock);
    }

    #[test]
    fn a_part_has_to_be_within_what_contains_it() {
        let whole: Arc<dyn Storage> = Arc::new(MemoryStorage::new(4000));
        let length =
            |offset, size| Part { offset, size }.of(Arc::clone(&whole)).and_then(|part| part.len());
        assert_eq!(length(0, None).unwrap(), 4000, "as it is");
        // In QEMU's sight, the file has 4096 bytes.
        assert_eq!(length(512, None).unwrap(), 3584);
        assert_eq!(length(100, None).unwrap(), 4096, "in whole sectors");
        assert_eq!(length(100, Some(512)).unwrap(), 512);
        assert_eq!(length(4096, None).unwrap(), 0);
        for (offset, size, why) in [
            (4097, None, "greater than the size"),
            (512, Some(3585), "past the end"),
            (u64::MAX, Some(u64::MAX), "greater than the size"),
            (1, Some(u64::MAX), "past the end"),
        ] {
            let error = length(offset, size).unwrap_err();
            assert_eq!(error.kind(), io::ErrorKind::InvalidInput);
            assert!(error.to_string().contains(why), "{offset}: {error}");
        }
        let end = Part { offset: u64::MAX, size: None };
        assert!(Part { offset: 1, size: None }.within(end).is_err());
    }

    #[test]
    fn a_part_without_a_size_ends_where_the_whole_does() {
        let whole = Arc::new(MemoryStorage::new(4096));
        let part = StorageWindow::new(whole.clone(), 512, None).unwrap();
        assert_eq!(part.len().unwrap(), 3584);
        part.set_len(7680).unwrap();
        assert_eq!(whole.len().unwrap(), 8192);
        for (offset, size) in [(9000, None), (8000, Some(512)), (u64::MAX, Some(u64::MAX))] {
            let refused = StorageWindow::new(whole.clone(), offset, size).unwrap_err();
            assert_eq!(refused.kind(), io::ErrorKind::InvalidInput, "{offset}");
        }
    }
}
