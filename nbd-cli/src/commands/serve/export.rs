//! The options of an export.

use std::ffi::OsString;
use std::sync::Arc;

use clap::Args;
use nbd_jobs::size::ByteSize;

use super::access::AccessArgs;
use super::upstream::UpstreamArgs;
use crate::commands::image::open::TrustArgs;
use crate::image_format::ImageFormat;
use crate::serving::{BitmapDurability, CacheMode, FilterArgs};

/// The properties of an export.
#[derive(Clone, Debug, Args)]
pub struct ExportArgs {
    /// Description shown to clients, if there is only one source.
    #[arg(short = 'D', long, value_name = "TEXT")]
    pub description: Option<String>,

    /// Refuse all writes.
    #[arg(short, long)]
    pub read_only: bool,

    /// Format of the images; detected unless given. A raw image that was detected refuses writes
    /// that would make it look like another format.
    #[arg(short, long)]
    pub format: Option<ImageFormat>,

    /// Export this internal snapshot of a qcow2 image, given by name or id, read-only unless
    /// --temporary is given.
    #[arg(long, value_name = "NAME")]
    pub snapshot: Option<String>,

    /// Keep all writes in a temporary file that is removed when the server ends; the image is only
    /// read. The file is in TMPDIR or, by default, in /var/tmp.
    #[arg(long, conflicts_with = "read_only")]
    pub temporary: bool,

    /// Serve images while other programs write to them. Clients may then read a mix of old and new
    /// data.
    #[arg(long, requires = "read_only")]
    pub force_share: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub trust: TrustArgs,

    /// The use of the page cache for images and block devices, and when writes are durable.
    #[arg(long, value_enum, default_value_t, value_name = "MODE")]
    pub cache: CacheMode,

    /// Memory for the mapping tables of each qcow2 image, backing files included [default: the
    /// tables of the complete disk, at most 32M]. With clusters of 64 KiB, 1M is enough for 8 GiB
    /// of disk; a read of another part first reads a piece of a table.
    #[arg(long, value_name = "SIZE")]
    pub metadata_cache: Option<ByteSize>,

    #[command(flatten)]
    #[allow(missing_docs, reason = "the help would take it for its own text")]
    pub filter: FilterArgs,

    /// Report the disk as rotational (NBD_FLAG_ROTATIONAL), for which clients may schedule requests
    /// differently. By default no medium is reported.
    #[arg(long)]
    pub rotational: bool,

    /// Offer the metadata context qemu:allocation-depth for images.
    #[arg(short = 'A', long)]
    pub allocation_depth: bool,

    /// The failure that the images' dirty bitmaps survive. Except for 'none', a file IMAGE.dirty is
    /// kept beside an image from its first change on; it is removed when the server ends cleanly.
    /// If that file cannot be created, the image is refused; without this option there is a warning
    /// [default: power].
    #[arg(long, value_enum, value_name = "WHAT")]
    pub bitmap_durability: Option<BitmapDurability>,

    /// Offer the metadata context qemu:dirty-bitmap:NAME for this bitmap, which every image must
    /// have, itself or in its backing files. May be repeated; 'all' for all bitmaps. Enabled
    /// bitmaps continue to record changes.
    #[arg(short = 'B', long, value_name = "NAME")]
    pub bitmap: Vec<String>,

    /// Hide the exports from clients that request a list.
    #[arg(long)]
    pub hidden: bool,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub access: AccessArgs,

    #[command(flatten)]
    #[allow(missing_docs)]
    pub upstream: UpstreamArgs,
}

/// An export to be served.
#[derive(Clone, Debug)]
pub(super) struct ExportSpec {
    pub(super) name: String,
    pub(super) source: OsString,
    pub(super) options: Arc<ExportArgs>,
}
