//! Settings of connections to object stores.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU32;
use std::path::PathBuf;
use std::str::FromStr;
use std::time::Duration;

/// How stores are found, and how long requests may take.
#[derive(Clone, Debug, Default)]
pub struct StoreSettings {
    /// The address of an S3 store: `http://` or `https://`, a host and a port. By default that of
    /// the profile, then Amazon's of the region.
    pub endpoint: Option<String>,
    /// The region. By default that of the environment or profile, then `us-east-1`.
    pub region: Option<String>,
    /// The profile in the AWS files. A profile that is named here comes before keys in the
    /// environment.
    pub profile: Option<String>,
    /// Where requests have the name of the bucket.
    pub addressing: Option<Addressing>,
    /// Requests are not signed: for objects that everybody may read.
    pub anonymous: bool,
    /// A file with the authorities (PEM) that certificates must come from, in place of those that
    /// this machine trusts.
    pub authorities: Option<PathBuf>,
    /// Time limits.
    pub timeouts: Timeouts,
    /// At most this many requests each second, retries included.
    pub requests_per_second: Option<NonZeroU32>,
    /// The environment variables of the process, as far as they concern stores.
    pub environment: Environment,
}

/// Where requests have the name of the bucket.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Addressing {
    /// In the path: `https://host/bucket/key`.
    Path,
    /// In the name of the host: `https://bucket.host/key`.
    Virtual,
}

impl FromStr for Addressing {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, String> {
        match text {
            "path" => Ok(Self::Path),
            "virtual" => Ok(Self::Virtual),
            _ => Err(format!("'{text}' is neither 'path' nor 'virtual'")),
        }
    }
}

/// Time limits of requests. The transport enforces them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Timeouts {
    /// For a connection, TLS included.
    pub connect: Duration,
    /// Without a byte in either direction, once connected.
    pub idle: Duration,
    /// For one request, from its start to the last byte of the reply.
    pub request: Duration,
    /// For an operation with all its retries. A request that has begun by then is completed.
    pub total: Duration,
}

impl Default for Timeouts {
    fn default() -> Self {
        Self {
            connect: Duration::from_secs(10),
            idle: Duration::from_secs(30),
            request: Duration::from_secs(300),
            total: Duration::from_secs(120),
        }
    }
}

/// Environment variables. Libraries do not read them: the program passes them.
#[derive(Clone, Default)]
pub struct Environment(BTreeMap<String, String>);

impl Environment {
    /// Keeps those variables that concern stores.
    pub fn new(variables: impl IntoIterator<Item = (String, String)>) -> Self {
        let concerns = |name: &str| {
            name.starts_with("AWS_")
                || name.starts_with("SSL_CERT_")
                || is_proxy(name)
                || name == "HOME"
        };
        Self(variables.into_iter().filter(|(name, _)| concerns(name)).collect())
    }

    /// Returns the value of a variable that is set and not empty.
    #[must_use]
    pub fn get(&self, name: &str) -> Option<&str> {
        self.0.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    /// Returns the name of a variable that sets a proxy.
    pub(crate) fn proxy(&self) -> Option<&str> {
        self.0.keys().map(String::as_str).find(|name| is_proxy(name) && self.get(name).is_some())
    }
}

fn is_proxy(name: &str) -> bool {
    ["https_proxy", "http_proxy", "all_proxy"].contains(&name.to_ascii_lowercase().as_str())
}

/// Values can be secrets.
impl fmt::Debug for Environment {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_set().entries(self.0.keys()).finish()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_variables_of_stores_are_kept_and_their_values_are_not_printed() {
        let variables = [("AWS_SECRET_ACCESS_KEY", "s3cr3t"), ("PATH", "/bin"), ("AWS_REGION", "")];
        let variables = variables.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let environment = Environment::new(variables);
        assert_eq!(environment.get("AWS_SECRET_ACCESS_KEY"), Some("s3cr3t"));
        assert_eq!((environment.get("PATH"), environment.get("AWS_REGION")), (None, None));
        assert!(!format!("{environment:?}").contains("s3cr3t"));
    }
}
