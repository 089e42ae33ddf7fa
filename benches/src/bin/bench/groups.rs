//! The groups of rows, from which `--only` selects.
//!
//! The group `raw` has its own tables ([`super::rows`], [`super::servers`], [`super::bars`]). Every
//! other group has one file that defines its rows and bars for [`super::contest`], and one entry in
//! [`GROUPS`].

use anyhow::{Result, bail};

use super::group::Group;
use super::options::Options;
use super::{
    bitmaps, checkpoints, copies, direct, encrypted, image_formats, image_tools, large, objects,
    qcow2, tls,
};

/// The group of the rows that serve a raw file.
pub(crate) const RAW: &str = "raw";

/// Every other group, in the order of the report.
pub(crate) const GROUPS: &[Group] = &[
    qcow2::GROUP,
    large::GROUP,
    direct::DIRECT,
    direct::DURABLE,
    image_tools::GROUP,
    image_formats::GROUP,
    bitmaps::GROUP,
    checkpoints::GROUP,
    tls::GROUP,
    encrypted::GROUP,
    copies::GROUP,
    objects::GROUP,
];

/// Checks that every group of `--only` exists.
///
/// # Errors
///
/// One does not.
pub(crate) fn check_names(options: &Options) -> Result<()> {
    let names: Vec<&str> =
        std::iter::once(RAW).chain(GROUPS.iter().map(|group| group.name)).collect();
    match options.groups().and_then(|mut wanted| wanted.find(|name| !names.contains(name))) {
        Some(unknown) => bail!("--only {unknown}: the groups are {}", names.join(", ")),
        None => Ok(()),
    }
}

#[cfg(test)]
mod tests {
    use clap::Parser;

    use super::*;
    use crate::contest::Against;

    #[derive(Parser)]
    struct Line {
        #[command(flatten)]
        options: Options,
    }

    fn options(words: &[&str]) -> Options {
        Line::parse_from(std::iter::once(&"bench").chain(words)).options
    }

    #[test]
    fn every_bar_names_a_row_and_a_contender_of_its_group() {
        for group in GROUPS {
            let contests = (group.contests)(&options(&[]));
            let find = |name: &str| contests.iter().find(|contest| contest.name == name);
            for bar in (group.bars)() {
                let row = find(&bar.row).unwrap_or_else(|| panic!("{} is not a row", bar.row));
                match bar.against {
                    Against::Contender(name) => {
                        assert!(row.contenders.iter().any(|other| other.name == name), "{name}");
                    }
                    Against::OursInRow(name) | Against::OursInRowPerCore(name) => {
                        assert!(find(&name).is_some(), "{name}");
                    }
                    Against::Nothing
                    | Against::BestPeer
                    | Against::BestPeerUpToFloor
                    | Against::BestPeerPerCore
                    | Against::BestPeerPerCoreUpToFloor => {}
                }
            }
        }
    }

    #[test]
    fn names_of_rows_are_unique_among_all_groups() {
        let mut names: Vec<String> = GROUPS
            .iter()
            .flat_map(|group| (group.contests)(&options(&[])))
            .map(|contest| contest.name)
            .collect();
        names.sort();
        let count = names.len();
        names.dedup();
        assert_eq!(names.len(), count);
    }

    #[test]
    fn unknown_group_is_refused_with_the_names_of_all() {
        assert!(check_names(&options(&["--only", "raw,qcow2"])).is_ok());
        let error = check_names(&options(&["--only", "raw,cow"])).expect_err("no such group");
        assert!(error.to_string().contains("raw, qcow2"), "{error}");
    }
}
