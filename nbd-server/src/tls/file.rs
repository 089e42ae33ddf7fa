//! Reading credential files.

use std::fs::File;
use std::io::{self, Read as _};
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use super::TlsError;

/// Longest file read, in bytes. A bundle of all public authorities has about 220 KiB.
const MAX_FILE_LEN: u64 = 4 << 20;
/// Permission bit: all users may read.
const READABLE_BY_OTHERS: u32 = 0o004;

/// Reads a complete file.
pub(super) fn read(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { what, path: path.to_path_buf(), source };
    read_from(&mut File::open(path).map_err(failed)?).map_err(failed)
}

/// As [`read`], for a file with a secret. Warns if others may read it.
pub(super) fn read_secret(what: &'static str, path: &Path) -> Result<Vec<u8>, TlsError> {
    let failed = |source| TlsError::Read { what, path: path.to_path_buf(), source };
    let mut file = File::open(path).map_err(failed)?;
    let mode = file.metadata().map_err(failed)?.mode();
    if mode & READABLE_BY_OTHERS != 0 {
        tracing::warn!(
            "{what} {} can be read by every user of this system: run 'chmod 600' on it, and replace \
             the keys if others had access",
            path.display()
        );
    }
    read_from(&mut file).map_err(failed)
}

fn read_from(file: &mut File) -> io::Result<Vec<u8>> {
    let mut bytes = Vec::new();
    file.take(MAX_FILE_LEN + 1).read_to_end(&mut bytes)?;
    if bytes.len() as u64 > MAX_FILE_LEN {
        return Err(io::Error::other(format!("it has more than {MAX_FILE_LEN} bytes")));
    }
    Ok(bytes)
}
