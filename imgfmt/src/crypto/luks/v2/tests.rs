//! Headers whose checksum is right, with texts of any kind.

use serde_json::json;

use super::*;
use crate::error::{Error, ErrorKind};
use crate::passphrase::Passphrase;
use crate::storage::{Durability, MemoryStorage};
use crate::units::HostOffset;

const SALT: &str = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";

/// A volume with this text in its header of 4 MiB.
fn volume(text: &Value) -> MemoryStorage {
    let length = 4 << 20;
    let mut header = vec![0; length];
    header[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    header[8..16].copy_from_slice(&(length as u64).to_be_bytes());
    let text = text.to_string();
    header[BINARY..BINARY + text.len()].copy_from_slice(text.as_bytes());
    seal(&mut header);
    let storage = MemoryStorage::new(32 << 20);
    storage.write_at(HostOffset::new(0), &header, Durability::Cached).unwrap();
    storage
}

fn slot(kdf: &Value) -> Value {
    json!({
        "type": "luks2", "key_size": 64, "kdf": kdf,
        "area": {"type": "raw", "encryption": "aes-xts-plain64", "key_size": 64,
                 "offset": "8388608", "size": "258048"},
        "af": {"type": "luks1", "stripes": 4000, "hash": "sha256"},
    })
}

fn pbkdf2(iterations: u32, salt: &str) -> Value {
    json!({"type": "pbkdf2", "hash": "sha256", "iterations": iterations, "salt": salt})
}

fn digest(slots: &[String]) -> Value {
    json!({
        "type": "pbkdf2", "keyslots": slots, "segments": ["0"], "hash": "sha256",
        "iterations": 1000, "salt": SALT, "digest": SALT,
    })
}

/// The text of a header with these slots, all of which belong to each of these digests.
fn text(slots: &[Value], digests: usize) -> Value {
    let names: Vec<_> = (0..slots.len()).map(|number| number.to_string()).collect();
    let slots: serde_json::Map<_, _> = names.iter().cloned().zip(slots.iter().cloned()).collect();
    let digests: serde_json::Map<_, _> =
        (0..digests).map(|number| (number.to_string(), digest(&names))).collect();
    json!({
        "keyslots": slots, "digests": digests, "tokens": {}, "config": {},
        "segments": {"0": {"type": "crypt", "offset": "16777216", "size": "dynamic",
                           "iv_tweak": "0", "encryption": "aes-xts-plain64", "sector_size": 512}},
    })
}

fn refused(text: &Value) -> String {
    let error = read(&volume(text), 0).unwrap_err();
    assert_ne!(error.kind(), ErrorKind::KeyRequired, "{error}");
    error.to_string()
}

fn tried(text: &Value) -> Error {
    let storage = volume(text);
    let header = read(&storage, 0).unwrap();
    let passphrase = Passphrase::new(b"wrong".to_vec());
    header.find_key(&storage, 0, &[passphrase]).unwrap_err()
}

#[test]
fn a_header_has_32_slots_and_digests_at_most_and_each_slot_counts_once() {
    let cheap = slot(&pbkdf2(1000, SALT));
    let slots = vec![cheap.clone(); 32];
    let header = read(&volume(&text(&slots, 32)), 0).unwrap();
    let numbers: Vec<_> = header.slots.iter().map(|slot| slot.number).collect();
    assert_eq!(numbers, Vec::from_iter(0..32), "once each, 2 before 10");
    let said = refused(&text(&slots, 33));
    assert!(said.contains("33 'digests'"), "{said}");
    let said = refused(&text(&vec![cheap; 33], 1));
    assert!(said.contains("33 'keyslots'"), "{said}");
}

#[test]
fn salts_and_texts_of_any_length_are_refused_before_they_are_decoded() {
    for salt in ["", "AAAA", &"A".repeat(100_000)] {
        let said = refused(&text(&[slot(&pbkdf2(1000, salt))], 1));
        assert!(said.contains("'salt'"), "{said}");
    }
    let long = text(&[slot(&pbkdf2(1000, &"A".repeat(1_200_000)))], 1);
    assert!(refused(&long).contains("more than 262144"));
}

#[test]
fn a_wrong_passphrase_is_called_wrong_and_slots_that_were_not_tried_are_named() {
    let (cheap, costly) = (slot(&pbkdf2(1000, SALT)), slot(&pbkdf2(u32::MAX, SALT)));
    let strange = slot(&json!({"type": "scrypt", "salt": SALT}));
    let error = tried(&text(&[costly.clone(), cheap, strange], 1));
    assert_eq!(error.kind(), ErrorKind::KeyRequired, "{error}");
    let said = error.to_string();
    assert!(said.contains("opens none of its key slots; not tried: 0, 2 ("), "{said}");
    assert!(said.contains("takes minutes"), "{said}");
    let error = tried(&text(&[costly], 1));
    assert_eq!(error.kind(), ErrorKind::Unsupported, "nothing was tried: {error}");
}

#[test]
fn data_that_is_not_in_the_file_is_refused_before_a_key_is_derived() {
    for (offset, said) in [("0", "detached"), ("68719476736", "past the end of the file")] {
        let mut text = text(&[slot(&pbkdf2(1000, SALT))], 1);
        text["segments"]["0"]["offset"] = json!(offset);
        // Without a passphrase no key can be derived.
        let error = crate::crypto::luks::unlock(&volume(&text), &[]).unwrap_err().to_string();
        assert!(error.contains(said), "{error}");
    }
}

#[test]
fn a_slot_belongs_to_the_first_digest_that_names_it() {
    let mut text = text(&[slot(&pbkdf2(1000, SALT))], 2);
    text["digests"]["0"]["segments"] = json!([]);
    assert!(read(&volume(&text), 0).unwrap().slots.is_empty(), "its key is of nothing");
}

#[test]
fn names_that_are_not_numbers_are_refused() {
    for name in ["01", "-1", "4294967296", "x", ""] {
        let mut text = text(&[slot(&pbkdf2(1000, SALT))], 1);
        text["keyslots"][name] = slot(&pbkdf2(1000, SALT));
        assert!(refused(&text).contains("'keyslots'"), "{name}");
    }
}
