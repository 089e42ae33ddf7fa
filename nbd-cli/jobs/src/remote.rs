//! Exports of NBD servers as storage of images or layers.

use std::io;
use std::num::NonZeroUsize;
use std::sync::{Arc, Mutex, PoisonError};

use imgfmt::storage::Part;
use imgfmt::{BackingFile, BackingOptions, Format, NameTarget, OpenOptions, OpenPolicy, Storage};
use nbd_client::blocking::Interrupter;
use nbd_client::{Connector, ExportStorage, LocalFiles};
use nbd_proto::NbdUri;
use nbd_proto::wire::MetaContextName;

use crate::connect::explain_unknown_export;
use crate::error::{JobError, JobErrorKind};
use crate::object::{OBJECT_SCHEMES, ObjectOpener, ObjectUrl};
use crate::qemu_name::{
    BackingInName, JSON_SCHEME, NameInImage, NamedImage, SCHEMES, from_name_in_image,
};
use crate::tasks;

/// Connections to a server that allows several.
const CONNECTIONS: NonZeroUsize = NonZeroUsize::new(4).expect("it is not zero");

type ConnectorOf = dyn Fn(&NbdUri) -> Connector + Send + Sync;

/// Connects to the exports of other servers. All calls block, so asynchronous tasks must not make
/// them.
#[derive(Clone)]
pub struct Remotes {
    connector: Arc<ConnectorOf>,
    interrupter: Interrupter,
    unknown: UnknownExport,
    objects: ObjectOpener,
    kept: Option<Kept>,
}

/// The exports to which the user's URIs have led.
type Kept = Arc<Mutex<Vec<(NbdUri, Arc<ExportStorage>)>>>;

/// What an export is for which no format is given.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum UnknownExport {
    /// A raw image: its bytes are the disk, whatever they are.
    #[default]
    Raw,
    /// An image of the format that its first bytes show. A guest that writes to a raw disk chooses
    /// these bytes.
    Detected,
}

impl Remotes {
    /// Connects with these settings for a URI.
    #[must_use]
    pub fn new(connector: impl Fn(&NbdUri) -> Connector + Send + Sync + 'static) -> Self {
        Self {
            connector: Arc::new(connector),
            interrupter: Interrupter::new(),
            unknown: UnknownExport::default(),
            objects: ObjectOpener::default(),
            kept: None,
        }
    }

    /// Keeps the connections to the exports that the user names, and uses them when the same export
    /// is opened again: a server may end after the first one. They end with the last clone.
    #[must_use]
    pub fn keep_connections(mut self) -> Self {
        self.kept = Some(Kept::default());
        self
    }

    /// Selects a metadata context for all connections, besides those that are needed.
    #[must_use]
    pub fn select(mut self, context: MetaContextName) -> Self {
        let connector = self.connector;
        self.connector = Arc::new(move |uri| connector(uri).meta_contexts([context.clone()]));
        self
    }

    /// Sets what opens objects of stores. By default they are refused.
    #[must_use]
    pub fn objects(mut self, objects: ObjectOpener) -> Self {
        self.objects = objects;
        self
    }

    /// Opens an object of a store.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub fn open_object(&self, url: &ObjectUrl) -> Result<Arc<dyn Storage>, JobError> {
        self.objects.open(url).map_err(|error| JobError::source(error.to_string()))
    }

    /// Interrupts connecting, and all later requests to the exports.
    #[must_use]
    pub fn interrupter(mut self, interrupter: Interrupter) -> Self {
        self.interrupter = interrupter;
        self
    }

    /// Sets what an export is for which no format is given. By default it is a raw image.
    #[must_use]
    pub fn exports(mut self, unknown: UnknownExport) -> Self {
        self.unknown = unknown;
        self
    }

    /// Returns the options for opening an export.
    pub(crate) fn for_export(&self, options: &OpenOptions) -> OpenOptions {
        let mut options = options.clone();
        if self.unknown == UnknownExport::Raw {
            options.format = options.format.or(Some(Format::Raw));
        }
        options
    }

    /// Returns the settings of a connection.
    #[must_use]
    pub fn connector(&self, uri: &NbdUri) -> Connector {
        (self.connector)(uri)
    }

    /// Connects to an export.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    pub fn open(&self, uri: &NbdUri) -> Result<Arc<ExportStorage>, JobError> {
        let connect = || self.open_with(self.connector(uri)).map(Arc::new);
        let Some(kept) = &self.kept else { return connect() };
        let mut kept = kept.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, storage)) = kept.iter().find(|(known, _)| known == uri) {
            return Ok(Arc::clone(storage));
        }
        let storage = connect()?;
        kept.push((uri.clone(), Arc::clone(&storage)));
        Ok(storage)
    }

    /// Connects to an export that an image names.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    fn open_named_by_image(&self, uri: &NbdUri) -> Result<ExportStorage, JobError> {
        // The image contains this URI: it must not choose local files to read. A layer below does
        // not change, so its server may be away for any time.
        self.open_with(self.connector(uri).local_files(LocalFiles::Refused).keep_reading())
    }

    /// Connects to an export. Its URI may name files of this machine if the user has named it, but
    /// not if an image has.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    pub fn connect(&self, uri: &NbdUri, files: LocalFiles) -> Result<Arc<ExportStorage>, JobError> {
        match files {
            LocalFiles::Allowed => self.open(uri),
            LocalFiles::Refused => self.open_named_by_image(uri).map(Arc::new),
        }
    }

    /// Connects to an export with other settings.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    pub fn open_with(&self, connector: Connector) -> Result<ExportStorage, JobError> {
        let connector = connector.connections(CONNECTIONS);
        ExportStorage::open_interruptible(&connector, &self.interrupter).map_err(|error| {
            let explained = explain_unknown_export(&connector, connector.uri(), &error);
            let message = run_elsewhere(explained).unwrap_or_else(|error| error.to_string());
            JobError::new(JobErrorKind::Source, message)
        })
    }
}

impl Default for Remotes {
    fn default() -> Self {
        Self::new(|uri| Connector::new(uri.clone()))
    }
}

impl std::fmt::Debug for Remotes {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Remotes").finish_non_exhaustive()
    }
}

/// Runs asynchronous work on a thread of its own: the calling thread may drive tasks of a runtime.
pub(crate) fn run_elsewhere<T: Send>(work: impl Future<Output = T> + Send) -> io::Result<T> {
    std::thread::scope(|scope| {
        let thread = scope.spawn(|| {
            let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
            Ok(tasks::block_on(&runtime, work))
        });
        thread.join().unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    })
}

/// Allows images to name exports and objects as their backing or data files.
pub fn allow_exports(policy: OpenPolicy, remotes: &Remotes) -> OpenPolicy {
    let policy = OBJECT_SCHEMES.iter().fold(policy, |policy, scheme| {
        let objects = remotes.objects.clone();
        let opener = move |name: &str| {
            let malformed = || io::Error::other("the URL of an object is malformed");
            let url = ObjectUrl::of(name).ok_or_else(malformed)?;
            url.refuse_moving()?;
            objects.open(&url)
        };
        policy.allow_scheme(*scheme, Arc::new(opener))
    });
    SCHEMES.iter().chain([&JSON_SCHEME]).fold(policy, |policy, scheme| {
        let remotes = remotes.clone();
        let reader = move |name: &str| {
            let named = from_name_in_image(name).map_err(io::Error::other)?;
            resolved(named, &|name| target_in_image(name, &remotes))
        };
        policy.read_scheme(*scheme, Arc::new(reader))
    })
}

/// Allows images to name files by the options of QEMU's driver `file` if the policy allows the
/// file.
pub fn allow_json_files(policy: OpenPolicy) -> OpenPolicy {
    let reader = |name: &str| {
        let named = from_name_in_image(name).map_err(io::Error::other)?;
        resolved(named, &|name| {
            Ok(match name {
                NameInImage::File(path) => NameTarget::File(path),
                NameInImage::Export(_) => NameTarget::Denied,
            })
        })
    };
    policy.read_scheme(JSON_SCHEME, Arc::new(reader))
}

/// Returns what a name in an image means; `target` opens the exports in it.
fn resolved(
    named: NamedImage,
    target: &impl Fn(NameInImage) -> io::Result<NameTarget>,
) -> io::Result<NameTarget> {
    let part = part_of(target(named.name)?, named.part);
    Ok(match backing_file(named.backing, target)? {
        BackingFile::AsNamed => part,
        backing => NameTarget::WithBacking(Box::new(part), backing),
    })
}

fn part_of(target: NameTarget, part: Part) -> NameTarget {
    match part.is_whole() || matches!(target, NameTarget::Denied) {
        true => target,
        false => NameTarget::Part(Box::new(target), part),
    }
}

/// Opens what an image names.
fn target_in_image(name: NameInImage, remotes: &Remotes) -> io::Result<NameTarget> {
    let uri = match name {
        NameInImage::File(path) => return Ok(NameTarget::File(path)),
        NameInImage::Export(uri) => uri,
    };
    let storage = remotes.open_named_by_image(&uri);
    let storage = storage.map_err(|error| io::Error::other(error.to_string()))?;
    Ok(NameTarget::Storage(Arc::new(storage)))
}

/// Returns the backing file that a name gives; `target` opens the exports in it.
///
/// # Errors
///
/// Those of `target`.
pub fn backing_file<E>(
    backing: BackingInName,
    target: &impl Fn(NameInImage) -> Result<NameTarget, E>,
) -> Result<BackingFile, E> {
    let given = match backing {
        BackingInName::AsNamed => return Ok(BackingFile::AsNamed),
        BackingInName::Ignored => return Ok(BackingFile::Ignored),
        BackingInName::Given(given) => given,
    };
    let mut options = BackingOptions::default();
    let whole = given.name.map(target).transpose()?;
    options.target = whole.map(|whole| part_of(whole, given.part));
    options.format = given.format.known();
    given.settings.apply_to_backing(&mut options);
    options.backing = backing_file(given.backing, target)?;
    Ok(BackingFile::Given(Box::new(options)))
}
