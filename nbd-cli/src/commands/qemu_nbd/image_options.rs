//! `--image-opts` and `json:` names: a disk described by the options of QEMU's block drivers.

use std::path::PathBuf;
use std::time::Duration;

use imgfmt::{CacheMode, Format, Locking};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::qemu_name::{self, BackingOption, take_backing};
use nbd_proto::NbdUri;

use super::options::{parse_detect_zeroes, parse_discard};
use crate::qemu_numbers::parse_size;
use nbd_server::export::filters::{DetectZeroes, Discard, Window};

/// A disk described by options.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) struct Described {
    pub(super) place: DiskSource,
    /// The part of the storage that contains the image, by drivers `raw` below its format.
    pub(super) part: Window,
    /// `None`: to be detected.
    pub(super) format: Option<Format>,
    pub(super) backing: Backing,
    /// The part of the disk that is exported, by drivers `raw` above its format.
    pub(super) window: Window,
    /// There are drivers `raw` above its format.
    pub(super) is_below_raw: bool,
    pub(super) read_only: bool,
    pub(super) locking: Locking,
    pub(super) cache: CacheSwitches,
    /// Memory for L2 tables, in bytes; `None`: the default.
    pub(super) metadata_cache: Option<u64>,
    pub(super) discard: Option<Discard>,
    pub(super) detect_zeroes: Option<DetectZeroes>,
}

/// The backing file of a disk.
#[derive(Debug, Default, PartialEq, Eq)]
pub(super) enum Backing {
    /// The one that the image names.
    #[default]
    AsNamed,
    /// None.
    Ignored,
    /// This one. It is read-only, whatever its options say.
    Given(Box<Described>),
}

/// The options of drivers that are stronger than `--cache`; `None` where they are not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(super) struct CacheSwitches {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

impl CacheSwitches {
    /// The mode that is meant. Flushes count in the mixtures that have no name: that is what all modes
    /// but "unsafe" have.
    pub(super) fn applied_to(self, mode: CacheMode) -> CacheMode {
        let direct = self.direct.unwrap_or(mode.is_direct());
        let no_flush = self.no_flush.unwrap_or(!mode.syncs());
        match (direct, mode.is_writethrough()) {
            (true, true) => CacheMode::DirectSync,
            (true, false) => CacheMode::None,
            (false, true) => CacheMode::Writethrough,
            (false, false) if no_flush => CacheMode::Unsafe,
            (false, false) => CacheMode::Writeback,
        }
    }
}

/// The storage of a disk.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum DiskSource {
    File(PathBuf),
    /// The file that the image above names; only for backing files.
    NamedAbove,
    /// On another server.
    Export(Box<NbdUri>),
    /// None: a disk of that many bytes that discards all writes and takes that long for each request.
    Null(u64, Duration),
}

/// Size of a disk of the drivers `null-co` and `null-aio`, in bytes.
const NULL_SIZE: u64 = 1 << 30;

impl Default for DiskSource {
    fn default() -> Self {
        Self::File(PathBuf::new())
    }
}

impl DiskSource {
    /// Parses the name of a file.
    ///
    /// # Errors
    ///
    /// A sentence if its scheme is unknown.
    pub(super) fn named(text: &str) -> Result<Self, String> {
        if qemu_name::is_name_of_server(text) {
            return Ok(Self::Export(Box::new(qemu_name::from_name(text)?)));
        }
        match text.split_once(':') {
            Some(("file", path)) => Ok(Self::File(path.into())),
            Some(("null-co" | "null-aio", "//")) => Ok(Self::Null(NULL_SIZE, Duration::ZERO)),
            Some((driver @ ("null-co" | "null-aio"), _)) => {
                Err(format!("The only allowed filename for this driver is '{driver}://'"))
            }
            // As in QEMU, a colon in a name needs a slash before it.
            Some((scheme, _)) if !scheme.contains('/') => {
                Err(format!("Unknown protocol '{scheme}'; write ./{text} for a file"))
            }
            _ => Ok(Self::File(text.into())),
        }
    }
}

/// Options of the qcow2 driver that tune it or relax guarantees that this engine keeps anyway: they
/// are accepted and have no effect.
const QCOW2_TUNING: [&str; 6] = [
    "lazy-refcounts",
    "l2-cache-entry-size",
    "cache-clean-interval",
    "pass-discard-request",
    "pass-discard-snapshot",
    "pass-discard-other",
];

/// Options of the file driver without an effect that clients see.
const FILE_TUNING: [&str; 5] =
    ["aio", "aio-max-batch", "pr-manager", "drop-cache", "x-check-cache-dropped"];

/// The error of an unknown image driver.
pub(super) fn unknown_driver(name: &str) -> String {
    match Format::from_name(name) {
        Some(format) => format!(
            "the format {} is recognised but cannot be read yet; there are raw and qcow2",
            format.description()
        ),
        None => format!(
            "Unknown driver '{name}'; there are raw and qcow2, and file, host_device, nbd, null-co and \
             null-aio below them"
        ),
    }
}

/// The drivers above the bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Met {
    /// None that interprets an image.
    NoFormat,
    /// qcow2, or one to be detected.
    Format,
}

impl Described {
    /// Parses the options of a whole disk.
    ///
    /// # Errors
    ///
    /// A sentence that names the invalid or unsupported option.
    pub(super) fn from_options(options: KeyValues) -> Result<Self, String> {
        Self::layer_from_options(options, 0)
    }

    /// Parses the options of a disk with `depth` disks above it, for which it is a backing file.
    fn layer_from_options(mut options: KeyValues, depth: usize) -> Result<Self, String> {
        let mut disk = Self { format: Some(Format::Raw), read_only: depth > 0, ..Self::default() };
        let mut met = Met::NoFormat;
        let (mut driver, mut has_raw) = (options.take("driver"), false);
        if driver.is_none() {
            (disk.format, met) = (None, Met::Format);
            disk.backing = take_backing_disk(&mut options, depth)?;
            options = disk.format_driver("any", options, depth)?;
            driver = options.take("driver");
        }
        loop {
            match driver.as_deref().unwrap_or("file") {
                "raw" => {
                    has_raw = true;
                    let window = take_window(&mut options)?;
                    let above = match met {
                        Met::NoFormat => &mut disk.window,
                        Met::Format => &mut disk.part,
                    };
                    *above = above.within(window).map_err(|error| error.to_string())?;
                    options = disk.format_driver("raw", options, depth)?;
                }
                "qcow2" if met == Met::NoFormat => {
                    if depth > 0 && disk.window != Window::default() {
                        return Err("a part of a qcow2 image cannot be a backing file".to_owned());
                    }
                    (disk.format, met) = (Some(Format::Qcow2), Met::Format);
                    disk.is_below_raw = has_raw;
                    options = disk.qcow2(options, depth)?;
                    options = disk.format_driver("qcow2", options, depth)?;
                }
                name @ ("file" | "host_device") => {
                    disk.file(name, options, depth)?;
                    return Ok(disk);
                }
                "nbd" => {
                    let uri = qemu_name::from_options(&mut options)?;
                    disk.place = DiskSource::Export(Box::new(uri));
                    disk.last_driver("nbd", options)?;
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
        name: &str,
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
        self.last_driver(name, options)?;
        Ok(file)
    }

    /// Parses the options of the drivers `file` and `host_device`. Unlike on the command line, the
    /// file name is taken literally.
    fn file(&mut self, driver: &str, mut options: KeyValues, depth: usize) -> Result<(), String> {
        self.place = match options.take("filename") {
            Some(path) => DiskSource::File(path.into()),
            None if depth > 0 => DiskSource::NamedAbove,
            None => return Err(format!("The '{driver}' block driver requires a file name")),
        };
        let locking = match options.take("locking").as_deref() {
            None | Some("auto") => Locking::Auto,
            Some("on") => Locking::On,
            Some("off") => Locking::Off,
            Some(other) => return Err(format!("Invalid value '{other}' for 'locking'")),
        };
        // A setting of a driver further up applies here.
        if self.locking != Locking::Shared {
            self.locking = locking;
        }
        for key in FILE_TUNING {
            options.take(key);
        }
        self.last_driver(driver, options)
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
        self.place = DiskSource::Null(size, latency);
        self.last_driver(driver, options)
    }

    /// Removes options that only tune the driver, and refuses those that would change the disk.
    fn qcow2(&mut self, mut options: KeyValues, depth: usize) -> Result<KeyValues, String> {
        self.metadata_cache = take_metadata_cache(&mut options)?;
        for key in QCOW2_TUNING {
            options.take(key);
        }
        options.take("overlap-check");
        options.take_below("overlap-check");
        if options.take_switch("discard-no-unref")? == Some(true) {
            return Err("discard-no-unref=on is not supported".to_owned());
        }
        self.backing = take_backing_disk(&mut options, depth)?;
        for group in ["encrypt", "data-file"] {
            if options.take(group).is_some() || !options.take_below(group).is_empty() {
                return Err(format!("the option '{group}' of the driver 'qcow2' is not supported"));
            }
        }
        Ok(options)
    }

    /// Parses the options that every driver has; none may be left then. Settings of a driver
    /// further up take precedence.
    fn last_driver(&mut self, driver: &str, mut options: KeyValues) -> Result<(), String> {
        options.take("node-name");
        // A writable export needs a writable file.
        options.take_switch("auto-read-only")?;
        // The last driver counts, the file: those above only hand the options down.
        self.cache.direct = options.take_switch("cache.direct")?.or(self.cache.direct);
        self.cache.no_flush = options.take_switch("cache.no-flush")?.or(self.cache.no_flush);
        self.read_only |= options.take_switch("read-only")?.unwrap_or(false);
        if options.take_switch("force-share")? == Some(true) {
            if !self.read_only {
                return Err("force-share=on can only be used with read-only images".to_owned());
            }
            self.locking = Locking::Shared;
        }
        if let Some(text) = options.take("discard") {
            let discard = parse_discard(&text);
            let discard = discard.ok_or_else(|| format!("Invalid discard option '{text}'"))?;
            self.discard.get_or_insert(discard);
        }
        if let Some(text) = options.take("detect-zeroes") {
            let detect = parse_detect_zeroes(&text);
            let detect = detect.ok_or_else(|| format!("Invalid detect-zeroes option '{text}'"))?;
            self.detect_zeroes.get_or_insert(detect);
        }
        match options.left_over() {
            None => Ok(()),
            Some(key) => {
                Err(format!("Block driver '{driver}' does not support the option '{key}'"))
            }
        }
    }
}

fn take_backing_disk(options: &mut KeyValues, depth: usize) -> Result<Backing, String> {
    Ok(match take_backing(options, depth)? {
        BackingOption::AsNamed => Backing::AsNamed,
        BackingOption::Ignored => Backing::Ignored,
        BackingOption::Given(options) => {
            Backing::Given(Box::new(Described::layer_from_options(options, depth + 1)?))
        }
    })
}

fn take_size(options: &mut KeyValues, key: &str) -> Result<Option<u64>, String> {
    match options.take(key) {
        None => Ok(None),
        Some(text) => parse_size(&text)
            .map(Some)
            .ok_or_else(|| format!("Parameter '{key}' expects a size, not '{text}'")),
    }
}

/// The memory for L2 tables as QEMU's options of the driver `qcow2` give it. There is no separate memory
/// for refcounts: what an option sets aside for them is left out of `cache-size`.
fn take_metadata_cache(options: &mut KeyValues) -> Result<Option<u64>, String> {
    let both = take_size(options, "cache-size")?;
    let l2 = take_size(options, "l2-cache-size")?;
    let refcounts = take_size(options, "refcount-cache-size")?;
    let Some(both) = both else { return Ok(l2) };
    for (name, part) in [("l2-cache-size", l2), ("refcount-cache-size", refcounts)] {
        if part.is_some_and(|part| part > both) {
            return Err(format!("{name} may not exceed cache-size"));
        }
    }
    match (l2, refcounts) {
        (Some(_), Some(_)) => {
            Err("cache-size, l2-cache-size and refcount-cache-size may not be set \
                                   at the same time"
                .to_owned())
        }
        (Some(l2), None) => Ok(Some(l2)),
        (None, refcounts) => Ok(Some(both - refcounts.unwrap_or(0))),
    }
}

fn take_window(options: &mut KeyValues) -> Result<Window, String> {
    let offset = take_size(options, "offset")?.unwrap_or(0);
    let size = take_size(options, "size")?;
    if size.is_some_and(|size| size % 512 != 0) {
        return Err("Specified size is not a multiple of 512".to_owned());
    }
    Ok(Window { offset, size })
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
            place: DiskSource::File("a,b".into()),
            format: Some(Format::Raw),
            window: Window { offset: 1 << 20, size: Some(2 << 20) },
            discard: Some(Discard::Unmap),
            ..Described::default()
        };
        assert_eq!(read(raw), Ok(expected));
        let qcow2 = "driver=qcow2,l2-cache-size=1M,file.filename=d,file.locking=off,read-only=on";
        let expected = Described {
            place: DiskSource::File("d".into()),
            format: Some(Format::Qcow2),
            locking: Locking::Off,
            read_only: true,
            metadata_cache: Some(1 << 20),
            ..Described::default()
        };
        assert_eq!(read(qcow2), Ok(expected));
        let probed = Described { place: DiskSource::File("d".into()), ..Described::default() };
        assert_eq!(read("file.filename=d"), Ok(probed));
    }

    #[test]
    fn parts_below_a_format_are_told_from_parts_above_it() {
        let raw = "driver=raw,offset=4k,size=1M,file.driver=raw,file.offset=512,\
                   file.file.filename=a:b";
        let expected = Described {
            place: DiskSource::File("a:b".into()),
            format: Some(Format::Raw),
            window: Window { offset: 4608, size: Some(1 << 20) },
            ..Described::default()
        };
        assert_eq!(read(raw), Ok(expected));
        let qcow2 = "driver=raw,offset=64k,file.driver=qcow2,file.backing=,file.file.driver=raw,\
                     file.file.offset=512,file.file.size=1M,file.file.file.filename=ova";
        let expected = Described {
            place: DiskSource::File("ova".into()),
            part: Window { offset: 512, size: Some(1 << 20) },
            format: Some(Format::Qcow2),
            backing: Backing::Ignored,
            window: Window { offset: 64 << 10, size: None },
            is_below_raw: true,
            ..Described::default()
        };
        assert_eq!(read(qcow2), Ok(expected));
        let json = r#"{"driver":"qcow2","file":{"filename":"d","driver":"file"},"backing":null}"#;
        let json = Described::from_options(KeyValues::from_json(json).unwrap()).unwrap();
        assert_eq!(json.backing, Backing::Ignored);
        let null = Described {
            place: DiskSource::Null(1 << 20, Duration::ZERO),
            format: Some(Format::Raw),
            ..Described::default()
        };
        assert_eq!(
            read("driver=raw,file.driver=null-co,file.size=1M,file.read-zeroes=on"),
            Ok(null)
        );
        assert_eq!(
            DiskSource::named("null-co://"),
            Ok(DiskSource::Null(NULL_SIZE, Duration::ZERO))
        );
        let slow = read("driver=null-co,latency-ns=2500").unwrap();
        assert_eq!(slow.place, DiskSource::Null(NULL_SIZE, Duration::from_nanos(2500)));
    }

    #[test]
    fn the_memory_for_tables_follows_from_the_sizes_of_qemus_caches() {
        let memory = |sizes: &str| {
            read(&format!("driver=qcow2,file.filename=d{sizes}")).map(|disk| disk.metadata_cache)
        };
        assert_eq!(memory(""), Ok(None));
        assert_eq!(memory(",l2-cache-size=64k,refcount-cache-size=1M"), Ok(Some(64 << 10)));
        assert_eq!(memory(",cache-size=4M"), Ok(Some(4 << 20)));
        assert_eq!(memory(",cache-size=4M,refcount-cache-size=1M"), Ok(Some(3 << 20)));
        assert_eq!(memory(",cache-size=4M,l2-cache-size=1M"), Ok(Some(1 << 20)));
        for wrong in [
            ",cache-size=1M,l2-cache-size=2M",
            ",cache-size=1M,refcount-cache-size=2M",
            ",cache-size=4M,l2-cache-size=2M,refcount-cache-size=2M",
            ",l2-cache-size=much",
        ] {
            assert!(memory(wrong).unwrap_err().contains("-size"), "{wrong}");
        }
    }

    #[test]
    fn cache_switches_are_stronger_than_the_cache_mode() {
        let mode = |text: &str, mode| read(text).unwrap().cache.applied_to(mode);
        let plain = "driver=raw,file.filename=d";
        for cache in CacheMode::ALL {
            assert_eq!(mode(plain, cache), cache);
        }
        let direct = "driver=raw,cache.direct=on,file.filename=d";
        assert_eq!(mode(direct, CacheMode::Writeback), CacheMode::None);
        assert_eq!(mode(direct, CacheMode::Writethrough), CacheMode::DirectSync);
        let overridden = "driver=raw,cache.direct=on,file.filename=d,file.cache.direct=off";
        assert_eq!(mode(overridden, CacheMode::None), CacheMode::Writeback);
        let no_flush = "driver=qcow2,cache.no-flush=on,file.filename=d";
        assert_eq!(mode(no_flush, CacheMode::Writeback), CacheMode::Unsafe);
        assert_eq!(mode(no_flush, CacheMode::None), CacheMode::None);
        let flush = "driver=qcow2,file.cache.no-flush=off,file.filename=d";
        assert_eq!(mode(flush, CacheMode::Unsafe), CacheMode::Writeback);
    }

    #[test]
    fn what_is_unknown_or_missing_is_named() {
        for (text, part) in [
            ("driver=vmdk,file.filename=d", "VMDK"),
            ("driver=nbd,export=s", "server.path"),
            ("driver=raw,filename=d", "\"file\""),
            ("driver=raw,size=1000,file.filename=d", "512"),
            ("driver=raw,size=x,file.filename=d", "'size'"),
            ("driver=file,filename=d,bogus=1", "bogus"),
            ("driver=qcow2,file.filename=d,bogus=1", "bogus"),
            ("driver=qcow2,file.filename=d,backing=node", "node"),
            ("driver=qcow2,file.filename=d,encrypt.key-secret=s", "encrypt"),
            ("driver=raw,file.filename=d,read-only=maybe", "maybe"),
            ("driver=raw,file.filename=d,force-share=on", "force-share"),
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
}
