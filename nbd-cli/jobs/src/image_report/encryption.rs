//! The encryption of an image, as far as it is known without its key.

use imgfmt::{Encryption, LuksInfo, LuksSlot};
use serde::Serialize;

/// The place of the information: only inside an image of another format the keys begin with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Alone,
    InImage,
}

/// The encryption of a disk, with the keys of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct EncryptionReport {
    /// The name of the method, inside an image of another format.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format: Option<&'static str>,
    /// The header of LUKS.
    #[serde(flatten)]
    pub luks: Option<LuksReport>,
}

/// A LUKS header.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct LuksReport {
    /// The version; not a key of qemu-img, which supports the first version only.
    pub version: u16,
    /// The UUID.
    pub uuid: String,
    /// Whether the header is a file of its own; it never is.
    pub detached_header: bool,
    /// Offset of the disk in the container, in bytes.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub payload_offset: Option<u64>,
    /// What only headers of the first version have.
    #[serde(flatten)]
    pub details: Option<LuksDetails>,
}

/// What only LUKS headers of the first version have.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct LuksDetails {
    /// The cipher, such as `aes-256`.
    pub cipher_alg: String,
    /// Its mode, such as `xts`.
    pub cipher_mode: String,
    /// How initial vectors are made.
    pub ivgen_alg: String,
    /// The digest that they are made with.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub ivgen_hash_alg: Option<String>,
    /// The digest of keys.
    pub hash_alg: String,
    /// Iterations of the digest of the key.
    pub master_key_iters: u32,
    /// The slots of passwords.
    pub slots: Vec<LuksSlotReport>,
}

/// The slot of a password.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct LuksSlotReport {
    /// Whether it has a password.
    pub active: bool,
    /// Iterations of the digest of the password.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub iters: Option<u32>,
    /// Offset of the encrypted key in bytes.
    pub key_offset: u64,
    /// The stripes that the key is split into.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub stripes: Option<u32>,
}

impl EncryptionReport {
    pub(super) fn new(encryption: &Encryption, naming: Naming) -> Self {
        let luks = match encryption {
            Encryption::Luks(luks) => luks.as_ref(),
            _ => None,
        };
        let format = (naming == Naming::InImage).then_some(encryption.name());
        Self { format, luks: luks.map(LuksReport::from) }
    }
}

impl From<&LuksInfo> for LuksReport {
    fn from(luks: &LuksInfo) -> Self {
        Self {
            version: luks.version,
            uuid: luks.uuid.clone(),
            detached_header: false,
            payload_offset: luks.payload_offset,
            details: luks.details.as_ref().map(|details| LuksDetails {
                cipher_alg: details.cipher.clone(),
                cipher_mode: details.cipher_mode.clone(),
                ivgen_alg: details.iv_generator.clone(),
                ivgen_hash_alg: details.iv_generator_hash.clone(),
                hash_alg: details.hash.clone(),
                master_key_iters: details.master_key_iterations,
                slots: details.slots.iter().map(LuksSlotReport::from).collect(),
            }),
        }
    }
}

impl From<&LuksSlot> for LuksSlotReport {
    fn from(slot: &LuksSlot) -> Self {
        let used = |value| slot.is_active.then_some(value);
        Self {
            active: slot.is_active,
            iters: used(slot.iterations),
            key_offset: slot.key_offset,
            stripes: used(slot.stripes),
        }
    }
}
