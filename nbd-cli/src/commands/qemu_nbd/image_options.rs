//! `--image-opts` and `json:` names: a disk described by the options of QEMU's block drivers.

use std::path::PathBuf;

use imgfmt::{Format, Locking};
use nbd_proto::NbdUri;

use super::options::{parse_detect_zeroes, parse_discard};
use crate::key_values::{KeyValues, parse_size};
use crate::server_name;
use crate::serving::{DetectZeroes, Discard, Window};

/// A disk as its options describe it.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) place: Place,
    /// `None`: found by looking at the file.
    pub(super) format: Option<Format>,
    pub(super) window: Window,
    pub(super) read_only: bool,
    pub(super) locking: Locking,
    pub(super) discard: Option<Discard>,
    pub(super) detect_zeroes: Option<DetectZeroes>,
}

/// Where the bytes of a disk are.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Place {
    File(PathBuf),
    /// On another server.
    Export(Box<NbdUri>),
}

impl Default for Place {
    fn default() -> Self {
        Self::File(PathBuf::new())
    }
}

impl Place {
    /// What the name of a file stands for.
    ///
    /// # Errors
    ///
    /// A sentence if it has a scheme that is not known.
    pub(super) fn named(text: &str) -> Result<Self, String> {
        if server_name::is_name_of_server(text) {
            return Ok(Self::Export(Box::new(server_name::from_name(text)?)));
        }
        match text.split_once(':') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            // As QEMU has it, a colon in a name needs a slash before it.
            Some((scheme, _)) if !scheme.contains('/') => {
                Err(format!("Unknown protocol '{scheme}'; write ./{text} for a file"))
            }
            _ => Ok(Self::File(text.into())),
        }
    }
}

/// Options of the qcow2 driver that tune it or loosen what this engine keeps anyway: they are
/// accepted and change nothing.
const QCOW2_TUNING: [&str; 9] = [
    "lazy-refcounts",
    "cache-size",
    "l2-cache-size",
    "l2-cache-entry-size",
    "refcount-cache-size",
    "cache-clean-interval",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
];

/// Options of the file driver that change nothing about what clients see.
const FILE_TUNING: [&str; 5] =
    ["aio", "aio-max-batch", "pr-manager", "drop-cache", "x-check-cache-dropped"];

/// That there is no such driver for images.
pub(super) fn unknown_driver(name: &str) -> String {
    match Format::from_name(name) {
        Some(format) => format!(
            "the format {} is recognised but cannot be read yet; there are raw and qcow2",
            format.description()
        ),
        None => format!("Unknown driver '{name}'; there are raw and qcow2"),
    }
}

impl Described {
    /// Reads the options of a whole disk.
    ///
    /// # Errors
    ///
    /// A sentence that names the option that is wrong or not supported.
    pub(super) fn from_options(mut options: KeyValues) -> Result<Self, String> {
        let mut disk = Self::default();
        let driver = options.take("driver");
        match driver.as_deref() {
            Some("raw") => {
                disk.format = Some(Format::Raw);
                disk.window = window(&mut options)?;
                disk.file_below(&mut options)?;
            }
            Some("qcow2") => {
                disk.format = Some(Format::Qcow2);
                options = qcow2(options)?;
                disk.file_below(&mut options)?;
            }
            Some(name @ ("file" | "host_device")) => {
                disk.format = Some(Format::Raw);
                return disk.file(name, options);
            }
            Some("nbd") => {
                disk.format = Some(Format::Raw);
                return disk.export(options);
            }
            None => disk.file_below(&mut options)?,
            Some(name) => return Err(unknown_driver(name)),
        }
        disk.common(&mut options)?;
        nothing_left(&options, driver.as_deref().unwrap_or("any"))?;
        Ok(disk)
    }

    /// The `file` of a format.
    fn file_below(&mut self, options: &mut KeyValues) -> Result<(), String> {
        if options.take("file").is_some() {
            return Err("a file that is named as a node is not supported; use file.driver and \
                        file.filename"
                .to_owned());
        }
        let mut file = options.take_below("file");
        if file.is_empty() {
            return Err("A block device must be specified for \"file\"".to_owned());
        }
        let driver = file.take("driver");
        let read = match driver.as_deref() {
            Some("nbd") => Self::default().export(file)?,
            None => Self::default().file("file", file)?,
            Some(name @ ("file" | "host_device")) => Self::default().file(name, file)?,
            Some(name) => {
                return Err(format!(
                    "Unknown driver '{name}'; there are file, host_device and nbd"
                ));
            }
        };
        self.place = read.place;
        self.locking = read.locking;
        self.read_only |= read.read_only;
        self.discard = read.discard;
        self.detect_zeroes = read.detect_zeroes;
        Ok(())
    }

    /// The options of the drivers `file` and `host_device`.
    fn file(mut self, driver: &str, mut options: KeyValues) -> Result<Self, String> {
        let path = options.take("filename");
        let path =
            path.ok_or_else(|| format!("The '{driver}' block driver requires a file name"))?;
        self.place = Place::named(&path)?;
        self.locking = match options.take("locking").as_deref() {
            None | Some("auto") => Locking::Auto,
            Some("on") => Locking::On,
            Some("off") => Locking::Off,
            Some(other) => return Err(format!("Invalid value '{other}' for 'locking'")),
        };
        for key in FILE_TUNING {
            options.take(key);
        }
        self.common(&mut options)?;
        nothing_left(&options, driver)?;
        Ok(self)
    }

    /// The options of the driver `nbd`.
    fn export(mut self, mut options: KeyValues) -> Result<Self, String> {
        self.place = Place::Export(Box::new(server_name::from_options(&mut options)?));
        self.common(&mut options)?;
        nothing_left(&options, "nbd")?;
        Ok(self)
    }

    /// Options that every driver has.
    fn common(&mut self, options: &mut KeyValues) -> Result<(), String> {
        options.take("node-name");
        // An export that is written to needs a file that can be written to.
        options.take_switch("auto-read-only")?;
        // The page cache is always used, and flushes always count; see --cache.
        options.take_switch("cache.direct")?;
        options.take_switch("cache.no-flush")?;
        self.read_only |= options.take_switch("read-only")?.unwrap_or(false);
        if options.take_switch("force-share")? == Some(true) {
            if !self.read_only {
                return Err("force-share=on can only be used with read-only images".to_owned());
            }
            self.locking = Locking::Shared;
        }
        if let Some(text) = options.take("discard") {
            let discard = parse_discard(&text);
            self.discard = Some(discard.ok_or_else(|| format!("Invalid discard option '{text}'"))?);
        }
        if let Some(text) = options.take("detect-zeroes") {
            let detect = parse_detect_zeroes(&text);
            self.detect_zeroes =
                Some(detect.ok_or_else(|| format!("Invalid detect-zeroes option '{text}'"))?);
        }
        Ok(())
    }
}

fn window(options: &mut KeyValues) -> Result<Window, String> {
    let mut size = |key: &str| match options.take(key) {
        None => Ok(None),
        Some(text) => parse_size(&text)
            .map(Some)
            .ok_or_else(|| format!("Parameter '{key}' expects a size, not '{text}'")),
    };
    let (offset, size) = (size("offset")?.unwrap_or(0), size("size")?);
    if size.is_some_and(|size| size % 512 != 0) {
        return Err("Specified size is not a multiple of 512".to_owned());
    }
    Ok(Window { offset, size })
}

/// Takes away what only tunes the driver, and refuses what would change the disk.
fn qcow2(mut options: KeyValues) -> Result<KeyValues, String> {
    for key in QCOW2_TUNING {
        options.take(key);
    }
    options.take("overlap-check");
    options.take_below("overlap-check");
    if options.take_switch("discard-no-unref")? == Some(true) {
        return Err("discard-no-unref=on is not supported".to_owned());
    }
    for group in ["encrypt", "backing", "data-file"] {
        if options.take(group).is_some() || !options.take_below(group).is_empty() {
            return Err(format!("the option '{group}' of the driver 'qcow2' is not supported"));
        }
    }
    Ok(options)
}

fn nothing_left(options: &KeyValues, driver: &str) -> Result<(), String> {
    match options.left_over() {
        None => Ok(()),
        Some(key) => Err(format!("Block driver '{driver}' does not support the option '{key}'")),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn read(text: &str) -> Result<Described, String> {
        Described::from_options(KeyValues::parse(text, None).unwrap())
    }

    #[test]
    fn the_drivers_options_describe_a_disk() {
        let raw = "driver=raw,offset=1M,size=2M,file.driver=file,file.filename=a,,b,discard=unmap";
        let expected = Described {
            place: Place::File("a,b".into()),
            format: Some(Format::Raw),
            window: Window { offset: 1 << 20, size: Some(2 << 20) },
            discard: Some(Discard::Unmap),
            ..Described::default()
        };
        assert_eq!(read(raw), Ok(expected));
        let qcow2 = "driver=qcow2,l2-cache-size=1M,file.filename=d,file.locking=off,read-only=on";
        let expected = Described {
            place: Place::File("d".into()),
            format: Some(Format::Qcow2),
            locking: Locking::Off,
            read_only: true,
            ..Described::default()
        };
        assert_eq!(read(qcow2), Ok(expected));
        let probed = Described { place: Place::File("d".into()), ..Described::default() };
        assert_eq!(read("file.filename=d"), Ok(probed));
    }

    #[test]
    fn what_is_unknown_or_missing_is_named() {
        for (text, part) in [
            ("driver=vmdk,file.filename=d", "vmdk"),
            ("driver=nbd,export=s", "server.path"),
            ("driver=raw,filename=d", "\"file\""),
            ("driver=raw,size=1000,file.filename=d", "512"),
            ("driver=raw,size=x,file.filename=d", "'size'"),
            ("driver=file,filename=d,bogus=1", "bogus"),
            ("driver=qcow2,file.filename=d,bogus=1", "bogus"),
            ("driver=qcow2,file.filename=d,backing.driver=raw", "backing"),
            ("driver=qcow2,file.filename=d,encrypt.key-secret=s", "encrypt"),
            ("driver=raw,file.filename=d,read-only=maybe", "maybe"),
            ("driver=raw,file.filename=d,force-share=on", "force-share"),
            ("driver=raw,file=node", "node"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }
}
