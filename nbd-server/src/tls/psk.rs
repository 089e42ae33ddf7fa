//! Pre-shared keys.

use std::path::Path;

use nbd_proto::tls::{PSK_FILE, PreSharedKeys};
use openssl::error::ErrorStack;
use openssl::rand::rand_bytes;
use openssl::ssl::{SslContextBuilder, SslRef};

use super::builder::{self, Loaded};
use super::notes::{Notes, printable};
use super::{TlsError, file};

/// TLS 1.2 with forward secrecy and the fastest cipher first. GnuTLS servers and clients abort TLS
/// 1.2 if the certificate ciphers are left in.
const CIPHERS_1_2: &str = "DHE-PSK-AES128-GCM-SHA256:DHE-PSK-AES256-GCM-SHA384:\
                           ECDHE-PSK-CHACHA20-POLY1305:DHE-PSK-CHACHA20-POLY1305:\
                           PSK-AES128-GCM-SHA256:PSK-AES256-GCM-SHA384:PSK-CHACHA20-POLY1305:\
                           kECDHEPSK:kDHEPSK:kPSK";
/// Length of the random key for an unknown user, in bytes.
const DECOY_LEN: usize = 32;

/// Reads a file of pre-shared keys, or the file with the default name in a directory.
pub(super) fn load(path: &Path) -> Result<Loaded, TlsError> {
    let path = if path.is_dir() { path.join(PSK_FILE) } else { path.to_path_buf() };
    let text = file::read_secret("the key file", &path)?;
    let keys = PreSharedKeys::parse(&text).map_err(|source| TlsError::KeyFile { path, source })?;
    serve_keys(keys)
}

/// Creates a context that serves users with these keys.
pub(super) fn serve_keys(keys: PreSharedKeys) -> Result<Loaded, TlsError> {
    let users = keys.users().map(|user| String::from_utf8_lossy(user).into_owned()).collect();
    let mut builder = builder::builder()?;
    builder.set_cipher_list(CIPHERS_1_2)?;
    serve(&mut builder, keys);
    Ok(Loaded { context: builder.build(), host_names: Vec::new(), users })
}

fn serve(builder: &mut SslContextBuilder, keys: PreSharedKeys) {
    // Despite its name this serves TLS 1.3 as well.
    builder.set_psk_server_callback(move |ssl, identity, key| {
        find(&keys, ssl, identity.unwrap_or_default(), key)
    });
}

/// Writes the key of a user and returns its length. An unknown user gets a random key, so that the
/// handshake fails in the same way and place as with a wrong key.
fn find(
    keys: &PreSharedKeys,
    ssl: &SslRef,
    user: &[u8],
    space: &mut [u8],
) -> Result<usize, ErrorStack> {
    let mut decoy = [0; DECOY_LEN];
    rand_bytes(&mut decoy)?;
    let found = keys.key_of(user);
    let name = String::from_utf8_lossy(user).into_owned();
    if let Some(notes) = Notes::of(ssl) {
        match found {
            Some(_) => notes.set_user(name),
            None => notes
                .set_refusal(format!("there is no user \"{}\" in the key file", printable(&name))),
        }
    }
    let key = found.map_or(decoy.as_slice(), |key| key.expose());
    match space.get_mut(..key.len()) {
        Some(place) => {
            place.copy_from_slice(key);
            Ok(key.len())
        }
        // Older libraries take shorter keys.
        None => Ok(0),
    }
}
