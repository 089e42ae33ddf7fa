//! Objects of stores, which are read-only images. Another crate opens them.

use std::fmt;
use std::io;
use std::sync::Arc;

use imgfmt::{Format, OpenOptions, Storage};

/// Schemes of objects.
pub const OBJECT_SCHEMES: [&str; 4] = ["s3", "http", "https", "backup"];
/// In front of the address of a backup in a repository.
const BACKUP: &str = "backup:";

/// The URL of an object: `s3://bucket/key`, `http://…` or `https://…`; or of a backup in a
/// repository: `backup:REPOSITORY/NAME@latest`.
///
/// Printed without the query, which can be a signature.
#[derive(Clone, PartialEq, Eq)]
pub struct ObjectUrl(String);

impl ObjectUrl {
    /// Returns the URL if the text has the form of one.
    ///
    /// ```
    /// use nbd_jobs::object::ObjectUrl;
    ///
    /// let url = ObjectUrl::of("https://host/disk.qcow2?signature=a").expect("it is one");
    /// assert_eq!(url.to_string(), "https://host/disk.qcow2");
    /// assert!(ObjectUrl::of("nbd://host").is_none() && ObjectUrl::of("disk.qcow2").is_none());
    /// ```
    #[must_use]
    pub fn of(text: &str) -> Option<Self> {
        if text.starts_with(BACKUP) {
            return Some(Self(text.to_owned()));
        }
        let (scheme, _) = text.split_once("://")?;
        OBJECT_SCHEMES.contains(&scheme).then(|| Self(text.to_owned()))
    }

    /// Returns the address of a backup in a repository, if it is one.
    #[must_use]
    pub fn backup(&self) -> Option<&str> {
        self.0.strip_prefix(BACKUP)
    }

    /// Refuses a name that an image must not record, because it may be another disk later or
    /// elsewhere: a backup that is not named by its whole ID, or in a repository by a relative
    /// path.
    ///
    /// # Errors
    ///
    /// A sentence with the remedy.
    pub fn refuse_moving(&self) -> io::Result<()> {
        let Some(address) = self.backup() else { return Ok(()) };
        let id = address.rsplit_once('@').map_or("", |(_, id)| id);
        // Behind it may be one of several disks.
        let id = id.split_once('#').map_or(id, |(id, _)| id);
        let has_id = id.len() == 32 && id.bytes().all(|byte| byte.is_ascii_hexdigit());
        if has_id && (address.starts_with('/') || address.contains("://")) {
            return Ok(());
        }
        Err(io::Error::other(format!(
            "an image cannot name {self}, which may be another disk later; name the backup by the \
             absolute path or the URL of its repository and by its whole ID, as in \
             backup:/srv/backups/vm1@ID ('nbd-cli repo list' shows the IDs)"
        )))
    }

    /// Returns the format of the image in it, if it is known; `given` is what the user says. A
    /// backup is a disk: what it holds is never taken for an image, unless the user says so.
    pub(crate) fn format_or(&self, given: Option<Format>) -> Option<Format> {
        given.or(self.backup().map(|_| Format::Raw))
    }

    /// Returns the options for opening it.
    pub(crate) fn options(&self, options: &OpenOptions) -> OpenOptions {
        let mut options = options.clone().known_as(self.to_string());
        options.format = self.format_or(options.format);
        options
    }

    /// Whether it has neither a query nor a user.
    fn is_plain(&self) -> bool {
        self.0.starts_with("s3:") || self.backup().is_some()
    }

    /// Returns the complete URL.
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

/// Returns a name for messages: the URL of an object without its query, and other names as they
/// are.
#[must_use]
pub fn shown(name: &str) -> String {
    ObjectUrl::of(name).map_or_else(|| name.to_owned(), |url| url.to_string())
}

impl fmt::Display for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let end = match self.is_plain() {
            true => self.0.len(),
            false => self.0.find(['?', '#']).unwrap_or(self.0.len()),
        };
        let shown = &self.0[..end];
        // A user and password are refused later.
        match (shown.split_once("://"), shown.rsplit_once('@')) {
            (Some((scheme, _)), Some((_, host))) if !self.is_plain() => {
                write!(f, "{scheme}://{host}")
            }
            _ => f.write_str(shown),
        }
    }
}

impl fmt::Debug for ObjectUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

type Opener = dyn Fn(&ObjectUrl) -> io::Result<Arc<dyn Storage>> + Send + Sync;

/// Opens objects. By default it refuses them. Blocks, and must not be called by asynchronous tasks.
#[derive(Clone, Default)]
pub struct ObjectOpener(Option<Arc<Opener>>);

impl ObjectOpener {
    /// Opens objects by this function. Its errors are sentences that name the object.
    pub fn new(
        open: impl Fn(&ObjectUrl) -> io::Result<Arc<dyn Storage>> + Send + Sync + 'static,
    ) -> Self {
        Self(Some(Arc::new(open)))
    }

    /// Opens an object.
    ///
    /// # Errors
    ///
    /// Those of the function; or objects are refused.
    pub fn open(&self, url: &ObjectUrl) -> io::Result<Arc<dyn Storage>> {
        match &self.0 {
            Some(open) => open(url),
            None => Err(io::Error::other(format!(
                "cannot open {url}: this program cannot read from object stores; it was built \
                 without the feature object-storage"
            ))),
        }
    }
}

impl fmt::Debug for ObjectOpener {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_tuple("ObjectOpener").field(&self.0.is_some()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn secrets_in_an_address_are_not_shown() {
        for (text, expected) in [
            ("https://h/a?X-Amz-Signature=f00d", "https://h/a"),
            ("http://u:p4ss@h/a", "http://h/a"),
            ("s3://b/a@b?c", "s3://b/a@b?c"),
        ] {
            assert_eq!(shown(text), expected);
        }
        assert_eq!(shown("a?b"), "a?b");
    }
}
