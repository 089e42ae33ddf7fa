//! The options of QEMU's block drivers.

use std::path::PathBuf;
use std::time::Duration;

use imgfmt::Format;
use nbd_server::export::filters::Window;

use super::description::{DescribedBacking, DiskDescription, DiskSource, NULL_SIZE};
use crate::error::JobError;
use crate::key_values::KeyValues;
use crate::qemu_name::{
    self, BackingOption, DriverSettings, is_container, take_backing, take_size, take_window,
};

/// The error of an unknown image driver.
fn unknown_driver(name: &str) -> String {
    match Format::from_name(name) {
        Some(format) => format!(
            "the format {} is recognised but cannot be read yet; convert the image to qcow2 first",
            format.description()
        ),
        None => format!(
            "Unknown driver '{name}'; there are raw, qcow2 and those of images that are read, and file, host_device, nbd, null-co and \
             null-aio below them"
        ),
    }
}

/// The drivers above the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    /// None that interprets an image.
    NoFormat,
    /// One of images in containers, or one to be detected.
    Format,
}

impl DiskDescription {
    /// Returns the disk in a file whose format is to be detected.
    #[must_use]
    pub fn of_file(path: impl Into<PathBuf>) -> Self {
        Self { source: DiskSource::File(path.into()), ..Self::default() }
    }

    /// Parses a name as QEMU does: a path, `file:PATH`, `json:OBJECT`, the URI of an export, or
    /// `null-co://`.
    ///
    /// # Errors
    ///
    /// If the scheme is unknown, or an option is invalid or unsupported.
    pub fn from_name(text: &str) -> Result<Self, JobError> {
        match text.strip_prefix("json:") {
            Some(json) => {
                Self::from_options(KeyValues::from_json(json).map_err(JobError::invalid)?)
            }
            None => {
                let source = DiskSource::named(text).map_err(JobError::invalid)?;
                Ok(Self { source, ..Self::default() })
            }
        }
    }

    /// Parses the options of a disk, as `--image-opts` has them.
    ///
    /// # Errors
    ///
    /// Names the invalid or unsupported option.
    pub fn from_options(options: KeyValues) -> Result<Self, JobError> {
        Self::layer_from_options(options, 0).map_err(JobError::invalid)
    }

    /// Parses the options of a disk with `depth` disks above it, for which it is a backing file.
    fn layer_from_options(mut options: KeyValues, depth: usize) -> Result<Self, String> {
        let settings = DriverSettings { read_only: depth > 0, ..DriverSettings::default() };
        let mut disk = Self { format: Some(Format::Raw), settings, ..Self::default() };
        let mut met = Met::NoFormat;
        let (mut driver, mut has_raw) = (options.take("driver"), false);
        if driver.is_none() {
            (disk.format, met) = (None, Met::Format);
            disk.backing = take_backing_disk(&mut options, depth)?;
            options = disk.format_driver(None, options, depth)?;
            driver = options.take("driver");
        }
        loop {
            match driver.as_deref().unwrap_or("file") {
                "raw" => {
                    has_raw = true;
                    let window = take_window(&mut options)?;
                    let above = match met {
                        Met::NoFormat => &mut disk.window,
                        Met::Format => &mut disk.storage_window,
                    };
                    *above = above.within(window).map_err(|error| error.to_string())?;
                    options = disk.format_driver(Some("raw"), options, depth)?;
                }
                name if met == Met::NoFormat && is_container(name) => {
                    if depth > 0 && disk.window != Window::default() {
                        return Err(format!("a part of a {name} image cannot be a backing file"));
                    }
                    (disk.format, met) = (Format::from_name(name), Met::Format);
                    disk.is_below_raw = has_raw;
                    if disk.format == Some(Format::Qcow2) {
                        disk.settings.take_qcow2(&mut options)?;
                    } else if disk.format == Some(Format::Luks) {
                        disk.settings.take_luks(&mut options)?;
                    }
                    disk.backing = take_backing_disk(&mut options, depth)?;
                    options = disk.format_driver(Some(name), options, depth)?;
                }
                name @ ("file" | "host_device") => {
                    disk.file(name, options, depth)?;
                    return Ok(disk);
                }
                "nbd" => {
                    let uri = qemu_name::from_options(&mut options)?;
                    disk.source = DiskSource::Export(Box::new(uri));
                    disk.settings.take_last(Some("nbd"), options)?;
                    return Ok(disk);
                }
                name @ ("null-co" | "null-aio") => {
                    disk.null(name, options)?;
                    return Ok(disk);
                }
                name => return Err(unknown_driver(name)),
            }
            driver = options.take("driver");
        }
    }

    /// Parses the options that all drivers above others have, and returns the options of its
    /// `file`.
    fn format_driver(
        &mut self,
        name: Option<&str>,
        mut options: KeyValues,
        depth: usize,
    ) -> Result<KeyValues, String> {
        if options.take("file").is_some() {
            return Err("a file that is named as a node is not supported; use file.driver and \
                        file.filename"
                .to_owned());
        }
        let file = options.take_below("file");
        if file.is_empty() && depth == 0 {
            return Err("A block device must be specified for \"file\"".to_owned());
        }
        self.settings.take_last(name, options)?;
        Ok(file)
    }

    /// Parses the options of the drivers `file` and `host_device`. Unlike on the command line, the
    /// file name is taken literally.
    fn file(&mut self, driver: &str, mut options: KeyValues, depth: usize) -> Result<(), String> {
        self.source = match options.take("filename") {
            Some(path) => DiskSource::File(path.into()),
            None if depth > 0 => DiskSource::NamedAbove,
            None => return Err(format!("The '{driver}' block driver requires a file name")),
        };
        self.settings.take_file(&mut options)?;
        self.settings.take_last(Some(driver), options)
    }

    /// Parses the options of the drivers `null-co` and `null-aio`.
    fn null(&mut self, driver: &str, mut options: KeyValues) -> Result<(), String> {
        let size = take_size(&mut options, "size")?.unwrap_or(NULL_SIZE);
        // Reads return zeroes in any case.
        options.take_switch("read-zeroes")?;
        let latency = match options.take("latency-ns") {
            None => Duration::ZERO,
            Some(text) => text
                .parse()
                .map(Duration::from_nanos)
                .map_err(|_| format!("Parameter 'latency-ns' expects nanoseconds, not '{text}'"))?,
        };
        self.source = DiskSource::Null { size, latency };
        self.settings.take_last(Some(driver), options)
    }
}

fn take_backing_disk(options: &mut KeyValues, depth: usize) -> Result<DescribedBacking, String> {
    Ok(match take_backing(options, depth)? {
        BackingOption::AsNamed => DescribedBacking::AsNamed,
        BackingOption::Ignored => DescribedBacking::Ignored,
        BackingOption::Given(options) => DescribedBacking::Given(Box::new(
            DiskDescription::layer_from_options(options, depth + 1)?,
        )),
    })
}

/// Returns the image format that a driver's name means.
///
/// # Errors
///
/// If there is no such driver, or its images cannot be read.
pub(crate) fn image_format(driver: &str) -> Result<Format, JobError> {
    let format = Format::from_name(driver).filter(|format| format.is_supported());
    format.ok_or_else(|| JobError::invalid(unknown_driver(driver)))
}

#[cfg(test)]
mod tests {
    use super::*;
    use imgfmt::Locking;
    use nbd_server::export::filters::Discard;

    fn read(text: &str) -> Result<DiskDescription, String> {
        DiskDescription::layer_from_options(KeyValues::parse(text, None).unwrap(), 0)
    }

    #[test]
    fn the_drivers_options_describe_a_disk() {
        let raw = "driver=raw,offset=1M,size=2M,file.driver=file,file.filename=a,,b,discard=unmap";
        let expected = DiskDescription {
            source: DiskSource::File("a,b".into()),
            format: Some(Format::Raw),
            window: Window { offset: 1 << 20, size: Some(2 << 20) },
            settings: DriverSettings { discard: Some(Discard::Unmap), ..DriverSettings::default() },
            ..DiskDescription::default()
        };
        assert_eq!(read(raw), Ok(expected));
        let qcow2 = "driver=qcow2,l2-cache-size=1M,file.filename=d,file.locking=off,read-only=on";
        let expected = DiskDescription {
            source: DiskSource::File("d".into()),
            format: Some(Format::Qcow2),
            settings: DriverSettings {
                locking: Locking::Off,
                read_only: true,
                metadata_cache: Some(1 << 20),
                ..DriverSettings::default()
            },
            ..DiskDescription::default()
        };
        assert_eq!(read(qcow2), Ok(expected));
        let probed =
            DiskDescription { source: DiskSource::File("d".into()), ..DiskDescription::default() };
        assert_eq!(read("file.filename=d"), Ok(probed));
    }

    #[test]
    fn parts_below_a_format_are_told_from_parts_above_it() {
        let raw = "driver=raw,offset=4k,size=1M,file.driver=raw,file.offset=512,\
                   file.file.filename=a:b";
        let expected = DiskDescription {
            source: DiskSource::File("a:b".into()),
            format: Some(Format::Raw),
            window: Window { offset: 4608, size: Some(1 << 20) },
            ..DiskDescription::default()
        };
        assert_eq!(read(raw), Ok(expected));
        let qcow2 = "driver=raw,offset=64k,file.driver=qcow2,file.backing=,file.file.driver=raw,\
                     file.file.offset=512,file.file.size=1M,file.file.file.filename=ova";
        let expected = DiskDescription {
            source: DiskSource::File("ova".into()),
            storage_window: Window { offset: 512, size: Some(1 << 20) },
            format: Some(Format::Qcow2),
            backing: DescribedBacking::Ignored,
            window: Window { offset: 64 << 10, size: None },
            is_below_raw: true,
            ..DiskDescription::default()
        };
        assert_eq!(read(qcow2), Ok(expected));
        let json = r#"{"driver":"qcow2","file":{"filename":"d","driver":"file"},"backing":null}"#;
        let json = DiskDescription::from_options(KeyValues::from_json(json).unwrap()).unwrap();
        assert_eq!(json.backing, DescribedBacking::Ignored);
        let null = DiskDescription {
            source: DiskSource::Null { size: 1 << 20, latency: Duration::ZERO },
            format: Some(Format::Raw),
            ..DiskDescription::default()
        };
        assert_eq!(
            read("driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on"),
            Ok(null)
        );
        assert_eq!(
            DiskSource::named("null-co://"),
            Ok(DiskSource::Null { size: NULL_SIZE, latency: Duration::ZERO })
        );
        let slow = read("driver=null-co,latency-ns=2500").unwrap();
        assert_eq!(
            slow.source,
            DiskSource::Null { size: NULL_SIZE, latency: Duration::from_nanos(2500) }
        );
    }

    #[test]
    fn what_is_unknown_or_missing_is_named() {
        for (text, part) in [
            ("driver=dmg,file.filename=d", "DMG"),
            ("driver=nbd,export=s", "server.path"),
            ("driver=raw,filename=d", "\"file\""),
            ("driver=raw,size=1000,file.filename=d", "512"),
            ("driver=raw,size=x,file.filename=d", "'size'"),
            ("driver=file,filename=d,bogus=1", "bogus"),
            ("driver=qcow2,file.filename=d,bogus=1", "bogus"),
            ("file.filename=d,bogus=1", "No block driver supports the option 'bogus'"),
            ("driver=qcow2,file.filename=d,backing=node", "node"),
            ("driver=qcow2,file.filename=d,encrypt.format=aes", "encrypt"),
            ("driver=qcow2,file.filename=d,encrypt.bogus=s", "encrypt.bogus"),
            ("driver=luks,file.filename=d,header.filename=h", "detached"),
            ("driver=raw,file.filename=d,read-only=maybe", "maybe"),
            ("driver=raw,file.filename=d,force-share=maybe", "maybe"),
            ("driver=raw,file.filename=d,file.aio=maybe", "maybe"),
            ("driver=raw,file=node", "node"),
            (
                "driver=raw,offset=4k,file.driver=raw,file.size=2k,file.file.filename=d",
                "past the end",
            ),
            (
                "driver=raw,size=4k,file.driver=raw,file.size=2k,file.file.filename=d",
                "past the end",
            ),
            ("driver=qcow2,file.driver=qcow2,file.file.filename=d", "qcow2"),
            ("driver=null-co,latency-ns=-5", "latency-ns"),
            ("driver=null-co,bogus=5", "bogus"),
            ("offset=512,file.filename=d", "offset"),
        ] {
            let error = read(text).unwrap_err();
            assert!(error.contains(part), "{text}: {error}");
        }
    }

    #[test]
    fn names_of_images_take_the_same_options_as_disks() {
        use crate::qemu_name::from_json;

        let qcow2 = |top: &str, file: &str| {
            format!(r#"{{"driver":"qcow2"{top},"file":{{"driver":"file","filename":"a"{file}}}}}"#)
        };
        let texts = [
            r#","aio":"native","aio-max-batch":1,"pr-manager":"p","drop-cache":false"#,
            r#","x-check-cache-dropped":true,"locking":"on""#,
            r#","locking":"off""#,
            r#","locking":"maybe""#,
            r#","aio":"io_uring""#,
            r#","aio":"maybe""#,
            r#","node-name":"n","auto-read-only":true,"read-only":true,"force-share":true"#,
            r#","force-share":true"#,
            r#","cache":{"direct":true,"no-flush":true},"discard":"unmap""#,
            r#","cache.direct":"maybe""#,
            r#","detect-zeroes":"unmap""#,
            r#","detect-zeroes":"maybe""#,
            r#","lazy-refcounts":true,"l2-cache-entry-size":4096,"cache-clean-interval":1"#,
            r#","pass-discard-request":true,"pass-discard-snapshot":true"#,
            r#","pass-discard-other":true,"discard-no-unref":false,"overlap-check":"none""#,
            r#","discard-no-unref":true"#,
            r#","cache-size":4194304,"refcount-cache-size":1048576"#,
            r#","cache-size":1,"refcount-cache-size":2"#,
            r#","overlap-check":{"template":"all","main-header":true}"#,
            r#","encrypt":{"format":"luks","key-secret":"s"}"#,
            r#","data-file":{"driver":"file","filename":"d"}"#,
            r#","backing":null"#,
            r#","backing":{"driver":"raw","file":{"driver":"file","filename":"b","locking":"off"}}"#,
            r#","backing":{"file":{"locking":"off"}}"#,
            r#","more":1"#,
        ];
        let mut objects: Vec<String> = texts.iter().map(|text| qcow2(text, "")).collect();
        objects.extend(texts.iter().map(|text| qcow2("", text)));
        let raw = r#"{"driver":"raw","file":"#;
        objects.extend(objects.clone().iter().map(|object| format!("{raw}{object}}}")));
        objects.push(
            r#"{"driver":"raw","file":{"driver":"nbd","path":"/s","read-only":true}}"#.into(),
        );
        objects.push(r#"{"driver":"qcow2","file":{"driver":"qcow2","file.filename":"a"}}"#.into());
        objects.push(r#"{"driver":"host_device","filename":"/dev/a","aio":"native"}"#.into());
        objects.push(r#"{"file":{"driver":"raw","file":{"driver":"file","filename":"a"}}}"#.into());
        for object in objects {
            let disk = DiskDescription::from_name(&format!("json:{object}"));
            let image = from_json(&object);
            match (&disk, &image) {
                (Ok(disk), Ok(image)) => assert_eq!(disk.settings, image.settings, "{object}"),
                (Err(_), Err(_)) => {}
                _ => panic!("{object}: {disk:?}, {image:?}"),
            }
        }
    }
}
