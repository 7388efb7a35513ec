//! The registers that the CPUs saved when the kernel died.
//!
//! struct elf_prstatus (include/linux/elfcore.h, 6.1): `pr_pid` is the PID of the task that ran (kernel/
//! kexec_core.c, crash_save_cpu), `pr_reg` the registers.

use format::note::{NT_PRSTATUS, Notes, VMCOREINFO};

use crate::Machine;
use crate::architecture::Architecture;
use crate::elfcorehdr::Elfcorehdr;

/// Where they are in struct elf_prstatus of 64-bit kernels.
const PID: usize = 32;
const REGISTERS: usize = 112;
/// More than any machine of today has: so many program headers and notes are looked at.
const MAX_CPUS: u64 = 4096;
/// Places of the program counter and the stack pointer; see the tables below.
const X86_64_PC: usize = 16;
const X86_64_SP: usize = 19;
const AARCH64_PC: usize = 32;
const AARCH64_SP: usize = 31;
/// Words of registers that are kept: arm64 has the most.
const WORDS: usize = 34;

/// What a CPU saved.
#[derive(Clone, Copy)]
pub struct Cpu {
    /// Its number.
    pub number: u64,
    /// The PID of the task that ran.
    pub pid: u32,
    registers: [u8; WORDS * 8],
    size: usize,
}

impl Cpu {
    fn read(number: u64, desc: &[u8]) -> Option<Cpu> {
        let pid = desc.get(PID..PID + 4)?.try_into().ok()?;
        let found = desc.get(REGISTERS..)?;
        let size = found.len().min(WORDS * 8);
        let mut registers = [0; WORDS * 8];
        registers.get_mut(..size)?.copy_from_slice(found.get(..size)?);
        Some(Cpu { number, pid: u32::from_le_bytes(pid), registers, size })
    }

    /// The registers as the note has them.
    pub fn registers(&self) -> &[u8] {
        self.registers.get(..self.size).unwrap_or_default()
    }

    /// The register at `index` of the note.
    pub fn word(&self, index: usize) -> Option<u64> {
        let (words, _) = self.registers().as_chunks::<8>();
        words.get(index).map(|word| u64::from_le_bytes(*word))
    }

    /// The stack pointer.
    pub fn sp(&self, architecture: Architecture) -> Option<u64> {
        self.word(match architecture {
            Architecture::X86_64 => X86_64_SP,
            Architecture::Aarch64 => AARCH64_SP,
        })
    }

    /// The program counter.
    pub fn pc(&self, architecture: Architecture) -> Option<u64> {
        self.word(match architecture {
            Architecture::X86_64 => X86_64_PC,
            Architecture::Aarch64 => AARCH64_PC,
        })
    }
}

/// A register's name and its place in the note.
type Register = ([u8; 3], u8);

/// The registers' names and places, in the order in which they are shown.
pub fn register_names(architecture: Architecture) -> &'static [Register] {
    match architecture {
        Architecture::X86_64 => &X86_64,
        Architecture::Aarch64 => &AARCH64,
    }
}

/// arch/x86/include/asm/user_64.h, 6.1.
const X86_64: [Register; 22] = [
    (*b"rip", 16),
    (*b"rsp", 19),
    (*b"rfl", 18),
    (*b"rax", 10),
    (*b"rbx", 5),
    (*b"rcx", 11),
    (*b"rdx", 12),
    (*b"rsi", 13),
    (*b"rdi", 14),
    (*b"rbp", 4),
    (*b"r8 ", 9),
    (*b"r9 ", 8),
    (*b"r10", 7),
    (*b"r11", 6),
    (*b"r12", 3),
    (*b"r13", 2),
    (*b"r14", 1),
    (*b"r15", 0),
    (*b"cs ", 17),
    (*b"ss ", 20),
    (*b"fs ", 21),
    (*b"gs ", 22),
];

/// arch/arm64/include/uapi/asm/ptrace.h, 6.1.
const AARCH64: [Register; WORDS] = [
    (*b"pc ", 32),
    (*b"sp ", 31),
    (*b"pst", 33),
    (*b"x30", 30),
    (*b"x29", 29),
    (*b"x28", 28),
    (*b"x0 ", 0),
    (*b"x1 ", 1),
    (*b"x2 ", 2),
    (*b"x3 ", 3),
    (*b"x4 ", 4),
    (*b"x5 ", 5),
    (*b"x6 ", 6),
    (*b"x7 ", 7),
    (*b"x8 ", 8),
    (*b"x9 ", 9),
    (*b"x10", 10),
    (*b"x11", 11),
    (*b"x12", 12),
    (*b"x13", 13),
    (*b"x14", 14),
    (*b"x15", 15),
    (*b"x16", 16),
    (*b"x17", 17),
    (*b"x18", 18),
    (*b"x19", 19),
    (*b"x20", 20),
    (*b"x21", 21),
    (*b"x22", 22),
    (*b"x23", 23),
    (*b"x24", 24),
    (*b"x25", 25),
    (*b"x26", 26),
    (*b"x27", 27),
];

/// A walk over the CPUs that saved their registers.
///
/// There is a PT_NOTE for each CPU, in the order of their numbers, and one for VMCOREINFO; a CPU that
/// saved nothing has an empty one.
#[derive(Clone, Copy, Default)]
pub struct Cpus {
    header: u64,
    /// Registers in the header's notes that were given already.
    given: usize,
    number: u64,
}

impl Cpus {
    /// The next one.
    pub fn next(
        &mut self,
        headers: &Elfcorehdr,
        machine: &mut dyn Machine,
        scratch: &mut [u8],
    ) -> Option<Cpu> {
        while self.header < headers.count().min(MAX_CPUS) && self.number < MAX_CPUS {
            if let Some(bytes) = headers.notes(machine, self.header, scratch) {
                let notes = Notes::new(bytes);
                let saved =
                    |it: &format::note::Note<'_>| it.kind == NT_PRSTATUS && it.name == b"CORE";
                if let Some(note) = notes.clone().filter(saved).nth(self.given) {
                    self.given += 1;
                    self.number += 1;
                    match Cpu::read(self.number - 1, note.desc) {
                        Some(cpu) => return Some(cpu),
                        None => continue,
                    }
                }
                let is_cpu = notes.clone().all(|note| note.name != VMCOREINFO);
                self.number += u64::from(self.given == 0 && is_cpu);
            }
            self.header += 1;
            self.given = 0;
        }
        None
    }
}
