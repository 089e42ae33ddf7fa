//! Helpers of the tests of this directory. Each test uses some of them.
#![allow(dead_code, unreachable_pub, clippy::unwrap_used, clippy::print_stdout)]

pub mod bitmaps;
pub mod qemu;

use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use imgfmt::{Extent, GuestOffset, GuestRange, Image};

/// A small generator of random numbers (xorshift64*) whose seed is printed.
pub struct Random(u64);

impl Random {
    /// A generator whose seed comes from the environment variable IMGFMT_SEED or else from the
    /// clock.
    pub fn new(what: &str) -> Self {
        let seed = match std::env::var("IMGFMT_SEED").ok().and_then(|text| text.parse().ok()) {
            Some(seed) => seed,
            None => std::time::SystemTime::now()
                .duration_since(std::time::UNIX_EPOCH)
                .map_or(1, |now| now.as_nanos() as u64),
        };
        println!("{what}: IMGFMT_SEED={seed}");
        Self::seeded(seed)
    }

    /// A generator of a known seed.
    pub fn seeded(seed: u64) -> Self {
        Self(seed | 1)
    }

    pub fn next(&mut self) -> u64 {
        self.0 ^= self.0 >> 12;
        self.0 ^= self.0 << 25;
        self.0 ^= self.0 >> 27;
        self.0.wrapping_mul(0x2545_f491_4f6c_dd1d)
    }

    pub fn below(&mut self, bound: u64) -> u64 {
        self.next() % bound
    }

    pub fn bytes(&mut self, length: usize) -> Vec<u8> {
        (0..length).map(|_| self.next() as u8).collect()
    }
}

pub fn at(offset: u64) -> GuestOffset {
    GuestOffset::new(offset)
}

pub fn range(offset: u64, length: u64) -> GuestRange {
    GuestRange::new(at(offset), length).unwrap()
}

/// The extents of a range, which they cover without gaps.
pub fn all_extents(image: &Image, asked: GuestRange) -> Vec<Extent> {
    let extents: Vec<Extent> = image.extents(asked).collect::<Result<_, _>>().unwrap();
    let mut position = asked.offset();
    for extent in &extents {
        assert_eq!(extent.range.offset(), position, "a gap between extents");
        assert!(!extent.range.is_empty(), "an empty extent at {position}");
        position = extent.range.end();
    }
    assert_eq!(position, asked.end(), "the extents end early");
    extents
}

/// Whether a tool is installed. If not, says so, and fails where all tools must be there.
pub fn has_tool(tool: &str) -> bool {
    let found = std::env::var_os("PATH").is_some_and(|path| {
        let mut directories: Vec<_> = std::env::split_paths(&path).collect();
        directories.push("/usr/sbin".into());
        directories.push("/sbin".into());
        directories.iter().any(|directory| directory.join(tool).is_file())
    });
    if !found {
        println!("skipped: {tool} is not installed");
        assert!(std::env::var_os("CI").is_none(), "{tool} is not installed");
    }
    found
}

/// Runs a command that must succeed and returns its output.
pub fn run(program: &str, arguments: &[&str]) -> String {
    let output = Command::new(program).args(arguments).output().unwrap();
    assert!(
        output.status.success(),
        "{program} {arguments:?}: {}{}",
        String::from_utf8_lossy(&output.stdout),
        String::from_utf8_lossy(&output.stderr)
    );
    String::from_utf8(output.stdout).unwrap()
}

pub fn text(path: &Path) -> &str {
    path.to_str().unwrap()
}

/// A process that is ended when the test ends.
pub struct Background(pub Child);

impl Background {
    pub fn start(program: &str, arguments: &[&str]) -> Self {
        let child = Command::new(program)
            .args(arguments)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .spawn()
            .unwrap();
        Self(child)
    }
}

impl Drop for Background {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Waits until a condition holds; the deadline only ends a test that would hang.
pub fn wait_until(what: &str, mut condition: impl FnMut() -> bool) {
    let start = Instant::now();
    while !condition() {
        assert!(start.elapsed() < Duration::from_secs(30), "{what} did not happen");
        std::thread::sleep(Duration::from_millis(10));
    }
}
