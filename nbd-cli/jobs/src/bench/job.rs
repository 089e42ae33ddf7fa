//! A run from its first connection to its report.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use nbd_client::{Connector, NegotiatedStream};
use nbd_proto::NbdUri;
use nbd_proto::transmission::Durability;
use nbd_proto::wire::TransmissionFlags;

use super::channel::Channel;
use super::cpu::Process;
use super::ledger::{Generations, Ledger};
use super::options::{BenchEnd, BenchOptions, Pattern, RequestKind, Verify};
use super::plan::{Plan, check, check_export};
use super::random::{Random, mix};
use super::report::{
    BenchInterval, BenchReport, CpuReport, KindReport, Stage, VerifyReport, per_second,
};
use super::shared::Shared;
use super::source::Source;
use super::stage::{Live, StageEnd, run};
use super::state::State;
use super::targets::Targets;
use super::worker::{Check, Worker};
use crate::connect::explain_unknown_export;
use crate::error::JobError;
use crate::observer::JobContext;

/// Generates the load of `options` on a server and measures it. `live` receives the progress once a
/// second.
///
/// A cancelled run is not an error; its report says so.
///
/// # Errors
///
/// If the options contradict each other or do not fit the export, or if the server cannot be
/// reached, refuses a request or is lost. A block with other contents than expected is not an
/// error; the report has it.
///
/// # Cancel safety
///
/// Dropping the future ends the load soon; the drop does not wait for the end.
pub async fn bench(
    uri: &NbdUri,
    options: &BenchOptions,
    context: &JobContext,
    live: impl Fn(&BenchInterval) + Send + Sync,
) -> Result<BenchReport, JobError> {
    check(options)?;
    let state_path = match &options.verify {
        Verify::Written { state } | Verify::Only { state } => state.as_deref(),
        Verify::Off => None,
    };
    let state = match state_path {
        Some(path) => State::load(path)?,
        None => None,
    };
    if let (Verify::Only { state: Some(path) }, None) = (&options.verify, &state) {
        return Err(JobError::invalid(format!(
            "there is no state of a former run in '{}'",
            crate::text::printable(&path.to_string_lossy())
        )));
    }
    let mut run = Run::connect(uri, options, context, state).await?;
    let kept = state_path.filter(|_| matches!(options.verify, Verify::Written { .. }));
    kept.map_or(Ok(()), State::begin)?;
    let result = run.execute(context, &live).await;
    let saved = kept.map_or(Ok(()), |path| run.keep(path));
    let report = result?;
    saved?;
    Ok(report)
}

/// A run with its connections.
struct Run<'a> {
    uri: &'a NbdUri,
    options: &'a BenchOptions,
    plan: Plan,
    seed: u64,
    shared: Arc<Shared>,
    workers: Vec<Worker>,
    /// The known blocks; while workers run, their ledgers have them.
    blocks: Vec<Generations>,
    server: Option<Process>,
    can_flush: bool,
}

impl<'a> Run<'a> {
    async fn connect(
        uri: &'a NbdUri,
        options: &'a BenchOptions,
        context: &JobContext,
        state: Option<State>,
    ) -> Result<Self, JobError> {
        let connector = options.connect.connector(uri).reply_mode(options.reply_mode);
        let streams = context.cancellation.unless_cancelled(open(&connector, uri, options)).await?;
        let first = streams.first().ok_or_else(|| JobError::invalid("no connection"))?;
        check_export(options, &first.info(), &uri.to_string())?;
        let plan = Plan::new(options, first.negotiated(), state.as_ref())?;
        let pid = options.server_pid.or_else(|| {
            // The first process of the system has the sockets of its services.
            first.server_process().filter(|pid| *pid > 1 && *pid != std::process::id())
        });
        let server = pid.and_then(Process::find);
        if server.is_none() && options.server_pid.is_some() {
            return Err(JobError::invalid(format!(
                "there is no process {}; give another --server-pid",
                pid.unwrap_or(0)
            )));
        }
        let can_flush = first.info().flags.contains(TransmissionFlags::SEND_FLUSH);
        let seed = seed(options, state.as_ref())?;
        let mut pool =
            vec![0; if options.writes() { plan.largest as usize + (64 << 10) } else { 0 }];
        Random::new(seed, u64::MAX).fill(&mut pool);
        let (reconnect, timeout) = (options.connect.reconnect, options.connect.timeout);
        let shared = Arc::new(Shared::new(uri.clone(), reconnect, timeout, pool.into()));
        let workers = streams.into_iter().map(|stream| worker(stream, &shared, options));
        let workers = workers.collect::<Result<Vec<_>, _>>()?;
        let count = plan.range.length / u64::from(plan.block_len.max(1));
        let mut blocks = state.map_or_else(Vec::new, |state| state.blocks);
        if matches!(options.verify, Verify::Written { .. }) {
            blocks.resize(count as usize, Generations::default());
        }
        Ok(Self { uri, options, plan, seed, shared, workers, blocks, server, can_flush })
    }

    async fn execute(
        &mut self,
        context: &JobContext,
        live: Live<'_>,
    ) -> Result<BenchReport, JobError> {
        self.hand_out_blocks();
        let sources = match &self.options.verify {
            Verify::Only { .. } => self.read_back(),
            _ => self.loads(),
        };
        let warm_up = match &self.options.verify {
            Verify::Only { .. } => Duration::ZERO,
            _ => self.options.warm_up,
        };
        let end = match (&self.options.verify, self.options.end) {
            (Verify::Only { .. }, _) | (_, BenchEnd::Requests(_)) => StageEnd::WhenDone,
            (_, BenchEnd::After(time)) => StageEnd::After(time),
        };
        let measured = run(
            &mut self.workers,
            sources,
            (&self.shared, self.server),
            (warm_up, end, Stage::Load),
            (context, live),
        )
        .await?;
        let mut report = self.report(&measured);
        if matches!(self.options.verify, Verify::Written { .. }) && !self.shared.is_cancelled() {
            self.verify_written(context, live).await?;
        }
        report.interrupted = self.shared.is_cancelled();
        report.reconnects = self.shared.reconnects.load(Ordering::Relaxed);
        if self.options.verify != Verify::Off {
            let block_size = self.plan.block_len;
            report.verify = Some(VerifyReport { block_size, ..self.shared.verified().clone() });
        }
        Ok(report)
    }

    /// Flushes, and reads all written blocks, each on another connection than the one that wrote
    /// it.
    async fn verify_written(
        &mut self,
        context: &JobContext,
        live: Live<'_>,
    ) -> Result<(), JobError> {
        let what = |stage| (Duration::ZERO, StageEnd::WhenDone, stage);
        if self.can_flush {
            let flushes = self.workers.iter().map(|_| Source::Flush { is_made: false }).collect();
            let common = (&self.shared, None);
            run(&mut self.workers, flushes, common, what(Stage::Verify), (context, live)).await?;
        }
        let mut ledgers: Vec<_> = self
            .workers
            .iter_mut()
            .map(|worker| std::mem::replace(&mut worker.check, Check::Discard))
            .collect();
        ledgers.rotate_left(1);
        for (worker, ledger) in self.workers.iter_mut().zip(ledgers) {
            worker.check = ledger;
        }
        let sources = self.read_back();
        let common = (&self.shared, None);
        run(&mut self.workers, sources, common, what(Stage::Verify), (context, live))
            .await
            .map(drop)
    }

    /// The requests of each connection.
    fn loads(&self) -> Vec<Source> {
        let options = self.options;
        let connections = self.plan.connections;
        let has_own_part =
            options.verify != Verify::Off || matches!(options.pattern, Pattern::Sequential);
        (0..connections)
            .map(|index| {
                let section = if has_own_part { self.plan.section(index) } else { self.plan.range };
                let random = Random::new(self.seed, index);
                let (workload, pattern) = (options.workload, options.pattern);
                let targets =
                    Targets::new(section, workload, pattern, &options.block_sizes, random);
                let left = match options.end {
                    BenchEnd::After(_) => None,
                    BenchEnd::Requests(all) => {
                        Some(all / connections + u64::from(index < all % connections))
                    }
                };
                let rate = options.rate.map(|rate| rate.get() as f64 / connections as f64);
                Source::load(targets, left, rate, options.flush_every.map(std::num::NonZero::get))
            })
            .collect()
    }

    /// Reads of the blocks in the ledgers of the workers, or of their parts of the disk.
    fn read_back(&self) -> Vec<Source> {
        let of = |(worker, index): (&Worker, u64)| {
            let ranges = match &worker.check {
                Check::Ledger(ledger) => ledger.written(self.plan.largest),
                _ => {
                    let section = self.plan.section(index);
                    let step = u64::from(self.plan.largest.max(1));
                    let ends = section.offset + section.length;
                    (section.offset..ends)
                        .step_by(step as usize)
                        .map(|offset| (offset, (ends - offset).min(step) as u32))
                        .collect()
                }
            };
            Source::Ranges(ranges.into_iter())
        };
        self.workers.iter().zip(0..).map(of).collect()
    }

    /// Gives each connection the ledger of its blocks.
    fn hand_out_blocks(&mut self) {
        let (plan, seed) = (self.plan, self.seed);
        for (worker, index) in self.workers.iter_mut().zip(0..) {
            worker.check = match (&self.options.verify, self.blocks.get(plan.blocks(index))) {
                (Verify::Off, _) => Check::Discard,
                (Verify::Only { state: None }, _) | (_, None) => {
                    Check::Alone { block_len: plan.block_len, seed }
                }
                (_, Some(blocks)) => {
                    let section = plan.section(index);
                    Check::Ledger(Ledger::new(section, plan.block_len, seed, blocks.to_vec()))
                }
            };
        }
    }

    /// Records the written blocks, if all connections know theirs.
    fn keep(&mut self, path: &std::path::Path) -> Result<(), JobError> {
        if (self.workers.len() as u64) < self.plan.connections {
            return Ok(());
        }
        for worker in &mut self.workers {
            let Check::Ledger(ledger) = std::mem::replace(&mut worker.check, Check::Discard) else {
                continue;
            };
            // The one of another connection's part, if reading back has failed.
            let offset = ledger.section().offset - self.plan.range.offset;
            let first = (offset / u64::from(self.plan.block_len.max(1))) as usize;
            let written = ledger.into_blocks(self.can_flush);
            if let Some(blocks) = self.blocks.get_mut(first..first + written.len()) {
                blocks.copy_from_slice(&written);
            }
        }
        let state = State {
            seed: self.seed,
            block_len: self.plan.block_len,
            start: self.plan.range.offset,
            blocks: std::mem::take(&mut self.blocks),
        };
        state.save(path)
    }

    fn report(&self, measured: &super::stage::Measured) -> BenchReport {
        let totals = self.shared.totals();
        let (requests, bytes) = totals.all.totals();
        let seconds = measured.elapsed.as_secs_f64();
        let kind = |kind| totals.all.kind(kind).map(|kind| KindReport::new(kind, seconds));
        let pid = std::process::id();
        BenchReport {
            uri: self.uri.to_string(),
            connections: self.workers.len(),
            depth: self.options.depth.get(),
            seed: self.seed,
            interrupted: false,
            seconds,
            requests,
            requests_per_second: per_second(requests, seconds),
            bytes,
            bytes_per_second: per_second(bytes, seconds),
            read: kind(RequestKind::Read),
            write: kind(RequestKind::Write),
            zeroes: kind(RequestKind::Zeroes),
            trim: kind(RequestKind::Trim),
            flush: kind(RequestKind::Flush),
            client_cpu: CpuReport::new(pid, measured.client_cpu, requests),
            server_cpu: measured
                .server_cpu
                .zip(self.server)
                .map(|(used, server)| CpuReport::new(server.pid, used, requests)),
            reconnects: 0,
            verify: None,
        }
    }
}

/// Opens all connections.
async fn open(
    connector: &Connector,
    uri: &NbdUri,
    options: &BenchOptions,
) -> Result<Vec<NegotiatedStream>, JobError> {
    let first = match connector.connect_stream().await {
        Ok(first) => first,
        Err(error) => {
            return Err(JobError::source(explain_unknown_export(connector, uri, &error).await));
        }
    };
    let reconnector = first.reconnector();
    let mut streams = vec![first];
    while streams.len() < options.connect.connections.get() {
        let further = reconnector.connect().await.map_err(|error| {
            let opened = streams.len();
            JobError::source(format!("only {opened} connection(s) could be made: {error}"))
        })?;
        streams.push(further);
    }
    Ok(streams)
}

fn worker(
    stream: NegotiatedStream,
    shared: &Arc<Shared>,
    options: &BenchOptions,
) -> Result<Worker, JobError> {
    let negotiated = stream.negotiated().clone();
    let reconnector = stream.reconnector();
    let channel = Channel::new(stream, &tokio::runtime::Handle::current()).map_err(|error| {
        JobError::source(format!("cannot use the connection to {}: {error}", shared.uri))
    })?;
    let depth = options.depth.get() as usize;
    let durability = if options.fua { Durability::Fua } else { Durability::Cached };
    Ok(Worker::new(Arc::clone(shared), (channel, &negotiated), reconnector, depth, durability))
}

/// The requested seed, that of the state, or a new one.
fn seed(options: &BenchOptions, state: Option<&State>) -> Result<u64, JobError> {
    match (options.seed, state) {
        (Some(seed), Some(state)) if seed != state.seed => Err(JobError::invalid(format!(
            "the state has the seed {}; leave out --seed or name another --verify-state",
            state.seed
        ))),
        (_, Some(state)) => Ok(state.seed),
        (Some(seed), None) => Ok(seed),
        (None, None) => {
            let since = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH);
            let time = since.unwrap_or_default().as_nanos() as u64;
            // Few digits are easier to give again.
            Ok(mix(time ^ u64::from(std::process::id()).rotate_left(40)) >> 32)
        }
    }
}
