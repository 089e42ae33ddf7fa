//! Wire values: one file per table of the specification, no state.
//!
//! Enumerations are newtypes over their integer with named constants, so unknown values are
//! preserved and can be reported. Flag words keep unknown bits.

/// Declares an open enumeration: a newtype with named constants and a readable `Debug`.
macro_rules! open_enum {
    (
        $(#[$meta:meta])*
        $name:ident($repr:ty) { $( $(#[$vmeta:meta])* $variant:ident = $value:expr; )* }
    ) => {
        $(#[$meta])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
        pub struct $name(pub $repr);

        impl $name {
            $( $(#[$vmeta])* pub const $variant: Self = Self($value); )*

            /// Returns the name of this value in the specification, or `None` if it has none.
            #[must_use]
            pub const fn name(self) -> Option<&'static str> {
                match self {
                    $( Self::$variant => Some(stringify!($variant)), )*
                    _ => None,
                }
            }
        }

        impl std::fmt::Debug for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, concat!(stringify!($name), "({:#x})"), self.0),
                }
            }
        }

        impl std::fmt::Display for $name {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                match self.name() {
                    Some(name) => f.write_str(name),
                    None => write!(f, "{:#x}", self.0),
                }
            }
        }
    };
}

mod cookie;
mod errno;
mod extent;
mod flags;
mod info;
pub mod magic;
mod meta;
mod option;
mod reply;
mod request;

pub use cookie::Cookie;
pub use errno::Errno;
pub use extent::{AllocationFlags, BlockDescriptor, DirtyFlags};
pub use flags::{ClientFlags, CommandFlags, HandshakeFlags, ReplyFlags, TransmissionFlags};
pub use info::{BlockSizes, InfoType};
pub use meta::{MetaContextId, MetaContextName, MetaContextQuery};
pub use option::{OptionHeader, OptionReplyHeader, OptionReplyType, OptionType};
pub use reply::{ChunkHeader, ReplyMode, ReplyType, SimpleReplyHeader};
pub use request::{CommandType, RequestHeader};
