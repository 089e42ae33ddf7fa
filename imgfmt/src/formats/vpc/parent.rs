//! The names of the parent of a differencing image.
//!
//! A locator has a code for the kind of name (4 bytes), the space for it (4), its length in bytes
//! (4), 4 bytes that are not used, and its offset in the file (8).

use std::ffi::OsString;

use super::super::file::ImageFile;
use super::super::foreign::{Identity, Parent};
use crate::bytes::{u32_at, u64_at};
use crate::error::Result;
use crate::format::Format;

/// The length of the dynamic header.
pub(super) const HEADER_LENGTH: usize = 1024;

const UUID: usize = 40;
const NAME: usize = 64;
const NAME_LENGTH: usize = 512;
const LOCATORS: usize = 576;
const LOCATOR_LENGTH: usize = 24;
const LOCATOR_COUNT: usize = 8;

/// Longest name that is read, in bytes.
const NAME_MAX: usize = 4096;

/// Reads them, the most likely one first.
pub(super) fn read(file: &ImageFile, header: &[u8; HEADER_LENGTH]) -> Result<Parent> {
    let mut uuid = [0; 16];
    uuid.copy_from_slice(&header[UUID..UUID + 16]);
    let mut names = Names::default();
    let mut absolute = Vec::new();
    for number in 0..LOCATOR_COUNT {
        let locator = &header[LOCATORS + number * LOCATOR_LENGTH..][..LOCATOR_LENGTH];
        let (length, offset) = (u32_at(locator, 8) as usize, u64_at(locator, 16));
        let code = &locator[..4];
        if !matches!(code, b"W2ru" | b"W2ku" | b"MacX") || length == 0 || length > NAME_MAX {
            continue;
        }
        let bytes = file.read_up_to(offset, length as u64)?;
        match code {
            b"W2ru" => names.add(from_windows(&utf16(&bytes, u16::from_le_bytes))),
            b"W2ku" => absolute.push(from_windows(&utf16(&bytes, u16::from_le_bytes))),
            _ => names.add_url(&String::from_utf8_lossy(&bytes)),
        }
    }
    let name = utf16(&header[NAME..NAME + NAME_LENGTH], u16::from_be_bytes);
    // A path of another machine means nothing here: its last part may lie beside the image.
    for path in absolute.into_iter().chain([from_windows(&name)]) {
        names.add(path.rsplit('/').next().unwrap_or_default().to_owned());
    }
    if names.0.is_empty() {
        return Err(file.invalid("it does not name its parent"));
    }
    Ok(Parent { names: names.0, format: Some(Format::Vpc), identity: Some(Identity(uuid)) })
}

/// Names without repetitions.
#[derive(Default)]
struct Names(Vec<OsString>);

impl Names {
    fn add(&mut self, name: String) {
        let name = OsString::from(name);
        if !name.is_empty() && !self.0.contains(&name) {
            self.0.push(name);
        }
    }

    /// Adds a name of the form `file://PATH`, where the path may be relative.
    fn add_url(&mut self, url: &str) {
        let url = url.trim_end_matches('\0');
        let path = url.strip_prefix("file://").unwrap_or(url);
        self.add(
            path.strip_prefix("localhost/").map_or(path.to_owned(), |rest| format!("/{rest}")),
        );
    }
}

/// Text up to the first zero.
fn utf16(bytes: &[u8], word: fn([u8; 2]) -> u16) -> String {
    let words = bytes.chunks_exact(2).map(|pair| word([pair[0], pair[1]]));
    let words: Vec<u16> = words.take_while(|word| *word != 0).collect();
    String::from_utf16_lossy(&words)
}

fn from_windows(path: &str) -> String {
    let path = path.replace('\\', "/");
    path.strip_prefix("./").map(str::to_owned).unwrap_or(path)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_of_windows_and_urls_become_paths() {
        assert_eq!(from_windows(r".\base.vhd"), "base.vhd");
        assert_eq!(from_windows(r"..\disks\base.vhd"), "../disks/base.vhd");
        let wide: Vec<u8> = "b\u{e4}se".encode_utf16().flat_map(u16::to_le_bytes).collect();
        let padded = [wide, vec![0; 4], vec![b'x', 0]].concat();
        assert_eq!(utf16(&padded, u16::from_le_bytes), "b\u{e4}se");
        let mut names = Names::default();
        for url in ["file://./base.vhd\0", "file://localhost/a/b", "file:///a/b", "./base.vhd"] {
            names.add_url(url);
        }
        assert_eq!(names.0, ["./base.vhd", "/a/b"]);
    }
}
