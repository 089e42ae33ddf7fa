//! The names that servers and images know, to choose from: exports, bitmaps and snapshots.
//!
//! The functions block, and must not be called by asynchronous tasks. They return `None` if the
//! server or the image does not answer, for whatever reason; a server may take its time. Nothing is
//! locked.

use std::path::Path;
use std::time::Duration;

use imgfmt::{Image, ImageInfo, Locking, OpenOptions};
use nbd_client::{Connector, blocking};
use nbd_proto::wire::MetaContextName;

use crate::control::{self, Listing, Request};

/// Time limit for a control socket: a shell waits.
const PATIENCE: Duration = Duration::from_secs(1);

const BITMAP_CONTEXT: &str = "qemu:dirty-bitmap:";

/// Returns the exports of a server with a control socket.
pub fn controlled_exports(socket: &Path) -> Option<Vec<String>> {
    Some(listing(socket)?.exports.into_iter().map(|export| export.name).collect())
}

/// Returns the bitmaps of an export of a server with a control socket.
pub fn controlled_bitmaps(socket: &Path, export: &str) -> Option<Vec<String>> {
    let listing = listing(socket)?;
    let export = listing.exports.into_iter().find(|state| state.name == *export)?;
    let name = |bitmap: &serde_json::Value| bitmap["name"].as_str().map(ToOwned::to_owned);
    Some(export.bitmaps.iter().filter_map(name).collect())
}

fn listing(socket: &Path) -> Option<Listing> {
    let listing = control::call(socket, &Request::List {}, PATIENCE).ok()?;
    serde_json::from_value(listing).ok()
}

/// Returns the bitmaps in an image, which may be served.
pub fn bitmaps_in(image: &Path) -> Option<Vec<String>> {
    let bitmaps = inspect(image)?.qcow2?.bitmaps;
    Some(bitmaps.into_iter().map(|bitmap| bitmap.name).collect())
}

/// Returns the internal snapshots of an image, which may be served.
pub fn snapshots_in(image: &Path) -> Option<Vec<String>> {
    let snapshots = inspect(image)?.qcow2?.snapshots;
    Some(snapshots.into_iter().map(|snapshot| snapshot.name).collect())
}

fn inspect(image: &Path) -> Option<ImageInfo> {
    Image::inspect_file(image, &OpenOptions::new().locking(Locking::Shared)).ok()
}

/// Returns the exports that a server lists; the export of the URI does not matter.
pub fn served_exports(connector: &Connector) -> Option<Vec<String>> {
    let exports = blocking::list(connector).ok()?;
    Some(exports.into_iter().map(|export| export.name).collect())
}

/// Returns the bitmaps that a server offers for the export of a URI.
pub fn served_bitmaps(connector: &Connector) -> Option<Vec<String>> {
    let queries = [BITMAP_CONTEXT.to_owned()];
    let contexts = blocking::list_meta_contexts(connector, &queries).ok()?;
    let name = |context: &MetaContextName| {
        context.as_str().strip_prefix(BITMAP_CONTEXT).map(ToOwned::to_owned)
    };
    Some(contexts.iter().filter_map(name).collect())
}

#[cfg(test)]
mod tests {
    use imgfmt::{CreateOptions, Format};

    use super::*;

    #[test]
    fn an_image_in_use_tells_its_names_and_nonsense_none() {
        let directory = tempfile::tempdir().unwrap();
        let path = directory.path().join("disk.qcow2");
        Image::create(&path, &CreateOptions::new(Format::Qcow2, 1 << 20)).unwrap();
        let options = OpenOptions::new().access(imgfmt::Access::ReadWrite);
        let mut image = Image::open(&path, &options).unwrap();
        image.create_snapshot("before").unwrap();
        assert_eq!(snapshots_in(&path), Some(vec!["before".to_owned()]));
        assert_eq!(bitmaps_in(&path), Some(Vec::new()));
        assert_eq!(bitmaps_in(directory.path()), None);
        assert_eq!(controlled_exports(&path), None);
    }
}
