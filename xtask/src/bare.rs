//! The packages in a bare Debian root: installed and used where there is nothing else.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use anyhow::{Context, Result, bail};

use crate::apt::{self, Sources, can_install};
use crate::command::{is_installed, output_of, run_step};
use crate::compatibility::target_directory;

/// Uses the installed program.
const SCRIPT: &str = include_str!("bare.sh");

/// Packages of the root that the script needs.
const TOOLS: &str = "--include=libssl3,man-db,systemd";

/// A bare root, of which copies are used.
pub(crate) struct Root(PathBuf);

/// The name of the release that runs here: the program links its libraries.
fn suite() -> Result<String> {
    let system = fs::read_to_string("/etc/os-release").context("/etc/os-release")?;
    let of = |key: &str| system.lines().find_map(|line| line.strip_prefix(key)).map(str::to_owned);
    match (of("ID="), of("VERSION_CODENAME=")) {
        (Some(system), Some(codename)) if system == "debian" => Ok(codename),
        _ => bail!("this system is not a release of Debian"),
    }
}

impl Root {
    /// Makes a root in the target directory, or uses that of an earlier run.
    ///
    /// # Errors
    ///
    /// It takes root, a Debian system and its archive, and a kernel that allows namespaces.
    pub(crate) fn make() -> Result<Self> {
        if !can_install() {
            bail!("it takes root and apt-get");
        }
        let suite = suite()?;
        output_of(Command::new("unshare").args(["--mount", "--pid", "--fork", "true"]))?;
        if !is_installed("debootstrap") {
            apt::install(&["debootstrap"], &Sources::Usual)?;
        }
        let directory = target_directory().join("bare");
        fs::create_dir_all(&directory)?;
        let root = directory.join(&suite);
        if !root.is_dir() {
            let new = directory.join("new");
            remove(&new)?;
            let mut make = Command::new("debootstrap");
            make.args(["--variant=minbase", TOOLS, &suite]).arg(&new).stdout(Stdio::null());
            run_step("bare", &mut make)?;
            fs::rename(&new, &root).context("the bare root")?;
        }
        Ok(Self(root))
    }

    /// Installs the tarball in one copy and the Debian package in another one, and uses the program
    /// in both.
    ///
    /// # Errors
    ///
    /// A package cannot be installed, or something in it does not work.
    pub(crate) fn check(&self, tarball: &Path, deb: Option<&Path>) -> Result<()> {
        let unpack = "tar -C /usr/local --strip-components=1 -xzf /package";
        try_out(&self.0, "tarball", tarball, unpack, "/usr/local")?;
        let Some(deb) = deb else { return Ok(()) };
        try_out(&self.0, "deb", deb, "dpkg --install /package", "/usr")
    }
}

/// Runs `install` and the script in a copy of a root, which is removed if everything works.
fn try_out(fresh: &Path, name: &str, package: &Path, install: &str, prefix: &str) -> Result<()> {
    let root = &fresh.with_file_name(name);
    remove(root)?;
    run_step("bare", Command::new("cp").args(["-a", "--reflink=auto"]).arg(fresh).arg(root))?;
    fs::copy(package, root.join("package"))?;
    fs::write(root.join("script"), SCRIPT)?;
    let command = format!("{install} && sh /script {prefix}");
    run_step("bare", in_root(root).args(["sh", "-exc", &command]))?;
    remove(root)
}

/// A command in a root, in namespaces of its own: what it starts ends with it.
fn in_root(root: &Path) -> Command {
    let mut command = Command::new("unshare");
    command.args(["--mount", "--pid", "--fork", "--kill-child"]);
    command.arg(format!("--mount-proc={}", root.join("proc").display()));
    command.arg("chroot").arg(root).env_clear();
    command.env("PATH", "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin");
    command
}

/// Removes a root, unless something is mounted in it.
fn remove(root: &Path) -> Result<()> {
    if !root.exists() {
        return Ok(());
    }
    let mounts = fs::read_to_string("/proc/self/mounts").context("/proc/self/mounts")?;
    if let Some(mount) = mounts.lines().find(|line| line.contains(&*root.to_string_lossy())) {
        bail!("something is mounted in {}: {mount}", root.display());
    }
    fs::remove_dir_all(root).with_context(|| format!("cannot remove {}", root.display()))
}
