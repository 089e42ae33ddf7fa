//! Disk images in files.

use std::fs::File;
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use imgfmt::{Access, Format, Image, OpenOptions};
use nbd_server::export::ImageExport;
use tempfile::NamedTempFile;

/// A file with this content.
pub fn disk_file(content: &[u8]) -> NamedTempFile {
    let file = NamedTempFile::new().unwrap();
    std::fs::write(file.path(), content).unwrap();
    file
}

/// A raw image, to be read and written, with every context.
pub fn image_export(path: &Path) -> ImageExport {
    let options = OpenOptions::new().format(Format::Raw).access(Access::ReadWrite);
    ImageExport::new(Image::open(path, &options).unwrap()).with_allocation_depth()
}

/// Bytes of disk that a file takes.
pub fn allocated_bytes(path: &Path) -> u64 {
    File::open(path).unwrap().metadata().unwrap().blocks() * 512
}
