//! Connections to stores over TLS: which certificates are accepted, and what the others are told.
#![allow(clippy::unwrap_used)] // A test may fail.

use std::ops::Range;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use imgfmt::{HostOffset, Storage as _};
use nbd_objects::testing::TestStore;
use nbd_objects::{
    BLOCK_LEN, CacheSettings, Environment, ObjectCache, ObjectStorage, StoreSettings, StoreUrl,
    Timeouts,
};
use openssl::asn1::Asn1Time;
use openssl::bn::BigNum;
use openssl::ec::{EcGroup, EcKey};
use openssl::hash::MessageDigest;
use openssl::nid::Nid;
use openssl::pkey::{PKey, Private};
use openssl::x509::extension::{BasicConstraints, SubjectAlternativeName};
use openssl::x509::{X509, X509Builder, X509Name};

const DAY: i64 = 86_400;

/// An authority for certificates, and a directory for its files.
struct Authority {
    directory: tempfile::TempDir,
    certificate: X509,
    key: PKey<Private>,
}

fn new_key() -> PKey<Private> {
    let group = EcGroup::from_curve_name(Nid::X9_62_PRIME256V1).unwrap();
    PKey::from_ec_key(EcKey::generate(&group).unwrap()).unwrap()
}

/// A certificate without extensions, valid for these seconds from now on.
fn begin(name: &str, key: &PKey<Private>, valid: Range<i64>) -> X509Builder {
    let now = SystemTime::now().duration_since(SystemTime::UNIX_EPOCH).unwrap();
    let time = |offset| Asn1Time::from_unix(now.as_secs() as i64 + offset).unwrap();
    let mut subject = X509Name::builder().unwrap();
    subject.append_entry_by_text("CN", name).unwrap();
    let mut builder = X509::builder().unwrap();
    builder.set_version(2).unwrap();
    let serial = BigNum::from_u32(name.len() as u32).unwrap().to_asn1_integer().unwrap();
    builder.set_serial_number(&serial).unwrap();
    builder.set_subject_name(&subject.build()).unwrap();
    builder.set_pubkey(key).unwrap();
    builder.set_not_before(&time(valid.start)).unwrap();
    builder.set_not_after(&time(valid.end)).unwrap();
    builder
}

impl Authority {
    fn new(name: &str) -> Self {
        let key = new_key();
        let mut builder = begin(name, &key, -DAY..DAY);
        let constraints = BasicConstraints::new().critical().ca().build().unwrap();
        builder.append_extension(constraints).unwrap();
        let mut issuer = X509Name::builder().unwrap();
        issuer.append_entry_by_text("CN", name).unwrap();
        builder.set_issuer_name(&issuer.build()).unwrap();
        builder.sign(&key, MessageDigest::sha256()).unwrap();
        let (directory, certificate) = (tempfile::tempdir().unwrap(), builder.build());
        std::fs::write(directory.path().join("ca.pem"), certificate.to_pem().unwrap()).unwrap();
        Self { directory, certificate, key }
    }

    fn file(&self) -> PathBuf {
        self.directory.path().join("ca.pem")
    }

    /// Starts a store whose certificate is for these names.
    fn store(&self, names: &SubjectAlternativeName, valid: Range<i64>) -> TestStore {
        let key = new_key();
        let mut builder = begin("store", &key, valid);
        builder.set_issuer_name(self.certificate.subject_name()).unwrap();
        let names = names.build(&builder.x509v3_context(Some(&self.certificate), None)).unwrap();
        builder.append_extension(names).unwrap();
        builder.sign(&self.key, MessageDigest::sha256()).unwrap();
        let at = |name| self.directory.path().join(name);
        std::fs::write(at("cert.pem"), builder.build().to_pem().unwrap()).unwrap();
        std::fs::write(at("key.pem"), key.private_key_to_pem_pkcs8().unwrap()).unwrap();
        let store = TestStore::start_tls(&at("cert.pem"), &at("key.pem")).unwrap();
        store.put("/bucket/disk.img", pattern());
        store
    }

    fn usual(&self) -> TestStore {
        self.store(SubjectAlternativeName::new().dns("localhost").ip("127.0.0.1"), -DAY..DAY)
    }
}

fn pattern() -> Vec<u8> {
    (0..9 * BLOCK_LEN + 12_345).map(|index| (index / 5 + index / BLOCK_LEN * 31) as u8).collect()
}

/// Settings with these environment variables.
fn settings(variables: &[(&str, &str)]) -> StoreSettings {
    let variables = variables.iter().map(|(name, value)| ((*name).to_owned(), (*value).to_owned()));
    StoreSettings { environment: Environment::new(variables), ..StoreSettings::default() }
}

/// Opens the image in the store by this address, and reads it; an error is what is shown.
fn read(endpoint: &str, settings: &StoreSettings) -> Result<(), String> {
    let directory = tempfile::tempdir().unwrap();
    let cache = CacheSettings {
        directory: Some(directory.path().to_owned()),
        is_optional: false,
        ..CacheSettings::default()
    };
    let cache = ObjectCache::open(&cache).unwrap();
    let url: StoreUrl = format!("{endpoint}/bucket/disk.img").parse().unwrap();
    let storage = ObjectStorage::open(&url, settings, &cache, Arc::new(|| false))
        .map_err(|error| error.to_string())?;
    let expected = pattern();
    let mut data = vec![0; expected.len()];
    for (index, part) in data.chunks_mut(100_000).enumerate() {
        let read = storage.read_at(HostOffset::new(index as u64 * 100_000), part).unwrap();
        assert_eq!(read, part.len());
    }
    assert!(data == expected, "other bytes than those of the object");
    Ok(())
}

#[test]
fn store_is_read_if_its_authority_is_named() {
    let authority = Authority::new("our authority");
    let store = authority.usual();
    let file = authority.file();
    let text = file.to_str().unwrap();
    let named = StoreSettings { authorities: Some(file.clone()), ..settings(&[]) };
    read(&store.endpoint(), &named).unwrap();
    for variable in ["AWS_CA_BUNDLE", "SSL_CERT_FILE"] {
        read(&store.endpoint(), &settings(&[(variable, text)])).unwrap();
    }
    let by_name = store.endpoint().replace("127.0.0.1", "localhost");
    read(&by_name, &named).unwrap();
    assert!(store.take_seen().len() > 8, "the store was asked");
}

#[test]
fn several_requests_use_one_connection_with_tls() {
    let authority = Authority::new("our authority");
    let store = authority.usual();
    let named = StoreSettings { authorities: Some(authority.file()), ..settings(&[]) };
    let url: StoreUrl = format!("{}/bucket/disk.img", store.endpoint()).parse().unwrap();
    let cache = ObjectCache::open(&CacheSettings::default()).unwrap();
    let storage = ObjectStorage::open(&url, &named, &cache, Arc::new(|| false)).unwrap();
    for block in [7, 3, 5] {
        let mut buffer = [0; 512];
        let offset = block * BLOCK_LEN;
        storage.read_at(HostOffset::new(offset as u64), &mut buffer).unwrap();
        assert_eq!(buffer[..], pattern()[offset..offset + 512]);
    }
    assert_eq!((store.take_seen().len(), store.connections()), (4, 1));
}

/// A certificate does not become valid by asking again.
#[test]
fn invalid_certificate_is_an_error_at_once_that_says_what_to_do() {
    let authority = Authority::new("our authority");
    let other = Authority::new("another authority");
    let mut local = SubjectAlternativeName::new();
    local.dns("localhost").ip("127.0.0.1");
    let mut elsewhere = SubjectAlternativeName::new();
    elsewhere.dns("store.example");
    for (trusted, names, valid, expected) in [
        (
            Some(&other),
            &local,
            -DAY..DAY,
            &["unable to get local issuer", "--store-authorities"][..],
        ),
        (None, &local, -DAY..DAY, &["unable to get local issuer", "--store-authorities"]),
        (Some(&authority), &elsewhere, -DAY..DAY, &["not for '127.0.0.1'", "name that it has"]),
        (Some(&authority), &local, -2 * DAY..-DAY, &["has expired", "operator of the store"]),
        (Some(&authority), &local, DAY..2 * DAY, &["not yet valid", "clock of this machine"]),
    ] {
        let store = authority.store(names, valid);
        let mut settings = settings(&[]);
        settings.authorities = trusted.map(Authority::file);
        let error = read(&store.endpoint(), &settings).unwrap_err();
        let host = store.endpoint().replace("https://", "");
        let begin = format!(
            "cannot open {}/bucket/disk.img: cannot connect to {host}: its certificate is not valid: ",
            store.endpoint()
        );
        assert!(error.starts_with(&begin), "{error}");
        for part in expected {
            assert!(error.contains(part), "'{part}' is missing in: {error}");
        }
        assert_eq!(store.connections(), 1, "{error}");
        assert!(store.take_seen().is_empty(), "it was asked for something");
    }
}

#[test]
fn name_of_another_server_in_the_certificate_is_refused_by_name_too() {
    let authority = Authority::new("our authority");
    let store = authority.store(SubjectAlternativeName::new().ip("127.0.0.1"), -DAY..DAY);
    let named = StoreSettings { authorities: Some(authority.file()), ..settings(&[]) };
    let by_name = store.endpoint().replace("127.0.0.1", "localhost");
    let error = read(&by_name, &named).unwrap_err();
    assert!(error.contains("not for 'localhost'"), "{error}");
}

#[test]
fn server_without_tls_is_named_as_such() {
    let store = TestStore::start().unwrap();
    let endpoint = store.endpoint().replace("http://", "https://");
    let mut settings = settings(&[]);
    settings.timeouts = Timeouts { total: Duration::from_millis(50), ..Timeouts::default() };
    let error = read(&endpoint, &settings).unwrap_err();
    assert!(error.contains("TLS") && error.contains(&store.endpoint()[7..]), "{error}");
}

#[test]
fn file_without_authorities_is_the_fault_of_this_machine() {
    let directory = tempfile::tempdir().unwrap();
    let file = directory.path().join("ca.pem");
    let named = StoreSettings { authorities: Some(file.clone()), ..settings(&[]) };
    let missing = read("https://127.0.0.1:1", &named).unwrap_err();
    assert!(missing.contains("ca.pem") && missing.contains("No such file"), "{missing}");
    std::fs::write(&file, "no certificate").unwrap();
    let empty = read("https://127.0.0.1:1", &named).unwrap_err();
    assert!(empty.contains("has no certificates in the form PEM"), "{empty}");
}
