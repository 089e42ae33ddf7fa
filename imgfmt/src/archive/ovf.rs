//! The disks that an OVF descriptor names, in its order (DSP0243: `References` and `DiskSection`).
//!
//! Only the tags of files and disks are looked at, with the attributes that matter.

use std::collections::HashMap;

use super::tar::refused;
use crate::error::{ErrorKind, Result};

/// Most files or disks that are looked at.
const TAGS_MAX: usize = 4096;

/// The attributes that are read, without their prefixes.
const ATTRIBUTES: [&str; 6] = ["id", "href", "compression", "chunkSize", "fileRef", "parentRef"];

/// A tag: its name without a prefix, and the first of each of its attributes that are read.
type Tag = (String, Vec<(&'static str, String)>);

/// A disk that has a file.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Disk {
    /// The name of the file: a relative URI.
    pub(super) href: Vec<u8>,
    /// Whether it is only the differences to another disk.
    pub(super) is_delta: bool,
}

impl Disk {
    pub(super) fn whole(href: Vec<u8>) -> Self {
        Self { href, is_delta: false }
    }
}

/// The disks that have files.
pub(super) fn disks(text: &[u8]) -> Result<Vec<Disk>> {
    let invalid = |detail: &str| refused(ErrorKind::InvalidFormat, detail);
    let text = std::str::from_utf8(text).map_err(|_| invalid("its descriptor is not UTF-8"))?;
    let (mut files, mut disks) = (Vec::new(), Vec::new());
    let mut rest = text;
    while let Some((tag, behind)) = next_tag(rest) {
        rest = behind;
        match tag.0.as_str() {
            "File" => files.push(tag),
            "Disk" => disks.push(tag),
            _ => {}
        }
        if files.len() + disks.len() > TAGS_MAX {
            return Err(invalid("its descriptor names too many files"));
        }
    }
    let mut by_id = HashMap::new();
    for file in &files {
        if let Some(id) = attribute(file, "id") {
            by_id.entry(id).or_insert(file);
        }
    }
    let mut found = Vec::new();
    for disk in &disks {
        // A disk without a file is empty when the machine is made.
        let Some(reference) = attribute(disk, "fileRef") else { continue };
        let file = by_id.get(reference).copied();
        let href = file.and_then(|file| attribute(file, "href"));
        let (Some(file), Some(href)) = (file, href) else {
            return Err(invalid("its descriptor names a disk whose file it does not name"));
        };
        let is_compressed = attribute(file, "compression").is_some_and(|kind| kind != "identity");
        if is_compressed || attribute(file, "chunkSize").is_some() {
            let detail =
                "the disks in it are compressed or split as files: unpack the archive first";
            return Err(refused(ErrorKind::Unsupported, detail));
        }
        let is_delta = attribute(disk, "parentRef").is_some();
        found.push(Disk { href: href.as_bytes().to_vec(), is_delta });
    }
    Ok(found)
}

fn attribute<'t>(tag: &'t Tag, name: &str) -> Option<&'t str> {
    tag.1.iter().find(|(key, _)| *key == name).map(|(_, value)| value.as_str())
}

/// The next opening tag, and what is behind it.
fn next_tag(text: &str) -> Option<(Tag, &str)> {
    let mut rest = text;
    loop {
        rest = &rest[rest.find('<')? + 1..];
        let skipped = match rest {
            _ if rest.starts_with("!--") => Some("-->"),
            _ if rest.starts_with("![CDATA[") => Some("]]>"),
            _ if rest.starts_with(['?', '!', '/']) => Some(">"),
            _ => None,
        };
        match skipped {
            Some(end) => rest = &rest[rest.find(end)? + end.len()..],
            None => return tag(rest),
        }
    }
}

fn tag(text: &str) -> Option<(Tag, &str)> {
    let is_end = |byte: char| byte.is_ascii_whitespace() || matches!(byte, '>' | '/' | '=');
    let length = text.find(is_end)?;
    let name = local(&text[..length]).to_owned();
    let (mut rest, mut attributes) = (&text[length..], Vec::<(&str, String)>::new());
    loop {
        rest = rest.trim_start_matches(|byte: char| byte.is_ascii_whitespace() || byte == '/');
        if let Some(behind) = rest.strip_prefix('>') {
            return Some(((name, attributes), behind));
        }
        let length = rest.find(is_end)?;
        let key = local(&rest[..length]);
        rest = rest[length..].trim_start().strip_prefix('=')?.trim_start();
        let quote = rest.chars().next().filter(|quote| matches!(quote, '"' | '\''))?;
        let (value, behind) = rest[1..].split_once(quote)?;
        let kept = ATTRIBUTES.into_iter().find(|kept| *kept == key);
        if let Some(key) = kept.filter(|key| attributes.iter().all(|(other, _)| other != key)) {
            attributes.push((key, unescaped(value)));
        }
        rest = behind;
    }
}

fn local(name: &str) -> &str {
    name.rsplit(':').next().unwrap_or(name)
}

/// The text without references to characters. What is none of them remains as it is.
fn unescaped(value: &str) -> String {
    /// The longest reference that is looked for, in bytes.
    const REFERENCE_MAX: usize = 12;
    let (mut text, mut rest) = (String::new(), value);
    while let Some(place) = rest.find('&') {
        text.push_str(&rest[..place]);
        let reference = &rest[place + 1..];
        let end = reference.bytes().take(REFERENCE_MAX).position(|byte| byte == b';');
        let character = end.and_then(|end| Some((character(&reference[..end])?, end)));
        (text, rest) = match character {
            Some((character, end)) => {
                (text + character.encode_utf8(&mut [0; 4]), &reference[end + 1..])
            }
            None => (text + "&", reference),
        };
    }
    text + rest
}

/// The character that is called so between `&` and `;`.
fn character(name: &str) -> Option<char> {
    match name {
        "lt" => Some('<'),
        "gt" => Some('>'),
        "quot" => Some('"'),
        "apos" => Some('\''),
        "amp" => Some('&'),
        _ => {
            let number = name.strip_prefix('#')?;
            let number = match number.strip_prefix('x') {
                Some(digits) => u32::from_str_radix(digits, 16),
                None => number.parse(),
            };
            char::from_u32(number.ok()?)
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn disks_come_in_the_order_of_the_section_of_disks() {
        let text = r#"<?xml version="1.0"?>
            <!-- <File ovf:id="file1" ovf:href="no.vmdk"/> -->
            <Envelope xmlns:ovf="x"><References>
              <File ovf:href="a &amp; b.vmdk" ovf:id='file1' ovf:size="12"/>
              <ovf:File ovf:id="file2" ovf:href="second.vmdk" />
            </References><DiskSection><Info>disks > 1</Info>
              <Disk ovf:diskId="one" ovf:fileRef="file2"/>
              <Disk ovf:diskId="empty" ovf:capacity="1"/>
              <Disk ovf:diskId="two" ovf:fileRef="file1"></Disk>
            </DiskSection></Envelope>"#;
        let wanted = [&b"second.vmdk"[..], b"a & b.vmdk"].map(|name| Disk::whole(name.to_vec()));
        assert_eq!(disks(text.as_bytes()).unwrap(), wanted);
    }

    #[test]
    fn disks_that_are_differences_to_others_are_told_from_whole_ones() {
        let text = r#"<File id="f" href="a"/><File id="g" href="b"/>
            <Disk diskId="one" fileRef="f"/><Disk fileRef="g" ovf:parentRef="one"/>"#;
        let found = disks(text.as_bytes()).unwrap();
        assert_eq!(found.iter().map(|disk| disk.is_delta).collect::<Vec<_>>(), [false, true]);
    }

    #[test]
    fn references_to_characters_are_decoded_once() {
        for (value, text) in [
            ("a&#32;b&#x26;c&#xe4;", "a b&cä"),
            ("&amp;lt;&lt;&#38;amp;", "&lt;<&amp;"),
            (
                "&;&#;&#x110000;&#99999999999999;&nosuch;&",
                "&;&#;&#x110000;&#99999999999999;&nosuch;&",
            ),
            ("&é;", "&é;"),
        ] {
            assert_eq!(unescaped(value), text);
        }
    }

    #[test]
    fn only_the_first_of_each_attribute_that_is_read_is_kept() {
        let others = "x='y' id='other' ".repeat(1000);
        let text = format!("<File id='f' href='a' {others}/><Disk fileRef='f'/>");
        assert_eq!(disks(text.as_bytes()).unwrap(), [Disk::whole(b"a".to_vec())]);
        assert_eq!(tag(&text[1..]).unwrap().0.1.len(), 2);
    }

    #[test]
    fn a_descriptor_that_lies_or_is_cut_off_gives_no_wrong_disk() {
        let text = r#"<File id="f" href="a.vmdk"/><Disk fileRef="g"/>"#;
        assert_eq!(disks(text.as_bytes()).unwrap_err().kind(), ErrorKind::InvalidFormat);
        let text = r#"<File id="f" href="a" compression="gzip"/><Disk fileRef="f"/>"#;
        assert_eq!(disks(text.as_bytes()).unwrap_err().kind(), ErrorKind::Unsupported);
        let text = r#"<File id="f" href="a"/><Disk fileRef="f"/>"#;
        for end in 0..text.len() {
            assert!(disks(&text.as_bytes()[..end]).unwrap().is_empty(), "{end}");
        }
        assert!(disks(b"\xff").is_err());
        assert!(disks("<=<<é \"'>".as_bytes()).unwrap().is_empty());
    }
}
