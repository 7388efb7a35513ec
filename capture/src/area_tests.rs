//! Which disks are written to, and which are not.

use std::vec;
use std::vec::Vec;

use super::*;
use crate::fake::{FakeDisk, FakeMachine};

const SIZE: u64 = 8 << 20;
const UUID: [u8; 16] = *b"0123456789abcdef";

fn reserve(disk: &mut FakeDisk<'_>, start: u64, size: u64, trailer: Trailer) {
    let at = (start + Layout::new(size).unwrap().trailer) as usize;
    disk.bytes[at..at + BLOCK as usize].copy_from_slice(&trailer.to_block());
}

/// What `find` says of a disk: the area's start, or whatever was refused.
fn search(disk: &mut FakeDisk<'_>, uuid: Option<[u8; 16]>) -> Result<u64, Vec<(u32, Unusable)>> {
    search_for(disk, &Wanted { uuid, ..Wanted::default() })
}

fn search_for(disk: &mut FakeDisk<'_>, wanted: &Wanted) -> Result<u64, Vec<(u32, Unusable)>> {
    let mut refused = Vec::new();
    let found = find(disk, wanted, &mut [0; 8192], &mut |part, why| refused.push((part, why)));
    found.area.map(|area| area.start).ok_or(refused)
}

/// Puts a GPT with partitions (first, last) on the disk, and gives its table a right checksum.
fn partition(disk: &mut FakeDisk<'_>, partitions: &[(u64, u64)]) {
    let unit = disk.sector_size as usize;
    let sectors = disk.bytes.len() / unit;
    let mut table = vec![0; 128 * 128];
    for (index, (first, last)) in partitions.iter().enumerate() {
        let entry = &mut table[index * 128..][..128];
        entry[..32].fill(0xaa);
        entry[32..40].copy_from_slice(&first.to_le_bytes());
        entry[40..48].copy_from_slice(&last.to_le_bytes());
    }
    let mut header = vec![0; 92];
    header[..8].copy_from_slice(b"EFI PART");
    header[8..16].copy_from_slice(&[0, 0, 1, 0, 92, 0, 0, 0]);
    header[24] = 1;
    let last_usable = sectors as u64 - 34;
    for (at, field) in [(40, 34), (48, last_usable), (72, 2)] {
        header[at..at + 8].copy_from_slice(&field.to_le_bytes());
    }
    for (at, field) in [(80, 128), (84, 128), (88, format::crc32(&table))] {
        header[at..at + 4].copy_from_slice(&field.to_le_bytes());
    }
    let crc = format::crc32(&header);
    header[16..20].copy_from_slice(&crc.to_le_bytes());
    disk.bytes[unit..unit + 92].copy_from_slice(&header);
    disk.bytes[2 * unit..2 * unit + table.len()].copy_from_slice(&table);
}

/// Puts an MBR with one primary partition and, in an extended one, a logical one on the disk.
fn partition_by_mbr(disk: &mut FakeDisk<'_>, primary: (u32, u32), logical: (u32, u32)) {
    let unit = disk.sector_size as usize;
    let before = 64;
    let extended = (logical.0 - before, logical.1 + before);
    let tables: [(u32, &[_]); 2] =
        [(0, &[(0x83, primary), (0x05, extended)]), (extended.0, &[(0x83, (before, logical.1))])];
    for (lba, entries) in tables {
        let sector = &mut disk.bytes[lba as usize * unit..][..512];
        for ((kind, (first, sectors)), entry) in entries.iter().zip(sector[446..].chunks_mut(16)) {
            entry[4] = *kind;
            entry[8..12].copy_from_slice(&first.to_le_bytes());
            entry[12..].copy_from_slice(&sectors.to_le_bytes());
        }
        sector[510..].copy_from_slice(&[0x55, 0xaa]);
    }
}

#[test]
fn mbr_partitions_are_searched_logical_ones_too() {
    let machine = FakeMachine::default();
    for unit in [512, 4096] {
        let sectors = |bytes: u64| u32::try_from(bytes / unit).unwrap();
        let mut disk = FakeDisk::new(4 * SIZE, &machine);
        disk.sector_size = unit as u32;
        let (first, second) = (1 << 20, SIZE + (2 << 20));
        let (primary, logical) =
            ((sectors(first), sectors(SIZE)), (sectors(second), sectors(SIZE)));
        partition_by_mbr(&mut disk, primary, logical);
        let none = Unusable::Mark(TrailerError::Magic);
        assert_eq!(search(&mut disk, None), Err(vec![(1, none), (5, none)]));
        reserve(&mut disk, second, SIZE, Trailer::empty(UUID, SIZE));
        assert_eq!(search(&mut disk, None), Ok(second));
        reserve(&mut disk, first, SIZE, Trailer::empty([1; 16], SIZE));
        assert_eq!(search(&mut disk, None), Ok(first));
        assert_eq!(search(&mut disk, Some(UUID)), Ok(second));
    }
}

#[test]
fn disk_with_a_mark_is_found_and_its_uuid_is_what_picks_it() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    reserve(&mut disk, 0, SIZE, Trailer::empty(UUID, SIZE));
    assert_eq!(search(&mut disk, None), Ok(0));
    assert_eq!(search(&mut disk, Some(UUID)), Ok(0));
    assert_eq!(search(&mut disk, Some([1; 16])), Err(vec![(0, Unusable::Foreign(UUID))]));
}

#[test]
fn disk_without_a_valid_mark_is_refused() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    let mark = |error| Err(vec![(0, Unusable::Mark(error))]);
    assert_eq!(search(&mut disk, None), mark(TrailerError::Magic));
    reserve(&mut disk, 0, SIZE, Trailer::empty(UUID, SIZE));
    let flipped = SIZE as usize - 4096 + 300;
    disk.bytes[flipped] ^= 4;
    assert_eq!(search(&mut disk, None), mark(TrailerError::Checksum));
    disk.bytes[flipped] ^= 4;
    disk.bytes.truncate(1 << 20);
    let tiny = Unusable::Size(1 << 20);
    assert_eq!(search(&mut disk, None), Err(vec![(0, tiny)]));
}

#[test]
fn mark_for_an_area_of_another_size_is_refused() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    reserve(&mut disk, 0, SIZE, Trailer::empty(UUID, SIZE * 2));
    let resized = Unusable::Resized { reserved: SIZE * 2, found: SIZE };
    assert_eq!(search(&mut disk, None), Err(vec![(0, resized)]));
}

#[test]
fn area_that_somebody_uses_for_something_else_is_refused() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    reserve(&mut disk, 0, SIZE, Trailer::empty(UUID, SIZE));
    // Magic numbers of LUKS, of an md array and of btrfs.
    for (at, magic) in
        [(0, &b"LUKS\xba\xbe"[..]), (4096, b"\xfc\x4e\x2b\xa9"), (65600, b"_BHRfS_M")]
    {
        let place = at..at + magic.len();
        disk.bytes[place.clone()].copy_from_slice(magic);
        assert_eq!(search(&mut disk, None), Err(vec![(0, Unusable::Reused)]));
        disk.bytes[place].fill(0);
    }
    disk.bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
    assert_eq!(search(&mut disk, None), Ok(0));
}

#[test]
fn unsaved_dump_is_not_overwritten_but_a_partial_one_is() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    for (state, stays) in [
        (State::Complete, true),
        (State::Writing, false),
        (State::Incomplete, false),
        (State::Empty, false),
    ] {
        let trailer = Trailer { state, ..Trailer::empty(UUID, SIZE) };
        reserve(&mut disk, 0, SIZE, trailer);
        let expected = if stays { Err(vec![(0, Unusable::Unsaved)]) } else { Ok(0) };
        assert_eq!(search(&mut disk, None), expected, "{state:?}");
        let found = find(&mut disk, &Wanted::default(), &mut [0; 8192], &mut |_, _| {});
        assert_eq!(found.unsaved.map(|area| area.trailer), stays.then_some(trailer));
    }
}

#[test]
fn unsaved_dump_stays_for_as_long_as_it_is_held_off() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(SIZE, &machine);
    let wanted = |holdoff_min, crash_time| Wanted { uuid: None, holdoff_min, crash_time };
    for (state, crashed, holdoff, now, stays) in [
        (State::Complete, 1000, Some(10), Some(1599), true),
        (State::Complete, 1000, Some(10), Some(1600), false),
        (State::Complete, 1000, Some(10), Some(10), true),
        (State::Complete, 1000, Some(10), None, true),
        (State::Complete, 0, Some(10), Some(1 << 40), true),
        (State::Complete, 1000, None, Some(1 << 40), true),
        (State::Complete, 1000, Some(u64::MAX), Some(1 << 40), true),
        (State::Writing, 1000, Some(10), Some(1599), true),
        (State::Incomplete, 1000, Some(10), Some(1600), false),
        (State::Incomplete, 1000, Some(10), None, false),
        (State::Empty, 1000, Some(10), Some(1001), false),
    ] {
        let trailer = Trailer { state, crash_time: crashed, ..Trailer::empty(UUID, SIZE) };
        reserve(&mut disk, 0, SIZE, trailer);
        let found = search_for(&mut disk, &wanted(holdoff, now));
        assert_eq!(found.is_err(), stays, "{state:?} of {crashed} at {now:?}, {holdoff:?}");
    }
    let reason = Reason::NoRoom;
    let trailer = Trailer { state: State::Incomplete, reason, ..Trailer::empty(UUID, SIZE) };
    reserve(&mut disk, 0, SIZE, Trailer { crash_time: 1000, ..trailer });
    assert_eq!(search_for(&mut disk, &wanted(Some(10), Some(1001))), Ok(0), "a card alone");
}

#[test]
fn marked_partition_is_found_among_others() {
    for (sector_size, first, last) in [(512, 4096, 4096 + (SIZE / 512) - 1), (4096, 512, 2559)] {
        let machine = FakeMachine::default();
        let mut disk = FakeDisk::new(4 * SIZE, &machine);
        disk.sector_size = sector_size;
        partition(&mut disk, &[(64, 255), (first, last)]);
        let start = first * u64::from(sector_size);
        let size = (last + 1 - first) * u64::from(sector_size);
        reserve(&mut disk, start, size, Trailer::empty(UUID, size));
        assert_eq!(search(&mut disk, Some(UUID)), Ok(start), "sectors of {sector_size}");
        let refused = search(&mut disk, Some([1; 16])).unwrap_err();
        assert_eq!(refused[1], (2, Unusable::Foreign(UUID)));
    }
}

#[test]
fn damaged_partition_table_is_not_believed() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(4 * SIZE, &machine);
    partition(&mut disk, &[(4096, 4096 + (SIZE / 512) - 1)]);
    reserve(&mut disk, 4096 * 512, SIZE, Trailer::empty(UUID, SIZE));
    assert_eq!(search(&mut disk, None), Ok(4096 * 512));
    disk.bytes[1024 + 128 * 5] = 1;
    assert!(search(&mut disk, None).is_err());
}
