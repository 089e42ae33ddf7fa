//! A source that is another server's export, byte for byte.

use std::sync::Arc;

use imgfmt::GuestOffset;
use imgfmt::jobs::SourceReader;
use imgfmt::zero::Content;
use nbd_client::{ExportStorage, ReadChunk};

/// Reads an export; the answers report holes.
pub(super) struct ExportReader {
    export: Arc<ExportStorage>,
    /// For errors.
    name: String,
}

impl ExportReader {
    pub(super) fn new(export: Arc<ExportStorage>, name: String) -> Self {
        Self { export, name }
    }
}

impl SourceReader for ExportReader {
    fn read(&self, offset: GuestOffset, buffer: &mut [u8]) -> Result<Content, String> {
        let start = offset.bytes();
        let chunks = self.export.read_chunks(start..start + buffer.len() as u64);
        let chunks = chunks.map_err(|error| {
            format!("cannot read from {} at offset {start}: {error}", self.name)
        })?;
        if chunks.iter().all(|chunk| matches!(chunk, ReadChunk::Hole { .. })) {
            return Ok(Content::Zero);
        }
        for chunk in chunks {
            // Chunks lie within the request.
            match chunk {
                ReadChunk::Data { offset, data } => {
                    buffer[(offset - start) as usize..][..data.len()].copy_from_slice(&data);
                }
                ReadChunk::Hole { offset, length } => {
                    buffer[(offset - start) as usize..][..length as usize].fill(0);
                }
            }
        }
        Ok(Content::Data)
    }
}
