//! The ELF core in an area, as far as the loader must understand it: how long it is, and what its
//! notes say.
//!
//! Everything read here was written by a crashing machine, perhaps not to its end: every offset and
//! count is an allegation and is bounded by the space that a core can have.
//!
//! Source: System V ABI, chapters 4 "Object Files" and 5 "Program Loading"; for cores with many
//! headers the PN_XNUM convention of elf(5).

use std::io;

use format::note::{Notes, VMCOREINFO};
use format::record::{self, Record};
use zerocopy::{FromBytes, Immutable, KnownLayout, LE, U16, U32, U64};

use crate::device::ReadAt;

/// Bit of `e_flags` that says: this dump is not complete (makedumpfile's DUMP_ELF_INCOMPLETE).
pub const FLAG_INCOMPLETE: u8 = 1;

/// Where the low byte of `e_flags` is in an ELF64 header.
pub const FLAGS_OFFSET: usize = 48;

/// Most bytes of notes that are read: enough for 8192 CPUs many times over.
const MAX_NOTES: u64 = 64 << 20;

const PT_NOTE: u32 = 4;
const PN_XNUM: u16 = 0xffff;

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Ehdr {
    magic: [u8; 4],
    class: u8,
    data: u8,
    ident: [u8; 10],
    kind: U16<LE>,
    machine: U16<LE>,
    version: U32<LE>,
    entry: U64<LE>,
    phoff: U64<LE>,
    shoff: U64<LE>,
    flags: U32<LE>,
    ehsize: U16<LE>,
    phentsize: U16<LE>,
    phnum: U16<LE>,
    shentsize: U16<LE>,
    shnum: U16<LE>,
    shstrndx: U16<LE>,
}

#[derive(FromBytes, Immutable, KnownLayout)]
#[repr(C)]
struct Phdr {
    kind: U32<LE>,
    flags: U32<LE>,
    offset: U64<LE>,
    vaddr: U64<LE>,
    paddr: U64<LE>,
    filesz: U64<LE>,
    memsz: U64<LE>,
    align: U64<LE>,
}

const EHDR_SIZE: usize = size_of::<Ehdr>();
const PHDR_SIZE: u64 = size_of::<Phdr>() as u64;
const _: () = assert!(
    EHDR_SIZE == 64 && PHDR_SIZE == 56 && core::mem::offset_of!(Ehdr, flags) == FLAGS_OFFSET
);

/// Offset of `sh_info` in an ELF64 section header.
const SH_INFO: u64 = 44;

/// Why a core cannot be understood.
#[derive(Debug, thiserror::Error)]
pub enum CoreError {
    /// No ELF header.
    #[error("there is no ELF core at the start of the area")]
    NoElf,
    /// An offset or a count that leads out of the space a core can have.
    #[error("the core's {0} lies outside the area")]
    Outside(&'static str),
    /// The medium could not be read.
    #[error("cannot read the core: {0}")]
    Io(#[from] io::Error),
}

/// The core's headers, checked against the space it can have.
#[derive(Clone, Copy, Debug)]
pub struct Headers {
    /// Largest size the core can have, in bytes.
    limit: u64,
    first: u64,
    count: u64,
}

/// What the core's notes say.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Notable {
    /// The payload's record.
    pub record: Option<Record>,
    /// Release of the crashed kernel (OSRELEASE in VMCOREINFO).
    pub release: Option<String>,
    /// Time of the crash in seconds since 1970 (CRASHTIME in VMCOREINFO).
    pub crash_time: Option<u64>,
}

impl Headers {
    /// Reads the headers of the core at the start of `area`, which can have at most `limit` bytes.
    ///
    /// # Errors
    /// There is no core, or its headers lead elsewhere.
    pub fn read<Source: ReadAt + ?Sized>(area: &Source, limit: u64) -> Result<Headers, CoreError> {
        let mut bytes = [0; EHDR_SIZE];
        area.read_at(&mut bytes, 0)?;
        let ehdr = Ehdr::ref_from_bytes(&bytes).map_err(|_| CoreError::NoElf)?;
        // ELFCLASS64, ELFDATA2LSB.
        if ehdr.magic != *b"\x7fELF" || ehdr.class != 2 || ehdr.data != 1 {
            return Err(CoreError::NoElf);
        }
        if u64::from(ehdr.phentsize.get()) != PHDR_SIZE {
            return Err(CoreError::NoElf);
        }
        let count = match ehdr.phnum.get() {
            PN_XNUM => number_in_section_header(area, limit, ehdr.shoff.get())?,
            count => u64::from(count),
        };
        let first = ehdr.phoff.get();
        let end = (count * PHDR_SIZE).checked_add(first);
        if end.is_none_or(|end| end > limit) {
            return Err(CoreError::Outside("program header table"));
        }
        Ok(Headers { limit, first, count })
    }

    /// Where the core ends according to its headers.
    ///
    /// # Errors
    /// A header leads out of the space a core can have, or could not be read.
    pub fn end<Source: ReadAt + ?Sized>(&self, area: &Source) -> Result<u64, CoreError> {
        let mut end = self.first + self.count * PHDR_SIZE;
        self.each(area, |header| {
            let segment_end = header.offset.get().checked_add(header.filesz.get());
            match segment_end.filter(|&segment_end| segment_end <= self.limit) {
                Some(segment_end) => end = end.max(segment_end),
                None => return Err(CoreError::Outside("segment")),
            }
            Ok(())
        })?;
        Ok(end)
    }

    /// Reads the notes and picks out what is worth telling.
    ///
    /// # Errors
    /// The notes lie outside, or could not be read.
    pub fn notable<Source: ReadAt + ?Sized>(&self, area: &Source) -> Result<Notable, CoreError> {
        let mut notable = Notable::default();
        self.each(area, |header| {
            if header.kind.get() != PT_NOTE {
                return Ok(());
            }
            let (offset, size) = (header.offset.get(), header.filesz.get());
            let fits = offset.checked_add(size).is_some_and(|end| end <= self.limit);
            if !fits || size > MAX_NOTES {
                return Err(CoreError::Outside("note segment"));
            }
            let mut bytes = vec![0; size as usize];
            area.read_at(&mut bytes, offset)?;
            notable.take(&bytes);
            Ok(())
        })?;
        Ok(notable)
    }

    /// Calls `visit` with every program header, reading them a piece at a time.
    fn each<Source: ReadAt + ?Sized>(
        &self,
        area: &Source,
        mut visit: impl FnMut(&Phdr) -> Result<(), CoreError>,
    ) -> Result<(), CoreError> {
        const PIECE: u64 = 4096;
        let mut at = 0;
        while at < self.count {
            let count = PIECE.min(self.count - at);
            let mut bytes = vec![0; (count * PHDR_SIZE) as usize];
            area.read_at(&mut bytes, self.first + at * PHDR_SIZE)?;
            for bytes in bytes.chunks_exact(PHDR_SIZE as usize) {
                visit(Phdr::ref_from_bytes(bytes).map_err(|_| CoreError::NoElf)?)?;
            }
            at += count;
        }
        Ok(())
    }
}

impl Notable {
    fn take(&mut self, bytes: &[u8]) {
        for note in Notes::new(bytes) {
            if note.name == record::NAME && note.kind == record::KIND {
                self.record = Record::from_desc(note.desc);
            } else if note.name == VMCOREINFO {
                let text = String::from_utf8_lossy(note.desc);
                let value = |key| text.lines().find_map(|line| line.strip_prefix(key));
                self.release = value("OSRELEASE=").map(|release| release.to_string());
                self.crash_time = value("CRASHTIME=").and_then(|time| time.parse().ok());
            }
        }
    }
}

/// The number of program headers when `e_phnum` cannot hold it.
fn number_in_section_header<Source: ReadAt + ?Sized>(
    area: &Source,
    limit: u64,
    section_headers: u64,
) -> Result<u64, CoreError> {
    let at = section_headers.checked_add(SH_INFO).filter(|at| at + 4 <= limit);
    let at = at.ok_or(CoreError::Outside("section header table"))?;
    let mut number = [0; 4];
    area.read_at(&mut number, at)?;
    Ok(u64::from(u32::from_le_bytes(number)))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn header(count: u16) -> Vec<u8> {
        let mut bytes = vec![0; 1 << 20];
        bytes[..6].copy_from_slice(b"\x7fELF\x02\x01");
        bytes[32..40].copy_from_slice(&64u64.to_le_bytes());
        bytes[54..56].copy_from_slice(&56u16.to_le_bytes());
        bytes[56..58].copy_from_slice(&count.to_le_bytes());
        bytes
    }

    fn segment(bytes: &mut [u8], index: usize, kind: u32, offset: u64, size: u64) {
        let at = 64 + index * 56;
        bytes[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        bytes[at + 8..at + 16].copy_from_slice(&offset.to_le_bytes());
        bytes[at + 32..at + 40].copy_from_slice(&size.to_le_bytes());
    }

    fn end(bytes: &[u8]) -> Result<u64, CoreError> {
        Headers::read(bytes, bytes.len() as u64)?.end(bytes)
    }

    #[test]
    fn core_ends_with_its_last_segment() {
        let mut bytes = header(2);
        segment(&mut bytes, 0, 1, 8192, 4096);
        segment(&mut bytes, 1, 1, 4096, 4096);
        assert_eq!(end(&bytes).unwrap(), 12_288);
    }

    #[test]
    fn number_of_headers_beyond_65534_is_in_section_header_0() {
        let mut bytes = header(PN_XNUM);
        bytes[40..48].copy_from_slice(&0x8_0000u64.to_le_bytes());
        bytes[0x8_0000 + 44..][..4].copy_from_slice(&3u32.to_le_bytes());
        segment(&mut bytes, 2, 1, 0x9_0000, 4096);
        assert_eq!(end(&bytes).unwrap(), 0x9_1000);
        bytes[0x8_0000 + 44..][..4].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(matches!(end(&bytes), Err(CoreError::Outside(_))));
        bytes[40..48].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(end(&bytes), Err(CoreError::Outside(_))));
    }

    #[test]
    fn headers_that_lead_out_of_the_area_are_refused() {
        assert!(matches!(end(&[0; 4096]), Err(CoreError::NoElf)));
        let mut bytes = header(1);
        bytes[32..40].copy_from_slice(&u64::MAX.to_le_bytes());
        assert!(matches!(end(&bytes), Err(CoreError::Outside(_))));
        for (offset, size) in [(1 << 20, 1), (u64::MAX, 1), (0, u64::MAX)] {
            let mut bytes = header(1);
            segment(&mut bytes, 0, PT_NOTE, offset, size);
            assert!(matches!(end(&bytes), Err(CoreError::Outside(_))));
            let headers = Headers::read(&bytes[..], bytes.len() as u64).unwrap();
            assert!(matches!(headers.notable(&bytes[..]), Err(CoreError::Outside(_))));
        }
    }
}
