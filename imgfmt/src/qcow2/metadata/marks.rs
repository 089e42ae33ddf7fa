//! The marks in the header that restrict how far an image is trusted.
//!
//! *Dirty*: refcounts and COPIED bits may be wrong; a writable open repairs them first. It is set
//! while snapshots are changed, because they are wrong in between. *Corrupt*: damage of the
//! metadata was detected; writes are refused until repair. It is set when a change meets an invalid
//! entry, and a repair clears it. *Incomplete* (this crate's own): the complete disk is being
//! overwritten, so it is neither the old nor the new one. Version 2 has none of them.

use std::sync::atomic::Ordering::{Acquire, Release};

use crate::error::{Error, ErrorKind, Result};
use crate::qcow2::metadata::header_edit::change_autoclear;
use crate::qcow2::metadata::metadata_file::MetadataFile;
use crate::qcow2::on_disk::header::{field, incompatible};

impl MetadataFile {
    /// Sets or clears the dirty mark durably: whether refcounts and COPIED bits may be wrong.
    pub(in crate::qcow2) fn mark_dirty(&self, is_dirty: bool) -> Result<()> {
        self.set_mark(incompatible::DIRTY, is_dirty)
    }

    /// Sets or clears the incomplete mark durably: whether the complete disk is being overwritten.
    pub(in crate::qcow2) fn mark_incomplete(&self, is_incomplete: bool) -> Result<()> {
        self.set_mark(incompatible::INCOMPLETE, is_incomplete)
    }

    fn set_mark(&self, bit: u64, is_set: bool) -> Result<()> {
        if self.header().version < 3 {
            return Ok(());
        }
        self.update_header(|header| match is_set {
            true => header.incompatible |= bit,
            false => header.incompatible &= !bit,
        });
        self.write_marks()
    }

    /// Clears autoclear bits that this crate does not maintain.
    pub(in crate::qcow2) fn clear_autoclear(&self, bits: u64) -> Result<()> {
        if self.header().autoclear & bits != 0 {
            self.edit_header(|file, _| change_autoclear(file, 0, bits))?;
        }
        self.update_header(|header| header.autoclear &= !bits);
        Ok(())
    }

    fn write_marks(&self) -> Result<()> {
        let corrupt = if self.is_corrupt.load(Acquire) { incompatible::CORRUPT } else { 0 };
        let features = self.header().incompatible | corrupt;
        self.write_header(field::INCOMPATIBLE, &features.to_be_bytes())?;
        self.sync_header()
    }

    /// Marks the image, and refuses all further writes, if the error of a change reports damaged
    /// metadata. Returns the error.
    pub(in crate::qcow2) fn note_damage(&self, error: Error) -> Error {
        if self.is_writable()
            && error.kind() == ErrorKind::Corrupt
            && !self.is_corrupt.swap(true, Release)
            && self.header().version >= 3
        {
            // Even if the mark cannot be written, this process refuses further writes.
            let _ = self.write_marks();
        }
        error
    }

    /// Refuses to change an image in which damage was found.
    pub(in crate::qcow2) fn refuse_if_corrupt(&self) -> Result<()> {
        if !self.is_corrupt.load(Acquire) {
            return Ok(());
        }
        let detail = "its metadata is damaged, so nothing is written to it any more; repair \
                      it with 'nbd-cli image check --repair all'";
        Err(self.named(Error::new(ErrorKind::Corrupt, "change", detail)))
    }
}
