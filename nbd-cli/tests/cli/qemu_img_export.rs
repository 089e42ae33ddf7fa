//! New images in exports of servers, in the qemu-img form: as for OVA files, of which qemu-nbd
//! serves a part.

use std::path::{Path, PathBuf};
use std::process::Command;

use tempfile::TempDir;

use crate::support::qemu_img::{ours, words};
use crate::support::{Outcome, Server, run, tool};

/// Where the part that is served begins, in bytes.
const START: usize = 1 << 20;

/// A disk of 4 MiB with 1 MiB of data that cannot be compressed much, and zeroes.
fn make_source(path: &Path) {
    let mut state = 1_u64;
    let mut noise = vec![0; 1 << 20];
    for byte in &mut noise {
        state = state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        *byte = (state >> 56) as u8;
    }
    let mut disk = vec![0; 4 << 20];
    disk[1 << 20..2 << 20].copy_from_slice(&noise);
    disk[3 << 20..][..100].fill(7);
    std::fs::write(path, disk).expect("room");
}

/// A directory with `source.img`, and the tools to serve a part of a file in it.
struct Place {
    directory: TempDir,
    qemu_nbd: PathBuf,
}

/// A part of `machine.ova` that is served, with bytes before and after it.
struct Part {
    file: PathBuf,
    size: usize,
    server: Server,
}

impl Place {
    /// `None` if a tool is missing.
    fn new() -> Option<Self> {
        tool("qemu-img")?;
        let qemu_nbd = tool("qemu-nbd")?;
        let directory = tempfile::tempdir().expect("a directory");
        make_source(&directory.path().join("source.img"));
        Some(Self { directory, qemu_nbd })
    }

    fn path(&self, name: &str) -> PathBuf {
        self.directory.path().join(name)
    }

    fn serve(&self, size: usize) -> Part {
        let file = self.path("machine.ova");
        std::fs::write(&file, vec![0xaa; START + size + 4096]).expect("room");
        let options =
            format!("driver=raw,offset={START},size={size},file.filename={}", file.display());
        let server = Server::qemu_nbd(&self.qemu_nbd, "", &["--image-opts", &options]);
        Part { file, size, server }
    }

    fn theirs(&self, line: &str) -> Outcome {
        run(Command::new("qemu-img").args(words(line)).current_dir(&self.directory))
    }

    fn ours(&self, line: &str) -> Outcome {
        ours(self.directory.path(), &words(line))
    }

    /// Ours refuses each line, with a sentence that has this part.
    #[track_caller]
    fn refused(&self, lines: &[(String, &str)]) {
        for (line, part) in lines {
            let refused = self.ours(line);
            assert_eq!(refused.code, Some(1), "{line}: {refused:?}");
            assert!(refused.stderr.contains(part), "{line}: {refused:?}");
        }
    }

    /// The size of an image of the source, in bytes.
    fn required(&self, options: &str) -> usize {
        let line = format!("measure --output=json -f raw -O qcow2 {options} source.img");
        let report = self.theirs(&line).success();
        let report: serde_json::Value = serde_json::from_str(&report).expect("JSON");
        report["required"].as_u64().expect("a number") as usize
    }
}

impl Part {
    fn uri(&self) -> &str {
        self.server.uri()
    }

    /// Whether what is around it is unchanged.
    fn is_alone_changed(&self) -> bool {
        let bytes = std::fs::read(&self.file).expect("the file");
        let is_kept = |part: &[u8]| part.iter().all(|byte| *byte == 0xaa);
        bytes.len() == START + self.size + 4096
            && is_kept(&bytes[..START])
            && is_kept(&bytes[START + self.size..])
    }

    /// Whether nothing was written.
    fn is_unchanged(&self) -> bool {
        std::fs::read(&self.file).expect("the file").iter().all(|byte| *byte == 0xaa)
    }
}

#[test]
fn a_new_image_fits_into_the_part_that_was_measured_for_it() {
    let Some(place) = Place::new() else { return };
    for (options, more) in [
        ("", ""),
        ("-o cluster_size=4k", ""),
        ("-o compat=0.10", ""),
        ("-o extended_l2=on,cluster_size=128k", "-m 16 -W"),
        ("", "-c"),
        ("-o compression_type=zstd", "-c -p"),
        ("-o preallocation=full", ""),
    ] {
        let part = place.serve(match options.contains("preallocation") {
            true => 8 << 20,
            false => place.required(options),
        });
        let uri = part.uri();
        // Twice: what is there does not matter.
        for _ in 0..2 {
            let line = format!("convert -f raw -O qcow2 {options} {more} source.img {uri}");
            place.ours(&line).success();
            for judge in
                [format!("check {uri}"), format!("compare -f raw -F qcow2 source.img {uri}")]
            {
                let said = place.theirs(&judge);
                assert_eq!(said.code, Some(0), "{line}: {judge}: {said:?}");
            }
        }
        assert!(part.is_alone_changed(), "{options} {more}");
    }
}

#[test]
fn an_export_that_is_too_small_stays_as_it_is() {
    let Some(place) = Place::new() else { return };
    let part = place.serve(place.required("") - 512);
    let uri = part.uri();
    place.refused(&[
        (format!("convert -f raw -O qcow2 source.img {uri}"), "it does not fit"),
        (format!("create -f qcow2 {uri} 8P"), "too large"),
        (format!("create -f qcow2 -o cluster_size=2M {uri} 1G"), "takes up"),
        (format!("create -f raw {uri} 1G"), "takes up"),
        (format!("create -f vmdk {uri} 1M"), "made in files only"),
        (format!("create -f qcow2 -o data_file=d {uri} 1M"), "data file"),
        (format!("create -f qcow2 -b source.img -F raw {uri}"), "source.img"),
    ]);
    assert!(part.is_unchanged());
}

#[test]
fn an_image_that_is_not_complete_does_not_open() {
    let Some(place) = Place::new() else { return };
    // The metadata fits, and not the data, of which the size is not known before.
    let part = place.serve(512 << 10);
    let uri = part.uri();
    let incomplete = "marked as incomplete: run the command again";
    place.refused(&[(format!("convert -c -f raw -O qcow2 source.img {uri}"), incomplete)]);
    for line in [format!("info {uri}"), format!("check {uri}"), format!("map {uri}")] {
        for said in [place.theirs(&line), place.ours(&line)] {
            assert_ne!(said.code, Some(0), "{line}: {said:?}");
            assert!(said.stderr.contains("incomplete"), "{line}: {said:?}");
        }
    }
    assert!(part.is_alone_changed());
    place.ours(&format!("create -q -f qcow2 {uri} 1M")).success();
    assert_eq!(place.theirs(&format!("check {uri}")).code, Some(0));
}

#[test]
fn empty_images_are_made_in_exports_as_by_qemu() {
    let Some(place) = Place::new() else { return };
    let base = place.path("source.img").display().to_string();
    let part = place.serve(4 << 20);
    let uri = part.uri();
    for options in [
        "-f qcow2 URI 64M".to_owned(),
        "-f qcow2 -o cluster_size=1k,lazy_refcounts=on URI 1M".to_owned(),
        format!("-f qcow2 -b {base} -F raw URI"),
        format!("-f qcow2 -b {base} -F raw URI 8M"),
        "-f raw URI 1M".to_owned(),
    ] {
        let line = format!("create {}", options.replace("URI", uri));
        let expected = place.theirs(&line).success();
        assert_eq!(place.ours(&line).success(), expected, "{line}");
        let format = if options.contains("raw URI") { "raw" } else { "qcow2" };
        let info = place.theirs(&format!("info {uri}")).success();
        assert!(info.contains(&format!("file format: {format}\n")), "{line}: {info}");
        if format == "qcow2" {
            assert_eq!(place.theirs(&format!("check {uri}")).code, Some(0), "{line}");
        }
    }
    assert!(part.is_alone_changed());
}

#[test]
fn dd_writes_into_exports_as_qemu_does() {
    let Some(place) = Place::new() else { return };
    let written = |options: &str, is_theirs: bool| {
        let part = place.serve(6 << 20);
        let line = format!("dd -f raw {options} if=source.img of={}", part.uri());
        match is_theirs {
            true => place.theirs(&line).success(),
            false => place.ours(&line).success(),
        };
        assert!(part.is_alone_changed(), "{line}");
        drop(part.server);
        let bytes = std::fs::read(&part.file).expect("the file");
        bytes[START..][..part.size].to_vec()
    };
    for options in ["", "bs=64k", "bs=1M count=3 skip=1", "bs=1000 skip=64 count=576"] {
        assert!(written(options, true) == written(options, false), "{options}");
    }
    for options in ["-O qcow2 bs=1M count=2", "-O qcow2 bs=1000 skip=1 count=1100"] {
        for (name, is_theirs) in [("theirs", true), ("ours", false)] {
            std::fs::write(place.path(name), written(options, is_theirs)).expect("room");
        }
        place.theirs("compare -f qcow2 -F qcow2 theirs ours").success();
    }
    let part = place.serve(1 << 20);
    let uri = part.uri();
    let json = format!("json:{{'driver':'raw','file':{{'driver':'file','filename':'{uri}'}}}}");
    place.refused(&[
        (format!("dd bs=1M if=source.img of={uri}"), "it does not fit"),
        (format!("dd -O vmdk bs=64k count=1 if=source.img of={uri}"), "made in files only"),
        (format!("dd bs=1M count=1 if=source.img of={json}"), "convert -n --target-image-opts"),
        (format!("dd bs=1000 count=7 if=source.img of={uri}"), "sectors of 512 bytes"),
    ]);
    assert!(part.is_unchanged());
}

#[test]
fn info_shows_the_sizes_of_a_part_and_of_what_it_is_in() {
    let Some(place) = Place::new() else { return };
    let part = place.serve(4 << 20);
    place.theirs(&format!("create -q -f qcow2 {} 64M", part.uri())).success();
    let socket = part.server.socket().display();
    let nbd = format!("file.driver=nbd,file.server.type=unix,file.server.path={socket}");
    for image in [
        part.uri().to_owned(),
        format!("--image-opts driver=qcow2,{nbd}"),
        format!("--image-opts driver=raw,{nbd}"),
        format!("--image-opts driver=raw,offset=1M,size=1M,{nbd}"),
        "--image-opts driver=raw,offset=64k,size=1M,file.filename=source.img".to_owned(),
        "--image-opts driver=raw,offset=1000,file.filename=source.img".to_owned(),
    ] {
        let sizes = |said: Outcome| {
            let said = said.success();
            let of_size = |line: &&str| line.contains("virtual size") || line.contains("length");
            said.lines().filter(of_size).map(str::to_owned).collect::<Vec<_>>()
        };
        let line = format!("info {image}");
        let theirs = sizes(place.theirs(&line));
        assert_eq!(theirs.len(), 2, "{theirs:?}");
        assert_eq!(sizes(place.ours(&line)), theirs, "{line}");
    }
}
