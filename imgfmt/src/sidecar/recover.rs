//! Validates a sidecar found beside an image, and recovers its bits.
//!
//! Every byte is untrusted. A user with write access to the directory can put anything into the
//! file, but can neither crash this program nor make it use more memory than the image's own
//! bitmaps need.

use std::fmt;
use std::io;

use super::clock::now_nanoseconds;
use super::file::Untrusted;
use super::layout::{
    self, BitmapDescriptor, DESCRIPTOR_BYTES, DESCRIPTORS_OFFSET, Description, Fingerprint,
    HEADER_BYTES, Identity, LOG_OFFSET, Layout, SLOT_BYTES,
};
use super::location::FoundBytes;
use crate::access::BitmapDurability;
use crate::error::system_words;

/// The image may have been changed by this much later than the recorded time of its last change.
const SLACK_NANOSECONDS: u64 = 2_000_000_000;

/// A recovery may change the image for this long.
const RECOVERY_NANOSECONDS: u64 = 60_000_000_000;

/// Why a sidecar is not trusted.
#[derive(Debug)]
pub(crate) enum Rejection {
    /// There is none.
    Missing,
    /// Another program has it open.
    InUse(io::Error),
    /// The sidecar belongs to another session of the image.
    OtherSession,
    /// The sidecar contradicts itself.
    Damaged(layout::Damage),
    /// The machine was restarted, and the sidecar was not made to survive that.
    PowerLoss,
    /// Another program has changed the image.
    ForeignWriter(&'static str),
    /// The disk had another size.
    OtherSize,
    /// Another user may have written it; the error says which.
    Untrusted(io::Error),
    /// It cannot be read.
    Io(io::Error),
}

impl fmt::Display for Rejection {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Missing => f.write_str("the file with the bits is gone"),
            Self::InUse(error) => {
                write!(f, "the file with the bits is in use: {}", system_words(error))
            }
            Self::OtherSession => {
                f.write_str("the file with the bits belongs to another session or another image")
            }
            Self::Damaged(what) => write!(f, "the file with the bits is damaged: {what}"),
            Self::PowerLoss => f.write_str(
                "the machine was restarted, and the bits were kept against a crash of the process \
                 only",
            ),
            Self::ForeignWriter(what) => {
                write!(f, "another program has changed the image: {what}")
            }
            Self::OtherSize => f.write_str("the size of the disk has changed since"),
            Self::Untrusted(error) => f.write_str(&system_words(error)),
            Self::Io(error) => {
                write!(f, "the file with the bits cannot be read: {}", system_words(error))
            }
        }
    }
}

impl From<io::Error> for Rejection {
    fn from(error: io::Error) -> Self {
        match error.kind() {
            io::ErrorKind::WouldBlock => Self::InUse(error),
            io::ErrorKind::UnexpectedEof => Self::Damaged("it is cut off"),
            _ if error.get_ref().is_some_and(|inner| inner.is::<Untrusted>()) => {
                Self::Untrusted(error)
            }
            _ => Self::Io(error),
        }
    }
}

/// The basis for trusting the bits.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Trust {
    /// The machine has not been restarted: they are exact.
    SameBoot,
    /// It has been restarted: complete extents replace the bits that did not reach the disk.
    OtherBoot,
}

/// A trusted sidecar.
#[derive(Debug)]
pub(crate) struct Recovery<R> {
    bytes: R,
    description: Description,
    layout: Layout,
    trust: Trust,
    /// Byte ranges of the disk that may have changed without their bits being set.
    hot: Vec<(u64, u64)>,
}

impl<R: FoundBytes> Recovery<R> {
    /// Examines a sidecar: whether it belongs to `identity`, the image has not changed since, and
    /// enough bits have survived.
    pub(crate) fn examine(
        bytes: R,
        identity: Identity,
        image: Fingerprint,
        boot_id: &str,
    ) -> Result<Self, Rejection> {
        let mut header = [0; HEADER_BYTES];
        bytes.read_bytes(0, &mut header)?;
        let (mut description, count, crc, length) =
            layout::decode_header(&header).map_err(Rejection::Damaged)?;
        if description.identity != identity {
            return Err(Rejection::OtherSession);
        }
        // Before any allocation that the header decides.
        if bytes.length()? != length || DESCRIPTORS_OFFSET + descriptors_length(count) > length {
            return Err(Rejection::Damaged("it has the wrong length"));
        }
        let mut descriptors = vec![0; descriptors_length(count) as usize];
        bytes.read_bytes(DESCRIPTORS_OFFSET, &mut descriptors)?;
        description.bitmaps =
            layout::decode_descriptors(&descriptors, crc).map_err(Rejection::Damaged)?;
        let layout = Layout::of(&description).filter(|layout| layout.length == length);
        let layout = layout.ok_or(Rejection::Damaged("its bitmaps do not fit into it"))?;
        let is_same_boot = !boot_id.is_empty() && description.boot_id == boot_id;
        let trust = if is_same_boot { Trust::SameBoot } else { Trust::OtherBoot };
        if trust == Trust::OtherBoot && description.durability != BitmapDurability::PowerLoss {
            return Err(Rejection::PowerLoss);
        }
        let mut alive = [0; 8];
        bytes.read_bytes(layout::LIVENESS_WORD as u64 * 8, &mut alive)?;
        compare(description.image, image, u64::from_le_bytes(alive), trust)?;
        let hot = match trust {
            Trust::SameBoot => Vec::new(),
            Trust::OtherBoot => read_log(&bytes, &description)?,
        };
        Ok(Self { bytes, description, layout, trust, hot })
    }

    /// The size of the disk whose changes are recorded, in bytes.
    pub(crate) fn disk_size(&self) -> u64 {
        self.description.disk_size
    }

    pub(crate) fn trust(&self) -> Trust {
        self.trust
    }

    /// The bitmaps whose bits it contains.
    #[cfg(test)]
    pub(crate) fn bitmaps(&self) -> &[BitmapDescriptor] {
        &self.description.bitmaps
    }

    /// The words of a bitmap, bit 0 first; `None` if the sidecar has no such bitmap.
    ///
    /// # Errors
    ///
    /// `Io` if it cannot be read.
    pub(crate) fn words(&self, wanted: &BitmapDescriptor) -> Result<Option<Vec<u64>>, Rejection> {
        let found = self.description.bitmaps.iter().position(|bitmap| bitmap == wanted);
        let Some(number) = found else { return Ok(None) };
        let mut bytes = vec![0; (wanted.word_count() * 8) as usize];
        self.bytes.read_bytes(self.layout.word_offsets[number], &mut bytes)?;
        let (words, _) = bytes.as_chunks::<8>();
        let mut words: Vec<u64> = words.iter().map(|word| u64::from_le_bytes(*word)).collect();
        for (start, end) in &self.hot {
            let first = start >> wanted.granularity_bits;
            let last = (end - 1) >> wanted.granularity_bits;
            set_plain_bits(&mut words, first, last);
        }
        // Bits past the end of the disk have no meaning.
        if let (Some(word), rest @ 1..) = (words.last_mut(), wanted.bit_count % 64) {
            *word &= (1 << rest) - 1;
        }
        Ok(Some(words))
    }

    /// Records that this program is about to change the image, so that the sidecar is still trusted
    /// if the recovery is interrupted.
    pub(crate) fn extend_life(&self) {
        let until = now_nanoseconds().saturating_add(RECOVERY_NANOSECONDS);
        let offset = layout::LIVENESS_WORD as u64 * 8;
        // If that fails, an interrupted recovery will be taken for a foreign writer.
        let _ = self.bytes.write(offset, &until.to_le_bytes());
    }
}

fn descriptors_length(count: usize) -> u64 {
    (count * DESCRIPTOR_BYTES) as u64
}

/// Checks that no other program has changed the image.
fn compare(then: Fingerprint, now: Fingerprint, alive: u64, trust: Trust) -> Result<(), Rejection> {
    let found = if then.inode != now.inode {
        "it is another file"
    } else if now.length < then.length {
        "the file has become shorter"
    } else if then.header_crc != now.header_crc {
        "its header has changed"
    } else if trust == Trust::SameBoot
        && then.modified != 0
        && now.modified > alive.saturating_add(SLACK_NANOSECONDS)
    {
        "it was changed later than this program ended"
    } else {
        return Ok(());
    };
    Err(Rejection::ForeignWriter(found))
}

/// The byte ranges of the extents that the log names.
fn read_log(
    bytes: &impl FoundBytes,
    description: &Description,
) -> Result<Vec<(u64, u64)>, Rejection> {
    let size = description.disk_size;
    let extent_bits = description.log.extent_bits;
    let mut slots = vec![0; description.log.slots * SLOT_BYTES];
    bytes.read_bytes(LOG_OFFSET, &mut slots)?;
    let mut extents = Vec::new();
    for slot in slots.chunks_exact(SLOT_BYTES) {
        let named = layout::decode_slot(slot, description.epoch).map_err(Rejection::Damaged)?;
        extents.extend(named);
    }
    extents.sort_unstable();
    extents.dedup();
    let ranges = extents.into_iter().map(|extent| {
        let start = u64::from(extent) << extent_bits;
        (start, (start + (1 << extent_bits)).min(size))
    });
    Ok(ranges.filter(|(start, end)| start < end).collect())
}

fn set_plain_bits(words: &mut [u64], first: u64, last: u64) {
    for bit in first..=last {
        if let Some(word) = words.get_mut((bit / 64) as usize) {
            *word |= 1 << (bit % 64);
        }
    }
}
