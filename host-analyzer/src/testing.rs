//! Small worlds for tests: memory made of pieces, ELF cores made of segments.

use std::borrow::Cow;
use std::ops::Range;

use crate::kernel::paging::X86PageTables;
use crate::kernel::virt::VirtualMemory;
use crate::source::Memory;
use crate::{PhysAddr, ReadError, VirtAddr};

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
