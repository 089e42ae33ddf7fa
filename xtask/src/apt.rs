//! Debian packages: installed only if nothing else is removed or replaced by an older version.

use std::fs;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::command::{is_installed, output_of, run_step};
use crate::compatibility::target_directory;

/// Where packages come from.
pub(crate) enum Sources {
    /// What the system is set up for.
    Usual,
    /// A Debian suite besides the system's release, for one installation. The system's own lists do
    /// not change.
    Suite { suite: String, directory: PathBuf },
}

impl Sources {
    /// Adds a suite, such as `bookworm-backports`.
    ///
    /// # Errors
    ///
    /// Its lists cannot be fetched.
    pub(crate) fn suite(suite: &str) -> Result<Self> {
        let directory = target_directory().join("apt");
        let release = suite.split('-').next().unwrap_or(suite);
        let text = format!(
            "Types: deb\nURIs: http://deb.debian.org/debian\nSuites: {release} {suite}\n\
             Components: main\nSigned-By: /usr/share/keyrings/debian-archive-keyring.gpg\n"
        );
        fs::create_dir_all(directory.join("parts"))?;
        fs::create_dir_all(directory.join("lists/partial"))?;
        fs::write(directory.join("parts/debian.sources"), text)
            .with_context(|| format!("cannot write in {}", directory.display()))?;
        let sources = Self::Suite { suite: suite.to_owned(), directory };
        run_step("peers", sources.apt_get().arg("update").stdout(Stdio::null()))?;
        Ok(sources)
    }

    fn apt_get(&self) -> Command {
        let mut command = apt_get();
        if let Self::Suite { suite, directory } = self {
            let directory = directory.display();
            command.args(["-o", "Dir::Etc::sourcelist=/dev/null", "-o"]);
            command.arg(format!("Dir::Etc::sourceparts={directory}/parts")).arg("-o");
            command.arg(format!("Dir::State::lists={directory}/lists"));
            command.args(["-t", suite]);
        }
        command
    }
}

/// Installs packages, after a look at what that would do.
///
/// # Errors
///
/// A package would be removed or replaced by an older version, or apt-get fails.
pub(crate) fn install(packages: &[&str], sources: &Sources) -> Result<()> {
    let install = ["install", "-y", "--no-install-recommends"];
    let plan = output_of(sources.apt_get().arg("--dry-run").args(install).args(packages))?;
    if let Some(harm) = harm(&plan) {
        bail!("apt-get would not leave the other packages as they are: {harm}");
    }
    // apt-get asks before it does anything outside the plan, and the answer is no.
    let careful = ["--no-remove", "-o", "APT::Get::AllowDowngrades=false"];
    run_step("peers", sources.apt_get().args(careful).args(install).args(packages))?;
    Ok(())
}

/// Finds what a plan of apt-get removes or downgrades.
fn harm(plan: &str) -> Option<&str> {
    let is_downgrade = plan.contains("DOWNGRADED");
    plan.lines()
        .find(|line| line.starts_with("Remv ") || (is_downgrade && line.contains("DOWNGRADED")))
}

pub(crate) fn can_install() -> bool {
    let is_root = output_of(Command::new("id").arg("-u")).is_ok_and(|id| id.trim() == "0");
    is_root && is_installed("apt-get")
}

pub(crate) fn apt_get() -> Command {
    let mut command = Command::new("apt-get");
    command.arg("-q").env("DEBIAN_FRONTEND", "noninteractive");
    command
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_plan_that_removes_a_package_is_refused() {
        let plan = "Remv qemu-utils [1:10.0.2]\nInst qemu-system-x86 (1:7.2 Debian:12 [amd64])\n";
        assert_eq!(harm(plan), Some("Remv qemu-utils [1:10.0.2]"));
        assert_eq!(harm("Inst qemu-system-x86 (1:7.2 Debian:12 [amd64])\n"), None);
        assert!(harm("The following packages will be DOWNGRADED:\n  x\n").is_some());
    }
}
