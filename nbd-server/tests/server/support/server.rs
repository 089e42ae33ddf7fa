//! A server on a unix socket in a directory of its own.

use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use nbd_server::export::{Export, ExportEntry};
use nbd_server::{ExportRegistry, ListenAddress, ServeError, Server, ServerConfig, ServerHandle};
use tokio::sync::oneshot;

use super::LONG;

/// A running server. It is told to stop when dropped.
pub struct TestServer {
    _directory: tempfile::TempDir,
    path: PathBuf,
    uri: String,
    handle: ServerHandle,
    stop: Option<oneshot::Sender<()>>,
    thread: Option<JoinHandle<Result<(), ServeError>>>,
}

impl TestServer {
    /// Serves `exports` within the bounds of `config`.
    pub fn start(config: ServerConfig, exports: ExportRegistry) -> Self {
        Self::run(Server::new(config, exports))
    }

    /// Serves with a server that was prepared.
    pub fn run(mut server: Server) -> Self {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("socket");
        let address = ListenAddress::Unix(path.clone());
        let (stop, stopped) = oneshot::channel::<()>();
        let (ready, is_ready) = mpsc::channel();
        let thread = std::thread::spawn(move || {
            let runtime =
                tokio::runtime::Builder::new_multi_thread().worker_threads(1).enable_all().build();
            let runtime = runtime.unwrap();
            let served = runtime.block_on(async move {
                let bound = server.listen(&address).await?;
                ready.send((bound[0].uri("").to_string(), server.handle())).unwrap();
                server.serve(async { stopped.await.unwrap_or(()) }).await
            });
            // An export that hangs must not hang the test.
            runtime.shutdown_timeout(std::time::Duration::from_secs(1));
            served
        });
        let (uri, handle) = is_ready.recv_timeout(LONG).unwrap();
        Self { _directory: directory, path, uri, handle, stop: Some(stop), thread: Some(thread) }
    }

    /// Serves one export under the empty name, within the default bounds.
    pub fn of(export: impl Export) -> Self {
        Self::with(ServerConfig::default(), Arc::new(export))
    }

    /// Serves one export under the empty name.
    pub fn with(mut config: ServerConfig, export: Arc<dyn Export>) -> Self {
        config.io_uring &= std::env::var_os("NBD_AIO").is_none_or(|mode| mode != "threads");
        let exports = ExportRegistry::new();
        exports.add("", ExportEntry::new(export)).unwrap();
        Self::start(config, exports)
    }

    /// The socket.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The URI of the default export.
    pub fn uri(&self) -> &str {
        &self.uri
    }

    /// The server as its owner sees it.
    pub fn handle(&self) -> &ServerHandle {
        &self.handle
    }

    /// A connection on which nothing was said yet. Reads from it do not wait for ever.
    pub fn connect(&self) -> UnixStream {
        let stream = UnixStream::connect(&self.path).unwrap();
        stream.set_read_timeout(Some(LONG)).unwrap();
        stream
    }

    /// Tells the server to stop.
    pub fn begin_stop(&mut self) {
        if let Some(stop) = self.stop.take() {
            let _ = stop.send(());
        }
    }

    /// Has the server ended?
    pub fn has_ended(&self) -> bool {
        self.thread.as_ref().is_none_or(JoinHandle::is_finished)
    }

    /// Tells the server to stop and waits until it has; what `serve` returned.
    pub fn stop(mut self) -> Result<(), ServeError> {
        self.begin_stop();
        self.thread.take().unwrap().join().unwrap()
    }
}

impl Drop for TestServer {
    fn drop(&mut self) {
        self.begin_stop();
    }
}
