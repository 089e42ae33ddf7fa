//! Checks of images, with the keys and exit codes of qemu-img.
//!
//! ```
//! use imgfmt::{CreateOptions, Format, Image, OpenOptions, Repair};
//! use nbd_jobs::image_check::{Checked, Verdict, check};
//! use nbd_jobs::image_location::ImageLocation;
//! use nbd_jobs::remote::Remotes;
//!
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # let directory = tempfile::tempdir()?;
//! # let path = directory.path().join("disk.qcow2");
//! Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20))?;
//! let location = ImageLocation::parse(path.as_os_str())?;
//! let checked = check(&location, &OpenOptions::new(), Repair::None, &Remotes::default())?;
//! let Checked::Examined(report) = checked else { return Err("it cannot be checked".into()) };
//! assert_eq!(Verdict::of(&report), Verdict::Sound);
//! # Ok(())
//! # }
//! ```

use imgfmt::{Access, CheckReport, Error, ErrorKind, Format, Image, OpenOptions, Repair};
use serde::Serialize;

use crate::error::{JobError, JobErrorKind};
use crate::image_location::{ImageLocation, read_only};
use crate::remote::Remotes;

/// The outcome of a check.
#[derive(Debug)]
pub enum Checked {
    /// The image was examined, and repaired if that was wanted.
    Examined(CheckReport),
    /// Images of this format, or with these features, cannot be checked; the error says why.
    Unsupported(Error),
}

/// The state of an image after a check and its repairs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Verdict {
    /// Nothing was found, or all of it was repaired.
    Sound,
    /// Clusters are lost, and nothing else is wrong.
    Leaks,
    /// Data is endangered.
    Corruptions,
}

impl Verdict {
    /// Returns what a report says.
    #[must_use]
    pub fn of(report: &CheckReport) -> Self {
        match (report.corruptions, report.leaks) {
            (0, 0) => Self::Sound,
            (0, _) => Self::Leaks,
            _ => Self::Corruptions,
        }
    }

    /// Returns the exit code of `qemu-img check`.
    #[must_use]
    pub fn exit_code(self) -> u8 {
        match self {
            Self::Sound => 0,
            Self::Corruptions => 2,
            Self::Leaks => 3,
        }
    }
}

/// The exit code of `qemu-img check` for an image that cannot be checked.
pub const EXIT_CODE_UNSUPPORTED: u8 = 63;

/// Checks an image alone, not its backing file. An export is only read; its bytes are an image if
/// `options` give a format. Blocks, and must not be called by asynchronous tasks.
///
/// # Errors
///
/// If the image cannot be read, is in use, or is an export that would have to be repaired.
pub fn check(
    location: &ImageLocation,
    options: &OpenOptions,
    repair: Repair,
    remotes: &Remotes,
) -> Result<Checked, JobError> {
    let mut options = options.clone();
    if repair != Repair::None {
        options.access = Access::ReadWrite;
    }
    let (location, options) = location.settled(&options, remotes)?;
    let options = &options;
    let (checked, can_be_described) = match location {
        ImageLocation::Export { .. } if repair != Repair::None => {
            return Err(JobError::invalid(format!(
                "cannot repair {location}: an export is only checked, because nothing keeps others \
                 from using it meanwhile; repair the image where its file is"
            )));
        }
        ImageLocation::Export { uri, files } => {
            let storage = remotes.connect(uri, *files)?;
            let checked = Image::check_storage(storage.clone(), options, Repair::None)
                .map_err(|error| error.with_path(uri.to_string()));
            (checked, Image::inspect_storage(storage, options).is_ok())
        }
        ImageLocation::Object(url) if repair != Repair::None => return Err(read_only(url)),
        ImageLocation::Object(url) => {
            let (storage, options) = (remotes.open_object(url)?, url.options(options));
            let checked = Image::check_storage(storage.clone(), &options, Repair::None)
                .map_err(|error| error.with_path(url.to_string()));
            (checked, Image::inspect_storage(storage, &options).is_ok())
        }
        file => {
            let checked = Image::check_file(file.path(), options, repair);
            (checked, Image::inspect_file(file.path(), options).is_ok())
        }
    };
    match checked {
        Ok(report) => Ok(Checked::Examined(report)),
        // An image that cannot even be described has an unknown feature.
        Err(error)
            if error.kind() == ErrorKind::Unsupported
                && (error.found_format().is_some() || can_be_described) =>
        {
            Ok(Checked::Unsupported(error))
        }
        Err(error) => Err(JobError::opening(JobErrorKind::Source, error)),
    }
}

/// The numbers of a check; the keys, and their absence at zero, are those of qemu-img.
#[derive(Clone, Debug, Serialize)]
#[serde(rename_all = "kebab-case")]
#[non_exhaustive]
pub struct CheckSummary {
    /// The name of the image.
    pub filename: String,
    /// The name of its format.
    pub format: &'static str,
    /// Errors of the check itself.
    pub check_errors: u64,
    /// Where the image ends in its file, in bytes.
    #[serde(skip_serializing_if = "is_zero")]
    pub image_end_offset: u64,
    /// Clusters of the disk.
    #[serde(skip_serializing_if = "is_zero")]
    pub total_clusters: u64,
    /// Those with data.
    #[serde(skip_serializing_if = "is_zero")]
    pub allocated_clusters: u64,
    /// Those with compressed data.
    #[serde(skip_serializing_if = "is_zero")]
    pub compressed_clusters: u64,
    /// Those whose data does not follow that of the cluster before, and the compressed ones.
    #[serde(skip_serializing_if = "is_zero")]
    pub fragmented_clusters: u64,
    /// Corruptions that are left.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions: u64,
    /// Leaked clusters that are left.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks: u64,
    /// Repaired corruptions.
    #[serde(skip_serializing_if = "is_zero")]
    pub corruptions_fixed: u64,
    /// Repaired leaks.
    #[serde(skip_serializing_if = "is_zero")]
    pub leaks_fixed: u64,
}

#[allow(clippy::trivially_copy_pass_by_ref)] // The signature that serde calls.
fn is_zero(number: &u64) -> bool {
    *number == 0
}

impl CheckSummary {
    /// Returns the numbers of a report about the image of that name.
    #[must_use]
    pub fn new(filename: String, report: &CheckReport) -> Self {
        Self {
            filename,
            format: report.other_format.unwrap_or(Format::Qcow2).name(),
            check_errors: 0,
            image_end_offset: report.image_end_offset,
            total_clusters: report.total_clusters,
            allocated_clusters: report.allocated_clusters,
            compressed_clusters: report.compressed_clusters,
            fragmented_clusters: report.fragmented_clusters,
            corruptions: report.corruptions,
            leaks: report.leaks,
            corruptions_fixed: report.corruptions_repaired,
            leaks_fixed: report.leaks_repaired,
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::CreateOptions;

    use super::*;

    fn checked(path: &std::path::Path, repair: Repair) -> Checked {
        let location = ImageLocation::File(path.to_owned());
        check(&location, &OpenOptions::new(), repair, &Remotes::default()).unwrap()
    }

    #[test]
    fn a_leak_is_a_verdict_until_it_is_repaired() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
        let mut bytes = std::fs::read(&path).unwrap();
        // The header's offset of the refcount table, then its first block.
        let number = |bytes: &[u8], at: usize| {
            u64::from_be_bytes(bytes[at..at + 8].try_into().unwrap()) as usize
        };
        let block = number(&bytes, number(&bytes, 48));
        // Far behind the clusters in use: 16 bits for each.
        bytes[block + 2 * 40 + 1] = 1;
        bytes.resize(41 << 16, 0);
        std::fs::write(&path, bytes).unwrap();
        let Checked::Examined(found) = checked(&path, Repair::None) else { panic!() };
        assert_eq!((Verdict::of(&found), found.leaks), (Verdict::Leaks, 1));
        assert_eq!(Verdict::Leaks.exit_code(), 3);
        let Checked::Examined(repaired) = checked(&path, Repair::Leaks) else { panic!() };
        assert_eq!(Verdict::of(&repaired), Verdict::Sound);
        let summary = CheckSummary::new("disk".to_owned(), &repaired);
        let json = serde_json::to_value(summary).unwrap();
        assert_eq!((&json["leaks-fixed"], json.get("leaks")), (&1.into(), None));
    }

    #[test]
    fn a_raw_image_cannot_be_checked() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.raw");
        std::fs::write(&path, [0; 4096]).unwrap();
        assert!(matches!(checked(&path, Repair::None), Checked::Unsupported(_)));
    }
}
