//! The group `tls`: the raw file over TLS, with certificates and with pre-shared keys.
//!
//! fio accepts no credentials, so nbdcopy reads sequentially and qemu-io at distant places. Both
//! use GnuTLS. This group replaces its settings so that every server is offered the same single
//! cipher, and only the servers differ.

use std::fs::{self, Permissions};
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Result, bail};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, OURS};
use super::data::DataFile;
use super::group::Group;
use super::lab::Lab;
use super::nbdcopy;
use super::options::Options;
use super::process::run_to_end;
use super::workload::ClientResult;
use crate::command::output_of;

/// This group.
pub(crate) const GROUP: Group = Group { name: "tls", contests, bars, prepare };

/// Names in the group's directory.
const DISK: &str = "disk.img";
const KEYS: &str = "keys.psk";
const CLIENT_SETTINGS: &str = "gnutls.conf";
const REQUESTS: &str = "requests";

/// Leaves AES-128-GCM.
const ONE_CIPHER: &str = "[overrides]\n\
    tls-disabled-cipher = aes-256-gcm\n\
    tls-disabled-cipher = chacha20-poly1305\n\
    tls-disabled-cipher = aes-256-ccm\n\
    tls-disabled-cipher = aes-128-ccm\n\
    tls-disabled-cipher = aes-256-cbc\n\
    tls-disabled-cipher = aes-128-cbc\n";
/// Distance between the requests of the random row, in bytes: near the golden section of a GiB, so
/// that no request is close to a recent one.
const STRIDE: u64 = 663_609_344;
/// Requests of one run of the random row.
const SMALL_REQUESTS: u64 = 20_000;
const SMALL_BYTES: u64 = 4096;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    X509,
    Psk,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Work {
    /// nbdcopy to `null:`, in requests of 256 KiB.
    Copy { connections: u32 },
    /// 4 KiB at distant places.
    RandomRead,
}

/// Name, credentials, work.
const ROWS: &[(&str, Kind, Work)] = &[
    ("tls-x509-read-256k-c1", Kind::X509, Work::Copy { connections: 1 }),
    ("tls-x509-read-256k-c4", Kind::X509, Work::Copy { connections: 4 }),
    ("tls-x509-randread-4k-qd16", Kind::X509, Work::RandomRead),
    ("tls-psk-read-256k-c1", Kind::Psk, Work::Copy { connections: 1 }),
    ("tls-psk-randread-4k-qd16", Kind::Psk, Work::RandomRead),
];

#[derive(Debug, Clone, Copy)]
enum Server {
    Ours,
    QemuNbd,
    Nbdkit,
}

fn contests(_: &Options) -> Vec<Contest> {
    let contender = |name, server, kind, work| Contender {
        name,
        measure: Box::new(move |lab: &Lab<'_>| {
            lab.settle(DISK)?;
            lab.serve_and_run(server_command(lab, server, kind), |_| run(lab, kind, work))
        }),
    };
    let contest = |&(name, kind, work): &(&str, Kind, Work)| Contest {
        name: name.to_owned(),
        throughput_unit: if work == Work::RandomRead { "IOPS" } else { "MiB/s" },
        work_name: if work == Work::RandomRead { "request" } else { "MiB" },
        contenders: vec![
            contender(OURS, Server::Ours, kind, work),
            contender("qemu-nbd", Server::QemuNbd, kind, work),
            contender("nbdkit", Server::Nbdkit, kind, work),
        ],
    };
    ROWS.iter().map(contest).collect()
}

/// Sequential reads cost half of what they cost the best peer.
fn bars() -> Vec<ContestBar> {
    let sequential = ROWS.iter().filter(|(_, _, work)| *work != Work::RandomRead);
    let bar = |row: &str, limit| ContestBar {
        row: row.to_owned(),
        against: Against::BestPeerPerCore,
        limit: Limit::AtLeast(limit),
    };
    sequential.map(|(name, _, _)| bar(name, 2.0)).collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    DataFile::create(lab.file(DISK), lab.options.size, lab.options.page_cache)?;
    fs::write(lab.file(CLIENT_SETTINGS), ONE_CIPHER)?;
    fs::write(lab.file(REQUESTS), requests(lab.options.size))?;
    fs::write(lab.file(KEYS), "bench:000102030405060708090a0b0c0d0e0f\n")?;
    fs::set_permissions(lab.file(KEYS), Permissions::from_mode(0o600))?;
    make_certificates(lab.directory)
}

/// An authority, and one certificate for both sides.
fn make_certificates(directory: &Path) -> Result<()> {
    let path = |name: &str| directory.join(name);
    let template = "cn = localhost\nca\ncert_signing_key\nsigning_key\nencryption_key\n\
                    tls_www_server\ntls_www_client\ndns_name = localhost\n";
    fs::write(path("template"), template)?;
    let certtool = |arguments: &[&str], output: &str| -> Result<()> {
        let mut command = Command::new("certtool");
        command.args(arguments).arg("--outfile").arg(path(output)).current_dir(directory);
        run_to_end(&mut command).map(drop)
    };
    certtool(&["--generate-privkey", "--bits=2048"], "ca-key.pem")?;
    certtool(
        &["--generate-self-signed", "--load-privkey=ca-key.pem", "--template=template"],
        "ca-cert.pem",
    )?;
    let template = fs::read_to_string(path("template"))?.replace("ca\ncert_signing_key\n", "");
    fs::write(path("template"), template)?;
    for role in ["server", "client"] {
        let key = format!("{role}-key.pem");
        certtool(&["--generate-privkey", "--bits=2048"], &key)?;
        certtool(
            &[
                "--generate-certificate",
                &format!("--load-privkey={key}"),
                "--load-ca-certificate=ca-cert.pem",
                "--load-ca-privkey=ca-key.pem",
                "--template=template",
            ],
            &format!("{role}-cert.pem"),
        )?;
    }
    Ok(())
}

fn server_command(lab: &Lab<'_>, server: Server, kind: Kind) -> Command {
    let (directory, keys, disk) = (lab.directory.display(), lab.file(KEYS), lab.file(DISK));
    match server {
        Server::Ours => {
            let mut command = lab.nbd_cli();
            command.arg("serve").arg(disk).arg("--socket").arg(lab.socket());
            match kind {
                Kind::X509 => command.arg("--tls-certificates").arg(lab.directory),
                Kind::Psk => command.arg("--tls-psk").arg(keys),
            };
            command
        }
        Server::QemuNbd => {
            let object = match kind {
                Kind::X509 => format!("tls-creds-x509,id=tls,endpoint=server,dir={directory}"),
                Kind::Psk => format!("tls-creds-psk,id=tls,endpoint=server,dir={directory}"),
            };
            let mut command = Command::new("qemu-nbd");
            command.args(["--object", &object, "--tls-creds=tls", "-f", "raw", "-t", "-e", "16"]);
            command.arg("-k").arg(lab.socket()).arg(disk);
            command
        }
        Server::Nbdkit => {
            let mut command = Command::new("nbdkit");
            command.args(["-f", "--tls=require", "-U"]).arg(lab.socket());
            match kind {
                Kind::X509 => {
                    command.arg(format!("--tls-certificates={directory}")).arg("--tls-verify-peer")
                }
                Kind::Psk => command.arg(format!("--tls-psk={}", keys.display())),
            };
            command.arg("file").arg(disk);
            command
        }
    }
}

fn run(lab: &Lab<'_>, kind: Kind, work: Work) -> Result<ClientResult> {
    match work {
        Work::Copy { connections } => {
            let settings = lab.file(CLIENT_SETTINGS);
            let prepared = |command: &mut Command| {
                command.env("GNUTLS_SYSTEM_PRIORITY_FILE", &settings);
            };
            let (size, seconds) = (lab.options.size, lab.options.seconds);
            nbdcopy::run_with(&uri(lab, kind), connections, size, seconds, prepared)
        }
        Work::RandomRead => random_read(lab, kind),
    }
}

fn uri(lab: &Lab<'_>, kind: Kind) -> String {
    let (socket, directory) = (lab.socket(), lab.directory.display());
    let socket = socket.display();
    match kind {
        Kind::X509 => format!(
            "nbds+unix:///?socket={socket}&tls-certificates={directory}&tls-hostname=localhost"
        ),
        Kind::Psk => {
            format!("nbds+unix://bench@/?socket={socket}&tls-psk-file={directory}/{KEYS}")
        }
    }
}

/// Runs qemu-io repeatedly until the time is over.
fn random_read(lab: &Lab<'_>, kind: Kind) -> Result<ClientResult> {
    let (object, hostname) = match kind {
        Kind::X509 => ("tls-creds-x509", ",file.tls-hostname=localhost"),
        Kind::Psk => ("tls-creds-psk,username=bench", ""),
    };
    let object = format!("{object},id=tls,endpoint=client,dir={}", lab.directory.display());
    let image = format!(
        "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={},\
         file.tls-creds=tls{hostname}",
        lab.socket().display()
    );
    let start = Instant::now();
    let mut requests = 0;
    while requests == 0 || start.elapsed() < Duration::from_secs(lab.options.seconds) {
        // qemu-io takes its requests from standard input.
        let mut command = Command::new("sh");
        command.env("GNUTLS_SYSTEM_PRIORITY_FILE", lab.file(CLIENT_SETTINGS));
        command.args(["-c", "exec qemu-io \"$@\" < \"$0\""]).arg(lab.file(REQUESTS));
        command.args(["-r", "-n", "--object", &object, "--image-opts", &image]);
        let output = output_of(&mut command)?;
        if output.contains("failed") {
            bail!("a read failed");
        }
        requests += SMALL_REQUESTS;
    }
    Ok(ClientResult::timed(requests as f64, start.elapsed()))
}

/// Read requests for qemu-io. Its NBD client keeps 16 of them in flight.
fn requests(size: u64) -> String {
    let places = (0..SMALL_REQUESTS).map(|number| number * STRIDE % size);
    let mut text: String =
        places.map(|place| format!("aio_read -q {place} {SMALL_BYTES}\n")).collect();
    text.push_str("aio_flush\n");
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn requests_of_the_random_row_are_aligned_and_far_apart() {
        assert_eq!(STRIDE % SMALL_BYTES, 0);
        let size = 1_u64 << 30;
        let mut places: Vec<u64> = (0..10_000).map(|n| n * STRIDE % size / SMALL_BYTES).collect();
        places.sort_unstable();
        places.dedup();
        assert_eq!(places.len(), 10_000);
        let text = requests(size);
        assert_eq!(text.lines().count() as u64, SMALL_REQUESTS + 1);
        assert!(text.starts_with("aio_read -q 0 4096\naio_read -q 663609344 4096\n"), "{text}");
    }
}
