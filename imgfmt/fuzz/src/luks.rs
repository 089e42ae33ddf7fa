//! The header of a LUKS2 volume whose checksum is right: the bytes are those of its text.

use std::sync::Arc;

use imgfmt::storage::MemoryStorage;
use imgfmt::{ErrorKind, Format, Image, OpenOptions, seal_luks_header};

const LENGTH: usize = 16 << 10;
const BINARY: usize = 4096;

pub(crate) fn luks2(data: &[u8]) {
    let mut bytes = vec![0; 64 << 10];
    let header = &mut bytes[..LENGTH];
    header[..8].copy_from_slice(b"LUKS\xba\xbe\0\x02");
    header[8..16].copy_from_slice(&(LENGTH as u64).to_be_bytes());
    let length = data.len().min(LENGTH - BINARY);
    header[BINARY..BINARY + length].copy_from_slice(&data[..length]);
    seal_luks_header(header);
    let storage = Arc::new(MemoryStorage::from_bytes(&bytes));
    // Without a passphrase all of the text is examined, and no key is derived.
    let options = OpenOptions::new().format(Format::Luks);
    let error = Image::from_storage(Arc::clone(&storage) as _, &options).expect_err("no key");
    let known = [ErrorKind::InvalidFormat, ErrorKind::Unsupported, ErrorKind::KeyRequired];
    assert!(known.contains(&error.kind()), "{error}");
    assert!(!error.to_string().contains(|c: char| c.is_control()), "{error}");
    let _ = Image::inspect_storage(storage, &options);
}

/// Texts as `cryptsetup` writes them.
pub(crate) fn seeds() -> Vec<(&'static str, &'static str, Vec<u8>)> {
    let salt = "AAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAA=";
    let slot = |kdf: &str| {
        format!(
            r#"{{"type":"luks2","key_size":64,"af":{{"type":"luks1","stripes":4000,"hash":"sha256"}},
            "area":{{"type":"raw","offset":"32768","size":"258048","encryption":"aes-xts-plain64",
            "key_size":64}},"kdf":{{{kdf},"salt":"{salt}"}}}}"#
        )
    };
    let text = |kdf: &str| {
        let slot = slot(kdf);
        let text = format!(
            r#"{{"keyslots":{{"0":{slot},"1":{slot}}},"tokens":{{}},"segments":{{"0":{{"type":"crypt",
            "offset":"16777216","size":"dynamic","iv_tweak":"0","encryption":"aes-xts-plain64",
            "sector_size":4096}}}},"digests":{{"0":{{"type":"pbkdf2","keyslots":["0","1"],
            "segments":["0"],"hash":"sha256","iterations":1000,"salt":"{salt}",
            "digest":"{salt}"}}}},"config":{{"json_size":"12288","keyslots_size":"16744448"}}}}"#
        );
        text.into_bytes()
    };
    vec![
        ("luks2", "argon2id", text(r#""type":"argon2id","time":4,"memory":1048576,"cpus":4"#)),
        ("luks2", "pbkdf2", text(r#""type":"pbkdf2","hash":"sha256","iterations":1000"#)),
    ]
}
