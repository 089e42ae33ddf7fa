//! The digests of signed requests, by OpenSSL.

use object_store::client::{
    CryptoProvider, DigestAlgorithm, DigestContext, HmacContext, Signer, SigningAlgorithm,
};
use object_store::{Error, Result};
use openssl::error::ErrorStack;
use openssl::hash::MessageDigest;
use openssl::pkey::PKey;
use openssl::sha::Sha256;

/// Digests and signatures by OpenSSL.
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
                Ok(Box::new(Hmac { key: secret.to_owned(), data: Vec::new(), digest: Vec::new() }))
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
    digest: Vec<u8>,
}

impl HmacContext for Hmac {
    fn update(&mut self, data: &[u8]) {
        self.data.extend_from_slice(data);
    }

    fn finish(&mut self) -> Result<&[u8]> {
        self.digest = hmac(&self.key, &self.data)
            .map_err(|error| Error::Generic { store: "OpenSSL", source: Box::new(error) })?;
        Ok(&self.digest)
    }
}

fn hmac(key: &[u8], data: &[u8]) -> Result<Vec<u8>, ErrorStack> {
    let key = PKey::hmac(key)?;
    openssl::sign::Signer::new(MessageDigest::sha256(), &key)?.sign_oneshot_to_vec(data)
}

fn unsupported(what: &str) -> Error {
    Error::NotSupported { source: format!("{what} is not supported").into() }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn hex(bytes: &[u8]) -> String {
        bytes.iter().map(|byte| format!("{byte:02x}")).collect()
    }

    /// RFC 4231, test case 2; FIPS 180-4's "abc".
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
    }
}
