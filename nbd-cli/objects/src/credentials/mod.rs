//! Credentials, regions and endpoints, from where AWS's own tools take them.
//!
//! A profile that the user names comes first, then keys and a web identity in the environment, then
//! the profile of the environment or `default`, then the task of a container, and the instance.

mod ini;

use std::path::Path;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, AwsCredentialProvider};
use object_store::{CredentialProvider, RetryConfig};

use crate::crypto::OpenSsl;
use crate::error::{Result, StoreError};
use crate::settings::{Addressing, Environment, StoreSettings, Timeouts};
use crate::transport::{Redirects, Transport};

use ini::{Ini, Section};

/// How one S3 store is reached.
pub(crate) struct S3Access {
    pub(crate) region: Option<String>,
    pub(crate) endpoint: Option<String>,
    pub(crate) addressing: Option<Addressing>,
    pub(crate) source: Source,
}

/// Where credentials come from.
pub(crate) enum Source {
    /// Requests are not signed.
    Anonymous,
    /// Fixed keys.
    Keys(AwsCredential),
    /// A token in a file, exchanged for keys (AssumeRoleWithWebIdentity).
    WebIdentity { token_file: String, role: String, session: Option<String> },
    /// The task of a container, or the pod of a cluster.
    Container(Vec<(AmazonS3ConfigKey, String)>),
    /// The metadata service of the virtual machine.
    Instance,
}

/// Kinds of credentials in profiles that are not supported, with a remedy.
const UNSUPPORTED: [(&str, &str); 5] = [
    ("source_profile", "roles that another profile assumes"),
    ("credential_source", "roles that the machine assumes"),
    ("credential_process", "credentials by a command"),
    ("sso_start_url", "single sign-on"),
    ("sso_session", "single sign-on"),
];

/// The settings that belong to one another.
const CREDENTIALS: [&str; 3] = ["aws_access_key_id", "aws_secret_access_key", "aws_session_token"];

impl S3Access {
    /// Finds out how the store is reached.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, a profile does not exist, or its credentials are of a kind that is
    /// not supported.
    pub(crate) fn resolve(settings: &StoreSettings) -> Result<Self> {
        let environment = &settings.environment;
        let profile = Profile::read(settings)?;
        let first = |names: &[&str]| names.iter().find_map(|name| environment.get(name));
        let of_profile = |name: &str| profile.get(name).map(str::to_owned);
        let region = settings.region.clone();
        let region = region
            .or_else(|| first(&["AWS_REGION", "AWS_DEFAULT_REGION"]).map(str::to_owned))
            .or_else(|| of_profile("region"));
        let endpoint = settings.endpoint.clone();
        let endpoint = endpoint
            .or_else(|| first(&["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL"]).map(str::to_owned))
            .or_else(|| of_profile("s3.endpoint_url"))
            .or_else(|| of_profile("endpoint_url"));
        if let Some(endpoint) = &endpoint {
            check_endpoint(endpoint)?;
        }
        let style = profile.get("s3.addressing_style");
        let addressing = settings.addressing.or_else(|| style?.parse().ok());
        let source = match settings.anonymous {
            true => Source::Anonymous,
            false => profile.source(settings.profile.is_some(), environment)?,
        };
        Ok(Self { region, endpoint, addressing, source })
    }
}

fn check_endpoint(endpoint: &str) -> Result<()> {
    let uri = endpoint.parse::<hyper::Uri>().ok();
    let is_usable = uri.is_some_and(|uri| {
        matches!(uri.scheme_str(), Some("http" | "https"))
            && uri.authority().is_some_and(|authority| !authority.as_str().contains('@'))
            && uri.query().is_none()
    });
    match is_usable {
        true => Ok(()),
        false => Err(StoreError::invalid(
            "the endpoint of the store is not the address of one; write http:// or https://, a \
             host, and a port if it is not the usual one",
        )),
    }
}

/// A profile of the AWS files.
struct Profile {
    name: String,
    /// Whether the settings or the environment name it.
    is_named: bool,
    settings: Section,
}

impl Profile {
    fn read(settings: &StoreSettings) -> Result<Self> {
        let environment = &settings.environment;
        let named = settings.profile.as_deref();
        let named = named.or_else(|| environment.get("AWS_PROFILE"));
        let name = named.unwrap_or("default").to_owned();
        let read = |variable: &str, usual: &str| match environment.get(variable) {
            Some(path) => Ini::read(Path::new(path)),
            None => match environment.get("HOME") {
                Some(home) => Ini::read_usual(&Path::new(home).join(".aws").join(usual)),
                None => Ok(Ini::default()),
            },
        };
        let config = read("AWS_CONFIG_FILE", "config")?;
        let credentials = read("AWS_SHARED_CREDENTIALS_FILE", "credentials")?;
        let found = merged(config.profile(&name), credentials.profile(&name));
        match (found, named) {
            (None, Some(_)) => Err(StoreError::invalid(format!(
                "there is no profile '{name}' in the AWS files (~/.aws/credentials, ~/.aws/config)"
            ))),
            (found, named) => {
                let settings = found.unwrap_or_default();
                Ok(Self { name, is_named: named.is_some(), settings })
            }
        }
    }

    fn get(&self, name: &str) -> Option<&str> {
        self.settings.get(name).map(String::as_str).filter(|value| !value.is_empty())
    }

    fn source(&self, is_first: bool, environment: &Environment) -> Result<Source> {
        // The user of a named profile does not want those of the environment, whatever they are.
        if !is_first {
            let in_environment = keys(
                "the environment",
                environment.get("AWS_ACCESS_KEY_ID"),
                environment.get("AWS_SECRET_ACCESS_KEY"),
                environment.get("AWS_SESSION_TOKEN"),
            )?;
            if let Some(keys) = in_environment {
                return Ok(Source::Keys(keys));
            }
            if let Some(identity) = web_identity(environment).filter(|_| !self.assumes_role()) {
                return Ok(identity);
            }
        }
        if let Some(source) = self.own_source()? {
            return Ok(source);
        }
        if self.is_named {
            return Err(StoreError::invalid(format!(
                "the profile '{}' has no credentials; add aws_access_key_id and \
                 aws_secret_access_key",
                self.name
            )));
        }
        of_surroundings(environment)
    }

    /// Whether the profile has a role that another profile or the machine assumes. It comes before
    /// a web identity in the environment.
    fn assumes_role(&self) -> bool {
        self.get("role_arn").is_some() && self.get("web_identity_token_file").is_none()
    }

    /// The credentials in the profile itself.
    fn own_source(&self) -> Result<Option<Source>> {
        let place = format!("the profile '{}'", self.name);
        let keys = keys(
            &place,
            self.get("aws_access_key_id"),
            self.get("aws_secret_access_key"),
            self.get("aws_session_token"),
        )?;
        if let Some(role) = self.get("role_arn")
            && let Some(token_file) = self.get("web_identity_token_file")
        {
            return Ok(Some(Source::WebIdentity {
                token_file: token_file.to_owned(),
                role: role.to_owned(),
                session: self.get("role_session_name").map(str::to_owned),
            }));
        }
        // The keys beside a role are not those that the user means.
        if let Some((name, what)) = UNSUPPORTED.iter().find(|(name, _)| self.get(name).is_some()) {
            return Err(StoreError::invalid(format!(
                "{place} has {name}: {what} are not supported; put keys into the environment, for \
                 example by 'aws configure export-credentials --format env'"
            )));
        }
        Ok(keys.map(Source::Keys))
    }
}

/// The settings of both files. What stands in the file of credentials counts; a key, its secret and
/// its token are of one file.
fn merged(config: Option<&Section>, credentials: Option<&Section>) -> Option<Section> {
    let (Some(config), Some(credentials)) = (config, credentials) else {
        return config.or(credentials).cloned();
    };
    let has_key = |section: &Section| section.contains_key(CREDENTIALS[0]);
    let (mut merged, mut credentials) = (config.clone(), credentials.clone());
    match has_key(&credentials) {
        true => merged.retain(|name, _| !CREDENTIALS.contains(&name.as_str())),
        false if has_key(config) => {
            credentials.retain(|name, _| !CREDENTIALS.contains(&name.as_str()));
        }
        false => {}
    }
    merged.extend(credentials);
    Some(merged)
}

/// The keys at one place. Half of them is a mistake.
fn keys(
    place: &str,
    key: Option<&str>,
    secret: Option<&str>,
    token: Option<&str>,
) -> Result<Option<AwsCredential>> {
    match (key, secret) {
        (None, None) => Ok(None),
        (Some(key), Some(secret)) => Ok(Some(AwsCredential {
            key_id: key.to_owned(),
            secret_key: secret.to_owned(),
            token: token.map(str::to_owned),
        })),
        (Some(_), None) => {
            Err(StoreError::invalid(format!("{place} has an access key without its secret")))
        }
        (None, Some(_)) => {
            Err(StoreError::invalid(format!("{place} has a secret without its access key")))
        }
    }
}

/// The web identity in the environment.
fn web_identity(environment: &Environment) -> Option<Source> {
    Some(Source::WebIdentity {
        token_file: environment.get("AWS_WEB_IDENTITY_TOKEN_FILE")?.to_owned(),
        role: environment.get("AWS_ROLE_ARN")?.to_owned(),
        session: environment.get("AWS_ROLE_SESSION_NAME").map(str::to_owned),
    })
}

/// What the machine or container gives to its programs.
fn of_surroundings(environment: &Environment) -> Result<Source> {
    if let Some(identity) = web_identity(environment) {
        return Ok(identity);
    }
    let value = |key: AmazonS3ConfigKey| {
        let value = environment.get(&key.as_ref().to_ascii_uppercase())?.to_owned();
        Some((key, value))
    };
    if let Some(relative) = value(AmazonS3ConfigKey::ContainerCredentialsRelativeUri) {
        return Ok(Source::Container(vec![relative]));
    }
    let token = value(AmazonS3ConfigKey::ContainerAuthorizationTokenFile);
    match (value(AmazonS3ConfigKey::ContainerCredentialsFullUri), token) {
        (Some(complete), Some(token)) => Ok(Source::Container(vec![complete, token])),
        (Some(_), None) => Err(StoreError::invalid(
            "AWS_CONTAINER_CREDENTIALS_FULL_URI is supported only with \
             AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE; put keys into the environment",
        )),
        // A token without an address is of no use.
        (None, _) => Ok(Source::Instance),
    }
}

/// Makes the provider of an instance's credentials. Elsewhere nothing answers, so it must not be
/// patient.
pub(crate) fn of_instance(settings: &StoreSettings) -> Result<AwsCredentialProvider> {
    let limit = Duration::from_secs(2);
    let timeouts = Timeouts { connect: limit, idle: limit, request: limit, total: limit };
    let settings = StoreSettings { timeouts, ..settings.clone() };
    let retry = RetryConfig { max_retries: 1, retry_timeout: limit, ..RetryConfig::default() };
    let is_off = settings.environment.get("AWS_EC2_METADATA_DISABLED");
    if is_off.is_some_and(|value| value.eq_ignore_ascii_case("true")) {
        return Ok(Arc::new(Nowhere));
    }
    let builder = AmazonS3Builder::new()
        .with_bucket_name("unused")
        .with_retry(retry)
        .with_crypto_provider(Arc::new(OpenSsl))
        .with_http_connector(Transport::new(&settings, Redirects::Returned)?);
    let builder = match settings.environment.get("AWS_EC2_METADATA_SERVICE_ENDPOINT") {
        Some(endpoint) => builder.with_metadata_endpoint(endpoint),
        None => builder,
    };
    let store = builder.build().map_err(|error| StoreError::of("use", "the instance", &error))?;
    Ok(Arc::new(Instance(Arc::clone(store.credentials()))))
}

/// The credentials of the instance, and a sentence if there are none.
#[derive(Debug)]
struct Instance(AwsCredentialProvider);

#[async_trait]
impl CredentialProvider for Instance {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        self.0.get_credential().await.map_err(|error| {
            let error = StoreError::of("read", "the credentials of the instance", &error);
            tracing::debug!(%error, "the metadata service gives no credentials");
            no_credentials()
        })
    }
}

/// No credentials.
#[derive(Debug)]
struct Nowhere;

#[async_trait]
impl CredentialProvider for Nowhere {
    type Credential = AwsCredential;

    async fn get_credential(&self) -> object_store::Result<Arc<AwsCredential>> {
        Err(no_credentials())
    }
}

fn no_credentials() -> object_store::Error {
    let why = "there are no credentials: set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or write \
               ~/.aws/credentials, or read without a signature";
    object_store::Error::Unauthenticated { path: String::new(), source: why.into() }
}

#[cfg(test)]
mod tests;
