//! Names of exports in QEMU's notation, on its command lines and in images, and the options of its
//! driver `nbd`.

mod driver_options;
mod settings;
mod values;

use std::ffi::OsStr;
use std::os::unix::ffi::OsStrExt as _;
use std::path::Path;

use nbd_proto::uri::{NbdUri, Transport};

use crate::text::printable;

#[cfg(feature = "server")]
pub(crate) use self::driver_options::is_container;
pub use self::driver_options::{
    BackingInName, BackingOption, FormatInName, GivenInName, NameInImage, NamedImage, from_json,
    from_key_values, from_options, take_backing,
};
use self::driver_options::{tcp, uri};
#[cfg(feature = "server")]
pub(crate) use self::settings::check_aio;
pub use self::settings::{AioMode, CacheSwitches, DriverSettings, ExportOptions};
#[cfg(feature = "server")]
pub(crate) use self::values::{parse_detect_zeroes, parse_discard, take_size, take_window};

/// Schemes of NBD URIs.
pub const SCHEMES: [&str; 6] = ["nbd", "nbd+unix", "nbd+tcp", "nbds", "nbds+unix", "nbds+tcp"];
/// Scheme of names that contain the options of a QEMU driver as a JSON object.
pub const JSON_SCHEME: &str = "json";

/// Prefix of the name of a file.
pub const FILE_PREFIX: &str = "file:";

/// Protocols that names on QEMU's command lines may begin with here.
const PROTOCOLS: [&str; 7] = ["file", "json", "nbd", "nbds", "http", "https", "s3"];

/// Returns the path of a file whose name may begin with `file:`.
pub fn path_in(name: &OsStr) -> &Path {
    let path = name.as_bytes().strip_prefix(FILE_PREFIX.as_bytes());
    Path::new(path.map_or(name, OsStr::from_bytes))
}

/// Returns whether a name is that of a server: `nbd:HOST:PORT`, `nbd:unix:PATH`, or a URI.
pub fn is_name_of_server(text: &str) -> bool {
    let scheme = text.split_once(':').map(|(scheme, _)| scheme);
    scheme.is_some_and(|scheme| SCHEMES.contains(&scheme))
}

/// Returns the JSON object of a name that has the options of a driver.
pub fn json_in(name: &str) -> Option<&str> {
    name.strip_prefix("json:")
}

/// Returns whether a name in an image addresses a QEMU driver or a server rather than a plain path.
pub fn has_scheme(name: &str) -> bool {
    let scheme = name.split_once(':').map(|(scheme, _)| scheme);
    scheme == Some(JSON_SCHEME) || name.starts_with(FILE_PREFIX) || is_name_of_server(name)
}

/// Refuses a name that begins with a protocol which is not known here. QEMU does so with the ones
/// that it does not know, and never takes such a name for that of a file: `rbd:pool/disk` must not
/// become a file of this machine. Disks in archives (`machine.ova:2`) are not affected.
///
/// # Errors
///
/// A sentence that names the protocol.
pub fn check_protocol(name: &OsStr) -> Result<(), String> {
    let bytes = name.as_bytes();
    let end = bytes.iter().position(|byte| matches!(byte, b':' | b'/'));
    let Some(end) = end.filter(|end| bytes[*end] == b':') else { return Ok(()) };
    let protocol = String::from_utf8_lossy(&bytes[..end]);
    let is_known = PROTOCOLS.contains(&&*protocol)
        || protocol.starts_with("nbd+")
        || protocol.starts_with("nbds+")
        || protocol.to_ascii_lowercase().ends_with(".ova");
    if is_known {
        return Ok(());
    }
    Err(format!(
        "Unknown protocol '{}'; file, nbd, https and s3 are known here, and a file of this name is \
         ./{}",
        printable(&protocol),
        printable(&name.to_string_lossy())
    ))
}

/// Parses the name of a server and export.
///
/// # Errors
///
/// A sentence that describes the defect.
pub fn from_name(text: &str) -> Result<NbdUri, String> {
    let Some(rest) = text.strip_prefix("nbd:").filter(|rest| !rest.starts_with("//")) else {
        return text.parse().map_err(|error: nbd_proto::uri::UriError| error.to_string());
    };
    let (address, export_name) = match rest.split_once(":exportname=") {
        Some((address, name)) => (address, name),
        None => (rest, ""),
    };
    let transport = match (address.strip_prefix("unix:"), address.rsplit_once(':')) {
        (Some(path), _) => Transport::Unix { path: path.into() },
        (None, Some((host, port))) => tcp(host, Some(port))?,
        (None, None) => return Err(format!("'{text}' has no port; write nbd://{rest}/ instead")),
    };
    Ok(uri(transport, export_name))
}

/// Parses the name of a backing or data file that has a scheme: see [`from_name`], `file:` and a
/// path, or `json:` and the options of the drivers `nbd` or `file`, alone or below those of an
/// image format. The image itself records that format beside the name. The settings in the name,
/// such as the locking, are checked and ignored: those of the image above apply, which the user
/// chooses.
///
/// # Errors
///
/// A sentence that describes the defect, or names the required driver.
pub fn from_name_in_image(text: &str) -> Result<NamedImage, String> {
    if let Some(path) = text.strip_prefix(FILE_PREFIX) {
        return Ok(NameInImage::File(path.into()).into());
    }
    match text.strip_prefix("json:") {
        Some(object) => {
            let named = from_json(object)?;
            let below = named.backing.described().map(|image| &image.settings);
            for settings in std::iter::once(&named.settings).chain(below) {
                settings.export.refuse()?;
            }
            match named.settings.key_secret {
                Some(_) => Err(settings::NO_SECRETS.to_owned()),
                None => Ok(named),
            }
        }
        None => Ok(NameInImage::Export(Box::new(from_name(text)?)).into()),
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::key_values::KeyValues;

    #[test]
    fn all_forms_of_a_name_lead_to_the_same_server() {
        let unix = "nbd+unix:///disk?socket=/run/s";
        assert_eq!(from_name(unix).unwrap().to_string(), unix);
        assert_eq!(from_name("nbd:unix:/run/s:exportname=disk").unwrap().to_string(), unix);
        let tcp = "nbd://example.org:10810/disk";
        assert_eq!(from_name(tcp).unwrap().to_string(), tcp);
        assert_eq!(from_name("nbd:example.org:10810:exportname=disk").unwrap().to_string(), tcp);
        for (text, expected) in [
            ("server.type=unix,server.path=/run/s,export=disk", unix),
            ("path=/run/s,export=disk", unix),
            ("server.host=example.org,server.port=10810,export=disk,reconnect-delay=0", tcp),
        ] {
            let mut options = KeyValues::parse(text, None).unwrap();
            assert_eq!(from_options(&mut options).unwrap().to_string(), expected);
            assert!(options.is_empty(), "{options:?}");
        }
    }

    #[test]
    fn names_that_qemu_writes_into_images_are_understood() {
        let unix = "nbd+unix:///disk?socket=/run/s";
        for name in [
            unix,
            "nbd:unix:/run/s:exportname=disk",
            r#"json:{"driver":"nbd","server":{"type":"unix","path":"/run/s"},"export":"disk"}"#,
            r#"json:{"driver":"raw","file":{"driver":"nbd","path":"/run/s","export":"disk"}}"#,
            r#"json:{"file.driver":"nbd","file.path":"/run/s","file.export":"disk"}"#,
            r#"json:{"server.path":"/run/s","server.type":"unix","export":"disk","driver":"nbd"}"#,
        ] {
            let NameInImage::Export(uri) = from_name_in_image(name).unwrap().name else {
                panic!("{name} is one of a server");
            };
            assert_eq!(uri.to_string(), unix, "{name}");
        }
        for name in [
            "file:a/b",
            r#"json:{"driver":"file","filename":"a/b"}"#,
            r#"json:{"driver":"qcow2","file":{"driver":"file","filename":"a/b"}}"#,
            r#"json:{"driver":"raw","file.driver":"host_device","file.filename":"a/b"}"#,
        ] {
            let named = from_name_in_image(name).unwrap();
            assert_eq!(named.name, NameInImage::File("a/b".into()), "{name}");
            assert_eq!(named.backing, BackingInName::AsNamed, "{name}");
            assert!(named.part.is_whole(), "{name}");
        }
        for (name, part) in [
            (r#"json:{"driver":"file","path":"/etc/passwd"}"#, "filename"),
            (r#"json:{"driver":"file","filename":"a","more":"b"}"#, "'more'"),
            (
                r#"json:{"file.filename":"a","more":"b"}"#,
                "No block driver supports the option 'more'",
            ),
            (r#"json:{"driver":"ssh","path":"/etc/passwd"}"#, "'ssh'"),
            (r#"json:{"driver":"raw","offset":512,"file":{"driver":"nbd"}}"#, "server.host"),
            (
                r#"json:{"driver":"raw","offset":512,"file":{"driver":"qcow2","file.filename":"a"}}"#,
                "'offset'",
            ),
            (r#"json:{"driver":"raw","size":1000,"file":{"driver":"file","filename":"a"}}"#, "512"),
            (
                r#"json:{"driver":"raw","offset":-1,"file":{"driver":"file","filename":"a"}}"#,
                "offset",
            ),
            (
                r#"json:{"driver":"raw","offset":9223372036854775808,"file":{"driver":"raw","offset":
                    9223372036854775808,"file":{"driver":"file","filename":"a"}}}"#,
                "out of range",
            ),
            (
                r#"json:{"driver":"raw","size":1024,"file":{"driver":"raw","size":512,
                    "file":{"driver":"file","filename":"a"}}}"#,
                "past the end",
            ),
            (r#"json:{"driver":"nbd","path":"/s","tls-creds":"a"}"#, "'tls-creds'"),
            (r#"json:{"driver":"nbd","path":"/s","more":"a"}"#, "'more'"),
            (r#"json:{"path":"/s"}"#, "'path'"),
            (r#"json:{"file":{"path":"/s"}}"#, "no driver"),
            ("json:[]", "not an object"),
            ("json:{", "not valid JSON"),
        ] {
            let error = from_name_in_image(name).unwrap_err();
            assert!(error.contains(part), "{name}: {error}");
        }
    }

    #[test]
    fn parts_of_parts_are_parts_of_the_file() {
        let text = r#"json:{"driver":"qcow2","file":{"driver":"raw","offset":1024,"size":512,
            "file":{"driver":"raw","offset":4096,"size":8192,"file":{"driver":"file","filename":"a"}}}}"#;
        let part = from_name_in_image(text).unwrap().part;
        assert_eq!((part.offset, part.size), (5120, Some(512)));
    }

    #[test]
    fn a_name_with_an_unknown_protocol_is_not_that_of_a_file() {
        for name in ["rbd:pool/disk", "zeroinit:/a", "iscsi://h/x/1", "a.qcow2:b", ":", "fat:d"] {
            let why = check_protocol(OsStr::new(name)).unwrap_err();
            let protocol = name.split(':').next().unwrap();
            assert!(why.contains(&format!("'{protocol}'")), "{why}");
            assert!(why.ends_with(&format!("./{name}")), "{why}");
        }
        assert!(check_protocol(OsStr::from_bytes(b"\xff:\n")).is_err());
        for name in [
            "a",
            "",
            "./rbd:x",
            "/rbd:x",
            "file:rbd:x",
            "json:{}",
            "nbd:h:1",
            "nbds+unix:///",
            "-",
            "s3://b/k",
            "https://h/x",
            "http://h/x",
            "machine.ova:2",
            "M.OVA:a",
        ] {
            assert_eq!(check_protocol(OsStr::new(name)), Ok(()), "{name}");
        }
    }

    #[test]
    fn a_name_in_the_old_notation_needs_a_port() {
        assert!(from_name("nbd:host").is_err());
        assert!(is_name_of_server("nbd:host:1") && !is_name_of_server("./nbd:host"));
    }
}
