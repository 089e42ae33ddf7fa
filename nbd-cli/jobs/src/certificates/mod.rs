//! An authority, certificates and pre-shared keys, in the files that servers and clients read
//! (feature `certificates`).
//!
//! The files have the names and the layout that QEMU and libnbd use. Keys are readable by their
//! owner only; a file is replaced when the new one is complete.
//!
//! ```
//! use nbd_jobs::certificates::{
//!     CredentialInfo, Issue, NewAuthority, Role, Validity, issue, new_authority,
//! };
//!
//! # let directory = tempfile::tempdir()?;
//! # let pki = directory.path().join("pki");
//! # let observer = nbd_jobs::JobContext::default().observer;
//! new_authority(&NewAuthority::new(&pki), &*observer)?;
//! let names = ["vmhost".parse()?, "192.0.2.7".parse()?];
//! let mut wanted = Issue::new(&pki, Role::Server, "vmhost");
//! wanted.names = &names;
//! let issued = issue(&wanted, &*observer)?;
//! assert!(issued.files.contains(&pki.join("vmhost/server-cert.pem")));
//! for credential in nbd_jobs::certificates::inspect(&pki, 30)? {
//!     if let CredentialInfo::Certificate(certificate) = credential {
//!         assert_eq!(certificate.validity, Validity::Valid);
//!     }
//! }
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod certificate;
mod credentials;
mod files;
mod inspect;
mod issue;
mod names;
mod psk;
mod renew;

use crate::error::{JobError, JobErrorKind};

pub use self::certificate::Role;
pub use self::files::ExistingCredentials;
pub use self::inspect::{
    CertificateInfo, CertificateKind, CredentialInfo, KeysInfo, Validity, inspect,
};
pub use self::issue::{Issue, Issued, NewAuthority, issue, new_authority};
pub use self::names::{HostName, common_name as server_name, parse_text};
pub use self::psk::{AddUser, add_user, parse_user};
pub use self::renew::{Due, Renewal, renew};

fn credentials_error(message: impl Into<String>) -> JobError {
    JobError::new(JobErrorKind::Credentials, message)
}
