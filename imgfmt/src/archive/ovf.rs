//! The disks that an OVF descriptor names, in its order (DSP0243: `References` and `DiskSection`).
//!
//! Only the tags of files and disks are looked at, with their attributes.

use super::tar::refused;
use crate::error::{ErrorKind, Result};

/// Most files or disks that are looked at.
const TAGS_MAX: usize = 4096;

/// A tag: its name without a prefix, and its attributes.
type Tag = (String, Vec<(String, String)>);

/// The names of the files with the disks.
pub(super) fn disks(text: &[u8]) -> Result<Vec<Vec<u8>>> {
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
    let mut names = Vec::new();
    // A disk without a file is empty when the machine is made.
    for reference in disks.iter().filter_map(|disk| attribute(disk, "fileRef")) {
        let file = files.iter().find(|file| attribute(file, "id") == Some(reference));
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
        names.push(href.as_bytes().to_vec());
    }
    Ok(names)
}

fn attribute<'t>(tag: &'t Tag, name: &str) -> Option<&'t str> {
    tag.1.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
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
    let name = local(&text[..length]);
    let (mut rest, mut attributes) = (&text[length..], Vec::new());
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
        attributes.push((key, unescaped(value)));
        rest = behind;
    }
}

fn local(name: &str) -> String {
    name.rsplit(':').next().unwrap_or(name).to_owned()
}

fn unescaped(value: &str) -> String {
    let mut value = value.to_owned();
    for (escaped, plain) in
        [("&lt;", "<"), ("&gt;", ">"), ("&quot;", "\""), ("&apos;", "'"), ("&amp;", "&")]
    {
        value = value.replace(escaped, plain);
    }
    value
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
        assert_eq!(disks(text.as_bytes()).unwrap(), [&b"second.vmdk"[..], b"a & b.vmdk"]);
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
