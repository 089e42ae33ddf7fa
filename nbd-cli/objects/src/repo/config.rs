//! What a repository is, and its keys.

use openssl::symm::{Cipher, decrypt_aead, encrypt_aead};
use serde::{Deserialize, Serialize};

use super::error::{RepositoryError, RepositoryErrorKind, Result};
use super::id::{Id, random};
use super::objects::Creates;
use super::page::{BLOCK_SIZE, PAGE_BLOCKS};
use crate::crypto::{from_hex, hex, hmac};

const FORMAT: &str = "nbd-cli backup repository";
const VERSION: u32 = 1;
const CIPHER: &str = "aes-256-gcm";

/// `repo.json`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct Config {
    format: String,
    version: u32,
    pub(crate) id: String,
    block_size: u64,
    page_blocks: u64,
    creates: String,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    encryption: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    key_check: Option<String>,
}

impl Config {
    pub(crate) fn new(id: Id, creates: Creates, master: Option<&[u8; 32]>) -> Self {
        Self {
            format: FORMAT.to_owned(),
            version: VERSION,
            id: id.to_string(),
            block_size: BLOCK_SIZE,
            page_blocks: PAGE_BLOCKS,
            creates: match creates {
                Creates::Exclusive => "exclusive".to_owned(),
                Creates::Overwriting => "overwriting".to_owned(),
            },
            encryption: master.map(|_| CIPHER.to_owned()),
            key_check: master.map(check_of),
        }
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        encode(self)
    }

    /// Reads and checks `repo.json`.
    pub(crate) fn decode(content: &[u8], name: &str) -> Result<Self> {
        let invalid = |why: &str| RepositoryError::invalid(format!("the repository {name} {why}"));
        let config: Self = serde_json::from_slice(content)
            .map_err(|_| RepositoryError::damaged(format!("repo.json in {name} is malformed")))?;
        if config.format != FORMAT {
            return Err(invalid("is another program's"));
        }
        if config.version != VERSION
            || (config.block_size, config.page_blocks) != (BLOCK_SIZE, PAGE_BLOCKS)
        {
            return Err(invalid("was made by a newer version of this program; use that one"));
        }
        if config.encryption.as_deref().is_some_and(|cipher| cipher != CIPHER)
            || config.encryption.is_some() != config.key_check.is_some()
        {
            return Err(invalid("is encrypted in a way that this version does not know"));
        }
        config.creates().ok_or_else(|| invalid("is of a kind that this version does not know"))?;
        Ok(config)
    }

    pub(crate) fn creates(&self) -> Option<Creates> {
        match &*self.creates {
            "exclusive" => Some(Creates::Exclusive),
            "overwriting" => Some(Creates::Overwriting),
            _ => None,
        }
    }

    pub(crate) fn is_encrypted(&self) -> bool {
        self.encryption.is_some()
    }

    /// Returns whether this is the master key.
    pub(crate) fn accepts(&self, master: &[u8; 32]) -> bool {
        self.key_check.as_deref() == Some(&*check_of(master))
    }
}

fn check_of(master: &[u8; 32]) -> String {
    hex(&hmac(master, &[b"key check"]))
}

fn check_of_key(master: &[u8; 32], id: Id) -> String {
    hex(&hmac(master, &[b"key ", id.to_string().as_bytes()]))
}

/// A key that unlocks the repository: the master key, wrapped by a passphrase.
#[derive(Clone, Debug, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) struct WrappedKey {
    kdf: String,
    log_n: u8,
    r: u32,
    p: u32,
    salt: String,
    nonce: String,
    wrapped: String,
    /// Says that this is a key of this master key: HMAC-SHA-256 of `key ` and its identity.
    #[serde(default)]
    check: String,
}

/// Work of a new key: 64 MiB, a quarter of a second.
const LOG_N: u8 = 16;
/// Memory that a key may ask for, in bytes.
const MEMORY_MAX: u64 = 512 << 20;

impl WrappedKey {
    /// Wraps the master key.
    pub(crate) fn wrap(
        master: &[u8; 32],
        passphrase: &[u8],
        (repository, id): (&str, Id),
    ) -> Result<Self> {
        let (mut salt, mut nonce, mut tag) = ([0; 16], [0; 12], [0; 16]);
        random(&mut salt)?;
        random(&mut nonce)?;
        let mut key = Self {
            kdf: "scrypt".to_owned(),
            log_n: LOG_N,
            r: 8,
            p: 1,
            salt: hex(&salt),
            nonce: hex(&nonce),
            wrapped: String::new(),
            check: check_of_key(master, id),
        };
        let derived = key.derive(passphrase).ok_or_else(|| failed("scrypt"))?;
        let cipher = Cipher::aes_256_gcm();
        let associated = repository.as_bytes();
        let sealed = encrypt_aead(cipher, &derived, Some(&nonce), associated, master, &mut tag);
        let sealed = sealed.map_err(|_| failed("AES-256-GCM"))?;
        key.wrapped = hex(&[&sealed[..], &tag].concat());
        Ok(key)
    }

    pub(crate) fn encode(&self) -> Result<Vec<u8>> {
        encode(self)
    }

    /// Returns the master key, if this is the passphrase and nothing is damaged.
    pub(crate) fn unwrap(&self, passphrase: &[u8], repository: &str) -> Option<[u8; 32]> {
        let (nonce, wrapped) = (from_hex(&self.nonce)?, from_hex(&self.wrapped)?);
        let (sealed, tag) = wrapped.split_last_chunk::<16>()?;
        if nonce.len() != 12 || sealed.len() != 32 {
            return None;
        }
        let derived = self.derive(passphrase)?;
        let cipher = Cipher::aes_256_gcm();
        let associated = repository.as_bytes();
        let master = decrypt_aead(cipher, &derived, Some(&nonce), associated, sealed, tag).ok()?;
        master.try_into().ok()
    }

    /// Returns whether it was made by someone who had the master key, under this identity.
    pub(crate) fn is_of(&self, master: &[u8; 32], id: Id) -> bool {
        self.check == check_of_key(master, id)
    }

    /// Derives a key from a passphrase. Work and memory are bounded, whatever the object says.
    fn derive(&self, passphrase: &[u8]) -> Option<[u8; 32]> {
        let is_known = self.kdf == "scrypt" && (1..=20).contains(&self.log_n);
        if !is_known || !(1..=16).contains(&self.r) || !(1..=4).contains(&self.p) {
            return None;
        }
        let salt = from_hex(&self.salt)?;
        let (n, r, p) = (1 << self.log_n, u64::from(self.r), u64::from(self.p));
        let mut derived = [0; 32];
        let done = openssl::pkcs5::scrypt(passphrase, &salt, n, r, p, MEMORY_MAX, &mut derived);
        done.ok().map(|()| derived)
    }
}

fn encode<T: Serialize>(value: &T) -> Result<Vec<u8>> {
    let text = serde_json::to_vec_pretty(value);
    text.map_err(|error| RepositoryError::invalid(format!("no JSON: {error}")))
}

fn failed(what: &str) -> RepositoryError {
    RepositoryError::new(RepositoryErrorKind::Key, format!("OpenSSL does not offer {what}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_the_passphrase_unwraps_the_key() {
        let own = Id::from_bytes([3; 16]);
        let key = WrappedKey::wrap(&[7; 32], b"correct horse", ("id", own)).unwrap();
        let text = key.encode().unwrap();
        assert!(!String::from_utf8_lossy(&text).contains("correct horse"));
        let key: WrappedKey = serde_json::from_slice(&text).unwrap();
        assert_eq!(key.unwrap(b"correct horse", "id"), Some([7; 32]));
        assert_eq!(key.unwrap(b"correct horsf", "id"), None);
        assert_eq!(key.unwrap(b"correct horse", "other"), None);
        assert!(key.is_of(&[7; 32], own) && !key.is_of(&[8; 32], own));
        assert!(!key.is_of(&[7; 32], Id::from_bytes([4; 16])));
        for change in [
            |key: &mut WrappedKey| key.log_n = 63,
            |key: &mut WrappedKey| key.r = u32::MAX,
            |key: &mut WrappedKey| key.wrapped.truncate(10),
            |key: &mut WrappedKey| key.salt = "\u{e9}x".to_owned(),
            |key: &mut WrappedKey| key.kdf = "none".to_owned(),
        ] {
            let mut key = key.clone();
            change(&mut key);
            assert_eq!(key.unwrap(b"correct horse", "id"), None);
        }
    }

    #[test]
    fn other_versions_are_refused() {
        let config = Config::new(Id::from_bytes([1; 16]), Creates::Exclusive, None);
        let text = String::from_utf8(config.encode().unwrap()).unwrap();
        assert_eq!(Config::decode(text.as_bytes(), "x").unwrap(), config);
        for (from, to) in [
            ("\"version\": 1", "\"version\": 2"),
            ("65536", "4096"),
            ("exclusive", "perhaps"),
            ("nbd-cli backup", "restic"),
            ("\"version\"", "\"encryption\": \"rot13\", \"key-check\": \"\", \"version\""),
        ] {
            let other = text.replace(from, to);
            assert_ne!(other, text);
            assert!(Config::decode(other.as_bytes(), "x").is_err(), "{other}");
        }
    }
}
