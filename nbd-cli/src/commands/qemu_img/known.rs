//! The options that each command has.

use nbd_jobs::getopt::{Known, Takes};

/// An option; one name in all commands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Opt {
    Help,
    Quiet,
    Progress,
    Format,
    SecondFormat,
    ImageOpts,
    TargetImageOpts,
    TargetFormat,
    Options,
    Object,
    Output,
    Share,
    Cache,
    SourceCache,
    Backing,
    BackingFormat,
    Unsafe,
    BackingChain,
    Repair,
    StartOffset,
    MaxLength,
    Strict,
    Size,
    Snapshot,
    Compress,
    NoCreate,
    TargetIsZero,
    SparseSize,
    Bitmaps,
    SkipBroken,
    Rate,
    Parallel,
    CopyRange,
    Salvage,
    OutOfOrder,
    Shrink,
    Preallocation,
    List,
    CreateSnapshot,
    ApplySnapshot,
    DeleteSnapshot,
    Add,
    Remove,
    Clear,
    Enable,
    Disable,
    Merge,
    Granularity,
    SourceFile,
    SourceFormat,
    Base,
    Drop,
    Force,
    Count,
    Depth,
    Offset,
    BufferSize,
    StepSize,
    Aio,
    Native,
    Write,
    Pattern,
    FlushInterval,
    NoDrain,
    /// An option that a command does not have.
    None,
}

const fn flag(short: u8, long: &'static str, means: Opt) -> Known<Opt> {
    known(short, long, Takes::Nothing, means)
}

const fn value(short: u8, long: &'static str, means: Opt) -> Known<Opt> {
    known(short, long, Takes::Value, means)
}

const fn known(short: u8, long: &'static str, takes: Takes, means: Opt) -> Known<Opt> {
    let short = if short == 0 { None } else { Some(short) };
    Known { short, long, takes, means }
}

pub(super) const CREATE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    value(b'o', "options", Opt::Options),
    value(b'b', "backing", Opt::Backing),
    value(b'F', "backing-format", Opt::BackingFormat),
    flag(b'u', "backing-unsafe", Opt::Unsafe),
    value(0, "object", Opt::Object),
];

pub(super) const INFO: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(b'b', "backing-chain", Opt::BackingChain),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
    value(0, "output", Opt::Output),
];

pub(super) const CHECK: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'T', "cache", Opt::SourceCache),
    flag(b'U', "force-share", Opt::Share),
    value(0, "output", Opt::Output),
    value(b'r', "repair", Opt::Repair),
    value(0, "object", Opt::Object),
];

pub(super) const MAP: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b's', "start-offset", Opt::StartOffset),
    value(b'l', "max-length", Opt::MaxLength),
    value(0, "output", Opt::Output),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const COMPARE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "a-format", Opt::Format),
    value(b'F', "b-format", Opt::SecondFormat),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(b's', "strict", Opt::Strict),
    value(b'T', "cache", Opt::SourceCache),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const MEASURE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'O', "target-format", Opt::TargetFormat),
    value(b's', "size", Opt::Size),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'l', "snapshot", Opt::Snapshot),
    value(b'o', "options", Opt::Options),
    value(0, "output", Opt::Output),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const CONVERT: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "source-format", Opt::Format),
    flag(0, "source-image-opts", Opt::ImageOpts),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'l', "source-snapshot", Opt::Snapshot),
    value(0, "snapshot", Opt::Snapshot),
    value(b'T', "source-cache", Opt::SourceCache),
    value(b'O', "target-format", Opt::TargetFormat),
    flag(0, "target-image-opts", Opt::TargetImageOpts),
    value(b'o', "target-options", Opt::Options),
    flag(b'c', "compress", Opt::Compress),
    value(b't', "target-cache", Opt::Cache),
    value(b'B', "backing", Opt::Backing),
    value(b'F', "backing-format", Opt::BackingFormat),
    flag(b'n', "no-create", Opt::NoCreate),
    flag(0, "target-is-zero", Opt::TargetIsZero),
    value(b'S', "sparse-size", Opt::SparseSize),
    flag(0, "bitmaps", Opt::Bitmaps),
    flag(0, "skip-broken-bitmaps", Opt::SkipBroken),
    flag(b'U', "force-share", Opt::Share),
    value(b'r', "rate", Opt::Rate),
    value(b'm', "parallel", Opt::Parallel),
    flag(b'C', "copy-range-offloading", Opt::CopyRange),
    flag(0, "salvage", Opt::Salvage),
    flag(b'W', "oob-writes", Opt::OutOfOrder),
    value(0, "object", Opt::Object),
];

pub(super) const RESIZE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(0, "shrink", Opt::Shrink),
    value(0, "preallocation", Opt::Preallocation),
    value(0, "object", Opt::Object),
];

pub(super) const SNAPSHOT: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(b'U', "force-share", Opt::Share),
    flag(b'l', "list", Opt::List),
    value(b'c', "create", Opt::CreateSnapshot),
    value(b'a', "apply", Opt::ApplySnapshot),
    value(b'd', "delete", Opt::DeleteSnapshot),
    value(0, "object", Opt::Object),
];

pub(super) const AMEND: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'o', "options", Opt::Options),
    value(b't', "cache", Opt::Cache),
    flag(0, "force", Opt::Force),
    value(0, "object", Opt::Object),
];

pub(super) const BITMAP: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    flag(0, "add", Opt::Add),
    value(b'g', "granularity", Opt::Granularity),
    flag(0, "remove", Opt::Remove),
    flag(0, "clear", Opt::Clear),
    flag(0, "enable", Opt::Enable),
    flag(0, "disable", Opt::Disable),
    value(0, "merge", Opt::Merge),
    value(b'b', "source-file", Opt::SourceFile),
    value(b'F', "source-format", Opt::SourceFormat),
    value(0, "object", Opt::Object),
];

pub(super) const REBASE: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b't', "cache", Opt::Cache),
    value(b'b', "backing", Opt::Backing),
    value(b'F', "backing-format", Opt::BackingFormat),
    value(b'T', "backing-cache", Opt::SourceCache),
    flag(b'u', "backing-unsafe", Opt::Unsafe),
    flag(b'c', "compress", Opt::Compress),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const COMMIT: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    flag(b'p', "progress", Opt::Progress),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b't', "cache", Opt::Cache),
    flag(b'd', "drop", Opt::Drop),
    value(b'b', "base", Opt::Base),
    value(b'r', "rate", Opt::Rate),
    value(0, "object", Opt::Object),
];

pub(super) const DD: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b'O', "output-format", Opt::TargetFormat),
    flag(b'U', "force-share", Opt::Share),
    value(0, "object", Opt::Object),
];

pub(super) const BENCH: &[Known<Opt>] = &[
    flag(b'h', "help", Opt::Help),
    flag(b'q', "quiet", Opt::Quiet),
    value(b'f', "format", Opt::Format),
    flag(0, "image-opts", Opt::ImageOpts),
    value(b't', "cache", Opt::Cache),
    value(b'c', "count", Opt::Count),
    value(b's', "buffer-size", Opt::BufferSize),
    value(b'd', "depth", Opt::Depth),
    value(b'o', "offset", Opt::Offset),
    value(b'S', "step-size", Opt::StepSize),
    value(b'i', "aio", Opt::Aio),
    flag(b'n', "native", Opt::Native),
    flag(b'w', "write", Opt::Write),
    value(0, "pattern", Opt::Pattern),
    value(0, "flush-interval", Opt::FlushInterval),
    flag(0, "no-drain", Opt::NoDrain),
    flag(b'U', "force-share", Opt::Share),
];
