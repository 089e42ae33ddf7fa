//! The manifest of an archive of a virtual machine (OVA): whether its files are what it says
//! (DSP0243, section 6.1). Its signature (`.cert`) is not verified.

use std::collections::HashSet;
use std::path::Path;

use imgfmt::{Archive, Error, OpenOptions};
use openssl::hash::{Hasher, MessageDigest};
use serde::Serialize;

use crate::error::{JobError, JobErrorKind};
use crate::observer::JobContext;
use crate::text::printable;

/// The longest manifest that is read, in bytes; it has a line for each of at most 4096 files.
const MANIFEST_MAX: u64 = 4 << 20;

/// What the manifest of an archive says of its files.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ManifestReport {
    /// The name of the manifest in the archive.
    pub manifest: String,
    /// Every file that the manifest or the archive has, besides manifests and their signatures.
    pub files: Vec<ManifestEntry>,
}

/// A file of an archive with a manifest.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ManifestEntry {
    /// Its name in the archive.
    pub filename: String,
    /// The digest in the manifest, such as `sha256`.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub digest: Option<&'static str>,
    /// What was found.
    pub state: FileState,
}

/// Whether a file is what the manifest says.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum FileState {
    /// It has the digest in the manifest.
    Ok,
    /// It has another one: it was changed or is damaged.
    Changed,
    /// The archive lacks it.
    Missing,
    /// The manifest does not list it.
    Unlisted,
}

impl FileState {
    /// Returns it in words.
    #[must_use]
    pub fn words(self) -> &'static str {
        match self {
            Self::Ok => "as in the manifest",
            Self::Changed => {
                "has another digest than in the manifest: it was changed or is damaged"
            }
            Self::Missing => {
                "is in the manifest, and not in the archive: that was cut off or changed"
            }
            Self::Unlisted => "is in the archive, and not in the manifest",
        }
    }
}

impl ManifestReport {
    /// Returns the files that are not what the manifest says.
    pub fn wrong(&self) -> impl Iterator<Item = &ManifestEntry> {
        self.files.iter().filter(|file| file.state != FileState::Ok)
    }
}

/// Compares the files of the archive at `path` with its manifest; `None` if it is not an archive,
/// or has no manifest. Reads the whole archive. Blocks, and must not be called by asynchronous
/// tasks.
///
/// # Errors
///
/// If the archive or its manifest is damaged or cannot be read, or the job was cancelled.
pub fn check_manifest(
    path: &Path,
    options: &OpenOptions,
    context: &JobContext,
) -> Result<Option<ManifestReport>, JobError> {
    let source = |error: Error| JobError::image(JobErrorKind::Source, error);
    let Some(archive) = Archive::open(path, options).map_err(source)? else { return Ok(None) };
    let members = archive.members();
    let invalid = |why: String| {
        JobError::source(format!("cannot check the manifest of '{}': {why}", path.display()))
    };
    let mut manifests = members.iter().filter(|member| member.has_ending("mf"));
    let (manifest, lines) = match (manifests.next(), manifests.next()) {
        (None, _) => return Ok(None),
        (Some(_), Some(_)) => return Err(invalid("the archive has several".to_owned())),
        (Some(manifest), None) if manifest.length > MANIFEST_MAX => {
            return Err(invalid("it is longer than 4 MiB".to_owned()));
        }
        (Some(manifest), None) => {
            let mut text = Vec::new();
            let add = |part: &[u8]| {
                text.extend_from_slice(part);
                true
            };
            archive.read(&manifest.name, add).map_err(source)?;
            (shown(&manifest.name), parse(&text).map_err(invalid)?)
        }
    };
    let names: HashSet<&[u8]> = members.iter().map(|member| &*member.name).collect();
    let mut files = Vec::new();
    for line in &lines {
        let state = match names.contains(&*line.name) {
            true => compare(&archive, line, context)?,
            false => FileState::Missing,
        };
        files.push(ManifestEntry {
            filename: shown(&line.name),
            digest: Some(line.algorithm.0),
            state,
        });
    }
    let listed: HashSet<&[u8]> = lines.iter().map(|line| &*line.name).collect();
    for member in &members {
        let is_own = ["mf", "cert"].iter().any(|ending| member.has_ending(ending));
        if !is_own && !listed.contains(&*member.name) {
            let filename = shown(&member.name);
            files.push(ManifestEntry { filename, digest: None, state: FileState::Unlisted });
        }
    }
    Ok(Some(ManifestReport { manifest, files }))
}

/// A line of a manifest: `SHA256(disk.vmdk)= 01ab…`.
#[derive(Debug)]
struct Line {
    name: Vec<u8>,
    algorithm: Algorithm,
    digest: Vec<u8>,
}

/// A digest with its name.
#[derive(Clone, Copy)]
struct Algorithm(&'static str, MessageDigest);

impl std::fmt::Debug for Algorithm {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str(self.0)
    }
}

impl Algorithm {
    fn named(word: &[u8]) -> Option<Self> {
        let is = |name: &str| word.eq_ignore_ascii_case(name.as_bytes());
        Some(match word {
            _ if is("SHA1") => Self("sha1", MessageDigest::sha1()),
            // As OpenSSL 3 writes it.
            _ if is("SHA256") || is("SHA2-256") => Self("sha256", MessageDigest::sha256()),
            _ if is("SHA384") || is("SHA2-384") => Self("sha384", MessageDigest::sha384()),
            _ if is("SHA512") || is("SHA2-512") => Self("sha512", MessageDigest::sha512()),
            _ => return None,
        })
    }
}

fn parse(text: &[u8]) -> Result<Vec<Line>, String> {
    let mut lines: Vec<Line> = Vec::new();
    let mut known = HashSet::new();
    for (number, line) in (1..).zip(text.split(|byte| *byte == b'\n')) {
        let line = line.trim_ascii();
        if line.is_empty() {
            continue;
        }
        let found = parse_line(line).ok_or_else(|| format!("its line {number} makes no sense"))?;
        if !known.insert(found.name.clone()) {
            return Err(format!("it has several lines for '{}'", shown(&found.name)));
        }
        lines.push(found);
    }
    match lines.is_empty() {
        true => Err("it is empty".to_owned()),
        false => Ok(lines),
    }
}

fn parse_line(line: &[u8]) -> Option<Line> {
    let start = line.iter().position(|byte| *byte == b'(')?;
    let algorithm = Algorithm::named(line[..start].trim_ascii())?;
    // A name may have any of these.
    let equals = line.iter().rposition(|byte| *byte == b'=')?;
    let name = line.get(start + 1..equals)?.trim_ascii_end().strip_suffix(b")")?;
    let name = name.strip_prefix(b"./").unwrap_or(name);
    let digits = line[equals + 1..].trim_ascii();
    if name.is_empty() || digits.len() != 2 * algorithm.1.size() {
        return None;
    }
    let byte = |digits: &[u8]| {
        let digits = std::str::from_utf8(digits).ok()?;
        digits.bytes().all(|digit| digit.is_ascii_hexdigit()).then_some(())?;
        u8::from_str_radix(digits, 16).ok()
    };
    let digest = digits.chunks(2).map(byte).collect::<Option<_>>()?;
    Some(Line { name: name.to_vec(), algorithm, digest })
}

fn compare(archive: &Archive, line: &Line, context: &JobContext) -> Result<FileState, JobError> {
    let failed = |error: openssl::error::ErrorStack| {
        let message = format!("OpenSSL cannot make {}: {error}", line.algorithm.0);
        JobError::new(JobErrorKind::Internal, message)
    };
    let mut hasher = Hasher::new(line.algorithm.1).map_err(failed)?;
    let mut result = Ok(());
    let read = archive.read(&line.name, |part| {
        result = hasher.update(part).map_err(failed);
        result.is_ok() && !context.cancellation.is_cancelled()
    });
    read.map_err(|error| JobError::image(JobErrorKind::Source, error))?;
    result?;
    context.cancellation.of_image_jobs().check()?;
    let digest = hasher.finish().map_err(failed)?;
    Ok(if *digest == *line.digest { FileState::Ok } else { FileState::Changed })
}

fn shown(name: &[u8]) -> String {
    printable(&String::from_utf8_lossy(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lines_are_read_as_programs_write_them() {
        let one = "00".repeat(20);
        let sha256 = "AB".repeat(32);
        let text = format!(
            "SHA1(a.ovf)= {one}\r\nSHA256 (./b (1)=.vmdk) = {sha256}\n\nSHA2-256(c)={sha256}\n"
        );
        let lines = parse(text.as_bytes()).unwrap();
        let found: Vec<_> =
            lines.iter().map(|line| (&*line.name, line.algorithm.0, line.digest[0])).collect();
        let expected: [(&[u8], _, _); 3] =
            [(b"a.ovf", "sha1", 0), (b"b (1)=.vmdk", "sha256", 0xab), (b"c", "sha256", 0xab)];
        assert_eq!(found, expected);
    }

    #[test]
    fn what_is_no_manifest_is_refused() {
        let one = "00".repeat(20);
        for text in [
            String::new(),
            "\n\n".to_owned(),
            format!("MD5(a)= {one}"),
            format!("SHA1(a)= {}", &one[1..]),
            format!("SHA1(a)= +{}", &one[1..]),
            format!("SHA1()= {one}"),
            format!("SHA1 a = {one}"),
            format!("SHA1)a(= {one}"),
            format!("=SHA1(a) {one}"),
            format!("SHA1(a)= {one}\nSHA1(./a)= {one}"),
        ] {
            assert!(parse(text.as_bytes()).is_err(), "{text}");
        }
    }
}
