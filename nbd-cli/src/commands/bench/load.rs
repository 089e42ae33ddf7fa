//! The options of the job from the arguments.

use std::time::Duration;

use nbd_client::{LocalFiles, ReplyMode};
use nbd_jobs::ConnectOptions;
use nbd_jobs::bench::{BenchEnd, BenchOptions, BlockSize, Pattern, Verify, Workload};

use super::arguments::{BenchArgs, PatternChoice, ReplyChoice, WorkloadChoice};
use super::sizes::WeightedSize;
use crate::error::CommandError;

/// Time limit for restoring a lost connection when data is verified.
const PATIENCE: Duration = Duration::from_secs(30);

/// Returns the options of the job; overwriting a disk needs an option.
pub(super) fn options(args: &BenchArgs) -> Result<BenchOptions, CommandError> {
    args.tls.check([&args.uri])?;
    let mut options = BenchOptions::default();
    options.workload = workload(args)?;
    options.verify = verify(args)?;
    options.pattern = match (args.zipf, args.pattern) {
        (Some(theta), _) => Pattern::Zipfian { theta },
        (None, PatternChoice::Random) => Pattern::Random,
        (None, PatternChoice::Sequential) => Pattern::Sequential,
    };
    options.block_sizes = block_sizes(args)?;
    options.depth = args.depth;
    options.rate = args.rate;
    options.end = match (args.requests, args.duration) {
        (Some(requests), _) => BenchEnd::Requests(requests.get()),
        (None, Some(duration)) => BenchEnd::After(duration),
        (None, None) => options.end,
    };
    options.warm_up = args.warm_up;
    if let Some(range) = args.range {
        options.range = (range.offset.bytes(), Some(range.length.bytes()));
    }
    options.seed = args.seed;
    options.fua = args.fua;
    options.flush_every = args.flush_every;
    options.server_pid = args.server_pid;
    options.reply_mode = match args.replies {
        ReplyChoice::Simple => ReplyMode::Simple,
        ReplyChoice::Structured => ReplyMode::Structured,
        ReplyChoice::Extended => ReplyMode::Extended,
    };
    options.connect = connect(args, &options.verify);
    if options.writes() && !args.destroy_data {
        return Err(CommandError::new(format!(
            "this workload overwrites the data of {}; add --destroy-data if nothing on it is needed",
            args.uri
        )));
    }
    if !options.writes() && (args.fua || args.flush_every.is_some()) {
        return Err(CommandError::new(
            "--fua and --flush-every are about writes; choose another --workload",
        ));
    }
    Ok(options)
}

fn workload(args: &BenchArgs) -> Result<Workload, CommandError> {
    if args.read_percent.is_some() && args.workload != WorkloadChoice::Mixed {
        return Err(CommandError::new("--read-percent is for --workload mixed; add that"));
    }
    Ok(match args.workload {
        WorkloadChoice::Read => Workload::Read,
        WorkloadChoice::Write => Workload::Write,
        WorkloadChoice::Mixed => Workload::Mixed { read_percent: args.read_percent.unwrap_or(70) },
        WorkloadChoice::Zeroes => Workload::Zeroes,
        WorkloadChoice::Trim => Workload::Trim,
    })
}

fn verify(args: &BenchArgs) -> Result<Verify, CommandError> {
    let state = args.verify_state.clone();
    match (args.verify, args.verify_only, &state) {
        (true, _, _) => Ok(Verify::Written { state }),
        (_, true, _) => Ok(Verify::Only { state }),
        (_, _, None) => Ok(Verify::Off),
        (_, _, Some(_)) => Err(CommandError::new(
            "--verify-state is for --verify or --verify-only; add one of them",
        )),
    }
}

fn block_sizes(args: &BenchArgs) -> Result<Vec<BlockSize>, CommandError> {
    let size = |it: &WeightedSize| {
        let length = u32::try_from(it.size.bytes()).map_err(|_| {
            CommandError::new(format!(
                "--block-size {} is invalid; give multiples of 512 up to 32M",
                it.size
            ))
        })?;
        Ok(BlockSize { length, weight: it.weight })
    };
    args.block_size.iter().map(size).collect()
}

fn connect(args: &BenchArgs, verify: &Verify) -> ConnectOptions {
    let mut connect = ConnectOptions::default();
    connect.connections = args.connections;
    connect.timeout = args.timeout;
    let usual = if *verify == Verify::Off { Duration::ZERO } else { PATIENCE };
    connect.reconnect = args.reconnect.unwrap_or(usual);
    connect.tls = args.tls.settings();
    connect.local_files = LocalFiles::Allowed;
    connect
}
