//! Object stores: the options, and what opens objects.

use std::ffi::{OsStr, OsString};
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use clap::{Args, ValueEnum};
use imgfmt::Storage;
use nbd_jobs::JobError;
use nbd_jobs::object::{ObjectOpener, ObjectUrl};
use nbd_jobs::repository::{open_disk, repository_error, split_address};
use nbd_jobs::size::{ByteSize, parse_duration};
use nbd_objects::repo::{BackupName, Damage, Repository};
use nbd_objects::{
    Addressing, CACHE_SIZE_MIN, CacheSettings, Environment, Interrupted, ObjectCache,
    ObjectStorage, Place, Reads, StoreSettings, StoreUrl, Timeouts,
};

use crate::passphrase::passphrase_of_environment;
use crate::signals;

/// The heading of these options in the help.
const HEADING: &str = "Object stores (s3://, https:// and http:// URLs)";

/// Options of object stores.
// `next_help_heading` would also be the heading of options that a command has after these.
#[derive(Clone, Debug, Default, Args)]
pub struct ObjectArgs {
    /// Address of the S3 store, such as http://localhost:8333; by default that in
    /// AWS_ENDPOINT_URL_S3, AWS_ENDPOINT_URL or the profile, otherwise Amazon's.
    #[arg(long, value_name = "URL", hide_short_help = true, help_heading = HEADING)]
    pub endpoint: Option<String>,

    /// Region of the bucket; by default that in AWS_REGION, AWS_DEFAULT_REGION or the profile,
    /// otherwise us-east-1.
    #[arg(long, value_name = "NAME", hide_short_help = true, help_heading = HEADING)]
    pub region: Option<String>,

    /// Profile in ~/.aws/credentials and ~/.aws/config; by default AWS_PROFILE or 'default'.
    #[arg(long, value_name = "NAME", hide_short_help = true, help_heading = HEADING)]
    pub profile: Option<String>,

    /// Place of the bucket's name in addresses; by default the host for Amazon, and the path with
    /// --endpoint.
    #[arg(long, value_name = "PLACE", value_enum, hide_short_help = true, help_heading = HEADING)]
    pub addressing: Option<AddressingChoice>,

    /// Do not sign requests: for objects that are public.
    #[arg(long, hide_short_help = true, help_heading = HEADING)]
    pub anonymous: bool,

    /// File with the authorities (PEM) of the store's certificate; by default AWS_CA_BUNDLE, then
    /// those that this machine trusts.
    #[arg(long, value_name = "FILE", hide_short_help = true, help_heading = HEADING)]
    pub store_authorities: Option<PathBuf>,

    /// Time limit for an operation on the store with all its retries: seconds, or 500ms, 2m
    /// [default: 2m].
    #[arg(long, value_name = "TIME", value_parser = parse_duration, hide_short_help = true, help_heading = HEADING)]
    pub store_timeout: Option<Duration>,

    /// Most requests to the store per second, retries included.
    #[arg(long, value_name = "N", hide_short_help = true, help_heading = HEADING)]
    pub max_requests_per_second: Option<NonZeroU32>,

    /// Directory of the cache of blocks; by default CACHE_DIRECTORY, or nbd-cli in XDG_CACHE_HOME
    /// or ~/.cache.
    #[arg(long, value_name = "DIR", hide_short_help = true, help_heading = HEADING)]
    pub cache_dir: Option<PathBuf>,

    /// Limit of the data in that cache, from 64M to 1T [default: 4G].
    #[arg(long, value_name = "SIZE", hide_short_help = true, help_heading = HEADING)]
    pub cache_size: Option<ByteSize>,
}

/// Places of a bucket's name.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
pub enum AddressingChoice {
    /// The path: HOST/BUCKET/KEY.
    Path,
    /// The host: BUCKET.HOST/KEY.
    Virtual,
}

/// Whether this process reads each part of an image once.
static READS_ONCE: AtomicBool = AtomicBool::new(false);

/// Says that this process reads each part of an image once.
pub(crate) fn read_once() {
    READS_ONCE.store(true, Ordering::Relaxed);
}

/// The one cache of this process.
static CACHE: Mutex<Option<ObjectCache>> = Mutex::new(None);

impl ObjectArgs {
    /// Returns the settings of connections.
    pub(crate) fn settings(&self) -> StoreSettings {
        let mut timeouts = Timeouts::default();
        if let Some(limit) = self.store_timeout {
            timeouts.total = limit;
            timeouts.request = timeouts.request.min(limit);
            timeouts.idle = timeouts.idle.min(limit);
            timeouts.connect = timeouts.connect.min(limit);
        }
        // Variables that are not UTF-8 are of no store.
        let variables = std::env::vars_os().filter_map(|(name, value)| {
            Some((name.into_string().ok()?, value.into_string().ok()?))
        });
        StoreSettings {
            endpoint: self.endpoint.clone(),
            region: self.region.clone(),
            profile: self.profile.clone(),
            addressing: self.addressing.map(|choice| match choice {
                AddressingChoice::Path => Addressing::Path,
                AddressingChoice::Virtual => Addressing::Virtual,
            }),
            anonymous: self.anonymous,
            authorities: self.store_authorities.clone(),
            timeouts,
            requests_per_second: self.max_requests_per_second,
            environment: Environment::new(variables),
        }
    }

    /// Returns what opens objects. A signal interrupts it, and all later reads.
    pub(crate) fn opener(&self) -> ObjectOpener {
        let args = self.clone();
        ObjectOpener::new(move |url| args.open(url))
    }

    fn open(&self, url: &ObjectUrl) -> std::io::Result<Arc<dyn Storage>> {
        if let Some(address) = url.backup() {
            return self.open_backup(address);
        }
        let parsed: StoreUrl = url
            .as_str()
            .parse()
            .map_err(|why| std::io::Error::other(format!("cannot open {url}: {why}")))?;
        let cache = self.cache()?;
        let interrupter = signals::interrupter().clone();
        let is_interrupted: Interrupted = Arc::new(move || interrupter.is_interrupted());
        let storage = ObjectStorage::open(&parsed, &self.settings(), &cache, is_interrupted)?;
        Ok(Arc::new(storage))
    }

    /// Returns the name that an image may record for the backing file `name`: for a backup in a
    /// repository, one that is the same disk for ever, with the ID of what `@latest` is now.
    pub(crate) fn pinned(&self, name: &OsStr) -> std::io::Result<OsString> {
        let url = name.to_str().and_then(ObjectUrl::of);
        let Some(address) = url.as_ref().and_then(ObjectUrl::backup) else {
            return Ok(name.to_owned());
        };
        let find = |repository: Repository, backup: String| async move {
            let (id, head, disk) = repository.find_disk(&backup).await.map_err(repository_error)?;
            head.of_disk(disk.as_deref()).map_err(repository_error)?;
            let disk = disk.map_or_else(String::new, |disk| format!("#{disk}"));
            // Earlier versions made some with names that no address has.
            let name = BackupName::parse(&head.name)
                .map_or_else(|_| String::new(), |name| name.to_string());
            Ok(format!("{name}@{id}{disk}"))
        };
        let backup = self.in_repository(address, find)?;
        // It was split before.
        let repository = split_address(address).map_or("", |(repository, _)| repository);
        let repository = match repository.contains("://") {
            true => OsString::from(repository),
            false => std::path::absolute(repository)?.into(),
        };
        let mut pinned = OsString::from("backup:");
        pinned.push(repository);
        pinned.push(format!("/{backup}"));
        Ok(pinned)
    }

    /// Opens a backup in a repository. Its passphrase is in the file that the environment names.
    fn open_backup(&self, address: &str) -> std::io::Result<Arc<dyn Storage>> {
        let opened = self.in_repository(address, |repository, backup| async move {
            open_disk(&repository, &backup, Damage::Refused).await
        })?;
        Ok(opened)
    }

    /// Calls `find` with an open repository and the name of a backup in it.
    fn in_repository<T, F>(
        &self,
        address: &str,
        find: impl FnOnce(Repository, String) -> F + Send + 'static,
    ) -> std::io::Result<T>
    where
        T: Send + 'static,
        F: Future<Output = Result<T, JobError>> + Send,
    {
        let failed =
            |why: String| std::io::Error::other(format!("cannot open backup:{address}: {why}"));
        let (repository, backup) = split_address(address).ok_or_else(|| {
            failed("write backup:REPOSITORY/NAME@latest, or @DAY, @TIME or @ID".to_owned())
        })?;
        let url: StoreUrl = repository.parse().map_err(failed)?;
        let place = Place::open(&url, &self.settings())?;
        let passphrase = passphrase_of_environment().map_err(|error| failed(error.to_string()))?;
        let backup = backup.to_owned();
        // The caller's thread may block; the requests run elsewhere.
        let (sender, opened) = std::sync::mpsc::channel();
        nbd_objects::runtime()?.spawn(async move {
            let open = async {
                let passphrase = passphrase.as_deref().map(Vec::as_slice);
                let repository = Repository::open(place, passphrase).await;
                find(repository.map_err(repository_error)?, backup).await
            };
            let _ = sender.send(open.await);
        });
        let opened = opened.recv().map_err(|_| failed("the request was given up".to_owned()))?;
        opened.map_err(|error| failed(error.to_string()))
    }

    /// Returns the cache of this process. The first object decides where it is.
    fn cache(&self) -> nbd_objects::Result<ObjectCache> {
        let mut cache = CACHE.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(cache) = &*cache {
            return Ok(cache.clone());
        }
        let settings = CacheSettings {
            directory: self.cache_directory(),
            is_optional: self.cache_dir.is_none(),
            reads: if READS_ONCE.load(Ordering::Relaxed) { Reads::Once } else { Reads::Again },
            size: self.cache_size.map_or(CacheSettings::default().size, ByteSize::bytes),
        };
        if settings.size < CACHE_SIZE_MIN {
            return Err(nbd_objects::StoreError::invalid(
                "--cache-size is too small; give at least 64M",
            ));
        }
        Ok(cache.insert(ObjectCache::open(&settings)?).clone())
    }

    /// Returns the directory of the cache, and of the records of uploads.
    pub(crate) fn cache_directory(&self) -> Option<PathBuf> {
        self.cache_dir.clone().or_else(usual_directory)
    }
}

fn usual_directory() -> Option<PathBuf> {
    let of = |name: &str| std::env::var_os(name).filter(|value| !value.is_empty());
    // A service manager gives the first one.
    let own = || Some(PathBuf::from(of("CACHE_DIRECTORY")?));
    let user = || Some(PathBuf::from(of("XDG_CACHE_HOME")?).join("nbd-cli"));
    let home = || Some(PathBuf::from(of("HOME")?).join(".cache/nbd-cli"));
    own().or_else(user).or_else(home).filter(|path| path.is_absolute())
}
