//! Object stores: the options, and what opens objects, if the program has the feature.

#[cfg(not(feature = "object-storage"))]
mod none;
#[cfg(feature = "object-storage")]
mod stores;

#[cfg(not(feature = "object-storage"))]
pub use none::ObjectArgs;
#[cfg(not(feature = "object-storage"))]
pub(crate) use none::read_once;
#[cfg(feature = "object-storage")]
pub(crate) use stores::read_once;
#[cfg(feature = "object-storage")]
pub use stores::{AddressingChoice, ObjectArgs};
