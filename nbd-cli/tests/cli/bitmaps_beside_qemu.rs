//! Dirty bitmaps on the wire: nbdinfo and libnbd see the same as from qemu-nbd.

use std::path::Path;
use std::process::Command;

use serde_json::Value;

use crate::support::image::{json, write};
use crate::support::random::Random;
use crate::support::{Disk, Server, nbd_cli, peer, run, tool};
use crate::tools;

const BITMAPS: [(&str, &str); 4] =
    [("fine", "512"), ("small", "4096"), ("usual", "65536"), ("coarse", "4194304")];

/// Changes of a disk of `size` bytes, as words for qemu-io.
fn changes(random: &mut Random, size: u64, count: usize) -> Vec<String> {
    (0..count)
        .map(|_| {
            let longest = [20, 20, 20, 2000][random.below(4) as usize];
            let length = 512 * (1 + random.below(longest));
            let offset = 512 * random.below((size - length) / 512);
            let what = ["write -q", "write -q -z", "discard -q"][random.below(3) as usize];
            format!("{what} {offset} {length}")
        })
        .collect()
}

fn change(qemu_io: &Path, image: &str, changes: &[String]) {
    let words = changes.iter().flat_map(|change| ["-c", change.as_str()]);
    let said =
        peer(qemu_io, &["-f", "qcow2"].into_iter().chain(words).chain([image]).collect::<Vec<_>>());
    assert!(!said.contains("failed"), "{said}");
}

/// The map of one bitmap: offset, length, whether dirty.
fn map(nbdinfo: &Path, uri: &str, bitmap: &str) -> Vec<(u64, u64, bool)> {
    let map = json(nbdinfo, &["--json", &format!("--map=qemu:dirty-bitmap:{bitmap}"), uri]);
    let extents = map.as_array().expect("a list").iter().map(|extent| {
        let number = |what: &str| extent[what].as_u64().expect("a number");
        (number("offset"), number("length"), number("type") == 1)
    });
    extents.collect()
}

#[test]
fn random_bitmaps_of_every_layer_are_mapped_as_by_qemu_nbd() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    let mut random = Random::of_this_run(std::process::id().into());
    let directory = Disk::sparse();
    let (base, image) = (directory.beside("base.qcow2"), directory.beside("disk.qcow2"));
    let size = (24 << 20) + 512 * random.below(100);
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &base, &size.to_string()]);
    for (name, granularity) in BITMAPS {
        let name = format!("base-{name}");
        peer(&qemu_img, &["bitmap", "--add", "-g", granularity, &base, &name]);
    }
    change(&qemu_io, &base, &changes(&mut random, size, 30));
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-b", &base, "-F", "qcow2", &image]);
    for (name, granularity) in BITMAPS {
        nbd_cli(&["bitmap", "add", &image, name, "--granularity", granularity]).success();
    }
    change(&qemu_io, &image, &changes(&mut random, size, 30));
    let names: Vec<String> =
        BITMAPS.iter().flat_map(|(name, _)| [(*name).to_owned(), format!("base-{name}")]).collect();
    let ours = Server::ours(&["--read-only", "--bitmap", "all", &image]);
    let theirs = names.iter().flat_map(|name| ["-B", name.as_str()]);
    let theirs = ["-r", "-f", "qcow2"].into_iter().chain(theirs).chain([image.as_str()]);
    let theirs = Server::qemu_nbd(&qemu_nbd, "x", &theirs.collect::<Vec<_>>());
    let mut dirty = 0;
    for name in &names {
        let map_of = |server: &Server| map(&nbdinfo, server.uri(), name);
        let expected = map_of(&theirs);
        assert_eq!(map_of(&ours), expected, "{name}");
        dirty += expected.iter().filter(|(_, _, dirty)| *dirty).count();
    }
    assert!(dirty > 50, "there is something to compare: {dirty}");
}

/// Lists contexts with libnbd: one line for each query.
const LIST: &str = r#"
for query in [[], ["qemu:"], ["qemu:dirty-bitmap:"], ["qemu:dirty-bitmap:day"], ["base:"]]:
    h = nbd.NBD()
    h.set_opt_mode(True)
    h.connect_uri(URI)
    found = []
    for name in query:
        h.add_meta_context(name)
    h.opt_list_meta_context(lambda name: found.append(name))
    print(' '.join(sorted(found)))
    h.opt_abort()
"#;

#[test]
fn every_exported_bitmap_is_listed_as_by_qemu_nbd() {
    tools!(qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd", nbdinfo = "nbdinfo");
    let Some(nbdsh) = tool("nbdsh") else { return };
    let directory = Disk::sparse();
    let image = directory.beside("disk.qcow2");
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", &image, "8M"]);
    for name in ["day", "night", "hidden"] {
        peer(&qemu_img, &["bitmap", "--add", &image, name]);
    }
    write(&qemu_io, &image, "write 1M 64k");
    let bitmaps = ["day", "night"];
    let ours = Server::ours(&["--read-only", "--bitmap", "day", "--bitmap", "night", &image]);
    let theirs = ["-r", "-f", "qcow2", "-B", "day", "-B", "night", &image];
    let theirs = Server::qemu_nbd(&qemu_nbd, "x", &theirs);
    let contexts_in_nbdinfo = |server: &Server| -> Vec<String> {
        let list: Value = json(&nbdinfo, &["--list", "--json", server.uri()]);
        let contexts = list["exports"][0]["contexts"].as_array().expect("a list").clone();
        let names = contexts.iter().map(|name| name.as_str().expect("text").to_owned());
        let mut names: Vec<String> = names.collect();
        names.sort();
        names
    };
    let listed = contexts_in_nbdinfo(&ours);
    assert_eq!(listed, contexts_in_nbdinfo(&theirs));
    for name in bitmaps {
        assert!(listed.contains(&format!("qemu:dirty-bitmap:{name}")), "{listed:?}");
    }
    let list = |server: &Server| {
        let mut command = Command::new(&nbdsh);
        // Its module belongs to the system's Python, which need not be the first one.
        let path = std::env::var("PATH").unwrap_or_default();
        command.env("PATH", format!("/usr/bin:{path}"));
        let script = LIST.replace("URI", &format!("'{}'", server.uri()));
        run(command.args(["-c", &script])).success()
    };
    let found = list(&ours);
    assert_eq!(found, list(&theirs));
    let lines: Vec<&str> = found.lines().collect();
    let both = "qemu:dirty-bitmap:day qemu:dirty-bitmap:night";
    assert_eq!(lines[1..4], [both, both, "qemu:dirty-bitmap:day"]);
}
