//! Small worlds for tests: memory made of pieces, ELF cores made of segments.

use std::borrow::Cow;
use std::ops::Range;

use crate::kernel::Kernel;
use crate::kernel::paging::X86PageTables;
use crate::kernel::virt::VirtualMemory;
use crate::source::{Dump, Memory};
use crate::{PhysAddr, ReadError, VirtAddr};

/// Numbers of machines in ELF headers.
pub const EM_X86_64: u16 = 62;
pub const EM_AARCH64: u16 = 183;

/// Physical memory from address 0 on, all of it in the dump except what was punched out.
pub struct FakeMemory {
    pub bytes: Vec<u8>,
    ranges: Vec<Range<u64>>,
}

impl FakeMemory {
    pub fn new(size: usize) -> FakeMemory {
        FakeMemory { bytes: vec![0; size], ranges: std::iter::once(0..size as u64).collect() }
    }

    /// Takes the page at `at` out of the dump.
    pub fn punch(&mut self, at: u64) {
        let end = self.bytes.len() as u64;
        self.ranges = vec![0..at, at + 4096..end];
    }

    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.bytes[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    /// Maps 2 MiB at virtual address `virt` to physical 0 by four levels of tables that take the
    /// four pages from `tables` on; returns the address space.
    pub fn mapped(&mut self, virt: u64, tables: u64) -> X86PageTables {
        let slot = |level: u32| (virt >> (12 + 9 * level)) % 512 * 8;
        self.put_u64(tables + slot(3), (tables + 0x1000) | 1);
        self.put_u64(tables + 0x1000 + slot(2), (tables + 0x2000) | 1);
        self.put_u64(tables + 0x2000 + slot(1), 0x81);
        X86PageTables::new(PhysAddr(tables), 4, 0)
    }

    pub fn space(&self, tables: X86PageTables) -> VirtualMemory<'_> {
        VirtualMemory::new(self, Box::new(tables))
    }
}

impl Memory for FakeMemory {
    fn run(&self, at: PhysAddr, max: usize) -> Result<Cow<'_, [u8]>, ReadError> {
        let missing = ReadError::NotInDump(at);
        let range = self.ranges.iter().find(|range| range.contains(&at.0)).ok_or(missing)?;
        let end = range.end.min(at.0.saturating_add(max as u64));
        Ok(Cow::Borrowed(&self.bytes[at.0 as usize..end as usize]))
    }

    fn ranges(&self) -> &[Range<u64>] {
        &self.ranges
    }

    fn linear(&self, _: VirtAddr) -> Option<PhysAddr> {
        None
    }
}

/// A segment of an ELF core: type, physical address, bytes, size in memory.
pub struct Segment {
    pub kind: u32,
    pub phys: u64,
    pub bytes: Vec<u8>,
    pub memory_size: u64,
}

impl Segment {
    pub fn load(phys: u64, bytes: &[u8]) -> Segment {
        Segment { kind: 1, phys, bytes: bytes.to_vec(), memory_size: bytes.len() as u64 }
    }

    pub fn note(bytes: &[u8]) -> Segment {
        Segment { kind: 4, phys: 0, bytes: bytes.to_vec(), memory_size: bytes.len() as u64 }
    }
}

/// An ELF core with these segments; `extended` puts their number into section header 0.
pub fn elf_core(flags: u32, extended: bool, segments: &[Segment]) -> Vec<u8> {
    let count = segments.len();
    let headers_end = 64 + 56 * count + 64;
    let mut core = vec![0; 64];
    core[..7].copy_from_slice(&[0x7f, b'E', b'L', b'F', 2, 1, 1]);
    core[16] = 4; // ET_CORE
    core[18] = 62; // EM_X86_64
    core[20] = 1;
    core[32] = 64; // e_phoff
    core[40..48].copy_from_slice(&((headers_end - 64) as u64).to_le_bytes()); // e_shoff
    core[48..52].copy_from_slice(&flags.to_le_bytes());
    core[52] = 64; // e_ehsize
    core[54] = 56; // e_phentsize
    core[56..58].copy_from_slice(&if extended { 0xffff } else { count as u16 }.to_le_bytes());
    core[58] = 64; // e_shentsize
    let mut data = headers_end as u64;
    for segment in segments {
        let mut header = Vec::new();
        header.extend_from_slice(&segment.kind.to_le_bytes());
        header.extend_from_slice(&7u32.to_le_bytes());
        let stored = segment.bytes.len() as u64;
        for word in [data, segment.phys, segment.phys, stored, segment.memory_size, 0] {
            header.extend_from_slice(&word.to_le_bytes());
        }
        core.extend_from_slice(&header);
        data += stored;
    }
    let mut section = [0; 64];
    section[44..48].copy_from_slice(&(count as u32).to_le_bytes()); // sh_info
    core.extend_from_slice(&section);
    segments.iter().for_each(|segment| core.extend_from_slice(&segment.bytes));
    core
}

/// A note; `name` without the zero at its end.
pub fn note(name: &[u8], kind: u32, desc: &[u8]) -> Vec<u8> {
    let mut note = Vec::new();
    for word in [name.len() as u32 + 1, desc.len() as u32, kind] {
        note.extend_from_slice(&word.to_le_bytes());
    }
    note.extend_from_slice(name);
    note.push(0);
    note.resize(note.len().next_multiple_of(4), 0);
    note.extend_from_slice(desc);
    note.resize(note.len().next_multiple_of(4), 0);
    note
}

/// A flattened file with these records.
pub fn flattened(records: &[(u64, &[u8])]) -> Vec<u8> {
    let mut file = b"makedumpfile\0\0\0\0".to_vec();
    file.extend([1u64, 1].iter().flat_map(|word| word.to_be_bytes()));
    file.resize(4096, 0);
    for (offset, bytes) in records {
        file.extend_from_slice(&offset.to_be_bytes());
        file.extend_from_slice(&(bytes.len() as u64).to_be_bytes());
        file.extend_from_slice(bytes);
    }
    file.extend_from_slice(&[0xff; 16]);
    file
}

/// Writes the kernel's symbol table: 1 KiB each of names, tokens and addresses from 0x1000 on. The
/// first character of a name is its type.
pub fn put_symbols(memory: &mut FakeMemory, base: u64, all: &[(u64, &str)]) {
    let (mut names, mut offsets) = (Vec::new(), Vec::new());
    for (address, name) in all {
        names.push(name.len() as u8);
        names.extend_from_slice(name.as_bytes());
        offsets.extend_from_slice(&((address - base) as u32).to_le_bytes());
    }
    // Every token is its own character.
    let table: Vec<u8> = (0..=255u8).flat_map(|token| [token.max(1), 0]).collect();
    let index: Vec<u8> = (0..256u16).flat_map(|token| (token * 2).to_le_bytes()).collect();
    memory.put(0x1000, &names);
    memory.put(0x1800, &table);
    memory.put(0x1a00, &index);
    memory.put(0x1c00, &offsets);
    memory.put_u64(0x1d00, base);
    memory.put(0x1d08, &(all.len() as u32).to_le_bytes());
}

/// The lines of VMCOREINFO that lead to it.
pub fn symbol_lines(base: u64) -> String {
    let tables = [
        ("_stext", 0),
        ("kallsyms_names", 0x1000),
        ("kallsyms_token_table", 0x1800),
        ("kallsyms_token_index", 0x1a00),
        ("kallsyms_offsets", 0x1c00),
        ("kallsyms_relative_base", 0x1d00),
        ("kallsyms_num_syms", 0x1d08),
    ];
    tables.map(|(name, at)| format!("SYMBOL({name})={:x}\n", base + at)).concat()
}

/// A structure: name, size, and members with offset in bytes and the structure that they are, which
/// must come before; none for a plain word.
pub type Structure<'a> = (&'a str, u32, &'a [(&'a str, u32, Option<&'a str>)]);

/// BTF with these structures.
pub fn btf(structures: &[Structure<'_>]) -> Vec<u8> {
    let mut strings = vec![0];
    let mut text = |name: &str| {
        let at = strings.len() as u32;
        strings.extend_from_slice(name.as_bytes());
        strings.push(0);
        at
    };
    // Type 1 is a word.
    let mut words: Vec<u32> = vec![text("word"), 1 << 24, 8, 64];
    for (name, size, members) in structures {
        words.extend([text(name), 4 << 24 | members.len() as u32, *size]);
        for (member, offset, kind) in *members {
            let number = kind.and_then(|kind| structures.iter().position(|it| it.0 == kind));
            words.extend([text(member), number.map_or(1, |index| index as u32 + 2), offset * 8]);
        }
    }
    let length = words.len() as u32 * 4;
    let mut blob = vec![0x9f, 0xeb, 1, 0];
    let header = [24, 0, length, length, strings.len() as u32];
    blob.extend(header.iter().chain(&words).flat_map(|word| word.to_le_bytes()));
    blob.extend_from_slice(&strings);
    blob
}

/// A dump of a kernel of this machine whose memory begins at physical address 0, opened.
pub fn with_kernel<T>(
    memory: &FakeMemory,
    machine: u16,
    info: &str,
    run: impl FnOnce(&Kernel<'_>) -> T,
) -> T {
    let info = note(b"VMCOREINFO", 0, format!("OSRELEASE=6.1\n{info}").as_bytes());
    let mut core = elf_core(0, false, &[Segment::note(&info), Segment::load(0, &memory.bytes)]);
    core[18..20].copy_from_slice(&machine.to_le_bytes());
    let dump = Dump::from_bytes(core).unwrap();
    run(&Kernel::open(&dump, None).unwrap())
}
