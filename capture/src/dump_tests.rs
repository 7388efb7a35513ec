//! Whole dumps from a fake machine to a fake disk, read back with goblin.

use std::string::String;
use std::vec::Vec;

use format::area::TrailerError;
use format::note::Notes;
use goblin::elf64::program_header::{PT_LOAD, PT_NOTE, ProgramHeader, SIZEOF_PHDR};

use format::CRC_CHUNK;
use format::area::Layout;

use super::*;
use crate::OldPhys;
use crate::architecture::Architecture;
use crate::area::{Wanted, find};
use crate::core_file::E_FLAGS;
use crate::fake::{FakeDisk, FakeMachine, LIMIT, elfcorehdr64, note};

const AT: u64 = 0x3b00_0000;
const DIRECT_MAP: u64 = 0xffff_8880_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8200_0000;
const AREA: u64 = 16 << 20;
const UUID: [u8; 16] = *b"0123456789abcdef";

/// A machine with low memory that kexec moved, of an odd size, and 6 MiB at 1 MiB that hold the
/// kernel image.
fn machine() -> FakeMachine {
    let mut machine = FakeMachine::default();
    machine.put_pattern(0x3a00_0000, 0x9_fc00);
    machine.put_pattern(0x10_0000, 6 << 20);
    machine.put(0x100_0000, note(b"CORE", 1, &[7; 336]));
    let info = note(
        b"VMCOREINFO",
        0,
        b"OSRELEASE=6.1.0\nNUMBER(phys_base)=-31457280\nCRASHTIME=1700000000\n",
    );
    let info_size = info.len() as u64;
    machine.put(0x100_2000, info);
    machine.put(
        AT,
        elfcorehdr64(&[
            (4, 0x100_0000, 0, 0x100_0000, machine.bytes(0x100_0000, 356).unwrap().len() as u64),
            (4, 0x100_2000, 0, 0x100_2000, info_size),
            (1, 0x20_0000, IMAGE, 0x20_0000, 0x10_0000),
            (1, 0x3a00_0000, DIRECT_MAP, 0, 0x9_fc00),
            (1, 0x10_0000, DIRECT_MAP + 0x10_0000, 0x10_0000, 6 << 20),
        ]),
    );
    machine
}

struct Dumped {
    bytes: Vec<u8>,
    log: Vec<Option<u64>>,
    result: Result<Complete, Error>,
    said: Vec<String>,
}

/// Dumps the machine to a fresh area; `spoil` may break machine and disk before.
fn dump(area_size: u64, spoil: impl Fn(&mut FakeMachine, &mut FakeDisk<'_>)) -> Dumped {
    dump_with(area_size, spoil, |_| {})
}

/// Likewise; `change` changes what is believed of the old memory.
fn dump_with(
    area_size: u64,
    spoil: impl Fn(&mut FakeMachine, &mut FakeDisk<'_>),
    change: impl Fn(&mut OldMemory),
) -> Dumped {
    let (old_machine, mut machine) = (machine(), machine());
    let mut disk = FakeDisk::new(area_size, &old_machine);
    let at = area_size as usize - PAGE;
    disk.bytes[at..].copy_from_slice(&Trailer::empty(UUID, area_size).to_block());
    spoil(&mut machine, &mut disk);

    let mut buffers = Buffers::new();
    // Blocks are made in it: nothing that was in it before may get to the disk.
    buffers.blocks.page.fill(0xee);
    let mut old = OldMemory::new();
    let headers = Elfcorehdr::open(&mut machine, Architecture::X86_64, OldPhys(AT), LIMIT).unwrap();
    headers.collect(&mut machine, buffers.notes(), &mut old).unwrap();
    change(&mut old);
    let area = find(&mut disk, &Wanted::default(), buffers.notes(), &mut |_, _| {}).area.unwrap();
    let source = Source { headers: &headers, old: &old };
    let payload = Payload { version: "tinykdump test", memory_used: 12345 };
    let result = write(&mut machine, &mut disk, &area, source, payload, &mut buffers);
    Dumped { bytes: disk.bytes, log: disk.log, result, said: machine.said }
}

impl Dumped {
    fn headers(&self) -> Vec<ProgramHeader> {
        let count = u16::from_le_bytes([self.bytes[56], self.bytes[57]]);
        (0..usize::from(count))
            .map(|index| {
                let mut header = ProgramHeader::default();
                let bytes = &self.bytes[64 + index * SIZEOF_PHDR..][..SIZEOF_PHDR];
                plain::copy_from_bytes(&mut header, bytes).unwrap();
                header
            })
            .collect()
    }

    fn segment(&self, header: &ProgramHeader) -> &[u8] {
        &self.bytes[header.p_offset as usize..][..header.p_filesz as usize]
    }

    fn record(&self) -> Record {
        let notes = self.headers()[0];
        let mut notes = Notes::new(self.segment(&notes));
        Record::from_desc(notes.find(|note| note.kind == record::KIND).unwrap().desc).unwrap()
    }

    fn trailer(&self) -> Result<Trailer, TrailerError> {
        Trailer::parse(&self.bytes[self.bytes.len() - PAGE..])
    }

    /// Checks every word of the CRC32 table against the bytes it stands for.
    fn assert_checksums(&self, complete: &Complete) {
        let layout = Layout::new(self.bytes.len() as u64).unwrap();
        let core = &self.bytes[..complete.size as usize];
        let expected: Vec<u8> = core
            .chunks(CRC_CHUNK as usize)
            .flat_map(|chunk| format::crc32(chunk).to_le_bytes())
            .collect();
        let table = &self.bytes[layout.crc_table as usize..][..expected.len()];
        assert!(table == expected);
        assert_eq!(self.trailer().unwrap().crc_table_crc, format::crc32(table));
    }
}

#[test]
fn every_byte_of_memory_is_in_the_core_where_its_header_says() {
    let dumped = dump(AREA, |_, _| {});
    let complete = dumped.result.unwrap();
    let machine = machine();
    let headers = dumped.headers();
    let kinds: Vec<u32> = headers.iter().map(|header| header.p_type).collect();
    assert_eq!(kinds, [PT_NOTE, PT_LOAD, PT_LOAD, PT_LOAD]);
    for (header, (from, virt, phys)) in headers[1..].iter().zip([
        (0x20_0000, IMAGE, 0x20_0000),
        (0x3a00_0000, DIRECT_MAP, 0),
        (0x10_0000, DIRECT_MAP + 0x10_0000, 0x10_0000),
    ]) {
        assert_eq!((header.p_vaddr, header.p_paddr, header.p_align), (virt, phys, 0));
        assert_eq!(header.p_offset % 4096, phys % 4096);
        assert!(dumped.segment(header) == machine.bytes(from, header.p_filesz).unwrap());
    }
    let end = headers[3].p_offset + headers[3].p_filesz;
    assert_eq!(end.next_multiple_of(4096), complete.size);
    dumped.assert_checksums(&complete);
}

#[test]
fn complete_dump_says_so_everywhere() {
    let dumped = dump(AREA, |_, _| {});
    let complete = dumped.result.unwrap();
    assert_eq!(dumped.bytes[E_FLAGS], 0);
    let record = dumped.record();
    assert_eq!((record.complete.get(), record.pages_unreadable.get()), (1, 0));
    assert_eq!(record.pages_read.get(), 0xa0 + (6 << 8));
    assert_eq!((record.payload(), record.memory_used.get()), ("tinykdump test", 12345));
    let trailer = dumped.trailer().unwrap();
    assert_eq!((trailer.state, trailer.reason), (State::Complete, Reason::None));
    assert_eq!((trailer.core_size, trailer.sequence), (complete.size, 1));
    assert!(dumped.said[0].contains("writing 7 MiB in 2 ranges"), "{:?}", dumped.said);
}

#[test]
fn notes_are_cpu_notes_vmcoreinfo_card_and_ours_last() {
    let dumped = dump(AREA, |_, _| {});
    let notes = dumped.headers()[0];
    let found: Vec<_> = Notes::new(dumped.segment(&notes)).collect();
    let names: Vec<_> = found.iter().map(|note| (note.name, note.kind)).collect();
    let card = (record::NAME, record::CARD_KIND);
    assert_eq!(names, [(&b"CORE"[..], 1), (b"VMCOREINFO", 0), card, (record::NAME, record::KIND)]);
    assert!(found[2].desc.starts_with(b"kernel   6.1.0\n"));
    let trailer = dumped.trailer().unwrap();
    assert_eq!(format::crc32(found[2].desc), trailer.card_crc, "the same as in the card block");
    assert!(notes.p_offset + notes.p_filesz <= dumped.headers()[2].p_offset);
}

#[test]
fn trailer_says_writing_before_anything_else_and_complete_after_everything_else() {
    let dumped = dump(AREA, |_, _| {});
    let trailer = Some(AREA - BLOCK);
    let trailers: Vec<usize> =
        (0..dumped.log.len()).filter(|&index| dumped.log[index] == trailer).collect();
    assert_eq!(trailers.first(), Some(&0));
    assert_eq!(dumped.log[1], None, "flushed before the first block");
    let last = dumped.log.len() - 2;
    // The second one tells of the crash card, which was flushed before it; the core comes after.
    assert_eq!(trailers, [0, 4, last]);
    let layout = Layout::new(AREA).unwrap();
    assert_eq!(dumped.log[2..6], [Some(layout.card), None, Some(layout.trailer), None]);
    assert_eq!(dumped.log[last - 1], None, "flushed before it is complete");
    assert_eq!(dumped.log[last + 1], None, "and after");
}

#[test]
fn crash_card_is_in_its_block_and_the_trailer_says_so() {
    let dumped = dump(AREA, |_, _| {});
    let (trailer, layout) = (dumped.trailer().unwrap(), Layout::new(AREA).unwrap());
    let block = &dumped.bytes[layout.card as usize..layout.trailer as usize];
    let (card, rest) = block.split_at(trailer.card_size as usize);
    assert!(card.starts_with(b"kernel   6.1.0\n"), "{}", String::from_utf8_lossy(card));
    assert!(card.ends_with(b"\n"));
    assert_eq!(trailer.card_crc, format::crc32(card));
    assert!(rest[..PAGE - card.len() % PAGE].iter().all(|&byte| byte == 0));
}

#[test]
fn crash_card_is_there_when_the_disk_dies_later() {
    let dumped = dump(AREA, |_, disk| disk.writes_left = 6);
    assert!(dumped.result.is_err());
    assert!(dumped.trailer().unwrap().card_size > 0);
}

#[test]
fn unreadable_pages_are_zeros_and_counted_and_the_dump_goes_on() {
    let dumped = dump(AREA, |machine, _| machine.poisoned = [0x20_1000, 0x3a00_0000].into());
    let complete = dumped.result.unwrap();
    assert_eq!((complete.pages_unreadable, dumped.record().pages_unreadable.get()), (2, 2));
    let ranges: Vec<_> = dumped.record().unreadable().collect();
    // In the order of the core, which has the high memory first.
    assert_eq!(ranges, [0x3a00_0000..0x3a00_1000, 0x20_1000..0x20_2000]);
    let headers = dumped.headers();
    assert!(dumped.segment(&headers[2])[..4096].iter().all(|&byte| byte == 0));
    let high = dumped.segment(&headers[3]);
    assert!(high[0x10_1000..0x10_2000].iter().all(|&byte| byte == 0));
    assert!(high[0x10_2000..0x10_3000] == *machine().bytes(0x20_2000, 4096).unwrap());
    assert!(dumped.said.iter().any(|line| line.contains("0x201000 cannot be read")));
    dumped.assert_checksums(&complete);
}

#[test]
fn dump_without_all_ranges_says_so_everywhere() {
    let dumped = dump_with(AREA, |_, _| {}, |old| old.truncated = true);
    let complete = dumped.result.unwrap();
    let trailer = dumped.trailer().unwrap();
    assert_eq!((trailer.state, trailer.reason), (State::Incomplete, Reason::TooManyRanges));
    assert_eq!((dumped.bytes[E_FLAGS], dumped.record().complete.get()), (1, 0));
    dumped.assert_checksums(&complete);
}

#[test]
fn area_that_is_too_small_gets_the_card_and_nothing_else() {
    let dumped = dump(4 << 20, |_, _| {});
    let needs = 0x1000 + 0xa_0000 + (6 << 20);
    assert!(matches!(
        dumped.result,
        Err(Error::Plan(core_file::Error::AreaTooSmall { needs: n, .. })) if n == needs
    ));
    let layout = Layout::new(4 << 20).unwrap();
    assert_eq!(dumped.log, [Some(layout.card), None, Some(layout.trailer), None]);
    let trailer = dumped.trailer().unwrap();
    assert_eq!((trailer.state, trailer.reason), (State::Incomplete, Reason::NoRoom));
    let card = trailer.card(&dumped.bytes[layout.card as usize..]).unwrap();
    assert!(card.starts_with("kernel   6.1.0\n"), "{card}");
}

#[test]
fn area_that_is_too_small_is_said_to_be_when_its_disk_fails_too() {
    let dumped = dump(4 << 20, |_, disk| disk.writes_left = 0);
    assert!(matches!(dumped.result, Err(Error::Plan(_))), "{:?}", dumped.result);
    assert!(dumped.said.iter().any(|line| line.contains("crash card")), "{:?}", dumped.said);
    assert_eq!(dumped.trailer().unwrap().state, State::Empty);
}

#[test]
fn disk_that_refuses_the_card_gets_the_dump() {
    let layout = Layout::new(AREA).unwrap();
    let dumped = dump(AREA, |_, disk| disk.refuses_once = Some(layout.card));
    let complete = dumped.result.unwrap();
    let trailer = dumped.trailer().unwrap();
    assert_eq!((trailer.state, trailer.card_size), (State::Complete, 0));
    assert!(dumped.said.iter().any(|line| line.contains("takes no crash card")));
    dumped.assert_checksums(&complete);
}

#[test]
fn disk_that_dies_at_any_write_never_leaves_a_dump_that_looks_complete() {
    let all = dump(AREA, |_, _| {}).log.iter().flatten().count();
    for writes in 0..all {
        let dumped = dump(AREA, |_, disk| disk.writes_left = writes);
        assert_eq!(dumped.result, Err(Error::Disk(DiskError::Failed)), "after {writes} writes");
        let state = dumped.trailer().unwrap().state;
        let expected = if writes == 0 { State::Empty } else { State::Writing };
        assert_eq!(state, expected, "after {writes} writes");
    }
}

#[test]
fn dump_that_runs_out_of_time_says_how_much_of_it_is_there() {
    let whole = dump(AREA, |_, _| {});
    let cut = dump(AREA, |machine, _| {
        machine.us_per_page = 1000;
        machine.time_is_over_us = Some(800_000);
    });
    assert_eq!(cut.result, Err(Error::OutOfTime));
    let trailer = cut.trailer().unwrap();
    assert_eq!((trailer.state, trailer.reason), (State::Incomplete, Reason::OutOfTime));
    assert!((1 << 20..5 << 20).contains(&trailer.written), "{}", trailer.written);
    // The first block says that the dump is not complete.
    let written = PAGE..trailer.written as usize;
    assert!(cut.bytes[written.clone()] == whole.bytes[written]);
    assert_eq!(cut.bytes[E_FLAGS], 1);
    let last = cut.log.len() - 2;
    assert_eq!(cut.log[last..], [Some(AREA - BLOCK), None]);
    assert_eq!(cut.log[last - 1], None, "flushed before the trailer says how much is there");
}

#[test]
fn disk_that_dies_later_has_what_the_trailer_says() {
    let slow = |machine: &mut FakeMachine| machine.us_per_page = writer::CHECKPOINT_US / 600;
    let whole = dump(AREA, |machine, _| slow(machine));
    let mut seen = 0;
    for writes in 0..whole.log.iter().flatten().count() {
        let cut = dump(AREA, |machine, disk| {
            slow(machine);
            disk.writes_left = writes;
        });
        let written = cut.trailer().unwrap().written as usize;
        assert!(written >= seen, "{written} after {writes} writes");
        assert!(written == 0 || cut.bytes[PAGE..written] == whole.bytes[PAGE..written]);
        seen = written;
    }
    assert!(seen > 4 << 20, "{seen}");
}

#[test]
fn unsaved_dump_stays_as_it_is_when_a_card_is_left_there() {
    let dumped = dump(AREA, |_, _| {});
    let before = dumped.trailer().unwrap();
    assert_eq!(before.crash_time, 1_700_000_000);
    let old = machine();
    let mut disk = FakeDisk::new(AREA, &old);
    disk.bytes = dumped.bytes;
    let area = find(&mut disk, &Wanted::default(), &mut [0; 8192], &mut |_, _| {}).unsaved.unwrap();
    let mut buffers = Buffers::new();
    let mut machine = machine();
    let mut old = OldMemory::new();
    let headers = Elfcorehdr::open(&mut machine, Architecture::X86_64, OldPhys(AT), LIMIT).unwrap();
    headers.collect(&mut machine, buffers.notes(), &mut old).unwrap();
    old.vmcoreinfo.set(b"OSRELEASE=6.1.0-later\n");
    buffers.make_card(&mut machine, Source { headers: &headers, old: &old }, &mut Silence);
    let core = disk.bytes[..before.core_size as usize].to_vec();
    leave_card(&mut disk, &area, &mut buffers).unwrap();

    let layout = area.layout;
    assert!(disk.bytes[..core.len()] == core);
    let trailer = Trailer::parse(&disk.bytes[layout.trailer as usize..]).unwrap();
    let card = trailer.card(&disk.bytes[layout.card as usize..]).unwrap();
    assert!(card.starts_with("kernel   6.1.0-later\n"), "{card}");
    let Trailer { card_size, card_crc, .. } = trailer;
    assert_eq!(trailer, Trailer { later_cards: 1, card_size, card_crc, ..before });
    // The same crash may come by again, on its way to another target.
    let writes = disk.log.len();
    leave_card(&mut disk, &Area { trailer, ..area }, &mut buffers).unwrap();
    assert_eq!(disk.log.len(), writes);
}

#[test]
fn dump_during_which_the_payload_failed_says_so_and_keeps_what_is_known() {
    let dumped = dump(AREA, |_, _| {});
    let (state, written) = (State::Writing, 1 << 20);
    let complete = dumped.trailer().unwrap();
    let before = Trailer { state, written, core_size: 0, crc_count: 0, ..complete };
    let old = machine();
    let mut disk = FakeDisk::new(AREA, &old);
    disk.bytes = dumped.bytes;
    let at = AREA as usize - PAGE;
    disk.bytes[at..].copy_from_slice(&before.to_block());
    let area = find(&mut disk, &Wanted::default(), &mut [0; 8192], &mut |_, _| {}).area.unwrap();
    mark_failed(&mut disk, &area).unwrap();
    let after = Trailer::parse(&disk.bytes[area.layout.trailer as usize..]).unwrap();
    let (state, reason) = (State::Incomplete, Reason::PayloadFailed);
    assert_eq!(after, Trailer { state, reason, ..before });
    // A dump that is complete is left alone.
    let complete = Area { trailer: complete, ..area };
    let writes = disk.log.len();
    mark_failed(&mut disk, &complete).unwrap();
    assert_eq!(disk.log.len(), writes);
}
