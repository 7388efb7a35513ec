//! The ELF headers of a core of which only some runs of blocks are there.
//!
//! Each segment of the core's own head is cut to the runs that have arrived: a reader sees the memory that is
//! there and no zeros in place of the rest. Headers follow docs/format.md, "The ELF core"; what the head claims
//! is checked, and what is impossible is left out.

use std::ops::Range;

use format::BLOCK;
use goblin::elf::program_header::{PT_LOAD, PT_NOTE, ProgramHeader};

use crate::source::ELF64;

use super::blocks::BlockSet;

/// Size of the ELF header, of a program header, and of a section header.
pub const FILE_HEADER: u64 = 64;
/// Size of a program header.
pub const PROGRAM_HEADER: u64 = 56;
/// Size of a section header.
pub const SECTION_HEADER: u64 = 64;
/// With as many program headers or more, they are counted in section header 0 (gABI, "PN_XNUM").
pub const PN_XNUM: u64 = 0xffff;
/// Most segments that are described. What scatters more is described as far as this goes.
pub const MAX_SEGMENTS: usize = 1 << 20;

/// Offsets in the ELF header (gABI, "ELF Header").
const E_SHOFF: usize = 40;
const E_FLAGS: usize = 48;
const E_PHNUM: usize = 56;
/// Bit of e_flags that marks an incomplete dump.
const INCOMPLETE: u32 = 1;

/// The head of a core, as far as it is needed to describe parts of it.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct CoreHead {
    file_header: [u8; FILE_HEADER as usize],
    /// Where the notes are in the core.
    notes: Range<u64>,
    loads: Vec<Load>,
}

/// A segment of memory.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Load {
    /// Offset in the core.
    pub offset: u64,
    /// Virtual address.
    pub virt: u64,
    /// Physical address.
    pub phys: u64,
    /// Bytes.
    pub size: u64,
    flags: u32,
    align: u64,
}

impl Load {
    /// Of a core of `head` bytes of headers and `core` bytes in all.
    fn read(header: &ProgramHeader, head: u64, core: u64) -> Option<Load> {
        let size = header.p_filesz;
        let end = header.p_offset.checked_add(size)?;
        header.p_paddr.checked_add(size)?;
        let fits = size > 0 && header.p_offset >= head && end <= core;
        (header.p_type == PT_LOAD && fits).then_some(Load {
            offset: header.p_offset,
            virt: header.p_vaddr,
            phys: header.p_paddr,
            size,
            flags: header.p_flags,
            align: header.p_align,
        })
    }

    fn blocks(&self) -> Range<u64> {
        self.offset / BLOCK..(self.offset + self.size).div_ceil(BLOCK)
    }

    /// The part of it in a run of blocks that it overlaps.
    fn part(&self, run: &Range<u64>) -> Load {
        let start = self.offset.max(run.start * BLOCK);
        let end = (self.offset + self.size).min(run.end * BLOCK);
        let skip = start - self.offset;
        // A virtual address is only carried along; nothing says that it does not wrap.
        let virt = self.virt.wrapping_add(skip);
        Load { offset: start, virt, phys: self.phys + skip, size: end - start, ..*self }
    }
}

/// How many bytes from the start of the head its program headers take, by its first 64 bytes, and how many
/// headers there are; `None` when that is no head. `section` reads section header 0.
fn table(first: &[u8], read: &mut dyn FnMut(u64, &mut [u8]) -> bool) -> Option<u64> {
    let field16 = |at: usize| Some(u64::from(u16::from_le_bytes(*first.get(at..)?.first_chunk()?)));
    let field64 = |at: usize| Some(u64::from_le_bytes(*first.get(at..)?.first_chunk()?));
    // ELF64, little-endian, version 1; ET_CORE; e_phoff, e_phentsize.
    let is_core = first.get(..7)? == b"\x7fELF\x02\x01\x01"
        && field16(16)? == 4
        && field64(32)? == FILE_HEADER
        && field16(54)? == PROGRAM_HEADER;
    if !is_core {
        return None;
    }
    match field16(E_PHNUM)? {
        PN_XNUM => {
            let mut section = [0; SECTION_HEADER as usize];
            let count = read(field64(E_SHOFF)?, &mut section).then_some(section)?;
            Some(u32::from_le_bytes(*count.get(44..)?.first_chunk()?).into())
        }
        count => Some(count),
    }
}

impl CoreHead {
    /// Reads the head of a core of `core_size` bytes. `read` fills a buffer with the head's bytes from an offset
    /// on, and says whether they are there. `None` when the headers are not all there, or are none.
    pub fn read(
        head_size: u64,
        core_size: u64,
        read: &mut dyn FnMut(u64, &mut [u8]) -> bool,
    ) -> Option<CoreHead> {
        let mut file_header = [0; FILE_HEADER as usize];
        let count = read(0, &mut file_header).then(|| table(&file_header, read))??;
        let size = FILE_HEADER + count * PROGRAM_HEADER;
        if size > head_size {
            return None;
        }
        let mut bytes = vec![0; usize::try_from(size).ok()?];
        if !read(0, &mut bytes) {
            return None;
        }
        let count = usize::try_from(count).ok()?;
        let headers = ProgramHeader::parse(&bytes, FILE_HEADER as usize, count, ELF64).ok()?;
        let note = headers.iter().find(|header| header.p_type == PT_NOTE);
        let notes = note
            .and_then(|note| Some(note.p_offset..note.p_offset.checked_add(note.p_filesz)?))
            .filter(|notes| notes.end <= head_size)
            .unwrap_or(0..0);
        let loads = headers.iter().filter_map(|it| Load::read(it, head_size, core_size)).collect();
        Some(CoreHead { file_header, notes, loads })
    }

    /// Where the notes are in the core, as far as they have arrived without a gap.
    #[must_use]
    pub fn notes(&self, present: &BlockSet) -> Range<u64> {
        let Range { start, end } = self.notes;
        let gap = present.lacking(start / BLOCK..end.div_ceil(BLOCK)).next();
        start..gap.map_or(end, |gap| (gap.start * BLOCK).clamp(start, end))
    }

    /// The segments of the head.
    #[must_use]
    pub fn loads(&self) -> &[Load] {
        &self.loads
    }

    /// The segments of what has arrived, in the order of the head: one for each run in each segment.
    #[must_use]
    pub fn parts(&self, present: &BlockSet) -> Vec<Load> {
        let of = |load: &Load| {
            let load = *load;
            present.within(load.blocks()).map(move |run| load.part(&run))
        };
        self.loads.iter().flat_map(of).take(MAX_SEGMENTS).collect()
    }

    /// The ELF header of a core with `count` program headers, section header 0 at `section` if it takes one.
    #[must_use]
    pub fn file_header(&self, count: u64, section: u64, incomplete: bool) -> Vec<u8> {
        let mut header = self.file_header.to_vec();
        let extended = count >= PN_XNUM;
        let flags = u32::from_le_bytes([header[48], header[49], header[50], header[51]]);
        let flags = if incomplete { flags | INCOMPLETE } else { flags & !INCOMPLETE };
        let shoff = if extended { section } else { 0 };
        header[E_SHOFF..E_FLAGS].copy_from_slice(&shoff.to_le_bytes());
        header[E_FLAGS..E_FLAGS + 4].copy_from_slice(&flags.to_le_bytes());
        let sections = u16::from(extended);
        let counts = [count.min(PN_XNUM) as u16, sections * SECTION_HEADER as u16, sections, 0];
        for (index, field) in counts.into_iter().enumerate() {
            let at = E_PHNUM + index * 2;
            header[at..at + 2].copy_from_slice(&field.to_le_bytes());
        }
        header
    }
}

/// Section header 0 that says that there are `count` program headers.
#[must_use]
pub fn section_header(count: u64) -> [u8; SECTION_HEADER as usize] {
    let mut section = [0; SECTION_HEADER as usize];
    // sh_info; there are never more than MAX_SEGMENTS and a few.
    section[44..48].copy_from_slice(&(count as u32).to_le_bytes());
    section
}

/// The program headers of notes that are at `notes` in the file, and of segments; `place` says where in the
/// file a byte of the core is.
pub fn program_headers(notes: Range<u64>, parts: &[Load], place: impl Fn(u64) -> u64) -> Vec<u8> {
    let mut bytes = Vec::with_capacity((parts.len() + 1) * PROGRAM_HEADER as usize);
    let mut put = |kind: u32, flags: u32, fields: [u64; 6]| {
        bytes.extend(kind.to_le_bytes());
        bytes.extend(flags.to_le_bytes());
        fields.iter().for_each(|field| bytes.extend(field.to_le_bytes()));
    };
    let size = notes.end - notes.start;
    put(PT_NOTE, 0, [notes.start, 0, 0, size, size, 0]);
    for part in parts {
        let Load { offset, virt, phys, size, flags, align } = *part;
        put(PT_LOAD, flags, [place(offset), virt, phys, size, size, align]);
    }
    bytes
}
