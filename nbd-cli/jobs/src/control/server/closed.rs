//! The disks of a server that is being taken over, while another program has their images.

use std::collections::BTreeMap;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::thread::sleep;
use std::time::{Duration, Instant};

use nbd_proto::wire::MetaContextName;
use nbd_server::ExportRegistry;
use nbd_server::export::{Export, ExportEntry, ImageExport, MemoryExport};

use super::disks::{Reopen, ServedDisk, ServedDisks};
use super::files::{DiskFiles, check_names};
use crate::control::{ErrorKind, Failure};
use crate::text::printable;

/// Time for requests of connections that were cut, which threads may still carry out.
pub(super) const TIME_TO_CLOSE: Duration = Duration::from_secs(10);
pub(super) const LOOK: Duration = Duration::from_millis(1);

/// Disks whose images are closed, with what is needed to open them again.
pub struct ClosedDisks {
    disks: BTreeMap<String, ClosedDisk>,
}

struct ClosedDisk {
    reopen: Arc<Reopen>,
    files: DiskFiles,
    /// Keep the inode numbers of the files, by which they are recognised.
    pins: Vec<OwnedFd>,
    /// The properties of the export, which may have changed since it was opened first.
    entry: ExportEntry,
    /// The bitmaps that it offered.
    contexts: Vec<MetaContextName>,
}

/// Disks that could not be closed, and are as they were.
#[derive(Debug)]
pub struct NotClosed {
    /// The disks.
    pub disks: ServedDisks,
    /// The reason, a sentence.
    pub reason: String,
}

impl ServedDisks {
    /// Closes all images and removes their exports from the registry. Blocks. The server must have
    /// been paused, so that its connections do not use them.
    ///
    /// # Errors
    ///
    /// If a disk cannot be opened again, or a thread still uses one. Nothing has changed then.
    pub fn close(mut self, registry: &ExportRegistry) -> Result<ClosedDisks, Box<NotClosed>> {
        if let Err(failure) = self.check_takeover().and_then(|()| check_names(&self.files())) {
            return Err(Box::new(NotClosed { disks: self, reason: failure.message }));
        }
        let deadline = Instant::now() + TIME_TO_CLOSE;
        // Their clients were cut, but threads may still carry out their last requests.
        let refuse = || refuse_removed(registry.removed_in_use());
        while let Err(failure) = refuse().and_then(|()| self.refuse_closing()) {
            if Instant::now() >= deadline {
                return Err(Box::new(NotClosed { disks: self, reason: failure.message }));
            }
            sleep(LOOK);
        }
        let mut closed = BTreeMap::new();
        for (name, disk) in &mut self.disks {
            let Some(reopen) = disk.reopen.clone() else { continue };
            let files = disk.files();
            let pins = files.pins();
            let entry = registry.remove(name).unwrap_or_else(|| disk.entry());
            let contexts = disk.export.info().meta_contexts;
            // Only the disk itself holds its export now.
            // It may come back: requests that are still carried out count their failures there.
            let entry = entry.same_disk(Arc::new(MemoryExport::new(0)));
            disk.entry = entry.clone();
            closed.insert(name.clone(), ClosedDisk { reopen, files, pins, entry, contexts });
        }
        while !self.disks.values().all(ServedDisk::is_unused) {
            if Instant::now() >= deadline {
                let disks = self.restored(registry);
                let reason = "requests of a client that has left are still being carried out";
                return Err(Box::new(NotClosed { disks, reason: reason.to_owned() }));
            }
            sleep(LOOK);
        }
        // Nothing else holds them: their images are closed here.
        drop(self);
        Ok(ClosedDisks { disks: closed })
    }

    /// Registers the exports again.
    fn restored(mut self, registry: &ExportRegistry) -> Self {
        for (name, disk) in &mut self.disks {
            disk.entry = disk.entry.same_disk(disk.export.clone());
            let _ = registry.add(name.clone(), disk.entry());
        }
        self
    }
}

impl ServedDisk {
    /// Whether nothing but this holds the export and, as views of checkpoints do, the disk in it.
    fn is_unused(&self) -> bool {
        let disk = self.export.disk();
        let is_disk =
            |image: &Arc<ImageExport>| std::ptr::addr_eq(Arc::as_ptr(image), Arc::as_ptr(disk));
        let own = 1 + usize::from(self.image.as_ref().is_some_and(is_disk));
        Arc::strong_count(&self.export) == 1 && Arc::strong_count(disk) == own
    }
}

/// Refuses a takeover while clients use exports of these names under which no export is registered:
/// no program would open them again.
///
/// # Errors
///
/// If there is such a name.
pub fn refuse_removed(names: impl IntoIterator<Item: AsRef<str>>) -> Result<(), Failure> {
    let Some(name) = names.into_iter().next() else { return Ok(()) };
    let message = format!(
        "clients still use the export '{}', which was removed or replaced; wait until they have \
         disconnected",
        printable(name.as_ref())
    );
    Err(Failure::new(ErrorKind::InUse, message))
}

/// Opens a disk again, unless its names lead elsewhere by now.
fn reopen_same(name: &str, files: &DiskFiles, reopen: &Reopen) -> Result<ServedDisk, Failure> {
    // Not even opened: that may change an image.
    files.check_names(name)?;
    let disk = reopen()?;
    files.check_same(name, &disk.files())?;
    Ok(disk)
}

impl ClosedDisks {
    /// Returns the files of each disk, by the name of its export.
    pub(crate) fn files(&self) -> impl Iterator<Item = (&str, &DiskFiles)> {
        self.disks.iter().map(|(name, disk)| (&**name, &disk.files))
    }

    /// Opens all images again and registers their exports, after the other program has closed them.
    /// Blocks. Returns the disks, and the reasons why others are not among them.
    #[must_use]
    pub fn reopen(self, registry: &ExportRegistry) -> (ServedDisks, Vec<Failure>) {
        let (mut disks, mut failures) = (ServedDisks::default(), Vec::new());
        for (name, ClosedDisk { reopen, files, pins, entry, contexts }) in self.disks {
            let reopened = reopen_same(&name, &files, &*reopen);
            drop(pins);
            let mut disk = match reopened {
                Ok(disk) => disk,
                Err(failure) => {
                    failures.push(failure);
                    continue;
                }
            };
            if let Some(image) = &disk.image {
                // Bitmaps may have been added since the disk was opened first. One that is not
                // there any more ends the connections that have selected it.
                for bitmap in contexts.iter().filter_map(MetaContextName::dirty_bitmap) {
                    let _ = image.offer_bitmap(bitmap);
                }
            }
            disk.entry = entry.same_disk(disk.export.clone());
            match registry.add(name.clone(), disk.entry()) {
                Ok(()) => disks.insert(name, disk),
                Err(error) => {
                    failures.push(Failure::new(
                        ErrorKind::Failed,
                        format!("'{name}' cannot be exported again: {error}"),
                    ));
                }
            }
        }
        (disks, failures)
    }
}

impl std::fmt::Debug for ClosedDisks {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_set().entries(self.disks.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use std::io;
    use std::sync::atomic::{AtomicBool, Ordering};
    use std::sync::mpsc;

    use imgfmt::storage::MemoryStorage;
    use imgfmt::{Durability, Format, HostOffset, Image, OpenOptions, Storage};
    use nbd_client::Connector;
    use nbd_proto::wire::Errno;
    use nbd_server::export::{ExportError, ExportInfo};
    use nbd_server::{ListenAddress, Server, ServerConfig};

    use super::*;
    use crate::control::server::Controller;

    /// A storage that is closed when it may be.
    #[derive(Debug)]
    struct Slow {
        inner: MemoryStorage,
        begins: mpsc::SyncSender<()>,
        may_end: std::sync::Mutex<mpsc::Receiver<()>>,
    }

    impl Drop for Slow {
        fn drop(&mut self) {
            let _ = self.begins.send(());
            let _ = self.may_end.lock().map(|may_end| may_end.recv());
        }
    }

    impl Storage for Slow {
        fn len(&self) -> io::Result<u64> {
            self.inner.len()
        }
        fn read_at(&self, offset: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
            self.inner.read_at(offset, buffer)
        }
        fn write_at(&self, at: HostOffset, data: &[u8], durable: Durability) -> io::Result<()> {
            self.inner.write_at(at, data, durable)
        }
        fn set_len(&self, length: u64) -> io::Result<()> {
            self.inner.set_len(length)
        }
        fn punch_hole(&self, offset: HostOffset, length: u64) -> io::Result<()> {
            self.inner.punch_hole(offset, length)
        }
        fn sync(&self) -> io::Result<()> {
            self.inner.sync()
        }
    }

    /// A disk whose image is closed slowly: it tells when that begins, and waits until it may end.
    fn slow_disk() -> (ServedDisk, mpsc::Receiver<()>, mpsc::Sender<()>) {
        let ((begins, has_begun), (end, may_end)) = (mpsc::sync_channel(1), mpsc::channel());
        let (inner, may_end) = (MemoryStorage::new(1 << 20), std::sync::Mutex::new(may_end));
        let options = OpenOptions::new().format(Format::Raw);
        let image = Image::from_storage(Arc::new(Slow { inner, begins, may_end }), &options);
        let image = Arc::new(ImageExport::new(image.unwrap()));
        (ServedDisk::of_image("vm", image), has_begun, end)
    }

    #[test]
    fn a_takeover_waits_until_the_image_of_a_removed_disk_is_closed() {
        let (disk, has_begun, end) = slow_disk();
        let (mut disks, registry) = (ServedDisks::default(), ExportRegistry::new());
        registry.add("vm", disk.entry()).unwrap();
        disks.insert("vm", disk);
        let removed = (registry.remove("vm"), disks.remove("vm"));
        let closing = std::thread::spawn(move || drop(removed));
        has_begun.recv().unwrap();
        // No client uses it any more, but its storage is still open.
        refuse_removed(registry.removed_in_use()).unwrap();
        let refused = disks.take().refuse_closing().unwrap_err();
        assert!(refused.message.contains("is still being closed"), "{refused}");
        end.send(()).unwrap();
        closing.join().unwrap();
        disks.close(&registry).unwrap();
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn requests_are_carried_out_while_a_disk_that_was_not_added_is_closed() {
        let server = Server::new(ServerConfig::default(), ExportRegistry::new()).start();
        let controller = Controller::new(server.handle().clone(), ServedDisks::default());
        let controller = Arc::new(controller);
        let memory = || ServedDisk::new("memory:1M", Arc::new(MemoryExport::new(1 << 20)));
        controller.add_export("taken", memory()).await.unwrap();
        let too_long = "x".repeat(5000);
        for (name, kind) in
            [("taken", ErrorKind::AlreadyExists), (&too_long, ErrorKind::InvalidRequest)]
        {
            let (disk, has_begun, end) = slow_disk();
            let (adding, name) = (Arc::clone(&controller), name.to_owned());
            let added = tokio::spawn(async move { adding.add_export(name, disk).await });
            tokio::task::spawn_blocking(move || has_begun.recv().unwrap()).await.unwrap();
            // Others have the lock, and a takeover waits.
            let closing = controller.disks.try_lock().map(|disks| disks.refuse_closing().is_err());
            end.send(()).unwrap();
            assert_eq!(closing.ok(), Some(true), "{kind:?}");
            assert_eq!(added.await.unwrap().unwrap_err().kind, kind);
        }
        assert!(controller.disks.lock().await.refuse_closing().is_ok());
    }

    /// A disk that fails to flush once it is told to.
    struct Unflushed(MemoryExport, Arc<AtomicBool>);

    impl Export for Unflushed {
        fn info(&self) -> ExportInfo {
            self.0.info()
        }
        fn read_at(&self, offset: u64, buffer: &mut [u8]) -> Result<(), ExportError> {
            self.0.read_at(offset, buffer)
        }
        fn flush(&self) -> Result<(), ExportError> {
            match self.1.swap(false, Ordering::SeqCst) {
                true => Err(ExportError::new(Errno::EIO, "the disk is broken")),
                false => Ok(()),
            }
        }
    }

    #[tokio::test(flavor = "multi_thread")]
    async fn clients_of_a_disk_that_is_open_again_are_told_of_a_flush_that_failed_after_the_pause()
    {
        let directory = tempfile::tempdir().unwrap();
        let fails = Arc::new(AtomicBool::new(false));
        let flag = Arc::clone(&fails);
        let open = move || {
            let disk = Unflushed(MemoryExport::new(1 << 20), Arc::clone(&flag));
            ServedDisk::new("vm", Arc::new(disk))
        };
        let disk = open().reopened_by(move || Ok(open()));
        let serve = async |name: &str, exports: &ExportRegistry| {
            let mut server = Server::new(ServerConfig::default(), exports.clone());
            let socket = ListenAddress::Unix(directory.path().join(name));
            let uri = server.listen(&socket).await.unwrap().remove(0).uri("vm").to_string();
            let server = server.start();
            let client = Connector::new(uri.parse().unwrap()).connect().await.unwrap();
            (server, client)
        };
        let (mut disks, registry, beside) =
            (ServedDisks::default(), ExportRegistry::new(), ExportRegistry::new());
        registry.add("vm", disk.entry()).unwrap();
        beside.add("vm", disk.entry()).unwrap();
        disks.insert("vm", disk);
        let (server, client) = serve("one", &registry).await;
        let paused = server.pause().await.unwrap();
        // As a request does that a thread still carries out: of a second server of the same disk.
        let (mut server, other) = serve("other", &beside).await;
        fails.store(true, Ordering::SeqCst);
        other.flush().await.unwrap_err();
        server.shutdown();
        server.wait().await.unwrap();
        drop((beside, server));
        let exports = registry.clone();
        let reopened =
            tokio::task::spawn_blocking(move || disks.close(&exports).unwrap().reopen(&exports));
        let (_disks, failures) = reopened.await.unwrap();
        assert!(failures.is_empty(), "{failures:?}");
        let mut server = Server::new(ServerConfig::default(), registry);
        server.go_on(paused.listeners, paused.connections).unwrap();
        let _server = server.start();
        client.flush().await.unwrap_err();
        client.flush().await.expect("it was told");
    }
}
