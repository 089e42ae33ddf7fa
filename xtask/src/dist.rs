//! `cargo xtask dist`: a tarball and a Debian package.
//!
//! Both contain the same tree: the program, its names in place of qemu-nbd and qemu-img, manual
//! pages, completions, unit files and documents. The tree stays in the directory, for packagers of
//! other systems.

use std::env;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};
use clap::Args;

use crate::command::{cargo, is_installed, output_of, run_step, workspace_root};
use crate::{bare, compatibility, install, man};

/// The profile of what is shipped.
const PROFILE: &str = "dist";

/// What makes Debian packages, installed in the target directory where the user has none.
const CARGO_DEB: [&str; 3] = ["cargo-deb", "--version", "3.8.0"];

/// The tools of QEMU in whose place the program can stand, under their names.
const QEMU_NAMES: [&str; 2] = ["qemu-img", "qemu-nbd"];

/// The bound on the shipped program, in bytes.
const LARGEST_PROGRAM: u64 = 12 << 20;

/// The shells, and the paths of their completions below `share`.
const COMPLETIONS: &[(&str, &str)] = &[
    ("bash", "bash-completion/completions/nbd-cli"),
    ("zsh", "zsh/site-functions/_nbd-cli"),
    ("fish", "fish/vendor_completions.d/nbd-cli.fish"),
];

/// Files of the workspace that belong to the program's documents.
const DOCUMENTS: &[&str] =
    &["README.md", "CHANGELOG.md", "SECURITY.md", "LICENSE-MIT", "LICENSE-APACHE"];

/// Directories of the workspace whose files are shipped, and their places in the tree.
const DIRECTORIES: &[(&str, &str)] =
    &[("docs", "share/doc/nbd-cli/docs"), ("packaging/systemd", "lib/systemd/system")];

/// Arguments of `cargo xtask dist`.
#[derive(Debug, Args)]
pub(crate) struct Options {
    /// Build OpenSSL from its source even where the system has it. The bound on the size of the
    /// program is not checked then.
    #[arg(long)]
    vendored: bool,
    /// Make no Debian package.
    #[arg(long)]
    no_deb: bool,
    /// Install both packages in bare Debian roots, and use the program there. This takes root, a
    /// Debian system and its archive.
    #[arg(long)]
    bare: bool,
    /// The profile of the program. The bound on its size is checked for the default only.
    #[arg(long, default_value = PROFILE)]
    profile: String,
}

impl Options {
    /// The options of continuous integration: it packs the program that the tests have built
    /// already.
    fn continuous_integration() -> Self {
        Self { vendored: true, no_deb: false, bare: false, profile: "dev".into() }
    }
}

/// Builds the program, collects its files, and packs them.
///
/// # Errors
///
/// A build fails, the program is larger than what may be shipped, a file cannot be written, or a
/// package does not work in a bare root.
pub(crate) fn run(options: &Options) -> Result<()> {
    let root = options.bare.then(bare::Root::make).transpose().context("--bare")?;
    run_in(options, root.as_ref())
}

/// As [`run`] in continuous integration. Where no bare root can be made, because the archive cannot
/// be reached or the system does not allow it, the packages are not tried in one.
///
/// # Errors
///
/// As [`run`].
pub(crate) fn run_continuous_integration() -> Result<()> {
    let root = bare::Root::make();
    if let Err(why) = &root {
        println!("==> package: not tried in a bare Debian root: {why:#}");
    }
    run_in(&Options::continuous_integration(), root.ok().as_ref())
}

fn run_in(options: &Options, root: Option<&bare::Root>) -> Result<()> {
    let mut build = cargo();
    build.args(["build", "--locked", "--package", "nbd-cli", "--profile", &options.profile]);
    let vendored = options.vendored || !install::system_has_openssl();
    install::choose_openssl(&mut build, vendored);
    if options.profile == PROFILE {
        leave_out_paths(&mut build);
        leave_out_strategies(&mut build);
    }
    run_step("build", &mut build)?;

    let target = compatibility::target_directory();
    // The directory of the profile `dev` has another name.
    let built = if options.profile == "dev" { "debug" } else { &options.profile };
    let program = target.join(built).join("nbd-cli");
    // This ignores a target directory of the user's choice, because the metadata of the Debian
    // package names the path.
    let packages = workspace_root().join("target/packages");
    let name = format!("nbd-cli-{}-{}", env!("CARGO_PKG_VERSION"), platform());
    let tree = packages.join(&name);
    gather(&program, &tree)?;
    try_out(&tree)?;
    if options.profile == PROFILE {
        check_paths(&tree.join("bin/nbd-cli"))?;
    }
    if options.profile == PROFILE && !vendored {
        check_size(&tree.join("bin/nbd-cli"))?;
    }
    let tarball = pack(&packages, &name)?;
    println!("==> {}", tarball.display());
    let make_deb = || debian_package(&packages, &tree, &options.profile);
    let deb = (!options.no_deb).then(make_deb).transpose()?;
    if let Some(deb) = &deb {
        println!("==> {}", deb.display());
    }
    root.map_or(Ok(()), |root| root.check(&tarball, deb.as_deref()))
}

/// The machine and the C library that the program is built for, such as `x86_64-linux-gnu`.
fn platform() -> String {
    let library = if cfg!(target_env = "musl") { "musl" } else { "gnu" };
    format!("{}-{}-{library}", env::consts::ARCH, env::consts::OS)
}

/// Makes the tree that both packages contain, in place of an earlier one.
fn gather(program: &Path, tree: &Path) -> Result<()> {
    if tree.exists() {
        fs::remove_dir_all(tree).with_context(|| format!("cannot remove {}", tree.display()))?;
    }
    let at = |path: &str| -> Result<PathBuf> {
        let path = tree.join(path);
        let directory = path.parent().context("a path in the tree has a directory")?;
        fs::create_dir_all(directory)
            .with_context(|| format!("cannot make {}", directory.display()))?;
        Ok(path)
    };
    let shipped = at("bin/nbd-cli")?;
    let mut strip = Command::new("objcopy");
    run_step("strip", strip.arg("--strip-all").arg(program).arg(&shipped))?;
    // The names are not beside the program, where a package of QEMU has files of these names.
    for name in QEMU_NAMES {
        symlink("../../bin/nbd-cli", at(&format!("lib/nbd-cli/{name}"))?)?;
    }
    for (shell, path) in COMPLETIONS {
        let script = output_of(Command::new(&shipped).args(["completions", shell]))?;
        fs::write(at(&format!("share/{path}"))?, script)?;
    }
    man::write(&tree.join("share/man/man1"))?;
    let root = workspace_root();
    for document in DOCUMENTS {
        fs::copy(root.join(document), at(&format!("share/doc/nbd-cli/{document}"))?)?;
    }
    for (from, to) in DIRECTORIES {
        for file in files_in(&root.join(from))? {
            let name = file.file_name().context("a file has a name")?.to_string_lossy();
            fs::copy(&file, at(&format!("{to}/{name}"))?)?;
        }
    }
    Ok(())
}

/// Runs the program of the tree by all of its names.
fn try_out(tree: &Path) -> Result<()> {
    let others = QEMU_NAMES.map(|name| (format!("lib/nbd-cli/{name}"), name));
    for (path, expected) in [("bin/nbd-cli".to_owned(), "nbd-cli")].into_iter().chain(others) {
        let version = output_of(Command::new(tree.join(&path)).arg("--version"))?;
        if !version.starts_with(expected) {
            bail!("{path} --version prints {:?}", version.trim());
        }
    }
    Ok(())
}

/// The regular files of a directory, sorted.
fn files_in(directory: &Path) -> Result<Vec<PathBuf>> {
    let entries = fs::read_dir(directory)
        .with_context(|| format!("cannot list {}", directory.display()))?
        .collect::<Result<Vec<_>, _>>()?;
    let mut files: Vec<_> = entries.iter().map(|entry| entry.path()).collect();
    files.retain(|path| path.is_file());
    files.sort();
    Ok(files)
}

/// Keeps the folder of other people's crates on this machine out of the program: it tells who has
/// built it, and takes 23 kB. Flags of a configuration file are not used then; those of the
/// environment are.
fn leave_out_paths(build: &mut Command) {
    const SEPARATOR: &str = "\x1f";
    let Ok(registries) = fs::read_dir(registries()) else { return };
    let mut flags = env::var_os("CARGO_ENCODED_RUSTFLAGS").unwrap_or_else(|| {
        let plain = env::var("RUSTFLAGS").unwrap_or_default();
        plain.split_whitespace().collect::<Vec<_>>().join(SEPARATOR).into()
    });
    for registry in registries.flatten() {
        if !flags.is_empty() {
            flags.push(SEPARATOR);
        }
        flags.push("--remap-path-prefix=");
        flags.push(registry.path());
        flags.push("=");
    }
    build.env("CARGO_ENCODED_RUSTFLAGS", flags);
}

/// Leaves the strategies of zstd out that are for its higher levels: the program compresses at
/// levels 1 (`nbd-cli/objects`) and 3 (`imgfmt`), whose strategy is `ZSTD_dfast` at most. What it
/// decompresses may have been compressed by any strategy.
fn leave_out_strategies(build: &mut Command) {
    let mut flags = env::var_os("CFLAGS").unwrap_or_default();
    for strategy in ["GREEDY", "LAZY", "LAZY2", "BTLAZY2", "BTOPT", "BTULTRA"] {
        flags.push(format!(" -DZSTD_EXCLUDE_{strategy}_BLOCK_COMPRESSOR"));
    }
    build.env("CFLAGS", flags);
}

/// The folder with the sources of other people's crates.
fn registries() -> PathBuf {
    let home = env::var_os("CARGO_HOME").map(PathBuf::from);
    let home = home.or_else(|| env::home_dir().map(|home| home.join(".cargo"))).unwrap_or_default();
    home.join("registry/src")
}

/// Fails if the program names the folder that [`leave_out_paths`] leaves out.
fn check_paths(program: &Path) -> Result<()> {
    let (text, folder) = (fs::read(program).context("the program")?, registries());
    let folder = folder.as_os_str().as_encoded_bytes();
    ensure!(
        !text.windows(folder.len()).any(|part| part == folder),
        "the program names {}, which tells who has built it",
        registries().display()
    );
    Ok(())
}

fn check_size(program: &Path) -> Result<()> {
    let size = fs::metadata(program).context("the program")?.len();
    println!("==> size: {:.1} MiB", size as f64 / f64::from(1 << 20));
    if size > LARGEST_PROGRAM {
        bail!("the program has {size} bytes, more than the {LARGEST_PROGRAM} that may be shipped");
    }
    Ok(())
}

/// Packs the tree; two runs over the same files give the same bytes.
fn pack(packages: &Path, name: &str) -> Result<PathBuf> {
    let tarball = packages.join(format!("{name}.tar.gz"));
    let mut tar = Command::new("tar");
    tar.current_dir(packages).args(["--sort=name", "--owner=0", "--group=0", "--numeric-owner"]);
    tar.args(["--mtime=@0", "--use-compress-program=gzip -9n", "--create", "--file"]);
    run_step("tarball", tar.arg(&tarball).arg(name))?;
    Ok(tarball)
}

/// Makes the Debian package by the metadata in `nbd-cli/Cargo.toml`, whose paths begin at `tree`.
fn debian_package(packages: &Path, tree: &Path, profile: &str) -> Result<PathBuf> {
    // The metadata cannot name the version, so it finds the tree by a name without one.
    let link = packages.join("tree");
    if link.symlink_metadata().is_ok() {
        fs::remove_file(&link).with_context(|| format!("cannot remove {}", link.display()))?;
    }
    symlink(tree, &link)?;
    let package = packages.join("nbd-cli.deb");
    let target = compatibility::target_directory();
    let mut deb = cargo();
    if !is_installed(CARGO_DEB[0]) {
        let tools = target.join("tools");
        let mut install = cargo();
        install.args(["install", "--locked", "--root"]).arg(&tools).args(CARGO_DEB);
        run_step("cargo-deb", &mut install)?;
        let others = env::var_os("PATH").unwrap_or_default();
        let all = [tools.join("bin")].into_iter().chain(env::split_paths(&others));
        deb.env("PATH", env::join_paths(all)?);
    }
    deb.args(["deb", "--no-build", "--no-strip", "--package", "nbd-cli", "--profile", profile]);
    if profile != PROFILE {
        deb.arg("--fast");
    }
    run_step("deb", deb.arg("--output").arg(&package))?;
    Ok(package)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The source paths among the assets of the Debian package.
    fn assets(manifest: &str) -> Vec<&str> {
        let lines = manifest.lines().map(str::trim);
        lines
            .filter_map(|line| line.strip_prefix("[\"../target/packages/tree/"))
            .filter_map(|line| line.split('"').next())
            .collect()
    }

    #[test]
    fn the_debian_package_takes_every_directory_of_the_tree_and_no_other() {
        let manifest = fs::read_to_string(workspace_root().join("nbd-cli/Cargo.toml"));
        let manifest = manifest.expect("the manifest of the program");
        let mut taken: Vec<_> = assets(&manifest)
            .into_iter()
            .map(|path| path.rsplit_once('/').map_or("", |(directory, _)| directory).to_owned())
            .collect();
        taken.sort();
        let completions = COMPLETIONS.iter().map(|(_, path)| format!("share/{path}"));
        let directories = DIRECTORIES.iter().map(|(_, path)| format!("{path}/x"));
        let others =
            ["bin/nbd-cli", "lib/nbd-cli/qemu-nbd", "share/man/man1/x", "share/doc/nbd-cli/x"];
        let files = completions.chain(directories).chain(others.map(str::to_owned));
        let mut made: Vec<_> =
            files.filter_map(|path| Some(path.rsplit_once('/')?.0.to_owned())).collect();
        made.sort();
        assert_eq!(taken, made);
    }
}
