//! Credentials, regions and endpoints, from where AWS's own tools take them.
//!
//! A profile that the user names comes first, then keys in the environment, then the profile of the
//! environment or `default`, then a web identity, the task of a container, and the instance.

mod ini;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use async_trait::async_trait;
use object_store::aws::{AmazonS3Builder, AmazonS3ConfigKey, AwsCredential, AwsCredentialProvider};
use object_store::{CredentialProvider, RetryConfig};

use crate::crypto::OpenSsl;
use crate::error::{Result, StoreError};
use crate::settings::{Addressing, Environment, StoreSettings, Timeouts};
use crate::transport::{Redirects, Transport};

use ini::Ini;

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

impl S3Access {
    /// Finds out how the store is reached.
    ///
    /// # Errors
    ///
    /// If a file cannot be read, a profile does not exist, or its credentials are of a kind that is not
    /// supported.
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
    /// Whether somebody asked for it.
    is_named: bool,
    settings: BTreeMap<String, String>,
}

impl Profile {
    fn read(settings: &StoreSettings) -> Result<Self> {
        let environment = &settings.environment;
        let named = settings.profile.as_deref();
        let named = named.or_else(|| environment.get("AWS_PROFILE"));
        let name = named.unwrap_or("default").to_owned();
        let file = |variable: &str, usual: &str| {
            let usual = || Some(PathBuf::from(environment.get("HOME")?).join(".aws").join(usual));
            environment.get(variable).map(PathBuf::from).or_else(usual)
        };
        let mut found = None::<BTreeMap<String, String>>;
        let config = file("AWS_CONFIG_FILE", "config");
        let credentials = file("AWS_SHARED_CREDENTIALS_FILE", "credentials");
        // What stands in the file of credentials counts.
        for path in [config, credentials].into_iter().flatten() {
            if let Some(section) = Ini::read(&path)?.profile(&name) {
                found.get_or_insert_default().extend(section.clone());
            }
        }
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
        let in_environment = keys(
            "the environment",
            environment.get("AWS_ACCESS_KEY_ID"),
            environment.get("AWS_SECRET_ACCESS_KEY"),
            environment.get("AWS_SESSION_TOKEN"),
        )?;
        match in_environment {
            Some(keys) if !is_first => return Ok(Source::Keys(keys)),
            _ => {}
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
        Ok(of_surroundings(environment))
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

/// What the machine or container gives to its programs.
fn of_surroundings(environment: &Environment) -> Source {
    let token_file = environment.get("AWS_WEB_IDENTITY_TOKEN_FILE");
    if let (Some(token_file), Some(role)) = (token_file, environment.get("AWS_ROLE_ARN")) {
        let session = environment.get("AWS_ROLE_SESSION_NAME").map(str::to_owned);
        let (token_file, role) = (token_file.to_owned(), role.to_owned());
        return Source::WebIdentity { token_file, role, session };
    }
    let container: Vec<_> = [
        AmazonS3ConfigKey::ContainerCredentialsRelativeUri,
        AmazonS3ConfigKey::ContainerCredentialsFullUri,
        AmazonS3ConfigKey::ContainerAuthorizationTokenFile,
    ]
    .into_iter()
    .filter_map(|key| {
        let name = key.as_ref().to_ascii_uppercase();
        environment.get(&name).map(|value| (key, value.to_owned()))
    })
    .collect();
    match container.is_empty() {
        true => Source::Instance,
        false => Source::Container(container),
    }
}

/// Makes the provider of an instance's credentials. Elsewhere nothing answers, so it must not be patient.
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
mod tests {
    use super::*;

    fn settings(variables: &[(&str, &str)], credentials: &str, config: &str) -> StoreSettings {
        let home = tempfile::tempdir().unwrap().keep();
        std::fs::create_dir(home.join(".aws")).unwrap();
        std::fs::write(home.join(".aws/credentials"), credentials).unwrap();
        std::fs::write(home.join(".aws/config"), config).unwrap();
        let home = ("HOME", home.to_str().unwrap());
        let variables = variables.iter().chain([&home]);
        let variables = variables.map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
        StoreSettings { environment: Environment::new(variables), ..StoreSettings::default() }
    }

    fn key(settings: &StoreSettings) -> String {
        let access = S3Access::resolve(settings).map_err(|error| error.to_string());
        std::fs::remove_dir_all(settings.environment.get("HOME").unwrap()).unwrap();
        match access.map(|access| access.source) {
            Ok(Source::Keys(keys)) => keys.key_id,
            Ok(Source::WebIdentity { role, .. }) => format!("role {role}"),
            Ok(Source::Container(_)) => "container".to_owned(),
            Ok(Source::Instance) => "instance".to_owned(),
            Ok(Source::Anonymous) => "anonymous".to_owned(),
            Err(error) => error,
        }
    }

    const CREDENTIALS: &str = "[default]\naws_access_key_id=D\naws_secret_access_key=s\n\
                               [other]\naws_access_key_id=O\naws_secret_access_key=s\n[empty]\n";
    const CONFIG: &str = "[profile role]\nrole_arn=r\nsource_profile=other\n\
                          [profile web]\nrole_arn=w\nweb_identity_token_file=/t\n\
                          [profile sso]\nsso_session=x\n[profile tool]\ncredential_process=x\n";
    const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "s")];

    #[test]
    fn credentials_are_found_in_the_order_of_aws_tools() {
        let of = |variables: &[(&str, &str)]| key(&settings(variables, CREDENTIALS, CONFIG));
        assert_eq!(of(&[]), "D");
        assert_eq!(of(&[("AWS_PROFILE", "other")]), "O");
        assert_eq!(of(&KEYS), "E");
        assert_eq!(of(&[KEYS[0], KEYS[1], ("AWS_PROFILE", "other")]), "E");
        let mut named = settings(&KEYS, CREDENTIALS, CONFIG);
        named.profile = Some("other".to_owned());
        assert_eq!(key(&named), "O");
        assert_eq!(of(&[("AWS_PROFILE", "web")]), "role w");
        assert_eq!(key(&settings(&[], "", "")), "instance");
        let web = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "r")];
        assert_eq!(key(&settings(&web, "", "")), "role r");
        let task = [("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2")];
        assert_eq!(key(&settings(&task, "", "")), "container");
        let mut anonymous = settings(&KEYS, CREDENTIALS, CONFIG);
        anonymous.anonymous = true;
        assert_eq!(key(&anonymous), "anonymous");
    }

    #[test]
    fn profiles_that_cannot_be_used_are_refused_by_name() {
        let of = |profile| key(&settings(&[("AWS_PROFILE", profile)], CREDENTIALS, CONFIG));
        assert!(of("role").contains("'role' has source_profile"), "{}", of("role"));
        assert!(of("sso").contains("single sign-on"), "{}", of("sso"));
        assert!(of("tool").contains("credential_process"), "{}", of("tool"));
        assert!(of("none").contains("no profile 'none'"), "{}", of("none"));
        assert!(of("empty").contains("'empty' has no credentials"), "{}", of("empty"));
        let half = key(&settings(&KEYS[..1], CREDENTIALS, CONFIG));
        assert!(half.contains("without its secret"), "{half}");
    }

    #[test]
    fn region_and_endpoint_come_from_options_then_environment_then_profile() {
        let config = "[default]\nregion=p\nendpoint_url=http://p\ns3=\n addressing_style=virtual\n";
        let resolve = |settings: &StoreSettings| {
            let access = S3Access::resolve(settings).unwrap();
            std::fs::remove_dir_all(settings.environment.get("HOME").unwrap()).unwrap();
            (access.region.unwrap(), access.endpoint.unwrap(), access.addressing)
        };
        let found = resolve(&settings(&KEYS, "", config));
        let virtually = Some(Addressing::Virtual);
        assert_eq!(found, ("p".to_owned(), "http://p".to_owned(), virtually));
        let variables = [KEYS[0], KEYS[1], ("AWS_REGION", "e"), ("AWS_ENDPOINT_URL", "http://e")];
        let found = resolve(&settings(&variables, "", config));
        assert_eq!(found, ("e".to_owned(), "http://e".to_owned(), virtually));
        let mut given = settings(&variables, "", config);
        (given.region, given.endpoint) = (Some("o".to_owned()), Some("https://o:1".to_owned()));
        given.addressing = Some(Addressing::Path);
        let found = resolve(&given);
        assert_eq!(found, ("o".to_owned(), "https://o:1".to_owned(), Some(Addressing::Path)));
        for bad in ["localhost:9000", "ftp://a", "http://", "http://u:p@h", "http://h/?q"] {
            assert!(check_endpoint(bad).is_err(), "{bad}");
        }
    }
}
