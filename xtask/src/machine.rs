//! What the tests of kernel devices need: QEMU's machine, and a kernel with the driver.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{Sources, apt_get, can_install, install};
use crate::command::{is_installed, output_of, run_step};
use crate::compatibility::target_directory;

const MACHINE: &str = "qemu-system-x86_64";
const MACHINE_PACKAGE: &str = "qemu-system-x86";
/// It has the same source, and packages of both exclude other versions of it.
pub(crate) const TOOLS_PACKAGE: &str = "qemu-utils";
/// Depends on the newest kernel of the distribution for virtual machines.
const KERNEL_PACKAGE: &str = "linux-image-cloud-amd64";

/// Installs the machine if it is missing, and puts a kernel in `target/kernel`.
///
/// Tests are skipped if one of them is missing, in continuous integration too, because the version
/// that fits the tools may be in an archive that cannot be reached.
pub(crate) fn ensure() {
    if !cfg!(target_arch = "x86_64") {
        println!("==> machine: there is one for x86_64 only");
        return;
    }
    for (what, found) in [(MACHINE, ensure_machine()), ("a kernel", ensure_kernel())] {
        if let Err(error) = found {
            println!("machine: tests that need {what} will be skipped: {error:#}");
        }
    }
}

fn ensure_machine() -> Result<()> {
    if is_installed(MACHINE) {
        return Ok(());
    }
    if !can_install() {
        bail!("it cannot be installed (that takes root and apt-get): package {MACHINE_PACKAGE}");
    }
    let version = version_of(TOOLS_PACKAGE);
    let package = match &version {
        Some(version) => format!("{MACHINE_PACKAGE}={version}"),
        None => MACHINE_PACKAGE.to_owned(),
    };
    let usual = install(&[&package], &Sources::Usual);
    match (usual, version.as_deref().and_then(backports_of)) {
        (Ok(()), _) => Ok(()),
        (Err(error), None) => Err(error),
        (Err(error), Some(suite)) => {
            println!("machine: {error:#}; trying {suite}");
            install(&[&package], &Sources::suite(&suite)?)
        }
    }
}

/// The version of an installed package.
pub(crate) fn version_of(package: &str) -> Option<String> {
    let format = ["-W", "-f", "${db:Status-Status} ${Version}"];
    let said = output_of(Command::new("dpkg-query").args(format).arg(package)).ok()?;
    said.strip_prefix("installed ").map(str::to_owned)
}

/// The suite of a version that was built for Debian's backports.
pub(crate) fn backports_of(version: &str) -> Option<String> {
    if !version.contains("~bpo") {
        return None;
    }
    let system = fs::read_to_string("/etc/os-release").ok()?;
    let codename = system.lines().find_map(|line| line.strip_prefix("VERSION_CODENAME="))?;
    Some(format!("{codename}-backports"))
}

fn ensure_kernel() -> Result<()> {
    let kernel = target_directory().join("kernel");
    if kernel.join("boot").is_dir() {
        return Ok(());
    }
    if !is_installed("apt-get") || !is_installed("dpkg-deb") {
        bail!(
            "it comes from the Debian package {KERNEL_PACKAGE}, which takes apt-get and dpkg-deb"
        );
    }
    let package = kernel_package()?;
    let directory = target_directory().join("kernel-package");
    fs::create_dir_all(&directory)?;
    // As root, apt-get complains that no other user can write here, and continues.
    let mut download = apt_get();
    run_step("machine", download.args(["download", &package]).current_dir(&directory))?;
    let file = package_file(&directory, &package)?;
    let new = target_directory().join("kernel.new");
    let _ = fs::remove_dir_all(&new);
    run_step("machine", Command::new("dpkg-deb").arg("-x").arg(&file).arg(&new))?;
    let _ = fs::remove_dir_all(&kernel);
    fs::rename(&new, &kernel).with_context(|| format!("cannot make {}", kernel.display()))?;
    fs::remove_dir_all(&directory)?;
    Ok(())
}

/// The package of the newest kernel.
fn kernel_package() -> Result<String> {
    let look = || output_of(Command::new("apt-cache").args(["depends", KERNEL_PACKAGE]));
    let said = match look() {
        Ok(said) if dependency(&said).is_some() => said,
        _ => {
            run_step("machine", apt_get().arg("update").stdout(Stdio::null()))?;
            look()?
        }
    };
    let package = dependency(&said);
    package.with_context(|| format!("{KERNEL_PACKAGE} depends on no kernel: {said}"))
}

fn dependency(said: &str) -> Option<String> {
    let mut dependencies = said.lines().filter_map(|line| line.trim().strip_prefix("Depends: "));
    dependencies.find(|package| package.starts_with("linux-image-")).map(str::to_owned)
}

fn package_file(directory: &Path, package: &str) -> Result<PathBuf> {
    let start = format!("{package}_");
    for entry in fs::read_dir(directory)? {
        let path = entry?.path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if name.starts_with(&start) && name.ends_with(".deb") {
            return Ok(path);
        }
    }
    bail!("apt-get left no file of {package} in {}", directory.display())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_is_what_the_package_depends_on() {
        let said = "linux-image-cloud-amd64\n  Depends: linux-image-6.1.0-56-cloud-amd64\n";
        assert_eq!(dependency(said).as_deref(), Some("linux-image-6.1.0-56-cloud-amd64"));
        assert_eq!(dependency("linux-image-cloud-amd64\n"), None);
    }

    #[test]
    fn only_versions_of_backports_have_a_suite() {
        assert_eq!(backports_of("1:7.2+dfsg-7+deb12u18"), None);
        let suite = backports_of("1:10.0.2+ds-2+deb13u1~bpo12+1");
        assert!(suite.is_none_or(|suite| suite.ends_with("-backports")));
    }
}
