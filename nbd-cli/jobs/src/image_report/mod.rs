//! Reports about images and the layers below them, with the keys of qemu-img.
//!
//! ```
//! use imgfmt::{CreateOptions, Format, Image, OpenOptions};
//! use nbd_jobs::image_location::ImageLocation;
//! use nbd_jobs::image_report::describe_chain;
//! use nbd_jobs::remote::Remotes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.qcow2");
//! Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
//! let location = ImageLocation::parse(path.as_os_str())?;
//! let layers = describe_chain(location, &OpenOptions::new(), &Remotes::default())?;
//! let report = layers[0].report();
//! assert_eq!((layers.len(), report.format, report.virtual_size), (1, "qcow2", 1 << 20));
//! println!("{}", serde_json::to_string_pretty(&report)?);
//! # Ok(())
//! # }
//! ```

mod backup;
mod encryption;
mod foreign;
mod qcow2;
mod snapshot;

use std::ffi::OsStr;
use std::os::unix::fs::MetadataExt as _;
use std::path::Path;

use imgfmt::{ImageInfo, OpenOptions};
use nbd_client::{LocalFiles, Scope, blocking};
use nbd_proto::NbdUri;
use serde::Serialize;

use self::encryption::Naming;
use crate::connect::explain_unknown_export;
use crate::error::JobError;
use crate::image_location::ImageLocation;
use crate::qemu_name::has_scheme;
use crate::remote::{Remotes, run_elsewhere};
use crate::server_report::ServerReport;

pub use self::backup::BackupReport;
pub use self::encryption::{EncryptionReport, LuksDetails, LuksReport, LuksSlotReport};
pub use self::foreign::{
    ForeignReport, VdiReport, VhdxReport, VmdkExtentReport, VmdkReport, VpcReport,
};
pub(crate) use self::qcow2::bitmap_flags;
pub use self::qcow2::{BitmapReport, Qcow2Report};
pub use self::snapshot::SnapshotReport;

/// What is known about an image whose backing and data files are not open.
#[derive(Debug)]
#[non_exhaustive]
pub struct DescribedImage {
    /// The image.
    pub location: ImageLocation,
    /// Its header and tables.
    pub info: ImageInfo,
    /// The space that its file occupies, in bytes; `None` for an export.
    pub actual_size: Option<u64>,
    /// The server of an export, after [`ask_server`](Self::ask_server).
    pub server: Option<ServerReport>,
}

/// The facts about an image, with the keys of qemu-img. Sizes are in bytes.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct ImageReport {
    /// The file or the URI.
    pub filename: String,
    /// The name of the format.
    pub format: &'static str,
    /// Size of the disk.
    pub virtual_size: u64,
    /// Space that the file occupies.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub actual_size: Option<u64>,
    /// Size of a cluster.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub cluster_size: Option<u64>,
    /// Whether the disk is encrypted.
    #[serde(skip_serializing_if = "std::ops::Not::not")]
    pub encrypted: bool,
    /// Whether the image was not closed properly.
    pub dirty_flag: bool,
    /// Name of the backing file in the image.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename: Option<String>,
    /// The same, as a path from the working directory.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub full_backing_filename: Option<String>,
    /// Name of the format of the backing file.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backing_filename_format: Option<String>,
    /// The internal snapshots.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    pub snapshots: Vec<SnapshotReport>,
    /// The backup that the image is; not a key of qemu-img.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub backup: Option<BackupReport>,
    /// What only images of this format have.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub format_specific: Option<FormatSpecific>,
    /// The properties of an export, with the keys of nbdinfo.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub server: Option<ServerReport>,
}

/// What only images of one format have.
#[derive(Clone, Debug, Serialize)]
#[non_exhaustive]
pub struct FormatSpecific {
    /// The name of the format.
    #[serde(rename = "type")]
    pub kind: &'static str,
    /// The properties.
    pub data: FormatSpecificData,
}

/// Properties of a format.
#[derive(Clone, Debug, Serialize)]
#[serde(untagged)]
#[non_exhaustive]
pub enum FormatSpecificData {
    /// Those of qcow2.
    Qcow2(Box<Qcow2Report>),
    /// Those of an encrypted container.
    Luks(Box<EncryptionReport>),
    /// Those of another format.
    Foreign(Box<ForeignReport>),
}

/// Describes an image; the files and exports that it names are not opened. Blocks, and must not be
/// called by asynchronous tasks.
///
/// # Errors
///
/// If the image cannot be read, or `options` contradict its name.
pub fn describe(
    location: ImageLocation,
    options: &OpenOptions,
    remotes: &Remotes,
) -> Result<DescribedImage, JobError> {
    let info = location.inspect(options, remotes)?;
    let actual_size = space_taken(&location)?;
    Ok(DescribedImage { location, info, actual_size, server: None })
}

/// Describes an image and all layers below it, the image first. Blocks, and must not be called by
/// asynchronous tasks.
///
/// # Errors
///
/// If a layer cannot be read, the policy in `options` does not allow to follow a name, or the chain
/// is a circle or too long.
pub fn describe_chain(
    location: ImageLocation,
    options: &OpenOptions,
    remotes: &Remotes,
) -> Result<Vec<DescribedImage>, JobError> {
    let mut layers = Vec::new();
    let mut next = Some(location.clone());
    for info in location.inspect_chain(options, remotes)? {
        let Some(location) = next else { break };
        next = location.backing(info.backing_name.as_deref())?;
        let actual_size = space_taken(&location)?;
        layers.push(DescribedImage { location, info, actual_size, server: None });
    }
    Ok(layers)
}

/// The space that a file occupies; exports do not tell it.
fn space_taken(location: &ImageLocation) -> Result<Option<u64>, JobError> {
    match location.is_remote() {
        false => actual_size(location.path()),
        true => Ok(None),
    }
}

/// Describes the server of an export.
fn server(uri: &NbdUri, files: LocalFiles, remotes: &Remotes) -> Result<ServerReport, JobError> {
    let connector = match files {
        LocalFiles::Allowed => remotes.connector(uri),
        // An image contains this URI: it must not choose local files to read.
        LocalFiles::Refused => remotes.connector(uri).local_files(files),
    };
    match blocking::inspect(&connector, Scope::ThisExport) {
        Ok(server) => Ok(ServerReport::new(&server, uri)),
        Err(error) => {
            let explained = run_elsewhere(explain_unknown_export(&connector, uri, &error));
            Err(JobError::source(explained.unwrap_or_else(|error| error.to_string())))
        }
    }
}

/// The space that the file occupies, in bytes. What was opened and is not a file is in an archive.
fn actual_size(path: &Path) -> Result<Option<u64>, JobError> {
    match std::fs::metadata(path) {
        Ok(metadata) => Ok(Some(metadata.blocks() * 512)),
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => Ok(None),
        Err(error) => {
            Err(JobError::source(format!("cannot look at '{}': {error}", path.display())))
        }
    }
}

impl DescribedImage {
    /// Describes the server of an export as well, over another connection; does nothing for a file.
    ///
    /// # Errors
    ///
    /// If the server cannot be reached or refuses.
    pub fn ask_server(&mut self, remotes: &Remotes) -> Result<(), JobError> {
        if let Some(uri) = self.location.uri() {
            self.server = Some(server(uri, self.location.local_files(), remotes)?);
        }
        Ok(())
    }

    /// Returns the facts with the keys of qemu-img.
    #[must_use]
    pub fn report(&self) -> ImageReport {
        let qcow2 = self.info.qcow2.as_ref();
        let backing = self.info.backing_name.as_deref();
        ImageReport {
            filename: self.location.name(),
            format: self.info.format.name(),
            virtual_size: self.info.size,
            actual_size: self.actual_size,
            cluster_size: qcow2.map(|qcow2| qcow2.cluster_size).or(self.info.block_size),
            encrypted: self.info.encryption.is_some(),
            dirty_flag: qcow2.is_some_and(|qcow2| qcow2.is_dirty),
            backing_filename: backing.map(|name| name.to_string_lossy().into_owned()),
            full_backing_filename: backing.map(|name| self.full_name(name)),
            backing_filename_format: self.info.backing_format.clone(),
            snapshots: qcow2
                .map(|qcow2| qcow2.snapshots.iter().map(SnapshotReport::from).collect())
                .unwrap_or_default(),
            backup: qcow2.and_then(|qcow2| qcow2.backup.as_ref()).map(BackupReport::from),
            format_specific: self.specific(),
            server: self.server.clone(),
        }
    }

    /// A name in the image, as a path from the working directory.
    fn full_name(&self, name: &OsStr) -> String {
        match self.location.beside(name) {
            Ok(location @ ImageLocation::File(_)) if !name.to_str().is_some_and(has_scheme) => {
                location.name()
            }
            _ => name.to_string_lossy().into_owned(),
        }
    }

    fn specific(&self) -> Option<FormatSpecific> {
        match (&self.info.qcow2, self.info.encryption.as_ref()) {
            (Some(qcow2), encryption) => {
                let report = Qcow2Report::new(qcow2, encryption);
                let data = FormatSpecificData::Qcow2(Box::new(report));
                Some(FormatSpecific { kind: "qcow2", data })
            }
            (None, Some(encryption)) => {
                let data = EncryptionReport::new(encryption, Naming::Alone);
                let kind = self.info.format.name();
                Some(FormatSpecific { kind, data: FormatSpecificData::Luks(Box::new(data)) })
            }
            (None, None) => {
                let details = self.info.details.as_ref()?;
                let name_of = |file: Option<&OsStr>| match file {
                    Some(name) => self.full_name(name),
                    None => self.location.name(),
                };
                let data = Box::new(ForeignReport::new(details, name_of)?);
                let kind = self.info.format.name();
                Some(FormatSpecific { kind, data: FormatSpecificData::Foreign(data) })
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::{CreateOptions, Format, Image};
    use nbd_client::{Connector, TlsError};

    use super::*;

    #[test]
    fn a_chain_is_described_from_the_top_with_the_keys_of_qemu_img() {
        let directory = tempfile::tempdir().unwrap();
        let [base, overlay] = ["base.raw", "overlay.qcow2"].map(|name| directory.path().join(name));
        std::fs::write(&base, vec![1; 128 << 10]).unwrap();
        let mut options = CreateOptions::overlay("base.raw", Format::Raw);
        options.size = Some(1 << 20);
        Image::create(&overlay, &options).unwrap();
        let location = ImageLocation::parse(overlay.as_os_str()).unwrap();
        let remotes = Remotes::default();
        let layers = describe_chain(location.clone(), &OpenOptions::new(), &remotes).unwrap();
        let [top, below] = &layers[..] else { panic!("{layers:?}") };
        let top = serde_json::to_value(top.report()).unwrap();
        assert_eq!(top["backing-filename"], "base.raw");
        assert_eq!(top["full-backing-filename"], base.to_str().unwrap());
        assert_eq!(top["backing-filename-format"], "raw");
        assert_eq!(top["format-specific"]["type"], "qcow2");
        assert_eq!(top["format-specific"]["data"]["compat"], "1.1");
        let below = below.report();
        assert_eq!((below.format, below.virtual_size), ("raw", 128 << 10));
        assert!(below.format_specific.is_none());

        std::fs::remove_file(&base).unwrap();
        let alone = describe(location.clone(), &OpenOptions::new(), &remotes).unwrap();
        assert_eq!(alone.report().virtual_size, 1 << 20, "nothing below is opened");
        assert!(describe_chain(location, &OpenOptions::new(), &remotes).is_err());
    }

    #[test]
    fn a_server_that_an_image_names_is_described_without_local_files() {
        let remotes =
            Remotes::new(|uri| Connector::new(uri.clone()).local_files(LocalFiles::Allowed));
        let name = "nbds://localhost:1/x?tls-certificates=/nonexistent";
        let above = ImageLocation::File("overlay.qcow2".into());
        let named = above.beside(OsStr::new(name)).unwrap();
        let given = ImageLocation::parse(OsStr::new(name)).unwrap();
        let [named, given] = [named, given].map(|location| {
            describe(location, &OpenOptions::new(), &remotes).unwrap_err().to_string()
        });
        let refused = TlsError::LocalFile("tls-certificates").to_string();
        assert!(named.contains(&refused), "{named}");
        assert!(!given.contains(&refused), "{given}");
    }
}
