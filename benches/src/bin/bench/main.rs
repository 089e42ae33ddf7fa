//! `cargo xtask bench`: this server beside its peers, on the same file, in the same run.
//!
//! A *block* is one row measured on one server in one round. Blocks are interleaved (rounds, then
//! rows, then servers, whose order rotates by one in every round), so that a machine whose speed
//! varies over time affects all servers alike. Every ratio comes from medians over the rounds of
//! one run.
//!
//! Rows are in groups, from which `--only` selects; see [`groups`].
//!
//! Every block has a fresh server process. qemu-nbd locks the file that it serves, so two servers
//! cannot share it; and the peak memory then belongs to one row.
#![expect(clippy::print_stdout, reason = "the table goes to standard output")]

mod bars;
mod bitmaps;
mod cache_state;
mod checkpoints;
// Starts programs and calls cargo in the way of the other developer commands.
#[path = "../../../../xtask/src/command.rs"]
mod command;
mod contest;
mod copies;
mod data;
mod direct;
mod encrypted;
mod ending;
mod files_disk;
mod fio;
mod fleecing;
mod group;
mod groups;
mod huge_image;
mod image_formats;
mod image_tools;
mod interrupt;
mod lab;
mod large;
mod load;
mod machine;
mod nbdcopy;
mod notes;
mod object_store;
mod objects;
mod options;
mod page_caches;
mod process;
mod qcow2;
mod report;
mod rows;
mod running;
mod sample;
// The tests start it in the same way.
#[path = "../../../../nbd-cli/tests/cli/support/seaweedfs.rs"]
mod seaweedfs;
mod servers;
mod statistics;
mod sys;
mod table;
mod tls;
mod workload;

use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::{Context, Result, bail};
use clap::Parser;

use command::{cargo, output_of, run_step, workspace_root};
use data::DataFile;
use notes::note;
use options::Options;
use page_caches::{Files, Kept, PageCaches};
use report::Report;
use rows::Row;
use sample::{Measured, Sample};
use servers::{Launcher, Server};

/// Measure this server beside qemu-nbd, nbdkit and nbd-server on the same file.
#[derive(Debug, Parser)]
#[command(name = "cargo xtask bench", bin_name = "cargo xtask bench")]
struct Arguments {
    #[command(flatten)]
    options: Options,
}

fn main() -> ExitCode {
    let result = measure_and_report(&Arguments::parse().options);
    ending::stop_if_ending();
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("bench: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Runs the benchmark, prints its table and its bars, and writes the report where asked.
///
/// # Errors
///
/// The build fails, nothing is left to measure, or a file cannot be written. A single block that
/// fails is a note in the report.
fn measure_and_report(options: &Options) -> Result<()> {
    groups::check_names(options)?;
    let mut notes = Vec::new();
    let earlier = options.compare.as_deref().map(Report::read).transpose()?;
    if !options.no_build {
        let mut build = cargo();
        build.args(["build", "--profile", "dist", "-p", "nbd-cli", "-p", "benches"]);
        run_step("build", &mut build)?;
    }
    let directory = make_directory(options)?;
    interrupt::clean_up_on_signals(directory.path())?;
    let target_directory = target_directory()?;
    let (rows, measured) = match options.wants_group(groups::RAW) {
        true => run_raw(options, directory.path(), &target_directory, &mut notes)?,
        false => (Vec::new(), Vec::new()),
    };
    let mut groups = Vec::new();
    for group in groups::GROUPS {
        groups.extend(group::run(group, options, directory.path(), &target_directory, &mut notes)?);
    }
    if measured.is_empty() && groups.is_empty() {
        bail!("nothing was measured: {}", notes.join("; "));
    }
    let report = Report::new(options, &rows, measured, groups, notes);
    println!("{}", table::render(&report));
    if let Some(earlier) = earlier {
        println!("{}", table::render_comparison(&report, &earlier));
    }
    if let Some(path) = &options.json {
        report.write(path)?;
        eprintln!("bench: wrote {}", path.display());
    }
    Ok(())
}

/// Measures the rows that serve a raw file, and removes the file.
fn run_raw(
    options: &Options,
    directory: &Path,
    target_directory: &Path,
    notes: &mut Vec<String>,
) -> Result<(Vec<&'static Row>, Vec<Measured>)> {
    let servers = available_servers(options, notes);
    let rows: Vec<&Row> = rows::ROWS.iter().filter(|row| options.wants_row(row.name)).collect();
    if servers.is_empty() || rows.is_empty() {
        return Ok((rows, Vec::new()));
    }
    eprintln!("bench: filling {} bytes with random data", options.size);
    let file = DataFile::create(directory.join("disk.img"), options.size, options.page_cache)?;
    let launcher = Launcher::new(&file, directory, target_directory.to_owned())?;
    let servers = launchable(&launcher, servers, notes);
    let measured = measure(options, &rows, &servers, &launcher, notes);
    // The groups that follow need the page cache.
    fs::remove_file(file.path()).with_context(|| file.path().display().to_string())?;
    Ok((rows, measured))
}

/// Returns the selected servers whose programs are installed.
fn available_servers(options: &Options, notes: &mut Vec<String>) -> Vec<Server> {
    let mut servers = Vec::new();
    for &server in Server::ALL.iter().filter(|server| options.wants_server(server.name())) {
        if server.is_built() || command::is_installed(server.program()) {
            servers.push(server);
        } else {
            note(notes, format!("{}: {} is not installed", server.name(), server.program()));
        }
    }
    servers
}

/// The servers that start and accept a connection: not every kernel has io_uring, not every file
/// system O_DIRECT.
fn launchable(
    launcher: &Launcher<'_>,
    servers: Vec<Server>,
    notes: &mut Vec<String>,
) -> Vec<Server> {
    let mut launchable = Vec::new();
    for server in servers {
        match launcher.start(server) {
            Ok(_) => launchable.push(server),
            Err(error) => note(notes, format!("{} does not start: {error:#}", server.name())),
        }
    }
    launchable
}

fn measure(
    options: &Options,
    rows: &[&Row],
    servers: &[Server],
    launcher: &Launcher<'_>,
    notes: &mut Vec<String>,
) -> Vec<Measured> {
    let mut measured = Vec::new();
    let (files, mut page_caches) = (Files::default(), PageCaches::default());
    for round in 0..options.rounds {
        for row in rows {
            for turn in 0..servers.len() {
                let server = servers[(turn + round) % servers.len()];
                if !server.serves(row) {
                    continue;
                }
                let place = format!("round {}/{} {}", round + 1, options.rounds, row.name);
                let sample = measure_block(options, row, server, (launcher, &files))
                    .and_then(|sample| page_caches.check(row.name, &files, sample));
                match sample {
                    Ok(sample) => {
                        let text = sample.describe(row.unit().suffix(), row.work_name());
                        eprintln!("{place} {:18} {text}", server.name());
                        measured.push(Measured { row: row.name, server, sample });
                    }
                    Err(error) => note(notes, format!("{place} {}: {error:#}", server.name())),
                }
            }
        }
    }
    measured
}

fn measure_block(
    options: &Options,
    row: &Row,
    server: Server,
    (launcher, files): (&Launcher<'_>, &Files),
) -> Result<Sample> {
    launcher.file().settle_and_warm()?;
    files.forget();
    let is_dropped = server.bypasses_page_cache() && row.writes();
    let kept = if is_dropped { Kept::No } else { Kept::Yes };
    files.expect_whole(launcher.file().path(), kept)?;
    let running = launcher.start(server)?;
    let watch = process::Watch::start(running.root_process())?;
    let result = rows::run(row, running.uri(), options, launcher.nbd_cli())?;
    let usage = watch.finish()?;
    Ok(Sample::new(result, usage))
}

fn make_directory(options: &Options) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("nbd-bench-");
    match &options.directory {
        Some(directory) => {
            fs::create_dir_all(directory)
                .with_context(|| format!("cannot create {}", directory.display()))?;
            builder.tempdir_in(directory)
        }
        None => builder.tempdir(),
    }
    .context("cannot create a temporary directory")
}

/// Returns cargo's target directory.
fn target_directory() -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value =
        serde_json::from_str(&output_of(&mut command)?).context("cargo metadata is not JSON")?;
    let directory = metadata["target_directory"].as_str();
    Ok(directory.map_or_else(|| workspace_root().join("target"), Into::into))
}
