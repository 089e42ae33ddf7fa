//! Files with passphrases of repositories.

use std::io::Read as _;
use std::path::Path;

use nbd_jobs::secret::{SecretBytes, read_secret};
use zeroize::Zeroizing;

use crate::error::CommandError;
use crate::key_file::leave_no_dump;

/// The environment variable that names the file.
const VARIABLE: &str = "NBD_PASSPHRASE_FILE";
/// Longest passphrase, in bytes.
const PASSPHRASE_LEN_MAX: usize = 4096;

/// Reads the passphrase in the file that the environment names.
pub(crate) fn passphrase_of_environment() -> Result<Option<SecretBytes>, CommandError> {
    let file = std::env::var_os(VARIABLE).filter(|file| !file.is_empty());
    file.map(|file| read_passphrase(Path::new(&file))).transpose()
}

/// Reads the first line of a file. From now on this process leaves no core dump.
pub(crate) fn read_passphrase(path: &Path) -> Result<SecretBytes, CommandError> {
    leave_no_dump();
    let failed = |why: String| {
        CommandError::new(format!("cannot read the passphrase in '{}': {why}", path.display()))
    };
    let file = std::fs::File::open(path).map_err(|error| failed(error.to_string()))?;
    let content = read_secret(&mut file.take(PASSPHRASE_LEN_MAX as u64 + 1));
    let content = content.map_err(|error| failed(error.to_string()))?;
    let line = content.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let line = line.strip_suffix(b"\r").unwrap_or(line);
    match line.len() {
        0 => Err(failed("its first line is empty".to_owned())),
        1..=PASSPHRASE_LEN_MAX => Ok(Zeroizing::new(line.to_vec())),
        _ => Err(failed("it is too long".to_owned())),
    }
}
