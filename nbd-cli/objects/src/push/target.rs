//! The object that a push writes.

use object_store::aws::AmazonS3;
use object_store::path::Path;
use object_store::{GetOptions, ObjectStore as _};

use crate::error::{Result, StoreError, StoreErrorKind};
use crate::transport::Completion;
use crate::uploads::Uploads;

/// The place of the object on its store.
pub(super) struct Target {
    pub(super) store: AmazonS3,
    pub(super) path: Path,
    pub(super) name: String,
    /// What has to be there at the end, for stores that look.
    pub(super) completion: Completion,
    pub(super) uploads: Uploads,
}

impl Target {
    /// What is there.
    pub(super) async fn found(&self) -> Result<Option<Found>> {
        match self.store.get_opts(&self.path, head()).await {
            Err(object_store::Error::NotFound { .. }) => Ok(None),
            Err(error) => Err(self.failed("write", &error)),
            Ok(found) => Ok(Some(Found { size: found.meta.size, etag: found.meta.e_tag })),
        }
    }

    /// The error if another program wrote the object.
    pub(super) fn taken(&self) -> StoreError {
        let why = format!(
            "another program wrote {} meanwhile, and it stays; to replace it, push again with \
             --replace",
            self.name
        );
        StoreError::new(StoreErrorKind::Exists, why)
    }

    /// The error if the store says that the object has changed, and it has not.
    pub(super) fn refused(&self) -> StoreError {
        let why = format!(
            "cannot write {}: the store answered that its condition does not hold, and the object is \
             what it was; push again, which sends no part twice",
            self.name
        );
        StoreError::new(StoreErrorKind::Unsuitable, why)
    }

    pub(super) fn failed(&self, operation: &str, error: &object_store::Error) -> StoreError {
        StoreError::of(operation, &self.name, error)
    }
}

/// An object that exists.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Found {
    pub(super) size: u64,
    pub(super) etag: Option<String>,
}

impl Found {
    pub(super) fn is_tagged(&self, etag: &str) -> bool {
        self.etag.as_deref().unwrap_or_default().trim_matches('"') == etag
    }
}

fn head() -> GetOptions {
    GetOptions { head: true, ..GetOptions::default() }
}
