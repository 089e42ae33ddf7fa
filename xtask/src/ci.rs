//! `cargo xtask ci`: every check, in order, on any machine that has Rust.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result};

use crate::command::{cargo, run_step, workspace_root};
use crate::{compatibility, dist, peers, soak, tidy};

/// Runs every check and prints its duration.
///
/// The cheap checks come first. The tests come late and write to the terminal in cargo's format.
/// Two minutes of the judges of `cargo xtask soak` follow.
///
/// # Errors
///
/// The first check that fails.
pub(crate) fn run() -> Result<()> {
    let start = Instant::now();
    let mut timings = Vec::new();
    timed(&mut timings, "peers", peers::ensure_installed)?;
    timed(&mut timings, "format", || {
        run_step("format", cargo().args(["fmt", "--all", "--check"])).map(drop)
    })?;
    timed(&mut timings, "tidy", tidy::run)?;
    for (name, mut command) in compile_steps() {
        timed(&mut timings, name, || run_step(name, &mut command).map(drop))?;
    }
    timed(&mut timings, "features", compatibility::check_features)?;
    timed(&mut timings, "oldest compiler", compatibility::check_oldest_compiler)?;
    timed(&mut timings, "dependencies", compatibility::check_dependencies)?;
    timed(&mut timings, "fuzz targets", check_fuzz_targets)?;
    timed(&mut timings, "test", || {
        run_step("test", cargo().args(["test", "--workspace", "--locked"])).map(drop)?;
        // Once more without io_uring, which some systems forbid.
        let mut threads = cargo();
        threads.args(["test", "-p", "nbd-server", "--locked", "--test", "server"]);
        run_step("test without io_uring", threads.env("NBD_AIO", "threads")).map(drop)
    })?;
    timed(&mut timings, "package", dist::run_continuous_integration)?;
    timed(&mut timings, "soak", || soak::run(&soak::Options::continuous_integration()))?;
    println!("ci: every check passed in {:.0} s", start.elapsed().as_secs_f64());
    for (name, elapsed) in &timings {
        println!("ci: {:8.1} s  {name}", elapsed.as_secs_f64());
    }
    Ok(())
}

fn timed(
    timings: &mut Vec<(&'static str, Duration)>,
    name: &'static str,
    check: impl FnOnce() -> Result<()>,
) -> Result<()> {
    let start = Instant::now();
    check()?;
    timings.push((name, start.elapsed()));
    Ok(())
}

/// The checks that are one cargo command each.
fn compile_steps() -> Vec<(&'static str, Command)> {
    let mut clippy = cargo();
    clippy.args(["clippy", "--workspace", "--all-targets", "--locked", "--", "-D", "warnings"]);
    let mut documentation = cargo();
    documentation
        .args(["doc", "--workspace", "--no-deps", "--locked"])
        .env("RUSTDOCFLAGS", "-D warnings");
    vec![("clippy", clippy), ("documentation", documentation)]
}

/// Compiles the fuzz targets of every crate without linking them, which works on stable Rust.
fn check_fuzz_targets() -> Result<()> {
    let root = workspace_root();
    let manifests = fuzz_manifests(&root)?;
    if manifests.is_empty() {
        println!("==> fuzz targets: there are none");
    }
    for manifest in manifests {
        let mut command = cargo();
        command.arg("check").arg("--manifest-path").arg(&manifest);
        command.arg("--target-dir").arg(compatibility::target_directory().join("fuzz-check"));
        if manifest.with_file_name("Cargo.lock").is_file() {
            command.arg("--locked");
        }
        // Nothing is linked, so the fuzzer's C++ runtime is not built: any file can take its place,
        // and no C++ compiler is needed.
        command.env("CUSTOM_LIBFUZZER_PATH", &manifest);
        run_step("fuzz targets", &mut command)?;
    }
    Ok(())
}

fn fuzz_manifests(root: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(root).with_context(|| format!("cannot list {}", root.display()))?;
    let mut manifests = Vec::new();
    for entry in entries {
        let manifest = entry?.path().join("fuzz/Cargo.toml");
        if manifest.is_file() {
            manifests.push(manifest);
        }
    }
    manifests.sort();
    Ok(manifests)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fuzz_manifests_are_found_one_level_down() {
        let directory = tempfile::tempdir().expect("temporary directory");
        fs::create_dir_all(directory.path().join("a/fuzz")).expect("directory");
        fs::create_dir_all(directory.path().join("b/src")).expect("directory");
        fs::write(directory.path().join("a/fuzz/Cargo.toml"), "").expect("file");
        let manifests = fuzz_manifests(directory.path()).expect("listing");
        assert_eq!(manifests, [directory.path().join("a/fuzz/Cargo.toml")]);
    }

    #[test]
    fn continuous_integration_script_runs_this_command_and_nothing_else() {
        let script = fs::read_to_string(workspace_root().join(".ci/run")).expect(".ci/run");
        let lines: Vec<&str> = script.lines().collect();
        assert_eq!(
            lines,
            [
                "#!/usr/bin/env bash",
                "set -euo pipefail",
                "cd \"$(dirname \"$0\")/..\"",
                "exec cargo xtask ci"
            ]
        );
    }
}
