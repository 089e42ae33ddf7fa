//! The addresses of objects and of prefixes.

use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// Schemes of objects.
pub const SCHEMES: [&str; 3] = ["s3", "http", "https"];

/// An object, or a prefix of objects.
///
/// Printed without the query of an HTTP address, which can be a signature.
#[derive(Clone, PartialEq, Eq)]
pub enum StoreUrl {
    /// `s3://bucket/key`.
    S3 {
        /// The bucket.
        bucket: String,
        /// The key; empty for the whole bucket.
        key: String,
    },
    /// `http://…` or `https://…`, complete.
    Http(String),
    /// A directory of this machine.
    Directory(PathBuf),
}

impl StoreUrl {
    /// Returns whether a text has the form of an object's URL.
    ///
    /// ```
    /// use nbd_objects::StoreUrl;
    ///
    /// assert!(StoreUrl::is_object("s3://bucket/disk.qcow2"));
    /// assert!(!StoreUrl::is_object("nbd://localhost") && !StoreUrl::is_object("disk.qcow2"));
    /// ```
    #[must_use]
    pub fn is_object(text: &str) -> bool {
        text.split_once("://").is_some_and(|(scheme, _)| SCHEMES.contains(&scheme))
    }
}

impl FromStr for StoreUrl {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        if let Some(rest) = text.strip_prefix("s3://") {
            let (bucket, key) = rest.split_once('/').unwrap_or((rest, ""));
            let is_name = |char: char| char.is_ascii_alphanumeric() || ".-_".contains(char);
            if bucket.is_empty() || !bucket.chars().all(is_name) {
                return Err(format!("'{text}' does not name a bucket; write s3://bucket/key"));
            }
            return Ok(Self::S3 { bucket: bucket.to_owned(), key: key.to_owned() });
        }
        if text.starts_with("http://") || text.starts_with("https://") {
            return http(text);
        }
        match text.strip_prefix("file:").unwrap_or(text) {
            "" => Err("an address is empty".to_owned()),
            path => Ok(Self::Directory(path.strip_prefix("//").unwrap_or(path).into())),
        }
    }
}

fn http(text: &str) -> Result<StoreUrl, String> {
    // The text itself is not repeated: it can have a password or a signature.
    let uri: hyper::Uri = text.parse().map_err(|_| "an address of HTTP is malformed".to_owned())?;
    if uri.authority().is_some_and(|authority| authority.as_str().contains('@')) {
        return Err(
            "an address of HTTP has a user or a password, which is not supported".to_owned()
        );
    }
    if uri.host().is_none_or(str::is_empty) {
        return Err("an address of HTTP has no host".to_owned());
    }
    Ok(StoreUrl::Http(text.to_owned()))
}

impl fmt::Display for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::S3 { bucket, key } => write!(f, "s3://{bucket}/{key}"),
            Self::Http(url) => {
                let end = url.find(['?', '#']).unwrap_or(url.len());
                f.write_str(&url[..end])
            }
            Self::Directory(path) => write!(f, "'{}'", path.display()),
        }
    }
}

impl fmt::Debug for StoreUrl {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn addresses_are_told_apart() {
        let s3 = |bucket: &str, key: &str| {
            Ok(StoreUrl::S3 { bucket: bucket.to_owned(), key: key.to_owned() })
        };
        assert_eq!("s3://b/a/c.img".parse(), s3("b", "a/c.img"));
        assert_eq!("s3://b".parse(), s3("b", ""));
        assert_eq!("/srv/x".parse(), Ok(StoreUrl::Directory("/srv/x".into())));
        assert_eq!("file:///srv/x".parse(), Ok(StoreUrl::Directory("/srv/x".into())));
        for bad in ["s3:///k", "s3://b?x/k", "http://", "https://u:p@h/", "http://h h/", ""] {
            assert!(bad.parse::<StoreUrl>().is_err(), "{bad}");
        }
    }

    #[test]
    fn signature_in_an_address_is_not_printed() {
        let url: StoreUrl = "https://host/a.img?X-Amz-Signature=f00d".parse().unwrap();
        assert_eq!(url.to_string(), "https://host/a.img");
        assert_eq!(format!("{url:?}"), "https://host/a.img");
        let error = "https://u:p4ss@host/?f00d".parse::<StoreUrl>().unwrap_err();
        assert!(!error.contains("p4ss") && !error.contains("f00d"), "{error}");
    }
}
