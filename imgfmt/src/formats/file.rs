//! The file of an image: its tables, which are read in pages as they are needed, and errors that
//! name it.
//!
//! A table may be as large as the disk makes it, so none is read as a whole: 4 KiB pages are kept,
//! and at most [`PAGES_MAX`] of them, or one for each file of an image if it has more files. No
//! lock is held while one is read.

use std::ffi::OsString;
use std::io;
use std::os::unix::ffi::OsStringExt as _;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use crate::error::{Error, ErrorKind, Result};
use crate::mapping::Lookup;
use crate::ordered_lock::{OrderedRwLock, rank};
use crate::storage::{Storage, TryRead};
use crate::units::HostOffset;
use crate::zero::is_zero;

/// The length of a page in bytes.
const PAGE: u64 = 4096;

/// Most pages that are kept: 4 MiB.
const PAGES_MAX: u64 = 1024;

/// In what blocks zeroes are counted, in bytes.
const ZEROES_BLOCK: usize = 512;

/// Longest name of a backing file in bytes.
const BACKING_NAME_MAX: u32 = 1023;

/// A page and its number.
type Page = (u64, Arc<[u8]>);

/// A file with metadata.
#[derive(Debug)]
pub(super) struct ImageFile {
    storage: Arc<dyn Storage>,
    path: Option<PathBuf>,
    /// When it was opened.
    length: u64,
    pages: Box<[OrderedRwLock<{ rank::FOREIGN_PAGE }, Option<Page>>]>,
}

impl ImageFile {
    pub(super) fn new(storage: Arc<dyn Storage>, path: Option<&Path>) -> Result<Self> {
        Self::sharing(storage, path, 1)
    }

    /// The same for one of `count` files, which together may keep as many pages as one, but each at
    /// least one page.
    pub(super) fn sharing(
        storage: Arc<dyn Storage>,
        path: Option<&Path>,
        count: usize,
    ) -> Result<Self> {
        let length = storage.len();
        let length =
            length.map_err(|error| named(Error::from_io("find the size of", error), path))?;
        // A power of two, and not more than the share.
        let share = 1 << (PAGES_MAX / count.max(1) as u64).max(1).ilog2();
        let count = length.div_ceil(PAGE).clamp(1, share).next_power_of_two();
        let pages = (0..count).map(|_| OrderedRwLock::new(None)).collect();
        Ok(Self { storage, path: path.map(Path::to_owned), length, pages })
    }

    pub(super) fn storage(&self) -> &Arc<dyn Storage> {
        &self.storage
    }

    /// The length in bytes that the file had when it was opened.
    pub(super) fn len(&self) -> u64 {
        self.length
    }

    /// The first 512 bytes, or all that there are.
    pub(super) fn start(&self) -> Result<Vec<u8>> {
        self.read_up_to(0, 512)
    }

    /// Reads from an offset on up to `length` bytes, which is a small number, when the image is
    /// opened.
    pub(super) fn read_up_to(&self, offset: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length.min(self.length.saturating_sub(offset)) as usize];
        let read = self.storage.read_at(HostOffset::new(offset), &mut bytes);
        let read = read
            .map_err(|error| self.name(Error::from_io("read the header of", error).at(offset)))?;
        bytes.truncate(read);
        Ok(bytes)
    }

    /// Reads the header or another structure of fixed length when the image is opened.
    pub(super) fn read<const LENGTH: usize>(&self, offset: u64) -> Result<[u8; LENGTH]> {
        let mut bytes = [0; LENGTH];
        match self.storage.read_at(HostOffset::new(offset), &mut bytes) {
            Ok(length) if length == LENGTH => Ok(bytes),
            Ok(_) => Err(self.invalid("its header is cut off").at(offset)),
            Err(error) => Err(self.name(Error::from_io("read the header of", error).at(offset))),
        }
    }

    /// Reads the name of the image's backing file, which has 1 to 1023 bytes.
    pub(super) fn backing_name(&self, offset: u64, length: u32) -> Result<OsString> {
        if !(1..=BACKING_NAME_MAX).contains(&length) || !self.has(offset, length.into()) {
            return Err(self.invalid("the name of its backing file is empty, too long or cut off"));
        }
        Ok(OsString::from_vec(self.read_up_to(offset, length.into())?))
    }

    /// Checks that something of which `length` bytes are needed lies in the file, at a multiple of
    /// `unit`, as an entry for `guest` says.
    pub(super) fn check_place(
        &self,
        offset: u64,
        unit: u64,
        length: u64,
        guest: u64,
    ) -> Result<()> {
        if offset.is_multiple_of(unit) && self.has(offset, length) {
            return Ok(());
        }
        let detail = format!(
            "the tables lead to offset {offset} of the file, where nothing can be: they are damaged, or \
             the file was cut off"
        );
        Err(self.corrupt(detail, guest))
    }

    /// Whether a table or a part of the data lies within the file.
    pub(super) fn has(&self, offset: u64, length: u64) -> bool {
        let Some(end) = offset.checked_add(length) else { return false };
        // Another program may have appended since.
        end <= self.length || self.storage.len().is_ok_and(|length| end <= length)
    }

    /// That the header makes no sense.
    pub(super) fn invalid(&self, detail: impl Into<String>) -> Error {
        self.name(Error::new(ErrorKind::InvalidFormat, "open", detail))
    }

    /// That the image needs something that is not there.
    pub(super) fn unsupported(&self, detail: impl Into<String>) -> Error {
        self.name(Error::new(ErrorKind::Unsupported, "open", detail))
    }

    /// That the metadata for an offset of the disk is damaged.
    pub(super) fn corrupt(&self, detail: impl Into<String>, guest: u64) -> Error {
        self.name(Error::new(ErrorKind::Corrupt, "read", detail).at(guest))
    }

    /// That the system failed.
    pub(super) fn io(&self, operation: &'static str, error: io::Error, guest: u64) -> Error {
        self.name(Error::from_io(operation, error).at(guest))
    }

    fn name(&self, error: Error) -> Error {
        named(error, self.path.as_deref())
    }

    /// A page, if it exists; `None` if that would take waiting, and `lookup` forbids it. The last
    /// one may be short.
    fn page(&self, number: u64, lookup: Lookup) -> io::Result<Option<Arc<[u8]>>> {
        // The count is a power of two.
        let place = &self.pages[number as usize & (self.pages.len() - 1)];
        if let Some((found, page)) = &*place.read()
            && *found == number
        {
            return Ok(Some(Arc::clone(page)));
        }
        let offset = HostOffset::new(number.saturating_mul(PAGE));
        let mut bytes = vec![0; PAGE as usize];
        match lookup {
            Lookup::MayRead => {
                let length = self.storage.read_at(offset, &mut bytes)?;
                bytes.truncate(length);
            }
            Lookup::CachedOnly => {
                bytes.truncate(self.length.saturating_sub(offset.bytes()).min(PAGE) as usize);
                match self.storage.try_read_at(offset, &mut bytes) {
                    Ok(TryRead::Complete) => {}
                    // The blocking read reports what is wrong.
                    Ok(_) | Err(_) => return Ok(None),
                }
            }
        }
        let page: Arc<[u8]> = bytes.into();
        *place.write() = Some((number, Arc::clone(&page)));
        Ok(Some(page))
    }
}

fn named(error: Error, path: Option<&Path>) -> Error {
    match path {
        Some(path) => error.with_path(path),
        None => error,
    }
}

/// Reads entries of tables that lie near each other, in two tables at once.
#[derive(Debug)]
pub(super) struct Cursor<'f> {
    file: &'f ImageFile,
    lookup: Lookup,
    /// The pages that were used last.
    held: [Option<Page>; 2],
}

impl<'f> Cursor<'f> {
    pub(super) fn new(file: &'f ImageFile, lookup: Lookup) -> Self {
        Self { file, lookup, held: [None, None] }
    }

    /// The bytes at an offset of the file, in the metadata for `guest`; `None` if that would take
    /// waiting, and must not.
    pub(super) fn bytes<const LENGTH: usize>(
        &mut self,
        offset: u64,
        guest: u64,
    ) -> Result<Option<[u8; LENGTH]>> {
        let mut bytes = [0; LENGTH];
        let mut done = 0;
        while done < LENGTH {
            let position = offset.checked_add(done as u64).ok_or_else(|| self.cut_off(guest))?;
            let Some(page) = self.page(position / PAGE, guest)? else { return Ok(None) };
            let rest = page.get((position % PAGE) as usize..).unwrap_or_default();
            let length = rest.len().min(LENGTH - done);
            if length == 0 {
                return Err(self.cut_off(guest));
            }
            bytes[done..done + length].copy_from_slice(&rest[..length]);
            done += length;
        }
        Ok(Some(bytes))
    }

    /// Counts the bytes from `offset` on that are zero, at most `length` and as far as the page
    /// that was read last shows them.
    pub(super) fn zeroes(&self, offset: u64, length: u64) -> u64 {
        let page = self.held[0].as_ref().filter(|(held, _)| *held == offset / PAGE);
        let bytes = page.and_then(|(_, page)| page.get((offset % PAGE) as usize..));
        let length = usize::try_from(length).unwrap_or(usize::MAX);
        let bytes = bytes.unwrap_or_default();
        let bytes = bytes.get(..length).unwrap_or(bytes);
        // A large disk has many: in blocks, and byte by byte only in the last one.
        let blocks = bytes.chunks(ZEROES_BLOCK).take_while(|block| is_zero(block)).count();
        let start = (blocks * ZEROES_BLOCK).min(bytes.len());
        let rest = bytes[start..].iter().take(ZEROES_BLOCK).take_while(|byte| **byte == 0);
        (start + rest.count()) as u64
    }

    pub(super) fn u32_le(&mut self, offset: u64, guest: u64) -> Result<Option<u32>> {
        Ok(self.bytes(offset, guest)?.map(u32::from_le_bytes))
    }

    pub(super) fn u64_le(&mut self, offset: u64, guest: u64) -> Result<Option<u64>> {
        Ok(self.bytes(offset, guest)?.map(u64::from_le_bytes))
    }

    pub(super) fn u32_be(&mut self, offset: u64, guest: u64) -> Result<Option<u32>> {
        Ok(self.bytes(offset, guest)?.map(u32::from_be_bytes))
    }

    pub(super) fn u64_be(&mut self, offset: u64, guest: u64) -> Result<Option<u64>> {
        Ok(self.bytes(offset, guest)?.map(u64::from_be_bytes))
    }

    fn page(&mut self, number: u64, guest: u64) -> Result<Option<&[u8]>> {
        let is_it = |page: &Option<Page>| page.as_ref().is_some_and(|(held, _)| *held == number);
        if !is_it(&self.held[0]) {
            self.held.swap(0, 1);
        }
        if !is_it(&self.held[0]) {
            let page = self.file.page(number, self.lookup);
            let page = page.map_err(|error| self.file.io("read the tables of", error, guest))?;
            let Some(page) = page else { return Ok(None) };
            self.held[0] = Some((number, page));
        }
        Ok(self.held[0].as_ref().map(|(_, page)| &**page))
    }

    fn cut_off(&self, guest: u64) -> Error {
        self.file.corrupt("the file ends before the table for this part of the disk", guest)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::storage::{Durability, MemoryStorage};

    fn file(bytes: &[u8]) -> ImageFile {
        ImageFile::new(Arc::new(MemoryStorage::from_bytes(bytes)), None).unwrap()
    }

    /// A storage of which everything fails.
    #[derive(Debug)]
    struct Failing;

    impl Storage for Failing {
        fn len(&self) -> io::Result<u64> {
            Err(io::ErrorKind::Other.into())
        }

        fn read_at(&self, _: HostOffset, _: &mut [u8]) -> io::Result<usize> {
            Err(io::ErrorKind::Other.into())
        }

        fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn set_len(&self, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }

        fn sync(&self) -> io::Result<()> {
            Err(io::ErrorKind::Other.into())
        }
    }

    #[test]
    fn a_file_whose_size_cannot_be_found_is_named() {
        let path = Path::new("extent.vmdk");
        let error = ImageFile::sharing(Arc::new(Failing), Some(path), 2).unwrap_err();
        // The caller may know the disk only.
        assert_eq!(error.with_path("disk.vmdk").path(), Some(path));
    }

    #[test]
    fn entries_are_found_in_pages_and_across_them() {
        let bytes: Vec<u8> = (0..3 * PAGE + 10).map(|place| (place % 251) as u8).collect();
        let file = file(&bytes);
        let mut cursor = Cursor::new(&file, Lookup::MayRead);
        for offset in [0, 1, PAGE - 4, PAGE - 3, PAGE - 1, PAGE, 2 * PAGE + 5, 3 * PAGE + 6, 3] {
            let expected: [u8; 4] = bytes[offset as usize..][..4].try_into().unwrap();
            assert_eq!(cursor.bytes(offset, 0).unwrap(), Some(expected), "{offset}");
        }
    }

    #[test]
    fn zeroes_are_counted_as_far_as_the_page_that_was_read_last() {
        let mut bytes = vec![0; 2 * PAGE as usize];
        bytes[100] = 1;
        let file = file(&bytes);
        let mut cursor = Cursor::new(&file, Lookup::MayRead);
        assert_eq!(cursor.zeroes(0, 8), 0, "no page was read");
        cursor.u32_le(0, 0).unwrap();
        assert_eq!(
            (cursor.zeroes(0, 8), cursor.zeroes(0, PAGE), cursor.zeroes(100, 4)),
            (8, 100, 0)
        );
        assert_eq!((cursor.zeroes(104, u64::MAX), cursor.zeroes(PAGE, 4)), (PAGE - 104, 0));
    }

    #[test]
    fn an_entry_past_the_end_is_damage() {
        let file = file(&[1; PAGE as usize + 6]);
        let mut cursor = Cursor::new(&file, Lookup::MayRead);
        assert_eq!(cursor.u32_le(PAGE + 2, 0).unwrap(), Some(0x0101_0101));
        for offset in [PAGE + 3, PAGE + 6, 2 * PAGE, u64::MAX - 1, u64::MAX] {
            let error = cursor.u32_le(offset, 77).unwrap_err();
            assert_eq!((error.kind(), error.offset()), (ErrorKind::Corrupt, Some(77)), "{offset}");
        }
    }

    #[test]
    fn a_page_gives_way_to_another_one_of_its_place() {
        let mut bytes = vec![0; ((PAGES_MAX + 1) * PAGE) as usize];
        let last = bytes.len() - PAGE as usize;
        bytes[last..].fill(9);
        let file = file(&bytes);
        assert_eq!(file.pages.len() as u64, PAGES_MAX);
        for _ in 0..2 {
            let mut cursor = Cursor::new(&file, Lookup::MayRead);
            assert_eq!(cursor.u32_le(0, 0).unwrap(), Some(0));
            assert_eq!(cursor.u32_le(PAGES_MAX * PAGE, 0).unwrap(), Some(0x0909_0909));
        }
    }
}
