//! Dumps of which only some pages have arrived: an ELF core whose PT_LOADs cover the pages that are
//! there, and nothing else.
//!
//! All pages of the dump stay in the file; the headers decide which of them exist. So another choice of
//! pages costs only headers.

use std::fs::File;
use std::io::{Seek, SeekFrom, copy};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use goblin::elf::Elf;
use goblin::elf::program_header::{PT_LOAD, PT_NOTE, ProgramHeader};

/// Room for headers before the dump: an ELF header, a section header, and as many program headers as
/// 2 GiB of memory have pages.
const ROOM: u64 = 32 << 20;

/// Size of a page, of a program header and of the two other headers, in bytes.
const PAGE: u64 = 4096;
const PROGRAM_HEADER: usize = 56;
const HEADER: usize = 64;

/// e_phnum that says that section header 0 has the number (gABI, "PN_XNUM").
const PN_XNUM: u16 = 0xffff;

/// A dump with a choice of pages.
pub struct Incomplete {
    path: PathBuf,
    file: File,
    header: Vec<u8>,
    note: ProgramHeader,
    loads: Vec<ProgramHeader>,
}

impl Incomplete {
    /// Copies `dump` into a file at `path`, none of whose pages exist yet.
    ///
    /// # Errors
    /// When the dump cannot be read or the file not be written.
    pub fn new(dump: &Path, path: &Path) -> Result<Incomplete> {
        let mut from = File::open(dump)?;
        let mut head = vec![0; usize::try_from(from.metadata()?.len().min(1 << 20))?];
        from.read_exact_at(&mut head, 0)?;
        let elf = Elf::parse(&head).context("no core")?;
        let of_kind = |kind| elf.program_headers.iter().filter(move |it| it.p_type == kind);
        let note = of_kind(PT_NOTE).next().context("no notes")?.clone();
        let loads = of_kind(PT_LOAD).cloned().collect();
        let mut file = File::create(path)?;
        file.seek(SeekFrom::Start(ROOM))?;
        copy(&mut from, &mut file)?;
        let header = head.get(..HEADER).context("no ELF header")?.to_vec();
        Ok(Incomplete { path: path.to_owned(), file, header, note, loads })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Lets those pages exist whose physical address `has` accepts, and no others. Returns how many
    /// runs of them there are.
    ///
    /// # Errors
    /// When the file cannot be written, or there is no room for the headers.
    pub fn choose(&self, has: &dyn Fn(u64) -> bool) -> Result<usize> {
        let runs: Vec<ProgramHeader> = self.loads.iter().flat_map(|it| runs(it, has)).collect();
        let count = runs.len() + 1;
        let mut bytes = self.header.clone();
        // e_shoff, e_flags (incomplete), e_phoff, e_shentsize
        let sections = HEADER + count * PROGRAM_HEADER;
        bytes[32..40].copy_from_slice(&(HEADER as u64).to_le_bytes());
        bytes[40..48].copy_from_slice(&(sections as u64).to_le_bytes());
        bytes[48] |= 1;
        let number = u16::try_from(count).ok().filter(|&it| it != PN_XNUM).unwrap_or(PN_XNUM);
        bytes[56..58].copy_from_slice(&number.to_le_bytes());
        bytes[58..60].copy_from_slice(&(HEADER as u16).to_le_bytes());
        for header in [&self.note].into_iter().chain(&runs) {
            bytes.extend(header.p_type.to_le_bytes());
            bytes.extend(header.p_flags.to_le_bytes());
            let ProgramHeader { p_offset, p_vaddr, p_paddr, p_filesz, p_memsz, .. } = header;
            for word in [p_offset + ROOM, *p_vaddr, *p_paddr, *p_filesz, *p_memsz, 0] {
                bytes.extend(word.to_le_bytes());
            }
        }
        let mut section = [0; HEADER];
        section[44..48].copy_from_slice(&u32::try_from(count)?.to_le_bytes());
        bytes.extend(section);
        ensure!(bytes.len() as u64 <= ROOM, "{count} headers take {} bytes", bytes.len());
        self.file.write_all_at(&bytes, 0)?;
        Ok(runs.len())
    }
}

/// The runs of pages of `load` that `has` accepts.
fn runs(load: &ProgramHeader, has: &dyn Fn(u64) -> bool) -> Vec<ProgramHeader> {
    let mut runs: Vec<ProgramHeader> = Vec::new();
    for skip in (0..load.p_filesz).step_by(usize::try_from(PAGE).unwrap_or(usize::MAX)) {
        let size = PAGE.min(load.p_filesz - skip);
        if !has(load.p_paddr + skip) {
            continue;
        }
        match runs.last_mut() {
            Some(last) if last.p_paddr + last.p_filesz == load.p_paddr + skip => {
                last.p_filesz += size;
                last.p_memsz += size;
            }
            _ => runs.push(ProgramHeader {
                p_offset: load.p_offset + skip,
                p_vaddr: load.p_vaddr.wrapping_add(skip),
                p_paddr: load.p_paddr + skip,
                p_filesz: size,
                p_memsz: size,
                ..load.clone()
            }),
        }
    }
    runs
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_cover_what_was_chosen_and_nothing_else() {
        let load = ProgramHeader {
            p_offset: 0x5000,
            p_paddr: 0x10_0000,
            p_vaddr: 0xffff_8880_0010_0000,
            p_filesz: 0x5800,
            ..ProgramHeader::new()
        };
        let found = runs(&load, &|page| page != 0x10_2000);
        let shape = |run: &ProgramHeader| (run.p_offset, run.p_paddr, run.p_vaddr, run.p_memsz);
        let expected = [
            (0x5000, 0x10_0000, 0xffff_8880_0010_0000, 0x2000),
            (0x8000, 0x10_3000, 0xffff_8880_0010_3000, 0x2800),
        ];
        assert_eq!(found.iter().map(shape).collect::<Vec<_>>(), expected);
    }
}
