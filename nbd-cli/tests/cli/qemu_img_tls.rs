//! The qemu-img form and servers with TLS: the credentials of `--object`, as QEMU's own has them.

use std::path::Path;
use std::process::Command;

use crate::support::qemu_img::{ours, words};
use crate::support::tls::credentials::{Maker, add_psk_user};
use crate::support::tls::{Certificates, TlsServer};
use crate::support::{Outcome, run};
use crate::tools;

/// Runs a line in place of QEMU's qemu-img and with it, and compares success and standard output.
fn compare(directory: &Path, line: &str, succeeds: bool) -> Outcome {
    let words = words(line);
    let theirs = run(Command::new("qemu-img").args(&words).current_dir(directory));
    let ours = ours(directory, &words);
    let code = Some(if succeeds { 0 } else { 1 });
    assert_eq!((ours.code, theirs.code), (code, code), "{line}:\n{ours:?}\n{theirs:?}");
    let size = |text: &str| text.lines().filter(|it| !it.contains("size:")).collect::<String>();
    assert_eq!(size(&ours.stdout), size(&theirs.stdout), "{line}");
    ours
}

#[test]
fn certificates_open_the_exports_whose_options_name_them_and_no_others() {
    tools!(_qemu_img = "qemu-img");
    let Some(certificates) = Certificates::any() else { return };
    let maker = Maker::ALL.into_iter().find(|maker| maker.is_installed()).expect("made above");
    let good = certificates.good().display().to_string();
    let stranger = certificates.stranger(maker).display().to_string();
    let server = TlsServer::start(&["--tls-certificates", &good]);
    let here = certificates.path("");
    let socket = server.server.socket().display();
    let export = format!("driver=nbd,server.type=unix,server.path={socket}");
    let object =
        |directory| format!("--object tls-creds-x509,id=t,endpoint=client,dir={directory}");
    let (known, unknown) = (object(&good), object(&stranger));
    let image = format!("--image-opts {export},tls-creds=t,tls-hostname=localhost");
    for (line, succeeds) in [
        (format!("info {known} {image}"), true),
        (format!("map --output=json {known} {image}"), true),
        (format!("compare {known} {image} {export},tls-creds=t,tls-hostname=localhost"), true),
        (format!("info {unknown} {image}"), false),
        (format!("info {image}"), false),
        (format!("info {known} --image-opts {export}"), false),
        (format!("info {known} --image-opts {export},tls-creds=t"), false),
        (format!("info {known} --image-opts {export},tls-creds=t,tls-hostname=other"), false),
        (format!("info {known} --image-opts {export},tls-hostname=localhost"), false),
        (format!("info {known} --image-opts {export},tls-creds=u,tls-hostname=localhost"), false),
        (
            format!(
                "info {known} json:{{'driver':'nbd','server':{{'type':'unix','path':'{socket}'}},'tls-creds':'t','tls-hostname':'localhost'}}"
            ),
            true,
        ),
        (format!("info {} {image}", known.replace("client", "server")), false),
        (format!("info --object secret,id=t,data=x {image}"), false),
        (format!("convert {known} -O raw {image} copy.img"), true),
    ] {
        compare(&here, &line, succeeds);
    }
    server.disk.assert_equals(here.join("copy.img"));
    // The credentials of the source are not those of the target.
    std::fs::write(here.join("new.img"), vec![9; 8 << 20]).expect("room");
    let target = format!("{export},tls-creds=t,tls-hostname=localhost");
    compare(&here, &format!("convert {known} -n --target-image-opts new.img {target}"), true);
    compare(&here, &format!("convert {known} -n --target-image-opts new.img {export}"), false);
    compare(
        &here,
        &format!("compare {known} --image-opts driver=raw,file.filename=new.img {target}"),
        true,
    );
}

#[test]
fn a_key_opens_an_export_below_an_image_as_well() {
    tools!(_qemu_img = "qemu-img", _psktool = "psktool");
    let directory = tempfile::tempdir().expect("a directory");
    let here = directory.path();
    let keys = here.join("keys.psk");
    add_psk_user(&keys, "alice");
    add_psk_user(&keys, "qemu");
    let server = TlsServer::start(&["--tls-psk", keys.to_str().expect("a plain name")]);
    let socket = server.server.socket().display();
    let create = words("create -q -f qcow2 up.qcow2 8M");
    run(Command::new("qemu-img").args(create).current_dir(here)).success();
    let object = format!("--object tls-creds-psk,id=t,endpoint=client,dir={}", here.display());
    let below = format!(
        "driver=qcow2,file.filename=up.qcow2,backing.driver=raw,backing.file.driver=nbd,\
         backing.file.server.type=unix,backing.file.server.path={socket}"
    );
    for (object, credentials, succeeds) in [
        (format!("{object},username=alice"), ",backing.file.tls-creds=t", true),
        (object.clone(), ",backing.file.tls-creds=t", true),
        (format!("{object},username=bob"), ",backing.file.tls-creds=t", false),
        (object, "", false),
    ] {
        let line = format!("convert {object} -O raw --image-opts {below}{credentials} copy.img");
        compare(here, &line, succeeds);
        if succeeds {
            server.disk.assert_equals(here.join("copy.img"));
        }
    }
    // The name in an image is not what the user has said.
    let name = format!("json:{{'driver':'nbd','path':'{socket}','tls-creds':'t'}}");
    let line = format!("create -q -f qcow2 -u -b {name} -F raw named.qcow2 8M");
    run(Command::new("qemu-img").args(words(&line)).current_dir(here)).success();
    let refused = ours(here, &words("map named.qcow2"));
    assert!(refused.stderr.contains("tls-creds") && refused.code == Some(1), "{refused:?}");
}
