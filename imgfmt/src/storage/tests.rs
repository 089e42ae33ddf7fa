//! Storages above others: what they forward.

use std::io;
use std::os::fd::BorrowedFd;
use std::sync::{Arc, Mutex};

use super::*;
use crate::unfinished::Unfinished;

/// The length of what is below, in bytes.
const LENGTH: u64 = (1 << 20) - 512;

/// Notes what is called, and succeeds.
#[derive(Debug, Default)]
struct Noting(Mutex<Vec<&'static str>>);

impl Noting {
    fn note<T>(&self, method: &'static str, result: T) -> T {
        self.0.lock().unwrap().push(method);
        result
    }
}

impl Storage for Noting {
    fn len(&self) -> io::Result<u64> {
        self.note("len", Ok(LENGTH))
    }

    fn read_at(&self, _: HostOffset, buffer: &mut [u8]) -> io::Result<usize> {
        self.note("read_at", Ok(buffer.len()))
    }

    fn write_at(&self, _: HostOffset, _: &[u8], _: Durability) -> io::Result<()> {
        self.note("write_at", Ok(()))
    }

    fn set_len(&self, _: u64) -> io::Result<()> {
        self.note("set_len", Ok(()))
    }

    fn extend(&self, _: u64) -> io::Result<()> {
        self.note("extend", Ok(()))
    }

    fn punch_hole(&self, _: HostOffset, _: u64) -> io::Result<()> {
        self.note("punch_hole", Ok(()))
    }

    fn sync(&self) -> io::Result<()> {
        self.note("sync", Ok(()))
    }

    fn capabilities(&self) -> Capabilities {
        self.note("capabilities", Capabilities::default())
    }

    fn try_read_at(&self, _: HostOffset, _: &mut [u8]) -> io::Result<TryRead> {
        self.note("try_read_at", Ok(TryRead::Complete))
    }

    fn write_zeroes(&self, _: HostOffset, _: u64, _: ZeroMode, _: Speed) -> io::Result<()> {
        self.note("write_zeroes", Ok(()))
    }

    fn next_extent(&self, _: HostOffset, length: u64) -> io::Result<StorageExtent> {
        self.note("next_extent", Ok(StorageExtent { length, kind: ExtentKind::Hole }))
    }

    fn is_known_data(&self, _: HostOffset, _: u64) -> bool {
        self.note("is_known_data", false)
    }

    fn readahead(&self, _: HostOffset, _: u64) -> io::Result<()> {
        self.note("readahead", Ok(()))
    }

    fn allocated_len(&self) -> io::Result<Option<u64>> {
        self.note("allocated_len", Ok(None))
    }

    fn direct_alignment(&self) -> Option<DirectAlignment> {
        self.note("direct_alignment", None)
    }

    fn as_fd(&self) -> Option<BorrowedFd<'_>> {
        self.note("as_fd", None)
    }

    fn read_fd(&self) -> Option<BorrowedFd<'_>> {
        self.note("read_fd", None)
    }

    fn begin_write(&self, _: HostOffset, _: u64) -> Option<Box<dyn BegunWrite>> {
        self.note("begin_write", None)
    }

    fn identity(&self) -> Option<FileIdentity> {
        self.note("identity", None)
    }
}

type Call = (&'static str, fn(&dyn Storage));

/// Every method whose default forwards nothing.
const CALLS: &[Call] = &[
    ("write_at", |storage| drop(storage.write_at(at(4096), &[1; 512], Durability::Fua))),
    ("set_len", |storage| drop(storage.set_len(2 * LENGTH))),
    ("extend", |storage| drop(storage.extend(2 * LENGTH))),
    ("punch_hole", |storage| drop(storage.punch_hole(at(4096), 512))),
    ("write_zeroes", |storage| {
        drop(storage.write_zeroes(at(4096), 512, ZeroMode::MayUnmap, Speed::FastOnly));
    }),
    ("sync", |storage| drop(storage.sync())),
    ("capabilities", |storage| _ = storage.capabilities()),
    ("try_read_at", |storage| drop(storage.try_read_at(at(4096), &mut [0; 512]))),
    ("next_extent", |storage| drop(storage.next_extent(at(4096), 512))),
    ("is_known_data", |storage| _ = storage.is_known_data(at(4096), 512)),
    ("readahead", |storage| drop(storage.readahead(at(4096), 512))),
    ("allocated_len", |storage| drop(storage.allocated_len())),
    ("direct_alignment", |storage| _ = storage.direct_alignment()),
    ("as_fd", |storage| _ = storage.as_fd()),
    ("read_fd", |storage| _ = storage.read_fd()),
    ("begin_write", |storage| drop(storage.begin_write(at(4096), 512))),
    ("identity", |storage| _ = storage.identity()),
];

fn at(offset: u64) -> HostOffset {
    HostOffset::new(offset)
}

type Wrap = fn(Arc<dyn Storage>) -> Arc<dyn Storage>;

#[cfg(feature = "encryption")]
fn encrypted(inner: Arc<dyn Storage>) -> Arc<dyn Storage> {
    use crate::passphrase::Passphrase;
    let key = crate::crypto::OldAes::new(&[Passphrase::new(b"key".to_vec())]).unwrap();
    Arc::new(key.decrypted(inner, at(0), crate::units::GuestOffset::new(0)))
}

#[test]
fn storages_above_others_forward_everything_but_what_they_say_here() {
    let wrappers: &[(&str, Wrap, &[&str])] = &[
        ("tracked", |inner| Arc::new(Tracked::new(inner, true)), &[]),
        (
            "unfinished",
            |inner| Arc::new(Unfinished::new(inner).unwrap()),
            // It is not synced before it is complete. Bytes that go around it would miss the first
            // sector.
            &["extend", "sync", "direct_alignment", "as_fd", "read_fd", "begin_write"],
        ),
        (
            "padded",
            |inner| in_whole_blocks(inner, 4096).unwrap(),
            // It is longer than the file.
            &["extend", "allocated_len", "as_fd", "read_fd", "begin_write", "identity"],
        ),
        (
            "window",
            |inner| Arc::new(StorageWindow::new(inner, 512, None).unwrap()),
            // Its offsets are others than those of the file, of which it is a part.
            &["extend", "allocated_len", "as_fd", "read_fd", "begin_write", "identity"],
        ),
        #[cfg(feature = "encryption")]
        (
            "encrypted",
            encrypted,
            // A hole would show which parts are in use, and decrypt to noise: zeroes are written,
            // also to grow, and all of it is data. Bytes that go around it would not be encrypted.
            &[
                "set_len",
                "extend",
                "punch_hole",
                "write_zeroes",
                "next_extent",
                "is_known_data",
                "as_fd",
                "read_fd",
                "begin_write",
            ],
        ),
    ];
    for (name, wrap, keeps) in wrappers {
        for (method, call) in CALLS {
            let noting = Arc::new(Noting::default());
            let storage = wrap(Arc::clone(&noting) as Arc<dyn Storage>);
            noting.0.lock().unwrap().clear();
            call(&*storage);
            let is_forwarded = noting.0.lock().unwrap().contains(method);
            assert_eq!(is_forwarded, !keeps.contains(method), "{name}: {method}");
        }
    }
}
