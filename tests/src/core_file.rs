//! The dump as an ELF core, and its comparison with the machine's own memory.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, ensure};
use format::record::{self, Record};
use goblin::elf::Elf;
use goblin::elf::program_header::{PT_LOAD, PT_NOTE, ProgramHeader};
use xtask::qemu::Vm;

/// Program headers and notes lie in the first part of the file.
const HEAD: u64 = 1 << 20;

/// Bytes of one piece of a sample.
const SAMPLE: u64 = 16 << 20;

/// Bytes compared at a time.
const CHUNK: usize = 1 << 20;

/// An ELF core: a file of its own, or at the start of an area.
pub struct CoreFile {
    path: PathBuf,
    headers: Vec<ProgramHeader>,
    notes: Vec<(String, Vec<u8>)>,
}

impl CoreFile {
    /// Reads the headers of the core that begins at the start of `path`.
    ///
    /// # Errors
    /// When there is no core.
    pub fn open(path: &Path) -> Result<CoreFile> {
        let mut head = Vec::new();
        File::open(path)?.take(HEAD).read_to_end(&mut head)?;
        let elf = Elf::parse(&head).with_context(|| format!("no core in {}", path.display()))?;
        let notes = elf.iter_note_headers(&head).into_iter().flatten().flatten();
        let notes = notes.map(|note| (note.name.to_owned(), note.desc.to_vec())).collect();
        Ok(CoreFile { path: path.to_owned(), headers: elf.program_headers.clone(), notes })
    }

    /// The PT_LOAD headers.
    pub fn loads(&self) -> impl Iterator<Item = &ProgramHeader> {
        self.headers.iter().filter(|header| header.p_type == PT_LOAD)
    }

    /// How many notes are named `name`.
    #[must_use]
    pub fn count_notes(&self, name: &str) -> usize {
        self.notes.iter().filter(|(found, _)| found == name).count()
    }

    /// What the payload says about the dump.
    ///
    /// # Errors
    /// When it left no record.
    pub fn record(&self) -> Result<Record> {
        let mut notes = self.notes.iter().filter(|(name, _)| name.as_bytes() == record::NAME);
        notes.find_map(|(_, desc)| Record::from_desc(desc)).context("no record of the payload")
    }

    /// The value of `key` in the VMCOREINFO note.
    ///
    /// # Errors
    /// When the note or the key is missing.
    pub fn vmcoreinfo(&self, key: &str) -> Result<String> {
        let (_, text) =
            self.notes.iter().find(|(name, _)| name == "VMCOREINFO").context("no VMCOREINFO")?;
        let text = String::from_utf8_lossy(text);
        let value = text.lines().find_map(|line| line.strip_prefix(key)?.strip_prefix('='));
        value.map(str::to_owned).with_context(|| format!("VMCOREINFO has no {key}"))
    }

    /// Fails unless the file is laid out as crash, gdb and makedumpfile want it: one PT_NOTE, which
    /// is the first header, before all data; a first PT_LOAD without alignment; page data in whole
    /// pages of the file.
    ///
    /// # Errors
    /// Names the first rule that is broken.
    pub fn check_layout(&self) -> Result<()> {
        let notes = self.headers.iter().filter(|header| header.p_type == PT_NOTE).count();
        ensure!(notes == 1, "{notes} PT_NOTE headers, readers want one");
        ensure!(self.headers[0].p_type == PT_NOTE, "PT_NOTE is not the first header");
        let end = self.headers[0].p_offset + self.headers[0].p_filesz;
        let mut loads = self.loads();
        let first = loads.next().context("no PT_LOAD")?;
        ensure!(first.p_align == 0, "the first PT_LOAD has p_align {}", first.p_align);
        for header in self.loads() {
            ensure!(header.p_offset >= end, "data at {:#x} before the notes' end", header.p_offset);
            ensure!(header.p_offset % 4096 == 0, "data at {:#x}, not a page", header.p_offset);
        }
        Ok(())
    }

    /// Compares every byte of every PT_LOAD with the memory of `vm`, as QEMU reads it now. Returns
    /// what differs, a line per PT_LOAD. Memory images are kept in `directory` meanwhile.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn differences_to(&self, vm: &mut Vm, directory: &Path) -> Result<Vec<String>> {
        self.differences_in(self.loads().cloned(), vm, directory)
    }

    /// The same for a sample: of every 256 MiB of a PT_LOAD the first 16, and its last 16 MiB.
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn sampled_differences_to(&self, vm: &mut Vm, directory: &Path) -> Result<Vec<String>> {
        let pieces = self.loads().flat_map(|load| {
            let starts = (0..load.p_filesz).step_by(256 << 20);
            let last = load.p_filesz.saturating_sub(SAMPLE);
            starts.chain([last]).map(|at| part(load, at, SAMPLE)).collect::<Vec<_>>()
        });
        self.differences_in(pieces, vm, directory)
    }

    /// The same for `pieces` of the PT_LOADs; see [`part`].
    ///
    /// # Errors
    /// When something cannot be read.
    pub fn differences_in(
        &self,
        pieces: impl Iterator<Item = ProgramHeader>,
        vm: &mut Vm,
        directory: &Path,
    ) -> Result<Vec<String>> {
        let mut differences = Vec::new();
        let memory = directory.join("memory");
        for piece in pieces.filter(|piece| piece.p_filesz > 0) {
            vm.save_memory(piece.p_paddr, piece.p_filesz, &memory)?;
            let first = self.first_difference(&piece, &memory)?;
            std::fs::remove_file(&memory)?;
            if let Some((count, at)) = first {
                differences.push(format!(
                    "{:#x} bytes at {:#x}: {count} differ, the first at {:#x}",
                    piece.p_filesz,
                    piece.p_paddr,
                    piece.p_paddr + at
                ));
            }
        }
        Ok(differences)
    }

    /// How many bytes of `header`'s data differ from the file `memory`, and where the first is.
    fn first_difference(
        &self,
        header: &ProgramHeader,
        memory: &Path,
    ) -> Result<Option<(usize, u64)>> {
        let mut ours = File::open(&self.path)?;
        ours.seek(SeekFrom::Start(header.p_offset))?;
        let mut ours = BufReader::with_capacity(CHUNK, ours.take(header.p_filesz));
        let mut theirs = BufReader::with_capacity(CHUNK, File::open(memory)?);
        let (mut count, mut first) = (0, None);
        let mut at = 0;
        let (mut left, mut right) = (vec![0; CHUNK], vec![0; CHUNK]);
        while at < header.p_filesz {
            let size = usize::try_from(header.p_filesz - at)?.min(CHUNK);
            ours.read_exact(&mut left[..size]).context("the dump ends too early")?;
            theirs.read_exact(&mut right[..size]).context("QEMU's memory ends too early")?;
            if left[..size] != right[..size] {
                let differ = |index: &usize| left[*index] != right[*index];
                count += (0..size).filter(differ).count();
                let offset = (0..size).find(differ).unwrap_or_default();
                first = first.or(Some(at + offset as u64));
            }
            at += size as u64;
        }
        Ok(first.map(|first| (count, first)))
    }
}

/// The symbols of a vmlinux.
pub struct Symbols {
    by_name: BTreeMap<String, u64>,
}

impl Symbols {
    /// Reads those of `vmlinux`.
    ///
    /// # Errors
    /// When there is no such file or it is not ELF.
    pub fn read(vmlinux: &Path) -> Result<Symbols> {
        let bytes = std::fs::read(vmlinux)?;
        let elf = Elf::parse(&bytes).with_context(|| format!("in {}", vmlinux.display()))?;
        let named = elf
            .syms
            .iter()
            .filter_map(|symbol| Some((elf.strtab.get_at(symbol.st_name)?.to_owned(), symbol)));
        Ok(Symbols { by_name: named.map(|(name, symbol)| (name, symbol.st_value)).collect() })
    }

    /// The address of `name` in a kernel that was not moved.
    ///
    /// # Errors
    /// When there is no symbol of this name.
    pub fn address(&self, name: &str) -> Result<u64> {
        self.by_name.get(name).copied().with_context(|| format!("vmlinux has no symbol {name}"))
    }
}

/// At most `size` bytes of `load` from the offset `at` on, as a header of their own.
#[must_use]
pub fn part(load: &ProgramHeader, at: u64, size: u64) -> ProgramHeader {
    ProgramHeader {
        p_offset: load.p_offset + at,
        p_paddr: load.p_paddr + at,
        p_filesz: size.min(load.p_filesz - at),
        ..load.clone()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_single_wrong_byte_behind_the_first_mib_is_found() {
        let directory = tempfile::tempdir().unwrap();
        let (dump, memory) = (directory.path().join("dump"), directory.path().join("memory"));
        let mut bytes = vec![7; (2 << 20) + 100];
        std::fs::write(&memory, &bytes[4096..]).unwrap();
        let header = ProgramHeader {
            p_offset: 4096,
            p_filesz: (bytes.len() - 4096) as u64,
            ..ProgramHeader::new()
        };
        let core = CoreFile { path: dump.clone(), headers: Vec::new(), notes: Vec::new() };

        std::fs::write(&dump, &bytes).unwrap();
        assert_eq!(core.first_difference(&header, &memory).unwrap(), None);
        bytes[(1 << 20) + 5000] = 8;
        std::fs::write(&dump, &bytes).unwrap();
        let found = core.first_difference(&header, &memory).unwrap();
        assert_eq!(found, Some((1, (1 << 20) + 904)));
    }
}
