//! `cargo xtask iotests`: QEMU's own tests of qemu-img, with QEMU's program and with ours.
//!
//! The tests are QEMU's and stay where its source is; nothing of them is in this repository. Each
//! test runs with QEMU's qemu-img first. If it passes, it runs again with ours in its place: all
//! other programs (qemu-io, qemu-nbd, …) stay QEMU's. Each format has its own directory, so several
//! runs with other formats can be made at the same time.

use std::collections::BTreeMap;
use std::env;
use std::fs::{self, File};
use std::os::unix::fs::{PermissionsExt as _, symlink};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::command::{cargo, output_of, run_step};
use crate::compatibility::target_directory;

/// The programs of QEMU that the tests start, and the variables that name them.
const PROGRAMS: [(&str, &str); 5] = [
    ("QEMU_PROG", "qemu-system-x86_64"),
    ("QEMU_IMG_PROG", "qemu-img"),
    ("QEMU_IO_PROG", "qemu-io"),
    ("QEMU_NBD_PROG", "qemu-nbd"),
    ("QSD_PROG", "qemu-storage-daemon"),
];

/// Arguments of `cargo xtask iotests`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Directory of QEMU's source, of the version of the installed programs.
    #[arg(long, value_name = "DIR")]
    source: PathBuf,
    /// Formats, and protocols such as nbd.
    #[arg(
        long,
        value_delimiter = ',',
        default_value = "raw,qcow2,vmdk,vpc,vhdx,vdi,luks,nbd",
        value_name = "FORMATS"
    )]
    formats: Vec<String>,
    /// Groups of tests.
    #[arg(long, default_value = "auto,quick", value_name = "GROUPS")]
    groups: String,
    /// Seconds after which a test is ended, and has failed.
    #[arg(long, default_value_t = 240, value_name = "SECONDS")]
    limit: u32,
    /// The program to test; without it, the workspace's is built.
    #[arg(long, value_name = "FILE")]
    program: Option<PathBuf>,
    /// Tests; without any, all of the groups.
    tests: Vec<String>,
}

/// How a test ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Outcome {
    Passed,
    Failed,
    /// It does not apply to the format or the machine.
    NotRun,
}

/// The tests of a format.
#[derive(Debug, Default)]
struct Tally {
    /// How many pass with both programs.
    passed: usize,
    /// Those that pass with QEMU's program only.
    failed: Vec<String>,
    /// Those that do not pass with QEMU's program here.
    useless: Vec<String>,
}

impl Tally {
    /// Counts a test that passes with QEMU's program; returns how it ended with ours. A test that
    /// does not run, because it looks for something in the help of the program, has failed.
    fn add(&mut self, test: String, ours: Outcome) -> &'static str {
        let verdict = match ours {
            Outcome::Passed => {
                self.passed += 1;
                return "passes";
            }
            Outcome::Failed => "fails with this program",
            Outcome::NotRun => "does not apply to this program",
        };
        self.failed.push(test);
        verdict
    }
}

/// Runs the tests and prints how many pass. The output of failed ones is kept in `target/iotests`.
///
/// # Errors
///
/// A program is missing, or the source has no tests. Failed tests are no error.
pub(crate) fn run(options: &Options) -> Result<()> {
    let suite = Suite::new(options)?;
    let mut tallies = BTreeMap::new();
    for format in &options.formats {
        let mut tally = Tally::default();
        for test in suite.tests(format)? {
            match suite.run(&suite.theirs, format, &test)? {
                Outcome::NotRun => continue,
                Outcome::Failed => {
                    println!("{format} {test}: fails with QEMU's program");
                    tally.useless.push(test);
                    continue;
                }
                Outcome::Passed => {}
            }
            let outcome = suite.run(&suite.ours, format, &test)?;
            println!("{format} {test}: {}", tally.add(test.clone(), outcome));
        }
        tallies.insert(format.as_str(), tally);
    }
    print!("{}", table(&tallies));
    Ok(())
}

/// Formats the results as a table of Markdown.
fn table(tallies: &BTreeMap<&str, Tally>) -> String {
    let mut text =
        "| format | pass | fail here only | fail with either |\n|---|---|---|---|\n".to_owned();
    for (format, Tally { passed, failed, useless }) in tallies {
        let (here, either) = (failed.len(), useless.len());
        let line = format!("| {format} | {passed} | {here}: {} | {either} |\n", failed.join(" "));
        text.push_str(&line);
    }
    text
}

/// QEMU's tests, and where they run.
struct Suite<'a> {
    options: &'a Options,
    /// The directory of the tests.
    directory: PathBuf,
    /// Where images and outputs are.
    output: PathBuf,
    programs: Vec<(&'static str, PathBuf)>,
    theirs: PathBuf,
    ours: PathBuf,
}

impl<'a> Suite<'a> {
    fn new(options: &'a Options) -> Result<Self> {
        let directory = std::path::absolute(options.source.join("tests/qemu-iotests"))?;
        ensure!(directory.join("check").is_file(), "{} has no `check`", directory.display());
        let find = |(variable, name)| Ok((variable, on_path(name)?));
        let mut programs = PROGRAMS.into_iter().map(find).collect::<Result<Vec<_>>>()?;
        let theirs = on_path("qemu-img")?;
        let output = std::path::absolute(target_directory().join("iotests"))?;
        let ours = output.join("program/qemu-img");
        fs::create_dir_all(output.join("program"))?;
        let program = program(options)?;
        if fs::read_link(&ours).ok().as_ref() != Some(&program) {
            let _ = fs::remove_file(&ours);
            symlink(program, &ours)?;
        }
        programs[0].1 = with_an_accelerator(&programs[0].1, &output.join("program"))?;
        Ok(Self { options, directory, output, programs, theirs, ours })
    }

    /// A run of `check` with this qemu-img, which a time limit ends.
    fn check(&self, program: &Path, format: &str) -> Result<Command> {
        let which = if program == self.ours { "ours" } else { "qemu" };
        let place = self.output.join(which).join(format);
        fs::create_dir_all(&place)?;
        let mut command = Command::new("timeout");
        command.arg("--kill-after=10").arg(self.options.limit.to_string());
        command.arg(self.directory.join("check")).arg("-tap").arg(format!("-{format}"));
        command.arg("--source-dir").arg(&self.directory).arg("--build-dir").arg(&place);
        command.envs(self.programs.iter().map(|(variable, program)| (*variable, program)));
        command.env("QEMU_IMG_PROG", program).env("TEST_DIR", place.join("scratch"));
        command.current_dir(place).stdin(Stdio::null());
        Ok(command)
    }

    /// The names of the tests.
    fn tests(&self, format: &str) -> Result<Vec<String>> {
        if !self.options.tests.is_empty() {
            return Ok(self.options.tests.clone());
        }
        let mut command = self.check(&self.theirs, format)?;
        let list = output_of(command.args(["--dry-run", "--groups", &self.options.groups]))?;
        let name = |line: &str| {
            let name = Path::new(line.trim()).file_name()?;
            Some(name.to_string_lossy().into_owned())
        };
        Ok(list.lines().filter_map(name).collect())
    }

    /// Runs a test; its output stays in a file if it does not pass.
    fn run(&self, program: &Path, format: &str, test: &str) -> Result<Outcome> {
        let mut command = self.check(program, format)?;
        let place = command.get_current_dir().unwrap_or(&self.output).to_owned();
        let log = place.join(format!("{}.log", test.replace('/', "-")));
        let file = File::create(&log)?;
        command.arg(test).stdout(file.try_clone()?).stderr(file);
        command.status().context("cannot start `timeout`")?;
        let outcome = outcome_of(&String::from_utf8_lossy(&fs::read(&log)?));
        if outcome != Outcome::Failed {
            fs::remove_file(&log)?;
        }
        Ok(outcome)
    }
}

/// The outcome of the only test in the output of `check -tap`: without a result it was ended.
fn outcome_of(output: &str) -> Outcome {
    let result = output.lines().find(|line| line.starts_with("ok ") || line.starts_with("not ok "));
    match result {
        Some(line) if line.contains("# SKIP") => Outcome::NotRun,
        Some(line) if line.starts_with("ok ") => Outcome::Passed,
        _ => Outcome::Failed,
    }
}

/// The program to test: the given one, or the workspace's.
fn program(options: &Options) -> Result<PathBuf> {
    if let Some(program) = &options.program {
        return Ok(fs::canonicalize(program)?);
    }
    run_step("build", cargo().args(["build", "--quiet", "-p", "nbd-cli"]))?;
    Ok(std::path::absolute(target_directory().join("debug/nbd-cli"))?)
}

/// The tests start machines with the accelerator `qtest`, which packages of QEMU leave out: a
/// script of the same name starts them with another one there.
fn with_an_accelerator(machine: &Path, place: &Path) -> Result<PathBuf> {
    if output_of(Command::new(machine).args(["-accel", "help"]))?.contains("qtest") {
        return Ok(machine.to_owned());
    }
    let script = place.join(machine.file_name().unwrap_or_default());
    let text = format!(
        "#!/bin/bash\narguments=()\nfor word; do\n    [ \"$word\" = qtest ] && word=tcg\n    \
         arguments+=(\"$word\")\ndone\nexec '{}' \"${{arguments[@]}}\"\n",
        machine.display()
    );
    fs::write(&script, text)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    Ok(script)
}

fn on_path(name: &str) -> Result<PathBuf> {
    let path = env::var_os("PATH").unwrap_or_default();
    let found =
        env::split_paths(&path).map(|directory| directory.join(name)).find(|it| it.is_file());
    match found {
        Some(program) => Ok(program),
        None => bail!("{name} is not installed; `cargo xtask peers` installs QEMU's programs"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_test_without_a_result_has_failed() {
        assert_eq!(outcome_of("TAP version 13\n1..1\nok raw 001\n"), Outcome::Passed);
        assert_eq!(outcome_of("1..1\nok raw 048 # SKIP\n"), Outcome::NotRun);
        assert_eq!(outcome_of("1..1\n-a\n+b\nnot ok raw 001\n"), Outcome::Failed);
        assert_eq!(outcome_of("1..1\n"), Outcome::Failed);
    }

    #[test]
    fn a_test_that_does_not_run_with_this_program_only_counts_as_failed() {
        let mut tally = Tally::default();
        assert_eq!(tally.add("184".to_owned(), Outcome::NotRun), "does not apply to this program");
        assert_eq!(tally.add("185".to_owned(), Outcome::Failed), "fails with this program");
        assert_eq!(tally.add("186".to_owned(), Outcome::Passed), "passes");
        assert_eq!((tally.passed, tally.failed), (1, vec!["184".to_owned(), "185".to_owned()]));
    }

    #[test]
    fn the_table_names_what_fails() {
        let (failed, useless) = (vec!["007".to_owned()], vec!["008".to_owned()]);
        let tally = Tally { passed: 2, failed, useless };
        let text = table(&BTreeMap::from([("vdi", tally)]));
        assert!(text.ends_with("| vdi | 2 | 1: 007 | 1 |\n"), "{text}");
    }
}
