//! The encryption of an image, as far as it is known without its key.

use imgfmt::{Encryption, LuksInfo, LuksSlot};
use serde::Serialize;

/// The place of the information: only inside an image of another format the keys begin with a name.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Naming {
    Alone,
    InImage,
}

/// The keys are those of qemu-img.
#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
pub(super) struct JsonEncryption<'a> {
    #[serde(skip_serializing_if = "Option::is_none")]
    format: Option<&'static str>,
    #[serde(flatten)]
    luks: Option<JsonLuks<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonLuks<'a> {
    /// Not a key of qemu-img, which supports the first version only.
    version: u16,
    uuid: &'a str,
    detached_header: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    payload_offset: Option<u64>,
    #[serde(flatten)]
    details: Option<JsonDetails<'a>>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonDetails<'a> {
    cipher_alg: &'a str,
    cipher_mode: &'a str,
    ivgen_alg: &'a str,
    #[serde(skip_serializing_if = "Option::is_none")]
    ivgen_hash_alg: Option<&'a str>,
    hash_alg: &'a str,
    master_key_iters: u32,
    slots: Vec<JsonSlot>,
}

#[derive(Serialize)]
#[serde(rename_all = "kebab-case")]
struct JsonSlot {
    active: bool,
    #[serde(skip_serializing_if = "Option::is_none")]
    iters: Option<u32>,
    key_offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    stripes: Option<u32>,
}

pub(super) fn json(encryption: &Encryption, naming: Naming) -> JsonEncryption<'_> {
    let luks = match encryption {
        Encryption::Luks(luks) => luks.as_ref(),
        _ => None,
    };
    let format = (naming == Naming::InImage).then(|| name(encryption));
    JsonEncryption { format, luks: luks.map(JsonLuks::from) }
}

/// One line.
pub(super) fn text(encryption: &Encryption) -> String {
    let Encryption::Luks(Some(luks)) = encryption else { return name(encryption).to_owned() };
    let details = luks.details.as_ref().map(|details| {
        let active = details.slots.iter().filter(|slot| slot.is_active).count();
        let (cipher, mode) = (&details.cipher, &details.cipher_mode);
        format!(", {cipher}-{mode}, {active} of {} key slots in use", details.slots.len())
    });
    format!("luks version {}{}, uuid {}", luks.version, details.unwrap_or_default(), luks.uuid)
}

fn name(encryption: &Encryption) -> &'static str {
    match encryption {
        Encryption::Aes => "aes",
        Encryption::Luks(_) => "luks",
        _ => "unknown",
    }
}

impl<'a> From<&'a LuksInfo> for JsonLuks<'a> {
    fn from(luks: &'a LuksInfo) -> Self {
        Self {
            version: luks.version,
            uuid: &luks.uuid,
            detached_header: false,
            payload_offset: luks.payload_offset,
            details: luks.details.as_ref().map(|details| JsonDetails {
                cipher_alg: &details.cipher,
                cipher_mode: &details.cipher_mode,
                ivgen_alg: &details.iv_generator,
                ivgen_hash_alg: details.iv_generator_hash.as_deref(),
                hash_alg: &details.hash,
                master_key_iters: details.master_key_iterations,
                slots: details.slots.iter().map(JsonSlot::from).collect(),
            }),
        }
    }
}

impl From<&LuksSlot> for JsonSlot {
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
