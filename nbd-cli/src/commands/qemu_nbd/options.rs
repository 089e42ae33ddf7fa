//! The options, checked one by one in their order on the command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use imgfmt::CacheMode;
use nbd_jobs::blockdev::{SnapshotName, parse_detect_zeroes, parse_discard};
use nbd_jobs::key_values::KeyValues;
use nbd_jobs::qemu_numbers::parse_integer;
use nbd_proto::limits::MAX_STRING_LEN;

use super::getopt::{Getopt, Known, Takes};
use super::objects::Objects;
use super::refusal::Refusal;
use nbd_server::export::filters::{DetectZeroes, Discard};

/// The task that a command line requests.
#[derive(Debug)]
pub(super) enum Wanted {
    Help,
    Version,
    /// List the event names.
    TraceHelp,
    Work(Box<Options>),
}

/// All options of a server; `None` means that the option was not given.
#[derive(Debug)]
pub(super) struct Options {
    pub(super) bind: Option<String>,
    pub(super) port: Option<String>,
    pub(super) socket: Option<PathBuf>,
    /// Most clients at a time; 0 for no limit.
    pub(super) shared: u32,
    pub(super) persistent: bool,
    pub(super) verbose: bool,
    pub(super) export_name: Option<String>,
    pub(super) description: Option<String>,
    pub(super) offset: u64,
    pub(super) allocation_depth: bool,
    pub(super) bitmaps: Vec<String>,
    pub(super) list: bool,
    pub(super) objects: Objects,
    pub(super) tls_creds: Option<String>,
    pub(super) tls_authz: Option<String>,
    pub(super) tls_hostname: Option<String>,
    pub(super) fork: bool,
    pub(super) pid_file: Option<PathBuf>,
    pub(super) selinux_label: bool,
    /// The kernel device to attach the image to.
    pub(super) connect: Option<String>,
    pub(super) disconnect: bool,
    pub(super) format: Option<String>,
    pub(super) read_only: bool,
    pub(super) temporary: bool,
    pub(super) snapshot: Option<SnapshotName>,
    pub(super) cache: Option<CacheMode>,
    pub(super) aio: Option<AioMode>,
    pub(super) discard: Option<Discard>,
    pub(super) detect_zeroes: DetectZeroes,
    pub(super) image_options: bool,
    /// Time limit of a handshake; `Duration::MAX` for no limit.
    pub(super) handshake_limit: Duration,
    /// Whether events are logged.
    pub(super) traces: bool,
    /// The operands.
    pub(super) files: Vec<OsString>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum AioMode {
    Threads,
    Native,
    IoUring,
}

#[derive(Clone, Copy, Debug)]
enum Id {
    Help,
    Version,
    Bind,
    Port,
    Socket,
    Offset,
    ReadOnly,
    Connect,
    Disconnect,
    List,
    Snapshot,
    LoadSnapshot,
    NoCache,
    Cache,
    Aio,
    Discard,
    DetectZeroes,
    Shared,
    Format,
    Persistent,
    Verbose,
    Object,
    ExportName,
    Description,
    TlsCreds,
    TlsHostname,
    TlsAuthz,
    ImageOptions,
    Trace,
    Fork,
    PidFile,
    SelinuxLabel,
    AllocationDepth,
    Bitmap,
    HandshakeLimit,
}

const fn flag(short: Option<u8>, long: &'static str, means: Id) -> Known<Id> {
    Known { short, long, takes: Takes::Nothing, means }
}

const fn value(short: Option<u8>, long: &'static str, means: Id) -> Known<Id> {
    Known { short, long, takes: Takes::Value, means }
}

const KNOWN: &[Known<Id>] = &[
    flag(Some(b'h'), "help", Id::Help),
    flag(Some(b'V'), "version", Id::Version),
    value(Some(b'b'), "bind", Id::Bind),
    value(Some(b'p'), "port", Id::Port),
    value(Some(b'k'), "socket", Id::Socket),
    value(Some(b'o'), "offset", Id::Offset),
    flag(Some(b'r'), "read-only", Id::ReadOnly),
    flag(Some(b'A'), "allocation-depth", Id::AllocationDepth),
    value(Some(b'B'), "bitmap", Id::Bitmap),
    value(Some(b'c'), "connect", Id::Connect),
    flag(Some(b'd'), "disconnect", Id::Disconnect),
    flag(Some(b'L'), "list", Id::List),
    flag(Some(b's'), "snapshot", Id::Snapshot),
    value(Some(b'l'), "load-snapshot", Id::LoadSnapshot),
    flag(Some(b'n'), "nocache", Id::NoCache),
    value(None, "cache", Id::Cache),
    value(None, "aio", Id::Aio),
    value(None, "discard", Id::Discard),
    value(None, "detect-zeroes", Id::DetectZeroes),
    value(Some(b'e'), "shared", Id::Shared),
    value(Some(b'f'), "format", Id::Format),
    flag(Some(b't'), "persistent", Id::Persistent),
    flag(Some(b'v'), "verbose", Id::Verbose),
    value(None, "object", Id::Object),
    value(Some(b'x'), "export-name", Id::ExportName),
    value(Some(b'D'), "description", Id::Description),
    value(None, "tls-creds", Id::TlsCreds),
    value(None, "tls-hostname", Id::TlsHostname),
    value(None, "tls-authz", Id::TlsAuthz),
    flag(None, "image-opts", Id::ImageOptions),
    value(Some(b'T'), "trace", Id::Trace),
    flag(None, "fork", Id::Fork),
    value(None, "pid-file", Id::PidFile),
    value(None, "selinux-label", Id::SelinuxLabel),
    value(None, "handshake-limit", Id::HandshakeLimit),
];

impl Default for Options {
    fn default() -> Self {
        Self {
            bind: None,
            port: None,
            socket: None,
            shared: 1,
            persistent: false,
            verbose: false,
            export_name: None,
            description: None,
            offset: 0,
            allocation_depth: false,
            bitmaps: Vec::new(),
            list: false,
            objects: Objects::default(),
            tls_creds: None,
            tls_authz: None,
            tls_hostname: None,
            fork: false,
            pid_file: None,
            selinux_label: false,
            connect: None,
            disconnect: false,
            format: None,
            read_only: false,
            temporary: false,
            snapshot: None,
            cache: None,
            aio: None,
            discard: None,
            detect_zeroes: DetectZeroes::Off,
            image_options: false,
            handshake_limit: Duration::from_secs(10),
            traces: false,
            files: Vec::new(),
        }
    }
}

/// Parses a command line, without the program's name.
///
/// # Errors
///
/// The first error.
pub(super) fn parse(arguments: Vec<OsString>) -> Result<Wanted, Refusal> {
    let mut getopt = Getopt::new(KNOWN, arguments);
    let mut options = Options::default();
    while let Some((id, value)) = getopt.next().map_err(Refusal::usage)? {
        match id {
            Id::Help => return Ok(Wanted::Help),
            Id::Version => return Ok(Wanted::Version),
            Id::Trace if value == "help" => return Ok(Wanted::TraceHelp),
            // Paths need not be UTF-8.
            Id::Socket => options.set_socket(value.into())?,
            Id::PidFile => options.pid_file = Some(value.into()),
            _ => {
                let text = value.into_string().map_err(|value| {
                    Refusal::new(format!("'{}' is not valid UTF-8", value.display()))
                })?;
                options.set(id, text)?;
            }
        }
    }
    options.files = getopt.into_operands();
    Ok(Wanted::Work(Box::new(options)))
}

impl Options {
    fn set_socket(&mut self, path: PathBuf) -> Result<(), Refusal> {
        if !path.is_absolute() {
            return Err(Refusal::new("socket path must be absolute"));
        }
        self.socket = Some(path);
        Ok(())
    }

    fn set(&mut self, id: Id, text: String) -> Result<(), Refusal> {
        match id {
            Id::Bind => self.bind = Some(text),
            Id::Port => self.port = Some(text),
            Id::ReadOnly => self.read_only = true,
            Id::AllocationDepth => self.allocation_depth = true,
            Id::Bitmap => self.bitmaps.push(text),
            Id::Connect => self.connect = Some(text),
            Id::Disconnect => self.disconnect = true,
            Id::List => self.list = true,
            Id::Snapshot => self.temporary = true,
            Id::Format => self.format = Some(text),
            Id::Persistent => self.persistent = true,
            Id::Verbose => self.verbose = true,
            Id::Object => self.objects.add(&text).map_err(Refusal::new)?,
            Id::TlsCreds => self.tls_creds = Some(text),
            Id::TlsHostname => self.tls_hostname = Some(text),
            Id::TlsAuthz => self.tls_authz = Some(text),
            Id::ImageOptions => self.image_options = true,
            Id::Trace => self.traces = true,
            Id::Fork => self.fork = true,
            Id::SelinuxLabel => self.selinux_label = true,
            _ => self.set_checked(id, text)?,
        }
        Ok(())
    }

    /// Options with a checked value.
    fn set_checked(&mut self, id: Id, text: String) -> Result<(), Refusal> {
        match id {
            Id::Offset => {
                self.offset = parse_integer(&text)
                    .ok_or_else(|| Refusal::new(format!("Invalid offset '{text}'")))?;
            }
            Id::Shared => {
                let shared = parse_integer(&text).and_then(|number| i32::try_from(number).ok());
                self.shared = shared.map(i32::cast_unsigned).ok_or_else(|| {
                    Refusal::new(format!("Invalid shared device number '{text}'"))
                })?;
            }
            Id::HandshakeLimit => {
                let seconds = parse_integer(&text).and_then(|number| u32::try_from(number).ok());
                let seconds = seconds
                    .ok_or_else(|| Refusal::new(format!("Invalid handshake limit '{text}'")))?;
                self.handshake_limit = match seconds {
                    0 => Duration::MAX,
                    seconds => Duration::from_secs(seconds.into()),
                };
            }
            Id::ExportName => {
                too_long("export name", &text)?;
                self.export_name = Some(text);
            }
            Id::Description => {
                too_long("export description", &text)?;
                self.description = Some(text);
            }
            Id::LoadSnapshot => {
                self.snapshot = Some(parse_snapshot(text)?);
                self.read_only = true;
            }
            Id::NoCache => self.set_cache("none")?,
            Id::Cache => self.set_cache(&text)?,
            Id::Aio => self.set_aio(&text)?,
            Id::Discard => self.set_discard(&text)?,
            Id::DetectZeroes => self.set_detect_zeroes(&text)?,
            _ => {}
        }
        Ok(())
    }

    fn set_cache(&mut self, text: &str) -> Result<(), Refusal> {
        if self.cache.is_some() {
            return Err(Refusal::new("-n and --cache can only be specified once"));
        }
        let mode = match text {
            "off" => Some(CacheMode::None),
            name => CacheMode::from_name(name),
        };
        let refusal = || Refusal::new(format!("Invalid cache mode '{text}'"));
        self.cache = Some(mode.ok_or_else(refusal)?);
        Ok(())
    }

    fn set_aio(&mut self, text: &str) -> Result<(), Refusal> {
        if self.aio.is_some() {
            return Err(Refusal::new("--aio can only be specified once"));
        }
        self.aio = Some(match text {
            "threads" => AioMode::Threads,
            "native" => AioMode::Native,
            "io_uring" => AioMode::IoUring,
            _ => return Err(Refusal::new(format!("Invalid aio mode '{text}'"))),
        });
        Ok(())
    }

    fn set_discard(&mut self, text: &str) -> Result<(), Refusal> {
        if self.discard.is_some() {
            return Err(Refusal::new("--discard can only be specified once"));
        }
        let discard = parse_discard(text);
        let discard =
            discard.ok_or_else(|| Refusal::new(format!("Invalid discard mode '{text}'")))?;
        self.discard = Some(discard);
        Ok(())
    }

    fn set_detect_zeroes(&mut self, text: &str) -> Result<(), Refusal> {
        self.detect_zeroes = parse_detect_zeroes(text)
            .ok_or_else(|| Refusal::new(format!("Invalid detect-zeroes mode '{text}'")))?;
        if self.detect_zeroes == DetectZeroes::Unmap && self.discard != Some(Discard::Unmap) {
            return Err(Refusal::new(
                "--detect-zeroes=unmap is not allowed without --discard=unmap before it",
            ));
        }
        Ok(())
    }

    /// Returns whether there are options about the disk, which a list does not use.
    pub(super) fn says_something_about_the_disk(&self) -> bool {
        self.export_name.is_some()
            || self.description.is_some()
            || self.offset != 0
            || self.connect.is_some()
            || self.disconnect
            || self.format.is_some()
            || self.snapshot.is_some()
            || !self.bitmaps.is_empty()
            || self.allocation_depth
            || self.aio.is_some()
            || self.discard.is_some()
            || self.cache.is_some()
    }
}

fn too_long(what: &str, text: &str) -> Result<(), Refusal> {
    match text.len() > MAX_STRING_LEN {
        true => Err(Refusal::new(format!(
            "{what} too long: {} bytes, the protocol allows {MAX_STRING_LEN}",
            text.len()
        ))),
        false => Ok(()),
    }
}

fn parse_snapshot(text: String) -> Result<SnapshotName, Refusal> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotName::IdOrName(text));
    }
    let wrong = |why: String| Refusal::new(format!("{why}, in '-l {text}'"));
    let mut values = KeyValues::parse(&text, None).map_err(wrong)?;
    let (id, name) = (values.take("snapshot.id"), values.take("snapshot.name"));
    match values.left_over() {
        Some(key) => Err(wrong(format!("Invalid parameter '{key}'"))),
        None => Ok(SnapshotName::IdAndName { id, name }),
    }
}
