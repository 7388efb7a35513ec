//! The kernel's vmlinux: an optional file that adds what the dump does not hold.

use std::borrow::Cow;
use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use format::note::Notes;
use goblin::elf::Elf;
use goblin::elf::header::{ELFMAG, ET_DYN, ET_EXEC};
use goblin::elf::section_header::{SHF_COMPRESSED, SHT_NOBITS, SectionHeader};
use memmap2::Mmap;

use crate::source::{ELF64, map};
use crate::{Error, VirtAddr, bytes};

use super::symbols::{Symbol, Symbols};

/// Type of the note named `GNU` that holds a build id (NT_GNU_BUILD_ID).
const BUILD_ID: u32 = 3;

/// A vmlinux. Sections are found by name; nothing in them is read before it is asked for.
pub struct Vmlinux {
    path: PathBuf,
    map: Mmap,
    sections: HashMap<String, Section>,
}

struct Section {
    file: Range<usize>,
    /// Where the section lies in a kernel that was not moved.
    address: u64,
    compressed: bool,
}

/// The sections that a running kernel does not change, but for single instructions of its text. What
/// holds addresses (read-only data, say) is not among them: KASLR changes those.
const CONSTANT: [&str; 3] = [".text", ".orc_unwind", ".orc_unwind_ip"];

impl Vmlinux {
    /// Opens a vmlinux.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Vmlinux`].
    pub fn open(path: &Path) -> Result<Vmlinux, Error> {
        let map = map(path)?;
        let sections = sections(&map).map_err(|reason| Error::Vmlinux {
            path: path.to_owned(),
            reason: reason.to_owned(),
        })?;
        Ok(Vmlinux { path: path.to_owned(), map, sections })
    }

    /// The file.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The bytes of the section `name`; empty when there is none, or when it is compressed.
    #[must_use]
    pub fn section(&self, name: &str) -> &[u8] {
        let section = self.sections.get(name).filter(|section| !section.compressed);
        section.and_then(|section| self.map.get(section.file.clone())).unwrap_or_default()
    }

    /// The constant parts of the kernel's image when it was moved by `offset` (KASLR).
    #[must_use]
    pub fn constants(&self, offset: u64) -> Vec<(VirtAddr, &[u8])> {
        let part = |name| {
            let section: &Section = self.sections.get(name)?;
            Some((VirtAddr(section.address.wrapping_add(offset)), self.section(name)))
        };
        CONSTANT.into_iter().filter_map(part).collect()
    }

    /// Why there are no lines and inlined functions to be had from it, if there are none.
    #[must_use]
    pub fn no_lines(&self) -> Option<&'static str> {
        match self.sections.get(".debug_info") {
            None => Some("it has no debug information; is there a vmlinux in the -dbg package?"),
            Some(section) if section.compressed => Some(
                "its debug sections are compressed; make a copy by \
                 `objcopy --decompress-debug-sections`",
            ),
            Some(_) => None,
        }
    }

    /// The build id, in hexadecimal.
    #[must_use]
    pub fn build_id(&self) -> Option<String> {
        build_id(self.section(".notes")).or_else(|| build_id(self.section(".note.gnu.build-id")))
    }

    /// Its symbol table, moved by `offset` (KASLR); `None` when it was stripped.
    #[must_use]
    pub fn symbols(&self, offset: u64) -> Option<ElfSymbols<'_>> {
        let (table, names) = (self.section(".symtab"), self.section(".strtab"));
        (!table.is_empty()).then(|| ElfSymbols::new(table, names, offset))
    }
}

/// The build id among `notes`, in hexadecimal.
#[must_use]
pub fn build_id(notes: &[u8]) -> Option<String> {
    let note = Notes::new(notes).find(|note| note.name == b"GNU" && note.kind == BUILD_ID)?;
    Some(note.desc.iter().map(|byte| format!("{byte:02x}")).collect())
}

fn sections(file: &[u8]) -> Result<HashMap<String, Section>, &'static str> {
    const SECTION_HEADER: usize = 64;
    if !file.starts_with(ELFMAG) {
        return Err("not an ELF file. What is wanted is the uncompressed vmlinux of the -dbg \
                    package, not the vmlinuz that boots");
    }
    let cut = "its headers are cut short; was it copied whole?";
    let header = Elf::parse_header(file).map_err(|_| cut)?;
    if header.e_type != ET_EXEC && header.e_type != ET_DYN {
        return Err("an ELF file, but no executable; is it the dump, given second?");
    }
    let offset = usize::try_from(header.e_shoff).unwrap_or(usize::MAX);
    let count = usize::from(header.e_shnum);
    if offset.checked_add(count * SECTION_HEADER).is_none_or(|end| end > file.len()) {
        return Err(cut);
    }
    let headers = SectionHeader::parse(file, offset, count, ELF64).map_err(|_| cut)?;
    let names = headers.get(usize::from(header.e_shstrndx)).and_then(|it| contents(file, it));
    let names = names.and_then(|range| file.get(range)).ok_or(cut)?;
    let named = |header: &SectionHeader| {
        let name = bytes::c_string(names.get(header.sh_name..)?);
        let compressed = header.sh_flags & u64::from(SHF_COMPRESSED) != 0;
        Some((name, Section { file: contents(file, header)?, address: header.sh_addr, compressed }))
    };
    Ok(headers.iter().filter_map(named).collect())
}

fn contents(file: &[u8], header: &SectionHeader) -> Option<Range<usize>> {
    let start = usize::try_from(header.sh_offset).ok()?;
    let end = start.checked_add(usize::try_from(header.sh_size).ok()?)?;
    (header.sh_type != SHT_NOBITS && end <= file.len()).then_some(start..end)
}

/// The symbol table of a vmlinux, for kernels whose own cannot be found in the dump.
pub struct ElfSymbols<'a> {
    names: &'a [u8],
    /// Address and offset of the name, in ascending order of address; of several at one address, first
    /// the one that the kernel's own table has first.
    symbols: Vec<(VirtAddr, u32)>,
}

impl<'a> ElfSymbols<'a> {
    /// Size and members of Elf64_Sym.
    const SIZE: usize = 24;
    /// Types that name no place: sections, files (STT_SECTION, STT_FILE).
    const NO_PLACE: [u8; 2] = [3, 4];
    /// Binding of weak symbols (STB_WEAK).
    const WEAK: u8 = 2;
    /// Section number of absolute symbols (SHN_ABS).
    const ABSOLUTE: u16 = 0xfff1;

    fn new(table: &[u8], names: &'a [u8], offset: u64) -> ElfSymbols<'a> {
        let symbol = |raw: &[u8]| {
            let name = bytes::u32_at(raw, 0)?;
            let section = bytes::u16_at(raw, 6)?;
            let value = bytes::u64_at(raw, 8)?;
            let place = !ElfSymbols::NO_PLACE.contains(&(raw[4] & 0xf));
            // Per-CPU symbols lie at small addresses, which KASLR does not move.
            let moves = value >> 63 == 1 && section != ElfSymbols::ABSOLUTE;
            let address = VirtAddr(if moves { value.wrapping_add(offset) } else { value });
            // `$x` and `$d` mark code and data (ELF for the Arm 64-bit Architecture, 5.5.5).
            let mark = names.get(name as usize) == Some(&b'$');
            let weak = raw[4] >> 4 == ElfSymbols::WEAK;
            (place && section != 0 && name != 0 && !mark).then_some((address, weak, name))
        };
        let mut symbols: Vec<_> = table.chunks_exact(ElfSymbols::SIZE).filter_map(symbol).collect();
        symbols.sort_by_cached_key(|&(address, weak, name)| {
            let name = text(names, name);
            (address, weak, is_bound(name), name.iter().take_while(|&&byte| byte == b'_').count())
        });
        let symbols = symbols.into_iter().map(|(address, _, name)| (address, name)).collect();
        ElfSymbols { names, symbols }
    }

    fn name(&self, offset: u32) -> Cow<'a, str> {
        String::from_utf8_lossy(text(self.names, offset))
    }
}

fn text(names: &[u8], offset: u32) -> &[u8] {
    let rest = names.get(offset as usize..).unwrap_or_default();
    &rest[..memchr::memchr(0, rest).unwrap_or(rest.len())]
}

/// Whether a name looks like that of the start or the end of a section: where a function is at the same
/// address, that one names it (order of symbols in scripts/kallsyms.c, 6.1).
fn is_bound(name: &[u8]) -> bool {
    let Some(name) = name.strip_prefix(b"__") else { return false };
    let begins = [&b"start_"[..], b"stop_", b"end_"].iter().any(|it| name.starts_with(it));
    begins || name.ends_with(b"_start") || name.ends_with(b"_end")
}

impl Symbols for ElfSymbols<'_> {
    fn covering(&self, at: VirtAddr) -> Option<Symbol> {
        let above = self.symbols.partition_point(|&(address, _)| address <= at);
        let (start, _) = *self.symbols.get(above.checked_sub(1)?)?;
        let first = self.symbols.partition_point(|&(address, _)| address < start);
        let end = self.symbols.get(above).map_or(VirtAddr(u64::MAX), |&(address, _)| address);
        let name = self.name(self.symbols.get(first)?.1).into_owned();
        Some(Symbol { name, start, end })
    }

    fn find(&self, names: &[&str]) -> HashMap<String, VirtAddr> {
        let mut found = HashMap::new();
        for &(address, name) in &self.symbols {
            let name = self.name(name);
            if names.contains(&name.as_ref()) {
                found.entry(name.into_owned()).or_insert(address);
            }
        }
        found
    }

    fn each(&self, with: &mut dyn FnMut(char, &str, VirtAddr)) {
        for &(address, name) in &self.symbols {
            // The table says it by sections, which the kernel's own table no longer has.
            with('?', &self.name(name), address);
        }
    }

    fn last(&self) -> Option<VirtAddr> {
        self.symbols.last().map(|&(address, _)| address)
    }

    fn is_whole(&self) -> bool {
        true
    }
}
