//! The order and the places of credentials.

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

const CREDENTIALS_FILE: &str = "[default]\naws_access_key_id=D\naws_secret_access_key=s\n\
                           [other]\naws_access_key_id=O\naws_secret_access_key=s\n[empty]\n";
const CONFIG: &str = "[profile role]\nrole_arn=r\nsource_profile=other\n\
                      [profile web]\nrole_arn=w\nweb_identity_token_file=/t\n\
                      [profile sso]\nsso_session=x\n[profile tool]\ncredential_process=x\n";
const KEYS: [(&str, &str); 2] = [("AWS_ACCESS_KEY_ID", "E"), ("AWS_SECRET_ACCESS_KEY", "s")];

#[test]
fn credentials_are_found_in_the_order_of_aws_tools() {
    let of = |variables: &[(&str, &str)]| key(&settings(variables, CREDENTIALS_FILE, CONFIG));
    assert_eq!(of(&[]), "D");
    assert_eq!(of(&[("AWS_PROFILE", "other")]), "O");
    assert_eq!(of(&KEYS), "E");
    assert_eq!(of(&[KEYS[0], KEYS[1], ("AWS_PROFILE", "other")]), "E");
    let mut named = settings(&KEYS, CREDENTIALS_FILE, CONFIG);
    named.profile = Some("other".to_owned());
    assert_eq!(key(&named), "O");
    assert_eq!(of(&[("AWS_PROFILE", "web")]), "role w");
    assert_eq!(key(&settings(&[], "", "")), "instance");
    assert_eq!(key(&settings(&WEB, "", "")), "role r");
    let task = [("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2")];
    assert_eq!(key(&settings(&task, "", "")), "container");
    let mut anonymous = settings(&KEYS, CREDENTIALS_FILE, CONFIG);
    anonymous.anonymous = true;
    assert_eq!(key(&anonymous), "anonymous");
}

const WEB: [(&str, &str); 2] = [("AWS_WEB_IDENTITY_TOKEN_FILE", "/t"), ("AWS_ROLE_ARN", "r")];

#[test]
fn web_identity_of_the_environment_comes_before_profiles_that_nobody_named() {
    let of = |variables: &[(&str, &str)]| key(&settings(variables, CREDENTIALS_FILE, CONFIG));
    assert_eq!(of(&WEB), "role r");
    assert_eq!(of(&[KEYS[0], KEYS[1], WEB[0], WEB[1]]), "E");
    let role = of(&[WEB[0], WEB[1], ("AWS_PROFILE", "role")]);
    assert!(role.contains("'role' has source_profile"), "{role}");
    let mut named = settings(&WEB, CREDENTIALS_FILE, CONFIG);
    named.profile = Some("other".to_owned());
    assert_eq!(key(&named), "O");
}

#[test]
fn half_a_key_in_the_environment_is_of_no_concern_to_a_profile_that_the_user_names() {
    let mut named = settings(&KEYS[..1], CREDENTIALS_FILE, CONFIG);
    named.profile = Some("other".to_owned());
    assert_eq!(key(&named), "O");
}

#[test]
fn container_gives_credentials_only_by_a_complete_address() {
    let relative = ("AWS_CONTAINER_CREDENTIALS_RELATIVE_URI", "/v2");
    let complete = ("AWS_CONTAINER_CREDENTIALS_FULL_URI", "http://127.0.0.1/v1");
    let token = ("AWS_CONTAINER_AUTHORIZATION_TOKEN_FILE", "/t");
    let of = |variables: &[(&str, &str)]| key(&settings(variables, "", ""));
    assert_eq!(of(&[relative]), "container");
    assert_eq!(of(&[relative, complete]), "container");
    assert_eq!(of(&[complete, token]), "container");
    assert_eq!(of(&[token]), "instance");
    let alone = of(&[complete]);
    assert!(alone.contains("FULL_URI is supported only with"), "{alone}");
}

#[test]
fn key_and_token_are_of_one_file() {
    let token = |credentials: &str, config: &str| {
        let settings = settings(&[], credentials, config);
        let source = S3Access::resolve(&settings).unwrap().source;
        std::fs::remove_dir_all(settings.environment.get("HOME").unwrap()).unwrap();
        match source {
            Source::Keys(keys) => (keys.key_id, keys.token),
            _ => panic!("no keys"),
        }
    };
    let config = "[default]\nregion=r\naws_access_key_id=C\naws_secret_access_key=s\n\
                  aws_session_token=t\n";
    let own = Some("t".to_owned());
    assert_eq!(token(CREDENTIALS_FILE, config), ("D".to_owned(), None));
    assert_eq!(token("[default]\n", config), ("C".to_owned(), own.clone()));
    let rest = "[default]\naws_session_token=x\n";
    assert_eq!(token(rest, config), ("C".to_owned(), own));
}

#[test]
fn usual_files_that_are_out_of_reach_are_empty() {
    let environment = |variables: &[(&str, &str)]| {
        let variables = variables.iter();
        let variables = variables.map(|(name, value)| ((*name).into(), (*value).into()));
        let environment = Environment::new(variables);
        S3Access::resolve(&StoreSettings { environment, ..StoreSettings::default() })
    };
    let home = ("HOME", "/dev/null");
    assert!(environment(&[home, KEYS[0], KEYS[1]]).is_ok());
    let given = ("AWS_CONFIG_FILE", "/dev/null/config");
    let error = environment(&[home, given]).err().unwrap().to_string();
    assert!(error.contains("cannot read '/dev/null/config'"), "{error}");
}

#[test]
fn profiles_that_cannot_be_used_are_refused_by_name() {
    let of = |profile| key(&settings(&[("AWS_PROFILE", profile)], CREDENTIALS_FILE, CONFIG));
    assert!(of("role").contains("'role' has source_profile"), "{}", of("role"));
    assert!(of("sso").contains("single sign-on"), "{}", of("sso"));
    assert!(of("tool").contains("credential_process"), "{}", of("tool"));
    assert!(of("none").contains("no profile 'none'"), "{}", of("none"));
    assert!(of("empty").contains("'empty' has no credentials"), "{}", of("empty"));
    let half = key(&settings(&KEYS[..1], CREDENTIALS_FILE, CONFIG));
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
