//! The files of a chain, for a drawing.

use std::ffi::OsStr;
use std::fs::{self, Metadata};
use std::os::unix::fs::MetadataExt as _;

use imgfmt::ImageInfo;
use nbd_jobs::date::date_and_time;
use nbd_jobs::graph::{GraphNode, Relation};
use nbd_jobs::image_location::ImageLocation;

/// Returns an image, and its data file if it has one.
pub(super) fn nodes(location: &ImageLocation, info: &ImageInfo, is_first: bool) -> Vec<GraphNode> {
    let metadata = metadata(location);
    let mut facts: Vec<_> = metadata.iter().map(changed).collect();
    if info.encryption.is_some() {
        facts.push("encrypted".to_owned());
    }
    if let Some(qcow2) = &info.qcow2 {
        for (count, what) in
            [(qcow2.snapshots.len(), "snapshots"), (qcow2.bitmaps.len(), "bitmaps")]
        {
            if count > 0 {
                facts.push(format!("{what}: {count}"));
            }
        }
    }
    let image = GraphNode {
        relation: if is_first { Relation::Image } else { Relation::BackingFile },
        name: location.name(),
        format: info.format.name().to_owned(),
        size: Some(info.size),
        allocated: metadata.as_ref().map(|metadata| metadata.blocks() * 512),
        facts,
    };
    let data_name = info.qcow2.as_ref().and_then(|qcow2| qcow2.data_file_name.as_deref());
    [image].into_iter().chain(data_name.map(|name| data_file(location, info, name))).collect()
}

fn data_file(location: &ImageLocation, info: &ImageInfo, name: &OsStr) -> GraphNode {
    let found = location.beside(name).ok();
    let metadata = found.as_ref().and_then(metadata);
    let is_raw = info.qcow2.as_ref().is_some_and(|qcow2| qcow2.data_file_is_raw);
    GraphNode {
        relation: Relation::DataFile,
        name: found.map_or_else(|| name.to_string_lossy().into_owned(), |found| found.name()),
        format: if is_raw { "raw" } else { "clusters in the order of qcow2" }.to_owned(),
        size: Some(info.size),
        allocated: metadata.as_ref().map(|metadata| metadata.blocks() * 512),
        facts: metadata.iter().map(changed).collect(),
    }
}

/// The file's metadata; `None` for exports.
fn metadata(location: &ImageLocation) -> Option<Metadata> {
    location.uri().is_none().then(|| fs::metadata(location.path()).ok())?
}

fn changed(metadata: &Metadata) -> String {
    format!("changed {}", date_and_time(u64::try_from(metadata.mtime()).unwrap_or_default()))
}
