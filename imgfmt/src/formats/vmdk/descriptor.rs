//! The descriptor: a text that says which files the disk lies in, and what is below it.
//!
//! ```text
//! # Disk DescriptorFile
//! version=1
//! CID=fffffffe
//! parentCID=ffffffff
//! createType="twoGbMaxExtentSparse"
//! # Extent description
//! RW 4192256 SPARSE "disk-s001.vmdk"
//! RW 8192 FLAT "disk-f002.vmdk" 0
//! RW 8192 ZERO
//! ```

use std::ffi::OsString;
use std::os::unix::ffi::OsStringExt as _;

use crate::error::Result;
use crate::format::Format;
use crate::formats::file::ImageFile;
use crate::formats::foreign::{Identity, Parent};

/// What sizes and offsets are counted in, in bytes.
pub(super) const SECTOR: u64 = 512;

/// The longest descriptor, in bytes. 4096 lines take a quarter of that.
const LENGTH_MAX: u64 = 1 << 20;

/// Most extents of one disk: each is an open file.
pub(super) const EXTENTS_MAX: usize = 4096;

/// The content identifier of no parent.
pub(super) const NO_PARENT: u32 = u32::MAX;

/// What a descriptor says.
#[derive(Debug)]
pub(super) struct Descriptor {
    /// Changes whenever the disk is written to after it was opened.
    pub(super) identity: Option<Identity>,
    pub(super) parent: Option<Parent>,
    pub(super) extents: Vec<ExtentLine>,
    pub(super) create_type: Option<String>,
    pub(super) cid: Option<u32>,
    pub(super) parent_cid: Option<u32>,
}

/// A line for a part of the disk; the parts follow each other.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct ExtentLine {
    pub(super) is_accessible: bool,
    /// The length in bytes.
    pub(super) length: u64,
    pub(super) kind: ExtentKind,
    /// The word for that.
    pub(super) word: &'static str,
    /// The names that the file may have, the most likely one first.
    pub(super) names: Vec<OsString>,
    /// Where the part starts in the file, in bytes.
    pub(super) offset: u64,
}

/// How a part of the disk is stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ExtentKind {
    Flat,
    /// Any of the three kinds of sparse extents: the file says which.
    Sparse,
    Zero,
}

/// The words for them.
const KINDS: [(&str, ExtentKind); 6] = [
    ("FLAT", ExtentKind::Flat),
    ("VMFS", ExtentKind::Flat),
    (SPARSE, ExtentKind::Sparse),
    ("VMFSSPARSE", ExtentKind::Sparse),
    ("SESPARSE", ExtentKind::Sparse),
    ("ZERO", ExtentKind::Zero),
];

/// The word for the usual sparse extents.
pub(super) const SPARSE: &str = "SPARSE";

impl Descriptor {
    /// Reads all of a text of this length at an offset of `file`: a line that is left out may be
    /// one of an extent, or the one that names the parent.
    pub(super) fn read((offset, length): (u64, u64), file: &ImageFile) -> Result<Self> {
        if length > LENGTH_MAX {
            return Err(file.invalid("its descriptor is longer than 1 MiB"));
        }
        let text = file.read_up_to(offset, length)?;
        if text.len() as u64 != length {
            return Err(file.invalid("its descriptor is cut off"));
        }
        Self::parse(&text, file)
    }

    /// Reads a text, which errors say to be in `file`.
    fn parse(text: &[u8], file: &ImageFile) -> Result<Self> {
        // The space that is set aside for a text in a sparse extent is filled up with zeroes.
        let text = text.split(|byte| *byte == 0).next().unwrap_or_default();
        let lines = || {
            let lines = text.split(|byte| matches!(byte, b'\n' | b'\r')).map(<[u8]>::trim_ascii);
            lines.filter(|line| !line.is_empty() && !line.starts_with(b"#"))
        };
        let value = |key: &str| lines().find_map(|line| value_of(line, key));
        let encoding = value("encoding").map_or(Encoding::Utf8, Encoding::named);
        if lines().any(is_encrypted) {
            return Err(file.unsupported("it is encrypted"));
        }
        if let Some(version) = value("version")
            && !matches!(version, b"1" | b"2" | b"3" | b"4")
        {
            let version = version.escape_ascii();
            return Err(file.unsupported(format!("its descriptor has the version {version}")));
        }
        let number = |key: &str| -> Result<Option<u32>> {
            let Some(value) = value(key) else { return Ok(None) };
            let number = std::str::from_utf8(value).ok();
            let number = number.and_then(|text| u32::from_str_radix(text, 16).ok());
            let damaged = || {
                let value = value.escape_ascii();
                file.invalid(format!("its {key} '{value}' is not a hexadecimal number"))
            };
            number.map(Some).ok_or_else(damaged)
        };
        let extents: Vec<&[u8]> = lines().filter(|line| is_extent(line)).collect();
        if extents.len() > EXTENTS_MAX {
            let detail = format!("its {} extents are more than {EXTENTS_MAX}", extents.len());
            return Err(file.unsupported(detail));
        }
        let extents = extents.into_iter().map(|line| ExtentLine::parse(line, encoding, file));
        let (cid, parent_cid) = (number("CID")?, number("parentCID")?);
        Ok(Self {
            identity: cid.map(identity),
            parent: parent(parent_cid, value("parentFileNameHint"), encoding, file)?,
            extents: extents.collect::<Result<_>>()?,
            create_type: value("createType").map(|name| String::from_utf8_lossy(name).into()),
            cid,
            parent_cid,
        })
    }
}

/// What the image that a content identifier belongs to is known by.
fn identity(cid: u32) -> Identity {
    let mut bytes = [0; 16];
    bytes[..4].copy_from_slice(&cid.to_le_bytes());
    Identity(bytes)
}

fn parent(
    cid: Option<u32>,
    hint: Option<&[u8]>,
    encoding: Encoding,
    file: &ImageFile,
) -> Result<Option<Parent>> {
    let hint = match (cid, hint.filter(|hint| !hint.is_empty())) {
        (Some(NO_PARENT), _) | (None, None) => return Ok(None),
        (_, Some(hint)) => hint,
        (Some(_), None) => {
            let detail = "it has only what changed since another image, which it does not name";
            return Err(file.invalid(detail));
        }
    };
    let mut names = encoding.names(hint);
    // The name may be one of another machine; the parent is known by its identifier.
    for other in [with_slashes(hint), last_component(hint).to_vec()] {
        for name in encoding.names(&other) {
            if !names.contains(&name) {
                names.push(name);
            }
        }
    }
    Ok(Some(Parent { names, format: Some(Format::Vmdk), identity: cid.map(identity) }))
}

/// A name as Windows has it, as others do.
fn with_slashes(name: &[u8]) -> Vec<u8> {
    name.iter().map(|byte| if *byte == b'\\' { b'/' } else { *byte }).collect()
}

fn last_component(name: &[u8]) -> &[u8] {
    name.rsplit(|byte| matches!(byte, b'/' | b'\\')).next().unwrap_or(name)
}

/// The value that a line gives to a key, without its quotes.
fn value_of<'l>(line: &'l [u8], key: &str) -> Option<&'l [u8]> {
    let end = line.iter().position(|byte| *byte == b'=')?;
    let (name, value) = (line[..end].trim_ascii(), line[end + 1..].trim_ascii());
    if !name.eq_ignore_ascii_case(key.as_bytes()) {
        return None;
    }
    let quoted = value.strip_prefix(b"\"").and_then(|rest| rest.strip_suffix(b"\""));
    Some(quoted.unwrap_or(value))
}

/// Whether a line is one of those that encrypted disks have, or disks that the host encrypts.
fn is_encrypted(line: &[u8]) -> bool {
    let filters = value_of(line, "ddb.iofilters");
    let is_crypt = |name: &[u8]| name.eq_ignore_ascii_case(b"crypt");
    line.get(..11).is_some_and(|start| start.eq_ignore_ascii_case(b"encryption."))
        || filters.is_some_and(|filters| filters.windows(5).any(is_crypt))
}

fn is_extent(line: &[u8]) -> bool {
    let mut words = line.split(|byte| matches!(byte, b' ' | b'\t'));
    matches!(words.next(), Some(b"RW" | b"RDONLY" | b"NOACCESS")) && words.next().is_some()
}

impl ExtentLine {
    fn parse(line: &[u8], encoding: Encoding, file: &ImageFile) -> Result<Self> {
        let damaged =
            || file.invalid(format!("its extent '{}' makes no sense", line.escape_ascii()));
        // A name may have spaces and quotes, so it ends with the last quote.
        let start = line.iter().position(|byte| *byte == b'"').unwrap_or(line.len());
        let (words, rest) = line.split_at(start);
        let (name, behind) = match rest.iter().rposition(|byte| *byte == b'"') {
            Some(end) if end > 0 => (&rest[1..end], &rest[end + 1..]),
            Some(_) => return Err(damaged()),
            None => (&[][..], &[][..]),
        };
        let mut words = words.split(u8::is_ascii_whitespace).filter(|word| !word.is_empty());
        let access = words.next();
        let sectors = words.next().and_then(number).ok_or_else(damaged)?;
        let found = words.next().unwrap_or_default();
        let kind = KINDS.iter().find(|(word, _)| found.eq_ignore_ascii_case(word.as_bytes()));
        let Some((word, kind)) = kind.copied() else {
            let found = found.escape_ascii();
            let detail = format!(
                "its extent is of the type '{found}': only disks in files can be read, not devices"
            );
            return Err(file.unsupported(detail));
        };
        let offset = match behind.trim_ascii() {
            [] => Some(0),
            // What partitions have behind it is about devices.
            behind => behind.split(u8::is_ascii_whitespace).next().and_then(number),
        };
        let in_bytes =
            |sectors: u64| sectors.checked_mul(SECTOR).filter(|bytes| *bytes <= i64::MAX as u64);
        let offset = offset.and_then(in_bytes).ok_or_else(damaged)?;
        let length = in_bytes(sectors).filter(|length| *length > 0).ok_or_else(damaged)?;
        if words.next().is_some() || name.is_empty() != (kind == ExtentKind::Zero) {
            return Err(damaged());
        }
        let is_accessible = access != Some(b"NOACCESS");
        Ok(Self { is_accessible, length, kind, word, names: encoding.names(name), offset })
    }
}

fn number(word: &[u8]) -> Option<u64> {
    std::str::from_utf8(word).ok()?.parse().ok()
}

/// How the names in a descriptor are written.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// Or one that is not known: names are taken byte for byte.
    Utf8,
    Windows1252,
}

impl Encoding {
    fn named(name: &[u8]) -> Self {
        match name.eq_ignore_ascii_case(b"windows-1252") {
            true => Self::Windows1252,
            false => Self::Utf8,
        }
    }

    /// The names that a file may have here: in UTF-8, and byte for byte.
    fn names(self, name: &[u8]) -> Vec<OsString> {
        let bytes = OsString::from_vec(name.to_vec());
        match self {
            Self::Windows1252 if !name.is_ascii() => {
                vec![
                    name.iter().map(|byte| from_windows_1252(*byte)).collect::<String>().into(),
                    bytes,
                ]
            }
            _ => vec![bytes],
        }
    }
}

fn from_windows_1252(byte: u8) -> char {
    const FROM_0X80: [char; 32] = [
        '€', '\u{81}', '‚', 'ƒ', '„', '…', '†', '‡', 'ˆ', '‰', 'Š', '‹', 'Œ', '\u{8d}', 'Ž',
        '\u{8f}', '\u{90}', '‘', '’', '“', '”', '•', '–', '—', '˜', '™', 'š', '›', 'œ', '\u{9d}',
        'ž', 'Ÿ',
    ];
    match byte {
        0x80..=0x9f => FROM_0X80[usize::from(byte - 0x80)],
        byte => char::from(byte),
    }
}

/// Whether a file begins as a descriptor: a text whose first line that is neither empty nor a
/// comment gives the version.
pub(super) fn starts(start: &[u8]) -> bool {
    const COMMENT: &[u8] = b"# Disk DescriptorFile";
    if start.get(..COMMENT.len()).is_some_and(|line| line.eq_ignore_ascii_case(COMMENT)) {
        return true;
    }
    let mut lines = start.split(|byte| *byte == b'\n').map(<[u8]>::trim_ascii);
    let first = lines.find(|line| !line.is_empty() && line.first() != Some(&b'#'));
    first.is_some_and(|line| matches!(line, b"version=1" | b"version=2" | b"version=3"))
}
