//! SeaweedFS, which `cargo xtask peers` installs: the store of the group `objects`.
//!
//! It runs on loopback, with its data in the directory of the group. It is not a child of the
//! benchmark, or its CPU time would be counted as that of the client.

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};

use super::lab::Lab;
use super::{process, running};

const KEY_ID: &str = "AKIABENCH";
const SECRET: &str = "s3cr3t";
/// How long the store may take to start.
const PATIENCE: Duration = Duration::from_secs(30);
/// Everybody may read, so that clients without signatures can be compared.
const IDENTITIES: &str = r#"{"identities":[
    {"name":"bench","actions":["Admin"],"credentials":[{"accessKey":"AKIABENCH","secretKey":"s3cr3t"}]},
    {"name":"anonymous","actions":["Read"]}]}"#;

/// A running store with the bucket `bucket`.
#[derive(Debug)]
pub(crate) struct ObjectStore {
    /// The address for clients: of the store, or of the proxy before it.
    address: String,
    processes: Vec<Daemon>,
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
        let ports = free_ports()?;
        let mut arguments = vec![program.display().to_string()];
        arguments.extend(self::arguments(&directory, ports));
        let store = Daemon::start(lab, "store", &arguments)?;
        let mut running = Self { address: local(ports[6]), processes: vec![store] };
        wait_until_ready(ports).with_context(|| {
            let log = fs::read_to_string(lab.file("store.log")).unwrap_or_default();
            let last: Vec<_> = log.lines().rev().take(3).collect();
            format!("the store does not start: {}", last.join("; "))
        })?;
        if delay > 0 {
            let proxy = local(ports[8]);
            let program = lab.target_directory.join("dist/delay").display().to_string();
            let arguments = [program, proxy.clone(), running.address, delay.to_string()];
            running.processes.push(Daemon::start(lab, "delay", &arguments)?);
            running.address = proxy;
            wait(|| TcpStream::connect(&running.address).is_ok())?;
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
        wait(|| ask(&self.address, &request).is_ok_and(|it| it == "200"))
    }

    /// The address without the scheme.
    pub(crate) fn address(&self) -> &str {
        &self.address
    }

    /// Gives a program the keys of the store, and its address where it knows that variable.
    pub(crate) fn allow(&self, lab: &Lab<'_>, command: &mut Command) {
        command.env("AWS_ACCESS_KEY_ID", KEY_ID).env("AWS_SECRET_ACCESS_KEY", SECRET);
        command.env("AWS_ENDPOINT_URL", format!("http://{}", self.address));
        command.env_remove("AWS_PROFILE").env("HOME", lab.directory);
        // What clients keep from run to run would make the later ones faster.
        drop(fs::remove_dir_all(lab.file("cache")));
        for name in ["CACHE_DIRECTORY", "XDG_STATE_HOME", "RESTIC_CACHE_DIR"] {
            command.env(name, lab.file("cache"));
        }
    }
}

/// A process that is not a child. It is ended when this is dropped.
#[derive(Debug)]
struct Daemon {
    process: u32,
    file: PathBuf,
}

impl Daemon {
    fn start(lab: &Lab<'_>, name: &str, arguments: &[String]) -> Result<Self> {
        // Where the benchmark looks for processes that it has to end after a signal.
        let directory = lab.directory.parent().context("a directory of the benchmark")?;
        let file = directory.join(format!("{name}.pid"));
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

fn local(port: u16) -> String {
    format!("127.0.0.1:{port}")
}

fn free_ports() -> Result<[u16; 9]> {
    let mut listeners = Vec::new();
    let mut ports = [0; 9];
    for port in &mut ports {
        let listener = TcpListener::bind("127.0.0.1:0")?;
        *port = listener.local_addr()?.port();
        listeners.push(listener);
    }
    Ok(ports)
}

fn arguments(directory: &Path, ports: [u16; 9]) -> Vec<String> {
    let directory = directory.display();
    let mut arguments = vec![
        "-logtostderr".to_owned(),
        "server".to_owned(),
        format!("-dir={directory}"),
        format!("-filer.localSocket={directory}/filer"),
        format!("-s3.localSocket={directory}/s3"),
        format!("-s3.config={directory}/s3.json"),
    ];
    let names = ["master.port", "volume.port", "filer.port", "s3.port"]
        .map(|name| [name.to_owned(), name.to_owned() + ".grpc"]);
    arguments
        .extend(names.iter().flatten().zip(ports).map(|(name, port)| format!("-{name}={port}")));
    let others = [
        "-ip=127.0.0.1",
        "-ip.bind=127.0.0.1",
        "-filer",
        "-s3",
        "-s3.iam=false",
        "-s3.port.iceberg=0",
        "-s3.port.lance=0",
        "-master.telemetry=false",
        "-master.electionTimeout=1s",
        "-master.volumeSizeLimitMB=1024",
        "-volume.minFreeSpace=0",
        "-volume.max=100",
    ];
    arguments.extend(others.map(str::to_owned));
    arguments
}

/// Waits until the store has a bucket and answers.
fn wait_until_ready(ports: [u16; 9]) -> Result<()> {
    let is_made = || {
        // It may be there from an earlier block.
        ask(&local(ports[4]), "POST /buckets/bucket/")
            .is_ok_and(|it| ["201", "409"].contains(&&*it))
    };
    wait(is_made)?;
    wait(|| ask(&local(ports[6]), "GET /").is_ok_and(|it| it.starts_with(['2', '4'])))
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

/// The status of a reply.
fn ask(address: &str, request: &str) -> std::io::Result<String> {
    let mut stream = TcpStream::connect(address)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    write!(stream, "{request} HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Length: 0\r\n\r\n")?;
    let mut head = [0; 12];
    stream.read_exact(&mut head)?;
    Ok(String::from_utf8_lossy(&head[9..]).into_owned())
}
