//! The command line of the benchmark.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

/// What to measure, and for how long.
#[derive(Debug, clap::Args)]
pub(crate) struct Options {
    /// How often every row is measured on every server; ratios come from the medians.
    #[arg(long, default_value_t = 4, value_parser = parse_rounds)]
    pub(crate) rounds: usize,
    /// Size of the file that is served, such as 2G or 512M.
    #[arg(long, default_value = "2G", value_parser = parse_size)]
    pub(crate) size: u64,
    /// Seconds that a block lasts (whole seconds, as fio takes no others; 2 at least).
    #[arg(long, default_value_t = 3, value_parser = clap::value_parser!(u64).range(2..=600))]
    pub(crate) seconds: u64,
    /// Only these groups of rows: raw, qcow2, large, direct, durable, image-tools,
    /// image-formats, bitmaps, checkpoints, tls, encrypted, copy, objects; all if not given.
    #[arg(long, value_name = "GROUP,...")]
    pub(crate) only: Option<String>,
    /// Only rows whose name contains one of these texts, separated by `,` or `|`.
    #[arg(long, value_name = "TEXT,...")]
    pub(crate) rows: Option<String>,
    /// Only servers (and tools) with one of these names: ours, floor, qemu-nbd,
    /// qemu-nbd-io-uring, qemu-nbd-direct, nbdkit, nbd-server, and what the groups add.
    #[arg(long, value_name = "NAME,...")]
    pub(crate) servers: Option<String>,
    /// Write the medians, all samples and the machine's description to this file.
    #[arg(long, value_name = "FILE")]
    pub(crate) json: Option<PathBuf>,
    /// Show this server's medians relative to those of an earlier report (see --json).
    #[arg(long, value_name = "FILE")]
    pub(crate) compare: Option<PathBuf>,
    /// Directory for the served file; the system's directory for temporary files if not given.
    #[arg(long = "dir", value_name = "DIRECTORY")]
    pub(crate) directory: Option<PathBuf>,
    /// How the page cache holds the file.
    #[arg(long, value_enum, default_value_t = PageCache::Pages)]
    pub(crate) page_cache: PageCache,
    /// Measure the binaries of the profile `dist` as they are.
    #[arg(long)]
    pub(crate) no_build: bool,
}

/// How the page cache holds the file that is served.
#[derive(Debug, Clone, Copy, PartialEq, Eq, clap::ValueEnum, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum PageCache {
    /// In single pages, in which small writes cost the kernel little.
    Pages,
    /// In the large folios that the kernel's readahead makes.
    Readahead,
}

impl Options {
    /// Whether the group of this name was asked for.
    pub(crate) fn wants_group(&self, name: &str) -> bool {
        self.groups().is_none_or(|mut groups| groups.any(|group| group == name))
    }

    /// The groups that were asked for, if any were.
    pub(crate) fn groups(&self) -> Option<impl Iterator<Item = &str>> {
        self.only.as_ref().map(|only| only.split([',', '|']).map(str::trim))
    }

    /// Whether the row of this name was asked for.
    pub(crate) fn wants_row(&self, name: &str) -> bool {
        self.rows
            .as_ref()
            .is_none_or(|rows| rows.split([',', '|']).any(|part| name.contains(part.trim())))
    }

    /// Whether the server of this name was asked for.
    pub(crate) fn wants_server(&self, name: &str) -> bool {
        self.servers
            .as_ref()
            .is_none_or(|servers| servers.split([',', '|']).any(|part| name == part.trim()))
    }
}

fn parse_rounds(text: &str) -> Result<usize, String> {
    match text.parse() {
        Ok(rounds) if (1..=1000).contains(&rounds) => Ok(rounds),
        _ => Err("a number from 1 to 1000 is needed".to_owned()),
    }
}

/// Bytes from a number with an optional K, M, G or T (powers of 1024); a multiple of 1 MiB.
fn parse_size(text: &str) -> Result<u64, String> {
    const UNIT: u64 = 1 << 20;
    let (digits, shift) = match text.chars().next_back() {
        Some('K' | 'k') => (&text[..text.len() - 1], 10),
        Some('M' | 'm') => (&text[..text.len() - 1], 20),
        Some('G' | 'g') => (&text[..text.len() - 1], 30),
        Some('T' | 't') => (&text[..text.len() - 1], 40),
        _ => (text, 0),
    };
    let number: u64 =
        digits.parse().map_err(|_| format!("{text}: not a size such as 512M or 2G"))?;
    let size = number.checked_mul(1 << shift).ok_or_else(|| format!("{text}: too large"))?;
    if size == 0 || size % UNIT != 0 {
        return Err(format!("{text}: the size has to be a multiple of 1M"));
    }
    Ok(size)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_take_binary_suffixes() {
        assert_eq!(parse_size("2G"), Ok(2 << 30));
        assert_eq!(parse_size("512m"), Ok(512 << 20));
        assert_eq!(parse_size("1048576"), Ok(1 << 20));
    }

    #[test]
    fn bad_sizes_are_refused() {
        for text in ["", "G", "1.5G", "-1M", "100", "0", "99999999999T"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn rows_are_chosen_by_part_of_the_name_and_servers_by_name() {
        let options = Options {
            rounds: 1,
            size: 1 << 20,
            seconds: 2,
            only: Some("raw, tls".to_owned()),
            rows: Some("randread,nbdcopy".to_owned()),
            servers: Some("qemu-nbd".to_owned()),
            json: None,
            compare: None,
            directory: None,
            page_cache: PageCache::Pages,
            no_build: true,
        };
        assert!(options.wants_row("randread-4k-qd1") && !options.wants_row("randwrite-4k-qd1"));
        assert!(options.wants_group("tls") && !options.wants_group("qcow2"));
        assert!(options.wants_server("qemu-nbd") && !options.wants_server("qemu-nbd-direct"));
    }
}
