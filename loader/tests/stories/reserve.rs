//! Stories about `loader reserve`.

use std::fs::{self, File};

use crate::images::{AREA, area_image, gpt_image, image, loader, patch, trailer};
use format::area::{HEAD, MIN_AREA, Reason, State};
use uuid::Uuid;

#[test]
fn reservation_writes_the_last_block_clears_the_beginning_and_nothing_else() {
    let (directory, path) = image("area", AREA);
    patch(&path, 0, &vec![0x5a; AREA as usize]);
    let before = fs::read(&path).unwrap();
    assert!(loader(&directory, &["reserve", "area"]).success);
    let after = fs::read(&path).unwrap();
    let trailer_at = AREA as usize - 4096;
    let head = HEAD as usize;
    assert!(after[..head].iter().all(|&byte| byte == 0));
    assert!(before[head..trailer_at] == after[head..trailer_at]);
    let trailer = trailer(&path);
    assert_eq!((trailer.state, trailer.area_size, trailer.sequence), (State::Empty, AREA, 0));
    assert_eq!(Uuid::from_bytes(trailer.uuid).get_version_num(), 4);
}

#[test]
fn reservation_says_uuid_sizes_and_the_option_for_the_payload() {
    let (directory, path) = image("area", AREA);
    let outcome = loader(&directory, &["reserve", "area"]);
    let uuid = Uuid::from_bytes(trailer(&path).uuid).to_string();
    let expected = "\
Reserved area for crash dumps.
  uuid          UUID
  size          8.0 MiB (8388608 bytes)
  largest core  7.9 MiB (8318976 bytes)
area is a file: it serves as the disk or partition of a virtual machine. For a file in a file \
system that the payload is to find, use --size.
To make the payload use this area and no other, load it with
  capture.to=disk:uuid=UUID
on its command line (kexec -p ... --append=\"...\").
";
    assert_eq!(outcome.stdout, expected.replace("UUID", &uuid));
    assert_eq!(outcome.stderr, "");
}

#[test]
fn sizes_that_cannot_hold_an_area_are_refused_with_the_way_out() {
    let (directory, _) = image("small", MIN_AREA - 4096);
    let outcome = loader(&directory, &["reserve", "--force", "small"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("needs at least 4.0 MiB"), "{}", outcome.stderr);

    let (directory, path) = image("odd", AREA + 512);
    let outcome = loader(&directory, &["reserve", "--force", "odd"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("no multiple of 4096"), "{}", outcome.stderr);
    assert!(outcome.stderr.contains("`truncate -s 8388608 odd`"), "{}", outcome.stderr);
    assert!(fs::read(path).unwrap().iter().all(|&byte| byte == 0));
}

#[test]
fn paths_that_are_no_device_and_no_file_are_refused() {
    let (directory, _) = image("area", AREA);
    let outcome = loader(&directory, &["reserve", "nothing"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("nothing does not exist"), "{}", outcome.stderr);
    for path in [".", "/dev/null"] {
        let outcome = loader(&directory, &["reserve", path]);
        assert!(!outcome.success);
        assert!(outcome.stderr.contains("neither a block device nor"), "{}", outcome.stderr);
    }
}

/// What the documents say about where each kind of content shows itself.
const CONTENTS: [(&str, u64, &[u8]); 20] = [
    ("ext", 0x438, b"\x53\xef"),
    ("XFS", 0, b"XFSB"),
    ("btrfs", 0x1_0040, b"_BHRfS_M"),
    ("FAT", 0x36, b"FAT16   "),
    ("FAT", 0x52, b"FAT32   "),
    ("NTFS", 3, b"NTFS    "),
    ("exFAT", 3, b"EXFAT   "),
    ("ISO 9660", 0x8001, b"CD001"),
    ("swap", 4086, b"SWAPSPACE2"),
    ("LUKS1", 0, b"LUKS\xba\xbe\0\x01"),
    ("LUKS2", 0, b"LUKS\xba\xbe\0\x02"),
    ("LVM2", 512, b"LABELONE\x01\0\0\0\0\0\0\0\0\0\0\0\x20\0\0\0LVM2 001"),
    ("RAID", AREA - 0x1_0000, b"\xfc\x4e\x2b\xa9"),
    ("RAID", AREA - 0x2000, b"\xfc\x4e\x2b\xa9"),
    ("RAID", 4096, b"\xfc\x4e\x2b\xa9"),
    ("ZFS", 0x2_0000, b"\x0c\xb1\xba\0\0\0\0\0"),
    ("bcachefs", 0x1018, b"\xc6\x85\x73\xf6\x66\xce\x90\xa9\xd9\x6a\x60\xcf\x80\x3d\xf7\xef"),
    ("F2FS", 0x400, b"\x10\x20\xf5\xf2"),
    ("SquashFS", 0, b"hsqs"),
    ("EROFS", 0x400, b"\xe2\xe1\xf5\xe0"),
];

#[test]
fn disk_with_a_file_system_or_container_on_it_is_left_alone() {
    for (name, offset, magic) in CONTENTS {
        let (directory, path) = image("disk", AREA);
        patch(&path, offset, magic);
        let before = fs::read(&path).unwrap();
        let outcome = loader(&directory, &["reserve", "disk"]);
        assert!(!outcome.success, "{name} was overwritten");
        assert!(outcome.stderr.contains(name), "{name}: {}", outcome.stderr);
        assert!(outcome.stderr.contains("--force"), "{}", outcome.stderr);
        assert!(fs::read(&path).unwrap() == before, "{name}: something was written");
    }
}

#[test]
fn disk_with_a_partition_table_is_left_alone() {
    let (directory, path) = gpt_image();
    let before = fs::read(&path).unwrap();
    let outcome = loader(&directory, &["reserve", "disk"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("GPT"), "{}", outcome.stderr);
    assert!(fs::read(&path).unwrap() == before);

    for lba_1 in [512, 4096] {
        let (directory, path) = image("disk", AREA);
        patch(&path, lba_1, b"EFI PART");
        assert!(!loader(&directory, &["reserve", "disk"]).success);
    }
    let (directory, path) = image("disk", AREA);
    patch(&path, 446, &[0x80, 0, 2, 0, 0x83, 0, 0, 0, 0, 8, 0, 0, 0, 0, 1, 0]);
    patch(&path, 510, &[0x55, 0xaa]);
    let outcome = loader(&directory, &["reserve", "disk"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("MBR"), "{}", outcome.stderr);
}

#[test]
fn force_gives_up_a_file_system_and_says_what_will_happen_to_it() {
    let (directory, path) = image("disk", AREA);
    patch(&path, 0, b"XFSB");
    let outcome = loader(&directory, &["reserve", "--force", "disk"]);
    assert!(outcome.success, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("Given up: it holds an XFS file system."));
    assert!(outcome.stdout.contains("will be overwritten at the next crash"));
    assert_eq!(trailer(&path).state, State::Empty);
}

#[test]
fn dump_that_was_not_saved_is_given_up_only_by_force() {
    for state in [State::Writing, State::Complete, State::Incomplete] {
        let (directory, path) = area_image(state, Reason::None);
        let before = fs::read(&path).unwrap();
        let outcome = loader(&directory, &["reserve", "area"]);
        assert!(!outcome.success);
        assert!(outcome.stderr.contains(&format!("(state {};", state.name())));
        assert!(fs::read(&path).unwrap() == before);

        assert!(loader(&directory, &["reserve", "--force", "area"]).success);
        assert_eq!(trailer(&path).state, State::Empty);
    }
}

#[test]
fn empty_area_reserved_again_keeps_its_uuid_although_superblocks_lie_in_the_old_core() {
    let (directory, path) = area_image(State::Empty, Reason::None);
    patch(&path, 0x1_0040, b"_BHRfS_M");
    let outcome = loader(&directory, &["reserve", "area"]);
    assert!(outcome.success, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("(kept from the earlier reservation)"));
    assert_eq!((trailer(&path).uuid, trailer(&path).sequence), (crate::images::UUID, 3));
}

#[test]
fn file_system_made_on_an_area_is_seen_behind_the_old_mark() {
    let (directory, path) = image("area", AREA);
    assert!(loader(&directory, &["reserve", "area"]).success);
    patch(&path, 0x438, b"\x53\xef");
    let outcome = loader(&directory, &["reserve", "area"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("an ext2, ext3 or ext4 file system"), "{}", outcome.stderr);
}

#[test]
fn damaged_mark_and_mark_of_another_area_are_given_up_only_by_force() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    patch(&path, AREA - 100, &[1]);
    let outcome = loader(&directory, &["reserve", "area"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("is damaged (checksum)"), "{}", outcome.stderr);

    let (directory, path) = area_image(State::Complete, Reason::None);
    let mut larger = vec![0; 1 << 20];
    larger.extend(fs::read(&path).unwrap());
    fs::write(&path, larger).unwrap();
    let outcome = loader(&directory, &["reserve", "area"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("the mark of a dump area of 8.0 MiB"), "{}", outcome.stderr);
    assert!(loader(&directory, &["reserve", "--force", "area"]).success);
    assert_eq!(trailer(&path).area_size, AREA + (1 << 20));
}

#[test]
fn area_that_another_loader_works_on_is_left_alone() {
    let (directory, path) = image("area", AREA);
    let other = File::open(&path).unwrap();
    other.lock().unwrap();
    let outcome = loader(&directory, &["reserve", "--force", "area"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("area is in use"), "{}", outcome.stderr);
    assert!(fs::read(path).unwrap().iter().all(|&byte| byte == 0));
}
