//! A dead kernel made by hand, for the tests of the card: a few MiB of memory with page tables, symbol
//! table, unwind tables, types, modules, a log and two CPUs.

use std::format;
use std::string::String;
use std::vec;
use std::vec::Vec;

use crate::architecture::Architecture;
use crate::dump::{Silence, Source};
use crate::elfcorehdr::Elfcorehdr;
use crate::fake::{FakeMachine, LIMIT, elfcorehdr64, note};
use crate::old::OldMemory;
use crate::{Machine, OldPhys};

use super::memory::{COST, Cache, KernelMemory};
use super::paging::Tables;
use super::{Card, Sink};

/// Where the kernel's image is, at physical address 0.
pub const BASE: u64 = 0xffff_ffff_8100_0000;
const SIZE: u64 = 4 << 20;
/// Where `elfcorehdr` is, outside of old memory.
pub const HEADERS: u64 = 0x1000_0000;

/// Where things are, from [`BASE`] on.
pub mod at {
    pub const PAGE_TABLES: u64 = 0x1000;
    pub const NAMES: u64 = 0x1_0000;
    pub const TOKENS: u64 = 0x3_0000;
    pub const TOKEN_INDEX: u64 = 0x3_0800;
    pub const OFFSETS: u64 = 0x4_0000;
    pub const ORC_IPS: u64 = 0x6_0000;
    pub const ORC: u64 = 0x7_0000;
    pub const TYPES: u64 = 0x8_0000;
    pub const LOG: u64 = 0x9_0000;
    pub const DATA: u64 = 0xa_0000;
    pub const TEXT: u64 = 0x10_0000;
    pub const STACK: u64 = 0x20_0000;
    pub const MODULE: u64 = 0x30_0000;
}

/// Memory, VMCOREINFO and the notes of CPUs, ready to be crashed.
#[derive(Clone)]
pub struct World {
    pub architecture: Architecture,
    pub memory: Vec<u8>,
    pub info: String,
    pub cpus: Vec<Vec<u8>>,
    records: u64,
}

impl World {
    /// An x86_64 kernel with nothing but page tables of four levels.
    pub fn x86_64() -> World {
        let info = format!(
            "OSRELEASE=6.1.0-test\nPAGESIZE=4096\nNUMBER(phys_base)=-16777216\n\
             SYMBOL(swapper_pg_dir)={:x}\nCRASHTIME=1795409705\n",
            BASE + at::PAGE_TABLES
        );
        let mut world = World::new(Architecture::X86_64, info);
        let index = |shift: u32| (BASE >> shift) % 512 * 8;
        world.put_u64(at::PAGE_TABLES + index(39), 0x2003);
        world.put_u64(0x2000 + index(30), 0x3003);
        world.put_u64(0x3000 + index(21), 0x83);
        world.put_u64(0x3000 + index(21) + 8, 0x20_0083);
        world
    }

    /// An arm64 kernel with nothing but page tables: 48 bits, pages of 4 KiB.
    pub fn aarch64() -> World {
        let info = format!(
            "OSRELEASE=6.12.0-test\nPAGESIZE=4096\nNUMBER(VA_BITS)=48\nNUMBER(kimage_voffset)={BASE:#x}\n\
             NUMBER(TCR_EL1_T1SZ)=0x10\nNUMBER(KERNELPACMASK)=0xff7f000000000000\n\
             SYMBOL(swapper_pg_dir)={:x}\n",
            BASE + at::PAGE_TABLES
        );
        let mut world = World::new(Architecture::Aarch64, info);
        let index = |shift: u32| (BASE >> shift) % 512 * 8;
        world.put_u64(at::PAGE_TABLES + index(39), 0x2003);
        world.put_u64(0x2000 + index(30), 0x3003);
        world.put_u64(0x3000 + index(21), 0x1);
        world.put_u64(0x3000 + index(21) + 8, 0x20_0001);
        world
    }

    fn new(architecture: Architecture, info: String) -> World {
        let memory = vec![0; SIZE as usize];
        World { architecture, memory, info, cpus: Vec::new(), records: 0 }
    }

    /// Puts bytes at an offset from [`BASE`].
    pub fn put(&mut self, at: u64, bytes: &[u8]) {
        self.memory[at as usize..at as usize + bytes.len()].copy_from_slice(bytes);
    }

    pub fn put_u64(&mut self, at: u64, value: u64) {
        self.put(at, &value.to_le_bytes());
    }

    pub fn put_u32(&mut self, at: u64, value: u32) {
        self.put(at, &value.to_le_bytes());
    }

    /// Makes a symbol table in ascending order of address: offsets from [`BASE`], and names with their
    /// types. Every character is its own token.
    pub fn put_symbols(&mut self, symbols: &[(u64, &str)]) {
        let mut names = Vec::new();
        for (index, &(offset, name)) in symbols.iter().enumerate() {
            names.push(name.len() as u8);
            names.extend_from_slice(name.as_bytes());
            self.put_u32(at::OFFSETS + index as u64 * 4, offset as u32);
        }
        self.put(at::NAMES, &names);
        for token in 0..=255u8 {
            self.put(at::TOKENS + u64::from(token) * 2, &[token, 0]);
            self.put(at::TOKEN_INDEX + u64::from(token) * 2, &(u16::from(token) * 2).to_le_bytes());
        }
        self.put_u64(at::OFFSETS - 16, symbols.len() as u64);
        self.put_u64(at::OFFSETS - 8, BASE);
        let text = symbols.iter().find(|(_, name)| *name == "T_stext").map_or(0, |(at, _)| *at);
        for (name, offset) in [
            ("kallsyms_names", at::NAMES),
            ("kallsyms_num_syms", at::OFFSETS - 16),
            ("kallsyms_token_table", at::TOKENS),
            ("kallsyms_token_index", at::TOKEN_INDEX),
            ("kallsyms_offsets", at::OFFSETS),
            ("kallsyms_relative_base", at::OFFSETS - 8),
            ("_stext", text),
        ] {
            self.info += &format!("SYMBOL({name})={:x}\n", BASE + offset);
        }
    }

    /// Makes unwind tables as kernels up to 6.3 have them: for each instruction from an offset on, how
    /// far up the return address is and the flags.
    pub fn put_orc(&mut self, entries: &[(u64, i16, u16)]) {
        for (index, &(ip, offset, flags)) in entries.iter().enumerate() {
            let place = at::ORC_IPS + index as u64 * 4;
            self.put_u32(place, ip.wrapping_sub(place) as u32);
            let entry = [offset.to_le_bytes(), [0; 2], flags.to_le_bytes()].concat();
            self.put(at::ORC + index as u64 * 6, &entry);
        }
    }

    /// Makes BTF of structures whose members are named, at offsets in bytes.
    pub fn put_types(&mut self, structures: &[(&str, &[(&str, u32)])]) -> u64 {
        let mut strings = vec![0];
        let mut name = |text: &str| {
            let at = strings.len() as u32;
            strings.extend_from_slice(text.as_bytes());
            strings.push(0);
            at
        };
        let mut types: Vec<u32> = Vec::new();
        for (structure, members) in structures {
            types.extend([name(structure), 4 << 24 | members.len() as u32, 0]);
            for (member, offset) in *members {
                types.extend([name(member), 0, offset * 8]);
            }
        }
        let types: Vec<u8> = types.iter().flat_map(|word| word.to_le_bytes()).collect();
        let sizes = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        let head: Vec<u8> = sizes.iter().flat_map(|word| word.to_le_bytes()).collect();
        let blob = [&[0x9f, 0xeb, 1, 0][..], &head, &types, &strings].concat();
        self.put(at::TYPES, &blob);
        at::TYPES + blob.len() as u64
    }

    /// Makes an empty log of 16 records and 64 KiB of text.
    pub fn put_log(&mut self) {
        self.info += &format!(
            "SYMBOL(prb)={:x}\nOFFSET(printk_ringbuffer.desc_ring)=0\n\
             OFFSET(printk_ringbuffer.text_data_ring)=48\nOFFSET(prb_desc_ring.count_bits)=0\n\
             OFFSET(prb_desc_ring.descs)=8\nOFFSET(prb_desc_ring.infos)=16\n\
             OFFSET(prb_desc_ring.head_id)=24\nOFFSET(prb_desc_ring.tail_id)=32\nSIZE(prb_desc)=24\n\
             OFFSET(prb_desc.state_var)=0\nOFFSET(prb_desc.text_blk_lpos)=8\n\
             OFFSET(prb_data_blk_lpos.begin)=0\nOFFSET(prb_data_blk_lpos.next)=8\n\
             SIZE(printk_info)=88\nOFFSET(printk_info.ts_nsec)=8\nOFFSET(printk_info.text_len)=16\n\
             OFFSET(prb_data_ring.size_bits)=0\nOFFSET(prb_data_ring.data)=8\n",
            BASE + at::LOG
        );
        let ring = at::LOG + 8;
        self.put_u64(at::LOG, BASE + ring);
        self.put_u64(ring, 4);
        self.put_u64(ring + 8, BASE + at::LOG + 0x100);
        self.put_u64(ring + 16, BASE + at::LOG + 0x400);
        self.put_u64(ring + 48, 14);
        self.put_u64(ring + 56, BASE + at::LOG + 0x1000);
    }

    /// Adds a record to the log, made at a time in microseconds since boot. Each takes 1 KiB.
    pub fn log(&mut self, time: u64, text: &str) {
        let (id, ring) = (self.records, at::LOG + 8);
        let (index, begin) = (id % 16, id * 1024);
        let desc = at::LOG + 0x100 + index * 24;
        let words = [2 << 62 | id, begin, begin + 1024];
        words.iter().zip(0..).for_each(|(&word, slot)| self.put_u64(desc + slot * 8, word));
        let info = at::LOG + 0x400 + index * 88;
        self.put_u64(info + 8, time * 1000);
        self.put(info + 16, &(text.len() as u16).to_le_bytes());
        self.put(at::LOG + 0x1000 + begin % (16 << 10) + 8, text.as_bytes());
        self.put_u64(ring + 24, id);
        self.put_u64(ring + 32, id.saturating_sub(15));
        self.records += 1;
    }

    /// Adds a CPU that saved these registers, given by their places in the note.
    pub fn cpu(&mut self, pid: u32, registers: &[(usize, u64)]) {
        let mut status = vec![0; 112 + 34 * 8];
        status[32..36].copy_from_slice(&pid.to_le_bytes());
        for &(index, value) in registers {
            status[112 + index * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
        self.cpus.push(note(b"CORE", 1, &status));
    }

    /// Crashes it: calls `with` with the machine and what it says of its memory.
    pub fn crash<T>(&self, with: impl FnOnce(&mut FakeMachine, Source<'_>) -> T) -> T {
        let mut machine = FakeMachine::default();
        machine.put(0, self.memory.clone());
        let direct_map = match self.architecture {
            Architecture::X86_64 => 0xffff_8880_0000_0000,
            Architecture::Aarch64 => 0xffff_0000_0000_0000,
        };
        let mut claims = vec![(1, 0, direct_map, 0, SIZE)];
        let info = note(b"VMCOREINFO", 0, self.info.as_bytes());
        for (index, bytes) in self.cpus.iter().chain([&info]).enumerate() {
            let at = HEADERS + 0x10000 * (index as u64 + 1);
            claims.insert(index, (4, at, 0, at, bytes.len() as u64));
            // A CPU that saved nothing has a buffer all the same.
            machine.put(at, if bytes.is_empty() { vec![0; 16] } else { bytes.clone() });
        }
        machine.put(HEADERS, elfcorehdr64(&claims));
        let mut old = OldMemory::new();
        let headers =
            Elfcorehdr::open(&mut machine, self.architecture, OldPhys(HEADERS), LIMIT).unwrap();
        headers.collect(&mut machine, &mut [0; 8192], &mut old).unwrap();
        with(&mut machine, Source { headers: &headers, old: &old })
    }

    /// Crashes it and calls `with` with its virtual memory.
    pub fn memory<T>(&self, with: impl FnOnce(&mut KernelMemory<'_>, &OldMemory) -> T) -> T {
        self.crash(|machine, source| {
            let tables = Tables::find(self.architecture, &source.old.vmcoreinfo);
            let mut cache = Cache::new();
            with(&mut KernelMemory::new(machine, source.old, tables, &mut cache), source.old)
        })
    }

    /// Crashes it and prints its card.
    pub fn card(&self) -> String {
        self.cards().0
    }

    /// Crashes it and makes its card; also tells what reading for it cost, as [`KernelMemory`] counts.
    pub fn card_and_cost(&self) -> (String, u64) {
        self.crash(|machine, source| {
            (machine.reads, machine.bytes_read) = (0, 0);
            let mut card = Card::new();
            card.make(machine, source, &mut [0; 8192], &mut Silence);
            (card.text().into(), machine.reads * COST + machine.bytes_read)
        })
    }

    /// Crashes it and prints its card twice.
    pub fn cards(&self) -> (String, String) {
        self.crash(|machine, source| {
            let mut card = Card::new();
            let mut print = || {
                let mut lines = Lines(String::new());
                card.make(machine, source, &mut [0; 8192], &mut lines);
                lines.0
            };
            (print(), print())
        })
    }
}

struct Lines(String);

impl Sink for Lines {
    fn line(&mut self, _: &mut dyn Machine, line: &str) {
        self.0 += line;
        self.0 += "\n";
    }
}
