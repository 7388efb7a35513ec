//! ELF notes: the records in a PT_NOTE segment.
//!
//! Source: System V ABI, "Note Section". Linux aligns name and descriptor to 4 bytes in cores of
//! both word sizes (include/linux/elfcore.h, kernel 6.1).

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32};

/// The header of one note (Elf64_Nhdr and Elf32_Nhdr are the same).
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Header {
    /// Length of the name in bytes, its terminating zero included.
    pub name_size: U32<LE>,
    /// Length of the descriptor in bytes.
    pub desc_size: U32<LE>,
    /// Type of the note; its meaning depends on the name.
    pub kind: U32<LE>,
}

/// Type of the note named `CORE` that holds a CPU's registers (struct elf_prstatus).
pub const NT_PRSTATUS: u32 = 1;

/// Name of the note that holds the kernel's VMCOREINFO text; its type is 0.
pub const VMCOREINFO: &[u8] = b"VMCOREINFO";

/// One note, borrowed from the segment.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Note<'a> {
    /// The name without its terminating zeros.
    pub name: &'a [u8],
    /// The type.
    pub kind: u32,
    /// The descriptor.
    pub desc: &'a [u8],
    /// Offset of the descriptor in the bytes that were given to [`Notes::new`].
    pub desc_offset: usize,
    /// The whole note, from its header to the end of its padding.
    pub raw: &'a [u8],
}

/// Walks the notes in a segment's bytes. Ends at the first note that is empty (no name: an unused
/// per-CPU buffer) or does not fit, so it always ends.
#[derive(Clone)]
pub struct Notes<'a> {
    bytes: &'a [u8],
    at: usize,
}

impl<'a> Notes<'a> {
    /// Notes in `bytes`, which begin at a note header.
    #[must_use]
    pub const fn new(bytes: &'a [u8]) -> Notes<'a> {
        Notes { bytes, at: 0 }
    }
}

impl<'a> Iterator for Notes<'a> {
    type Item = Note<'a>;

    fn next(&mut self) -> Option<Note<'a>> {
        let rest = self.bytes.get(self.at..)?;
        let (header, _) = Header::ref_from_prefix(rest).ok()?;
        let name_size = header.name_size.get() as usize;
        let desc_size = header.desc_size.get() as usize;
        if name_size == 0 {
            return None;
        }
        let name_at = size_of::<Header>();
        let desc_at = name_at.checked_add(name_size)?.checked_next_multiple_of(4)?;
        let end = desc_at.checked_add(desc_size)?;
        let name = rest.get(name_at..name_at + name_size)?;
        let desc = rest.get(desc_at..end)?;
        let size = end.checked_next_multiple_of(4)?.min(rest.len());
        let note = Note {
            name: name.split(|&byte| byte == 0).next().unwrap_or(name),
            kind: header.kind.get(),
            desc,
            desc_offset: self.at + desc_at,
            raw: rest.get(..size)?,
        };
        self.at += size;
        Some(note)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec::Vec;

    fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
        let header = Header {
            name_size: (name.len() as u32).into(),
            desc_size: (desc.len() as u32).into(),
            kind: kind.into(),
        };
        let mut bytes = header.as_bytes().to_vec();
        bytes.extend_from_slice(name);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes.extend_from_slice(desc);
        bytes.resize(bytes.len().next_multiple_of(4), 0);
        bytes
    }

    #[test]
    fn notes_are_walked_with_their_padding() {
        let mut bytes = note(b"CORE\0", NT_PRSTATUS, &[1, 2, 3, 4, 5]);
        bytes.extend(note(b"VMCOREINFO\0", 0, b"OSRELEASE=6.1.0\n"));
        let notes: Vec<_> = Notes::new(&bytes).collect();
        assert_eq!(notes.len(), 2);
        assert_eq!((notes[0].name, notes[0].kind), (&b"CORE"[..], NT_PRSTATUS));
        assert_eq!(notes[0].desc, [1, 2, 3, 4, 5]);
        assert_eq!(notes[1].desc, b"OSRELEASE=6.1.0\n");
        assert_eq!(&bytes[notes[1].desc_offset..][..9], b"OSRELEASE");
    }

    #[test]
    fn walk_ends_at_an_unused_buffer_and_at_sizes_that_do_not_fit() {
        assert_eq!(Notes::new(&[0; 64]).count(), 0);
        assert_eq!(Notes::new(&[0xff; 64]).count(), 0);
        assert_eq!(Notes::new(&[1, 0, 0]).count(), 0);
        let mut cut = note(b"CORE\0", NT_PRSTATUS, &[0; 100]);
        cut.truncate(90);
        assert_eq!(Notes::new(&cut).count(), 0);
    }
}
