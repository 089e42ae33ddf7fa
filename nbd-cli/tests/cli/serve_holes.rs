//! Chunks of reads as libnbd sees them, beside those of qemu-nbd.

use std::path::Path;
use std::process::Command;

use crate::support::random::Random;
use crate::support::{Server, peer, run};
use crate::tools;

/// Prints the chunks of reads as runs of data and holes: neighbours of one kind are joined, so that
/// each byte is told but not how a server has cut its answer.
const CHUNKS: &str = r"
def chunks(offset, length, flags=0):
    seen = []
    def chunk(data, at, status, error):
        assert status in (nbd.READ_DATA, nbd.READ_HOLE), (at, status)
        assert status == nbd.READ_DATA or bytes(data) == bytes(len(data)), at
        seen.append((at, len(data), 'hole' if status == nbd.READ_HOLE else 'data'))
        return 0
    content = h.pread_structured(length, offset, chunk, flags)
    runs = []
    for at, count, kind in sorted(seen):
        assert at == (runs[-1][0] + runs[-1][1] if runs else offset)
        if runs and runs[-1][2] == kind:
            runs[-1] = (runs[-1][0], runs[-1][1] + count, kind)
        else:
            runs.append((at, count, kind))
    print(offset, length, runs, hash(bytes(content)))
";

/// Runs a script in nbdsh.
fn nbdsh(tool: &Path, server: &Server, script: &str) -> String {
    let mut command = Command::new(tool);
    // Its module belongs to the system's Python, which need not be the first one.
    let path = std::env::var("PATH").unwrap_or_default();
    command.env("PATH", format!("/usr/bin:{path}")).env("PYTHONHASHSEED", "0");
    let script = format!("{CHUNKS}{script}");
    run(command.args(["-u", server.uri(), "-c", &script])).success()
}

#[test]
fn a_zeroed_part_is_a_hole_chunk_as_libnbd_expects_it_and_with_df_there_is_one_chunk() {
    tools!(nbdsh_tool = "nbdsh", qemu_img = "qemu-img", qemu_io = "qemu-io");
    let directory = tempfile::tempdir().expect("a directory");
    let image = directory.path().join("disk.qcow2");
    let path = image.to_str().expect("a plain name");
    // The disk of libnbd's own test of structured reads.
    let options = "cluster_size=512,compat=v3";
    peer(&qemu_img, &["create", "-q", "-f", "qcow2", "-o", options, path, "3k"]);
    let write =
        ["-f", "qcow2", "-d", "unmap", "-c", "write -P 1 0 3k", "-c", "write -zu 2k 512", path];
    peer(&qemu_io, &write);
    let server = Server::ours(&[path]);
    let script = "chunks(2048, 1024)\nchunks(2048, 1024, nbd.CMD_FLAG_DF)\n";
    let said = nbdsh(&nbdsh_tool, &server, script);
    assert!(said.contains("[(2048, 512, 'hole'), (2560, 512, 'data')]"), "{said}");
    assert!(said.contains("[(2048, 1024, 'data')]"), "{said}");
}

#[test]
fn a_hole_in_memory_is_one_chunk_whatever_its_length() {
    tools!(nbdsh_tool = "nbdsh");
    let server = Server::ours(&["memory:64M"]);
    let script = "chunks(0, 32 << 20)\nh.pwrite(b'x' * 65536, 1 << 20)\nchunks(0, 4 << 20)\n";
    let said = nbdsh(&nbdsh_tool, &server, script);
    assert!(said.contains("[(0, 33554432, 'hole')]"), "{said}");
    let parts = "[(0, 1048576, 'hole'), (1048576, 65536, 'data'), (1114112, 3080192, 'hole')]";
    assert!(said.contains(parts), "{said}");
}

/// Makes a chain over a raw file with holes; the name and format of its top.
fn chain(
    qemu_img: &Path,
    qemu_io: &Path,
    directory: &Path,
    random: &mut Random,
) -> (String, &'static str) {
    let path = |name: &str| directory.join(name).to_str().expect("a plain name").to_owned();
    let base_size = (4 << 20) - random.below(2048) * 512;
    let mut top = (path("base.raw"), "raw");
    peer(qemu_img, &["create", "-q", "-f", "raw", &top.0, &base_size.to_string()]);
    change(qemu_io, &top, base_size, random);
    for number in 0..random.below(4) {
        let size = (4 << 20) + random.below(64) * 512;
        let overlay = path(&format!("layer{number}.qcow2"));
        let cluster = [512, 4096, 65_536, 1 << 20][random.below(4) as usize];
        let extended = if cluster >= 65_536 && random.below(2) == 0 { "on" } else { "off" };
        let options = format!("cluster_size={cluster},extended_l2={extended}");
        let mut create = vec!["create", "-q", "-f", "qcow2", "-o", &options];
        create.extend(["-F", top.1, "-b", &top.0]);
        let size_text = size.to_string();
        create.extend([overlay.as_str(), &size_text]);
        peer(qemu_img, &create);
        top = (overlay, "qcow2");
        change(qemu_io, &top, size, random);
    }
    top
}

fn change(qemu_io: &Path, image: &(String, &'static str), size: u64, random: &mut Random) {
    let mut arguments =
        vec!["-f".to_owned(), image.1.to_owned(), "-d".to_owned(), "unmap".to_owned()];
    for _ in 0..random.below(25) {
        let length = 512 * (1 + random.below(400));
        let offset = random.below((size - length) / 512) * 512;
        let what = ["write -P 7", "write -P 0", "write -z", "write -z -u", "discard"];
        let what = what[random.below(5) as usize];
        // Space that is reserved and unwritten is a hole until its pages are in the cache, and data
        // from then on: what a file system says of it depends on who has read it.
        let what = if image.1 == "raw" && what == "write -z" { "write -z -u" } else { what };
        arguments.extend(["-c".to_owned(), format!("{what} {offset} {length}")]);
    }
    if arguments.len() > 4 {
        arguments.push(image.0.clone());
        peer(qemu_io, &arguments);
    }
}

#[test]
fn over_random_chains_the_same_bytes_are_holes_as_with_qemu_nbd() {
    tools!(nbdsh_tool = "nbdsh", qemu_img = "qemu-img", qemu_io = "qemu-io", qemu_nbd = "qemu-nbd");
    let mut random = Random::of_this_run(0x5eed);
    for _ in 0..6 {
        let directory = tempfile::tempdir().expect("a directory");
        let (image, format) = chain(&qemu_img, &qemu_io, directory.path(), &mut random);
        let mut script = String::from("size = h.get_size()\nchunks(0, size)\n");
        for _ in 0..60 {
            let longest = [2048, 40_000, 300_000, 3_000_000][random.below(4) as usize];
            // Below the size of any of these disks.
            let (length, offset) = (1 + random.below(longest), random.below(60_000));
            script.push_str(&format!("chunks({offset}, {length})\n"));
        }
        let theirs = Server::qemu_nbd(&qemu_nbd, "", &["-r", "-f", format, &image]);
        let expected = nbdsh(&nbdsh_tool, &theirs, &script);
        drop(theirs);
        let ours = Server::ours(&["--read-only", "--format", format, "--trust-image", &image]);
        assert_eq!(nbdsh(&nbdsh_tool, &ours, &script), expected);
    }
}
