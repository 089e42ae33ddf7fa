//! Sources and destinations, and their notation.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

use imgfmt::{Access, CacheMode, Format, Locking};
use nbd_proto::NbdUri;

use crate::error::JobError;
use crate::object::ObjectUrl;
use crate::qemu_name::{
    BackingInName, DriverSettings, FILE_PREFIX, NameInImage, from_json, from_name, json_in,
};

/// A source or destination of a copy.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Location {
    /// An export of a server.
    Nbd(NbdUri),
    /// A local file or block device.
    File(PathBuf),
    /// An object of a store: a source only.
    Object(ObjectUrl),
    /// Standard input or output.
    Standard,
    /// Nothing.
    Null,
}

/// A source or destination, and how its name (`json:OBJECT`) says that it is used.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct DescribedLocation {
    /// The source or destination.
    pub location: Location,
    /// How it is used.
    pub settings: DriverSettings,
}

impl Location {
    /// The URI of a server.
    pub fn uri(&self) -> Option<&NbdUri> {
        match self {
            Self::Nbd(uri) => Some(uri),
            Self::File(_) | Self::Object(_) | Self::Standard | Self::Null => None,
        }
    }
}

impl From<Location> for DescribedLocation {
    fn from(location: Location) -> Self {
        Self { location, settings: DriverSettings::default() }
    }
}

impl FromStr for DescribedLocation {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        let Some(object) = json_in(text) else { return text.parse().map(Location::into) };
        let image = from_json(object)?;
        let is_inside = image.format.known().is_some_and(|format| format != Format::Raw);
        if is_inside || image.backing != BackingInName::AsNamed {
            return Err("the disk in an image is copied with 'nbd-cli image convert'".into());
        }
        if !image.part.is_whole() {
            return Err(
                "the options 'offset' and 'size' select a part of it; copy that with 'nbd-cli \
                        image convert', or export it with 'nbd-cli qemu-nbd --offset'"
                    .into(),
            );
        }
        image.settings.export.refuse()?;
        let location = match image.name {
            NameInImage::Export(uri) => Location::Nbd(*uri),
            NameInImage::File(path) => Location::File(path),
        };
        Ok(Self { location, settings: image.settings })
    }
}

impl DescribedLocation {
    /// Returns the locking of its file; `given` is what the user asks for otherwise, which is
    /// stronger unless it is automatic.
    ///
    /// # Errors
    ///
    /// If its name forbids this access, or an option in it does not work for a copy.
    pub fn locking(&self, access: Access, given: Locking) -> Result<Locking, JobError> {
        let verb = match access {
            Access::ReadOnly => "read",
            Access::ReadWrite => "write to",
        };
        let checked = self.settings.check(access, CacheMode::default());
        checked
            .map_err(|why| JobError::invalid(format!("cannot {verb} {}: {why}", self.location)))?;
        Ok(self.settings.locking_or(given))
    }
}

/// Parses a name without the settings that [`DescribedLocation`] keeps: it refuses them.
impl FromStr for Location {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "" => return Err("a path is empty; give a file, an NBD URI, '-' or 'null:'".into()),
            "-" => return Ok(Self::Standard),
            "null:" => return Ok(Self::Null),
            _ => {}
        }
        if let Some(url) = ObjectUrl::of(text) {
            return Ok(Self::Object(url));
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
        if json_in(text).is_some() {
            let DescribedLocation { location, settings } = text.parse()?;
            if settings.read_only || settings.locking_or(Locking::Auto) != Locking::Auto {
                return Err("leave read-only, locking and force-share out of this name".into());
            }
            return Ok(location);
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
            Self::Object(url) => url.fmt(f),
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
    fn the_settings_in_a_name_count_for_its_use() {
        let named = |more: &str| {
            let name = format!(r#"json:{{"driver":"file","filename":"a"{more}}}"#);
            name.parse::<DescribedLocation>().unwrap()
        };
        let (read, write) = (Access::ReadOnly, Access::ReadWrite);
        for (more, access, given, expected) in [
            ("", write, Locking::Auto, Locking::Auto),
            (r#","locking":"off""#, write, Locking::Auto, Locking::Off),
            (r#","locking":"on""#, read, Locking::Auto, Locking::On),
            (r#","locking":"on""#, read, Locking::Off, Locking::Off),
            (r#","read-only":true"#, read, Locking::Auto, Locking::Auto),
            (r#","force-share":true"#, read, Locking::Auto, Locking::Shared),
            (r#","aio":"native","cache":{"direct":true}"#, read, Locking::On, Locking::On),
        ] {
            let found = named(more).locking(access, given).unwrap();
            assert_eq!(found, expected, "{more}");
        }
        for (more, access, part) in [
            (r#","read-only":true"#, write, "read-only=on"),
            (r#","force-share":true"#, write, "force-share=on"),
            (r#","aio":"native""#, read, "cache.direct=on"),
        ] {
            let error = named(more).locking(access, Locking::Auto).unwrap_err().to_string();
            assert!(error.contains(part), "{more}: {error}");
        }
        // Where they would be lost they are refused.
        for more in [r#","read-only":true"#, r#","locking":"on""#, r#","force-share":true"#] {
            let name = format!(r#"json:{{"driver":"file","filename":"a"{more}}}"#);
            assert!(name.parse::<Location>().unwrap_err().contains("force-share"), "{more}");
        }
    }

    #[test]
    fn what_is_neither_file_nor_server_is_refused() {
        for (text, why) in
            [("", "empty"), ("ftp://host/x", "unknown scheme 'ftp'"), ("nbd+unix:///x", "socket")]
        {
            let error = text.parse::<Location>().unwrap_err();
            assert!(error.contains(why), "{text}: {error}");
        }
    }
}
