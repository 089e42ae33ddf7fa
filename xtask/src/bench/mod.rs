//! `cargo xtask bench`: this server beside its peers, on the same file, in the same run.
//!
//! A *block* is one row measured on one server in one round. Blocks are interleaved (rounds, then
//! rows, then servers, whose order turns by one in every round), so that a machine whose speed
//! changes with time changes it for all. Every ratio comes from medians over the rounds of one run.
//!
//! Every block has a fresh server process: qemu-nbd locks the file it serves, so two servers
//! cannot share it, and the peak memory then belongs to one row.

mod bars;
mod data;
mod fio;
mod machine;
mod nbdcopy;
mod options;
mod process;
mod report;
mod rows;
mod sample;
mod servers;
mod statistics;
mod table;

use std::fs;

use anyhow::{Context, Result, bail};

pub(crate) use options::Options;

use crate::command::{cargo, output_of, run_step, workspace_root};
use data::DataFile;
use report::Report;
use rows::Row;
use sample::{Measured, Sample};
use servers::{Launcher, Server};

/// Runs the benchmark, prints its table and its bars, and writes the report where asked.
///
/// # Errors
///
/// The build fails, nothing is left to measure, or a file cannot be written. A single block that
/// fails is a note in the report.
pub(crate) fn run(options: &Options) -> Result<()> {
    let mut notes = Vec::new();
    let servers = available_servers(options, &mut notes)?;
    let rows: Vec<&Row> = rows::ROWS.iter().filter(|row| options.wants_row(row.name)).collect();
    if servers.is_empty() || rows.is_empty() {
        bail!("nothing to measure: {} servers and {} rows", servers.len(), rows.len());
    }
    let earlier = options.compare.as_deref().map(Report::read).transpose()?;
    let folder = make_folder(options)?;
    eprintln!("bench: filling {} bytes with random data", options.size);
    let file = DataFile::create(folder.path().join("disk.img"), options.size, options.page_cache)?;
    let launcher = Launcher::new(&file, folder.path(), target_folder()?)?;
    let servers = launchable(&launcher, servers, &mut notes);
    let measured = measure(options, &rows, &servers, &launcher, &mut notes);
    let report = Report::new(options, &rows, measured, notes);
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

/// The servers asked for whose programs are there; ours are built.
fn available_servers(options: &Options, notes: &mut Vec<String>) -> Result<Vec<Server>> {
    let wanted = Server::ALL.iter().copied().filter(|server| options.wants_server(server.name()));
    let (built, peers): (Vec<Server>, Vec<Server>) = wanted.partition(|server| server.is_built());
    if !built.is_empty() && !options.no_build {
        let mut build = cargo();
        build.args(["build", "--release", "-p", "nbd-cli", "-p", "benches"]);
        run_step("build", &mut build)?;
    }
    let mut servers = built;
    for server in peers {
        if crate::command::is_installed(server.program()) {
            servers.push(server);
        } else {
            note(notes, format!("{}: {} is not installed", server.name(), server.program()));
        }
    }
    Ok(servers)
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
    for round in 0..options.rounds {
        for row in rows {
            for turn in 0..servers.len() {
                let server = servers[(turn + round) % servers.len()];
                if !server.serves(row) {
                    continue;
                }
                let place = format!("round {}/{} {}", round + 1, options.rounds, row.name);
                match measure_block(options, row, server, launcher) {
                    Ok(sample) => {
                        eprintln!("{place} {:18} {}", server.name(), sample.describe(row));
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
    launcher: &Launcher<'_>,
) -> Result<Sample> {
    launcher.file().settle_and_warm()?;
    let running = launcher.start(server)?;
    let watch = process::Watch::start(running.root_process())?;
    let result = rows::run(row, running.uri(), options)?;
    let usage = watch.finish()?;
    Ok(Sample::new(result, usage))
}

fn note(notes: &mut Vec<String>, text: String) {
    eprintln!("bench: {text}");
    notes.push(text);
}

fn make_folder(options: &Options) -> Result<tempfile::TempDir> {
    let mut builder = tempfile::Builder::new();
    builder.prefix("nbd-bench-");
    match &options.folder {
        Some(folder) => {
            fs::create_dir_all(folder)
                .with_context(|| format!("cannot create {}", folder.display()))?;
            builder.tempdir_in(folder)
        }
        None => builder.tempdir(),
    }
    .context("cannot create a temporary folder")
}

/// Where cargo puts what it builds.
fn target_folder() -> Result<std::path::PathBuf> {
    let mut command = cargo();
    command.args(["metadata", "--no-deps", "--format-version", "1"]);
    let metadata: serde_json::Value =
        serde_json::from_str(&output_of(&mut command)?).context("cargo metadata is not JSON")?;
    let folder = metadata["target_directory"].as_str();
    Ok(folder.map_or_else(|| workspace_root().join("target"), Into::into))
}
