//! The error type of this crate.
//!
//! An [`Error`] names the operation, the file, the offset, the cause and the remedy. Callers match
//! on [`Error::kind`]; users read the [`Display`](fmt::Display) form.

use std::error::Error as StdError;
use std::fmt;
use std::fmt::Write as _;
use std::io;
use std::path::{Path, PathBuf};

use crate::format::Format;
use crate::shown_text::Escaping;

/// The class of an [`Error`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum ErrorKind {
    /// The operating system reported a failure of reading, writing or syncing.
    Io,
    /// The file is not an image of the expected format, or its header contradicts itself.
    InvalidFormat,
    /// The image or a request needs a feature that this version does not support.
    Unsupported,
    /// The image's metadata is damaged.
    Corrupt,
    /// The request goes beyond the end of the virtual disk.
    OutOfBounds,
    /// The image was opened read-only.
    ReadOnly,
    /// No space is left where the image is stored.
    NoSpace,
    /// The caller's policy forbids a file that the image names, or a guard against harmful content
    /// refused a write.
    PolicyDenied,
    /// Another program, or another open image of this program, has the file locked.
    Busy,
    /// There is no file, bitmap or snapshot of that name.
    NotFound,
    /// The user may not open the file.
    PermissionDenied,
    /// A fast operation was requested and only a slow one is available. Nothing has been changed.
    NotFast,
    /// A new file or bitmap was to be created, but there is one of that name.
    AlreadyExists,
    /// An argument is invalid for every image.
    InvalidInput,
    /// The image is encrypted, and no passphrase was given or none of them opens it.
    KeyRequired,
}

/// The failure of an operation on an image.
pub struct Error(Box<Inner>);

struct Inner {
    kind: ErrorKind,
    operation: &'static str,
    path: Option<PathBuf>,
    offset: Option<u64>,
    detail: String,
    source: Option<io::Error>,
    hint: Option<Hint>,
}

/// Information for callers beyond the class.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Hint {
    FoundFormat(Format),
    ChainTooLong,
    LeadsBack,
    CouldBeShared,
    LostWriteback,
    /// The caller's policy could allow it.
    ByPolicy,
}

/// The result type of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;

impl Error {
    /// Creates an error of `kind`: `operation` is a verb phrase such as "open" or "read from",
    /// `detail` a clause with the cause and the remedy.
    pub fn new(kind: ErrorKind, operation: &'static str, detail: impl Into<String>) -> Self {
        Self(Box::new(Inner {
            kind,
            operation,
            path: None,
            offset: None,
            detail: detail.into(),
            source: None,
            hint: None,
        }))
    }

    /// Converts an error of the operating system; the kind follows from its code.
    pub fn from_io(operation: &'static str, source: io::Error) -> Self {
        if let Some(lost) = source.get_ref().and_then(|it| it.downcast_ref::<LostWriteback>()) {
            let mut error = Self::from_io(operation, io::Error::from_raw_os_error(lost.0));
            error.0.detail = lost.to_string();
            error.0.hint = Some(Hint::LostWriteback);
            return error;
        }
        let mut error = Self::new(kind_of(&source), operation, detail_of(&source));
        error.0.source = Some(source);
        error
    }

    /// The error of an image whose format is recognised but not supported. `is_guess` says that the
    /// format was detected: the user may want to use the file as raw.
    pub(crate) fn unsupported_format(format: Format, is_guess: bool) -> Self {
        let what = format.description();
        let (why, advice) = match format {
            Format::Luks => (
                "and this program was built without encryption",
                "use the device /dev/mapper/NAME that 'cryptsetup open FILE NAME' makes of it",
            ),
            _ => (
                "which can be recognised but not read yet",
                "convert it with 'qemu-img convert -O qcow2' first",
            ),
        };
        let mut detail = format!("it is a {what} image, {why}; {advice}");
        if is_guess {
            detail.push_str(", or give the format 'raw' to use its bytes as they are");
        }
        let mut error = Self::new(ErrorKind::Unsupported, "open", detail);
        error.0.hint = Some(Hint::FoundFormat(format)).filter(|_| is_guess);
        error
    }

    /// Marks the error of a chain that is too long.
    #[must_use]
    pub(crate) fn chain_too_long(mut self) -> Self {
        self.0.hint = Some(Hint::ChainTooLong);
        self
    }

    pub(crate) fn is_chain_too_long(&self) -> bool {
        self.0.hint == Some(Hint::ChainTooLong)
    }

    /// Marks the error of a chain that leads back to itself.
    #[must_use]
    pub(crate) fn leads_back(mut self) -> Self {
        self.0.hint = Some(Hint::LeadsBack);
        self
    }

    pub(crate) fn is_leading_back(&self) -> bool {
        self.0.hint == Some(Hint::LeadsBack)
    }

    /// Returns the detected format of the file, if that is the reason why it could not be opened:
    /// it can be opened with the format `raw` anyway.
    pub fn found_format(&self) -> Option<Format> {
        match self.0.hint {
            Some(Hint::FoundFormat(format)) => Some(format),
            _ => None,
        }
    }

    /// Marks the error of opening a file that another program writes.
    #[must_use]
    pub(crate) fn but_could_be_shared(mut self) -> Self {
        self.0.hint = Some(Hint::CouldBeShared);
        self
    }

    /// Returns whether the file could have been opened with
    /// [`Locking::Shared`](crate::Locking::Shared).
    pub fn could_be_shared(&self) -> bool {
        self.0.hint == Some(Hint::CouldBeShared)
    }

    /// Marks the error of what another policy of the caller would allow.
    #[must_use]
    pub(crate) fn by_policy(mut self) -> Self {
        self.0.hint = Some(Hint::ByPolicy);
        self
    }

    /// Removes the advice to change the policy, for programs that have another name for that.
    /// Returns whether there was one.
    pub fn remove_policy_advice(&mut self) -> bool {
        self.0.hint.take_if(|hint| *hint == Hint::ByPolicy).is_some()
    }

    /// Returns the cause and the remedy, if this file, or an export of this name, could not be
    /// opened: the text of the error after its name.
    pub fn cause_of_opening(&self, name: &Path) -> Option<String> {
        let is_it = self.0.operation == "open" && self.path() == Some(name);
        (is_it && self.0.offset.is_none()).then(|| Cause(self).to_string())
    }

    /// Puts an explanation before the text of the operating system.
    #[must_use]
    pub(crate) fn explained(mut self, explanation: &str) -> Self {
        self.0.detail = format!("{explanation}: {}", self.0.detail);
        self
    }

    /// Makes it the error of a sync: whatever the reason, it is that of data that was written
    /// before.
    #[must_use]
    pub(crate) fn of_sync(mut self) -> Self {
        self.0.hint = Some(Hint::LostWriteback);
        self
    }

    /// Says of lost data that it is an error of I/O, not that space is lacking: writers that lack
    /// space try the change again, and would not know that other data is lost.
    #[must_use]
    pub(crate) fn for_writers(mut self) -> Self {
        if self.0.hint == Some(Hint::LostWriteback) && self.0.kind == ErrorKind::NoSpace {
            self.0.kind = ErrorKind::Io;
        }
        self
    }

    /// Sets the file concerned.
    #[must_use]
    pub fn with_path(mut self, path: impl Into<PathBuf>) -> Self {
        self.0.path.get_or_insert_with(|| path.into());
        self
    }

    /// Sets the byte offset in the virtual disk (or in the file, for metadata), unless data of an
    /// unknown place is lost.
    #[must_use]
    pub fn at(mut self, offset: u64) -> Self {
        if self.0.hint != Some(Hint::LostWriteback) {
            self.0.offset.get_or_insert(offset);
        }
        self
    }

    /// The clause with the cause and the remedy.
    #[cfg_attr(not(feature = "encryption"), expect(dead_code, reason = "nothing is decrypted"))]
    pub(crate) fn detail(&self) -> &str {
        &self.0.detail
    }

    /// Returns the class of the failure.
    pub fn kind(&self) -> ErrorKind {
        self.0.kind
    }

    /// Returns the file concerned, if it is known.
    pub fn path(&self) -> Option<&Path> {
        self.0.path.as_deref()
    }

    /// Returns the byte offset of the failure, if it is known.
    pub fn offset(&self) -> Option<u64> {
        self.0.offset
    }

    /// Returns the operating system's error code (`errno`), if it reported the failure.
    pub fn raw_os_error(&self) -> Option<i32> {
        self.0.source.as_ref().and_then(io::Error::raw_os_error)
    }

    /// Whether a storage says so by [`LostBytes`].
    pub(crate) fn is_of_lost_bytes(&self) -> bool {
        let inner = self.0.source.as_ref().and_then(io::Error::get_ref);
        inner.is_some_and(|inner| inner.is::<LostBytes>())
    }
}

/// Within the error of a [`Storage`](crate::Storage): it cannot read these bytes, but neither the
/// connection nor the program has failed, so that others may be readable. The system says so by
/// `EIO`.
#[derive(Debug)]
pub struct LostBytes(
    /// The error that the storage has.
    pub Box<dyn StdError + Send + Sync>,
);

/// Within the error of a [`Storage`](crate::Storage): data that it had accepted before is lost. The
/// system could not write it back, which it tells once, to any later write or flush, and not where.
#[derive(Debug)]
pub struct LostWriteback(
    /// The system's number of the reason.
    pub i32,
);

impl LostWriteback {
    pub(crate) fn error(code: i32) -> io::Error {
        io::Error::new(io::Error::from_raw_os_error(code).kind(), Self(code))
    }
}

impl fmt::Display for LostWriteback {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let reason = system_words(&io::Error::from_raw_os_error(self.0));
        write!(f, "data written before, the system does not tell where, is lost: {reason}")
    }
}

impl StdError for LostWriteback {}

impl fmt::Display for LostBytes {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        self.0.fmt(f)
    }
}

impl StdError for LostBytes {}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let mut f = Escaping(f);
        write!(f, "cannot {}", self.0.operation)?;
        match &self.0.path {
            Some(path) => write!(f, " '{}'", path.display())?,
            None => f.write_str(" the image")?,
        }
        if let Some(offset) = self.0.offset {
            write!(f, " at offset {offset}")?;
        }
        f.write_str(": ")?;
        fmt::Display::fmt(&Cause(self), f.0)
    }
}

/// The cause and the remedy.
struct Cause<'a>(&'a Error);

impl fmt::Display for Cause<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let inner = &self.0.0;
        Escaping(f).write_str(&inner.detail)?;
        match inner.hint {
            Some(Hint::ByPolicy) => f.write_str("; change the policy to allow it"),
            _ => Ok(()),
        }
    }
}

impl fmt::Debug for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:?} ({self})", self.0.kind)
    }
}

impl StdError for Error {
    // `detail` contains the operating system's message already. With a source, reporters that print
    // all sources would repeat it.
    fn source(&self) -> Option<&(dyn StdError + 'static)> {
        None
    }
}

/// Whether this error means that the file system or device lacks the operation.
pub(crate) fn is_not_supported(error: &io::Error) -> bool {
    matches!(error.raw_os_error(), Some(libc::EOPNOTSUPP | libc::ENOSYS | libc::ENODEV))
        || error.kind() == io::ErrorKind::Unsupported
}

fn kind_of(error: &io::Error) -> ErrorKind {
    match error.raw_os_error() {
        Some(libc::ENOSPC | libc::EDQUOT | libc::EFBIG) => return ErrorKind::NoSpace,
        Some(libc::EROFS) => return ErrorKind::ReadOnly,
        _ => {}
    }
    match error.kind() {
        io::ErrorKind::NotFound => ErrorKind::NotFound,
        io::ErrorKind::PermissionDenied => ErrorKind::PermissionDenied,
        io::ErrorKind::StorageFull => ErrorKind::NoSpace,
        io::ErrorKind::AlreadyExists => ErrorKind::AlreadyExists,
        io::ErrorKind::Unsupported => ErrorKind::Unsupported,
        _ => ErrorKind::Io,
    }
}

fn detail_of(error: &io::Error) -> String {
    match error.kind() {
        io::ErrorKind::NotFound => "there is no such file; check the path".into(),
        io::ErrorKind::PermissionDenied => {
            "permission denied; check the rights of the file and of its directory".into()
        }
        io::ErrorKind::UnexpectedEof => {
            "the file ends before this point; has it been truncated while it was open?".into()
        }
        _ if matches!(error.raw_os_error(), Some(libc::EMFILE)) => {
            "this process has too many files open; raise its limit ('ulimit -n')".into()
        }
        io::ErrorKind::StorageFull => "no space is left on the device; free some".into(),
        io::ErrorKind::FileTooLarge => {
            "the file would become larger than the limit of this process (ulimit -f) or of the file \
             system allows"
                .into()
        }
        _ => system_words(error),
    }
}

/// The system's words for an error, without the number that the standard library puts after them.
pub(crate) fn system_words(error: &io::Error) -> String {
    let text = error.to_string();
    let number = error.raw_os_error().map(|code| format!(" (os error {code})"));
    match number.and_then(|number| text.strip_suffix(&number)) {
        Some(words) => words.to_owned(),
        None => text,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_that_an_image_holds_control_no_terminal() {
        let detail = "the image refers to 'a\x1b[2J\r\n\u{202e}\u{200f}ü\\'";
        let error = Error::new(ErrorKind::PolicyDenied, "open", detail).with_path("b\x07");
        let expected =
            r"cannot open 'b\u{7}': the image refers to 'a\u{1b}[2J\r\n\u{202e}\u{200f}ü\'";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn encryption_that_was_left_out_of_the_program_is_not_called_future_work() {
        let error = Error::unsupported_format(Format::Luks, false).to_string();
        assert!(error.contains("this program was built without encryption"), "{error}");
        assert!(error.contains("cryptsetup") && !error.contains("yet"), "{error}");
    }

    #[test]
    fn an_error_names_operation_file_place_and_reason() {
        let error = Error::from_io("write to", io::Error::from_raw_os_error(libc::ENOSPC))
            .with_path("/disk.img")
            .at(4096);
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        assert_eq!(
            error.to_string(),
            "cannot write to '/disk.img' at offset 4096: no space is left on the device; free some"
        );
    }

    #[test]
    fn an_error_of_lost_data_names_no_place_because_the_system_tells_none() {
        let error = Error::from_io("write to", LostWriteback::error(libc::ENOSPC));
        let error = error.with_path("/disk.img").at(4096);
        assert_eq!((error.kind(), error.offset()), (ErrorKind::NoSpace, None));
        assert_eq!(error.raw_os_error(), Some(libc::ENOSPC));
        let expected = "cannot write to '/disk.img': data written before, the system does not tell \
                        where, is lost: No space left on device";
        assert_eq!(error.to_string(), expected);
    }

    #[test]
    fn errors_of_the_system_are_words_without_a_number() {
        let error = Error::from_io("read from", io::Error::from_raw_os_error(libc::EIO));
        assert!(error.to_string().ends_with("Input/output error"), "{error}");
    }

    #[test]
    fn a_limit_on_the_size_of_files_is_a_lack_of_space() {
        let error = Error::from_io("write to", io::Error::from_raw_os_error(libc::EFBIG));
        assert_eq!(error.kind(), ErrorKind::NoSpace);
        assert!(error.to_string().contains("ulimit -f"), "{error}");
    }

    #[test]
    fn the_innermost_path_and_offset_are_kept() {
        let error = Error::new(ErrorKind::Corrupt, "read", "bad entry")
            .with_path("inner")
            .at(1)
            .with_path("outer")
            .at(2);
        assert_eq!(error.to_string(), "cannot read 'inner' at offset 1: bad entry");
    }
}
