//! Opens stores.

use std::fmt;
use std::path::PathBuf;
use std::sync::Arc;

use object_store::aws::{AmazonS3, AmazonS3Builder, AmazonS3ConfigKey, S3ConditionalPut};
use object_store::http::HttpBuilder;
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{BackoffConfig, ObjectStore, RetryConfig};

use crate::credentials::{S3Access, Source, of_instance};
use crate::crypto::{OpenSsl, hex};
use crate::error::{Result, StoreError};
use crate::location::StoreUrl;
use crate::settings::{Addressing, StoreSettings, Timeouts};
use crate::transport::{Completion, Redirects, Transport};
use crate::uploads::Uploads;

/// Requests are repeated this often at most, as long as the time limit allows.
const RETRIES_MAX: usize = 10;

/// A store, and a place in it.
#[derive(Clone)]
pub struct Place {
    /// The store.
    pub store: Arc<dyn ObjectStore>,
    /// The object or prefix.
    pub path: Path,
    /// Its address, for messages.
    pub name: String,
    /// Its address with that of its store, which is different for different objects.
    pub identity: String,
    /// Where it is, if it is a folder.
    pub directory: Option<PathBuf>,
}

impl fmt::Debug for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("Place").field(&self.name).finish()
    }
}

impl Place {
    /// Prepares requests to an object or prefix; makes none. Directories must exist.
    ///
    /// ```
    /// use nbd_objects::{Place, StoreSettings};
    ///
    /// let directory = tempfile::tempdir()?;
    /// let url = directory.path().to_str().expect("UTF-8").parse()?;
    /// let place = Place::open(&url, &StoreSettings::default())?;
    /// assert_eq!(place.path.as_ref(), "");
    /// # Ok::<(), Box<dyn std::error::Error>>(())
    /// ```
    ///
    /// # Errors
    ///
    /// If the settings, the credentials' files or the address are wrong.
    pub fn open(url: &StoreUrl, settings: &StoreSettings) -> Result<Self> {
        let name = url.to_string();
        let failed = |error: object_store::Error| StoreError::of("use", &name, &error);
        match url {
            StoreUrl::S3 { bucket, key } => {
                let path = key_path(&name, key)?;
                let Bucket { store, endpoint, .. } = s3(bucket, settings)?;
                let identity = format!("{endpoint} {name}");
                Ok(Self { store: Arc::new(store), path, name, identity, directory: None })
            }
            StoreUrl::Http(url) => {
                let store = HttpBuilder::new()
                    .with_url(url)
                    .with_retry(retry(settings.timeouts))
                    .with_http_connector(Transport::new(settings, Redirects::Followed)?)
                    .build()
                    // Its text would have the URL.
                    .map_err(|_| StoreError::invalid(format!("{name} is not a usable address")))?;
                let (path, identity) = (Path::default(), http_identity(&name, url));
                Ok(Self { store: Arc::new(store), path, name, identity, directory: None })
            }
            StoreUrl::Directory(directory) => {
                let store = LocalFileSystem::new_with_prefix(directory).map_err(failed)?;
                let (path, identity) = (Path::default(), name.clone());
                let directory = std::fs::canonicalize(directory).ok();
                let store = Arc::new(store.with_fsync(true));
                Ok(Self { store, path, name, identity, directory })
            }
        }
    }
}

/// The identity of an address of HTTP. Its query may select the object, and may be a secret.
fn http_identity(name: &str, url: &str) -> String {
    let url = url.split('#').next().unwrap_or_default();
    let digest = openssl::sha::sha256(url.as_bytes());
    format!("{name} {}", hex(&digest))
}

/// The path of a key. Keys that object_store would change are refused.
pub(crate) fn key_path(name: &str, key: &str) -> Result<Path> {
    let key = key.strip_suffix('/').unwrap_or(key);
    let path = Path::parse(key).ok().filter(|path| path.as_ref() == key);
    path.ok_or_else(|| {
        StoreError::invalid(format!(
            "the key in {name} is not supported: it has an empty part, '.' or '..', or a \
             control character"
        ))
    })
}

/// A bucket of S3.
pub(crate) struct Bucket {
    pub(crate) store: AmazonS3,
    /// The address of the store.
    pub(crate) endpoint: String,
    /// The condition for the end of uploads.
    pub(crate) completion: Completion,
    pub(crate) uploads: Uploads,
}

/// Prepares requests to a bucket.
pub(crate) fn s3(bucket: &str, settings: &StoreSettings) -> Result<Bucket> {
    let access = S3Access::resolve(settings)?;
    let region = access.region.unwrap_or_else(|| "us-east-1".to_owned());
    let endpoint = endpoint_of(bucket, &region, access.endpoint.as_deref(), access.addressing);
    let transport = Transport::new(settings, Redirects::Returned)?;
    let completion = transport.completion();
    let mut builder = AmazonS3Builder::new()
        .with_bucket_name(bucket)
        .with_region(&region)
        .with_endpoint(&endpoint.address)
        .with_virtual_hosted_style_request(endpoint.is_virtual)
        .with_conditional_put(S3ConditionalPut::ETagMatch)
        .with_retry(retry(settings.timeouts))
        .with_crypto_provider(Arc::new(OpenSsl))
        .with_http_connector(transport.clone());
    let is_anonymous = matches!(access.source, Source::Anonymous);
    builder = match access.source {
        Source::Anonymous => builder.with_skip_signature(true),
        Source::Keys(keys) => {
            let builder = builder.with_access_key_id(keys.key_id);
            let builder = builder.with_secret_access_key(keys.secret_key);
            match keys.token {
                Some(token) => builder.with_token(token),
                None => builder,
            }
        }
        Source::WebIdentity { token_file, role, session } => {
            let builder = builder
                .with_config(AmazonS3ConfigKey::WebIdentityTokenFile, token_file)
                .with_config(AmazonS3ConfigKey::RoleArn, role);
            match session {
                Some(session) => builder.with_config(AmazonS3ConfigKey::RoleSessionName, session),
                None => builder,
            }
        }
        Source::Container(values) => values
            .into_iter()
            .fold(builder, |builder, (key, value)| builder.with_config(key, value)),
        Source::Instance => builder.with_credentials(of_instance(settings)?),
    };
    let store = builder.build();
    let store = store.map_err(|error| StoreError::of("use", &format!("s3://{bucket}"), &error))?;
    let credentials = (!is_anonymous).then(|| Arc::clone(store.credentials()));
    let address = match endpoint.is_virtual {
        true => endpoint.address.clone(),
        false => format!("{}/{bucket}", endpoint.address),
    };
    let uploads = Uploads { transport, credentials, region, bucket: address };
    Ok(Bucket { store, endpoint: endpoint.address, completion, uploads })
}

struct Endpoint {
    address: String,
    is_virtual: bool,
}

/// The address of a store. Amazon wants the bucket in the host; others often have no such names.
fn endpoint_of(
    bucket: &str,
    region: &str,
    endpoint: Option<&str>,
    addressing: Option<Addressing>,
) -> Endpoint {
    // The certificates of Amazon do not fit buckets with dots.
    let is_usual = endpoint.is_none() && !bucket.contains('.');
    let is_virtual = addressing.map_or(is_usual, |addressing| addressing == Addressing::Virtual);
    let amazon = format!("https://s3.{region}.amazonaws.com");
    let address = endpoint.unwrap_or(&amazon).trim_end_matches('/');
    let address = match address.split_once("://") {
        Some((scheme, host)) if is_virtual => format!("{scheme}://{bucket}.{host}"),
        _ => address.to_owned(),
    };
    Endpoint { address, is_virtual }
}

fn retry(timeouts: Timeouts) -> RetryConfig {
    let backoff =
        BackoffConfig { max_backoff: std::time::Duration::from_secs(5), ..Default::default() };
    RetryConfig { backoff, max_retries: RETRIES_MAX, retry_timeout: timeouts.total }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bucket_is_in_the_host_for_amazon_and_in_the_path_elsewhere() {
        let address = |bucket, endpoint, addressing| {
            let found = endpoint_of(bucket, "eu-1", endpoint, addressing);
            format!("{} {}", found.address, found.is_virtual)
        };
        assert_eq!(address("b", None, None), "https://b.s3.eu-1.amazonaws.com true");
        assert_eq!(address("a.b", None, None), "https://s3.eu-1.amazonaws.com false");
        assert_eq!(address("b", Some("http://h:1/"), None), "http://h:1 false");
        let virtually = Some(Addressing::Virtual);
        assert_eq!(address("b", Some("https://h"), virtually), "https://b.h true");
    }

    #[test]
    fn query_of_an_address_is_part_of_its_identity_and_not_shown() {
        let identity = |url: &str| {
            let url = url.parse().unwrap();
            Place::open(&url, &StoreSettings::default()).unwrap().identity
        };
        let first = identity("https://h/get?id=a");
        assert_ne!(first, identity("https://h/get?id=b"));
        assert_ne!(first, identity("https://h/get"));
        assert_eq!(first, identity("https://h/get?id=a#part"));
        assert!(first.starts_with("https://h/get ") && !first.contains("id=a"), "{first}");
    }

    #[test]
    fn keys_that_would_be_changed_are_refused() {
        assert_eq!(key_path("n", "a b/ü.img").unwrap().as_ref(), "a b/ü.img");
        assert_eq!(key_path("n", "a/").unwrap().as_ref(), "a");
        for bad in ["a//b", "a/../b", "/a"] {
            assert!(key_path("n", bad).is_err(), "{bad}");
        }
    }
}
