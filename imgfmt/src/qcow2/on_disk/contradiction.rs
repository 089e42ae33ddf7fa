//! Feature bits that the rest of the header contradicts.
//!
//! No sound program writes them: a bit was damaged, or a program changed one field of the header
//! without the others. Some are harmless, and a repair clears them. For others it is unknown which
//! half is wrong, and so whether the disk is in this file or in a data file, or whether it is
//! encrypted; then nothing is read or written.

use crate::error::Result;
use crate::qcow2::on_disk::header::{ENCRYPTION_LUKS, Header, autoclear};
use crate::qcow2::on_disk::words::invalid;

/// A feature bit that the rest of the header contradicts.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Contradiction {
    /// A raw data file bit without a data file.
    RawWithoutDataFile,
    /// As before, but a data file has a name: the data file bit may be the one that was lost.
    DataFileNotUsed,
    /// A data file without a name.
    DataFileWithoutName,
    /// A raw data file and a backing file.
    RawWithBacking,
    /// Bitmaps, without the extension that locates them.
    BitmapsWithoutDirectory,
    /// The place of a LUKS header, and data that is not encrypted with LUKS: the method may be what
    /// was damaged.
    EncryptionHeaderNotUsed,
}

impl Contradiction {
    /// The contradiction, as a sentence without a full stop.
    pub(in crate::qcow2) fn message(self) -> &'static str {
        match self {
            Self::RawWithoutDataFile => {
                "the header says that its data file is raw (autoclear bit 1), but there is no data file"
            }
            Self::DataFileNotUsed => {
                "the header names a data file but does not say that data is there (incompatible \
                 bit 2), and which of both is wrong is not known"
            }
            Self::DataFileWithoutName => "it keeps its data in a file that it does not name",
            Self::RawWithBacking => {
                "the header says that its data file is raw (autoclear bit 1), but there is a \
                 backing file"
            }
            Self::BitmapsWithoutDirectory => {
                "the header says that there are bitmaps (autoclear bit 0), but not where"
            }
            Self::EncryptionHeaderNotUsed => {
                "the header says where a LUKS header is, but not that the data is encrypted with \
                 LUKS, and which of both is wrong is not known"
            }
        }
    }

    /// The autoclear bit whose clearing removes the contradiction without a loss.
    pub(in crate::qcow2) fn repaired_by_clearing(self) -> Option<u64> {
        match self {
            Self::RawWithoutDataFile | Self::RawWithBacking => Some(autoclear::RAW_DATA_FILE),
            Self::BitmapsWithoutDirectory => Some(autoclear::BITMAPS),
            Self::DataFileNotUsed | Self::DataFileWithoutName | Self::EncryptionHeaderNotUsed => {
                None
            }
        }
    }

    /// Whether the image can be used nevertheless. Where it cannot, QEMU refuses it too, except for
    /// a named data file that is not used.
    fn is_harmless(self) -> bool {
        match self {
            Self::RawWithBacking | Self::BitmapsWithoutDirectory => true,
            Self::RawWithoutDataFile
            | Self::DataFileNotUsed
            | Self::DataFileWithoutName
            | Self::EncryptionHeaderNotUsed => false,
        }
    }
}

impl Header {
    /// The feature bits that the rest of the header contradicts.
    pub(in crate::qcow2) fn contradictions(&self) -> Vec<Contradiction> {
        let mut found = Vec::new();
        let is_raw = self.autoclear & autoclear::RAW_DATA_FILE != 0;
        let names_data_file = self.extensions.data_file_name.is_some();
        match (self.has_data_file(), names_data_file) {
            (true, false) => found.push(Contradiction::DataFileWithoutName),
            (false, true) => found.push(Contradiction::DataFileNotUsed),
            (false, false) if is_raw => found.push(Contradiction::RawWithoutDataFile),
            (true, true) if is_raw && self.backing_name.is_some() => {
                found.push(Contradiction::RawWithBacking);
            }
            _ => {}
        }
        if self.autoclear & autoclear::BITMAPS != 0 && self.bitmaps().is_none() {
            found.push(Contradiction::BitmapsWithoutDirectory);
        }
        let names_luks_header = self.extensions.encryption_header.is_some();
        if names_luks_header && self.encryption_method != ENCRYPTION_LUKS {
            found.push(Contradiction::EncryptionHeaderNotUsed);
        }
        found
    }

    /// Refuses to use an image if the location of its data is uncertain.
    pub(in crate::qcow2) fn refuse_contradictions(&self) -> Result<()> {
        let Some(found) = self.contradictions().into_iter().find(|found| !found.is_harmless())
        else {
            return Ok(());
        };
        let advice = match found.repaired_by_clearing() {
            Some(_) => {
                "; check it with 'nbd-cli image check', and if the rest is sound, clear the bit \
                        with 'nbd-cli image check --repair all'"
            }
            None => "",
        };
        Err(invalid(format!("{}{advice}", found.message())))
    }

    /// The autoclear bits of the format that a writer keeps: those that are known and true.
    pub(in crate::qcow2) fn kept_autoclear(&self) -> u64 {
        let contradicted = self
            .contradictions()
            .into_iter()
            .filter_map(Contradiction::repaired_by_clearing)
            .fold(0, |bits, bit| bits | bit);
        self.autoclear & (autoclear::BITMAPS | autoclear::RAW_DATA_FILE) & !contradicted
    }
}
