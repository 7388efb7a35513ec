//! How the core is laid out, and its head: everything before the first byte of memory.
//!
//! ```text
//! 0            ELF header; program headers: PT_NOTE, kernel image, ranges of memory
//!              notes: one per CPU that saved its registers, VMCOREINFO, the crash card, the vendor note
//! head_size    memory, each range at an offset congruent to its address modulo 4 KiB
//! ```
//!
//! What readers demand of it (measured with crash 8 and 9, drgn 0.3, gdb 13, makedumpfile 1.7):
//! program headers at offset 64; exactly one PT_NOTE, the first; notes before all memory; p_align 0;
//! direct-map addresses in p_vaddr. The kernel image is not stored twice: its header shares the
//! file range of the memory that it lies in.

use format::BLOCK;
use format::note::Header as NoteHeader;
use format::record::{self, Record};
use goblin::elf64::header::{ELFCLASS64, ET_CORE, SIZEOF_EHDR};
use goblin::elf64::program_header::{PF_R, PF_W, PF_X, PT_LOAD, PT_NOTE, SIZEOF_PHDR};
use heapless::Vec;
use zerocopy::IntoBytes;

use crate::Machine;
use crate::dump::Source;
use crate::elfcorehdr::Elfcorehdr;
use crate::old::{OldMemory, Range};

/// Where e_flags lies in the ELF header.
pub const E_FLAGS: usize = 48;

/// Bit of e_flags that marks an incomplete dump, by makedumpfile's convention
/// (DUMP_ELF_INCOMPLETE in its elf_info.h, version 1.7).
pub const INCOMPLETE: u32 = 1;

/// The largest head that is written, in bytes; see [`Error::HeadTooLarge`].
const MAX_HEAD: u64 = 256 << 20;

/// More program headers than e_phnum can count need section header 0 (PN_XNUM).
const PN_XNUM: u64 = 0xffff;
const SIZEOF_SHDR: u64 = 64;

/// A note of ours up to its descriptor: header and name.
const VENDOR_NOTE_HEAD: u64 =
    (size_of::<NoteHeader>() + record::NAME.len() + 1).next_multiple_of(4) as u64;

/// Why a core cannot be laid out.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// The notes are larger than those of any machine.
    HeadTooLarge(u64),
    /// The core does not fit into the area.
    AreaTooSmall {
        /// Bytes that the core needs.
        needs: u64,
        /// Bytes that the area has for it.
        has: u64,
    },
}

impl core::fmt::Display for Error {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Error::HeadTooLarge(size) => {
                write!(f, "the notes take {size} bytes, which no machine needs")
            }
            Error::AreaTooSmall { needs, has } => write!(
                f,
                "the area is too small: the dump needs {} MiB, the area has room for {} MiB",
                needs.div_ceil(1 << 20),
                has >> 20
            ),
        }
    }
}

/// The places in a core.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CoreFile {
    notes_at: u64,
    /// All notes but the vendor note.
    notes_size: u64,
    /// The note that holds the crash card; 0 when there is none.
    card_note: u64,
    /// Bytes of the crash card.
    card_size: u64,
    /// Filler between the vendor note's head and the record in it.
    filler: u64,
    headers: u64,
    machine: u16,
    /// Bytes before the memory: a multiple of [`BLOCK`].
    pub head_size: u64,
    /// Size of the whole core: a multiple of [`BLOCK`].
    pub size: u64,
}

impl CoreFile {
    /// Lays out the core of `old` with `card` in a note, for a place with `room` bytes for it.
    ///
    /// # Errors
    /// [`Error`] when it would not fit.
    pub fn plan(
        machine: &mut dyn Machine,
        headers: &Elfcorehdr,
        scratch: &mut [u8],
        old: &OldMemory,
        card: &str,
        room: u64,
    ) -> Result<CoreFile, Error> {
        let mut notes_size = 0u64;
        headers.each_note(machine, scratch, &mut |note| {
            notes_size += note.raw.len().next_multiple_of(4) as u64;
        });
        let count = 1 + old.image().len() as u64 + old.ranges().len() as u64;
        let machine = headers.architecture().elf_machine();
        let mut core = CoreFile::head(machine, count, notes_size, card.len() as u64);
        if core.head_size > MAX_HEAD {
            return Err(Error::HeadTooLarge(notes_size));
        }
        core.size = core.ranges(old).last().map_or(core.head_size, |(offset, range)| {
            (offset + range.size).next_multiple_of(BLOCK)
        });
        if core.size > room {
            return Err(Error::AreaTooSmall { needs: core.size, has: room });
        }
        Ok(core)
    }

    /// Lays out the head: `count` program headers, and notes of `notes_size` bytes before ours, of which
    /// one holds `card_size` bytes.
    fn head(machine: u16, count: u64, notes_size: u64, card_size: u64) -> CoreFile {
        let card_note = match card_size {
            0 => 0,
            size => VENDOR_NOTE_HEAD + size.next_multiple_of(4),
        };
        let section = if count >= PN_XNUM { SIZEOF_SHDR } else { 0 };
        let notes_at = SIZEOF_EHDR as u64 + count * SIZEOF_PHDR as u64 + section;

        // The record must not cross a block: it is written again at the end, as one block.
        let record_size = record::SIZE as u64;
        let desc = notes_at + notes_size + card_note + VENDOR_NOTE_HEAD;
        let filler = match BLOCK - desc % BLOCK {
            room if room >= record_size => 0,
            room => room,
        };
        let head_size = (desc + filler + record_size).next_multiple_of(BLOCK);
        CoreFile {
            notes_at,
            notes_size,
            card_note,
            card_size,
            filler,
            headers: count,
            machine,
            head_size,
            size: head_size,
        }
    }

    /// Where the record of the vendor note begins.
    #[must_use]
    pub fn record_at(&self) -> u64 {
        self.notes_at + self.notes_size + self.card_note + VENDOR_NOTE_HEAD + self.filler
    }

    /// The ranges of memory with their offsets in the core, in file order.
    pub fn ranges(&self, old: &OldMemory) -> impl Iterator<Item = (u64, Range)> {
        old.ranges().iter().scan(self.head_size, |next, &range| {
            let offset = *next + range.phys % BLOCK;
            *next = (offset + range.size).next_multiple_of(BLOCK);
            Some((offset, range))
        })
    }

    /// The range of memory that the block at `offset` of the core is of, and where in the core the
    /// range begins.
    pub fn range_at(&self, old: &OldMemory, offset: u64) -> Option<(u64, Range)> {
        self.ranges(old)
            .find(|&(start, range)| start / BLOCK * BLOCK <= offset && offset < start + range.size)
    }

    /// Gives the head to `out` piece by piece, marked incomplete, with `card` and with `record` in the
    /// vendor note: [`CoreFile::head_size`] bytes, if notes and card are still those of
    /// [`CoreFile::plan`].
    pub fn write_head(
        &self,
        machine: &mut dyn Machine,
        source: Source<'_>,
        scratch: &mut [u8],
        card: &str,
        record: &Record,
        out: &mut dyn FnMut(&[u8]),
    ) {
        let Source { headers, old } = source;
        out(&self.file_header());
        self.write_program_headers(old, out);
        let mut left = self.notes_size;
        headers.each_note(machine, scratch, &mut |note| {
            let padded = note.raw.len().next_multiple_of(4) as u64;
            // A CPU that still runs could change its note between the two passes.
            if padded <= left {
                out(note.raw);
                write_zeros(padded - note.raw.len() as u64, out);
                left -= padded;
            }
        });
        write_zeros(left, out);
        self.write_card_note(card, out);
        self.write_vendor_note(record, out);
        write_zeros(self.head_size - self.record_at() - record::SIZE as u64, out);
    }

    fn file_header(&self) -> Vec<u8, SIZEOF_EHDR> {
        let extended = self.headers >= PN_XNUM;
        let section_table = if extended { self.notes_at - SIZEOF_SHDR } else { 0 };
        let mut bytes = Vec::new();
        // e_ident: ELF64, little-endian, version 1, System V.
        put(&mut bytes, b"\x7fELF");
        put(&mut bytes, &[ELFCLASS64, 1, 1, 0, 0, 0, 0, 0, 0, 0, 0, 0]);
        put(&mut bytes, &ET_CORE.to_le_bytes());
        put(&mut bytes, &self.machine.to_le_bytes());
        put(&mut bytes, &1u32.to_le_bytes());
        put(&mut bytes, &0u64.to_le_bytes());
        put(&mut bytes, &(SIZEOF_EHDR as u64).to_le_bytes());
        put(&mut bytes, &section_table.to_le_bytes());
        put(&mut bytes, &INCOMPLETE.to_le_bytes());
        let sections = u16::from(extended);
        let counts = [
            SIZEOF_EHDR as u16,
            SIZEOF_PHDR as u16,
            self.headers.min(PN_XNUM) as u16,
            sections * SIZEOF_SHDR as u16,
            sections,
            0,
        ];
        counts.iter().for_each(|field| put(&mut bytes, &field.to_le_bytes()));
        bytes
    }

    fn write_program_headers(&self, old: &OldMemory, out: &mut dyn FnMut(&[u8])) {
        let notes_end = self.record_at() + record::SIZE as u64;
        let notes =
            Segment { offset: self.notes_at, size: notes_end - self.notes_at, ..Segment::NOTE };
        out(&notes.bytes());
        for mapping in old.image() {
            // Its memory lies in exactly one range (OldMemory::add_image).
            let shared = self.ranges(old).find(|(_, range)| {
                range.phys <= mapping.phys && mapping.phys - range.phys < range.size
            });
            let offset = shared.map_or(0, |(offset, range)| offset + (mapping.phys - range.phys));
            let (virt, phys, size) = (mapping.virt, mapping.phys, mapping.size);
            out(&Segment { offset, virt, phys, size, ..Segment::LOAD }.bytes());
        }
        for (offset, range) in self.ranges(old) {
            let Range { virt, phys, size, .. } = range;
            out(&Segment { offset, virt, phys, size, ..Segment::LOAD }.bytes());
        }
        if self.headers >= PN_XNUM {
            let mut section = [0; SIZEOF_SHDR as usize];
            section[44..48].copy_from_slice(&(self.headers as u32).to_le_bytes());
            out(&section);
        }
    }

    fn write_card_note(&self, card: &str, out: &mut dyn FnMut(&[u8])) {
        if self.card_note == 0 {
            return;
        }
        write_note_head(record::CARD_KIND, self.card_size, out);
        let card = card.as_bytes().get(..self.card_size as usize).unwrap_or_default();
        out(card);
        write_zeros(self.card_note - VENDOR_NOTE_HEAD - card.len() as u64, out);
    }

    fn write_vendor_note(&self, record: &Record, out: &mut dyn FnMut(&[u8])) {
        write_note_head(record::KIND, self.filler + record::SIZE as u64, out);
        write_zeros(self.filler, out);
        out(record.as_bytes());
    }
}

/// Gives header and name of a note of ours to `out`: [`VENDOR_NOTE_HEAD`] bytes.
fn write_note_head(kind: u32, desc_size: u64, out: &mut dyn FnMut(&[u8])) {
    let header = NoteHeader {
        name_size: (record::NAME.len() as u32 + 1).into(),
        desc_size: (desc_size as u32).into(),
        kind: kind.into(),
    };
    out(header.as_bytes());
    out(record::NAME);
    let named = size_of::<NoteHeader>() + record::NAME.len();
    write_zeros(VENDOR_NOTE_HEAD - named as u64, out);
}

/// A program header to be written.
struct Segment {
    kind: u32,
    flags: u32,
    offset: u64,
    virt: u64,
    phys: u64,
    size: u64,
}

impl Segment {
    const NOTE: Segment = Segment { kind: PT_NOTE, flags: 0, offset: 0, virt: 0, phys: 0, size: 0 };
    const LOAD: Segment = Segment { kind: PT_LOAD, flags: PF_R | PF_W | PF_X, ..Segment::NOTE };

    fn bytes(&self) -> Vec<u8, SIZEOF_PHDR> {
        let mut bytes = Vec::new();
        put(&mut bytes, &self.kind.to_le_bytes());
        put(&mut bytes, &self.flags.to_le_bytes());
        for field in [self.offset, self.virt, self.phys, self.size, self.size, 0] {
            put(&mut bytes, &field.to_le_bytes());
        }
        bytes
    }
}

/// Appends to a header's bytes; what would not fit its fixed size cannot be, by its layout.
fn put<const N: usize>(bytes: &mut Vec<u8, N>, field: &[u8]) {
    let fits = bytes.extend_from_slice(field);
    debug_assert!(fits.is_ok());
}

fn write_zeros(mut count: u64, out: &mut dyn FnMut(&[u8])) {
    let zeros = [0; 256];
    while count > 0 {
        let some = count.min(zeros.len() as u64);
        out(&zeros[..some as usize]);
        count -= some;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_stays_within_a_block_whatever_the_size_of_the_notes() {
        for notes_size in (0..8800).step_by(4) {
            let core = CoreFile::head(62, 4, notes_size, 0);
            let (at, end) = (core.record_at(), core.record_at() + record::SIZE as u64);
            assert_eq!(at / BLOCK, (end - 1) / BLOCK, "notes of {notes_size} bytes");
            assert_eq!(end.next_multiple_of(BLOCK), core.head_size);
        }
    }

    #[test]
    fn more_headers_than_e_phnum_counts_are_counted_in_section_header_0() {
        let core = CoreFile::head(62, 70_000, 400, 0);
        let header = core.file_header();
        assert_eq!(header[56..58], [0xff, 0xff], "e_phnum");
        let section = u64::from_le_bytes(*header[40..].first_chunk().unwrap());
        assert_eq!(section, 64 + 70_000 * 56);
        assert_eq!(section + SIZEOF_SHDR, core.notes_at);
        assert_eq!(header[58..62], [64, 0, 1, 0], "e_shentsize, e_shnum");
    }
}
