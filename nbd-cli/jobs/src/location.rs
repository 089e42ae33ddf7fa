//! Sources and destinations, and their notation.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use imgfmt::{Format, Locking};
use nbd_proto::NbdUri;

use crate::qemu_name::{BackingInName, FILE_PREFIX, NameInImage, from_json, from_name};

/// A source or destination of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// An export of a server.
    Nbd(NbdUri),
    /// A local file or block device.
    File(PathBuf),
    /// Standard input or output.
    Standard,
    /// Nothing.
    Null,
}

impl Location {
    /// The URI of a server.
    pub fn uri(&self) -> Option<&NbdUri> {
        match self {
            Self::Nbd(uri) => Some(uri),
            Self::File(_) | Self::Standard | Self::Null => None,
        }
    }
}

impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => return Err("a path is empty; give a file, an NBD URI, '-' or 'null:'".into()),
            "-" => return Ok(Self::Standard),
            "null:" => return Ok(Self::Null),
            _ => {}
        }
        let scheme = text.split_once(':').map_or("", |(scheme, _)| scheme);
        if let Some(path) = text.strip_prefix(FILE_PREFIX) {
            return Ok(Self::File(path.into()));
        }
        let is_nbd = ["nbd", "nbds"].contains(&scheme)
            || scheme.starts_with("nbd+")
            || scheme.starts_with("nbds+");
        if is_nbd {
            return from_name(text).map(Self::Nbd);
        }
        if let Some(object) = text.strip_prefix("json:") {
            let image = from_json(object)?;
            let is_inside = image.format.known().is_some_and(|format| format != Format::Raw);
            if is_inside || image.backing != BackingInName::AsNamed {
                return Err("the disk in an image is copied with 'nbd-cli image convert'".into());
            }
            if image.settings.read_only || image.settings.locking != Locking::Auto {
                return Err(
                    "leave read-only, locking and force-share out of a name for a copy, and \
                            give --locking or --force-share"
                        .into(),
                );
            }
            return Ok(match image.name {
                NameInImage::Export(uri) => Self::Nbd(*uri),
                NameInImage::File(path) => Self::File(path),
            });
        }
        if text.contains("://") && !scheme.contains('/') {
            return Err(format!(
                "'{text}' has the unknown scheme '{scheme}'; give a file, an NBD URI such as \
                 nbd://localhost/disk, '-' or 'null:'"
            ));
        }
        Ok(Self::File(text.into()))
    }
}

impl fmt::Display for Location {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nbd(uri) => uri.fmt(f),
            Self::File(path) => write!(f, "'{}'", path.display()),
            Self::Standard => f.write_str("'-'"),
            Self::Null => f.write_str("null:"),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn locations_are_told_apart() {
        assert_eq!("-".parse(), Ok(Location::Standard));
        assert_eq!("null:".parse(), Ok(Location::Null));
        assert_eq!("disk.img".parse(), Ok(Location::File("disk.img".into())));
        assert_eq!("./nbd:x".parse(), Ok(Location::File("./nbd:x".into())));
        assert_eq!("/a/b://c".parse(), Ok(Location::File("/a/b://c".into())));
        assert_eq!("file:a/b".parse(), Ok(Location::File("a/b".into())));
        for text in [
            "nbd://localhost",
            "nbd:localhost:10809:exportname=a",
            "nbd:unix:/run/s:exportname=a",
            r#"json:{"driver":"nbd","path":"/run/s"}"#,
        ] {
            assert!(matches!(text.parse(), Ok(Location::Nbd(_))), "{text}");
        }
    }

    #[test]
    fn what_is_neither_file_nor_server_is_refused() {
        for (text, why) in
            [("", "empty"), ("http://host/x", "unknown scheme 'http'"), ("nbd+unix:///x", "socket")]
        {
            let error = text.parse::<Location>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
