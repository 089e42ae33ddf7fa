//! The header of a qcow2 image, which is checked against every limit before it is used.
//!
//! All numbers in the file are big-endian. Section "Header" of the format's specification:
//!
//! ```text
//!  0 magic            4 version         8 backing_file_offset   16 backing_file_size
//! 20 cluster_bits    24 size           32 crypt_method          36 l1_size
//! 40 l1_table_offset 48 refcount_table_offset  56 refcount_table_clusters
//! 60 nb_snapshots    64 snapshots_offset
//! version 3: 72 incompatible  80 compatible  88 autoclear  96 refcount_order
//!           100 header_length 104 compression_type
//! ```

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::OsStrExt as _;

use crate::access::Access;
use crate::bytes::{u32_at, u64_at};
use crate::error::{Error, ErrorKind, Result};
use crate::options::IncompleteDisk;
use crate::qcow2::on_disk::extension::{self, Extensions};
use crate::qcow2::on_disk::geometry::Geometry;
use crate::qcow2::on_disk::words::{invalid, read_error, unsupported};
use crate::qcow2::purpose::Purpose;
use crate::storage::Storage;
use crate::units::HostOffset;

pub(crate) const MAGIC: [u8; 4] = *b"QFI\xfb";
pub(crate) const V2_LENGTH: u64 = 72;
pub(crate) const V3_LENGTH_MIN: u64 = 104;

/// Offsets of the fields that are changed in place.
pub(crate) mod field {
    pub(crate) const SIZE: u64 = 24;
    pub(crate) const REFCOUNT_TABLE_OFFSET: u64 = 48;
    pub(crate) const SNAPSHOT_COUNT: u64 = 60;
    pub(crate) const INCOMPATIBLE: u64 = 72;
    pub(crate) const AUTOCLEAR: u64 = 88;
    pub(crate) const REFCOUNT_ORDER: u64 = 96;
}

/// Feature bits that a reader must understand.
pub(crate) mod incompatible {
    pub(crate) const DIRTY: u64 = 1;
    pub(crate) const CORRUPT: u64 = 1 << 1;
    pub(crate) const DATA_FILE: u64 = 1 << 2;
    pub(crate) const COMPRESSION: u64 = 1 << 3;
    pub(crate) const EXTENDED_L2: u64 = 1 << 4;
    pub(crate) const KNOWN: u64 = 31;
    /// Of this crate: the image is not complete yet, see
    /// [`incomplete_header`](super::super::incomplete_header), or its disk is being overwritten.
    pub(crate) const INCOMPLETE: u64 = 1 << 63;
    /// Of this crate: the header names no backing file because the old name had to be removed
    /// before the new one could be written.
    pub(crate) const NAME_UNFINISHED: u64 = 1 << 62;
}

/// Feature bits that may be ignored.
pub(crate) mod compatible {
    pub(crate) const LAZY_REFCOUNTS: u64 = 1;
}

/// Feature bits that a writer must clear if it does not understand them.
pub(crate) mod autoclear {
    pub(crate) const BITMAPS: u64 = 1;
    pub(crate) const RAW_DATA_FILE: u64 = 1 << 1;
    /// This crate's own: no program that does not know it has written the image since the sidecar
    /// was created.
    pub(crate) const SIDECAR: u64 = 1 << 63;
    /// This crate's own: the extension about bitmaps and backups is valid.
    pub(crate) const LINEAGE: u64 = 1 << 62;
    /// This crate's own: the image is a backup and has not changed since.
    pub(crate) const SEAL: u64 = 1 << 61;
    pub(crate) const KNOWN: u64 = BITMAPS | RAW_DATA_FILE | SIDECAR | LINEAGE | SEAL;
}

/// Limits that QEMU enforces too; they bound the memory that opening an image takes.
const L1_BYTES_MAX: u64 = 32 << 20;
const REFCOUNT_TABLE_BYTES_MAX: u64 = 8 << 20;
pub(crate) const SNAPSHOTS_MAX: u32 = 65536;
const BACKING_NAME_MAX: u32 = 1023;
const OFFSET_LIMIT: u64 = 1 << 56;
/// The maximum length of a LUKS header in bytes; QEMU writes 2 MB.
const LUKS_HEADER_MAX: u64 = 16 << 20;

/// Methods of encryption.
pub(crate) const ENCRYPTION_AES: u32 = 1;
pub(crate) const ENCRYPTION_LUKS: u32 = 2;

/// The compression of compressed clusters.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Compression {
    Zlib,
    Zstd,
}

/// A header that has passed every check.
#[derive(Clone, Debug)]
pub(crate) struct Header {
    pub(crate) version: u32,
    pub(crate) geometry: Geometry,
    /// Size of the virtual disk in bytes, a multiple of 512.
    pub(crate) size: u64,
    /// The size in the file, which may be any number.
    stated_size: u64,
    pub(crate) l1_offset: HostOffset,
    pub(crate) l1_entries: u32,
    pub(crate) refcount_table_offset: HostOffset,
    pub(crate) refcount_table_clusters: u32,
    pub(crate) snapshots_offset: HostOffset,
    pub(crate) snapshot_count: u32,
    pub(crate) incompatible: u64,
    pub(crate) compatible: u64,
    pub(crate) autoclear: u64,
    pub(crate) compression: Compression,
    /// 0 if it is not encrypted.
    pub(crate) encryption_method: u32,
    pub(crate) backing_name: Option<OsString>,
    pub(crate) extensions: Extensions,
    /// The offset of an end mark that QEMU would refuse.
    pub(crate) overlong_end: Option<u64>,
}

impl Header {
    /// Reads and checks the header. For a check, tables may be in unreadable places, and the
    /// refcount table may be invalid: then its size is 0.
    pub(crate) fn read(storage: &dyn Storage, purpose: Purpose) -> Result<Self> {
        Self::read_accepting(storage, purpose, 0)
    }

    /// The same for an image whose disk may be incomplete.
    pub(crate) fn read_or_overwrite(
        storage: &dyn Storage,
        purpose: Purpose,
        incomplete: IncompleteDisk,
    ) -> Result<Self> {
        let accepted = match incomplete {
            IncompleteDisk::Refused => 0,
            IncompleteDisk::Accepted => incompatible::INCOMPLETE,
        };
        Self::read_accepting(storage, purpose, accepted)
    }

    /// The same for a change of the backing file's name: the image may lack one because an earlier
    /// change was interrupted.
    pub(crate) fn read_to_name(storage: &dyn Storage) -> Result<Self> {
        Self::read_accepting(storage, Purpose::Use, incompatible::NAME_UNFINISHED)
    }

    /// `accepted` are the incompatible bits of this crate that do not prevent reading the image.
    fn read_accepting(storage: &dyn Storage, purpose: Purpose, accepted: u64) -> Result<Self> {
        let file_length = storage.len().map_err(read_error)?;
        let mut start = vec![0; 4096];
        let length = storage.read_at(HostOffset::new(0), &mut start).map_err(read_error)?;
        start.truncate(length);
        let mut header = decode_fields(&start)?;
        header.refuse_unfinished(accepted)?;
        header.check_tables(file_length, purpose)?;
        header.read_names(storage, &start)?;
        header.check_features()?;
        if purpose == Purpose::Use {
            header.refuse_contradictions()?;
            header.refuse_luks_header_past(file_length)?;
        }
        Ok(header)
    }

    fn refuse_unfinished(&self, accepted: u64) -> Result<()> {
        let is_image = self.refcount_table_offset.bytes() != 0;
        let accepted = if is_image { accepted } else { 0 };
        let unfinished = self.incompatible & !accepted;
        if unfinished & incompatible::INCOMPLETE != 0 {
            return Err(invalid(
                "it is incomplete: the command that wrote it is still at work or was interrupted; run \
                 that command again",
            ));
        }
        if unfinished & incompatible::NAME_UNFINISHED != 0 {
            return Err(invalid(
                "it names no backing file because a change of the name is under way or was \
                 interrupted; run 'nbd-cli image rebase --unsafe' with the new backing file to \
                 complete the change",
            ));
        }
        Ok(())
    }

    fn check_tables(&mut self, file_length: u64, purpose: Purpose) -> Result<()> {
        let cluster = self.geometry.cluster_size();
        let file_end = match purpose {
            Purpose::Use | Purpose::Describe => {
                file_length.checked_next_multiple_of(cluster).unwrap_or(u64::MAX)
            }
            Purpose::Check => u64::MAX,
        };
        let table = |what: &str, offset: HostOffset, bytes: u64, limit: u64| {
            let offset = offset.bytes();
            let end = offset.checked_add(bytes);
            let fits = bytes <= limit
                && (offset < OFFSET_LIMIT || purpose == Purpose::Check)
                && offset.is_multiple_of(cluster)
                && (bytes == 0
                    || (offset != 0 && end.is_some_and(|end| end <= file_end))
                    || purpose == Purpose::Check);
            match fits {
                true => Ok(()),
                false => Err(invalid(format!(
                    "the {what} ({bytes} bytes at offset {offset}) is too large, not aligned or \
                     outside the file"
                ))),
            }
        };
        table("L1 table", self.l1_offset, u64::from(self.l1_entries) * 8, L1_BYTES_MAX)?;
        let refcount_bytes = u64::from(self.refcount_table_clusters).saturating_mul(cluster);
        let (offset, limit) = (self.refcount_table_offset, REFCOUNT_TABLE_BYTES_MAX);
        let refcount_table = match refcount_bytes {
            0 => Err(invalid("it has no refcount table")),
            _ if offset.bytes() == 0 => Err(invalid("its refcount table is the header")),
            bytes => table("refcount table", offset, bytes, limit),
        };
        if purpose != Purpose::Check {
            refcount_table?;
        } else if refcount_table.is_err() {
            self.refcount_table_clusters = 0;
        }
        if self.snapshot_count > SNAPSHOTS_MAX && purpose != Purpose::Check {
            return Err(invalid(format!("it claims to have {} snapshots", self.snapshot_count)));
        }
        table(
            "snapshot table",
            self.snapshots_offset,
            u64::from(self.snapshot_count) * 40,
            u64::MAX,
        )?;
        // By the stated size, as in QEMU, which opens no image whose L1 table is smaller.
        if self.geometry.l1_entries_for(self.stated_size) > u64::from(self.l1_entries) {
            return Err(invalid(format!(
                "its L1 table of {} entries is too small for a disk of {} bytes",
                self.l1_entries, self.stated_size
            )));
        }
        Ok(())
    }

    /// Reads the extensions and the backing file's name, which are in the first cluster.
    fn read_names(&mut self, storage: &dyn Storage, start: &[u8]) -> Result<()> {
        let header_length =
            if self.version == 2 { V2_LENGTH } else { u64::from(u32_at(start, 100)) };
        let backing_offset = u64_at(start, 8);
        let backing_length = u32_at(start, 16);
        let cluster = self.geometry.cluster_size();
        let mut first = vec![0; cluster as usize];
        storage.read_at(HostOffset::new(0), &mut first).map_err(read_error)?;
        let mut extensions_end = cluster;
        if backing_offset != 0 && backing_length != 0 {
            let end = backing_offset.checked_add(u64::from(backing_length));
            let fits = backing_offset >= header_length && end.is_some_and(|end| end <= cluster);
            if backing_length > BACKING_NAME_MAX || !fits {
                return Err(invalid("the backing file's name is too long or outside the header"));
            }
            let name = &first[backing_offset as usize..][..backing_length as usize];
            self.backing_name = Some(OsStr::from_bytes(name).to_owned());
        }
        if backing_offset != 0 {
            extensions_end = extensions_end.min(backing_offset);
        }
        let area = first.get(header_length as usize..extensions_end as usize).unwrap_or_default();
        self.extensions = extension::decode(area)?;
        let end = self.extensions.overlong_end;
        self.overlong_end = end.map(|end| header_length + end as u64);
        Ok(())
    }

    fn check_features(&self) -> Result<()> {
        let ours = incompatible::INCOMPLETE | incompatible::NAME_UNFINISHED;
        let unknown = self.incompatible & !incompatible::KNOWN & !ours;
        if unknown != 0 {
            let names = (0..64)
                .filter(|bit| unknown >> bit & 1 == 1)
                .map(|bit| self.extensions.feature_name(0, bit))
                .collect::<Vec<_>>()
                .join(", ");
            return Err(unsupported(format!("it needs features that are not known here: {names}")));
        }
        if self.geometry.extended_l2 && self.geometry.cluster_bits < 14 {
            return Err(invalid("its clusters are too small to have subclusters"));
        }
        let compressed_otherwise = self.incompatible & incompatible::COMPRESSION != 0;
        if compressed_otherwise != (self.compression != Compression::Zlib) {
            return Err(invalid("its compression type and its feature bits contradict each other"));
        }
        Ok(())
    }

    /// The content of the bitmaps extension when the header was read.
    pub(crate) fn bitmaps(&self) -> Option<&[u8]> {
        self.extensions.bitmaps.as_deref()
    }

    /// Refuses to write images with the old encryption, which is only read.
    pub(crate) fn refuse_to_write_old_encryption(&self, access: Access) -> Result<()> {
        match (self.encryption_method, access) {
            (ENCRYPTION_AES, Access::ReadWrite) => {
                let detail = "it has the old AES encryption of qcow2, which is broken and only read: open \
                              it read-only, or make an image with LUKS of it with 'nbd-cli image convert \
                              -O qcow2 --encrypt'";
                Err(Error::new(ErrorKind::ReadOnly, "open", detail))
            }
            _ => Ok(()),
        }
    }

    /// The place of the LUKS header, if the data is encrypted with LUKS: the clusters that it
    /// touches are its own.
    pub(crate) fn luks_header(&self) -> Result<Option<(HostOffset, u64)>> {
        if self.encryption_method != ENCRYPTION_LUKS {
            return Ok(None);
        }
        let place = self.stated_luks_header()?;
        let missing = || invalid("it is encrypted with LUKS, but does not say where the header is");
        place.map(Some).ok_or_else(missing)
    }

    /// The place that the header gives for a LUKS header, whether the data is said to be encrypted
    /// or not.
    pub(crate) fn stated_luks_header(&self) -> Result<Option<(HostOffset, u64)>> {
        let Some((offset, length)) = self.extensions.encryption_header else { return Ok(None) };
        let end = offset.checked_add(length);
        let fits = offset != 0
            && (1..=LUKS_HEADER_MAX).contains(&length)
            && end.is_some_and(|end| end <= OFFSET_LIMIT);
        match fits && offset.is_multiple_of(self.geometry.cluster_size()) {
            true => Ok(Some((HostOffset::new(offset), length))),
            false => Err(invalid(format!(
                "its LUKS header ({length} bytes at offset {offset}) is too large, not aligned or \
                 out of bounds"
            ))),
        }
    }

    fn refuse_luks_header_past(&self, file_length: u64) -> Result<()> {
        let Some((offset, length)) = self.luks_header()? else { return Ok(()) };
        let file_end = file_length.checked_next_multiple_of(self.geometry.cluster_size());
        match offset.bytes() + length <= file_end.unwrap_or(u64::MAX) {
            true => Ok(()),
            false => Err(invalid(format!(
                "its LUKS header ({length} bytes at offset {offset}) ends past the end of the file"
            ))),
        }
    }

    pub(crate) fn has_data_file(&self) -> bool {
        self.incompatible & incompatible::DATA_FILE != 0
    }
}

fn decode_fields(start: &[u8]) -> Result<Header> {
    if start.len() < V2_LENGTH as usize || start[..4] != MAGIC {
        return Err(invalid("it has no qcow2 header, or one that is cut off"));
    }
    let version = u32_at(start, 4);
    if version != 2 && version != 3 {
        return Err(unsupported(format!("qcow2 version {version} is not known here")));
    }
    let is_v3 = version == 3;
    let header_length = if is_v3 { u64::from(u32_at(start, 100)) } else { V2_LENGTH };
    let cluster_bits = u32_at(start, 20);
    if !(9..=21).contains(&cluster_bits) {
        return Err(invalid(format!("clusters of 2^{cluster_bits} bytes are not possible")));
    }
    let too_short = start.len() < V3_LENGTH_MIN as usize || header_length < V3_LENGTH_MIN;
    if is_v3 && (too_short || header_length > 1 << cluster_bits || !header_length.is_multiple_of(8))
    {
        return Err(invalid(format!("a header of {header_length} bytes is not possible")));
    }
    let encryption_method = u32_at(start, 32);
    if encryption_method > ENCRYPTION_LUKS {
        return Err(invalid(format!("encryption method {encryption_method} does not exist")));
    }
    let v3 = |offset: usize| if is_v3 { u64_at(start, offset) } else { 0 };
    let refcount_order = if is_v3 { u32_at(start, 96) } else { 4 };
    if refcount_order > 6 {
        return Err(invalid(format!("refcounts of 2^{refcount_order} bits are not possible")));
    }
    let compression_byte = if header_length > 104 { start.get(104).copied() } else { None };
    let compression = match compression_byte.unwrap_or(0) {
        0 => Compression::Zlib,
        1 => Compression::Zstd,
        kind => return Err(unsupported(format!("compression type {kind} is not known here"))),
    };
    let incompatible = v3(72);
    let extended_l2 = incompatible & incompatible::EXTENDED_L2 != 0;
    let size = u64_at(start, 24);
    if size > i64::MAX as u64 {
        return Err(invalid(format!("a disk of {size} bytes is not possible")));
    }
    Ok(Header {
        version,
        geometry: Geometry { cluster_bits, extended_l2, refcount_order },
        size: size & !511,
        stated_size: size,
        l1_offset: HostOffset::new(u64_at(start, 40)),
        l1_entries: u32_at(start, 36),
        refcount_table_offset: HostOffset::new(u64_at(start, 48)),
        refcount_table_clusters: u32_at(start, 56),
        snapshots_offset: HostOffset::new(u64_at(start, 64)),
        snapshot_count: u32_at(start, 60),
        incompatible,
        compatible: v3(80),
        autoclear: v3(88),
        compression,
        encryption_method,
        backing_name: None,
        extensions: Extensions::default(),
        overlong_end: None,
    })
}
