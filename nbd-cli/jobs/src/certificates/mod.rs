//! An authority, certificates and pre-shared keys, in the files that servers and clients read
//! (feature `certificates`).
//!
//! The files have the names and the layout that QEMU and libnbd use. Keys are readable by their owner
//! only; a file is replaced when the new one is complete.
//!
//! ```
//! use nbd_jobs::certificates::{
//!     ExistingCredentials, Issue, NewAuthority, Role, issue, new_authority,
//! };
//!
//! # let directory = tempfile::tempdir()?;
//! # let pki = directory.path().join("pki");
//! # let observer = nbd_jobs::JobContext::default().observer;
//! let existing = ExistingCredentials::Refuse;
//! let authority = NewAuthority { directory: &pki, name: None, days: 3650, existing };
//! new_authority(&authority, &*observer)?;
//! let names = ["vmhost".parse()?, "192.0.2.7".parse()?];
//! let issued = issue(
//!     &Issue {
//!         authority: &pki,
//!         directory: None,
//!         directory_name: "vmhost",
//!         role: Role::Server,
//!         name: "vmhost",
//!         names: &names,
//!         organization: None,
//!         days: 365,
//!         existing,
//!     },
//!     &*observer,
//! )?;
//! assert!(issued.files.contains(&pki.join("vmhost/server-cert.pem")));
//! # Ok::<(), Box<dyn std::error::Error>>(())
//! ```

mod certificate;
mod credentials;
mod files;
mod issue;
mod names;
mod psk;
mod renew;

use crate::error::{JobError, JobErrorKind};

pub use self::certificate::{Role, SECONDS_PER_DAY, now, seconds};
pub use self::credentials::{
    CA_KEY_FILE, certificates, directories, file_names, missing, private_key,
};
pub use self::files::{ExistingCredentials, read, readable_by_others};
pub use self::issue::{Issue, Issued, NewAuthority, issue, new_authority};
pub use self::names::{
    HostName, OtherNames, common_name as server_name, distinguished_name, host_names, parse_text,
};
pub use self::psk::{AddUser, add_user, parse_user};
pub use self::renew::{Due, Renewal, renew};

fn credentials_error(message: impl Into<String>) -> JobError {
    JobError::new(JobErrorKind::Credentials, message)
}
