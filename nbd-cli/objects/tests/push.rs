//! Images that are put on a store that fails in every way.
#![allow(clippy::unwrap_used)] // A test may fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::Duration;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Durability, HostOffset, Storage as _};
use nbd_objects::testing::{Fault, TestStore};
use nbd_objects::{
    Environment, PushOptions, PushSource, Pushed, StoreError, StoreSettings, Timeouts, push,
};

const KEY: &str = "/bucket/disk.img";
const PART: usize = 16 << 20;

struct Bench {
    store: TestStore,
    directory: tempfile::TempDir,
    data: Vec<u8>,
}

impl Bench {
    fn new(length: usize) -> Self {
        let data = (0..length).map(|index| (index / 3 + index / PART * 5) as u8).collect();
        let directory = tempfile::tempdir().unwrap();
        Self { store: TestStore::start().unwrap(), directory, data }
    }

    fn push(&self, change: impl FnOnce(&mut PushOptions)) -> Result<Pushed, StoreError> {
        self.push_with(change, || {})
    }

    /// Pushes; `meanwhile` is called when everything but the last request was sent.
    fn push_with(
        &self,
        change: impl FnOnce(&mut PushOptions),
        meanwhile: impl Fn() + Send + Sync + 'static,
    ) -> Result<Pushed, StoreError> {
        let storage = MemoryStorage::new(self.data.len() as u64);
        storage.write_at(HostOffset::new(0), &self.data, Durability::Cached).unwrap();
        let source = PushSource {
            storage: Arc::new(storage),
            name: "/disk.img".to_owned(),
            is_unchanged: Arc::new(move || {
                meanwhile();
                true
            }),
        };
        let mut options =
            PushOptions { records: Some(self.directory.path().to_owned()), ..Default::default() };
        change(&mut options);
        self.push_source(&source, &options)
    }

    fn push_source(
        &self,
        source: &PushSource,
        options: &PushOptions,
    ) -> Result<Pushed, StoreError> {
        let keys = [("AWS_ACCESS_KEY_ID", "a"), ("AWS_SECRET_ACCESS_KEY", "b")];
        let keys = keys.map(|(name, value)| (name.to_owned(), value.to_owned()));
        let settings = StoreSettings {
            endpoint: Some(self.store.endpoint()),
            environment: Environment::new(keys),
            timeouts: Timeouts {
                idle: Duration::from_millis(700),
                total: Duration::from_secs(3),
                ..Timeouts::default()
            },
            ..StoreSettings::default()
        };
        let url = "s3://bucket/disk.img".parse().unwrap();
        push(source, &url, &settings, options, |_| {}, &|| false)
    }

    fn is_there(&self) -> bool {
        self.store.object(KEY).is_some_and(|object| object == self.data)
    }
}

#[test]
fn object_is_what_the_image_was_and_leaves_no_upload_and_no_record() {
    let bench = Bench::new(2 * PART + 12345);
    let pushed = bench.push(|options| options.verify = true).unwrap();
    assert_eq!(pushed, Pushed { size: bench.data.len() as u64, resumed: 0 });
    assert!(bench.is_there());
    assert_eq!(bench.store.open_uploads(), 0);
    assert_eq!(std::fs::read_dir(bench.directory.path()).unwrap().count(), 0);
    let error = bench.push(|_| {}).unwrap_err().to_string();
    assert!(error.contains("exists already; add --replace"), "{error}");
    bench.push(|options| options.replace = true).unwrap();
}

#[test]
fn push_that_failed_goes_on_and_sends_only_what_is_missing() {
    let bench = Bench::new(3 * PART);
    bench.store.fail(|seen| match seen.query.contains("partNumber=3") {
        true => Fault::Status(403),
        false => Fault::None,
    });
    let error = bench.push(|_| {}).unwrap_err().to_string();
    assert!(error.contains("403") && bench.store.object(KEY).is_none(), "{error}");
    bench.store.fail(|_| Fault::None);
    bench.store.take_seen();
    let pushed = bench.push(|_| {}).unwrap();
    let seen = bench.store.take_seen();
    let sent = seen.iter().filter(|seen| seen.query.contains("partNumber")).count();
    assert_eq!((sent, pushed.resumed), (1, 2 * PART as u64), "{seen:?}");
    assert!(bench.is_there());
}

#[test]
fn changed_part_is_sent_again_when_a_push_goes_on() {
    let mut bench = Bench::new(2 * PART);
    bench.store.fail(|seen| match seen.method == "POST" && seen.query.contains("uploadId") {
        true => Fault::Status(403),
        false => Fault::None,
    });
    bench.push(|_| {}).unwrap_err();
    bench.store.fail(|_| Fault::None);
    bench.data[5] ^= 0xff;
    let pushed = bench.push(|_| {}).unwrap();
    assert_eq!(pushed.resumed, PART as u64);
    assert!(bench.is_there());
}

#[test]
fn lost_replies_and_passing_failures_of_every_request_are_not_noticed() {
    let requests = {
        let bench = Bench::new(PART + 1);
        bench.push(|_| {}).unwrap();
        bench.store.take_seen().len()
    };
    for fault in [Fault::ReplyLost, Fault::Status(503), Fault::Status(409)] {
        for failing in 0..requests {
            let bench = Bench::new(PART + 1);
            let count = AtomicUsize::new(0);
            bench.store.fail(move |_| match count.fetch_add(1, Ordering::Relaxed) == failing {
                true => fault,
                false => Fault::None,
            });
            let pushed = bench.push(|_| {});
            if pushed.is_err() {
                assert_eq!(fault, Fault::ReplyLost, "{pushed:?}");
                // A reply may be lost in a way that cannot be told from a failure: then again.
                bench.push(|options| options.replace = true).unwrap();
            }
            assert!(bench.is_there(), "{fault:?} of request {failing}");
        }
    }
}

#[test]
fn upload_that_the_store_has_forgotten_is_begun_anew() {
    let bench = Bench::new(PART + 1);
    bench.store.fail(|seen| match seen.query.contains("partNumber=2") {
        true => Fault::Status(403),
        false => Fault::None,
    });
    bench.push(|_| {}).unwrap_err();
    bench.store.forget_uploads();
    bench.store.fail(|_| Fault::None);
    bench.push(|_| {}).unwrap();
    assert!(bench.is_there());
}

#[test]
fn two_pushes_of_one_image_do_not_share_an_upload() {
    let bench = Arc::new(Bench::new(PART + 1));
    let (other, seen) = (Arc::clone(&bench), Arc::new(std::sync::Mutex::new(None)));
    let result = Arc::clone(&seen);
    // A process of its own would say the same: the lock is that of an open file.
    let meanwhile = move || *result.lock().unwrap() = Some(other.push(|_| {}));
    bench.push_with(|_| {}, meanwhile).unwrap();
    let error = seen.lock().unwrap().take().unwrap().unwrap_err().to_string();
    assert!(error.contains("by another process"), "{error}");
    assert!(bench.is_there());
    assert_eq!(bench.store.open_uploads(), 0);
    assert_eq!(std::fs::read_dir(bench.directory.path()).unwrap().count(), 0);
}

#[test]
fn object_that_another_program_writes_meanwhile_stays() {
    for replaces in [false, true] {
        for is_late in [false, true] {
            let bench = Arc::new(Bench::new(PART + 1));
            if replaces {
                bench.store.put(KEY, "old");
            }
            let write = {
                let bench = Arc::clone(&bench);
                move || bench.store.put(KEY, "of another program")
            };
            let other = write.clone();
            if is_late {
                // When the store gets the last request.
                bench.store.fail(move |seen| {
                    if seen.method == "POST" && seen.query.contains("uploadId") {
                        write();
                    }
                    Fault::None
                });
            }
            let meanwhile = move || {
                if !is_late {
                    other();
                }
            };
            let pushed = bench.push_with(|options| options.replace = replaces, meanwhile);
            let error = pushed.unwrap_err().to_string();
            assert!(error.contains("another program wrote s3://bucket/disk.img"), "{error}");
            assert_eq!(bench.store.object(KEY).unwrap(), "of another program");
            // What was sent is used when it is to be replaced all the same.
            bench.store.fail(|_| Fault::None);
            let pushed = bench.push(|options| options.replace = true).unwrap();
            assert_eq!(pushed.resumed, bench.data.len() as u64);
            assert!(bench.is_there());
        }
    }
}

#[test]
fn image_that_changes_meanwhile_is_not_completed() {
    let bench = Bench::new(PART);
    let source = PushSource {
        storage: Arc::new(MemoryStorage::new(PART as u64)),
        name: "/disk.img".to_owned(),
        is_unchanged: Arc::new(|| false),
    };
    let error = bench.push_source(&source, &PushOptions::default()).unwrap_err().to_string();
    assert!(error.contains("was changed while it was read"), "{error}");
    assert!(bench.store.object(KEY).is_none());
}
