//! The options and the results of a check.

use crate::access::Access;
use crate::format::Format;

/// The permitted repairs.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Hash)]
pub enum Repair {
    /// None: the image is only read.
    #[default]
    None,
    /// Refcounts that are too high. If anything else is wrong, nothing is written.
    Leaks,
    /// All possible ones.
    All,
}

impl Repair {
    /// How the image is opened for it.
    pub(crate) fn access(self) -> Access {
        match self {
            Self::None => Access::ReadOnly,
            Self::Leaks | Self::All => Access::ReadWrite,
        }
    }
}

/// The result of a check.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct CheckReport {
    /// Clusters whose refcount is too high.
    pub leaks: u64,
    /// Defects that endanger data.
    pub corruptions: u64,
    /// Repaired leaks; not contained in `leaks`.
    pub leaks_repaired: u64,
    /// Repaired defects; not contained in `corruptions`.
    pub corruptions_repaired: u64,
    /// Clusters of the disk; no clusters are counted in images of other formats than qcow2.
    pub total_clusters: u64,
    /// Clusters of the disk whose data is in this image.
    pub allocated_clusters: u64,
    /// Of these, compressed clusters.
    pub compressed_clusters: u64,
    /// Of these, clusters that do not follow the previous one in the file, and all compressed ones.
    pub fragmented_clusters: u64,
    /// End of the used part of the file, in bytes.
    pub image_end_offset: u64,
    /// The format of the image, if it is another one than qcow2.
    pub other_format: Option<Format>,
    /// Descriptions of the findings; the first hundred of each check.
    pub messages: Vec<String>,
}

/// The reaction to the findings of a check.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(in crate::qcow2) enum Mode {
    Look,
    Leaks,
    All,
    /// For opening an image for writing that was not closed properly: repairs refcounts and COPIED
    /// bits, or nothing if anything else is wrong.
    Automatic,
}
