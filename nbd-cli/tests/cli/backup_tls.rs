//! A backup of a disk in use whose server requires TLS.

use serde_json::Value;

use crate::support::image::are_equal;
use crate::support::tls::Certificates;
use crate::support::{Disk, Server, nbd_cli, peer, says};
use crate::tools;

#[test]
fn a_disk_that_is_exported_over_tls_only_is_backed_up_through_the_control_socket() {
    tools!(qemu_img = "qemu-img");
    let Some(certificates) = Certificates::any() else { return };
    let directory = Disk::sparse();
    let (disk, control) = (directory.beside("disk.qcow2"), directory.beside("control"));
    peer(&qemu_img, &["convert", "-f", "raw", "-O", "qcow2", directory.path(), &disk]);
    let good = certificates.good();
    let good = good.to_str().expect("a plain name");
    let source = format!("vm={disk}");
    let server = Server::ours(&["--tls-certificates", good, "--control", &control, &source]);
    let backup = |more: &[&str]| {
        let arguments = ["backup", "--control", &control, "--export", "vm", "-B", "daily"];
        nbd_cli(&[&arguments[..], &["--verify=all", "--json"], more].concat())
    };
    // Who has no certificate gets no view, and nothing is left of the attempt.
    let nobody = certificates.nobody();
    let full = directory.beside("full.qcow2");
    let refused = backup(&["--tls-certificates", nobody.to_str().expect("a plain name"), &full]);
    says(refused, &["certificate"]);
    let listing = nbd_cli(&["control", &control, "--json", "list"]).success();
    let listing: Value = serde_json::from_str(&listing).expect("JSON");
    assert_eq!(listing["exports"].as_array().map(Vec::len), Some(1), "{listing}");
    assert_eq!(listing["exports"][0]["checkpoint"], Value::Null, "{listing}");

    backup(&["--restart", "--tls-certificates", good, &full]).success();
    are_equal(&qemu_img, directory.path(), &full);
    let second = directory.beside("second.qcow2");
    let report = backup(&["--tls-certificates", good, "--base", &full, &second]).success();
    let report: Value = serde_json::from_str(&report).expect("JSON");
    assert_eq!(report["copied"].as_u64(), Some(0), "{report}");
    server.end();
}
