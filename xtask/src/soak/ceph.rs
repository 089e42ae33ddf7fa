//! Images, backups and disks on a real Ceph, which is downloaded first.

use std::process::Command;
use std::time::Duration;

use anyhow::{Result, bail};

use super::cluster::Cluster;
use super::from_tests::{last_lines, tests_of};
use super::judge::{Judge, Round};
use super::served;
use crate::ceph;
use crate::command::workspace_root;

const PACKAGE: &str = "nbd-cli";
const PROGRAM: &str = "cli";
/// The modules of the test program that a real store, or a pool of disks, is for.
const MODULES: [&str; 2] = ["real_store", "rbd"];

/// Tests that run longer are considered hung.
const LONGEST: Duration = Duration::from_secs(1200);

/// Runs the tests of real stores, and those of RBD, on a new cluster.
pub(super) struct Ceph;

impl Judge for Ceph {
    fn name(&self) -> &'static str {
        "ceph"
    }

    fn description(&self) -> &'static str {
        "images, backups and disks on Ceph, of which 61 MB are downloaded"
    }

    fn unit(&self) -> &'static str {
        "tests"
    }

    fn test_program(&self) -> Option<&'static str> {
        Some(PROGRAM)
    }

    fn is_on_request(&self) -> bool {
        true
    }

    fn round(&self, round: &Round<'_>) -> Result<u64> {
        let program = round.programs.test(PACKAGE, PROGRAM)?;
        let listed =
            served::output_of(Command::new(program).args(["--list", "--format", "terse"]))?;
        let names = MODULES.map(|module| tests_of(&listed, module));
        if names.iter().any(Vec::is_empty) {
            bail!("{PROGRAM} has no tests in one of {MODULES:?}");
        }
        let names = names.concat();
        let cluster = Cluster::start(&ceph::ensure()?)?;
        let mut command = Command::new(program);
        command.args(&names).args(["--exact", "--nocapture", "--test-threads", "2"]);
        command.env("TMPDIR", round.directory).env("NBD_SEED", round.seed.to_string());
        command.current_dir(workspace_root().join(PACKAGE));
        cluster.allow(&mut command)?;
        let ended = served::run(&mut command, &round.directory.join("output.txt"), LONGEST)?;
        let said = last_lines(&ended.said, 40);
        match ended.status {
            // Here everything is expected to be there.
            Some(status) if status.success() && !ended.said.contains("skipped: ") => {
                Ok(names.len() as u64)
            }
            Some(status) => bail!("{status}\n{said}\n{}", cluster.log("gateway")),
            None => bail!("the tests hang\n{said}\n{}", cluster.log("gateway")),
        }
    }
}
