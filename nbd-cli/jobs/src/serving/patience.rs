//! Waits briefly for images that another process is about to release.

use std::time::{Duration, Instant};

use super::error::OpenError;

/// Default time to wait for an image in use: a server that was told to end completes its requests
/// first, and its successor is often started right away.
const PATIENCE: Duration = Duration::from_secs(1);
const PAUSE: Duration = Duration::from_millis(10);

/// Opens an image, and retries for `patience`, by default a second, if another process uses it.
///
/// # Errors
///
/// Those of `open`.
pub(super) fn when_free<T>(
    patience: Option<Duration>,
    mut open: impl FnMut() -> Result<T, OpenError>,
) -> Result<T, OpenError> {
    let patience = patience.unwrap_or(PATIENCE);
    let start = Instant::now();
    loop {
        match open() {
            Err(error) if error.is_busy() && start.elapsed() < patience => {
                tracing::debug!(%error, "waiting for an image");
                std::thread::sleep(PAUSE);
            }
            outcome => return outcome,
        }
    }
}

#[cfg(test)]
mod tests {
    use imgfmt::{CreateOptions, Format, Image, OpenOptions};

    use super::*;

    #[test]
    fn an_image_in_use_is_waited_for_as_long_as_was_asked() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("disk.qcow2");
        let options = CreateOptions::new(Format::Qcow2, 1 << 20);
        Image::create(&path, &options).expect("an image");
        let writable = OpenOptions::new().access(imgfmt::Access::ReadWrite);
        let mut holder = Some(Image::open(&path, &writable).expect("an image"));
        let refused = when_free(Some(Duration::ZERO), || Ok(Image::open(&path, &writable)?));
        assert!(refused.expect_err("it is in use").is_busy());
        // Longer than the default, and the holder ends after the first attempt.
        let mut attempts = 0;
        let opened = when_free(Some(Duration::from_secs(600)), || {
            attempts += 1;
            let outcome = Image::open(&path, &writable);
            holder = None;
            Ok(outcome?)
        });
        opened.expect("the image is free");
        assert!(attempts >= 2 && holder.is_none());
    }
}
