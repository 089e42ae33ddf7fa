//! Child processes: runs cargo and other programs.

use std::env;
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

/// The directory of the workspace's `Cargo.toml`.
pub(crate) fn workspace_root() -> PathBuf {
    // Cargo passes the manifest's directory to a running xtask; a binary that is started by hand
    // uses the directory where it was built.
    let manifest_directory = env::var_os("CARGO_MANIFEST_DIR")
        .map_or_else(|| PathBuf::from(env!("CARGO_MANIFEST_DIR")), PathBuf::from);
    manifest_directory.parent().map_or_else(|| PathBuf::from("."), PathBuf::from)
}

/// A cargo command that runs in the workspace's directory.
pub(crate) fn cargo() -> Command {
    let program = env::var_os("CARGO").unwrap_or_else(|| "cargo".into());
    let mut command = Command::new(program);
    command.current_dir(workspace_root());
    // `cargo run` describes xtask itself in the environment. Build scripts that watch those
    // variables would run again at every change between `cargo xtask` and plain `cargo`.
    for (name, _) in env::vars_os() {
        let name_text = name.to_string_lossy();
        if name_text.starts_with("CARGO_PKG_")
            || ["CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_BIN_NAME", "CARGO_CRATE_NAME"]
                .contains(&name_text.as_ref())
        {
            command.env_remove(&name);
        }
    }
    if env::var_os("CARGO_INCREMENTAL").is_none() {
        // What a step compiles is seldom compiled a second time, and the caches of incremental
        // compilation would take more space than everything else.
        command.env("CARGO_INCREMENTAL", "0");
    }
    command
}

/// Runs `command` with its output on the terminal, and prints the command and its duration.
///
/// # Errors
///
/// The command cannot be started, or ends with another status than 0.
pub(crate) fn run_step(name: &str, command: &mut Command) -> Result<Duration> {
    let line = command_line(command);
    println!("==> {name}: {line}");
    let start = Instant::now();
    let status = command
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("step `{name}`: cannot start `{line}`"))?;
    let elapsed = start.elapsed();
    if !status.success() {
        bail!("step `{name}` failed after {:.1} s: `{line}`: {status}", elapsed.as_secs_f64());
    }
    println!("<== {name}: ok in {:.1} s", elapsed.as_secs_f64());
    Ok(elapsed)
}

/// Runs `command` and returns what it wrote to standard output.
///
/// # Errors
///
/// The command cannot be started, or ends with another status than 0: the error then carries what
/// it wrote to standard error.
pub(crate) fn output_of(command: &mut Command) -> Result<String> {
    let line = command_line(command);
    let output =
        command.stdin(Stdio::null()).output().with_context(|| format!("cannot start `{line}`"))?;
    if !output.status.success() {
        let complaint = String::from_utf8_lossy(&output.stderr);
        bail!("`{line}`: {}: {}", output.status, complaint.trim());
    }
    Ok(String::from_utf8_lossy(&output.stdout).into_owned())
}

/// Returns whether a program of this name is on the search path.
pub(crate) fn is_installed(program: &str) -> bool {
    // Debian keeps servers in sbin directories, which are not on every user's search path.
    let path = env::var_os("PATH").unwrap_or_default();
    env::split_paths(&path).any(|directory| directory.join(program).is_file())
}

/// Formats the command as typed in a shell.
pub(crate) fn command_line(command: &Command) -> String {
    let program = PathBuf::from(command.get_program());
    let name = program.file_name().unwrap_or(command.get_program()).to_string_lossy().into_owned();
    let mut line = String::new();
    for (key, value) in command.get_envs() {
        if let Some(value) = value {
            line.push_str(&format!("{}='{}' ", key.to_string_lossy(), value.to_string_lossy()));
        }
    }
    line.push_str(&name);
    for argument in command.get_args() {
        line.push(' ');
        line.push_str(&argument.to_string_lossy());
    }
    line
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn command_line_shows_program_arguments_and_environment() {
        let mut command = Command::new("/usr/bin/cargo");
        command.args(["doc", "--no-deps"]).env("RUSTDOCFLAGS", "-D warnings");
        assert_eq!(command_line(&command), "RUSTDOCFLAGS='-D warnings' cargo doc --no-deps");
    }

    #[test]
    fn failing_step_names_itself_and_its_status() {
        let error = run_step("probe", Command::new("false").arg("x")).expect_err("false fails");
        let text = format!("{error:#}");
        assert!(text.contains("step `probe` failed"), "{text}");
        assert!(text.contains("exit status: 1"), "{text}");
    }

    #[test]
    fn output_of_a_failing_command_carries_its_complaint() {
        let error = output_of(Command::new("sh").args(["-c", "echo broken >&2; exit 3"]))
            .expect_err("exit status 3");
        assert!(format!("{error:#}").contains("broken"));
    }
}
