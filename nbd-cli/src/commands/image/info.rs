//! `nbd-cli image info`.

mod backup;
mod encryption;
mod graph;

use std::borrow::Cow;
use std::ffi::{OsStr, OsString};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use clap::Args;
use imgfmt::{
    BitmapEntry, CompressionType, Encryption, Format, ImageInfo, L2Entries, OpenOptions, Qcow2Info,
    Qcow2Version, Recording,
};
use nbd_client::Scope;
use nbd_jobs::graph::graph as draw;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::qemu_name::has_scheme;
use nbd_proto::NbdUri;
use serde::Serialize;

use self::backup::JsonBackup;
use self::encryption::{JsonEncryption, Naming};
use super::location;
use super::open::OpenArgs;
use super::snapshot::{self, JsonSnapshot};
use crate::async_runtime::runtime;
use crate::commands::info::report::ServerReport;
use crate::connect::{ServerArgs, explain_unknown_export};
use crate::error::{CommandError, Outcome};
use crate::locking::{ShareArgs, advise_sharing};
use crate::output::{Output, ReportFormat, printable};
use crate::size::{exact, rounded};
use crate::terminal;

const AFTER_HELP: &str = "\
Examples:
  nbd-cli image info disk.qcow2
  nbd-cli image info --json disk.qcow2
  nbd-cli image info --backing-chain overlay.qcow2
  nbd-cli image info --graph overlay.qcow2
  nbd-cli image info nbd://localhost/disk

Only the file itself is read: the backing file and the data file that it names are not opened, unless
--backing-chain or --graph is given.";

/// Arguments of `nbd-cli image info`.
#[derive(Debug, Args)]
#[command(after_help = AFTER_HELP)]
pub struct InfoArgs {
    /// The image: a file, or an export as an NBD URI.
    pub path: OsString,

    /// Describe the whole chain of backing files as well.
    #[arg(long)]
    pub backing_chain: bool,

    /// Draw the chain of backing files, with their data files, sizes, space and dates.
    #[arg(long, conflicts_with = "json")]
    pub graph: bool,

    /// Print JSON.
    #[arg(long)]
    pub json: bool,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub share: ShareArgs,

    #[command(flatten)]
    pub open: OpenArgs,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub server: ServerArgs,
}

/// Information about one file, with the keys of qemu-img.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Layer<'a> {
    filename: String,
    format: &'static str,
    virtual_size: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    actual_size: Option<u64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    cluster_size: Option<u64>,
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    encrypted: bool,
    dirty_flag: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    full_backing_filename: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    backing_filename_format: Option<&'a str>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    snapshots: Vec<JsonSnapshot<'a>>,
    /// The identity of a backup; not a key of qemu-img.
    #[serde(skip_serializing_if = "Option::is_none")]
    backup: Option<JsonBackup<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    format_specific: Option<Specific<'a>>,
    /// The properties of an export, with the keys of nbdinfo.
    #[serde(skip_serializing_if = "Option::is_none")]
    server: Option<&'a ServerReport>,
}

#[derive(Serialize)]
struct Specific<'a> {
    #[serde(rename = "type")]
    kind: &'static str,
    data: SpecificData<'a>,
}

#[derive(Serialize)]
#[serde(untagged)]
enum SpecificData<'a> {
    Qcow2(Box<Qcow2Data<'a>>),
    Luks(JsonEncryption<'a>),
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct Qcow2Data<'a> {
    compat: &'static str,
    compression_type: &'static str,
    lazy_refcounts: bool,
    refcount_bits: u32,
    corrupt: bool,
    extended_l2: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file: Option<Cow<'a, str>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    data_file_raw: Option<bool>,
    #[serde(skip_serializing_if = "Vec::is_empty")]
    bitmaps: Vec<JsonBitmap<'a>>,
    #[serde(skip_serializing_if = "Option::is_none")]
    encrypt: Option<JsonEncryption<'a>>,
}

#[derive(Serialize)]
struct JsonBitmap<'a> {
    name: &'a str,
    granularity: u64,
    flags: Vec<&'static str>,
}

pub(crate) fn run(args: &InfoArgs) -> Result<Outcome, CommandError> {
    let location = location::parse_one(&args.path, &args.server, &args.open.trust)?;
    let layers = layers(args, location).map_err(advise_sharing)?;
    let mut output = Output::new();
    if args.graph {
        let nodes = (0..).zip(&layers);
        let nodes = nodes.flat_map(|(index, it)| graph::nodes(&it.location, &it.info, index == 0));
        let drawn =
            draw(&nodes.collect::<Vec<_>>(), terminal::columns(), terminal::character_set());
        drawn.iter().try_for_each(|line| output.line(line))?;
        output.finish()?;
        return Ok(Outcome::Success);
    }
    match ReportFormat::from_json_flag(args.json) {
        ReportFormat::Json if args.backing_chain => {
            let all: Result<Vec<_>, _> = layers.iter().map(Found::json).collect();
            output.json(&all?)?;
        }
        ReportFormat::Json => {
            for found in &layers {
                output.json(&found.json()?)?;
            }
        }
        ReportFormat::Text => {
            for (index, found) in layers.iter().enumerate() {
                if index > 0 {
                    output.line("")?;
                }
                text(found, &mut output)?;
            }
        }
    }
    output.finish()?;
    Ok(Outcome::Success)
}

/// Prints the properties of an image after it was created or changed.
pub(super) fn print_json(path: &Path, options: &OpenOptions) -> Result<(), CommandError> {
    let location = ImageLocation::File(path.to_owned());
    let info = location.inspect(options, &ServerArgs::default().remotes())?;
    let mut output = Output::new();
    output.json(&Found { location, info, server: None }.json()?)?;
    output.finish()
}

/// One layer of the report.
struct Found {
    location: ImageLocation,
    info: ImageInfo,
    server: Option<ServerReport>,
}

/// Returns the image and, on request, everything below it.
fn layers(args: &InfoArgs, location: ImageLocation) -> Result<Vec<Found>, CommandError> {
    let mut options = args.share.apply(args.open.options_with(&args.server));
    let whole_chain = args.backing_chain || args.graph;
    if whole_chain {
        // Checks that every name may be followed, and that there is no cycle.
        location.open(&options, &args.server.remotes())?;
    }
    let server = match location.uri() {
        None => None,
        Some(uri) => Some(runtime()?.block_on(inspect(uri, &args.server))?),
    };
    let info = location.inspect(&options, &args.server.remotes())?;
    let mut layers = vec![Found { location, info, server }];
    while whole_chain
        && let Some(above) = layers.last()
        && let Some(qcow2) = &above.info.qcow2
        && let Some((location, format)) = above.location.backing(recorded_backing(qcow2))?
    {
        options.format = format;
        let info = location.inspect(&options, &args.server.remotes())?;
        layers.push(Found { location, info, server: None });
    }
    Ok(layers)
}

/// The name and format of the backing file in an image.
fn recorded_backing(qcow2: &Qcow2Info) -> Option<(&OsStr, Option<Format>)> {
    // Any other name is one of a raw image.
    let format = |name| Format::from_name(name).unwrap_or(Format::Raw);
    let name = qcow2.backing_name.as_deref()?;
    Some((name, qcow2.backing_format.as_deref().map(format)))
}

/// Describes an export.
async fn inspect(uri: &NbdUri, server: &ServerArgs) -> Result<ServerReport, CommandError> {
    let connector = server.connector(uri);
    match connector.inspect(Scope::ThisExport).await {
        Ok(server) => Ok(ServerReport::new(&server, uri)),
        Err(error) => Err(explain_unknown_export(&connector, uri, error).await),
    }
}

/// The space that the file occupies, in bytes.
fn actual_size(path: &Path) -> Result<u64, CommandError> {
    let metadata = std::fs::metadata(path).map_err(|error| {
        CommandError::new(format!("cannot look at '{}': {error}", path.display()))
    })?;
    Ok(metadata.blocks() * 512)
}

impl Found {
    /// Returns the space that the image occupies, if it can be known.
    fn actual_size(&self) -> Result<Option<u64>, CommandError> {
        match self.location.uri() {
            None => actual_size(self.location.path()).map(Some),
            Some(_) => Ok(None),
        }
    }

    /// Format-specific information.
    fn specific(&self) -> Option<Specific<'_>> {
        let encryption = self.info.encryption.as_ref();
        match (&self.info.qcow2, encryption) {
            (Some(qcow2), encryption) => {
                let data = SpecificData::Qcow2(Box::new(data(qcow2, encryption)));
                Some(Specific { kind: "qcow2", data })
            }
            (None, Some(encryption)) => {
                let data = SpecificData::Luks(encryption::json(encryption, Naming::Alone));
                Some(Specific { kind: self.info.format.name(), data })
            }
            (None, None) => None,
        }
    }

    fn json(&self) -> Result<Layer<'_>, CommandError> {
        let qcow2 = self.info.qcow2.as_ref();
        let backing_filename = qcow2.and_then(|qcow2| qcow2.backing_name.as_deref());
        Ok(Layer {
            filename: self.location.name(),
            format: self.info.format.name(),
            virtual_size: self.info.size,
            actual_size: self.actual_size()?,
            cluster_size: qcow2.map(|qcow2| qcow2.cluster_size),
            encrypted: self.info.encryption.is_some(),
            dirty_flag: qcow2.is_some_and(|qcow2| qcow2.is_dirty),
            backing_filename: backing_filename.map(OsStr::to_string_lossy),
            full_backing_filename: backing_filename.map(|name| match self.location.beside(name) {
                Ok(location @ ImageLocation::File(_)) if !name.to_str().is_some_and(has_scheme) => {
                    location.name()
                }
                _ => name.to_string_lossy().into_owned(),
            }),
            backing_filename_format: qcow2.and_then(|qcow2| qcow2.backing_format.as_deref()),
            snapshots: qcow2.map(|qcow2| snapshot::json(&qcow2.snapshots)).unwrap_or_default(),
            backup: qcow2.and_then(|qcow2| qcow2.backup.as_ref()).map(JsonBackup::from),
            format_specific: self.specific(),
            server: self.server.as_ref(),
        })
    }
}

/// A bitmap, with qemu-img's names.
fn bitmap_flags(bitmap: &BitmapEntry) -> Vec<&'static str> {
    let auto = bitmap.recording == Recording::Enabled;
    let flags = [(bitmap.is_in_use, "in-use"), (auto, "auto")];
    flags.into_iter().filter(|(is_set, _)| *is_set).map(|(_, flag)| flag).collect()
}

fn data<'a>(qcow2: &'a Qcow2Info, encryption: Option<&'a Encryption>) -> Qcow2Data<'a> {
    let data_file = qcow2.data_file_name.as_deref().map(OsStr::to_string_lossy);
    Qcow2Data {
        compat: compat(qcow2),
        compression_type: compression(qcow2),
        lazy_refcounts: qcow2.lazy_refcounts,
        refcount_bits: qcow2.refcount_bits,
        corrupt: qcow2.is_corrupt,
        extended_l2: qcow2.l2_entries == L2Entries::Extended,
        data_file,
        data_file_raw: qcow2.data_file_name.is_some().then_some(qcow2.data_file_is_raw),
        bitmaps: qcow2.bitmaps.iter().map(JsonBitmap::from).collect(),
        encrypt: encryption.map(|encryption| encryption::json(encryption, Naming::InImage)),
    }
}

impl<'a> From<&'a BitmapEntry> for JsonBitmap<'a> {
    fn from(bitmap: &'a BitmapEntry) -> Self {
        Self { name: &bitmap.name, granularity: bitmap.granularity, flags: bitmap_flags(bitmap) }
    }
}

fn compat(qcow2: &Qcow2Info) -> &'static str {
    match qcow2.version {
        Qcow2Version::V2 => "0.10",
        Qcow2Version::V3 => "1.1",
    }
}

fn compression(qcow2: &Qcow2Info) -> &'static str {
    match qcow2.compression {
        CompressionType::Zlib => "zlib",
        CompressionType::Zstd => "zstd",
    }
}

fn text(found: &Found, output: &mut Output) -> Result<(), CommandError> {
    let info = &found.info;
    let mut line = |what: &str, value: &str| output.line(&format!("{what:<18} {value}"));
    line("image:", &printable(&found.location.name()))?;
    line("format:", info.format.name())?;
    line("virtual size:", &format!("{} ({} bytes)", rounded(info.size), info.size))?;
    if let Some(bytes) = found.actual_size()? {
        line("space taken:", &rounded(bytes))?;
    }
    if let Some(server) = &found.server {
        line("protocol:", &server.protocol())?;
        line("server offers:", &server.abilities().join(", "))?;
        for context in server.contexts() {
            line("context:", &printable(context))?;
        }
    }
    if let Some(encryption) = &info.encryption {
        line("encryption:", &printable(&encryption::text(encryption)))?;
    }
    match &info.qcow2 {
        Some(qcow2) => qcow2_text(qcow2, output),
        None => Ok(()),
    }
}

/// Information specific to qcow2.
fn qcow2_text(qcow2: &Qcow2Info, output: &mut Output) -> Result<(), CommandError> {
    let mut line = |what: &str, value: &str| output.line(&format!("{what:<18} {value}"));
    line("compat:", compat(qcow2))?;
    line("cluster size:", &exact(qcow2.cluster_size))?;
    line("refcount bits:", &qcow2.refcount_bits.to_string())?;
    line("compression:", compression(qcow2))?;
    let flags = [
        ("extended L2", qcow2.l2_entries == L2Entries::Extended),
        ("lazy refcounts", qcow2.lazy_refcounts),
        ("dirty bitmaps", qcow2.has_bitmaps),
        ("raw data file", qcow2.data_file_is_raw),
        ("not closed properly", qcow2.is_dirty),
        ("marked as damaged", qcow2.is_corrupt),
    ];
    let flags: Vec<_> = flags.iter().filter(|(_, is_set)| *is_set).map(|(name, _)| *name).collect();
    if !flags.is_empty() {
        line("flags:", &flags.join(", "))?;
    }
    if let Some(name) = &qcow2.backing_name {
        line("backing file:", &printable(&name.to_string_lossy()))?;
        let format = qcow2.backing_format.as_deref().unwrap_or("not said");
        line("backing format:", &printable(format))?;
    }
    if let Some(name) = &qcow2.data_file_name {
        line("data file:", &printable(&name.to_string_lossy()))?;
    }
    if let Some(found) = &qcow2.backup {
        line("backup:", &backup::text(found))?;
    }
    for bitmap in &qcow2.bitmaps {
        let flags = bitmap_flags(bitmap).join(", ");
        let flags = if flags.is_empty() { flags } else { format!(" ({flags})") };
        let granularity = exact(bitmap.granularity);
        line("bitmap:", &format!("{}, granularity {granularity}{flags}", printable(&bitmap.name)))?;
    }
    if !qcow2.snapshots.is_empty() {
        line("snapshots:", "id, size of the disk, time, name")?;
        snapshot::text(&qcow2.snapshots, output)?;
    }
    Ok(())
}
