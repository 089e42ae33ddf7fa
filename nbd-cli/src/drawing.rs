//! Charts of disks on a terminal, and pictures in files.

use std::fs::{self, File};
use std::io::{Read as _, Write as _};
use std::os::unix::fs::FileTypeExt as _;
use std::path::Path;

use nbd_jobs::chart::Chart;

use crate::error::CommandError;
use crate::output::Output;
use crate::terminal::{self, ColorChoice};

/// The beginning of a picture.
const SVG: &[u8] = b"<svg ";

/// How a disk is drawn.
pub(crate) enum Drawing {
    /// As text.
    Text(ColorChoice),
    /// As a picture.
    Svg(Destination),
}

/// Where a picture goes.
pub(crate) enum Destination {
    Stdout,
    File(Box<Path>),
}

impl Drawing {
    /// Returns the drawing that the options ask for.
    pub(crate) fn requested(is_text: bool, color: ColorChoice, svg: Option<&Path>) -> Option<Self> {
        match svg {
            Some(path) if path.as_os_str() == "-" => Some(Self::Svg(Destination::Stdout)),
            Some(path) => Some(Self::Svg(Destination::File(path.into()))),
            None => is_text.then_some(Self::Text(color)),
        }
    }

    /// Begins a drawing of a disk of `size` bytes.
    pub(crate) fn begin(&self, size: u64) -> Chart {
        match self {
            Self::Text(_) => Chart::of_columns(size, terminal::columns()),
            Self::Svg(_) => Chart::of_picture(size),
        }
    }

    /// Prints or writes it.
    pub(crate) fn finish(
        &self,
        chart: &Chart,
        title: &str,
        output: &mut Output,
    ) -> Result<(), CommandError> {
        match self {
            Self::Text(color) => {
                let lines = chart.lines(terminal::character_set(), terminal::color(*color));
                lines.iter().try_for_each(|line| output.line(line))
            }
            Self::Svg(Destination::Stdout) => output.text(&chart.svg(title)),
            Self::Svg(Destination::File(path)) => write(path, &chart.svg(title)),
        }
    }
}

/// Writes a picture. What may be a disk is not overwritten.
fn write(path: &Path, svg: &str) -> Result<(), CommandError> {
    let shown = path.display();
    if !may_be_replaced(path) {
        return Err(CommandError::new(format!(
            "'{shown}' exists and is not a picture; give the name of a new file, or remove it first"
        )));
    }
    let written = File::create(path).and_then(|mut file| file.write_all(svg.as_bytes()));
    written.map_err(|error| CommandError::new(format!("cannot write '{shown}': {error}")))
}

/// Returns whether there is nothing at `path` that would be lost.
fn may_be_replaced(path: &Path) -> bool {
    let Ok(metadata) = fs::metadata(path) else { return true };
    let kind = metadata.file_type();
    if kind.is_file() && metadata.len() > 0 {
        let mut start = [0; SVG.len()];
        let read = File::open(path).and_then(|mut file| file.read_exact(&mut start));
        return read.is_ok() && start == SVG;
    }
    !kind.is_block_device()
}
