//! Information items of INFO and GO (section "Option types", NBD_OPT_INFO).

use crate::error::ProtocolError;
use crate::limits::{DEFAULT_PREFERRED_BLOCK_SIZE, MAX_MINIMUM_BLOCK_SIZE, MAX_PAYLOAD};

open_enum! {
    /// The kind of an information item.
    InfoType(u16) {
        /// Size and transmission flags; always sent.
        EXPORT = 0;
        /// The canonical name of the export.
        NAME = 1;
        /// A human-readable description.
        DESCRIPTION = 2;
        /// Minimum, preferred and maximum block size.
        BLOCK_SIZE = 3;
    }
}

/// Block size constraints of an export (section "Size constraints").
///
/// `minimum <= preferred <= maximum_payload`; the first two are powers of two.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct BlockSizes {
    minimum: u32,
    preferred: u32,
    maximum_payload: u32,
}

impl Default for BlockSizes {
    /// Returns the values that a client may assume if the server sends none: 1, 4096, 32 MiB.
    fn default() -> Self {
        Self { minimum: 1, preferred: DEFAULT_PREFERRED_BLOCK_SIZE, maximum_payload: MAX_PAYLOAD }
    }
}

impl BlockSizes {
    /// Validates the constraints and creates the value. All three are in bytes.
    ///
    /// # Errors
    ///
    /// [`ProtocolError::Malformed`] if `minimum` is not a power of two up to 64 KiB, if `preferred`
    /// is not a power of two or is less than 512 or `minimum`, or if `maximum_payload` is less than
    /// `preferred` or (unless it is 2^32-1) not a multiple of `minimum`.
    pub const fn new(
        minimum: u32,
        preferred: u32,
        maximum_payload: u32,
    ) -> Result<Self, ProtocolError> {
        const fn malformed(why: &'static str) -> ProtocolError {
            ProtocolError::Malformed { what: "block size constraints", why }
        }
        if !minimum.is_power_of_two() || minimum > MAX_MINIMUM_BLOCK_SIZE {
            return Err(malformed("the minimum is not a power of two between 1 and 65536"));
        }
        if !preferred.is_power_of_two() || preferred < minimum || preferred < 512 {
            return Err(malformed(
                "the preferred size is not a power of two of at least 512 and the minimum",
            ));
        }
        if maximum_payload < preferred {
            return Err(malformed("the maximum payload is below the preferred size"));
        }
        if maximum_payload != u32::MAX && maximum_payload & (minimum - 1) != 0 {
            return Err(malformed("the maximum payload is not a multiple of the minimum"));
        }
        Ok(Self { minimum, preferred, maximum_payload })
    }

    /// The same constraints with a minimum of 1.
    #[must_use]
    pub(crate) const fn without_minimum(self) -> Self {
        Self { minimum: 1, ..self }
    }

    /// Returns the minimum block size, in bytes: offset and length of every request are multiples
    /// of it.
    #[must_use]
    pub const fn minimum(&self) -> u32 {
        self.minimum
    }

    /// Returns the preferred block size, in bytes: requests that are multiples of it are fastest.
    #[must_use]
    pub const fn preferred(&self) -> u32 {
        self.preferred
    }

    /// Returns the maximum payload of a READ or WRITE, in bytes; 2^32-1 means no fixed limit.
    #[must_use]
    pub const fn maximum_payload(&self) -> u32 {
        self.maximum_payload
    }
}
