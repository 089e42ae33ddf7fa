//! Files of a FUSE file system that record every change in order, so that their state after a crash
//! at any instant can be made.

use std::os::unix::fs::symlink;
use std::path::Path;
use std::sync::{Arc, Mutex};

use nbd_server::export::{
    Durability, Export, ExportEntry, ExportError, ExportInfo, FastExport, Speed, TransmissionFlags,
    ZeroMode,
};
use nbd_server::{ExportRegistry, ListenAddress, Server, ServerConfig};
use tokio::runtime::Runtime;

use super::mount::Mount;
use super::random::Random;

pub(crate) const SECTOR: u64 = 512;

/// What a crash takes of the changes that are not on stable storage.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Loss {
    Nothing,
    Everything,
    /// Some changes, or some of their sectors.
    SomeChanges,
    SomeSectors,
    /// For a control: changes on stable storage are lost as well.
    EvenWhatWasSynced,
}

impl Loss {
    pub(crate) const ALL: [Self; 4] =
        [Self::Nothing, Self::Everything, Self::SomeChanges, Self::SomeSectors];
}

#[derive(Debug)]
pub(crate) enum Change {
    Write(u64, Vec<u8>, Durability),
    Sync,
}

/// The changes of several files, in one order, each with the number of its file.
pub(crate) type Log = Arc<Mutex<Vec<(usize, Change)>>>;

/// The disk behind a file.
struct Disk {
    number: usize,
    content: Mutex<Vec<u8>>,
    log: Log,
}

impl Export for Disk {
    fn info(&self) -> ExportInfo {
        let mut info = ExportInfo::new(self.content.lock().expect("no panic").len() as u64);
        info.flags |= TransmissionFlags::SEND_FLUSH
            | TransmissionFlags::SEND_FUA
            | TransmissionFlags::SEND_WRITE_ZEROES;
        info
    }

    fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
        let content = self.content.lock().expect("no panic");
        buffer.copy_from_slice(&content[offset as usize..][..buffer.len()]);
        Ok(())
    }

    fn write_at(&self, offset: u64, data: &[u8], durable: Durability) -> Result<(), ExportError> {
        let mut log = self.log.lock().expect("no panic");
        let mut content = self.content.lock().expect("no panic");
        content[offset as usize..][..data.len()].copy_from_slice(data);
        log.push((self.number, Change::Write(offset, data.to_vec(), durable)));
        Ok(())
    }

    fn write_zeroes(
        &self,
        offset: u64,
        length: u64,
        _: ZeroMode,
        _: Speed,
        durability: Durability,
    ) -> Result<(), ExportError> {
        self.write_at(offset, &vec![0; length as usize], durability)
    }

    fn flush(&self) -> Result<(), ExportError> {
        self.log.lock().expect("no panic").push((self.number, Change::Sync));
        Ok(())
    }
}

impl FastExport for Disk {}

/// The files, in a directory of their own.
pub(crate) struct Recording {
    log: Log,
    /// The name and the first content of each.
    files: Vec<(&'static str, Vec<u8>)>,
    directory: tempfile::TempDir,
    _mounts: Vec<Mount>,
    _runtime: Runtime,
}

impl Recording {
    /// Records the changes of copies of files from now on. They have a fixed size.
    pub(crate) fn new(from: &Path, names: &[&'static str], size: u64) -> Self {
        let (log, directory) = (Log::default(), tempfile::tempdir().expect("a directory"));
        let (runtime, exports) = (Runtime::new().expect("a runtime"), ExportRegistry::new());
        let mut files = Vec::new();
        for (number, name) in names.iter().enumerate() {
            let mut bytes = std::fs::read(from.join(name)).expect("a file");
            bytes.resize(size as usize, 0);
            let (content, log) = (Mutex::new(bytes.clone()), Arc::clone(&log));
            let entry = ExportEntry::new(Arc::new(Disk { number, content, log }));
            exports.add(*name, entry).expect("a name of its own");
            files.push((*name, bytes));
        }
        let socket = directory.path().join("recording");
        let mut server = Server::new(ServerConfig::default(), exports);
        let address = ListenAddress::Unix(socket.clone());
        runtime.block_on(server.listen(&address)).expect("a socket");
        runtime.spawn(server.serve(std::future::pending()));
        let mounts = names.iter().map(|name| {
            let uri = format!("nbd+unix:///{name}?socket={}", socket.display());
            let mount = Mount::new(&["--writable", &uri]);
            symlink(mount.path("disk"), directory.path().join(name)).expect("a link");
            mount
        });
        let mounts = mounts.collect();
        Self { log, files, directory, _mounts: mounts, _runtime: runtime }
    }

    /// The path of a file.
    pub(crate) fn path(&self, name: &str) -> String {
        self.directory.path().join(name).to_str().expect("a plain name").to_owned()
    }

    pub(crate) fn log(&self) -> &Log {
        &self.log
    }

    /// Makes the files in `directory` as they are if the power fails after so many changes.
    pub(crate) fn crash(&self, position: usize, loss: Loss, random: &mut Random, directory: &Path) {
        let log = self.log.lock().expect("no panic");
        for (number, (name, start)) in self.files.iter().enumerate() {
            let own = log[..position].iter().filter(|(owner, _)| *owner == number);
            let changes: Vec<&Change> = own.map(|(_, change)| change).collect();
            let bytes = after_crash(start.clone(), &changes, loss, random);
            let path = directory.join(name);
            // Another file: a process that ends may still have the old one mounted.
            let _ = std::fs::remove_file(&path);
            std::fs::write(path, bytes).expect("room");
        }
    }
}

/// What is on a disk whose last changes, those after the last sync, are not all there.
fn after_crash(mut disk: Vec<u8>, changes: &[&Change], loss: Loss, random: &mut Random) -> Vec<u8> {
    let synced = changes.iter().rposition(|change| matches!(change, Change::Sync)).unwrap_or(0);
    let mut cached = disk.clone();
    let odds = [1, 4, 7][random.below(3) as usize];
    for (index, change) in changes.iter().enumerate() {
        let Change::Write(offset, data, durability) = change else { continue };
        cached[*offset as usize..][..data.len()].copy_from_slice(data);
        let is_durable = index < synced || *durability == Durability::Fua;
        let survives = random.below(8) < odds;
        // A sector that is written to the disk has all that is in the cache.
        let end = offset + data.len() as u64;
        for sector in offset / SECTOR..end.div_ceil(SECTOR) {
            let is_there = match loss {
                _ if is_durable || loss == Loss::Nothing => loss != Loss::EvenWhatWasSynced,
                Loss::Nothing | Loss::Everything | Loss::EvenWhatWasSynced => false,
                Loss::SomeChanges => survives,
                Loss::SomeSectors => random.below(8) < odds,
            };
            if is_there {
                let (from, to) = ((sector * SECTOR) as usize, ((sector + 1) * SECTOR) as usize);
                disk[from..to].copy_from_slice(&cached[from..to]);
            }
        }
    }
    disk
}
