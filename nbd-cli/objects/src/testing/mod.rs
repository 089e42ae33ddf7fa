//! An S3 store in memory that fails as a test wants, on a thread of its own.

mod connections;
mod held;
mod objects;

use std::collections::BTreeMap;
use std::fmt;
use std::net::SocketAddr;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use openssl::ssl::{SslAcceptor, SslFiletype, SslMethod};
use tokio::sync::oneshot;

pub use self::connections::{Fault, Seen};
use self::connections::{Shared, accept, lock};
use self::held::Held;

/// All objects of a store at one moment, without what is being uploaded.
#[derive(Clone, Debug, Default)]
pub struct Contents(BTreeMap<String, objects::Object>);

impl Contents {
    /// The keys: `/bucket/key`.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        self.0.keys().map(String::as_str)
    }
}

/// A store on loopback. It ends when it is dropped.
pub struct TestStore {
    address: SocketAddr,
    is_tls: bool,
    shared: Arc<Shared>,
    end: Option<oneshot::Sender<()>>,
    thread: Option<std::thread::JoinHandle<()>>,
}

impl fmt::Debug for TestStore {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("TestStore").field(&self.address).finish()
    }
}

impl TestStore {
    /// Starts a store without objects. All buckets exist.
    ///
    /// # Errors
    ///
    /// If no port can be had.
    pub fn start() -> std::io::Result<Self> {
        Self::start_with(None)
    }

    /// Starts such a store with TLS. The certificate and its key are files in the form PEM.
    ///
    /// # Errors
    ///
    /// If no port can be had, or the files are not a certificate and its key.
    pub fn start_tls(certificate: &Path, key: &Path) -> std::io::Result<Self> {
        let mut tls = SslAcceptor::mozilla_intermediate_v5(SslMethod::tls_server())?;
        tls.set_certificate_chain_file(certificate)?;
        tls.set_private_key_file(key, SslFiletype::PEM)?;
        Self::start_with(Some(tls.build()))
    }

    fn start_with(tls: Option<SslAcceptor>) -> std::io::Result<Self> {
        let is_tls = tls.is_some();
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0))?;
        listener.set_nonblocking(true)?;
        let address = listener.local_addr()?;
        let shared = Arc::new(Shared {
            objects: Mutex::default(),
            seen: Mutex::default(),
            connections: AtomicUsize::new(0),
            faults: Mutex::new(Box::new(|_| Fault::None)),
            held: Held::default(),
        });
        let (end, ended) = oneshot::channel();
        let served = Arc::clone(&shared);
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let thread = std::thread::spawn(move || {
            runtime.block_on(async {
                tokio::select! { _ = ended => {} () = accept(listener, tls, served) => {} }
            });
            runtime.shutdown_background();
        });
        Ok(Self { address, is_tls, shared, end: Some(end), thread: Some(thread) })
    }

    /// Returns the address: `http://127.0.0.1:PORT`, or `https`.
    #[must_use]
    pub fn endpoint(&self) -> String {
        let scheme = if self.is_tls { "https" } else { "http" };
        format!("{scheme}://{}", self.address)
    }

    /// Returns the number of connections that were made, with TLS or without.
    #[must_use]
    pub fn connections(&self) -> usize {
        self.shared.connections.load(Ordering::SeqCst)
    }

    /// Stores an object; `key` is `/bucket/key`.
    pub fn put(&self, key: &str, data: impl Into<Bytes>) {
        lock(&self.shared.objects).put(key, data.into());
    }

    /// Stores objects. Those next to each other with the same memory take no more of it.
    pub fn put_all(&self, all: impl IntoIterator<Item = (String, Bytes)>) {
        lock(&self.shared.objects).put_all(all);
    }

    /// Returns the contents of an object.
    #[must_use]
    pub fn object(&self, key: &str) -> Option<Bytes> {
        lock(&self.shared.objects).objects.get(key).map(|object| object.data.clone())
    }

    /// Returns all objects as they are now.
    #[must_use]
    pub fn contents(&self) -> Contents {
        Contents(lock(&self.shared.objects).objects.clone())
    }

    /// Has these objects and no others from now on.
    pub fn set_contents(&self, contents: &Contents) {
        lock(&self.shared.objects).objects.clone_from(&contents.0);
    }

    /// Returns the keys of all objects: `/bucket/key`.
    #[must_use]
    pub fn keys(&self) -> Vec<String> {
        lock(&self.shared.objects).objects.keys().cloned().collect()
    }

    /// Returns the number of uploads that are neither complete nor given up.
    #[must_use]
    pub fn open_uploads(&self) -> usize {
        self.uploads().len()
    }

    /// Returns the identities of the uploads that are neither complete nor given up.
    #[must_use]
    pub fn uploads(&self) -> Vec<String> {
        lock(&self.shared.objects).uploads()
    }

    /// Sends the first part of an upload, as another program does.
    pub fn put_part(&self, key: &str, upload: &str, data: impl Into<Bytes>) {
        lock(&self.shared.objects).put_first_part(key, upload, data.into());
    }

    /// Begins an upload, as another program does, so many seconds ago. Returns its identity.
    #[must_use]
    pub fn begin_upload(&self, key: &str, ago: u64) -> String {
        lock(&self.shared.objects).begin_upload(key, ago)
    }

    /// Forgets all uploads that are not complete, as rules of a bucket do.
    pub fn forget_uploads(&self) {
        lock(&self.shared.objects).forget_uploads();
    }

    /// Sets what happens to the requests from now on.
    pub fn fail(&self, faults: impl FnMut(&Seen) -> Fault + Send + 'static) {
        *lock(&self.shared.faults) = Box::new(faults);
    }

    /// Returns the number of replies that are [held](Fault::Held).
    #[must_use]
    pub fn held(&self) -> usize {
        self.shared.held.count()
    }

    /// Sends the replies that are [held](Fault::Held).
    pub fn release(&self) {
        self.shared.held.release();
    }

    /// Returns the requests since the last call.
    pub fn take_seen(&self) -> Vec<Seen> {
        std::mem::take(&mut *lock(&self.shared.seen))
    }
}

impl Drop for TestStore {
    fn drop(&mut self) {
        drop(self.end.take());
        if let Some(thread) = self.thread.take() {
            let _ = thread.join();
        }
    }
}
