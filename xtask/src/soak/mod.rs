//! `cargo xtask soak`: all randomised tests, for a chosen time, on all cores.
//!
//! A *judge* runs one round from a seed and checks the outcome. The rounds of all judges are
//! interleaved so that each gets the same time. A failed round leaves a small file that explains
//! how to repeat it. SIGINT and SIGTERM end the run after the rounds in progress.

mod blocks;
mod ceph;
mod cluster;
mod commands;
mod flood;
mod from_tests;
mod full_disk;
mod interrupt;
mod judge;
mod judges;
mod keep;
mod kills;
mod liar;
mod lies;
mod programs;
mod random;
mod relays;
mod report;
mod served;
mod sessions;
mod stage;
mod streams;
mod takeovers;
#[cfg(test)]
mod tests;
mod wire;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::sync::Mutex;
use std::thread;
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use anyhow::{Context, Result, bail};
use clap::Args;

use crate::command::workspace_root;
use judge::{Judge, Round};
use programs::Programs;
use random::Random;
use report::{Outcome, Report};
use tempfile::TempDir;

/// A round that still runs this long after the last one began is considered hung.
const LONGEST_ROUND: Duration = Duration::from_secs(1800);

/// How many takeovers a round has unless another number is asked for.
const TAKEOVERS: u64 = 20;

/// The options of `cargo xtask soak`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Start new rounds for this many minutes; rounds in progress then still finish.
    #[arg(long, value_name = "N", default_value_t = 10)]
    minutes: u64,
    /// The seed from which all rounds derive their seeds: the rounds of each judge are the same for
    /// the same seed [default: from the clock]
    #[arg(long, value_name = "S")]
    seed: Option<u64>,
    /// Run only these judges, separated by commas.
    #[arg(long, value_name = "JUDGE,…", value_delimiter = ',')]
    only: Vec<String>,
    /// Repeat one round of one judge, or the round that a kept file describes.
    #[arg(long, value_name = "JUDGE:SEED|FILE", conflicts_with_all = ["only", "seed", "minutes"])]
    repeat: Option<String>,
    /// How many rounds run at the same time [default: one for each core]
    #[arg(long, value_name = "N")]
    jobs: Option<usize>,
    /// How many takeovers a round of the judges of takeovers has.
    #[arg(long, value_name = "N", default_value_t = TAKEOVERS)]
    takeovers: u64,
    /// Where failing rounds are kept [default: target/soak]
    #[arg(long, value_name = "DIRECTORY")]
    keep: Option<PathBuf>,
    /// Print the judges and what each does.
    #[arg(long)]
    list: bool,
    /// The profile with which programs and tests are built.
    #[arg(long, value_name = "PROFILE", default_value = "release")]
    profile: String,
}

impl Options {
    /// The options of continuous integration: two minutes for all judges together, with the
    /// programs and tests that are built already, and always from the same seed.
    pub(crate) fn continuous_integration() -> Self {
        Self {
            minutes: 2,
            seed: Some(1),
            only: Vec::new(),
            repeat: None,
            jobs: None,
            takeovers: TAKEOVERS,
            keep: None,
            list: false,
            profile: "dev".to_owned(),
        }
    }
}

/// Runs the judges and prints their figures every minute.
///
/// # Errors
///
/// A round failed, or something that the judges need cannot be built.
pub(crate) fn run(options: &Options) -> Result<()> {
    if options.list {
        for judge in judges::all() {
            let when = if judge.is_on_request() { " (only if it is named)" } else { "" };
            println!("{:12} {}{when}", judge.name(), judge.description());
        }
        return Ok(());
    }
    let repeated = options.repeat.as_deref().map(keep::Repeated::parse).transpose()?;
    let judges = chosen(options, repeated.as_ref())?;
    let keep = options.keep.clone().unwrap_or_else(|| workspace_root().join("target/soak"));
    std::fs::create_dir_all(&keep).with_context(|| format!("cannot create {}", keep.display()))?;
    let soak = Soak {
        programs: programs::build(&options.profile, &test_programs(&judges))?,
        report: Mutex::new(Report::new(&judges)),
        judges,
        keep,
        directory: rounds_directory()?,
        profile: options.profile.clone(),
        takeovers: repeated.as_ref().and_then(|round| round.takeovers).unwrap_or(options.takeovers),
    };
    interrupt::watch()?;
    match repeated {
        Some(round) => soak.repeat(round.seed),
        None => soak.run(options),
    }
    soak.finish()
}

fn rounds_directory() -> Result<TempDir> {
    let made = tempfile::Builder::new().prefix("soak-").tempdir();
    made.context("cannot make a directory for the rounds")
}

fn chosen(options: &Options, repeated: Option<&keep::Repeated>) -> Result<Vec<Box<dyn Judge>>> {
    let all = judges::all();
    let wanted: Vec<&str> = match repeated {
        Some(round) => vec![&round.judge],
        None => options.only.iter().map(String::as_str).collect(),
    };
    for name in &wanted {
        if !all.iter().any(|judge| judge.name() == *name) {
            let names: Vec<&str> = all.iter().map(|judge| judge.name()).collect();
            bail!("there is no judge '{name}'; the judges are {}", names.join(", "));
        }
    }
    let is_wanted = |judge: &dyn Judge| match wanted.is_empty() {
        true => !judge.is_on_request(),
        false => wanted.contains(&judge.name()),
    };
    Ok(all.into_iter().filter(|judge| is_wanted(&**judge)).collect())
}

/// The names of the test programs that these judges run.
fn test_programs(judges: &[Box<dyn Judge>]) -> BTreeSet<&'static str> {
    judges.iter().filter_map(|judge| judge.test_program()).collect()
}

/// One run of the judges.
struct Soak {
    programs: Programs,
    judges: Vec<Box<dyn Judge>>,
    report: Mutex<Report>,
    keep: PathBuf,
    /// Of the rounds in progress.
    directory: TempDir,
    profile: String,
    takeovers: u64,
}

impl Soak {
    fn run(&self, options: &Options) {
        let seed = options.seed.unwrap_or_else(|| {
            let now = SystemTime::now().duration_since(UNIX_EPOCH);
            now.map_or(1, |now| now.as_nanos() as u64)
        });
        println!("soak: seed {seed}, {} minutes", options.minutes);
        let jobs = options
            .jobs
            .unwrap_or_else(|| thread::available_parallelism().map_or(2, std::num::NonZero::get));
        let end = Instant::now() + Duration::from_secs(options.minutes.saturating_mul(60));
        thread::scope(|scope| {
            let workers: Vec<_> = (0..jobs.max(1))
                .map(|_| {
                    scope.spawn(|| {
                        while Instant::now() < end && !interrupt::is_ending() {
                            self.next_round(seed);
                        }
                    })
                })
                .collect();
            let mut next = Instant::now() + Duration::from_secs(60);
            while !workers.iter().all(thread::ScopedJoinHandle::is_finished) {
                thread::sleep(Duration::from_millis(100));
                if Instant::now() >= end + LONGEST_ROUND {
                    let stuck = self.report().running();
                    println!("soak: a round of each of these does not end: {stuck}");
                    // There is no other way to end the threads that wait for them.
                    std::fs::remove_dir_all(self.directory.path()).ok();
                    std::process::exit(1);
                }
                if Instant::now() >= next {
                    self.report().print_minute();
                    next += Duration::from_secs(60);
                }
            }
        });
    }

    fn report(&self) -> std::sync::MutexGuard<'_, Report> {
        self.report.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }

    /// Prints the figures.
    ///
    /// # Errors
    ///
    /// A round failed.
    fn finish(self) -> Result<()> {
        let report = self.report();
        report.print_summary();
        match report.violations() {
            0 => Ok(()),
            count => bail!("{count} rounds failed; they are kept in {}", self.keep.display()),
        }
    }

    /// Runs a round of the judge that had the least time so far.
    fn next_round(&self, seed: u64) {
        let (index, number) = self.report().begin_round();
        self.round(index, seed_of_round(seed, self.judges[index].name(), number));
    }

    fn repeat(&self, seed: u64) {
        self.report().begin_round();
        self.round(0, seed);
    }

    fn round(&self, index: usize, seed: u64) {
        let judge = &self.judges[index];
        let start = Instant::now();
        let outcome = tempfile::Builder::new()
            .prefix("r-")
            .tempdir_in(&self.directory)
            .map_err(anyhow::Error::from)
            .and_then(|directory| {
                let (programs, takeovers) = (&self.programs, self.takeovers);
                let round = Round { programs, directory: directory.path(), seed, takeovers };
                let outcome = judge.round(&round);
                if let Err(error) = &outcome
                    && !interrupt::is_immediate()
                {
                    let (judge, profile) = (judge.name(), &*self.profile);
                    let case = keep::Case { judge, seed, profile, takeovers };
                    let text = format!("{error:#}");
                    println!("soak: {} seed {seed}: {}", case.judge, keep::first_lines(&text, 5));
                    if let Err(error) = case.keep(&self.keep, directory.path(), &text) {
                        println!("soak: the round cannot be kept: {error:#}");
                    }
                }
                outcome
            });
        let outcome = match outcome {
            Ok(judged) => Outcome::Judged(judged),
            // Its programs were killed.
            Err(_) if interrupt::is_immediate() => Outcome::Abandoned,
            Err(_) => Outcome::Failed,
        };
        self.report().end_round(index, start.elapsed(), outcome);
    }
}

/// The seed of one round of a judge. It depends on nothing that takes time, so that the rounds of a
/// judge are the same for the same `seed`.
fn seed_of_round(seed: u64, judge: &str, number: u64) -> u64 {
    let mix = |seed, more| Random::new(seed ^ more).next();
    let of_judge = judge.bytes().fold(seed, |seed, byte| mix(seed, u64::from(byte)));
    mix(of_judge, number)
}
