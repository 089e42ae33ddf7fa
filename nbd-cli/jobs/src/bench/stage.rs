//! A stage of a run: all connections work until they are done or have to end.

use std::num::NonZero;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::thread::available_parallelism;
use std::time::{Duration, Instant};

use tokio::task::JoinSet;
use tokio::time::{MissedTickBehavior, interval_at, sleep_until};

use super::cpu::{self, Process};
use super::crew::{Done, Member, divide, drive};
use super::report::{BenchInterval, Stage};
use super::shared::Shared;
use super::source::Source;
use super::worker::Worker;
use crate::error::JobError;
use crate::observer::JobContext;

/// Receives the progress of the last second.
pub(super) type Live<'a> = &'a (dyn Fn(&BenchInterval) + Send + Sync);

/// The end of a stage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum StageEnd {
    /// When all connections are done.
    WhenDone,
    /// After this time of measurement, when all connections are done.
    After(Duration),
}

/// The duration of a stage.
#[derive(Clone, Copy, Debug)]
pub(super) struct Measured {
    pub(super) elapsed: Duration,
    pub(super) client_cpu: Duration,
    pub(super) server_cpu: Option<Duration>,
}

/// The start of the measurement.
struct Start {
    at: Instant,
    client_cpu: Duration,
    server_cpu: Option<Duration>,
}

impl Start {
    fn now(server: Option<Process>) -> Self {
        let server_cpu = server.and_then(|server| server.used());
        Self { at: Instant::now(), client_cpu: cpu::own(), server_cpu }
    }

    fn measure(&self, server: Option<Process>) -> Measured {
        let server_cpu = server.and_then(|server| server.used()).zip(self.server_cpu);
        Measured {
            elapsed: self.at.elapsed(),
            client_cpu: cpu::own().saturating_sub(self.client_cpu),
            server_cpu: server_cpu.map(|(after, before)| after.saturating_sub(before)),
        }
    }
}

/// Ends the threads when the future is dropped.
struct Ending<'a>(&'a Shared);

impl Drop for Ending<'_> {
    fn drop(&mut self) {
        self.0.is_over.store(true, Ordering::Relaxed);
    }
}

/// Has every worker make the requests of its source.
///
/// # Errors
///
/// The first error of a connection; the others have to end then.
pub(super) async fn run(
    workers: &mut Vec<Worker>,
    sources: Vec<Source>,
    (shared, server): (&Arc<Shared>, Option<Process>),
    (warm_up, end, stage): (Duration, StageEnd, Stage),
    (context, live): (&JobContext, Live<'_>),
) -> Result<Measured, JobError> {
    shared.is_over.store(false, Ordering::Relaxed);
    shared.counts.store(warm_up.is_zero(), Ordering::Relaxed);
    let ending = Ending(shared);
    let mut tasks = start_all(workers, sources);
    let began = Instant::now();
    let mut start = Start::now(server);
    let mut is_warm = warm_up.is_zero();
    let mut deadline = match (is_warm, end) {
        (false, _) => Some(began + warm_up),
        (true, StageEnd::After(time)) => Some(began + time),
        (true, StageEnd::WhenDone) => None,
    };
    let second = Duration::from_secs(1);
    let mut ticks = interval_at((began + second).into(), second);
    ticks.set_missed_tick_behavior(MissedTickBehavior::Delay);
    let (mut told, mut done, mut failure) = (began, Vec::new(), None);
    loop {
        let until = deadline.unwrap_or_else(|| Instant::now() + second * 3600);
        tokio::select! {
            ended = tasks.join_next() => match ended {
                None => break,
                Some(Ok(crew)) => for (index, worker, result) in crew {
                    done.push((index, worker));
                    failure = failure.or(result.err());
                },
                Some(Err(error)) => failure = Some(JobError::given_up("connection", &error)),
            },
            () = sleep_until(until.into()), if deadline.is_some() => {
                if is_warm {
                    shared.is_over.store(true, Ordering::Relaxed);
                    deadline = None;
                } else {
                    is_warm = true;
                    shared.counts.store(true, Ordering::Relaxed);
                    start = Start::now(server);
                    deadline = match end {
                        StageEnd::After(time) => Some(Instant::now() + time),
                        StageEnd::WhenDone => None,
                    };
                }
            },
            _ = ticks.tick() => {
                let stage = if is_warm { stage } else { Stage::WarmUp };
                live(&interval(shared, stage, began, told));
                told = Instant::now();
            },
            _ = context.cancellation.cancelled(), if !shared.is_cancelled() => {
                shared.is_cancelled.store(true, Ordering::Relaxed);
            },
        }
    }
    let measured = start.measure(server);
    drop(ending);
    done.sort_unstable_by_key(|(index, _)| *index);
    workers.extend(done.into_iter().map(|(_, worker)| worker));
    failure.map_or(Ok(measured), Err)
}

/// Starts the threads. A few connections have one each, which serves them best; more than two for
/// each core would wake each other for every few replies, and share one for each core.
fn start_all(workers: &mut Vec<Worker>, sources: Vec<Source>) -> JoinSet<Vec<Done>> {
    let members = workers.drain(..).zip(sources).enumerate();
    let members = members.map(|(index, (worker, source))| Member::new(index, worker, source));
    let cores = available_parallelism().map_or(1, NonZero::get);
    let threads = if members.len() <= cores * 2 { members.len() } else { cores };
    let mut tasks = JoinSet::new();
    for crew in divide(members.collect(), threads) {
        tasks.spawn_blocking(move || drive(crew));
    }
    tasks
}

/// The progress since `told`.
fn interval(shared: &Shared, stage: Stage, began: Instant, told: Instant) -> BenchInterval {
    let mut totals = shared.totals();
    let (requests, bytes) = totals.interval.totals();
    let latencies = totals.interval.latencies().map_or([Duration::ZERO; 3], |latencies| {
        [0.5, 0.99, 1.0].map(|quantile| Duration::from_nanos(latencies.value_at_quantile(quantile)))
    });
    totals.interval.clear();
    drop(totals);
    BenchInterval {
        elapsed: began.elapsed(),
        stage,
        length: told.elapsed(),
        requests,
        bytes,
        latencies,
    }
}
