//! A source of which parts cannot be read.

use rustix::io::Errno;

use crate::error::{Error, ErrorKind};
use crate::image::Image;
use crate::jobs::error::JobError;
use crate::jobs::observer::JobContext;
use crate::units::{GuestOffset, span};

/// What is read at a time where a larger part cannot be read, in bytes.
const SECTOR: usize = 512;

/// Returns whether an error says that the bytes are lost: they are damaged, or the disk cannot read
/// them. After other errors, such as a lost connection, they may still be there.
pub(super) fn is_lost(error: &Error) -> bool {
    let lost = [Errno::IO, Errno::NODATA, Errno::ILSEQ, Errno::REMOTEIO].map(Errno::raw_os_error);
    match error.kind() {
        ErrorKind::Corrupt => true,
        ErrorKind::Io => {
            error.is_of_lost_bytes()
                || error.raw_os_error().is_some_and(|number| lost.contains(&number))
        }
        _ => false,
    }
}

/// Reads a part of the source; sectors that are lost become zero, and the observer is told.
///
/// # Errors
///
/// If reading fails for another reason, or the job is cancelled.
pub(super) fn read_salvaging(
    source: &Image,
    offset: GuestOffset,
    buffer: &mut [u8],
    context: &JobContext,
) -> Result<(), JobError> {
    match source.read_at(offset, buffer) {
        Ok(()) => return Ok(()),
        Err(error) if is_lost(&error) => {}
        Err(error) => return Err(JobError::source(error)),
    }
    let mut position = offset.bytes();
    // The start of the sectors that were lost last, up to here, and why.
    let mut lost: Option<(u64, Error)> = None;
    for sector in buffer.chunks_mut(SECTOR) {
        context.cancellation.check()?;
        match source.read_at(GuestOffset::new(position), sector) {
            Ok(()) => tell(context, lost.take(), position),
            Err(error) if is_lost(&error) => {
                sector.fill(0);
                lost.get_or_insert((position, error));
            }
            Err(error) => return Err(JobError::source(error)),
        }
        position += sector.len() as u64;
    }
    tell(context, lost, position);
    Ok(())
}

fn tell(context: &JobContext, lost: Option<(u64, Error)>, end: u64) {
    if let Some((start, error)) = lost {
        context.observer.unreadable(span(start, end), &error);
    }
}
