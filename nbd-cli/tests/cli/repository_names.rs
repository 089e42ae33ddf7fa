//! The names of backups in a repository: those of new ones, and those that earlier versions made.

use bytes::Bytes;
use nbd_objects::repo::{BackupName, Id, NewBackup, Repository};
use nbd_objects::{Place, StoreSettings};

use crate::support::{Disk, nbd_cli, says};

/// Makes a backup under a name that new ones cannot have.
async fn back_up(repository: &str, name: &str, data: &[u8]) -> Id {
    let url = repository.parse().expect("a folder");
    let place = Place::open(&url, &StoreSettings::default()).expect("a place");
    let repository = Repository::open(place, None).await.expect("a repository");
    let mut new = NewBackup::new(BackupName::of_earlier_version(name));
    new.size = data.len() as u64;
    let mut session = repository.begin(new).await.expect("a session");
    session.data(Bytes::copy_from_slice(data)).await.expect("room");
    session.commit().await.expect("a backup").id
}

#[test]
fn name_that_no_address_can_have_is_refused_before_anything_is_opened() {
    let directory = tempfile::tempdir().expect("a directory");
    let missing = directory.path().join("missing").display().to_string();
    for name in ["", "web/vm1", "vm1@monday", "vm#1", "..", "a\nb", &"n".repeat(1025)] {
        let import = ["repo", "import", &missing, "--name", name, &missing];
        for command in [&["backup", "--name", name, &missing, &missing][..], &import] {
            says(nbd_cli(command), &["cannot be the name of a backup: a name has 1 to 1024 bytes"]);
        }
    }
}

#[test]
fn a_name_alone_forgets_nothing_because_it_may_be_meant_as_all_of_its_backups() {
    let disk = Disk::sparse();
    let repository = disk.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    for _ in 0..2 {
        nbd_cli(&["backup", "-q", "--name", "vm", disk.path(), &repository]).success();
    }
    let before = nbd_cli(&["repo", "list", &repository]).success();
    let forget = |what: &[&str]| nbd_cli(&[&["repo", "forget", &repository], what].concat());
    says(forget(&["vm@latest", "vm"]), &["'vm' is not one backup", "vm@latest", "prune --name vm"]);
    assert_eq!(nbd_cli(&["repo", "list", &repository]).success(), before);
    // What was forgotten is told as in the list.
    let newest = before.lines().last().expect("a backup");
    assert_eq!(forget(&["vm@latest"]).success(), format!("forgotten: {newest}\n"));
    let stats = nbd_cli(&["repo", "stats", &repository]).success();
    assert!(stats.contains("vm: 1 backup,"), "{stats}");
    let address = format!("backup:{repository}");
    says(nbd_cli(&["repo", "list", &address]), &["an address of backups", &repository]);
}

#[test]
fn backups_with_names_of_earlier_versions_are_listed_read_and_forgotten() {
    let disk = Disk::sparse();
    let repository = disk.beside("repository");
    nbd_cli(&["repo", "init", &repository]).success();
    let runtime = tokio::runtime::Runtime::new().expect("a runtime");
    let restored = disk.beside("restored");
    for (name, byte) in [("web/vm 1", 1), ("vm#1", 2), ("..", 3)] {
        let data = vec![byte; 70_000];
        let id = runtime.block_on(back_up(&repository, name, &data)).to_string();
        assert!(nbd_cli(&["repo", "list", &repository]).success().contains(name));
        let address = format!("backup:{repository}/@{id}");
        nbd_cli(&["restore", &address, &restored]).success();
        assert!(std::fs::read(&restored).expect("it is there") == data);
        std::fs::remove_file(&restored).expect("it is there");
        // An image on it names it in a way that leads back to it.
        let overlay = disk.beside(&format!("{id}.qcow2"));
        let create = ["image", "create", "-f", "qcow2", "-b", &address, "-F", "raw", &overlay];
        nbd_cli(&create).success();
        let compare = ["image", "compare", "--trust-image", "--second-format", "raw"];
        nbd_cli(&[&compare[..], &[&overlay, &address]].concat()).success();
        nbd_cli(&["repo", "export", &repository, &format!("@{id}"), &disk.beside(&id)]).success();
        nbd_cli(&["repo", "forget", &repository, &id]).success();
    }
    says(
        nbd_cli(&["restore", &format!("backup:{repository}/@0000"), "null:"]),
        &["no backup '@0000'"],
    );
    says(
        nbd_cli(&["restore", &format!("backup:{repository}/@latest"), "null:"]),
        &["no backup of"],
    );
}
