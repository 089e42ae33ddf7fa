//! Digests and signatures, by OpenSSL.

use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm,
};
use object_store::{Error, Result};
use openssl::sha::{Sha256, sha256};

/// Length of the blocks that SHA-256 works on, in bytes.
const HMAC_BLOCK: usize = 64;

/// The digests of signed requests.
#[derive(Debug)]
pub(crate) struct OpenSsl;

impl CryptoProvider for OpenSsl {
    fn digest(&self, algorithm: DigestAlgorithm) -> Result<Box<dyn DigestContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => {
                Ok(Box::new(Digest { hasher: Sha256::new(), digest: [0; 32] }))
            }
            _ => Err(unsupported("another digest than SHA-256")),
        }
    }

    fn hmac(&self, algorithm: DigestAlgorithm, secret: &[u8]) -> Result<Box<dyn HmacContext>> {
        match algorithm {
            DigestAlgorithm::Sha256 => {
                Ok(Box::new(Hmac { key: secret.to_owned(), data: Vec::new(), digest: [0; 32] }))
            }
            _ => Err(unsupported("another digest than SHA-256")),
        }
    }

    fn sign(&self, _algorithm: SigningAlgorithm, _pem: &[u8]) -> Result<Box<dyn Signer>> {
        Err(unsupported("a signature by a private key"))
    }
}

struct Digest {
    hasher: Sha256,
    digest: [u8; 32],
}

impl DigestContext for Digest {
    fn update(&mut self, data: &[u8]) {
        self.hasher.update(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.digest = std::mem::replace(&mut self.hasher, Sha256::new()).finish();
        Ok(&self.digest)
    }
}

/// Keeps its data until the end: the signed texts are short.
struct Hmac {
    key: Vec<u8>,
    data: Vec<u8>,
    digest: [u8; 32],
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        self.data.extend_from_slice(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.digest = hmac(&self.key, &[&self.data]);
        Ok(&self.digest)
    }
}

/// HMAC-SHA-256 (RFC 2104).
pub(crate) fn hmac(key: &[u8], parts: &[&[u8]]) -> [u8; 32] {
    let hashed;
    let key = match key.len() > HMAC_BLOCK {
        true => {
            hashed = sha256(key);
            &hashed[..]
        }
        false => key,
    };
    let padded = |with: u8| {
        let mut block = [with; HMAC_BLOCK];
        block.iter_mut().zip(key).for_each(|(byte, key)| *byte ^= key);
        block
    };
    let mut inner = Sha256::new();
    inner.update(&padded(0x36));
    parts.iter().for_each(|part| inner.update(part));
    let mut outer = Sha256::new();
    outer.update(&padded(0x5c));
    outer.update(&inner.finish());
    outer.finish()
}

/// Returns bytes as hexadecimal digits, in lower case.
pub(crate) fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// Returns the bytes of at most 1024 hexadecimal digits.
pub(crate) fn from_hex(text: &str) -> Option<Vec<u8>> {
    let is_hex = text.bytes().all(|byte| byte.is_ascii_hexdigit());
    if !is_hex || !text.len().is_multiple_of(2) || text.len() > 1024 {
        return None;
    }
    let pair = |at| u8::from_str_radix(text.get(at..at + 2)?, 16).ok();
    (0..text.len()).step_by(2).map(pair).collect()
}

fn unsupported(what: &str) -> Error {
    Error::NotSupported { source: format!("{what} is not supported").into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// RFC 4231, test cases 2 and 6; FIPS 180-4's "abc".
    #[test]
    fn digests_are_those_of_the_standards() {
        let mut digest = OpenSsl.digest(DigestAlgorithm::Sha256).unwrap();
        digest.update(b"a");
        digest.update(b"bc");
        let expected = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad";
        assert_eq!(hex(digest.finish().unwrap()), expected);
        let mut hmac = OpenSsl.hmac(DigestAlgorithm::Sha256, b"Jefe").unwrap();
        hmac.update(b"what do ya want ");
        hmac.update(b"for nothing?");
        let expected = "5bdcc146bf60754e6a042426089575c75a003f089d2739839dec58b964ec3843";
        assert_eq!(hex(hmac.finish().unwrap()), expected);
        let data = b"Test Using Larger Than Block-Size Key - Hash Key First";
        let expected = "60e431591ee0b67f0d8a26aacbf5b77f8e0bc6213728c5140546040f0ee37f54";
        assert_eq!(hex(&super::hmac(&[0xaa; 131], &[&data[..20], &data[20..]])), expected);
    }

    #[test]
    fn hexadecimal_digits_are_read_as_they_are_printed() {
        let bytes: Vec<u8> = (0..=255).collect();
        assert_eq!(from_hex(&hex(&bytes)), Some(bytes));
        for bad in ["0", "0g", "+1", "\u{e9}", &"00".repeat(513)] {
            assert_eq!(from_hex(bad), None, "{bad}");
        }
    }
}
