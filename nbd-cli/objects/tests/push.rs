//! Images that are put on a store that fails in every way.
#![allow(clippy::unwrap_used)] // A test may fail.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use imgfmt::storage::MemoryStorage;
use imgfmt::{Durability, HostOffset, Storage as _};
use nbd_objects::testing::{Fault, Seen, TestStore};
use nbd_objects::{
    Environment, PushOptions, PushSource, Pushed, StoreError, StoreSettings, Timeouts, push,
};

const KEY: &str = "/bucket/disk.img";
const PART: usize = 16 << 20;

struct Bench {
    store: TestStore,
    directory: tempfile::TempDir,
    data: Vec<u8>,
    is_stopped: Arc<AtomicBool>,
    /// How long a request may take.
    idle: Duration,
}

impl Bench {
    fn new(length: usize) -> Self {
        let data = (0..length).map(|index| (index / 3 + index / PART * 5) as u8).collect();
        let directory = tempfile::tempdir().unwrap();
        let (store, idle) = (TestStore::start().unwrap(), Duration::from_millis(700));
        Self { store, directory, data, is_stopped: Arc::default(), idle }
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
            timeouts: Timeouts { idle: self.idle, total: self.idle * 4, ..Timeouts::default() },
            ..StoreSettings::default()
        };
        let url = "s3://bucket/disk.img".parse().unwrap();
        push(source, &url, &settings, options, |_| {}, &|| self.is_stopped.load(Ordering::Relaxed))
    }

    /// Stops a push at a request, as if it were killed there: after its effect.
    fn stop_at(&self, point: usize) {
        let (count, is_stopped) = (AtomicUsize::new(0), Arc::clone(&self.is_stopped));
        self.store.fail(move |_| match count.fetch_add(1, Ordering::Relaxed) == point {
            true => {
                is_stopped.store(true, Ordering::Relaxed);
                Fault::Hang
            }
            false => Fault::None,
        });
    }

    fn go_on(&self) {
        self.is_stopped.store(false, Ordering::Relaxed);
        self.store.fail(|_| Fault::None);
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
fn push_that_is_stopped_at_any_request_leaves_no_upload_when_it_runs_again() {
    let requests = {
        let bench = Bench::new(PART + 1);
        bench.push(|_| {}).unwrap();
        bench.store.take_seen().len()
    };
    let mut begun = 0;
    for point in 0..requests {
        let bench = Bench::new(PART + 1);
        bench.stop_at(point);
        bench.push(|_| {}).unwrap_err();
        let seen = bench.store.take_seen();
        begun += usize::from(seen.last().unwrap().query.starts_with("uploads"));
        bench.go_on();
        // It may have been complete.
        let again = bench.push(|_| {});
        assert!(again.is_ok() || again.unwrap_err().to_string().contains("--replace"));
        assert!(bench.is_there(), "request {point}");
        assert_eq!(bench.store.open_uploads(), 0, "request {point}: {seen:?}");
    }
    assert_eq!(begun, 1);
}

#[test]
fn uploads_of_others_are_never_given_up() {
    // When a push is stopped at the beginning of its upload, others have begun some, or do so then.
    for (when, key) in [(Some(3600), KEY), (None, KEY), (None, "/bucket/disk.img.bak")] {
        let bench = Bench::new(PART);
        let before = when.map(|ago| bench.store.begin_upload(key, ago));
        // After a look at the object and the list of uploads.
        bench.stop_at(2);
        bench.push(|_| {}).unwrap_err();
        assert!(bench.store.take_seen().last().unwrap().query.starts_with("uploads"));
        let foreign = before.unwrap_or_else(|| bench.store.begin_upload(key, 0));
        bench.go_on();
        bench.push(|_| {}).unwrap();
        assert!(bench.is_there());
        assert!(bench.store.uploads().contains(&foreign), "{when:?} {key}");
        // One of two of this key at this moment may be either's, so both stay.
        let left = if when.is_none() && key == KEY { 2 } else { 1 };
        assert_eq!(bench.store.open_uploads(), left, "{when:?} {key}");
    }
}

#[test]
fn upload_with_parts_is_given_up_by_nobody_else() {
    let bench = Bench::new(PART);
    bench.stop_at(2);
    bench.push(|_| {}).unwrap_err();
    bench.go_on();
    let upload = bench.store.uploads()[0].clone();
    // Another program uses it: so it is another program's.
    bench.store.put_part(KEY, &upload, "data");
    bench.push(|_| {}).unwrap();
    assert!(bench.is_there());
    assert_eq!(bench.store.uploads(), [upload]);
}

#[test]
fn push_bears_a_store_that_does_not_list_uploads() {
    for fault in [Fault::Status(403), Fault::Status(501), Fault::Nonsense, Fault::Cut(40)] {
        let bench = Bench::new(PART);
        bench.store.fail(move |seen| {
            let is_list = seen.method == "GET" && seen.query.contains("uploads=");
            if is_list { fault } else { Fault::None }
        });
        bench.push(|_| {}).unwrap();
        assert!(bench.is_there(), "{fault:?}");
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

/// Whether a request completes an upload.
fn completes(seen: &Seen) -> bool {
    seen.method == "POST" && seen.query.contains("uploadId")
}

#[test]
fn store_that_completes_nothing_under_a_condition_is_asked_without_one() {
    for status in [501, 400] {
        for replaces in [false, true] {
            let bench = Bench::new(PART + 1);
            if replaces {
                bench.store.put(KEY, "old");
            }
            bench.store.fail(move |_| Fault::RefusesConditions(status));
            bench.push(|options| options.replace = replaces).unwrap();
            assert!(bench.is_there());
            let seen = bench.store.take_seen();
            // The second look, and the one at the result.
            let behind = seen.iter().skip_while(|seen| !completes(seen));
            assert!(behind.filter(|seen| seen.method == "HEAD").count() >= 2, "{seen:?}");
            assert_eq!(bench.store.open_uploads(), 0);
        }
    }
}

#[test]
fn store_that_takes_no_condition_writes_over_no_object_that_came_meanwhile() {
    for replaces in [false, true] {
        let bench = Arc::new(Bench::new(PART));
        if replaces {
            bench.store.put(KEY, "old");
        }
        let other = Arc::clone(&bench);
        bench.store.fail(move |seen| {
            if completes(seen) {
                other.store.put(KEY, "of another program");
            }
            Fault::RefusesConditions(501)
        });
        let error = bench.push(|options| options.replace = replaces).unwrap_err().to_string();
        assert!(error.contains("another program wrote s3://bucket/disk.img"), "{error}");
        assert_eq!(bench.store.object(KEY).unwrap(), "of another program");
        bench.store.fail(|_| Fault::None);
    }
}

#[test]
fn object_is_replaced_where_its_etag_is_misunderstood_and_never_where_there_was_none() {
    for replaces in [false, true] {
        let bench = Bench::new(PART);
        if replaces {
            bench.store.put(KEY, "old");
        }
        let count = AtomicUsize::new(0);
        bench.store.fail(move |seen| {
            match completes(seen) && count.fetch_add(1, Ordering::Relaxed) == 0 {
                true => Fault::Status(412),
                false => Fault::None,
            }
        });
        let pushed = bench.push(|options| options.replace = replaces);
        assert_eq!(pushed.is_ok(), replaces, "{pushed:?}");
        assert_eq!(bench.is_there(), replaces);
    }
}

#[test]
fn store_that_refuses_what_has_not_changed_is_not_taken_for_another_program() {
    for replaces in [false, true] {
        let bench = Bench::new(PART);
        if replaces {
            bench.store.put(KEY, "old");
        }
        bench.store.fail(|seen| if completes(seen) { Fault::Status(412) } else { Fault::None });
        let error = bench.push(|options| options.replace = replaces).unwrap_err().to_string();
        assert!(error.contains("the object is what it was; push again"), "{error}");
        assert_eq!(bench.store.object(KEY).is_some(), replaces);
        // No part is sent twice.
        bench.store.fail(|_| Fault::None);
        let pushed = bench.push(|options| options.replace = replaces).unwrap();
        assert_eq!(pushed.resumed, PART as u64);
        assert!(bench.is_there());
    }
}

#[test]
fn refusals_are_not_repeated_and_say_what_the_store_says() {
    let bench = Bench { idle: Duration::from_secs(20), ..Bench::new(PART) };
    for (status, says) in [
        (501, "the store answered 501 Not Implemented: AsWanted: As the test wants"),
        (400, "the store answered 400 Bad Request: AsWanted: As the test wants"),
    ] {
        bench.store.fail(move |seen| match seen.query.starts_with("uploads") {
            true => Fault::Status(status),
            false => Fault::None,
        });
        bench.store.take_seen();
        let error = bench.push(|_| {}).unwrap_err().to_string();
        assert_eq!(error, format!("cannot write s3://bucket/disk.img: {says}"));
        let seen = bench.store.take_seen();
        let begun = |seen: &&Seen| seen.method == "POST";
        assert_eq!(seen.iter().filter(begun).count(), 1, "{seen:?}");
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
