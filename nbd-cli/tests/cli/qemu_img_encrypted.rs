//! The qemu-img form with encrypted images, beside QEMU's own, and what it says about them.

use std::process::Command;

use crate::support::qemu_img::{compare_all, ours, words};
use crate::support::run;
use crate::tools;

#[test]
fn encrypted_images_are_opened_with_their_secrets_alike() {
    const LUKS: &str = "--image-opts driver=luks,key-secret=s,file.filename=a.luks";
    const QCOW2: &str = "--image-opts driver=qcow2,encrypt.key-secret=s,file.filename=locked.qcow2";
    const JSON: &str = r#"json:{"driver":"qcow2","encrypt":{"format":"luks","key-secret":"s"},"file":{"driver":"file","filename":"locked.qcow2"}}"#;
    let cases = "
        map SECRET LUKS
        map SECRET QCOW2
        map SECRET JSON
        map --output=json SECRET LUKS
        map --output=json SECRET QCOW2
        map --output=json SECRET JSON
        map LUKS
        map QCOW2
        map WRONG LUKS
        map WRONG QCOW2
        check SECRET LUKS
        check SECRET QCOW2
        check SECRET JSON
        check --output=json SECRET QCOW2
        check WRONG QCOW2
        check QCOW2
        convert SECRET LUKS -O raw new.img => new.img
        convert SECRET QCOW2 -O qcow2 new.qcow2 => new.qcow2
        convert SECRET -O qcow2 JSON new.qcow2 => new.qcow2
        convert --object secret,id=s,format=base64,data=eA== -O raw JSON new.img => new.img
        convert --object secret,id=other,data=x -O raw JSON new.img
        convert WRONG -O raw JSON new.img
        convert -O raw JSON new.img
        convert SECRET -O raw locked.qcow2 new.img
        convert SECRET -f luks -O raw a.luks new.img
        convert -n SECRET --target-image-opts raw.img TOLUKS ; convert SECRET LUKS -O raw new.img => new.img
        convert -n SECRET --target-image-opts disk.qcow2 TOQCOW2 ; convert SECRET QCOW2 -O raw new.img => new.img
        convert -n --target-image-opts raw.img TOLUKS ; convert SECRET LUKS -O raw new.img => new.img
        convert -n WRONG --target-image-opts raw.img TOLUKS ; convert SECRET LUKS -O raw new.img => new.img
        convert -n WRONG --target-image-opts raw.img TOQCOW2
        convert -n SECRET -O luks raw.img a.luks
        compare SECRET JSON disk.qcow2
        rebase -u -b locked.qcow2 -F qcow2 top.qcow2 ; commit SECRET --image-opts TOP,backing.driver=qcow2,backing.encrypt.key-secret=s ; convert SECRET QCOW2 -O raw new.img => new.img
        rebase -u -b locked.qcow2 -F qcow2 top.qcow2 ; commit --image-opts TOP,backing.driver=qcow2
        commit --image-opts TOP,backing.driver=qcow2 => top.qcow2 disk.qcow2
        commit -d --image-opts TOP,backing.driver=qcow2,backing.file.filename=disk.qcow2 => top.qcow2 disk.qcow2
        map SECRET --image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=locked.qcow2
        map SECRET --image-opts driver=qcow2,encrypt.format=luks,encrypt.key-secret=s,file.filename=disk.qcow2
        map --image-opts driver=qcow2,encrypt.format=luks,file.filename=disk.qcow2
        map SECRET --image-opts driver=qcow2,encrypt.key-secret=s,file.filename=disk.qcow2
        compare SECRET JSON JSON
        compare SECRET LUKS driver=qcow2,encrypt.key-secret=s,file.filename=locked.qcow2
        compare WRONG JSON disk.qcow2
        measure -O qcow2 SECRET QCOW2
        info --object secret,id=s disk.qcow2
        info --object secret,id=s,data=x,file=y disk.qcow2
        info --object secret,id=s,file=nosuch disk.qcow2
        info --object secret,id=s,data=x,format=nosuch disk.qcow2
        info --object secret,id=s,data=x,nosuch=1 disk.qcow2
        info --object secret,data=x disk.qcow2
        info SECRET SECRET disk.qcow2
        ";
    let words = [
        ("SECRET", "--object secret,id=s,data=x"),
        ("WRONG", "--object secret,id=s,data=y"),
        ("TOLUKS", LUKS.trim_start_matches("--image-opts ")),
        ("TOQCOW2", QCOW2.trim_start_matches("--image-opts ")),
        ("TOP", "driver=qcow2,file.filename=top.qcow2"),
        ("LUKS", LUKS),
        ("QCOW2", QCOW2),
        ("JSON", JSON),
    ];
    let whole =
        words.iter().fold(cases.to_owned(), |text, (word, words)| text.replace(word, words));
    compare_all(&whole);
}

#[test]
fn an_encrypted_image_is_described_without_its_secret_which_is_never_shown() {
    tools!(qemu_img = "qemu-img");
    let directory = tempfile::tempdir().unwrap();
    let here = directory.path();
    let secret = "secret,id=s,data=never-shown";
    let create =
        format!("create -q --object {secret} -f luks -o key-secret=s,iter-time=10 a.luks 1M");
    let made = run(Command::new(qemu_img).args(words(&create)).current_dir(here));
    assert_eq!(made.code, Some(0), "{made:?}");
    let luks = "--image-opts driver=luks,key-secret=s,file.filename=a.luks";
    let described = ours(here, &words(&format!("info {luks}")));
    assert!(described.stdout.contains("encrypted: yes"), "{described:?}");
    assert_eq!(described.code, Some(0), "{described:?}");
    for (line, part) in [
        (format!("map --object {secret} {luks}"), "encrypted"),
        (format!("convert --object {secret} a.luks new.img"), "--object secret,id=ID"),
        (format!("map --object secret,id=s,data=never-shown-2 {luks}"), "key slots"),
        (format!("map --object {secret},data2=never-shown {luks}"), "data2"),
        (format!("map --object {secret},format=nosuch {luks}"), "nosuch"),
        (format!("map --object {secret},format=base64 {luks}"), "base64"),
        (format!("map {luks}"), "No secret with id 's'"),
    ] {
        let outcome = ours(here, &words(&line));
        assert_eq!(outcome.code, Some(1), "{line}: {outcome:?}");
        assert!(outcome.stderr.contains(part), "{line}: {outcome:?}");
        assert!(!format!("{outcome:?}").contains("never-shown"), "{line}: {outcome:?}");
    }
}
