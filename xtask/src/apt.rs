//! Debian packages: installed only if nothing else is removed or replaced by an older version.

use std::fs;
use std::path::{Path, PathBuf};
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

/// The packages that an installation would add, each as `NAME=VERSION`.
///
/// # Errors
///
/// apt-get knows no such package.
pub(crate) fn missing(packages: &[&str]) -> Result<Vec<String>> {
    let install = ["install", "--dry-run", "--no-install-recommends"];
    let plan = output_of(apt_get().args(install).args(packages))?;
    Ok(plan.lines().filter_map(added).collect())
}

/// Parses a line of a plan; updates of what is there are no additions.
fn added(line: &str) -> Option<String> {
    let (name, rest) = line.strip_prefix("Inst ")?.split_once(' ')?;
    let version = rest.strip_prefix('(')?.split(' ').next()?;
    Some(format!("{name}={version}"))
}

/// Downloads packages, which apt-get verifies by the signatures of their archive, and unpacks them
/// in a directory.
///
/// # Errors
///
/// A package is not in the archive, or there is no room.
pub(crate) fn unpack(packages: &[String], sources: &Sources, directory: &Path) -> Result<()> {
    let files = directory.join("packages");
    fs::create_dir_all(&files).with_context(|| format!("cannot make {}", files.display()))?;
    // As root, apt-get complains that no other user can write here, and continues.
    let mut download = sources.apt_get();
    run_step("apt", download.arg("download").args(packages).current_dir(&files))?;
    for entry in fs::read_dir(&files)? {
        output_of(Command::new("dpkg-deb").arg("-x").arg(entry?.path()).arg(directory))?;
    }
    fs::remove_dir_all(&files).with_context(|| format!("cannot remove {}", files.display()))
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

    #[test]
    fn a_plan_adds_what_it_does_not_update() {
        let line = "Inst ceph-osd (16.2.15+ds-0+deb12u2 Debian:12.11/stable [amd64]) []";
        assert_eq!(added(line).as_deref(), Some("ceph-osd=16.2.15+ds-0+deb12u2"));
        assert_eq!(added("Inst libc6 [2.36-9] (2.36-10 Debian:12.11/stable [amd64])"), None);
        assert_eq!(added("Conf ceph-osd (16.2.15 Debian:12.11/stable [amd64])"), None);
    }
}
