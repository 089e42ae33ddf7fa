//! A few programs of others against a server in this process. The command line's tests go deeper.

use crate::support::{Random, TestServer, disk_file, image_export, output_of, run_peer};

#[test]
fn qemu_reads_and_writes_an_image_that_is_served() {
    let mut random = Random::new();
    let content = random.bytes(4 << 20);
    let file = disk_file(&content);
    let server = TestServer::of(image_export(file.path()));
    let Some(info) = run_peer("qemu-img", &["info", "--output=json", server.uri()]) else { return };
    assert!(info.contains("\"virtual-size\": 4194304"), "{info}");
    output_of(
        "qemu-img",
        &["compare", "-f", "raw", "-F", "raw", file.path().to_str().unwrap(), server.uri()],
    );
    let Some(output) = run_peer(
        "qemu-io",
        &[
            "-f",
            "raw",
            "-c",
            "write -P 7 4095 70000",
            "-c",
            "read -P 7 4095 70000",
            "-c",
            "write -z 1M 1M",
            "-c",
            "discard 2M 64k",
            "-c",
            "flush",
            server.uri(),
        ],
    ) else {
        return;
    };
    assert!(!output.contains("failed"), "{output}");
    let now = std::fs::read(file.path()).unwrap();
    assert!(now[..4095] == content[..4095] && now[4095..74_095] == vec![7; 70_000]);
    assert!(now[1 << 20..2 << 20] == vec![0; 1 << 20]);
    assert!(now[3 << 20..] == content[3 << 20..]);
}

#[test]
fn libnbds_programs_see_the_size_and_copy_every_byte() {
    let mut random = Random::new();
    let content = random.bytes((9 << 20) + 513);
    let file = disk_file(&content);
    let server = TestServer::of(image_export(file.path()));
    let Some(size) = run_peer("nbdinfo", &["--size", server.uri()]) else { return };
    assert_eq!(size.trim(), content.len().to_string());
    let map = output_of("nbdinfo", &["--map", server.uri()]);
    assert!(map.contains("data"), "{map}");
    let copy = disk_file(&[]);
    if run_peer("nbdcopy", &[server.uri(), copy.path().to_str().unwrap()]).is_none() {
        return;
    }
    assert!(std::fs::read(copy.path()).unwrap() == content);
    let zeroes = disk_file(&vec![0; content.len()]);
    output_of("nbdcopy", &[zeroes.path().to_str().unwrap(), server.uri()]);
    assert!(std::fs::read(file.path()).unwrap() == vec![0; content.len()]);
}
