//! The purpose for which an image is opened.

/// The purpose for which an image is opened.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Purpose {
    Use,
    /// To check it: damaged images are accepted.
    Check,
    /// To inspect it: encrypted images are accepted without their key.
    Describe,
}
