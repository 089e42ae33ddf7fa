//! Ceph, a store of objects and of disks, from the packages of this Debian release.

use std::fs;
use std::path::PathBuf;
use std::process::Stdio;
use std::sync::Mutex;

use anyhow::{Context, Result, bail};

use crate::apt::{self, Sources, apt_get, can_install};
use crate::command::{is_installed, run_step};
use crate::compatibility::target_directory;
use crate::machine::{TOOLS_PACKAGE, backports_of, version_of};

const PACKAGES: &[&str] = &["ceph-mon", "ceph-osd", "radosgw", "ceph-common"];
/// Has the module of qemu-nbd for Ceph's disks. Only that of the same version fits.
const MODULE_PACKAGE: &str = "qemu-block-extra";
/// Where the module is.
const MODULES: &str = "/usr/lib/x86_64-linux-gnu/qemu";
const MODULE: &str = "block-rbd.so";

/// Where Ceph is unpacked, and from where the modules of qemu-nbd are loaded.
#[derive(Clone, Debug)]
pub(crate) struct Unpacked {
    /// It has what the system lacks.
    pub(crate) tree: PathBuf,
    pub(crate) modules: PathBuf,
}

/// Puts Ceph in `target/ceph`, if it is missing: about 61 MB are downloaded. The system does not
/// change.
///
/// # Errors
///
/// This system is not Debian for x86_64, or the archive cannot be reached.
pub(crate) fn ensure() -> Result<Unpacked> {
    /// Rounds that begin at the same time need it once.
    static ONE: Mutex<()> = Mutex::new(());
    let _one = ONE.lock();
    if !cfg!(all(target_arch = "x86_64", target_os = "linux")) || !is_installed("dpkg-deb") {
        bail!("Ceph is taken from Debian's packages for x86_64 only");
    }
    let tree = target_directory().join("ceph");
    if !tree.is_dir() {
        let new = target_directory().join("ceph.new");
        let _ = fs::remove_dir_all(&new);
        let packages = missing_packages()?;
        if !packages.is_empty() {
            apt::unpack(&packages, &Sources::Usual, &new)?;
        }
        add_module(&new)?;
        fs::rename(&new, &tree).with_context(|| format!("cannot make {}", tree.display()))?;
    }
    let unpacked = tree.join(MODULES.trim_start_matches('/'));
    let modules = if unpacked.is_dir() { unpacked } else { MODULES.into() };
    Ok(Unpacked { tree, modules })
}

fn missing_packages() -> Result<Vec<String>> {
    let first = apt::missing(PACKAGES);
    if first.is_ok() || !can_install() {
        return first.context("apt-get does not know Ceph; try again after `apt-get update`");
    }
    run_step("ceph", apt_get().arg("update").stdout(Stdio::null()))?;
    apt::missing(PACKAGES)
}

/// Adds the module of qemu-nbd, unless the system has it.
fn add_module(new: &std::path::Path) -> Result<()> {
    if PathBuf::from(MODULES).join(MODULE).is_file() {
        fs::create_dir_all(new)?;
        return Ok(());
    }
    let version = version_of(TOOLS_PACKAGE).context("qemu-nbd is missing: `cargo xtask peers`")?;
    let package = [format!("{MODULE_PACKAGE}={version}")];
    match (apt::unpack(&package, &Sources::Usual, new), backports_of(&version)) {
        (Err(error), Some(suite)) => {
            println!("ceph: {error:#}; trying {suite}");
            apt::unpack(&package, &Sources::suite(&suite)?, new)
        }
        (unpacked, _) => unpacked,
    }
}
