//! The options of QEMU's drivers for the bytes of an image.

use std::path::PathBuf;

use imgfmt::storage::Part;
use imgfmt::{Access, CacheMode, Format};
use nbd_proto::limits::DEFAULT_PORT;
use nbd_proto::uri::{NbdUri, Transport};

use super::settings::DriverSettings;
use super::values::take_part;
use crate::key_values::KeyValues;

/// The file or server that a backing or data file name addresses.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum NameInImage {
    /// An export of a server.
    Export(Box<NbdUri>),
    /// A file; a relative path starts at the working directory, as in QEMU.
    File(PathBuf),
}

/// The image format according to driver options.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FormatInName {
    /// Unknown: to be detected.
    Unsaid,
    /// This format: its driver is named.
    Said(Format),
    /// None: the file's driver is used alone, so the bytes are the disk.
    Bytes,
}

impl FormatInName {
    /// The format that is stronger than what an image records.
    pub fn known(self) -> Option<Format> {
        match self {
            Self::Unsaid => None,
            Self::Said(format) => Some(format),
            Self::Bytes => Some(Format::Raw),
        }
    }
}

/// The backing file according to driver options.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub enum BackingInName {
    /// The one that the image names.
    #[default]
    AsNamed,
    /// None.
    Ignored,
    /// This one.
    Given(Box<GivenInName>),
}

impl BackingInName {
    /// The images that are described one below the other.
    pub fn described(&self) -> impl Iterator<Item = &GivenInName> {
        std::iter::successors(self.given(), |image| image.backing.given())
    }

    fn given(&self) -> Option<&GivenInName> {
        match self {
            Self::Given(given) => Some(given),
            Self::AsNamed | Self::Ignored => None,
        }
    }

    /// Checks how the backing files are used; `cache` is the mode of the image above.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn check(&self, cache: CacheMode) -> Result<(), String> {
        let Self::Given(given) = self else { return Ok(()) };
        given.settings.check(Access::ReadOnly, cache)?;
        given.backing.check(given.settings.cache.applied_to(cache))
    }
}

/// The options of a backing file.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct GivenInName {
    /// `None`: the file that the image above names.
    pub name: Option<NameInImage>,
    /// The part of the file or export in which this image is.
    pub part: Part,
    /// The format of this image.
    pub format: FormatInName,
    /// The backing file of this image.
    pub backing: BackingInName,
    /// How it is used.
    pub settings: DriverSettings,
}

/// An image described by driver options.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct NamedImage {
    /// The file or export.
    pub name: NameInImage,
    /// The part of it in which the image is.
    pub part: Part,
    /// The format of the image in it.
    pub format: FormatInName,
    /// The backing file of the image.
    pub backing: BackingInName,
    /// How it is used.
    pub settings: DriverSettings,
}

impl From<NameInImage> for NamedImage {
    /// The image of an unknown format that fills a file or export.
    fn from(name: NameInImage) -> Self {
        let (part, format) = (Part::default(), FormatInName::Unsaid);
        Self { name, part, format, backing: BackingInName::AsNamed, settings: Default::default() }
    }
}

/// Parses a JSON object with the options of drivers, and determines format and backing file.
///
/// # Errors
///
/// A sentence that describes the defect, or names the required driver.
pub fn from_json(object: &str) -> Result<NamedImage, String> {
    from_key_values(KeyValues::from_json(object)?)
}

/// As [`from_json`], from options that were parsed already.
///
/// # Errors
///
/// As [`from_json`].
pub fn from_key_values(options: KeyValues) -> Result<NamedImage, String> {
    let image = image_from_options(options, 0)?;
    let name = image.name.ok_or("it names no driver")?;
    let GivenInName { part, format, backing, settings, .. } = image;
    Ok(NamedImage { name, part, format, backing, settings })
}

/// Returns whether a driver finds the disk inside the bytes below it.
pub(crate) fn is_container(driver: &str) -> bool {
    let format = Format::from_name(driver).filter(|format| *format != Format::Raw);
    format.is_some_and(Format::is_supported)
}

/// Parses the options of an image that has `depth` images above it.
fn image_from_options(mut options: KeyValues, depth: usize) -> Result<GivenInName, String> {
    let settings = DriverSettings { read_only: depth > 0, ..DriverSettings::default() };
    let (format, backing) = (FormatInName::Bytes, BackingInName::AsNamed);
    let mut image = GivenInName { name: None, part: Part::default(), format, backing, settings };
    let mut driver = options.take("driver");
    if driver.is_none() {
        image.format = FormatInName::Unsaid;
        image.backing = backing_from_options(&mut options, depth)?;
        // The driver that is found has them.
        image.settings.take_qcow2(&mut options)?;
        image.settings.take_luks(&mut options)?;
        options = image.format_driver(None, options)?;
        driver = options.take("driver");
    }
    loop {
        match driver.as_deref() {
            Some("raw") => {
                // Of drivers above one another, the upper one sees the part of the lower one.
                image.part = image.part.within(take_part(&mut options)?)?;
                if image.format == FormatInName::Bytes {
                    image.format = FormatInName::Said(Format::Raw);
                }
                options = image.format_driver(Some("raw"), options)?;
            }
            Some(name) if image.may_be_contained() && is_container(name) => {
                if !image.part.is_whole() {
                    return Err(format!(
                        "the options 'offset' and 'size' select a part of the disk in a {name} image; \
                         export that part with 'nbd-cli qemu-nbd --offset', and name the export"
                    ));
                }
                let format = Format::from_name(name).unwrap_or(Format::Raw);
                image.format = FormatInName::Said(format);
                if format == Format::Qcow2 {
                    image.settings.take_qcow2(&mut options)?;
                } else if format == Format::Luks {
                    image.settings.take_luks(&mut options)?;
                }
                image.backing = backing_from_options(&mut options, depth)?;
                options = image.format_driver(Some(name), options)?;
            }
            driver => {
                image.name = image.file_from_options(driver, options, depth)?;
                if image.name.is_none() && !image.part.is_whole() {
                    let why = "a part of a backing file needs its name too (file.filename)";
                    return Err(why.to_owned());
                }
                return Ok(image);
            }
        }
        driver = options.take("driver");
    }
}

impl GivenInName {
    /// Returns whether the driver of a container may follow: only one interprets the image.
    fn may_be_contained(&self) -> bool {
        matches!(self.format, FormatInName::Bytes | FormatInName::Said(Format::Raw))
    }

    /// Parses the options that all drivers above others have, and returns the options of its
    /// `file`.
    fn format_driver(
        &mut self,
        name: Option<&str>,
        mut options: KeyValues,
    ) -> Result<KeyValues, String> {
        let below = options.take_below("file");
        self.settings.take_last(name, options)?;
        Ok(below)
    }

    /// Parses the options of the driver of an image's bytes.
    fn file_from_options(
        &mut self,
        driver: Option<&str>,
        mut options: KeyValues,
        depth: usize,
    ) -> Result<Option<NameInImage>, String> {
        let name = match driver {
            Some("nbd") => {
                let export = &mut self.settings.export;
                export.tls_creds = options.take("tls-creds");
                export.tls_hostname = options.take("tls-hostname");
                export.dirty_bitmap = options.take("x-dirty-bitmap");
                Some(NameInImage::Export(Box::new(from_options(&mut options)?)))
            }
            None | Some("file" | "host_device") => {
                self.settings.take_file(&mut options)?;
                let path = options.take("filename");
                match (&path, driver) {
                    (None, None) if depth == 0 => return Err("it names no driver".to_owned()),
                    (None, Some(driver)) if depth == 0 => {
                        return Err(format!("the driver '{driver}' needs a filename"));
                    }
                    _ => path.map(|path| NameInImage::File(path.into())),
                }
            }
            Some(other) => {
                return Err(format!(
                    "it is named by the driver '{other}', and only 'file' and 'nbd' can be opened \
                     here; give a plain name (in an image, with 'nbd-cli image rebase --unsafe')"
                ));
            }
        };
        self.settings.take_last(driver.or(Some("file")), options)?;
        Ok(name)
    }
}

fn backing_from_options(options: &mut KeyValues, depth: usize) -> Result<BackingInName, String> {
    Ok(match take_backing(options, depth)? {
        BackingOption::AsNamed => BackingInName::AsNamed,
        BackingOption::Ignored => BackingInName::Ignored,
        BackingOption::Given(options) => {
            BackingInName::Given(Box::new(image_from_options(options, depth + 1)?))
        }
    })
}

/// The option `backing` of an image driver.
#[derive(Debug)]
pub enum BackingOption {
    /// Not there.
    AsNamed,
    /// Null.
    Ignored,
    /// The options of a driver.
    Given(KeyValues),
}

/// Most images that options may describe one below the other: the layers that a chain can have.
const IMAGES_MAX: usize = 500;

/// Removes the option `backing` of an image that has `depth` images above it.
///
/// # Errors
///
/// A sentence if the backing file is given as a node, or if there are too many.
pub fn take_backing(options: &mut KeyValues, depth: usize) -> Result<BackingOption, String> {
    let is_null = options.take_null("backing");
    let name = options.take("backing");
    let below = options.take_below("backing");
    // Options that set nothing demand a backing file in the header.
    let is_given = options.take_empty("backing") || !below.is_empty();
    match name.as_deref() {
        // An empty name was the notation for null before null existed.
        None | Some("") => {}
        Some(node) => {
            return Err(format!(
                "the backing file is given as the node '{node}', and there are no nodes here; give \
                 its own options, such as backing.driver and backing.file.filename, or null for none"
            ));
        }
    }
    match (is_null || name.is_some(), is_given) {
        (true, true) => Err("the option 'backing' is both empty and given in parts".to_owned()),
        (true, false) => Ok(BackingOption::Ignored),
        (false, false) => Ok(BackingOption::AsNamed),
        (false, true) if depth >= IMAGES_MAX => {
            Err(format!("more than {IMAGES_MAX} images are described one below the other"))
        }
        (false, true) => Ok(BackingOption::Given(below)),
    }
}

/// Parses the options of the driver `nbd`, in the nested form or in the flat one (`host`, `port`,
/// `path`).
///
/// # Errors
///
/// A sentence that names the option.
pub fn from_options(options: &mut KeyValues) -> Result<NbdUri, String> {
    let mut server = options.take_below("server");
    if server.is_empty() {
        for key in ["host", "port", "path"] {
            if let Some(value) = options.take(key) {
                server.set(key, value);
            }
        }
    }
    let kind = server.take("type");
    let transport = match (kind.as_deref(), server.take("path"), server.take("host")) {
        (None | Some("unix"), Some(path), None) => Transport::Unix { path: path.into() },
        (None | Some("inet"), None, Some(host)) => tcp(&host, server.take("port").as_deref())?,
        (Some(kind @ ("vsock" | "fd")), ..) => {
            return Err(format!("server.type={kind} is not supported; use inet or unix"));
        }
        _ => return Err("the driver 'nbd' needs either server.host or server.path".to_owned()),
    };
    if let Some(key) = server.left_over() {
        return Err(format!("the option 'server.{key}' is not supported"));
    }
    for key in ["tls-creds", "tls-hostname", "x-dirty-bitmap"] {
        if options.take(key).is_some() {
            return Err(format!("the option '{key}' of the driver 'nbd' is not supported"));
        }
    }
    for key in ["reconnect-delay", "open-timeout"] {
        if options.take(key).is_some_and(|value| value != "0") {
            return Err(format!("the option '{key}' of the driver 'nbd' can only be 0"));
        }
    }
    let export_name = options.take("export").unwrap_or_default();
    Ok(uri(transport, &export_name))
}

pub(super) fn tcp(host: &str, port: Option<&str>) -> Result<Transport, String> {
    let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    let port = match port {
        None => DEFAULT_PORT,
        Some(port) => port.parse().map_err(|_| format!("'{port}' is not a port"))?,
    };
    match host {
        "" => Err("the name of the server's host is empty".to_owned()),
        host => Ok(Transport::Tcp { host: host.to_owned(), port }),
    }
}

pub(super) fn uri(transport: Transport, export_name: &str) -> NbdUri {
    NbdUri::new(transport, export_name)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_missing_or_not_supported_is_named() {
        for (text, part) in [
            ("export=disk", "server.host"),
            ("server.host=a,server.path=b", "server.host"),
            ("server.host=a,server.port=x", "'x'"),
            ("server.host=a,tls-creds=b", "tls-creds"),
            ("server.path=a,reconnect-delay=5", "reconnect-delay"),
            ("server.host=a,server.to=5", "server.to"),
        ] {
            let mut options = KeyValues::parse(text, None).unwrap();
            let error = from_options(&mut options).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
