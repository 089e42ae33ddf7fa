//! Judges that are integration tests: run one test function at a time, each with its own seed.
//!
//! The tests read their seed and their number of rounds from the environment, and print `judged:
//! N`, the number of cases they checked.

use std::fs::File;
use std::io::Read;
use std::os::unix::process::CommandExt as _;
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, bail};

use super::judge::{Judge, Round};
use super::random::Random;
use super::served;
use crate::command::workspace_root;

/// A test that runs longer is considered hung.
const LONGEST: Duration = Duration::from_secs(900);

/// A kind of tests.
#[derive(Debug, Clone, Copy)]
pub(super) struct FromTests {
    name: &'static str,
    description: &'static str,
    unit: &'static str,
    package: &'static str,
    /// The test program.
    test: &'static str,
    /// The module of the test program that has the tests.
    module: &'static str,
    /// The environment variable for the amount of work.
    rounds: (&'static str, &'static str),
    /// The environment variable for the seed.
    seed: &'static str,
}

impl FromTests {
    /// Every integration test that is random enough to be worth running for long.
    pub(super) const ALL: &'static [Self] = &[
        Self {
            name: "crashes",
            description: "images after a loss of power at any instant, judged by qemu-img",
            unit: "states",
            rounds: ("IMGFMT_CRASH_ROUNDS", "12"),
            ..Self::imgfmt("crash_at_any_instant")
        },
        Self {
            name: "structure",
            description: "crashes while snapshots, sizes and backing files change",
            unit: "states",
            rounds: ("IMGFMT_CRASH_ROUNDS", "4"),
            ..Self::imgfmt("crash_in_changes_of_structure")
        },
        Self {
            name: "sidecar",
            description: "crashes of an image and of the file of its dirty bitmaps together",
            unit: "states",
            rounds: ("IMGFMT_CRASH_ROUNDS", "24"),
            ..Self::imgfmt("crash_with_sidecar")
        },
        Self {
            name: "bitmaps",
            description: "crashes and errors while the list of bitmaps changes",
            unit: "states",
            rounds: ("IMGFMT_CRASH_ROUNDS", "25"),
            ..Self::imgfmt("crash_of_bitmaps")
        },
        Self {
            name: "errors",
            description: "reads, writes and syncs that fail, or find the disk full, at any call",
            unit: "states",
            rounds: ("IMGFMT_ERROR_ROUNDS", "12"),
            ..Self::imgfmt("errors_at_every_call")
        },
        Self {
            name: "damage",
            description: "damaged images checked, repaired and read beside qemu-img",
            unit: "images",
            rounds: ("IMGFMT_ROUNDS", "25"),
            ..Self::imgfmt("check_vs_qemu")
        },
        Self {
            name: "chains",
            description: "random backing chains read and mapped beside QEMU",
            unit: "chains",
            rounds: ("IMGFMT_CHAIN_ROUNDS", "8"),
            ..Self::imgfmt("chains_vs_qemu")
        },
        Self {
            name: "models",
            description: "random operations on images of every kind against a plain vector",
            unit: "images",
            rounds: ("IMGFMT_MODEL_ROUNDS", "26"),
            ..Self::imgfmt("model_of_every_kind")
        },
        Self {
            name: "bytes",
            description: "headers, tables and sidecars with changed bytes",
            unit: "inputs",
            rounds: ("IMGFMT_FUZZ_ROUNDS", "30"),
            ..Self::imgfmt("fuzz_corpus")
        },
        Self {
            name: "store-kills",
            description: "commands on an object store killed or cut off at any request",
            unit: "runs",
            ..Self::stores("kills")
        },
        Self {
            name: "store-faults",
            description: "commands on an object store that fails at any request",
            unit: "runs",
            ..Self::stores("faults")
        },
    ];

    const fn stores(module: &'static str) -> Self {
        Self {
            package: "nbd-cli",
            test: "stores",
            rounds: ("NBD_STORE_POINTS", "1"),
            seed: "NBD_SEED",
            ..Self::imgfmt(module)
        }
    }

    const fn imgfmt(module: &'static str) -> Self {
        Self {
            name: "",
            description: "",
            unit: "",
            package: "imgfmt",
            test: "it",
            module,
            rounds: ("", ""),
            seed: "IMGFMT_SEED",
        }
    }
}

impl Judge for FromTests {
    fn name(&self) -> &'static str {
        self.name
    }

    fn description(&self) -> &'static str {
        self.description
    }

    fn unit(&self) -> &'static str {
        self.unit
    }

    fn test_program(&self) -> Option<&'static str> {
        Some(self.test)
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let program = round.programs.test(self.package, self.test)?;
        let listed =
            served::output_of(Command::new(program).args(["--list", "--format", "terse"]))?;
        let names = tests_of(&listed, self.module);
        if names.is_empty() {
            bail!("{} has no tests in {}", self.test, self.module);
        }
        let mut random = Random::new(round.seed);
        let name = random.choose(&names);
        let said = round.directory.join("output.txt");
        let output = File::create(&said)?;
        let mut child = Command::new(program)
            .args([name, "--exact", "--nocapture", "--test-threads", "1"])
            .env(self.seed, random.next().to_string())
            .env(self.rounds.0, self.rounds.1)
            .env("TMPDIR", round.directory)
            .env("IMGFMT_KEEP", round.directory.join("kept"))
            .current_dir(workspace_root().join(self.package))
            .stdin(Stdio::null())
            .stderr(output.try_clone()?)
            .stdout(output)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let status = served::wait(&mut child, LONGEST)?;
        let mut text = String::new();
        File::open(&said)?.read_to_string(&mut text)?;
        match status {
            Some(status) if status.success() => Ok(judged(&text)),
            Some(status) => bail!("{name}: {status}\n{}", last_lines(&text, 40)),
            None => bail!("{name} hangs\n{}", last_lines(&text, 40)),
        }
    }
}

/// The full names of the tests of one module in the list that a test program prints.
pub(super) fn tests_of<'a>(listed: &'a str, module: &str) -> Vec<&'a str> {
    let names = listed.lines().filter_map(|line| line.strip_suffix(": test"));
    let is_of = |name: &&str| name.strip_prefix(module).is_some_and(|rest| rest.starts_with("::"));
    names.filter(is_of).collect()
}

/// Parses the number of judged cases. A test that prints none counts as one case.
fn judged(text: &str) -> u64 {
    let counts = text.lines().filter_map(|line| line.strip_prefix("judged: "));
    let sum: u64 = counts.filter_map(|count| count.trim().parse::<u64>().ok()).sum();
    sum.max(1)
}

pub(super) fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().collect();
    lines[lines.len().saturating_sub(count)..].join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_tests_judged_is_added_up() {
        assert_eq!(judged("running 1 test\njudged: 12\nseed 4\njudged: 3\n"), 15);
        assert_eq!(judged("nothing to count"), 1);
    }

    #[test]
    fn tests_of_one_module_are_chosen() {
        let listed = "crash::a: test\ncrash_of_bitmaps::b: test\ncrash::c: test\nd: test\n";
        assert_eq!(tests_of(listed, "crash"), ["crash::a", "crash::c"]);
        assert!(tests_of(listed, "d").is_empty());
    }

    #[test]
    fn every_kind_has_a_name_a_unit_and_a_number_of_rounds() {
        for tests in FromTests::ALL {
            assert!(!tests.name.is_empty() && !tests.unit.is_empty(), "{}", tests.module);
            assert!(tests.rounds.1.parse::<u64>().is_ok(), "{}", tests.module);
        }
    }
}
