//! Distinguished names as text (RFC 4514), spelled like GnuTLS, so that names copied from
//! `certtool` or from QEMU's messages match.

use openssl::nid::Nid;
use openssl::x509::{X509NameEntryRef, X509NameRef};

/// Both orders in which a name is written.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct DistinguishedName {
    /// The most specific part first: RFC 4514, `certtool` and `openssl -nameopt RFC2253`.
    pub(super) specific_first: String,
    /// In the order of the certificate: what QEMU compares and logs.
    pub(super) as_encoded: String,
}

impl DistinguishedName {
    pub(super) fn new(name: &X509NameRef) -> Self {
        let mut parts: Vec<String> = name.entries().map(part).collect();
        let as_encoded = parts.join(",");
        parts.reverse();
        Self { specific_first: parts.join(","), as_encoded }
    }
}

fn part(entry: &X509NameEntryRef) -> String {
    let object = entry.object();
    let attribute = match object.nid() {
        Nid::PKCS9_EMAILADDRESS => "EMAIL".to_owned(),
        Nid::UNDEF => object.to_string(),
        nid => nid.short_name().map_or_else(|_| object.to_string(), str::to_owned),
    };
    let value = match entry.data().to_string() {
        Ok(text) => escaped(&text),
        Err(_) => {
            let hex = entry.data().as_slice().iter().map(|byte| format!("{byte:02x}"));
            format!("#{}", hex.collect::<String>())
        }
    };
    format!("{attribute}={value}")
}

/// Section 2.4 of RFC 4514.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    let last = text.chars().count().saturating_sub(1);
    for (index, character) in text.chars().enumerate() {
        let is_outer_space = character == ' ' && (index == 0 || index == last);
        let is_special = matches!(character, ',' | '+' | '"' | '\\' | '<' | '>' | ';');
        match character {
            '\0' => out.push_str("\\00"),
            '#' if index == 0 => out.push_str("\\#"),
            _ if is_special || is_outer_space => out.extend(['\\', character]),
            _ => out.push(character),
        }
    }
    out
}

#[cfg(test)]
mod tests {
    use super::*;
    use openssl::x509::X509Name;

    #[test]
    fn names_are_spelled_as_gnutls_does() {
        let mut name = X509Name::builder().unwrap();
        for (field, value) in [
            ("C", "GB"),
            ("ST", "Lo, ndon"),
            ("O", "Example #1"),
            ("OU", " x "),
            ("CN", "client"),
            ("emailAddress", "a@b.c"),
            ("serialNumber", "12"),
        ] {
            name.append_entry_by_text(field, value).unwrap();
        }
        let name = DistinguishedName::new(&name.build());
        // What certtool --certificate-info prints, and what QEMU's authz object sees.
        assert_eq!(
            name.specific_first,
            r"serialNumber=12,EMAIL=a@b.c,CN=client,OU=\ x\ ,O=Example #1,ST=Lo\, ndon,C=GB"
        );
        assert_eq!(
            name.as_encoded,
            r"C=GB,ST=Lo\, ndon,O=Example #1,OU=\ x\ ,CN=client,EMAIL=a@b.c,serialNumber=12"
        );
    }

    #[test]
    fn a_value_cannot_pass_for_a_name_of_several_parts() {
        assert_eq!(escaped("bob,CN=alice"), r"bob\,CN=alice");
        assert_eq!(escaped(r"bob\,CN=alice"), r"bob\\\,CN=alice");
        assert_eq!(escaped("#x\0"), r"\#x\00");
    }
}
