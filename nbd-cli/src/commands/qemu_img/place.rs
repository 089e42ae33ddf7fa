//! The images that operands name.

use std::ffi::OsStr;
use std::path::Path;

use imgfmt::{
    Access, CacheMode, FileNames, Format, Image, ImageInfo, Locking, OpenOptions, OpenPolicy,
};
use nbd_jobs::JobError;
use nbd_jobs::image_location::ImageLocation;
use nbd_jobs::image_report::{DescribedImage, describe_chain};
use nbd_jobs::qemu_name::check_protocol;
use nbd_jobs::remote::{Remotes, UnknownExport, allow_exports};
use nbd_jobs::text::printable;
use nbd_proto::limits::DEFAULT_PORT;
use nbd_proto::uri::Transport;

use super::arguments::Arguments;
use super::known::Opt;
use super::refusal::{Refusal, complain};
use crate::connect::ServerArgs;

/// An image that a command opens.
#[derive(Debug)]
pub(super) struct Place {
    pub(super) location: ImageLocation,
    pub(super) options: OpenOptions,
    pub(super) remotes: Remotes,
    /// Whether the command has the option that opens it while another program writes to it.
    pub(super) can_share: bool,
}

impl Place {
    /// Reads an operand; `format` and `cache` are the options that apply to it.
    ///
    /// # Errors
    ///
    /// If one of them is malformed.
    pub(super) fn new(
        arguments: &Arguments,
        operand: &OsStr,
        format: Opt,
        cache: Opt,
    ) -> Result<Self, Refusal> {
        Self::to_describe(arguments, operand, format, cache)?.with_keys(arguments)
    }

    /// Adds the keys that its name gives.
    ///
    /// # Errors
    ///
    /// If there is no such secret.
    pub(super) fn with_keys(mut self, arguments: &Arguments) -> Result<Self, Refusal> {
        for id in self.location.key_secrets() {
            let passphrase =
                arguments.secrets.passphrase(id).map_err(|why| self.not_opened(&why))?;
            self.options.passphrases.push(passphrase);
        }
        Ok(self)
    }

    /// For commands that change the image: they cannot do so while another program writes to it.
    pub(super) fn not_shared(mut self) -> Self {
        self.can_share = false;
        self
    }

    /// As [`new`](Self::new), for commands that need no key.
    ///
    /// # Errors
    ///
    /// If one of them is malformed.
    pub(super) fn to_describe(
        arguments: &Arguments,
        operand: &OsStr,
        format: Opt,
        cache: Opt,
    ) -> Result<Self, Refusal> {
        let is_options = arguments.has(Opt::ImageOpts);
        if is_options && arguments.has(format) {
            return Err(Refusal::usage("--image-opts and --format are mutually exclusive"));
        }
        let mut place = Self::parse(arguments, operand, is_options)?;
        place.can_share = true;
        place.options.format = arguments.format(format)?;
        if let Some(mode) = arguments.text(cache)? {
            place.options.cache = parse_cache(&mode)?;
        }
        if arguments.has(Opt::Share) {
            place.options.locking = Locking::Shared;
        }
        Ok(place)
    }

    /// Reads a name, or the options of drivers.
    ///
    /// # Errors
    ///
    /// If it is malformed.
    pub(super) fn parse(
        arguments: &Arguments,
        operand: &OsStr,
        is_options: bool,
    ) -> Result<Self, Refusal> {
        let name = operand.to_string_lossy().into_owned();
        let location = match is_options {
            true => ImageLocation::from_options(&name),
            false => {
                check_protocol(operand).map_err(|why| could_not_open(&name, &why))?;
                ImageLocation::parse(operand)
            }
        };
        let mut location = location.map_err(|error| could_not_open_by(&name, &error))?;
        arguments.secrets.resolve(&mut location).map_err(|why| could_not_open(&name, &why))?;
        let remotes = remotes();
        let mut options = OpenOptions::new().policy(trusting(&remotes));
        options.names = FileNames::AsInQemu;
        Ok(Self { location, options, remotes, can_share: false })
    }

    /// Opens it to read it.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub(super) fn open(&self) -> Result<Image, Refusal> {
        self.open_with(&self.options)
    }

    /// Opens it to change it.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub(super) fn open_to_change(&self) -> Result<Image, Refusal> {
        self.refuse_to_share()?;
        let image = self.open_with(&self.options.clone().access(Access::ReadWrite))?;
        if image.format() == Format::Raw && self.settled()?.1.format.is_none() {
            complain(&format!(
                "warning: {} seems to be a raw disk, and no format was given: writes that would make \
                 it look like an image of another format are refused; give -f raw to allow them",
                self.location
            ));
        }
        Ok(image)
    }

    /// Refuses `-U` for an image that is changed: nothing would keep others from using it
    /// meanwhile.
    ///
    /// # Errors
    ///
    /// If it is given.
    pub(super) fn refuse_to_share(&self) -> Result<(), Refusal> {
        match self.options.locking {
            Locking::Shared => {
                Err(self.not_opened("force-share=on can only be used with read-only images"))
            }
            _ => Ok(()),
        }
    }

    /// Opens it with other options.
    ///
    /// # Errors
    ///
    /// If it cannot be opened.
    pub(super) fn open_with(&self, options: &OpenOptions) -> Result<Image, Refusal> {
        let image = self.location.open_or_name(options, &self.remotes, "-f raw");
        image.map_err(|error| self.failed(&error))
    }

    /// The image and all layers of its backing chain.
    ///
    /// # Errors
    ///
    /// If one of them cannot be read.
    pub(super) fn layers(&self) -> Result<Vec<DescribedImage>, Refusal> {
        let images = describe_chain(self.location.clone(), &self.options, &self.remotes);
        images.map_err(|error| self.failed(&error))
    }

    /// The image; what it names is not opened.
    ///
    /// # Errors
    ///
    /// If it cannot be read.
    pub(super) fn inspect(&self) -> Result<ImageInfo, Refusal> {
        let info = self.location.inspect(&self.options, &self.remotes);
        info.map_err(|error| self.failed(&error))
    }

    /// The error of an image that could not be opened, which names it.
    pub(super) fn failed(&self, error: &JobError) -> Refusal {
        let refusal = could_not_open_by(&self.location.name(), error);
        match error.could_be_shared() && self.can_share {
            true => refusal.with(", or add -U (--force-share) to read it anyway"),
            false => refusal,
        }
    }

    /// The error of an image that cannot be opened.
    pub(super) fn not_opened(&self, why: &str) -> Refusal {
        could_not_open(&self.location.name(), why)
    }

    /// The file, for commands that change it and work on files only, and how it is opened.
    ///
    /// # Errors
    ///
    /// If it is an export of a server, or the options contradict its name.
    pub(super) fn file(&self) -> Result<(&Path, OpenOptions), Refusal> {
        self.refuse_to_share()?;
        match self.settled()? {
            (ImageLocation::File(path), options) if options.part.is_whole() => Ok((path, options)),
            (ImageLocation::File(_), _) => Err(self.not_opened(
                "its options select a part of the file (offset, size), and this is done for whole \
                 files only",
            )),
            (other, _) => {
                Err(Refusal::new(format!("{other} is not a file; this is done where its file is")))
            }
        }
    }

    /// The file or export, and how it is opened.
    ///
    /// # Errors
    ///
    /// If the options contradict its name.
    pub(super) fn settled(&self) -> Result<(&ImageLocation, OpenOptions), Refusal> {
        Ok(self.location.settled(&self.options, &self.remotes)?)
    }
}

/// Connects to servers. As in QEMU, the format of an export is detected unless it is given.
pub(super) fn remotes() -> Remotes {
    ServerArgs::default().remotes().exports(UnknownExport::Detected).keep_connections()
}

/// As in QEMU, the names in images are followed, and the formats of backing files detected.
pub(super) fn trusting(remotes: &Remotes) -> OpenPolicy {
    allow_exports(OpenPolicy::any_file().allow_format_probe(), remotes)
}

/// The name of a file or export, as QEMU writes it: with the port, and no more slashes than needed;
/// with a directory if it would be taken for the name of a driver without.
pub(super) fn shown_name(location: &ImageLocation) -> String {
    let name = location.name();
    let first = name.split('/').next().unwrap_or_default();
    if matches!(location, ImageLocation::File(_)) && first.contains(':') {
        return format!("./{name}");
    }
    if let (Some(uri), Some(rest)) = (location.uri(), name.strip_prefix("nbd://"))
        && let Transport::Tcp { port, .. } = uri.transport
        && let Some((host, export)) = rest.split_once('/')
    {
        // Any other port is in the name.
        let port = if port == DEFAULT_PORT { format!(":{port}") } else { String::new() };
        let slash = if export.is_empty() { "" } else { "/" };
        return format!("nbd://{host}{port}{slash}{export}");
    }
    name.replace("nbd+unix:///?", "nbd+unix://?")
}

fn could_not_open(name: &str, why: &str) -> Refusal {
    Refusal::new(format!("Could not open '{}': {why}", printable(name)))
}

/// The same for an error that may be about that name or about another one.
fn could_not_open_by(name: &str, error: &JobError) -> Refusal {
    match error.cause_of_opening(name) {
        Some(cause) => could_not_open(name, cause),
        None => could_not_open(name, &error.to_string()),
    }
}

/// Parses the name of a cache mode.
///
/// # Errors
///
/// If there is none of that name.
pub(super) fn parse_cache(name: &str) -> Result<CacheMode, Refusal> {
    match name {
        "off" => Ok(CacheMode::None),
        _ => CacheMode::from_name(name)
            .ok_or_else(|| Refusal::new(format!("Invalid cache option: {}", printable(name)))),
    }
}

#[cfg(test)]
mod tests {
    use nbd_jobs::JobErrorKind;

    use super::*;

    #[test]
    fn what_could_not_be_opened_is_said_once() {
        let missing = |name| {
            let error = imgfmt::Error::new(imgfmt::ErrorKind::NotFound, "open", "No such file");
            JobError::image(JobErrorKind::Source, error.with_path(name))
        };
        for (error, expected) in [
            (missing("a"), "Could not open 'a': No such file"),
            (missing("b"), "Could not open 'a': cannot open 'b': No such file"),
            (JobError::source("cannot open 'a': x"), "Could not open 'a': cannot open 'a': x"),
        ] {
            assert_eq!(could_not_open_by("a", &error).message.as_deref(), Some(expected));
        }
        let options = "driver=nbd,path=/s,x-dirty-bitmap=b";
        let location = ImageLocation::from_options(options).expect("options");
        let (options, remotes) = (OpenOptions::new(), Remotes::default());
        let place = Place { location, options, remotes, can_share: false };
        let refused = place.open().map(drop).expect_err("only 'map' knows this option");
        let refused = refused.message.expect("a message");
        assert!(refused.starts_with("Could not open 'nbd+unix:///?socket=/s': "), "{refused}");
        assert!(!refused.contains("cannot open"), "{refused}");
    }

    #[test]
    fn exports_are_named_as_by_qemu() {
        for (given, expected) in [
            ("nbd://localhost", "nbd://localhost:10809"),
            ("nbd:localhost:10809:exportname=a", "nbd://localhost:10809/a"),
            ("nbd://localhost:10810/a", "nbd://localhost:10810/a"),
            ("nbd://localhost:10810", "nbd://localhost:10810"),
            ("nbd://[::1]:10810/", "nbd://[::1]:10810"),
            ("nbd://[::1]/", "nbd://[::1]:10809"),
            ("nbd:unix:/s", "nbd+unix://?socket=/s"),
            ("nbd+unix:///a?socket=/s", "nbd+unix:///a?socket=/s"),
            ("json:{'driver':'nbd','path':'/s'}", "nbd+unix://?socket=/s"),
            ("disk.img", "disk.img"),
            ("file:a:disk.img", "./a:disk.img"),
            ("file:a/b:disk.img", "a/b:disk.img"),
        ] {
            let location = ImageLocation::parse(OsStr::new(given)).expect("a name");
            assert_eq!(shown_name(&location), expected, "{given}");
        }
    }
}
