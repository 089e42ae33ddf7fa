//! What an image is opened for.

/// What an image is opened for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Use,
    /// Damaged images are welcome.
    Check,
    /// Only to be described: encrypted images are welcome too.
    Describe,
}
