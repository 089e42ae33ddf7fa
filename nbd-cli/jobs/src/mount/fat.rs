//! FAT12, FAT16 and FAT32, with long names.

use std::io::{self, Read as _, Seek as _, SeekFrom};
use std::time::{Duration, SystemTime};

use fatfs::{DateTime, Dir, DirEntry, File, FileSystem as Fat, FsOptions};
use fuser::Errno;

use super::file_system::{FileInfo, FileKind, FileSystem, MAX_ENTRIES, Name, Unreadable};
use super::part_reader::PartReader;

/// Files that are kept open where they were read last: the kernel reads ahead with several threads.
const MAX_OPEN: usize = 16;
/// Deepest path: a directory that contains itself has names without end.
const MAX_DEPTH: usize = 256;

struct FatVolume<'a> {
    system: &'a Fat<PartReader>,
    open: Vec<(Vec<u8>, u64, File<'a, PartReader>)>,
}

/// Opens the file system and hands it to `serve`.
pub(super) fn open(reader: PartReader, serve: impl FnOnce(&mut dyn FileSystem)) {
    match Fat::new(reader, FsOptions::new().update_accessed_date(false)) {
        Ok(system) => serve(&mut FatVolume { system: &system, open: Vec::new() }),
        Err(_) => serve(&mut Unreadable),
    }
}

impl<'a> FatVolume<'a> {
    /// Finds a file; `None` for the root, which has no entry.
    fn entry(&self, path: &[u8]) -> Result<Option<DirEntry<'a, PartReader>>, Errno> {
        let path = std::str::from_utf8(path).map_err(|_| Errno::ENOENT)?;
        let mut found: Option<DirEntry<'a, PartReader>> = None;
        let names = path.split('/').filter(|name| !name.is_empty());
        // A damaged directory may contain itself.
        if names.clone().count() > MAX_DEPTH {
            return Err(Errno::ENAMETOOLONG);
        }
        for name in names {
            let directory = self.directory(found.as_ref())?;
            found = Some(find(&directory, name)?.ok_or(Errno::ENOENT)?);
        }
        Ok(found)
    }

    fn directory(
        &self,
        entry: Option<&DirEntry<'a, PartReader>>,
    ) -> Result<Dir<'a, PartReader>, Errno> {
        match entry {
            None => Ok(self.system.root_dir()),
            Some(entry) if entry.is_dir() => Ok(entry.to_dir()),
            Some(_) => Err(Errno::ENOTDIR),
        }
    }

    /// Returns the file, at the offset.
    fn file_at(&mut self, path: &[u8], offset: u64) -> Result<File<'a, PartReader>, Errno> {
        let here = |(opened, position, _): &(Vec<u8>, u64, File<'a, PartReader>)| {
            opened == path && *position == offset
        };
        if let Some(index) = self.open.iter().position(here) {
            return Ok(self.open.remove(index).2);
        }
        let entry = self.entry(path)?.filter(DirEntry::is_file).ok_or(Errno::EISDIR)?;
        let mut file = entry.to_file();
        file.seek(SeekFrom::Start(offset)).map_err(number)?;
        Ok(file)
    }
}

/// Finds a name in a directory. FAT does not distinguish upper and lower case.
fn find<'a>(
    directory: &Dir<'a, PartReader>,
    name: &str,
) -> Result<Option<DirEntry<'a, PartReader>>, Errno> {
    for entry in directory.iter().take(MAX_ENTRIES) {
        let entry = entry.map_err(number)?;
        if entry.file_name().eq_ignore_ascii_case(name) {
            return Ok(Some(entry));
        }
    }
    Ok(None)
}

impl FileSystem for FatVolume<'_> {
    fn info(&mut self, path: &[u8]) -> Result<FileInfo, Errno> {
        let entry = self.entry(path)?;
        let is_directory = entry.as_ref().is_none_or(DirEntry::is_dir);
        Ok(FileInfo {
            kind: if is_directory { FileKind::Directory } else { FileKind::File },
            size: entry.as_ref().filter(|_| !is_directory).map_or(0, DirEntry::len),
            mode: if is_directory { 0o755 } else { 0o644 },
            user: 0,
            group: 0,
            modified: entry.map_or(SystemTime::UNIX_EPOCH, |entry| time(entry.modified())),
        })
    }

    fn list(&mut self, path: &[u8]) -> Result<Vec<Name>, Errno> {
        let entry = self.entry(path)?;
        let mut names = Vec::new();
        for entry in self.directory(entry.as_ref())?.iter() {
            let entry = entry.map_err(number)?;
            if names.len() >= MAX_ENTRIES {
                return Err(Errno::EOVERFLOW);
            }
            let kind = if entry.is_dir() { FileKind::Directory } else { FileKind::File };
            names.push((entry.file_name().into_bytes(), kind));
        }
        Ok(names)
    }

    fn link(&mut self, _: &[u8]) -> Result<Vec<u8>, Errno> {
        Err(Errno::EINVAL)
    }

    fn read(&mut self, path: &[u8], offset: u64, length: usize) -> Result<Vec<u8>, Errno> {
        let size = self.entry(path)?.map_or(0, |entry| entry.len());
        let left = usize::try_from(size.saturating_sub(offset)).unwrap_or(usize::MAX);
        if left == 0 || length == 0 {
            return Ok(Vec::new());
        }
        let mut file = self.file_at(path, offset)?;
        let mut bytes = vec![0; length.min(left)];
        // A chain that is shorter than the file is damage, not its end.
        file.read_exact(&mut bytes).map_err(number)?;
        if self.open.len() >= MAX_OPEN {
            self.open.remove(0);
        }
        let position = offset.saturating_add(bytes.len() as u64);
        self.open.push((path.to_vec(), position, file));
        Ok(bytes)
    }
}

/// The time, taken as UTC: the file system does not say where it was written.
fn time(time: DateTime) -> SystemTime {
    let (date, time) = (time.date, time.time);
    // Years begin in March, so that a leap day is the last.
    let (year, month) = match date.month {
        0..3 => (u64::from(date.year) - 1, u64::from(date.month) + 9),
        month => (u64::from(date.year), u64::from(month) - 3),
    };
    let days = 365 * year + year / 4 - year / 100
        + year / 400
        + (153 * month + 2) / 5
        + u64::from(date.day.max(1))
        - 1;
    // The years of FAT begin in 1980.
    let days = days.saturating_sub(719_468);
    let seconds = u64::from(time.hour) * 3600 + u64::from(time.min) * 60 + u64::from(time.sec);
    SystemTime::UNIX_EPOCH + Duration::from_secs(days * 86_400 + seconds)
}

#[allow(clippy::needless_pass_by_value)] // For map_err.
fn number(error: io::Error) -> Errno {
    match error.kind() {
        io::ErrorKind::NotFound => Errno::ENOENT,
        _ => Errno::EIO,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn times_are_those_of_the_calendar() {
        let at = |year, month, day, hour| {
            let time = fatfs::Time { hour, min: 30, sec: 2, millis: 0 };
            let time = super::time(DateTime { date: fatfs::Date { year, month, day }, time });
            time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs()
        };
        assert_eq!(at(2024, 2, 29, 12), 1_709_209_802);
        assert_eq!(at(2000, 3, 1, 0), 951_870_602);
        assert_eq!(at(1980, 0, 0, 0), 312_856_202);
    }
}
