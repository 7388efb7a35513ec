//! What a disk already holds: partition tables, file systems and containers, known by their magic
//! bytes.
//!
//! A false "yes" costs the user a `--force`; a false "no" costs him his data. So a magic number is
//! enough, checksums are not asked for.
//!
//! Sources: include/uapi/linux/magic.h and the on-disk headers under fs/ and include/linux of
//! Linux 6.1; drivers/md/bcache; the LUKS1 and LUKS2 on-disk format specifications; UEFI 2.10
//! section 5; ECMA-107, ECMA-119 and ECMA-167; the OpenZFS on-disk format.

use crate::device::ReadAt;

/// Magic bytes at a fixed place: what they mean, where they are, what they are.
type Magic = (&'static str, u64, &'static [u8]);

/// Byte offsets count from the start of the device.
const MAGICS: &[Magic] = &[
    ("an ELF file, perhaps a saved dump", 0, b"\x7fELF"),
    ("a qcow2 disk image", 0, b"QFI\xfb"),
    ("a GPT partition table", 512, b"EFI PART"),
    ("a GPT partition table (4096-byte sectors)", 4096, b"EFI PART"),
    ("an ext2, ext3 or ext4 file system", 1024 + 56, &[0x53, 0xef]),
    ("an XFS file system", 0, b"XFSB"),
    ("a btrfs file system", 65536 + 64, b"_BHRfS_M"),
    (FAT, 54, b"FAT12   "),
    (FAT, 54, b"FAT16   "),
    (FAT, 54, b"FAT     "),
    (FAT, 82, b"FAT32   "),
    ("an NTFS file system", 3, b"NTFS    "),
    ("an exFAT file system", 3, b"EXFAT   "),
    ("an encrypted BitLocker volume", 3, b"-FVE-FS-"),
    ("an ISO 9660 file system", 32768 + 1, b"CD001"),
    ("a UDF file system", 32768 + 1, b"BEA01"),
    ("a swap area", 4096 - 10, b"SWAPSPACE2"),
    ("a swap area", 4096 - 10, b"SWAP-SPACE"),
    ("a swap area with a hibernation image", 4096 - 10, b"S1SUSPEND"),
    ("a swap area (16 KiB pages)", 16384 - 10, b"SWAPSPACE2"),
    ("a swap area (64 KiB pages)", 65536 - 10, b"SWAPSPACE2"),
    ("a LUKS1 encrypted volume", 0, b"LUKS\xba\xbe\x00\x01"),
    ("a LUKS2 encrypted volume", 0, b"LUKS\xba\xbe\x00\x02"),
    ("a LUKS2 encrypted volume (second header)", 16384, b"SKUL\xba\xbe"),
    ("an LVM2 physical volume", 0, b"LABELONE"),
    ("an LVM2 physical volume", 512, b"LABELONE"),
    ("an LVM2 physical volume", 1024, b"LABELONE"),
    ("an LVM2 physical volume", 1536, b"LABELONE"),
    ("a Linux RAID member (metadata 1.1)", 0, &MD),
    ("a Linux RAID member (metadata 1.2)", 4096, &MD),
    (
        "a bcachefs file system",
        4096 + 24,
        b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef",
    ),
    (
        "a bcache device",
        4096 + 24,
        b"\xc6\x85\x73\xf6\x4e\x1a\x45\xca\x82\x65\xf5\x7f\x48\xba\x6d\x81",
    ),
    ("an F2FS file system", 1024, &[0x10, 0x20, 0xf5, 0xf2]),
    ("an EROFS file system", 1024, &[0xe2, 0xe1, 0xf5, 0xe0]),
    ("a SquashFS file system", 0, b"hsqs"),
    ("a JFS file system", 32768, b"JFS1"),
    ("a ReiserFS file system", 65536 + 52, b"ReIsEr"),
    ("a GFS2 file system", 65536, &[0x01, 0x16, 0x19, 0x70]),
    ("a NILFS2 file system", 1024 + 6, &[0x34, 0x34]),
    ("an HFS+ file system", 1024, b"H+\0\x04"),
    ("an APFS container", 32, b"NXSB"),
    ("a dm-verity hash tree", 0, b"verity\0\0"),
    ("a Ceph BlueStore device", 0, b"bluestore block device"),
    ("a Stratis block device", 512 + 4, b"!Stra0tis\x86\xff\x02^\x41rh"),
];

const FAT: &str = "a FAT file system";

/// MD_SB_MAGIC, little-endian.
const MD: [u8; 4] = 0xa92b_4efc_u32.to_le_bytes();

/// Everything that `disk` seems to hold, in words such as "an XFS file system". Empty when nothing
/// is known there.
#[must_use]
pub fn found_on<Disk: ReadAt + ?Sized>(disk: &Disk) -> Vec<&'static str> {
    let mut found = Vec::new();
    if has_mbr_entries(disk) {
        found.push("an MBR partition table");
    }
    for &(name, offset, magic) in MAGICS {
        if disk.peek(offset, magic.len()).is_some_and(|bytes| bytes == magic) {
            found.push(name);
        }
    }
    if is_bare_fat(disk) && !found.contains(&FAT) {
        found.push(FAT);
    }
    found.extend(md_at_the_end(disk));
    if has_zfs_label(disk) {
        found.push("a ZFS pool member");
    }
    found
}

/// A boot signature and at least one entry that could be a partition. File systems have the boot
/// signature too, with program text where the entries would be.
fn has_mbr_entries<Disk: ReadAt + ?Sized>(disk: &Disk) -> bool {
    let Some(sector) = disk.peek(0, 512) else { return false };
    let entries = || sector[446..510].chunks_exact(16);
    sector[510..] == [0x55, 0xaa]
        && entries().all(|entry| matches!(entry[0], 0 | 0x80))
        && entries().any(|entry| entry[4] != 0 && entry[12..16] != [0; 4])
}

/// A FAT boot sector without the usual type text, known by its parameter block.
fn is_bare_fat<Disk: ReadAt + ?Sized>(disk: &Disk) -> bool {
    let Some(sector) = disk.peek(0, 512) else { return false };
    let word = |at: usize| u16::from_le_bytes([sector[at], sector[at + 1]]);
    sector[510..] == [0x55, 0xaa]
        && matches!(sector[0], 0xeb | 0xe9)
        && matches!(word(11), 512 | 1024 | 2048 | 4096)
        && sector[13].is_power_of_two()
        && word(14) != 0
        && matches!(sector[16], 1 | 2)
        && (sector[21] == 0xf0 || sector[21] >= 0xf8)
}

/// The RAID superblocks that lie at the end: 0.90 in the last whole 64 KiB but one, 1.0 about
/// 8 KiB before the end (drivers/md/md.c: MD_NEW_SIZE_SECTORS, super_1_load).
fn md_at_the_end<Disk: ReadAt + ?Sized>(disk: &Disk) -> Option<&'static str> {
    let is_md = |at: Option<u64>| {
        at.and_then(|at| disk.peek(at, MD.len())).is_some_and(|bytes| bytes == MD)
    };
    let old = (disk.size() & !0xffff).checked_sub(0x1_0000);
    let new = (disk.size() / 512).checked_sub(16).map(|sector| (sector & !7) * 512);
    if is_md(old) {
        Some("a Linux RAID member (metadata 0.90)")
    } else if is_md(new) {
        Some("a Linux RAID member (metadata 1.0)")
    } else {
        None
    }
}

/// ZFS keeps four labels of 256 KiB, two at either end; the second half of each is a ring of
/// uberblocks that begin with a magic number in the byte order of the writer.
fn has_zfs_label<Disk: ReadAt + ?Sized>(disk: &Disk) -> bool {
    const LABEL: u64 = 256 << 10;
    const RING: u64 = 128 << 10;
    const UBERBLOCK: u64 = 0x00ba_b10c;
    let end = disk.size() / LABEL * LABEL;
    let labels = [Some(0), Some(LABEL), end.checked_sub(2 * LABEL), end.checked_sub(LABEL)];
    labels.into_iter().flatten().any(|label| {
        let ring = disk.peek(label + RING, RING as usize).unwrap_or_default();
        ring.chunks_exact(1024).any(|slot| {
            slot[..8] == UBERBLOCK.to_le_bytes() || slot[..8] == UBERBLOCK.to_be_bytes()
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const SIZE: usize = 4 << 20;

    fn disk_with(patches: &[(u64, &[u8])]) -> Vec<u8> {
        let mut disk = vec![0; SIZE];
        for (offset, bytes) in patches {
            disk[*offset as usize..][..bytes.len()].copy_from_slice(bytes);
        }
        disk
    }

    #[test]
    fn empty_disk_and_tiny_disk_hold_nothing() {
        assert!(found_on(&disk_with(&[])[..]).is_empty());
        assert!(found_on(&[0u8; 100][..]).is_empty());
        assert!(found_on(&[][..]).is_empty());
    }

    #[test]
    fn every_magic_is_found_where_it_belongs() {
        for &(name, offset, magic) in MAGICS {
            let disk = disk_with(&[(offset, magic)]);
            assert!(found_on(&disk[..]).contains(&name), "{name} at {offset} was not found");
        }
    }

    #[test]
    fn mbr_counts_only_with_a_partition_in_it() {
        let boot = (510, &[0x55, 0xaa][..]);
        let mut entry = [0; 16];
        entry[4] = 0x83;
        entry[12] = 1;
        assert!(found_on(&disk_with(&[boot])[..]).is_empty());
        assert_eq!(found_on(&disk_with(&[boot, (462, &entry)])[..]), ["an MBR partition table"]);
        // Program text of a boot sector in place of the entries.
        assert!(found_on(&disk_with(&[boot, (446, &[0x31; 64])])[..]).is_empty());
    }

    #[test]
    fn fat_is_known_without_its_text() {
        let parameters = [0xeb, 0x3c, 0x90, 0, 0, 0, 0, 0, 0, 0, 0, 0, 2, 4, 1, 0, 2, 0, 2, 0, 0];
        let disk = disk_with(&[(0, &parameters), (21, &[0xf8]), (510, &[0x55, 0xaa])]);
        assert_eq!(found_on(&disk[..]), [FAT]);
    }

    #[test]
    fn raid_superblocks_at_the_end_are_found() {
        let disk = disk_with(&[(SIZE as u64 - 0x1_0000, &MD)]);
        assert_eq!(found_on(&disk[..]), ["a Linux RAID member (metadata 0.90)"]);
        let disk = disk_with(&[(SIZE as u64 - 8192, &MD)]);
        assert_eq!(found_on(&disk[..]), ["a Linux RAID member (metadata 1.0)"]);
    }

    #[test]
    fn zfs_is_found_by_any_label_in_either_byte_order() {
        let magic = 0x00ba_b10c_u64;
        for label in [0, 256 << 10, SIZE as u64 - (512 << 10), SIZE as u64 - (256 << 10)] {
            for bytes in [magic.to_le_bytes(), magic.to_be_bytes()] {
                let disk = disk_with(&[(label + (128 << 10) + 5 * 1024, &bytes)]);
                assert_eq!(found_on(&disk[..]), ["a ZFS pool member"]);
            }
        }
    }
}
