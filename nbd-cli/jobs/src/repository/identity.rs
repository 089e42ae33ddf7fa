//! Identities of backups, as files record them.

use imgfmt::Uuid;
use nbd_objects::repo::{DiskOrigin, Head, Id};

use crate::error::JobError;

/// The identity that the server of a disk knows for a backup, if it has one.
pub(super) fn identity_in(origin: &DiskOrigin) -> Option<Uuid> {
    origin.identity.as_deref()?.parse().ok()
}

/// The identity of a backup in its file: that which its server knows, or that in the repository.
pub(super) fn identity_of(id: Id, head: &Head) -> Result<Uuid, JobError> {
    if let Some(known) = identity_in(&head.origin) {
        return Ok(known);
    }
    let mut text = id.to_string();
    if let Some(disk) = head.disks.first() {
        // Those of one backup have the same ID.
        let own = format!("{id}#{}", disk.name);
        text = openssl::sha::sha256(own.as_bytes())
            .iter()
            .take(16)
            .map(|byte| format!("{byte:02x}"))
            .collect();
    }
    let parts = [&text[..8], &text[8..12], &text[12..16], &text[16..20], &text[20..]];
    let none = |_| JobError::source(format!("the backup {id} has no identity"));
    parts.join("-").parse().map_err(none)
}

#[cfg(test)]
mod tests {
    use nbd_objects::repo::DiskHead;

    use super::*;

    #[test]
    fn identity_is_that_of_the_server_or_of_the_repository() {
        let id: Id = "0123456789abcdef0123456789abcdef".parse().unwrap();
        let head = r#"{"name":"a","size":1,"time":1,"data":0,"added":0,"body-length":0,
                       "body-hash":""}"#;
        let mut head: Head = serde_json::from_str(head).unwrap();
        let own = "01234567-89ab-cdef-0123-456789abcdef";
        assert_eq!(identity_of(id, &head).unwrap().to_string(), own);
        head.origin.identity = Some("nonsense".to_owned());
        assert_eq!(identity_of(id, &head).unwrap().to_string(), own);
        let known = "11234567-89ab-cdef-0123-456789abcdef";
        head.origin.identity = Some(known.to_owned());
        assert_eq!(identity_of(id, &head).unwrap().to_string(), known);
        // Each of several disks has its own.
        let disk = |name: &str| DiskHead { name: name.to_owned(), ..DiskHead::default() };
        head.disks = vec![disk("a"), disk("b")];
        let of = |name| identity_of(id, &head.of_disk(Some(name)).unwrap()).unwrap().to_string();
        assert!(of("a") != of("b") && of("a") != own);
    }
}
