//! Object stores: the options, and what opens objects, if the program has the feature.

#[cfg(not(feature = "object-storage"))]
mod none;
#[cfg(feature = "object-storage")]
mod stores;

#[cfg(not(feature = "object-storage"))]
pub use none::ObjectArgs;
#[cfg(feature = "object-storage")]
pub use stores::{AddressingChoice, ObjectArgs};
