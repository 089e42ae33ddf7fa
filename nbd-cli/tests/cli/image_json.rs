//! `--json` of the commands that create and change images.

use serde_json::Value;

use crate::support::Disk;
use crate::support::image::ours;

#[test]
fn commands_that_change_an_image_say_what_it_is_like_then() {
    let disk = Disk::sparse();
    let (image, overlay) = (disk.beside("image.qcow2"), disk.beside("overlay.qcow2"));
    let made = ours(&["convert", "--json", "-O", "qcow2", disk.path(), &image]);
    assert_eq!((&made["format"], &made["virtual-size"]), (&"qcow2".into(), &(8 << 20).into()));
    assert_eq!(made, ours(&["info", "--json", &image]));
    let created =
        ours(&["create", "--json", "-f", "qcow2", "-b", "image.qcow2", "-F", "qcow2", &overlay]);
    assert_eq!(created["backing-filename"], "image.qcow2");
    let resized = ours(&["resize", "--json", &overlay, "+1M"]);
    assert_eq!(resized["virtual-size"], 9 << 20);
    let committed = ours(&["commit", "--json", &overlay]);
    assert_eq!(committed["backing-filename"], "image.qcow2");
    let rebased = ours(&["rebase", "--json", "--no-backing", &overlay]);
    assert_eq!(rebased["backing-filename"], Value::Null);
}

#[test]
fn commands_that_change_snapshots_list_them() {
    let disk = Disk::sparse();
    let image = disk.beside("image.qcow2");
    ours(&["create", "--json", "-f", "qcow2", &image, "1M"]);
    let names = |list: &Value| -> Vec<String> {
        let list = list.as_array().expect("a list").iter();
        list.map(|snapshot| snapshot["name"].as_str().expect("a name").to_owned()).collect()
    };
    let change = |what, name| names(&ours(&["snapshot", what, "--json", &image, name]));
    assert_eq!(change("create", "one"), ["one"]);
    assert_eq!(change("create", "two"), ["one", "two"]);
    assert_eq!(change("apply", "one"), ["one", "two"]);
    assert_eq!(change("delete", "one"), ["two"]);
}
