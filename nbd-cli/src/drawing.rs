//! Charts of disks on a terminal, and pictures in files.

use std::fs::{self, File, Metadata, OpenOptions};
use std::io::{self, Read as _, Seek as _, Write as _};
use std::os::unix::fs::{FileTypeExt as _, MetadataExt as _, OpenOptionsExt as _};
use std::path::Path;

use nbd_jobs::chart::Chart;

use crate::error::CommandError;
use crate::output::Output;
use crate::terminal::{self, ColorChoice};

/// The beginning and the end of the first line of this program's pictures.
const FIRST_LINE: [&[u8]; 2] = [
    b"<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"",
    b" role=\"img\" aria-labelledby=\"map-title map-description\">",
];

/// Longest first line, in bytes.
const MAX_FIRST_LINE_LEN: u64 = 512;

/// The form of a drawing.
pub(crate) enum Drawing {
    /// As text.
    Text(ColorChoice),
    /// As a picture.
    Svg(Destination),
}

/// The destination of a picture.
pub(crate) enum Destination {
    Stdout,
    File(Box<Path>),
}

impl Drawing {
    /// Returns the drawing that the options request.
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

/// Writes a picture. A file that may be a disk is not overwritten.
fn write(path: &Path, svg: &str) -> Result<(), CommandError> {
    let shown = path.display();
    let failed = |error: io::Error| CommandError::new(format!("cannot write '{shown}': {error}"));
    let Some(mut file) = open(path).map_err(failed)? else {
        return Err(CommandError::new(format!(
            "'{shown}' exists and is not a picture of this command; give the name of a new file, or \
             remove it first"
        )));
    };
    file.write_all(svg.as_bytes()).map_err(failed)
}

/// Opens a new or a replaceable file. Returns `None` if other data would be lost.
fn open(path: &Path) -> io::Result<Option<File>> {
    match File::create_new(path) {
        Err(error) if error.kind() == io::ErrorKind::AlreadyExists => {}
        created => return created.map(Some),
    }
    // Before it is opened: opening rewinds a tape.
    let found = fs::metadata(path)?;
    if !found.is_file() && !is_sink(&found) {
        return Ok(None);
    }
    // A FIFO is only written: this waits for its reader.
    let mut options = OpenOptions::new();
    options
        .read(found.is_file())
        .write(true)
        .custom_flags(rustix::fs::OFlags::NOCTTY.bits() as i32);
    let mut file = options.open(path)?;
    // The path may name another file by now.
    let opened = file.metadata()?;
    if !opened.is_file() {
        return Ok(is_sink(&opened).then_some(file));
    }
    if !found.is_file() || !(opened.len() == 0 || is_picture(&file)?) {
        return Ok(None);
    }
    file.rewind()?;
    file.set_len(0)?;
    Ok(Some(file))
}

/// Returns whether written data is not stored: FIFOs, terminals and `/dev/null`.
fn is_sink(metadata: &Metadata) -> bool {
    // Linux's numbers (admin-guide/devices.txt): consoles and serial lines, `/dev/tty`, and pseudo
    // terminals.
    const TERMINALS: [std::ops::RangeInclusive<u32>; 2] = [4..=5, 136..=143];
    let kind = metadata.file_type();
    let (major, minor) = (rustix::fs::major(metadata.rdev()), rustix::fs::minor(metadata.rdev()));
    let is_terminal = TERMINALS.iter().any(|range| range.contains(&major));
    kind.is_fifo() || kind.is_char_device() && (is_terminal || (major, minor) == (1, 3))
}

fn is_picture(file: &File) -> io::Result<bool> {
    let mut start = Vec::new();
    file.take(MAX_FIRST_LINE_LEN).read_to_end(&mut start)?;
    let line = start.split(|byte| *byte == b'\n').next().unwrap_or_default();
    let [first, last] = FIRST_LINE;
    Ok(line.starts_with(first) && line.ends_with(last))
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::symlink;

    use super::*;

    #[test]
    fn only_our_own_pictures_and_empty_files_are_replaced() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.svg");
        let svg = Chart::of_picture(1 << 20).svg("title");
        let content = || fs::read_to_string(&path).expect("a file");
        for before in ["", &svg, &(svg.clone() + "more")] {
            fs::write(&path, before).expect("a file");
            write(&path, &svg).expect("it may be replaced");
            assert_eq!(content(), svg);
        }
        let foreign = "<svg xmlns=\"http://www.w3.org/2000/svg\" width=\"1\"></svg>\n";
        for before in ["\0", "<svg ", foreign, &svg[1..], &("\n".to_owned() + &svg)] {
            fs::write(&path, before).expect("a file");
            let error = write(&path, &svg).expect_err("it would be lost").to_string();
            assert!(error.contains("exists and is not a picture"), "{error}");
            assert_eq!(content(), before);
        }
    }

    #[test]
    fn neither_dangling_links_nor_devices_are_written() {
        let directory = tempfile::tempdir().expect("a directory");
        let [link, target] = ["link", "target"].map(|name| directory.path().join(name));
        symlink(&target, &link).expect("a link");
        write(&link, "picture").expect_err("nothing is there");
        assert!(!target.exists());
        for refused in ["/dev/zero", "/dev/full", "/dev/random", "/"] {
            let error = write(Path::new(refused), "picture").expect_err("no file").to_string();
            assert!(error.contains("exists and is not a picture"), "{error}");
        }
        write(Path::new("/dev/null"), "picture").expect("nothing is lost");
    }
}
