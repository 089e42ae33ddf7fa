//! Copies what the layers below an overlay provide into the overlay.

use super::error::{JobError, JobErrorKind};
use super::flushes::Flushes;
use super::observer::{JobContext, Meter};
use super::snapshots;
use super::stream_order::Order;
use crate::error::{Error, ErrorKind};
use crate::extent::{Extent, ExtentKind};
use crate::image::{Image, NewBase};
use crate::qcow2::Below;
use crate::units::{GuestRange, span};

/// Size of a copy step, in bytes.
const STEP: u64 = 1 << 20;

/// The result of a [`stream`]. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct Streamed {
    /// Bytes copied into the overlay.
    pub data: u64,
    /// Bytes that the overlay records as zero.
    pub zeroes: u64,
}

/// What a [`stream`] would read and record, found without reading data. Sizes are in bytes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct ToStream {
    /// Bytes that are data in the layers below.
    pub data: u64,
    /// Bytes that are known to be zero there.
    pub zeroes: u64,
}

/// Copies into the qcow2 image `overlay`, opened for writing, what the layers between it and the
/// layer of depth `base` provide (the backing file has depth 2), as QEMU's `block-stream` does; all
/// layers below it, if `base` is `None`. Data that is zero becomes zero clusters; version 2 of the
/// format has none, so there it is written with a base, and otherwise left out. Clusters that the
/// overlay has, also discarded ones, stay as they are.
///
/// The disk does not change, and others may use it meanwhile: what they write stays, and where they
/// read what is below, that and the 8 MiB after it are copied first. Bitmaps record nothing. What
/// was copied is flushed every three seconds, beside the copying, and after an error; another call
/// goes on, after a crash where the last flush was. When it has succeeded, the layers between are
/// not needed any more: [close](Image::close) the overlay; then [`Image::change_backing_file`] can
/// set the base as backing file, or none.
///
/// # Errors
///
/// `InvalidArgument` if `overlay` is not a qcow2 image or has internal snapshots, which show the
/// layers below too, or if the chain has no layer of depth `base` below it; `Source` if a layer
/// below cannot be read; `Destination`, also if space runs out; `Interrupted`.
///
/// ```
/// use imgfmt::jobs::{JobContext, stream};
/// use imgfmt::{CreateOptions, Format, Image, OpenOptions};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
/// std::fs::write(&base, vec![7; 1 << 20])?;
/// let overlay = Image::create(&top, &CreateOptions::overlay("base.img", Format::Raw))?;
///
/// assert_eq!(stream(&overlay, None, &JobContext::default())?.data, 1 << 20);
/// overlay.close()?;
/// Image::change_backing_file(&top, &OpenOptions::new(), None)?;
/// # Ok(())
/// # }
/// ```
pub fn stream(
    overlay: &Image,
    base: Option<u32>,
    context: &JobContext,
) -> Result<Streamed, JobError> {
    let between = Between::new(overlay, base)?;
    std::thread::scope(|scope| {
        let flushes = Flushes::new(scope, overlay);
        let mut job = Streaming::new(overlay, between, context, flushes);
        let copied = job.copy_everything();
        let Streaming { streamed, flushes, .. } = job;
        flushes.end(copied.map(|()| streamed))
    })
}

/// As [`stream`], and then takes the layers away: the base, or nothing, becomes the backing file of
/// the image, which stays open and in use. The files of the layers are closed as soon as no request
/// uses them; for that, at most 10 s are waited. [`Image::layer_in`] finds the depth of a base.
///
/// # Errors
///
/// As [`stream`]; `InvalidArgument` if the backing file that the header names is not open;
/// `Destination` if the header cannot be changed, if it has no space for the name of the base, or
/// if a flush has failed since the image was opened: then, what was copied may be lost. The layers
/// are as before, after any error.
///
/// ```
/// use imgfmt::jobs::{JobContext, stream_in_place};
/// use imgfmt::{CreateOptions, Format, Image};
///
/// # fn main() -> Result<(), Box<dyn std::error::Error>> {
/// # let directory = tempfile::tempdir()?;
/// # let (base, top) = (directory.path().join("base.img"), directory.path().join("top.qcow2"));
/// std::fs::write(&base, vec![7; 1 << 20])?;
/// let overlay = Image::create(&top, &CreateOptions::overlay("base.img", Format::Raw))?;
///
/// stream_in_place(&overlay, None, &JobContext::default())?;
/// assert_eq!(overlay.info()?.backing_name, None);
/// std::fs::remove_file(&base)?;
/// # Ok(())
/// # }
/// ```
pub fn stream_in_place(
    overlay: &Image,
    base: Option<NewBase<'_>>,
    context: &JobContext,
) -> Result<Streamed, JobError> {
    if overlay.ignores_backing() {
        return Err(refused(overlay, "the backing file that it names is not open"));
    }
    let changes = overlay.backing_changes();
    let streamed = stream(overlay, base.map(|base| base.depth), context)?;
    let is_done = match base {
        Some(base) => base.depth == 2,
        None => overlay.layer_sizes().len() == 1,
    };
    if !is_done {
        overlay.detach_below(base, changes).map_err(JobError::destination)?;
    }
    Ok(streamed)
}

fn refused(overlay: &Image, detail: &str) -> JobError {
    let error = overlay.name(Error::new(ErrorKind::Unsupported, "stream into", detail));
    JobError::image(JobErrorKind::InvalidArgument, error)
}

/// Returns how much [`stream`] would copy.
///
/// # Errors
///
/// As [`stream`], without those of writing and of reading data.
pub fn measure_stream(
    overlay: &Image,
    base: Option<u32>,
    context: &JobContext,
) -> Result<ToStream, JobError> {
    let between = Between::new(overlay, base)?;
    let mut found = ToStream::default();
    for extent in overlay.extents(overlay.whole()) {
        context.cancellation.check()?;
        let extent = extent.map_err(JobError::source)?;
        match extent.kind {
            _ if !between.has(&extent) => {}
            ExtentKind::Data => found.data += extent.range.length(),
            _ => found.zeroes += extent.range.length(),
        }
    }
    Ok(found)
}

/// The layers that a stream copies.
#[derive(Clone, Copy, Debug)]
struct Between {
    base: Option<u32>,
    /// Size in bytes of the parts of the disk that the overlay has or has not.
    unit: u64,
}

impl Between {
    fn new(overlay: &Image, base: Option<u32>) -> Result<Self, JobError> {
        let refuse = |detail: &str| Err(refused(overlay, detail));
        let Some(unit) = overlay.subcluster_size() else {
            return refuse("only a qcow2 image can take what is below it");
        };
        snapshots::refuse(overlay, "stream into")?;
        let layers = overlay.layer_sizes().len() as u64;
        if base.is_some_and(|base| base < 2 || u64::from(base) > layers) {
            return refuse("the base is not one of the layers below it");
        }
        Ok(Self { base, unit })
    }

    fn has(&self, extent: &Extent) -> bool {
        extent.depth >= 2 && self.base.is_none_or(|base| extent.depth < base)
    }
}

/// Whether the turn of a part has come.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Turn {
    Before,
    Come,
}

struct Streaming<'scope, 'a> {
    overlay: &'a Image,
    between: Between,
    context: &'a JobContext,
    meter: Meter<'a>,
    order: Order<'a>,
    /// Size of a copy step, in bytes.
    step: u64,
    buffer: Vec<u8>,
    /// What lies before has been copied. Where a part begins that is copied before its turn, while
    /// it is.
    done: u64,
    /// What lies before has been counted.
    counted: u64,
    streamed: Streamed,
    flushes: Flushes<'scope, 'a>,
}

impl<'scope, 'a> Streaming<'scope, 'a> {
    fn new(
        overlay: &'a Image,
        between: Between,
        context: &'a JobContext,
        flushes: Flushes<'scope, 'a>,
    ) -> Self {
        let (size, step) = (overlay.size(), STEP.max(between.unit));
        Self {
            overlay,
            between,
            context,
            meter: Meter::begin(context, size),
            order: Order::new(overlay.ask_readers(), size, step),
            step,
            buffer: Vec::new(),
            done: 0,
            counted: 0,
            streamed: Streamed::default(),
            flushes,
        }
    }

    fn copy_everything(&mut self) -> Result<(), JobError> {
        for extent in self.overlay.extents(self.overlay.whole()) {
            self.context.cancellation.check()?;
            let extent = extent.map_err(JobError::source)?;
            if self.between.has(&extent) {
                self.copy_before_turn()?;
                self.copy(&extent, Turn::Come)?;
            }
            self.count(extent.range.end().bytes(), extent.kind);
        }
        Ok(())
    }

    /// Counts what is done up to an offset of the disk.
    fn count(&mut self, done: u64, kind: ExtentKind) {
        if done <= self.counted {
            return;
        }
        let bytes = done - self.counted - self.order.pass(self.counted, done);
        match kind {
            ExtentKind::Data => self.meter.add(bytes),
            _ => self.meter.add_hole(bytes),
        }
        self.counted = done;
    }

    /// Copies what readers ask for, and what is near to that. To be called when nothing else would
    /// be copied at once.
    fn copy_before_turn(&mut self) -> Result<(), JobError> {
        loop {
            // As late as possible: readers may ask for something meanwhile.
            self.context.keep_rate(0, || false)?;
            let Some(part) = self.order.next_before_turn(self.counted) else { return Ok(()) };
            let in_turn = std::mem::replace(&mut self.done, part.offset().bytes());
            for extent in self.overlay.extents(part) {
                let extent = extent.map_err(JobError::source)?;
                if self.between.has(&extent) {
                    self.copy(&extent, Turn::Before)?;
                }
            }
            self.done = in_turn;
            self.meter.add(part.end().bytes() - part.offset().bytes().max(self.counted));
        }
    }

    /// Copies an extent, and what else is in the overlay's subclusters at both of its ends.
    fn copy(&mut self, extent: &Extent, turn: Turn) -> Result<(), JobError> {
        let (unit, size) = (self.between.unit, self.overlay.size());
        let (start, end) = (extent.range.offset().bytes(), extent.range.end().bytes());
        let outer = span(
            (start - start % unit).max(self.done),
            end.checked_next_multiple_of(unit).unwrap_or(size).min(size),
        );
        if outer.is_empty() {
            return Ok(());
        }
        let inner_end = if end == size { end } else { end - end % unit };
        let inner = span(start.next_multiple_of(unit), inner_end).intersection(outer);
        if extent.kind == ExtentKind::Data || inner.is_empty() {
            self.copy_data(outer, turn)?;
        } else {
            self.copy_data(span(outer.offset(), inner.offset()), turn)?;
            self.populate(inner, Below::Zeroes)?;
            self.copy_data(span(inner.end(), outer.end()), turn)?;
        }
        self.done = outer.end().bytes();
        Ok(())
    }

    /// Copies a range that begins and ends where subclusters do, or ends with the disk.
    fn copy_data(&mut self, range: GuestRange, turn: Turn) -> Result<(), JobError> {
        let mut position = range.offset().bytes();
        while position < range.end().bytes() {
            self.context.cancellation.check()?;
            let stop = ((position / self.step + 1) * self.step).min(range.end().bytes());
            let part = span(position, stop);
            if turn == Turn::Come {
                self.copy_before_turn()?;
            }
            if turn == Turn::Before || !self.order.is_copied(part) {
                self.copy_part(part)?;
            }
            position = stop;
            if turn == Turn::Come {
                self.count(position, ExtentKind::Data);
            }
        }
        Ok(())
    }

    /// Copies at most a step.
    fn copy_part(&mut self, part: GuestRange) -> Result<(), JobError> {
        self.context.keep_rate(part.length(), || false)?;
        let mut buffer = std::mem::take(&mut self.buffer);
        buffer.resize(self.step as usize, 0);
        let data = &mut buffer[..part.length() as usize];
        // Where the overlay has content by now, that is read, and not used.
        self.overlay.read_for_job(part.offset(), data).map_err(JobError::source)?;
        self.populate(part, Below::Data(data))?;
        self.buffer = buffer;
        Ok(())
    }

    fn populate(&mut self, range: GuestRange, below: Below<'_>) -> Result<(), JobError> {
        let populated = self.overlay.populate(range, below, self.between.base.is_some());
        let populated = populated.map_err(JobError::destination)?;
        self.streamed.data += populated.data;
        self.streamed.zeroes += populated.zeroes;
        if populated.data + populated.zeroes == 0 {
            return self.flushes.flush_if_due();
        }
        self.context.observer.copied(range);
        self.flushes.changed()
    }
}
