//! The group `copy`: `nbd-cli copy` beside nbdcopy and `qemu-img convert`.
//!
//! The servers are nbdkit's in all rows, so only the clients differ: its file plugin as the source,
//! its memory plugin as the destination. Nothing is flushed, and a file that was written is removed
//! right after its block. CPU time is that of the client and of the servers. In the rows without
//! TLS the floor is a client of the least cost: what it takes is the cost of the servers and of the
//! kernel.

use std::fs::{self, File, Permissions};
use std::io::{Seek, SeekFrom, Write};
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result};

use super::bars::Limit;
use super::contest::{Against, Contender, Contest, ContestBar, FLOOR, OURS};
use super::data::XorShift;
use super::group::Group;
use super::lab::Lab;
use super::options::Options;
use super::process::run_to_end;
use super::running::RunningServer;
use super::sample::Sample;
use super::workload::ClientResult;

/// This group.
pub(crate) const GROUP: Group = Group { name: "copy", contests, bars, prepare };

const MEBIBYTE: u64 = 1 << 20;
const KEYS: &str = "keys.psk";
const TARGET: &str = "target.img";
/// The sparse disk is larger than the full one by this factor.
const LARGER: u64 = 10;
/// One of this many MiB of the sparse disk has data.
const SPARSENESS: u64 = 100;
/// Memory beside the data that a tool may use, in bytes.
const WARM_BEYOND: u64 = 256 << 20;
/// Our throughput and our work per CPU time, relative to the best peer.
const SPEED: f64 = 1.5;
const WORK: f64 = 1.43;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum End {
    File,
    Server,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Channel {
    Plain,
    Tls,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Disk {
    Full,
    Sparse,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Tool {
    Ours,
    Nbdcopy,
    QemuImg,
    Floor,
}

/// One row.
#[derive(Debug, Clone, Copy)]
struct Copy {
    from: End,
    to: End,
    disk: Disk,
    channel: Channel,
}

impl End {
    fn name(self) -> &'static str {
        match self {
            Self::File => "file",
            Self::Server => "server",
        }
    }
}

impl Disk {
    fn file(self) -> &'static str {
        match self {
            Self::Full => "full.img",
            Self::Sparse => "sparse.img",
        }
    }

    fn size(self, options: &Options) -> u64 {
        match self {
            Self::Full => options.size,
            Self::Sparse => options.size * LARGER,
        }
    }
}

/// Every pair of ends with both disks; with TLS where there is a server.
fn rows() -> Vec<Copy> {
    let mut rows = Vec::new();
    for channel in [Channel::Plain, Channel::Tls] {
        for (from, to) in [
            (End::Server, End::File),
            (End::File, End::Server),
            (End::Server, End::Server),
            (End::File, End::File),
        ] {
            let has_server = from == End::Server || to == End::Server;
            if channel == Channel::Plain || has_server {
                rows.extend([Disk::Full, Disk::Sparse].map(|disk| Copy {
                    from,
                    to,
                    disk,
                    channel,
                }));
            }
        }
    }
    rows
}

fn contests(_: &Options) -> Vec<Contest> {
    let contender = |name, copy: Copy, tool| Contender {
        name,
        measure: Box::new(move |lab: &Lab<'_>| copy.measure(lab, tool)),
    };
    let contest = |copy: Copy| {
        let mut contenders = vec![
            contender(OURS, copy, Tool::Ours),
            contender("nbdcopy", copy, Tool::Nbdcopy),
            contender("qemu-img", copy, Tool::QemuImg),
        ];
        contenders.extend(copy.has_floor().then(|| contender(FLOOR, copy, Tool::Floor)));
        let name = copy.name();
        Contest { name, throughput_unit: "MiB/s", work_name: "MiB", contenders }
    };
    rows().into_iter().map(contest).collect()
}

fn bars() -> Vec<ContestBar> {
    let bars = |copy: Copy| {
        [(Against::BestPeerUpToFloor, SPEED), (Against::BestPeerPerCoreUpToFloor, WORK)].map(
            |(against, limit)| ContestBar {
                row: copy.name(),
                against,
                limit: Limit::AtLeast(limit),
            },
        )
    };
    rows().into_iter().flat_map(bars).collect()
}

fn prepare(lab: &Lab<'_>) -> Result<()> {
    for (disk, every) in [(Disk::Full, 1), (Disk::Sparse, SPARSENESS)] {
        let path = lab.file(disk.file());
        fill(&path, disk.size(lab.options), every)
            .with_context(|| format!("cannot write {}", path.display()))?;
    }
    fs::write(lab.file(KEYS), "bench:000102030405060708090a0b0c0d0e0f\n")?;
    fs::set_permissions(lab.file(KEYS), Permissions::from_mode(0o600))?;
    Ok(())
}

/// Writes a disk of `size` bytes with random bytes in one MiB of `every`.
fn fill(path: &Path, size: u64, every: u64) -> std::io::Result<()> {
    let mut file = File::create(path)?;
    let mut random = XorShift::new();
    let mut buffer = vec![0; MEBIBYTE as usize];
    for offset in (0..size).step_by((MEBIBYTE * every) as usize) {
        random.fill(&mut buffer);
        file.seek(SeekFrom::Start(offset))?;
        file.write_all(&buffer)?;
    }
    file.set_len(size)?;
    file.sync_all()
}

impl Copy {
    fn name(&self) -> String {
        let disk = if self.disk == Disk::Full { "full" } else { "sparse" };
        let channel = if self.channel == Channel::Plain { "" } else { "-tls" };
        format!("copy-{}-{}-{disk}{channel}", self.from.name(), self.to.name())
    }

    fn measure(&self, lab: &Lab<'_>, tool: Tool) -> Result<Sample> {
        let size = self.disk.size(lab.options);
        lab.settle(self.disk.file())?;
        self.warm_memory(lab);
        let target = lab.file(TARGET);
        drop(fs::remove_file(&target));
        let sockets = self.sockets(lab);
        let mut servers = Vec::new();
        if let Some(socket) = &sockets[0] {
            let disk = lab.file(self.disk.file());
            let plugin = ["file".as_ref(), disk.as_os_str()];
            servers.push(self.serve(lab, socket, &plugin)?);
        }
        match &sockets[1] {
            Some(socket) => {
                let size = size.to_string();
                servers.push(self.serve(lab, socket, &["memory".as_ref(), size.as_ref()])?);
            }
            // Only qemu-img needs the file beforehand. Other clients replace it.
            None if tool == Tool::QemuImg => File::create(&target)?.set_len(size)?,
            None => {}
        }
        // The servers are children of this process as well, so the result contains their CPU time.
        let result = run_to_end(&mut self.command(lab, tool, &sockets));
        drop(fs::remove_file(&target));
        let (elapsed, usage) = result?;
        Ok(Sample::new(ClientResult::timed((size / MEBIBYTE) as f64, elapsed), usage))
    }

    /// Uses as much memory as the copy will, and gives it back. A virtual machine may have returned
    /// free memory to its host, which then has to find a page for each that is used again: that
    /// costs more than the copy, and hits one tool and not the next.
    fn warm_memory(&self, lab: &Lab<'_>) {
        let data = match self.disk {
            Disk::Full => self.disk.size(lab.options),
            Disk::Sparse => self.disk.size(lab.options) / SPARSENESS,
        };
        drop(std::hint::black_box(vec![1_u8; (data + WARM_BEYOND) as usize]));
    }

    /// The floor encrypts nothing.
    fn has_floor(&self) -> bool {
        self.channel == Channel::Plain
    }

    /// The sockets of the source and of the destination, where those are servers.
    fn sockets(&self, lab: &Lab<'_>) -> [Option<PathBuf>; 2] {
        [(self.from, "source.sock"), (self.to, "target.sock")]
            .map(|(end, name)| (end == End::Server).then(|| lab.file(name)))
    }

    fn serve(
        &self,
        lab: &Lab<'_>,
        socket: &Path,
        plugin: &[&std::ffi::OsStr],
    ) -> Result<RunningServer> {
        let mut command = Command::new("nbdkit");
        if self.channel == Channel::Tls {
            command.arg("--tls=require");
            command.arg(format!("--tls-psk={}", lab.file(KEYS).display()));
        }
        command.args(["-f", "-U"]).arg(socket).args(plugin);
        RunningServer::start(command, socket, "", None)
    }

    fn command(&self, lab: &Lab<'_>, tool: Tool, sockets: &[Option<PathBuf>; 2]) -> Command {
        let files = [lab.file(self.disk.file()), lab.file(TARGET)];
        let is_zero = self.to == End::Server;
        let [from, to] = [0, 1].map(|end| match (&sockets[end], tool) {
            (socket, Tool::QemuImg) => self.image_options(socket.as_deref(), &files[end]),
            (Some(socket), Tool::Floor) => socket.display().to_string(),
            (Some(socket), _) => self.uri(lab, socket),
            (None, _) => files[end].display().to_string(),
        });
        let mut command = match tool {
            Tool::Ours => {
                let mut command = lab.nbd_cli();
                command.args(["copy", "--quiet"]);
                command
            }
            Tool::Nbdcopy => Command::new("nbdcopy"),
            Tool::Floor => {
                let mut command =
                    Command::new(lab.target_directory.join("dist").join("copy_floor"));
                command.args([self.from.name(), &from, self.to.name(), &to]);
                return command;
            }
            Tool::QemuImg => {
                let mut command = Command::new("qemu-img");
                command.args(["convert", "-m", "16", "-W", "-n", "--target-is-zero"]);
                command.arg("--object").arg(format!(
                    "tls-creds-psk,id=tls,endpoint=client,username=bench,dir={}",
                    lab.directory.display()
                ));
                command.args(["--image-opts", &from, "--target-image-opts", &to]);
                return command;
            }
        };
        if is_zero {
            command.arg("--destination-is-zero");
        }
        command.args([from, to]);
        command
    }

    fn uri(&self, lab: &Lab<'_>, socket: &Path) -> String {
        let socket = socket.display();
        match self.channel {
            Channel::Plain => format!("nbd+unix:///?socket={socket}"),
            Channel::Tls => {
                let keys = lab.file(KEYS);
                format!("nbds+unix://bench@/?socket={socket}&tls-psk-file={}", keys.display())
            }
        }
    }

    /// One end in qemu-img's own notation, which takes TLS credentials.
    fn image_options(&self, socket: Option<&Path>, file: &Path) -> String {
        let Some(socket) = socket else {
            return format!("driver=raw,file.driver=file,file.filename={}", file.display());
        };
        let credentials = if self.channel == Channel::Tls { ",file.tls-creds=tls" } else { "" };
        format!(
            "driver=raw,file.driver=nbd,file.server.type=unix,file.server.path={}{credentials}",
            socket.display()
        )
    }
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::MetadataExt;

    use super::*;

    #[test]
    fn there_is_a_row_for_each_pair_of_ends() {
        let names: Vec<_> = rows().iter().map(Copy::name).collect();
        assert_eq!(names.len(), 14, "{names:?}");
        assert!(names.contains(&"copy-server-file-sparse-tls".to_owned()), "{names:?}");
        assert!(!names.iter().any(|name| name.contains("file-file") && name.ends_with("tls")));
    }

    #[test]
    fn the_floor_takes_part_where_nothing_is_encrypted() {
        let with_floor: Vec<_> =
            rows().iter().filter(|row| row.has_floor()).map(Copy::name).collect();
        assert_eq!(with_floor.len(), 8, "{with_floor:?}");
        assert!(!with_floor.iter().any(|name| name.ends_with("-tls")), "{with_floor:?}");
    }

    #[test]
    fn the_sparse_disk_has_little_data() {
        let directory = tempfile::tempdir().expect("temporary directory");
        let path = directory.path().join("disk.img");
        fill(&path, 32 * MEBIBYTE, 16).expect("written");
        let metadata = fs::metadata(&path).expect("written");
        assert_eq!(metadata.len(), 32 * MEBIBYTE);
        // The file system may have no holes.
        assert!(metadata.blocks() * 512 <= 33 * MEBIBYTE);
        let bytes = fs::read(&path).expect("readable");
        let filled = bytes.chunks(MEBIBYTE as usize).filter(|part| part.iter().any(|b| *b != 0));
        assert_eq!(filled.count(), 2);
    }
}
