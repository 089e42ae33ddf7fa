//! Detects the content of an export by its first bytes.
//!
//! nbdinfo asks file(1). This detects only the usual beginnings of virtual disks and calls
//! everything else "data".

use nbd_client::Connector;

/// End of the magic number of an ISO 9660 file system.
const HEAD_LENGTH: u64 = 32_768 + 6;

/// Reads the beginning of an export and names the kind of its content. Returns `None` on failure:
/// the rest of a report is still valid.
///
/// # Cancel safety
///
/// Safe: the connection is closed.
pub async fn content_of(connector: &Connector, export_name: &str) -> Option<&'static str> {
    let client = connector.clone().export_name(export_name).connect().await.ok()?;
    let block = u64::from(client.info().minimum_block_size());
    let length = HEAD_LENGTH.next_multiple_of(block).min(client.info().size);
    let head = client.read(0..length).await.ok();
    // The bytes have arrived; an error while closing the connection does not matter.
    let _ = client.disconnect().await;
    head.map(|head| guess(&head))
}

/// Contents by the bytes at an offset; the first that fits counts.
const CONTENTS: [(usize, &[u8], &str); 10] = [
    (0, b"QFI\xfb\x00\x00\x00\x03", "QEMU QCOW2 Image (v3)"),
    (0, b"QFI\xfb\x00\x00\x00\x02", "QEMU QCOW2 Image (v2)"),
    (0, b"# Disk DescriptorFile", "VMware4 disk image description"),
    (0, b"KDMV", "VMware4 disk image"),
    (0, b"vhdxfile", "Microsoft Disk Image eXtended"),
    (0, b"LUKS\xba\xbe", "LUKS encrypted file"),
    (32_769, b"CD001", "ISO 9660 CD-ROM filesystem data"),
    (1080, b"\x53\xef", "Linux ext2/ext3/ext4 filesystem data"),
    (0, b"XFSB", "SGI XFS filesystem data"),
    (510, b"\x55\xaa", "DOS/MBR boot sector"),
];

fn guess(head: &[u8]) -> &'static str {
    if head.is_empty() {
        return "empty";
    }
    let fits = |(offset, magic, _): &&(usize, &[u8], _)| {
        head.get(*offset..).is_some_and(|rest| rest.starts_with(magic))
    };
    CONTENTS.iter().find(fits).map_or("data", |(.., content)| content)
}

#[cfg(test)]
mod tests {
    use super::guess;

    #[test]
    fn common_beginnings_are_recognised_and_everything_else_is_data() {
        let mut boot_sector = vec![0; 512];
        boot_sector[510..].copy_from_slice(b"\x55\xaa");
        for (head, content) in [
            (&b""[..], "empty"),
            (b"x", "data"),
            (&[0; 40_000], "data"),
            (&boot_sector, "DOS/MBR boot sector"),
            (&boot_sector[..511], "data"),
            (b"QFI\xfb\0\0\0\x03....", "QEMU QCOW2 Image (v3)"),
        ] {
            assert_eq!(guess(head), content);
        }
    }
}
