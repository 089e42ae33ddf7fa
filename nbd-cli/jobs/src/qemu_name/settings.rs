//! The options of QEMU's block drivers that change how a disk is used, not which disk it is.

use imgfmt::{Access, BackingOptions, CacheMode, ExpectedEncryption, Locking, OpenOptions};
#[cfg(feature = "server")]
use nbd_server::export::filters::{DetectZeroes, Discard};

use super::values::take_metadata_cache;
#[cfg(feature = "server")]
use super::values::{parse_detect_zeroes, parse_discard};
use crate::key_values::KeyValues;

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

/// The answer to names with the id of a secret where no secrets are given.
pub(super) const NO_SECRETS: &str = "encrypt.key-secret and key-secret name a secret, and there is none; \
                                     give the file of the passphrase with --key-file";

/// Options of the file driver without an effect that clients see.
const FILE_TUNING: [&str; 4] =
    ["aio-max-batch", "pr-manager", "drop-cache", "x-check-cache-dropped"];

/// The system's interface for reading and writing a file: QEMU's option `aio`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum AioMode {
    /// Threads, without io_uring.
    Threads,
    /// Linux's own asynchronous I/O, for which the page cache must be bypassed. Here it is io_uring
    /// where the system allows it.
    Native,
    /// io_uring where the system allows it.
    IoUring,
}

impl AioMode {
    /// Parses QEMU's name of a mode; `None` if there is none of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "threads" => Some(Self::Threads),
            "native" => Some(Self::Native),
            "io_uring" => Some(Self::IoUring),
            _ => None,
        }
    }
}

/// The settings of a disk and the drivers below it. Those of a driver further up take precedence,
/// except for the cache.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct DriverSettings {
    /// Whether it must not be written to.
    pub read_only: bool,
    /// The locking of its file, unless it is shared.
    pub locking: Locking,
    /// Whether other programs may write to it meanwhile; only for images that are not written to.
    pub force_share: bool,
    /// The interface for its file; `None`: not given.
    pub aio: Option<AioMode>,
    /// The use of the page cache.
    pub cache: CacheSwitches,
    /// Memory for L2 tables, in bytes; `None`: the default.
    pub metadata_cache: Option<u64>,
    /// The id of the secret that opens its encryption; `None`: not given.
    pub key_secret: Option<String>,
    /// Whether a qcow2 image must be encrypted.
    pub encryption: ExpectedEncryption,
    /// Options of the driver `nbd` beside the address of the export.
    pub export: ExportOptions,
    /// The treatment of discards; `None`: not given.
    #[cfg(feature = "server")]
    pub discard: Option<Discard>,
    /// The treatment of zeroes in writes; `None`: not given.
    #[cfg(feature = "server")]
    pub detect_zeroes: Option<DetectZeroes>,
}

/// Options of the driver `nbd` that not all commands know; `None` where they are not given.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ExportOptions {
    /// The id of the object with the credentials of TLS.
    pub tls_creds: Option<String>,
    /// The name that the server's certificate must contain.
    pub tls_hostname: Option<String>,
    /// The context that is shown in the place of `base:allocation`.
    pub dirty_bitmap: Option<String>,
}

impl ExportOptions {
    /// Refuses them, for a use that does not know them.
    ///
    /// # Errors
    ///
    /// A sentence that names one of them.
    pub fn refuse(&self) -> Result<(), String> {
        let option = match self {
            Self { tls_creds: Some(_), .. } => "tls-creds",
            Self { tls_hostname: Some(_), .. } => "tls-hostname",
            Self { dirty_bitmap: Some(_), .. } => "x-dirty-bitmap",
            _ => return Ok(()),
        };
        Err(format!("the option '{option}' of the driver 'nbd' is not supported here"))
    }
}

/// The cache options of drivers, which override a [`CacheMode`]; `None` where they are not given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct CacheSwitches {
    direct: Option<bool>,
    no_flush: Option<bool>,
}

impl CacheSwitches {
    /// Returns the mode with these switches applied. Combinations without a name honour flushes, as
    /// all modes except "unsafe" do.
    pub fn applied_to(self, mode: CacheMode) -> CacheMode {
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

impl DriverSettings {
    /// Returns the locking of the file; `given` is what the user asks for otherwise, which is
    /// stronger unless it is automatic.
    pub fn locking_or(&self, given: Locking) -> Locking {
        match (given, self.force_share) {
            (Locking::Auto, true) => Locking::Shared,
            (Locking::Auto, false) => self.locking,
            (given, _) => given,
        }
    }

    /// Checks the settings that depend on the use of the disk; `cache` is the mode that the
    /// settings override.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn check(&self, access: Access, cache: CacheMode) -> Result<(), String> {
        self.export.refuse()?;
        if access == Access::ReadWrite {
            if self.read_only {
                return Err("its name says read-only=on, and this command writes to it".to_owned());
            }
            if self.force_share {
                return Err(
                    "its name says force-share=on, which is for images that are only read, \
                            and this command writes to it"
                        .to_owned(),
                );
            }
        }
        check_aio(self.aio, self.cache.applied_to(cache))
    }

    /// Changes the options for opening the image. A locking that the user gives otherwise is
    /// stronger.
    ///
    /// # Errors
    ///
    /// As [`check`](Self::check).
    pub fn apply_to(&self, options: &mut OpenOptions) -> Result<(), String> {
        self.check(options.access, options.cache)?;
        if self.key_secret.is_some() && options.passphrases.is_empty() {
            return Err(NO_SECRETS.to_owned());
        }
        options.encryption = self.encryption;
        options.locking = self.locking_or(options.locking);
        options.cache = self.cache.applied_to(options.cache);
        options.metadata_cache_bytes = self.metadata_cache.or(options.metadata_cache_bytes);
        Ok(())
    }

    /// Changes the options for opening the image as a backing file.
    pub fn apply_to_backing(&self, options: &mut BackingOptions) {
        options.encryption = self.encryption;
        let locking = self.locking_or(Locking::Auto);
        options.locking = Some(locking).filter(|locking| *locking != Locking::Auto);
        if self.cache != CacheSwitches::default() {
            options.cache = Some(self.cache.applied_to(CacheMode::default()));
        }
        options.metadata_cache_bytes = self.metadata_cache;
    }

    /// Removes the options that every driver has, and refuses those that are left then. Without a
    /// driver, the image decides it.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn take_last(
        &mut self,
        driver: Option<&str>,
        mut options: KeyValues,
    ) -> Result<(), String> {
        options.take("node-name");
        // A writable export needs a writable file.
        options.take_switch("auto-read-only")?;
        // The last driver counts, the file: those above only hand the options down.
        self.cache.direct = options.take_switch("cache.direct")?.or(self.cache.direct);
        self.cache.no_flush = options.take_switch("cache.no-flush")?.or(self.cache.no_flush);
        self.read_only |= options.take_switch("read-only")?.unwrap_or(false);
        self.force_share |= options.take_switch("force-share")?.unwrap_or(false);
        self.take_filters(&mut options)?;
        match (options.left_over(), driver) {
            (None, _) => Ok(()),
            (Some(key), None) => Err(format!("No block driver supports the option '{key}'")),
            (Some(key), Some(driver)) => {
                Err(format!("Block driver '{driver}' does not support the option '{key}'"))
            }
        }
    }

    /// Removes the options that change requests of clients.
    #[cfg(feature = "server")]
    fn take_filters(&mut self, options: &mut KeyValues) -> Result<(), String> {
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
        Ok(())
    }

    /// Removes the options that change requests of clients, of which there are none.
    #[cfg(not(feature = "server"))]
    #[expect(clippy::unnecessary_wraps, clippy::unused_self, reason = "as with a server")]
    fn take_filters(&mut self, options: &mut KeyValues) -> Result<(), String> {
        options.take("discard");
        options.take("detect-zeroes");
        Ok(())
    }

    /// Removes the options of the drivers `file` and `host_device`, except for the name.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn take_file(&mut self, options: &mut KeyValues) -> Result<(), String> {
        self.locking = match options.take("locking").as_deref() {
            None | Some("auto") => Locking::Auto,
            Some("on") => Locking::On,
            Some("off") => Locking::Off,
            Some(other) => return Err(format!("Invalid value '{other}' for 'locking'")),
        };
        if let Some(text) = options.take("aio") {
            let aio = AioMode::from_name(&text);
            self.aio = Some(aio.ok_or_else(|| format!("Invalid value '{text}' for 'aio'"))?);
        }
        for key in FILE_TUNING {
            options.take(key);
        }
        Ok(())
    }

    /// Removes the options of the driver `qcow2`, except for its files, and refuses those that
    /// would change the disk.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn take_qcow2(&mut self, options: &mut KeyValues) -> Result<(), String> {
        self.metadata_cache = take_metadata_cache(options)?;
        for key in QCOW2_TUNING {
            options.take(key);
        }
        options.take("overlap-check");
        options.take_below("overlap-check");
        if options.take_switch("discard-no-unref")? == Some(true) {
            return Err("discard-no-unref=on is not supported".to_owned());
        }
        if options.take("data-file").is_some() || !options.take_below("data-file").is_empty() {
            return Err("the option 'data-file' of the driver 'qcow2' is not supported".to_owned());
        }
        let mut encrypt = options.take_below("encrypt");
        match encrypt.take("format").as_deref() {
            None => {}
            // An image that is not would take in plain text.
            Some("luks") => self.encryption = ExpectedEncryption::Luks,
            Some(other) => return Err(format!("encrypt.format={other} is not supported")),
        }
        self.take_luks(&mut encrypt)?;
        match encrypt.left_over() {
            None => Ok(()),
            Some(key) => Err(format!("the option 'encrypt.{key}' is not supported")),
        }
    }

    /// Removes the options of the driver `luks`, except for its file.
    ///
    /// # Errors
    ///
    /// A sentence that names the option.
    pub fn take_luks(&mut self, options: &mut KeyValues) -> Result<(), String> {
        if options.take("header").is_some() || !options.take_below("header").is_empty() {
            return Err("a detached header of the driver 'luks' is not supported".to_owned());
        }
        self.key_secret = options.take("key-secret").or(self.key_secret.take());
        Ok(())
    }
}

/// Refuses an interface for a cache mode with which it does not work.
///
/// # Errors
///
/// A sentence that names the options.
pub(crate) fn check_aio(aio: Option<AioMode>, cache: CacheMode) -> Result<(), String> {
    match aio {
        Some(AioMode::Native) if !cache.is_direct() => {
            Err("aio=native only works past the page cache; add cache.direct=on (the cache mode \
                 none or directsync), or choose aio=io_uring"
                .to_owned())
        }
        _ => Ok(()),
    }
}
