//! Replaces the fields and extensions at the start of a header at once: another version of the
//! format has a header of another length, and everything after it moves.
//!
//! No other change of the image may be under way, because the complete first sector is written.

use std::os::unix::ffi::OsStrExt as _;

use crate::bytes::u64_at;
use crate::error::Result;
use crate::qcow2::metadata::header_edit::{Area, SECTOR, write_within_sector};
use crate::qcow2::on_disk::header::Header;
use crate::storage::Storage;

/// The present cluster of the header.
pub(in crate::qcow2) struct HeaderStart<'a> {
    area: Area<'a>,
    /// The backing file's name, and its offset; 0 if there is none.
    name: Vec<u8>,
    name_place: u64,
}

impl<'a> HeaderStart<'a> {
    pub(in crate::qcow2) fn read(storage: &'a dyn Storage, header: &Header) -> Result<Self> {
        let area = Area::read(storage, header.geometry.cluster_size())?;
        let name = header.backing_name.as_deref().unwrap_or_default().as_bytes().to_vec();
        let name_place = u64_at(&area.bytes, 8);
        Ok(Self { area, name, name_place })
    }

    pub(in crate::qcow2) fn bytes(&self) -> &[u8] {
        &self.area.bytes
    }

    /// The bytes between the end of the header and the backing file's name.
    pub(in crate::qcow2) fn extensions(&self, header_length: usize) -> &[u8] {
        let end = self.area.limit as usize;
        self.area.bytes.get(header_length..end).unwrap_or_default()
    }

    /// Replaces the fields and extensions, and puts the backing file's name after them, durably and
    /// by one write of a sector. A name that does not fit into the sector stays in its place; if it
    /// would be overwritten there, it is copied to an unused place first. `None`, with nothing
    /// changed, if there is no space.
    pub(in crate::qcow2) fn replace(
        &self,
        mut fields: Vec<u8>,
        extensions: &[u8],
    ) -> Result<Option<()>> {
        fields.extend(extensions);
        fields.extend([0; 8]);
        let (end, length) = (fields.len() as u64, self.name.len() as u64);
        if end > SECTOR {
            return Ok(None);
        }
        let place = match length {
            0 => 0,
            _ if end + length <= SECTOR => {
                fields.extend(&self.name);
                end
            }
            _ if self.name_place >= SECTOR => self.name_place,
            _ => {
                let place = (self.name_place + length).next_multiple_of(SECTOR);
                if place + length > self.area.bytes.len() as u64 {
                    return Ok(None);
                }
                self.area.write(place, &self.name)?;
                self.area.sync()?;
                place
            }
        };
        fields[8..16].copy_from_slice(&place.to_be_bytes());
        fields.resize(SECTOR as usize, 0);
        write_within_sector(self.area.storage, 0, &fields)?;
        Ok(Some(()))
    }
}
