//! Sends the parts of an image, and completes the object.

use std::sync::atomic::{AtomicBool, Ordering};

use bytes::Bytes;
use futures_util::StreamExt as _;
use imgfmt::HostOffset;
use object_store::multipart::{MultipartStore as _, PartId};
use object_store::{GetOptions, GetRange, ObjectStore as _, PutPayload};
use openssl::hash::{MessageDigest, hash};
use tokio::sync::mpsc;

use super::options::{PushOptions, PushSource, Pushed};
use super::record::{Part, Record};
use super::target::{Found, Target};
use crate::crypto::{from_hex, hex};
use crate::error::{Result, StoreError, StoreErrorKind};
use crate::shown::shown;

/// Memory for the parts in flight, in bytes.
const IN_FLIGHT: u64 = 64 << 20;

/// A push in progress.
pub(super) struct Job {
    pub(super) target: Target,
    pub(super) source: PushSource,
    pub(super) options: PushOptions,
    pub(super) size: u64,
    pub(super) part_len: u64,
    pub(super) done: mpsc::UnboundedSender<u64>,
}

impl Job {
    pub(super) async fn run(self, mut record: Record) -> Result<Pushed> {
        let before = self.look().await?;
        let before = before.as_ref();
        let is_resumed = record.upload().is_some();
        let resumed = match self.send(&mut record, before).await {
            // The store has forgotten the upload: rules of a bucket delete old ones.
            Err(Failed::NoUpload) if is_resumed => {
                record.forget_upload();
                self.send(&mut record, before).await
            }
            other => other,
        };
        let resumed = resumed.map_err(|failed| match failed {
            Failed::NoUpload => {
                let why =
                    format!("cannot write {}: the store has lost the upload", self.target.name);
                StoreError::new(StoreErrorKind::Unavailable, why)
            }
            Failed::Other(error) => error,
        })?;
        if self.options.verify {
            self.verify(&record.parts()).await?;
        }
        record.forget();
        Ok(Pushed { size: self.size, resumed })
    }

    /// Looks what is replaced.
    async fn look(&self) -> Result<Option<Found>> {
        let target = &self.target;
        let found = target.found().await?;
        if found.is_some() && !self.options.replace {
            let why = format!("{} exists already; add --replace to replace it", target.name);
            return Err(StoreError::new(StoreErrorKind::Exists, why));
        }
        match &found {
            None => target.completion.expect(None),
            Some(Found { etag: Some(etag), .. }) => target.completion.expect(Some(etag)),
            Some(_) => {}
        }
        Ok(found)
    }

    /// Sends the parts that are not there, and completes the object.
    async fn send(&self, record: &mut Record, before: Option<&Found>) -> Result<u64, Failed> {
        let target = &self.target;
        let upload = match record.upload() {
            Some(upload) => upload.to_owned(),
            None => self.begin(record).await?,
        };
        target.end_orphans(record, &upload).await;
        let count = self.size.div_ceil(self.part_len);
        let at_once = usize::try_from((IN_FLIGHT / self.part_len).max(1)).unwrap_or(1);
        let known: Vec<_> = (0..count).map(|index| record.part(index)).collect();
        let is_failed = &AtomicBool::new(false);
        let upload = &*upload;
        let sent = (0..count).zip(known).map(async |(index, known)| {
            match is_failed.load(Ordering::Relaxed) {
                // The error is the one of an earlier part.
                true => Err(Failed::NoUpload),
                false => self.part(upload, index, known).await,
            }
        });
        let mut sent = futures_util::stream::iter(sent).buffer_unordered(at_once);
        let (mut done, mut resumed, mut failure) = (0, 0, None);
        while let Some(part) = sent.next().await {
            let (index, part, is_known) = match part {
                Ok(part) => part,
                // Those that are on their way need not be sent again.
                Err(failed) => {
                    is_failed.store(true, Ordering::Relaxed);
                    failure.get_or_insert(failed);
                    continue;
                }
            };
            let length = self.range(index).1;
            done += length;
            resumed += if is_known { length } else { 0 };
            record.add(index, part);
            let _ = self.done.send(done);
        }
        drop(sent);
        match failure {
            Some(failed) => Err(failed),
            None => self.complete(upload, &record.parts(), before).await.map(|()| resumed),
        }
    }

    /// Begins an upload.
    async fn begin(&self, record: &mut Record) -> Result<String> {
        let target = &self.target;
        let intent = match self.options.records {
            Some(_) => target.intent().await,
            None => None,
        };
        let is_intended = intent.is_some();
        if let Some(intent) = intent {
            record.intend(intent);
        }
        let upload = target.store.create_multipart(&target.path).await;
        let upload = upload.map_err(|error| target.failed("write", &error))?;
        record.begin(&upload, is_intended);
        Ok(upload)
    }

    /// The start and the length of a part, in bytes.
    fn range(&self, index: u64) -> (u64, u64) {
        let start = index * self.part_len;
        (start, self.part_len.min(self.size.saturating_sub(start)))
    }

    async fn read(&self, index: u64) -> Result<Bytes> {
        let (start, length) = self.range(index);
        let source = self.source.clone();
        let reading = tokio::task::spawn_blocking(move || {
            let mut data = vec![0; usize::try_from(length).unwrap_or(usize::MAX)];
            match source.storage.read_exact_at(HostOffset::new(start), &mut data) {
                Ok(()) => Ok(Bytes::from(data)),
                Err(error) => Err(unreadable(&source, &error)),
            }
        });
        reading.await.unwrap_or_else(|_| {
            Err(StoreError::new(StoreErrorKind::Local, "reading the image was given up"))
        })
    }

    /// Sends a part, unless the same bytes are there.
    async fn part(
        &self,
        upload: &str,
        index: u64,
        known: Option<Part>,
    ) -> Result<(u64, Part, bool), Failed> {
        let data = self.read(index).await?;
        let sum = sha256(&data);
        if let Some(known) = known.filter(|known| known.sha256 == sum) {
            return Ok((index, known, true));
        }
        let target = &self.target;
        let md5 = hex(&hash(MessageDigest::md5(), &data).map_or(Vec::new(), |md5| md5.to_vec()));
        let number = usize::try_from(index).unwrap_or(usize::MAX);
        let upload = upload.to_owned();
        let part = target.store.put_part(&target.path, &upload, number, PutPayload::from(data));
        match part.await {
            Ok(PartId { content_id: etag }) => Ok((index, Part { etag, sha256: sum, md5 }, false)),
            Err(object_store::Error::NotFound { .. }) => Err(Failed::NoUpload),
            Err(error) => Err(target.failed("write", &error).into()),
        }
    }

    async fn complete(
        &self,
        upload: &str,
        parts: &[Part],
        before: Option<&Found>,
    ) -> Result<(), Failed> {
        if !(self.source.is_unchanged)() {
            let name = &self.source.name;
            let why = format!("'{name}' was changed while it was read; push it again");
            return Err(StoreError::new(StoreErrorKind::Local, why).into());
        }
        let target = &self.target;
        loop {
            // Not all stores look themselves.
            if target.found().await?.as_ref() != before {
                let is_own = self.is_own(parts).await.unwrap_or(false);
                return if is_own { Ok(()) } else { Err(target.taken().into()) };
            }
            let ids = parts.iter().map(|part| PartId { content_id: part.etag.clone() }).collect();
            let upload = upload.to_owned();
            match target.store.complete_multipart(&target.path, &upload, ids).await {
                Ok(_) => return self.check(parts).await.map_err(Failed::Other),
                // An earlier request may have completed it, with a reply that was lost.
                Err(object_store::Error::NotFound { .. }) => {
                    return match self.is_own(parts).await {
                        Ok(true) => Ok(()),
                        _ => Err(Failed::NoUpload),
                    };
                }
                // At most once: the next request has no condition.
                Err(error) if target.completion.is_unusable(&error) => {
                    target.completion.clear();
                    tracing::info!(
                        "the store does not complete {} under a condition; without one, only the \
                         push looks whether another program writes it meanwhile",
                        target.name
                    );
                }
                Err(object_store::Error::Precondition { .. }) => {
                    return if self.is_own(parts).await? {
                        Ok(())
                    } else if target.found().await?.as_ref() == before {
                        Err(target.refused().into())
                    } else {
                        Err(target.taken().into())
                    };
                }
                Err(error) => return Err(target.failed("write", &error).into()),
            }
        }
    }

    /// Returns whether the object is what was sent. Reads it, if its ETag does not tell.
    async fn is_own(&self, parts: &[Part]) -> Result<bool> {
        let Some(found) = self.target.found().await? else { return Ok(false) };
        match multipart_tag(parts) {
            _ if found.size != self.size => Ok(false),
            Some(expected) => Ok(found.is_tagged(&expected)),
            None => match self.verify(parts).await {
                Err(error) if error.kind() == StoreErrorKind::Unsuitable => Ok(false),
                verified => verified.map(|()| true),
            },
        }
    }

    /// Compares length and ETag of the object with what was sent.
    async fn check(&self, parts: &[Part]) -> Result<()> {
        let target = &self.target;
        let expected = multipart_tag(parts);
        let is_it = target.found().await?.is_some_and(|found| {
            let is_tagged = |expected: &String| found.is_tagged(expected);
            found.size == self.size && expected.as_ref().is_none_or(is_tagged)
        });
        if is_it {
            return Ok(());
        }
        let why = format!("{} is not what was sent; push it again with --replace", target.name);
        Err(StoreError::new(StoreErrorKind::Unsuitable, why))
    }

    /// Reads the object, and compares it.
    async fn verify(&self, parts: &[Part]) -> Result<()> {
        let target = &self.target;
        for (index, part) in (0..).zip(parts) {
            let (start, length) = self.range(index);
            let range = Some(GetRange::Bounded(start..start + length));
            let options = GetOptions { range, ..GetOptions::default() };
            let reply = target.store.get_opts(&target.path, options).await;
            let reply = reply.map_err(|error| target.failed("verify", &error))?;
            let data = reply.bytes().await.map_err(|error| target.failed("verify", &error))?;
            if sha256(&data) != part.sha256 {
                let name = &target.name;
                let why = format!("{name} differs from what was sent, from byte {start} on");
                return Err(StoreError::new(StoreErrorKind::Unsuitable, why));
            }
        }
        Ok(())
    }
}

pub(super) fn unreadable(source: &PushSource, error: &std::io::Error) -> StoreError {
    let why = shown(&error.to_string());
    StoreError::new(StoreErrorKind::Local, format!("cannot read '{}': {why}", source.name))
}

/// The ETag of an object of several parts, if the store makes those of parts from their MD5.
fn multipart_tag(parts: &[Part]) -> Option<String> {
    let is_md5 = |part: &Part| part.etag.trim_matches('"').eq_ignore_ascii_case(&part.md5);
    let all = parts.iter().all(is_md5);
    let mut sums = Vec::new();
    for part in parts.iter().filter(|_| all) {
        sums.extend(from_hex(&part.md5)?);
    }
    let sum = hash(MessageDigest::md5(), &sums).ok()?;
    all.then(|| format!("{}-{}", hex(&sum), parts.len()))
}

fn sha256(data: &[u8]) -> String {
    hex(&openssl::sha::sha256(data))
}

/// The failure of an upload.
enum Failed {
    /// The store does not know it.
    NoUpload,
    Other(StoreError),
}

impl From<StoreError> for Failed {
    fn from(error: StoreError) -> Self {
        Self::Other(error)
    }
}
