//! SeaweedFS, which `cargo xtask peers` installs: the store of the group `objects`.
//!
//! It runs on loopback, with its data in the directory of the group. It is not a child of the
//! benchmark, or its CPU time would be counted as that of the client.

use std::fs;
use std::net::TcpStream;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::lab::Lab;
use super::seaweedfs::{PATIENCE, answers, arguments, ask, free_ports, make_bucket, s3, sockets};
use super::{interrupt, process, running};

const KEY_ID: &str = "AKIABENCH";
const SECRET: &str = "s3cr3t";
/// Everybody may read, so that clients without signatures can be compared.
const IDENTITIES: &str = r#"{"identities":[
    {"name":"bench","actions":["Admin"],"credentials":[{"accessKey":"AKIABENCH","secretKey":"s3cr3t"}]},
    {"name":"anonymous","actions":["Read"]}]}"#;

/// A running store with the bucket `bucket`.
#[derive(Debug)]
pub(crate) struct ObjectStore {
    /// The port for clients: of the store, or of the proxy before it.
    port: u16,
    // They end before the sockets are removed.
    processes: Vec<Daemon>,
    _sockets: Sockets,
}

impl ObjectStore {
    /// Starts the store on the data in a directory of the lab. With a delay, clients get each reply
    /// so many milliseconds later.
    ///
    /// # Errors
    ///
    /// The store is not installed, or does not start.
    pub(crate) fn start(lab: &Lab<'_>, name: &str, delay: u32) -> Result<Self> {
        let program = lab.target_directory.join("seaweedfs/bin/weed");
        if !program.is_file() {
            bail!("SeaweedFS is missing; `cargo xtask peers` installs it");
        }
        let directory = lab.file(name);
        fs::create_dir_all(&directory).with_context(|| directory.display().to_string())?;
        fs::write(directory.join("s3.json"), IDENTITIES)?;
        let ports = free_ports::<9>()?;
        let mut arguments = vec![program.display().to_string()];
        arguments.extend(self::arguments(&directory, &ports));
        let sockets = Sockets::noted_in(benchmark_directory(lab)?, sockets(&ports))?;
        let store = Daemon::start(lab, "store", &arguments)?;
        let mut running = Self { port: s3(&ports), processes: vec![store], _sockets: sockets };
        // The bucket may be there from an earlier block.
        let has_bucket = || make_bucket(&ports).is_ok_and(|it| ["201", "409"].contains(&&*it));
        let is_ready = wait(has_bucket).and_then(|()| wait(|| answers(&ports)));
        is_ready.with_context(|| {
            let log = fs::read_to_string(lab.file("store.log")).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(3).collect();
            format!("the store does not start: {}", last.join("; "))
        })?;
        if delay > 0 {
            let proxy = ports[8];
            let program = lab.target_directory.join("dist/delay").display().to_string();
            let arguments = [program, local(proxy), local(running.port), delay.to_string()];
            running.processes.push(Daemon::start(lab, "delay", &arguments)?);
            running.port = proxy;
            wait(|| TcpStream::connect(("127.0.0.1", proxy)).is_ok())?;
        }
        Ok(running)
    }

    /// Waits until an object can be read: a store that has just started does not find its data yet.
    ///
    /// # Errors
    ///
    /// It cannot be read.
    pub(crate) fn wait_for(&self, key: &str) -> Result<()> {
        let request = format!("GET /bucket/{key}");
        wait(|| ask(self.port, &request).is_ok_and(|it| it == "200"))
    }

    /// The address without the scheme.
    pub(crate) fn address(&self) -> String {
        local(self.port)
    }

    /// Gives a program the keys of the store, and its address where it knows that variable.
    pub(crate) fn allow(&self, lab: &Lab<'_>, command: &mut Command) {
        command.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET);
        command.env("AWS_ENDPOINT_URL", format!("http://{}", self.address()));
        command.env_remove("AWS_PROFILE").env("HOME", lab.directory);
        // What clients keep from run to run would make the later ones faster.
        drop(fs::remove_dir_all(lab.file("cache")));
        for name in ["CACHE_DIRECTORY", "XDG_STATE_HOME", "RESTIC_CACHE_DIR"] {
            command.env(name, lab.file("cache"));
        }
    }
}

/// Returns the directory where the benchmark looks, after a signal, for processes to end and for
/// sockets to remove.
fn benchmark_directory<'a>(lab: &Lab<'a>) -> Result<&'a Path> {
    lab.directory.parent().context("a directory of the benchmark")
}

/// A process that is not a child. It is ended when this is dropped.
#[derive(Debug)]
struct Daemon {
    process: u32,
    file: PathBuf,
}

impl Daemon {
    fn start(lab: &Lab<'_>, name: &str, arguments: &[String]) -> Result<Self> {
        let file = benchmark_directory(lab)?.join(format!("{name}.pid"));
        let mut shell = Command::new("sh");
        shell.args([
            "-c",
            r#"file=$1 log=$2; shift 2; "$@" </dev/null >"$log" 2>&1 & echo $! >"$file""#,
        ]);
        shell.arg("sh").arg(&file).arg(lab.file(&format!("{name}.log"))).args(arguments);
        process::run_to_end(shell.current_dir(lab.directory).stdin(Stdio::null()))?;
        let process = running::read_process_id(&file).context("a process without an id")?;
        Ok(Self { process, file })
    }
}

impl Drop for Daemon {
    fn drop(&mut self) {
        running::end_all(&[self.process]);
        drop(fs::remove_file(&self.file));
    }
}

/// The sockets that a store makes outside of the benchmark's directory, noted in a file there. They
/// are removed when this is dropped, or after a signal.
#[derive(Debug)]
struct Sockets(PathBuf);

impl Sockets {
    fn noted_in(directory: &Path, paths: Vec<String>) -> Result<Self> {
        let list = directory.join("store.sockets");
        fs::write(&list, paths.join("\n")).with_context(|| list.display().to_string())?;
        Ok(Self(list))
    }
}

impl Drop for Sockets {
    fn drop(&mut self) {
        interrupt::remove_listed(&self.0);
    }
}

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn wait(mut is_done: impl FnMut() -> bool) -> Result<()> {
    let start = Instant::now();
    while !is_done() {
        if start.elapsed() > PATIENCE {
            bail!("it does not answer");
        }
        std::thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_store_that_ended_leaves_no_sockets() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("grpc.sock");
        let socket = std::os::unix::net::UnixListener::bind(&path).expect("a socket");
        let paths = vec!["/missing/grpc.sock".into(), path.display().to_string()];
        let sockets = Sockets::noted_in(directory.path(), paths).expect("room");
        drop((ObjectStore { port: 0, processes: Vec::new(), _sockets: sockets }, socket));
        assert_eq!(fs::read_dir(directory.path()).expect("a directory").count(), 0);
    }
}
