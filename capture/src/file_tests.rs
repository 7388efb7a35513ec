//! Files whose extents lie anywhere on a disk, in any order.

use std::vec;
use std::vec::Vec;

use format::area::{State, Trailer};

use super::*;
use crate::area::{Unusable, Wanted, find_in_file};
use crate::fake::{FakeDisk, FakeMachine};

const DISK: u64 = 16 << 20;
const SIZE: u64 = 5 << 20;
const UUID: [u8; 16] = *b"0123456789abcdef";
const EXTENTS: [Extent; 3] = [
    Extent { start: 9 << 20, size: 3 << 20 },
    Extent { start: 1 << 20, size: 4096 },
    Extent { start: 2 << 20, size: (2 << 20) - 4096 },
];

fn blob() -> Vec<u8> {
    let mut content = File::new(UUID, DISK, SIZE, EXTENTS.len() as u32).to_bytes().to_vec();
    EXTENTS.iter().for_each(|extent| content.extend(extent.to_bytes()));
    [&format::handoff::header(1, &content)[..], &content].concat()
}

/// Where on the disk a byte of the file is.
fn place(position: u64) -> usize {
    let mut begin = 0;
    for extent in EXTENTS {
        if position < begin + extent.size {
            return (extent.start + position - begin) as usize;
        }
        begin += extent.size;
    }
    panic!("beyond the file");
}

fn put(disk: &mut FakeDisk<'_>, position: u64, block: &[u8]) {
    let at = place(position);
    disk.bytes[at..at + block.len()].copy_from_slice(block);
}

/// Makes the file the area that `loader reserve` makes of it.
fn reserve(disk: &mut FakeDisk<'_>, trailer: Trailer) {
    let mut begin = 0;
    for extent in EXTENTS {
        for offset in extent.marks() {
            let (position, at) = (begin + offset, extent.start + offset);
            put(disk, position, &ExtentMark { uuid: UUID, position, at }.to_block());
        }
        begin += extent.size;
    }
    put(disk, SIZE - BLOCK, &trailer.to_block());
}

fn with_file<T>(disk: &mut FakeDisk<'_>, then: impl FnOnce(&mut FileDisk<'_>) -> T) -> Option<T> {
    let blob = blob();
    let read = |at: u64, into: &mut [u8]| {
        let from = blob.get(at as usize..).and_then(|bytes| bytes.get(..into.len()));
        from.map(|from| into.copy_from_slice(from)).is_some()
    };
    let handoff = Handoff::open(blob.len() as u64, &read).unwrap();
    let file = handoff.files().next().unwrap();
    FileDisk::new(disk, &handoff, file).map(|mut disk| then(&mut disk))
}

fn search(disk: &mut FakeDisk<'_>, wanted: Wanted) -> (bool, Result<(), Unusable>) {
    let (found, result) =
        with_file(disk, |file| find_in_file(file, &wanted, &mut [0; 4096])).unwrap();
    assert_eq!(found.area.is_some(), result.is_ok());
    (found.unsaved.is_some(), result)
}

fn empty() -> Trailer {
    Trailer { in_file: true, ..Trailer::empty(UUID, SIZE) }
}

#[test]
fn requests_go_where_the_file_system_put_the_blocks() {
    let mut machine = FakeMachine::default();
    machine.put_pattern(0x10_0000, SIZE);
    let mut disk = FakeDisk::new(DISK, &machine);
    let (from, size) = ((2 << 20) + 4096, 2 << 20);
    with_file(&mut disk, |file| {
        file.write_old(from, OldPhys(0x10_0000), size).unwrap();
        file.write(0, &[7; 4096]).unwrap();
        let mut back = vec![0; size as usize];
        file.read(from, &mut back).unwrap();
        assert_eq!(back, machine.bytes(0x10_0000, size).unwrap());
        assert_eq!(file.write(SIZE, &[0; 4096]), Err(DiskError::Range));
        assert_eq!(file.write_old(SIZE - 4096, OldPhys(0), 8192), Err(DiskError::Range));
    });
    assert_eq!(disk.bytes[place(0)..][..4096], [7; 4096]);
    for offset in (0..size).step_by(4096) {
        let block = &disk.bytes[place(from + offset)..][..4096];
        assert_eq!(block, machine.bytes(0x10_0000 + offset, 4096).unwrap(), "{offset:#x}");
    }
    let elsewhere = |at: &usize| !(0..SIZE).step_by(4096).any(|block| place(block) == *at);
    for at in (0..DISK as usize).step_by(4096).filter(elsewhere) {
        assert_eq!(disk.bytes[at..at + 4096], [0; 4096], "foreign block at {at:#x}");
    }
}

#[test]
fn file_with_all_its_marks_is_the_area() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(DISK, &machine);
    assert!(matches!(search(&mut disk, Wanted::default()), (false, Err(Unusable::Mark(_)))));
    reserve(&mut disk, empty());
    assert_eq!(search(&mut disk, Wanted::default()), (false, Ok(())));
    assert_eq!(
        search(&mut disk, Wanted { uuid: Some([1; 16]), ..Wanted::default() }),
        (false, Err(Unusable::Foreign(UUID)))
    );
    let mut other = FakeDisk::new(DISK + 4096, &machine);
    assert!(with_file(&mut other, |_| ()).is_none(), "a disk of another size");
}

#[test]
fn extent_that_is_no_longer_the_files_is_not_written_to() {
    let machine = FakeMachine::default();
    let ends = [0, (3 << 20) - 4096, 3 << 20, (3 << 20) + 4096];
    for position in ends {
        let mut disk = FakeDisk::new(DISK, &machine);
        reserve(&mut disk, empty());
        disk.bytes[place(position) + 100] ^= 1;
        let moved = Err(Unusable::Moved(position));
        assert_eq!(search(&mut disk, Wanted::default()), (false, moved));
        // The mark of another block is none.
        reserve(&mut disk, empty());
        put(&mut disk, position, &ExtentMark { uuid: UUID, position, at: 0 }.to_block());
        assert_eq!(search(&mut disk, Wanted::default()), (false, moved));
    }
}

#[test]
fn dump_in_a_file_stays_until_it_was_saved() {
    let machine = FakeMachine::default();
    let mut disk = FakeDisk::new(DISK, &machine);
    for state in [State::Writing, State::Complete, State::Incomplete] {
        reserve(&mut disk, Trailer { state, ..empty() });
        let wanted = Wanted { holdoff_min: Some(0), crash_time: Some(u64::MAX), uuid: None };
        assert_eq!(search(&mut disk, wanted), (true, Err(Unusable::Unsaved)));
    }
}
