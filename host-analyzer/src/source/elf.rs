//! ELF cores of kernels: /proc/vmcore, our payload's, QEMU's dump-guest-memory.
//!
//! The program headers are an allegation: a segment that lies outside the file is cut to what is
//! there, and the dump is called incomplete.
//!
//! What a segment has of memory and not in the file (`p_filesz` below `p_memsz`) would be zeros in a program.
//! Here it is memory that was left out: makedumpfile -E ends its segments so, whatever it left out, and QEMU
//! writes such headers for memory that it was told not to dump.

use std::borrow::Cow;
use std::ops::Range;

use goblin::container::{Container, Ctx, Endian};
use goblin::elf::Elf;
use goblin::elf::header::{
    EI_CLASS, EI_DATA, ELFCLASS64, ELFDATA2LSB, ELFMAG, ET_CORE, ET_DYN, ET_EXEC, Header,
};
use goblin::elf::program_header::{PT_LOAD, PT_NOTE, ProgramHeader};
use goblin::elf::section_header::SectionHeader;

use crate::{PhysAddr, ReadError, VirtAddr};

use super::Form;
use super::content::Content;
use super::ranges::{merge, without, without_all};

/// The little-endian ELF64 layout, the only one that is read.
pub(crate) const ELF64: Ctx = Ctx { container: Container::Big, le: Endian::Little };

/// e_phnum with this value means: the count is in section header 0 (gABI, "PN_XNUM").
const PN_XNUM: u16 = 0xffff;

/// Bit of e_flags that marks an incomplete dump (makedumpfile's DUMP_ELF_INCOMPLETE).
const INCOMPLETE: u32 = 1;

const FILE_HEADER: usize = 64;
const PROGRAM_HEADER: usize = 56;
const SECTION_HEADER: usize = 64;

/// Notes of 8192 CPUs are a few MiB; all segments of them together are not read beyond this.
const MAX_NOTES: u64 = 64 << 20;

/// One PT_LOAD, cut to the file.
#[derive(Clone, Debug)]
struct Segment {
    /// Physical addresses whose bytes it has.
    phys: Range<u64>,
    /// Virtual address of its first byte; 0 when the dump does not say.
    virt: u64,
    /// How many bytes it has in memory: not fewer than in the file.
    size: u64,
    /// Where its bytes are in the file.
    file: u64,
}

/// A stretch of physical memory and the segment that it is read from.
#[derive(Clone, Debug)]
struct Piece {
    phys: Range<u64>,
    segment: u32,
}

/// The index of an ELF core: what lies where. Holds no bytes of its memory.
#[derive(Clone, Debug)]
pub(super) struct ElfCore {
    machine: u16,
    flags: u32,
    /// The bytes of the PT_NOTE segments, in the order of their headers.
    notes: Vec<Vec<u8>>,
    segments: Vec<Segment>,
    /// Sorted, not overlapping: segments may (the kernel's text is there twice).
    pieces: Vec<Piece>,
    /// Segments with virtual addresses, sorted by these.
    by_virt: Vec<u32>,
    ranges: Vec<Range<u64>>,
    /// The memory that the segments speak of, whether they have its bytes or not.
    known: Vec<Range<u64>>,
    /// Where the file ends by its headers. Segments may share bytes (the kernel's text does), so
    /// their sizes say nothing about it.
    promised_end: u64,
    headers_missing: u64,
}

impl ElfCore {
    /// Whether `content` begins as an ELF file does.
    pub fn is_in(content: Content<'_>) -> bool {
        content.read(0, ELFMAG.len()).is_some_and(|begin| *begin == *ELFMAG)
    }

    /// Reads the headers of the core in `content`, and its notes.
    ///
    /// # Errors
    /// A sentence that says what the bytes are instead.
    pub fn parse(content: Content<'_>) -> Result<ElfCore, String> {
        let header = parse_header(&content.read_up_to(0, FILE_HEADER as u64))?;
        let promised = program_header_count(content, &header);
        let room = content.len().saturating_sub(header.e_phoff) / PROGRAM_HEADER as u64;
        let size = promised.min(room) * PROGRAM_HEADER as u64;
        let table = content.read_up_to(header.e_phoff, size);
        let count = table.len() / PROGRAM_HEADER;
        let headers = ProgramHeader::parse(&table, 0, count, ELF64)
            .map_err(|error| format!("its program headers cannot be read ({error})"))?;
        let mut core = ElfCore {
            machine: header.e_machine,
            flags: header.e_flags,
            notes: Vec::new(),
            segments: Vec::new(),
            pieces: Vec::new(),
            by_virt: Vec::new(),
            ranges: Vec::new(),
            known: Vec::new(),
            promised_end: 0,
            headers_missing: promised - count as u64,
        };
        for header in &headers {
            core.add(header, content);
        }
        if core.segments.iter().all(|segment| segment.phys.is_empty()) {
            return Err("an ELF core without any memory in it".to_owned());
        }
        core.segments.sort_by_key(|segment| (segment.phys.start, u64::MAX - segment.phys.end));
        core.pieces = pieces(&core.segments);
        let mapped = core.segments.iter().enumerate().filter(|(_, segment)| segment.virt != 0);
        core.by_virt = mapped.map(|(index, _)| index as u32).collect();
        core.by_virt.sort_by_key(|&index| core.segments[index as usize].virt);
        core.ranges = merge(core.pieces.iter().map(|piece| piece.phys.clone()));
        core.known =
            merge(core.segments.iter().map(|segment| {
                segment.phys.start..segment.phys.start.saturating_add(segment.size)
            }));
        Ok(core)
    }

    fn add(&mut self, header: &ProgramHeader, content: Content<'_>) {
        let start = header.p_offset.min(content.len());
        let stored = header.p_filesz.min(content.len() - start);
        if matches!(header.p_type, PT_NOTE | PT_LOAD) {
            let end = header.p_offset.saturating_add(header.p_filesz);
            self.promised_end = self.promised_end.max(end);
        }
        match header.p_type {
            PT_NOTE => {
                let known: usize = self.notes.iter().map(Vec::len).sum();
                let size = stored.min(MAX_NOTES.saturating_sub(known as u64));
                self.notes.push(content.read_up_to(start, size).into_owned());
            }
            PT_LOAD => {
                let phys = header.p_paddr..header.p_paddr.saturating_add(stored);
                // Bytes that were cut off were not left out: the segment ends with the file.
                let cut = stored < header.p_filesz;
                let size = if cut { stored } else { header.p_memsz.max(stored) };
                if size > 0 {
                    let (virt, file) = (header.p_vaddr, start);
                    self.segments.push(Segment { phys, virt, size, file });
                }
            }
            _ => {}
        }
    }
}

impl ElfCore {
    /// Why no segment has bytes of `at`.
    fn missing(&self, at: PhysAddr) -> ReadError {
        let index = self.known.partition_point(|range| range.end <= at.0);
        match self.known.get(index).is_some_and(|range| range.contains(&at.0)) {
            true => ReadError::LeftOut(at),
            false => ReadError::NotInDump(at),
        }
    }
}

impl Form for ElfCore {
    fn machine(&self) -> u16 {
        self.machine
    }

    fn notes(&self) -> Vec<&[u8]> {
        self.notes.iter().map(Vec::as_slice).collect()
    }

    fn leave_out(&mut self, gaps: &[Range<u64>]) {
        for gap in gaps {
            let pieces = self.pieces.iter().flat_map(|piece| {
                let segment = piece.segment;
                without(piece.phys.clone(), gap).map(move |phys| Piece { phys, segment })
            });
            self.pieces = pieces.collect();
        }
        for ranges in [&mut self.ranges, &mut self.known] {
            *ranges = without_all(std::mem::take(ranges), gaps);
        }
    }

    fn run<'a>(
        &'a self,
        content: Content<'a>,
        at: PhysAddr,
        max: usize,
    ) -> Result<Cow<'a, [u8]>, ReadError> {
        let index = self.pieces.partition_point(|piece| piece.phys.end <= at.0);
        let piece = self.pieces.get(index).filter(|it| it.phys.contains(&at.0));
        let piece = piece.ok_or_else(|| self.missing(at))?;
        let missing = ReadError::NotInDump(at);
        let segment = self.segments.get(piece.segment as usize).ok_or(missing)?;
        let left = usize::try_from(piece.phys.end - at.0).unwrap_or(usize::MAX).min(max);
        let place = segment.file + (at.0 - segment.phys.start);
        content.run(place, left).map(Cow::Borrowed).ok_or(missing)
    }

    fn ranges(&self, _: Content<'_>) -> &[Range<u64>] {
        &self.ranges
    }

    /// By the program headers alone.
    fn linear(&self, at: VirtAddr) -> Option<PhysAddr> {
        let segment = |&index: &u32| self.segments.get(index as usize);
        let begins_before = |index: &u32| segment(index).is_some_and(|it| it.virt <= at.0);
        let after = self.by_virt.partition_point(begins_before);
        let segment = segment(self.by_virt.get(after.checked_sub(1)?)?)?;
        let skip = at.0.checked_sub(segment.virt)?;
        (skip < segment.size).then(|| PhysAddr(segment.phys.start).offset(skip))
    }

    fn problem(&self, content: Content<'_>) -> Option<String> {
        let mut reasons = Vec::new();
        if self.flags & INCOMPLETE != 0 {
            reasons.push("whoever wrote it marked it so (e_flags)".to_owned());
        }
        if self.headers_missing != 0 {
            reasons.push(format!("{} program headers are cut off", self.headers_missing));
        }
        let missing = self.promised_end.saturating_sub(content.len());
        if missing != 0 {
            reasons.push(format!("{missing} of {} bytes are cut off", self.promised_end));
        }
        (!reasons.is_empty()).then(|| reasons.join(", "))
    }
}

/// Cuts overlapping segments into pieces: of those that hold an address, the last one that begins at or
/// before it has it. `segments` are sorted by their start, and of those with one start the longest
/// comes first. What lies together in memory and in one segment is one piece.
fn pieces(segments: &[Segment]) -> Vec<Piece> {
    let mut pieces: Vec<Piece> = Vec::with_capacity(segments.len());
    // Segments that begin before the current place and may reach beyond it, innermost last.
    let mut open: Vec<u32> = Vec::new();
    let mut at = 0;
    let mut push = |segment: u32, range: Range<u64>| {
        if !range.is_empty() {
            pieces.push(Piece { phys: range, segment });
        }
    };
    let starts = segments.iter().map(|segment| segment.phys.start).chain([u64::MAX]);
    for (index, start) in starts.enumerate() {
        // What is open has everything up to here.
        while let Some(&last) = open.last() {
            let end = segments[last as usize].phys.end;
            push(last, at..end.min(start));
            at = at.max(end.min(start));
            if end > start {
                break;
            }
            open.pop();
        }
        at = start;
        open.push(index as u32);
    }
    pieces
}

fn parse_header(bytes: &[u8]) -> Result<Header, String> {
    if !bytes.starts_with(ELFMAG) {
        return Err("it begins neither as an ELF nor as a kdump-compressed file, and has no reservation mark".to_owned());
    }
    if bytes.get(EI_CLASS) != Some(&ELFCLASS64) || bytes.get(EI_DATA) != Some(&ELFDATA2LSB) {
        return Err("an ELF file that is not 64-bit little-endian".to_owned());
    }
    let header = Elf::parse_header(bytes).map_err(|_| "its ELF header is cut short".to_owned())?;
    if header.e_type != ET_CORE {
        let program = matches!(header.e_type, ET_EXEC | ET_DYN);
        let hint = if program { " (perhaps the vmlinux, given first)" } else { "" };
        return Err(format!("an ELF file of type {}, not a core{hint}", header.e_type));
    }
    Ok(header)
}

fn program_header_count(content: Content<'_>, header: &Header) -> u64 {
    if header.e_phnum != PN_XNUM {
        return u64::from(header.e_phnum);
    }
    let section = content.read_up_to(header.e_shoff, SECTION_HEADER as u64);
    SectionHeader::parse_from(&section, 0, 1, ELF64)
        .ok()
        .and_then(|sections| sections.first().map(|section| u64::from(section.sh_info)))
        .unwrap_or(u64::from(PN_XNUM))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Segment as Part, elf_core};

    fn two_pages() -> Vec<Part> {
        vec![
            Part::note(b"0123"),
            Part::load(0x1000, &[1; 4096]),
            Part { memory_size: 8192, ..Part::load(0x8000, &[2; 4096]) },
        ]
    }

    fn parse(core: &[u8]) -> Result<ElfCore, String> {
        ElfCore::parse(Content::plain(core))
    }

    fn read(core: &[u8], at: u64, max: usize) -> Result<Vec<u8>, ReadError> {
        let index = parse(core).unwrap();
        index.run(Content::plain(core), PhysAddr(at), max).map(Cow::into_owned)
    }

    #[test]
    fn memory_is_found_by_its_physical_address() {
        let core = elf_core(0, false, &two_pages());
        assert_eq!(read(&core, 0x1ffe, 100), Ok(vec![1, 1]));
        assert_eq!(read(&core, 0x8000, 1), Ok(vec![2]));
        assert_eq!(read(&core, 0x2000, 1), Err(ReadError::NotInDump(PhysAddr(0x2000))));
        assert_eq!(parse(&core).unwrap().ranges, [0x1000..0x2000, 0x8000..0x9000]);
    }

    #[test]
    fn what_a_segment_does_not_store_was_left_out_and_is_not_zeros() {
        let core = elf_core(0, false, &two_pages());
        assert_eq!(read(&core, 0x8fff, 9), Ok(vec![2]));
        assert_eq!(read(&core, 0x9000, 3), Err(ReadError::LeftOut(PhysAddr(0x9000))));
        assert_eq!(read(&core, 0xa000, 1), Err(ReadError::NotInDump(PhysAddr(0xa000))));
        // Where another segment has it, that one counts, however they lie.
        let empty = Part { memory_size: 0x3000, ..Part::load(0x8000, &[]) };
        let parts = [Part::load(0x8000, &[1; 8192]), Part::load(0x8000, &[2; 4096]), empty];
        assert_eq!(read(&elf_core(0, false, &parts), 0x9000, 2), Ok(vec![1, 1]));
    }

    #[test]
    fn memory_that_nobody_could_read_is_missing_and_not_zeros() {
        let core = elf_core(0, false, &two_pages());
        let mut index = parse(&core).unwrap();
        index.leave_out(&[0x1800..0x8800, 0x8fff..0x9000]);
        assert_eq!(index.ranges, [0x1000..0x1800, 0x8800..0x8fff]);
        let content = Content::plain(&core);
        let read = |at, max| index.run(content, PhysAddr(at), max).map(Cow::into_owned);
        assert_eq!(read(0x17fe, 100), Ok(vec![1, 1]));
        assert_eq!(read(0x8800, 2), Ok(vec![2, 2]));
        for at in [0x1800, 0x1fff, 0x8000, 0x87ff, 0x8fff] {
            assert_eq!(read(at, 1), Err(ReadError::NotInDump(PhysAddr(at))));
        }
    }

    #[test]
    fn more_headers_than_e_phnum_can_count_are_counted_in_section_header_0() {
        let core = elf_core(0, true, &two_pages());
        assert_eq!(read(&core, 0x8000, 1), Ok(vec![2]));
        assert_eq!(parse(&core).unwrap().problem(Content::plain(&core)), None);
    }

    #[test]
    fn core_cut_short_still_gives_what_it_has_and_says_what_it_has_not() {
        let mut core = elf_core(0, false, &two_pages());
        core.truncate(core.len() - 4000);
        assert_eq!(read(&core, 0x8000, 4096).unwrap().len(), 96);
        assert!(read(&core, 0x8060, 1).is_err(), "bytes that were cut off are not zeros");
        let problem = parse(&core).unwrap().problem(Content::plain(&core)).unwrap();
        assert!(problem.starts_with("4000 of "), "{problem}");
    }

    #[test]
    fn flag_in_the_header_marks_an_incomplete_dump() {
        let core = elf_core(1, false, &two_pages());
        assert!(parse(&core).unwrap().problem(Content::plain(&core)).is_some());
    }

    #[test]
    fn what_is_no_core_is_named() {
        assert!(parse(b"").unwrap_err().contains("neither"));
        let mut vmlinux = elf_core(0, false, &two_pages());
        vmlinux[16] = 2;
        assert!(parse(&vmlinux).unwrap_err().contains("vmlinux"));
        let mut arm32 = elf_core(0, false, &two_pages());
        arm32[4] = 1;
        assert!(parse(&arm32).unwrap_err().contains("64-bit"));
    }

    #[test]
    fn tens_of_thousands_of_segments_are_found_each() {
        // Every second page, the last first, and a header over all of them that stores nothing of it.
        const COUNT: u64 = 40_000;
        let mut parts = vec![Part { memory_size: COUNT << 13, ..Part::load(0, &[]) }];
        parts.extend((0..COUNT).rev().map(|it| Part::load(it << 13, &(it as u32).to_le_bytes())));
        let core = elf_core(1, true, &parts);
        let index = parse(&core).unwrap();
        assert_eq!(index.ranges.len(), COUNT as usize);
        for page in 0..COUNT {
            let bytes = index.run(Content::plain(&core), PhysAddr(page << 13), 100).unwrap();
            assert_eq!(*bytes, (page as u32).to_le_bytes());
            let behind = PhysAddr((page << 13) + 4);
            let found = index.run(Content::plain(&core), behind, 1);
            assert_eq!(found, Err(ReadError::LeftOut(behind)));
            let virt = VirtAddr((page << 13) + 1);
            assert_eq!(index.linear(virt), Some(PhysAddr(virt.0)).filter(|_| page != 0));
        }
    }

    #[test]
    fn the_segment_that_reaches_an_address_is_found_behind_shorter_ones() {
        let parts =
            [Part::load(0, &[1; 4096]), Part::load(0x100, &[2; 16]), Part::load(0x200, &[3; 16])];
        assert_eq!(read(&elf_core(0, false, &parts), 0x300, 1), Ok(vec![1]));
    }

    proptest! {
        #[test]
        fn overlapping_segments_read_as_the_last_that_begins_before_an_address(
            parts in prop::collection::vec((0u64..64, 1usize..64), 1..8)
        ) {
            let mut parts: Vec<Part> = parts.iter().enumerate()
                .map(|(index, &(at, size))| Part::load(at, &vec![index as u8 + 1; size])).collect();
            let core = elf_core(0, false, &parts);
            let index = parse(&core).unwrap();
            parts.sort_by_key(|part| (part.phys, u64::MAX - part.memory_size));
            for at in 0..130 {
                let holds = |part: &&Part| part.phys <= at && at < part.phys + part.memory_size;
                let expected = parts.iter().rev().find(holds).map(|part| part.bytes[0]);
                let found = index.run(Content::plain(&core), PhysAddr(at), 1).ok().map(|run| run[0]);
                prop_assert_eq!(found, expected, "at {}", at);
            }
        }

        #[test]
        fn damaged_cores_never_panic(at in 0usize..400, value: u8, cut in 0usize..9000, phys: u64) {
            let mut core = elf_core(0, true, &two_pages());
            core[at % 400] = value;
            core.truncate(core.len().saturating_sub(cut));
            if let Ok(index) = parse(&core) {
                let _ = index.run(Content::plain(&core), PhysAddr(phys), 64);
                let _ = index.run(Content::plain(&core), PhysAddr(phys % 0xb000), 64);
                let _ = index.linear(VirtAddr(phys % 0xb000));
                let _ = (index.notes().len(), index.problem(Content::plain(&core)));
            }
        }
    }
}
