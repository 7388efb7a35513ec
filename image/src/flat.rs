//! The memory image of a linked ELF file: what its PT_LOADs put into memory, from address 0 on.

use goblin::elf64::dynamic::{DT_RELA, DT_RELASZ};
use goblin::elf64::header::{Header, SIZEOF_EHDR};
use goblin::elf64::program_header::{PT_DYNAMIC, PT_LOAD, ProgramHeader, SIZEOF_PHDR};
use goblin::elf64::reloc::{SIZEOF_RELA, r_type};

use crate::Error;

/// A payload as it lies in memory, relative to where it is loaded.
#[derive(Debug, PartialEq, Eq)]
pub(crate) struct Flat {
    /// Bytes to load, from offset 0.
    pub bytes: Vec<u8>,
    /// Memory to reserve: `bytes` and the zero-initialized memory behind them.
    pub memory_size: u64,
    /// Offset of the first instruction.
    pub entry: u64,
    /// Types of the relocations that the payload has to apply to itself.
    pub relocations: Vec<u32>,
}

impl Flat {
    /// Lays out the PT_LOADs of `elf`, which must be linked at address 0.
    pub fn from_elf(elf: &[u8]) -> Result<Flat, Error> {
        let header: &[u8; SIZEOF_EHDR] =
            elf.first_chunk().ok_or(Error::Elf("shorter than its header"))?;
        let header = Header::from_bytes(header);
        if header.e_ident[..6] != *b"\x7fELF\x02\x01" {
            return Err(Error::Elf("no ELF64 little-endian magic"));
        }
        let mut flat = Flat {
            bytes: Vec::new(),
            memory_size: 0,
            entry: header.e_entry,
            relocations: Vec::new(),
        };
        let mut dynamic = None;
        for index in 0..u64::from(header.e_phnum) {
            let at = header.e_phoff.saturating_add(index * SIZEOF_PHDR as u64);
            let bytes = slice(elf, at, SIZEOF_PHDR as u64)
                .ok_or(Error::Elf("program headers cut short"))?;
            let segment = ProgramHeader::from_bytes(bytes, 1)[0];
            match segment.p_type {
                PT_LOAD if segment.p_memsz != 0 => flat.place(elf, &segment)?,
                PT_DYNAMIC => dynamic = Some(segment),
                _ => {}
            }
        }
        if let Some(segment) = dynamic {
            let table = slice(elf, segment.p_offset, segment.p_filesz)
                .ok_or(Error::Elf("the dynamic section is not in the file"))?;
            flat.relocations = flat.relocations(table)?;
        }
        if flat.bytes.is_empty() {
            return Err(Error::Elf("nothing to load"));
        }
        Ok(flat)
    }

    /// Types of the relocations that the dynamic section `table` names.
    fn relocations(&self, table: &[u8]) -> Result<Vec<u32>, Error> {
        let words = |bytes: &[u8]| -> Vec<u64> {
            bytes
                .chunks_exact(8)
                .map(|word| word.iter().rev().fold(0, |n, &b| n << 8 | u64::from(b)))
                .collect()
        };
        let entries = words(table);
        let value = |tag| {
            let entry = entries.chunks_exact(2).find(|entry| entry[0] == tag);
            entry.map_or(0, |entry| entry[1])
        };
        let bytes = slice(&self.bytes, value(DT_RELA), value(DT_RELASZ))
            .ok_or(Error::Elf("its relocations are not in the image"))?;
        Ok(bytes.chunks_exact(SIZEOF_RELA).map(|entry| r_type(words(entry)[1])).collect())
    }

    fn place(&mut self, elf: &[u8], segment: &ProgramHeader) -> Result<(), Error> {
        let refuse = |why| Error::Segment { address: segment.p_vaddr, why };
        let bytes = slice(elf, segment.p_offset, segment.p_filesz)
            .ok_or(refuse("its bytes are not in the file"))?;
        let start = usize::try_from(segment.p_vaddr)
            .ok()
            .filter(|&start| start < 1 << 30)
            .ok_or(refuse("the image must be linked at address 0"))?;
        if start < self.bytes.len() || segment.p_vaddr < self.memory_size {
            return Err(refuse("segments must ascend and not overlap"));
        }
        if !bytes.is_empty() {
            self.bytes.resize(start, 0);
            self.bytes.extend_from_slice(bytes);
        }
        self.memory_size = segment
            .p_vaddr
            .checked_add(segment.p_memsz)
            .filter(|_| segment.p_memsz >= segment.p_filesz)
            .ok_or(refuse("its size in memory is impossible"))?;
        Ok(())
    }
}

fn slice(bytes: &[u8], at: u64, len: u64) -> Option<&[u8]> {
    let at = usize::try_from(at).ok()?;
    bytes.get(at..at.checked_add(usize::try_from(len).ok()?)?)
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A linked file with segments (address, bytes, size in memory), for tests.
    pub fn elf(entry: u64, segments: &[(u64, &[u8], u64)]) -> Vec<u8> {
        let mut header = Header::default();
        header.e_ident[..6].copy_from_slice(b"\x7fELF\x02\x01");
        header.e_entry = entry;
        header.e_phoff = SIZEOF_EHDR as u64;
        header.e_phnum = segments.len() as u16;
        let mut at = (SIZEOF_EHDR + segments.len() * SIZEOF_PHDR) as u64;
        let mut table = Vec::new();
        let mut data = Vec::new();
        for &(address, bytes, memory) in segments {
            for field in [1u32, 6] {
                table.extend_from_slice(&field.to_le_bytes());
            }
            for field in [at, address, address, bytes.len() as u64, memory, 4096] {
                table.extend_from_slice(&field.to_le_bytes());
            }
            data.extend_from_slice(bytes);
            at += bytes.len() as u64;
        }
        let mut file = header_bytes(&header);
        file.extend(table);
        file.extend(data);
        file
    }

    fn header_bytes(header: &Header) -> Vec<u8> {
        let mut bytes = header.e_ident.to_vec();
        bytes.extend_from_slice(&[3, 0, 62, 0, 1, 0, 0, 0]);
        for field in [header.e_entry, header.e_phoff, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes.extend_from_slice(&[0; 4]);
        for field in [SIZEOF_EHDR as u16, SIZEOF_PHDR as u16, header.e_phnum, 0, 0, 0] {
            bytes.extend_from_slice(&field.to_le_bytes());
        }
        bytes
    }

    #[test]
    fn segments_land_at_their_addresses_and_bss_only_counts() {
        let file = elf(0x200, &[(0, b"text", 4), (0x1000, b"data", 0x3000)]);
        let flat = Flat::from_elf(&file).unwrap();
        assert_eq!(flat.bytes.len(), 0x1004);
        assert_eq!((&flat.bytes[..4], &flat.bytes[0x1000..]), (&b"text"[..], &b"data"[..]));
        assert_eq!((flat.memory_size, flat.entry), (0x4000, 0x200));
    }

    #[test]
    fn overlapping_and_far_segments_are_refused() {
        let overlap = elf(0, &[(0, b"text", 0x2000), (0x1000, b"data", 4)]);
        assert!(matches!(Flat::from_elf(&overlap), Err(Error::Segment { address: 0x1000, .. })));
        let far = elf(0, &[(0xffff_ffff_8000_0000, b"text", 4)]);
        assert!(matches!(Flat::from_elf(&far), Err(Error::Segment { .. })));
    }

    #[test]
    fn files_cut_at_any_byte_are_refused_without_a_panic() {
        let file = elf(0x200, &[(0, b"text", 4), (0x1000, b"data", 0x3000)]);
        for cut in 0..file.len() {
            assert!(Flat::from_elf(&file[..cut]).is_err(), "cut at {cut}");
        }
    }
}
