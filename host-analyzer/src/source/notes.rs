//! The notes of a core: registers per CPU, VMCOREINFO, what our payload has to say.

use format::note::{self, Notes};
use format::record::{self, Record};

use crate::bytes;

/// The notes of a core, sorted by what they are.
#[derive(Clone, Default)]
pub struct NoteBook<'a> {
    /// The crash card.
    pub card: Option<&'a str>,
    /// Registers, in the order of the notes: CPUs that saved none are left out.
    pub prstatus: Vec<Prstatus<'a>>,
    /// Whether QEMU wrote the notes: then there is one for each CPU, stopped or not.
    pub by_qemu: bool,
    /// The VMCOREINFO text.
    pub vmcoreinfo: Option<&'a [u8]>,
    /// What the payload that wrote the dump says about it.
    pub record: Option<Record>,
}

impl<'a> NoteBook<'a> {
    /// Sorts the notes of all segments.
    pub fn parse(segments: impl Iterator<Item = &'a [u8]>) -> NoteBook<'a> {
        let mut book = NoteBook::default();
        for note in segments.flat_map(Notes::new) {
            match (note.name, note.kind) {
                (b"CORE", note::NT_PRSTATUS) => book.prstatus.extend(Prstatus::parse(note.desc)),
                (b"QEMU", _) => book.by_qemu = true,
                (note::VMCOREINFO, _) => book.vmcoreinfo = Some(note.desc),
                (record::NAME, record::CARD_KIND) => {
                    book.card = core::str::from_utf8(note.desc).ok()
                }
                (record::NAME, record::KIND) => book.record = Record::from_desc(note.desc),
                _ => {}
            }
        }
        book
    }
}

/// One CPU's registers: struct elf_prstatus (include/linux/elfcore.h, 6.1). The registers
/// themselves are the architecture's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Prstatus<'a> {
    /// PID of the task that ran (0 for an idle CPU; QEMU puts the CPU's number + 1 here).
    pub pid: u32,
    /// pr_reg and what follows it.
    pub registers: &'a [u8],
}

impl<'a> Prstatus<'a> {
    /// Offset of pr_pid and of pr_reg in the 64-bit structure.
    const PID: usize = 32;
    const REGISTERS: usize = 112;

    /// Reads a descriptor; `None` when it is too short.
    #[must_use]
    pub fn parse(desc: &'a [u8]) -> Option<Prstatus<'a>> {
        let pid = bytes::u32_at(desc, Prstatus::PID)?;
        let registers = desc.get(Prstatus::REGISTERS..)?;
        Some(Prstatus { pid, registers })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::note;

    #[test]
    fn notes_are_sorted_by_what_they_are() {
        let mut status = vec![0; 336];
        status[32] = 42;
        status[112] = 7;
        let mut segment = note(b"CORE", 1, &status);
        segment.extend(note(b"QEMU", 0, &[0; 8]));
        segment.extend(note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n"));
        let book = NoteBook::parse(std::iter::once(&segment[..]));
        assert_eq!(book.prstatus.len(), 1);
        assert_eq!((book.prstatus[0].pid, book.prstatus[0].registers[0]), (42, 7));
        assert_eq!(book.vmcoreinfo, Some(&b"OSRELEASE=6.1\n"[..]));
        assert!(book.by_qemu);
        assert_eq!(book.record, None);
    }

    #[test]
    fn status_that_is_cut_short_is_left_out() {
        assert_eq!(Prstatus::parse(&[0; 111]), None);
    }
}
