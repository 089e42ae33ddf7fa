//! The options, checked one by one in their order on the command line.

use std::ffi::OsString;
use std::path::PathBuf;
use std::time::Duration;

use imgfmt::CacheMode;
use nbd_proto::limits::MAX_STRING_LEN;
use nbd_server::export::filters::{DetectZeroes, Discard};

use super::error::CommandLineError;
use super::objects::Objects;
use crate::blockdev::SnapshotName;
use crate::getopt::{Getopt, Known, Takes};
use crate::key_values::KeyValues;
use crate::qemu_name::{AioMode, parse_detect_zeroes, parse_discard};
use crate::qemu_numbers::parse_integer;

/// The port without `-p`.
const DEFAULT_PORT: &str = "10809";
const DEFAULT_BIND: &str = "0.0.0.0";

/// The task that a command line requests.
#[derive(Debug)]
pub enum Wanted {
    /// Print the help.
    Help,
    /// Print the version.
    Version,
    /// List the event names.
    TraceHelp,
    /// Serve an image, list exports, or attach or detach a device.
    Work(Box<Options>),
}

/// All options of a server; `None` means that the option was not given.
#[derive(Debug)]
#[non_exhaustive]
pub struct Options {
    /// `-b`: the address to listen on.
    pub bind: Option<String>,
    /// `-p`: the port, not checked yet.
    pub port: Option<String>,
    /// `-k`: the unix socket, as an absolute path.
    pub socket: Option<PathBuf>,
    /// `-e`: most clients at a time; 0 for no limit.
    pub shared: u32,
    /// `-t`: serve further clients after the last one has left.
    pub persistent: bool,
    /// `-v`.
    pub verbose: bool,
    /// `-x`: the name of the export.
    pub export_name: Option<String>,
    /// `-D`: the description of the export.
    pub description: Option<String>,
    /// `-o`: where the export starts on the disk, in bytes.
    pub offset: u64,
    /// `-A`: offer the layers as a metadata context.
    pub allocation_depth: bool,
    /// `-B`: the dirty bitmaps to offer.
    pub bitmaps: Vec<String>,
    /// `-L`: list the exports of another server.
    pub list: bool,
    pub(super) objects: Objects,
    pub(super) tls_creds: Option<String>,
    pub(super) tls_authz: Option<String>,
    pub(super) tls_hostname: Option<String>,
    /// `--fork`: serve in the background.
    pub fork: bool,
    /// `--pid-file`.
    pub pid_file: Option<PathBuf>,
    /// Whether a label of SELinux was given.
    pub selinux_label: bool,
    /// `-c`: the kernel device to attach the image to.
    pub connect: Option<String>,
    /// `-d`: detach the kernel device that is the operand.
    pub disconnect: bool,
    /// `-f`: the name of the format.
    pub format: Option<String>,
    /// `-r`.
    pub read_only: bool,
    /// `-s`: writes go to a temporary file.
    pub temporary: bool,
    /// `-l`: the internal snapshot to serve.
    pub snapshot: Option<SnapshotName>,
    /// `--cache`.
    pub cache: Option<CacheMode>,
    /// `--aio`.
    pub aio: Option<AioMode>,
    /// `--discard`.
    pub discard: Option<Discard>,
    /// `--detect-zeroes`.
    pub detect_zeroes: DetectZeroes,
    /// `--image-opts`: the operand is a list of options.
    pub image_options: bool,
    /// Time limit of a handshake; `Duration::MAX` for no limit.
    pub handshake_limit: Duration,
    /// Whether events are logged.
    pub traces: bool,
    /// The operands.
    pub files: Vec<OsString>,
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
pub fn parse(arguments: Vec<OsString>) -> Result<Wanted, CommandLineError> {
    let mut getopt = Getopt::new(KNOWN, arguments);
    let mut options = Options::default();
    while let Some((id, value)) = getopt.next().map_err(CommandLineError::usage)? {
        match id {
            Id::Help => return Ok(Wanted::Help),
            Id::Version => return Ok(Wanted::Version),
            Id::Trace if value == "help" => return Ok(Wanted::TraceHelp),
            // Paths need not be UTF-8.
            Id::Socket => options.set_socket(value.into())?,
            Id::PidFile => options.pid_file = Some(value.into()),
            _ => {
                let text = value.into_string().map_err(|value| {
                    CommandLineError::new(format!("'{}' is not valid UTF-8", value.display()))
                })?;
                options.set(id, text)?;
            }
        }
    }
    options.files = getopt.into_operands();
    Ok(Wanted::Work(Box::new(options)))
}

impl Options {
    fn set_socket(&mut self, path: PathBuf) -> Result<(), CommandLineError> {
        if !path.is_absolute() {
            return Err(CommandLineError::new("socket path must be absolute"));
        }
        self.socket = Some(path);
        Ok(())
    }

    fn set(&mut self, id: Id, text: String) -> Result<(), CommandLineError> {
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
            Id::Object => self.objects.add(&text).map_err(CommandLineError::new)?,
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
    fn set_checked(&mut self, id: Id, text: String) -> Result<(), CommandLineError> {
        match id {
            Id::Offset => {
                self.offset = parse_integer(&text)
                    .ok_or_else(|| CommandLineError::new(format!("Invalid offset '{text}'")))?;
            }
            Id::Shared => {
                let shared = parse_integer(&text).and_then(|number| i32::try_from(number).ok());
                self.shared = shared.map(i32::cast_unsigned).ok_or_else(|| {
                    CommandLineError::new(format!("Invalid shared device number '{text}'"))
                })?;
            }
            Id::HandshakeLimit => {
                let seconds = parse_integer(&text).and_then(|number| u32::try_from(number).ok());
                let seconds = seconds.ok_or_else(|| {
                    CommandLineError::new(format!("Invalid handshake limit '{text}'"))
                })?;
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

    fn set_cache(&mut self, text: &str) -> Result<(), CommandLineError> {
        if self.cache.is_some() {
            return Err(CommandLineError::new("-n and --cache can only be specified once"));
        }
        let mode = match text {
            "off" => Some(CacheMode::None),
            name => CacheMode::from_name(name),
        };
        let refusal = || CommandLineError::new(format!("Invalid cache mode '{text}'"));
        self.cache = Some(mode.ok_or_else(refusal)?);
        Ok(())
    }

    fn set_aio(&mut self, text: &str) -> Result<(), CommandLineError> {
        if self.aio.is_some() {
            return Err(CommandLineError::new("--aio can only be specified once"));
        }
        let invalid = || CommandLineError::new(format!("Invalid aio mode '{text}'"));
        self.aio = Some(AioMode::from_name(text).ok_or_else(invalid)?);
        Ok(())
    }

    fn set_discard(&mut self, text: &str) -> Result<(), CommandLineError> {
        if self.discard.is_some() {
            return Err(CommandLineError::new("--discard can only be specified once"));
        }
        let discard = parse_discard(text);
        let discard = discard
            .ok_or_else(|| CommandLineError::new(format!("Invalid discard mode '{text}'")))?;
        self.discard = Some(discard);
        Ok(())
    }

    fn set_detect_zeroes(&mut self, text: &str) -> Result<(), CommandLineError> {
        self.detect_zeroes = parse_detect_zeroes(text)
            .ok_or_else(|| CommandLineError::new(format!("Invalid detect-zeroes mode '{text}'")))?;
        if self.detect_zeroes == DetectZeroes::Unmap && self.discard != Some(Discard::Unmap) {
            return Err(CommandLineError::new(
                "--detect-zeroes=unmap is not allowed without --discard=unmap before it",
            ));
        }
        Ok(())
    }

    /// Returns the TCP address to listen on or to connect to; IPv6 addresses without brackets.
    ///
    /// # Errors
    ///
    /// If the port is not a number.
    pub fn host_and_port(&self) -> Result<(String, u16), CommandLineError> {
        let host = self.bind.as_deref().unwrap_or(DEFAULT_BIND);
        let port = self.port.as_deref().unwrap_or(DEFAULT_PORT);
        // Parses a number like the C library's resolver: decimal, with leading blanks.
        let digits = port.trim_start_matches([' ', '\t', '\n', '\x0b', '\x0c', '\r']);
        let number = digits.parse().map_err(|_| {
            CommandLineError::new(format!(
                "Invalid port '{port}' for {host}: not a number up to 65535"
            ))
        })?;
        let host = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
        Ok((host.to_owned(), number))
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

fn too_long(what: &str, text: &str) -> Result<(), CommandLineError> {
    match text.len() > MAX_STRING_LEN {
        true => Err(CommandLineError::new(format!(
            "{what} too long: {} bytes, the protocol allows {MAX_STRING_LEN}",
            text.len()
        ))),
        false => Ok(()),
    }
}

fn parse_snapshot(text: String) -> Result<SnapshotName, CommandLineError> {
    if !text.starts_with("snapshot.") {
        return Ok(SnapshotName::IdOrName(text));
    }
    let wrong = |why: String| CommandLineError::new(format!("{why}, in '-l {text}'"));
    let mut values = KeyValues::parse(&text, None).map_err(wrong)?;
    let (id, name) = (values.take("snapshot.id"), values.take("snapshot.name"));
    match values.left_over() {
        Some(key) => Err(wrong(format!("Invalid parameter '{key}'"))),
        None => Ok(SnapshotName::IdAndName { id, name }),
    }
}
