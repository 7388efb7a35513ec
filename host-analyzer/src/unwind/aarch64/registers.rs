//! The registers that arm64 kernels save.

use crate::unwind::{ExceptionFrame, Register};
use crate::{VirtAddr, bytes};

/// Words of struct user_pt_regs (arch/arm64/include/uapi/asm/ptrace.h): x0 to x30, sp, pc, pstate.
pub(super) const REGISTERS: usize = 34;

/// Indices into it.
pub(super) mod reg {
    pub const FP: usize = 29;
    pub const LR: usize = 30;
    pub const SP: usize = 31;
    pub const PC: usize = 32;
    pub const PSTATE: usize = 33;
}

/// The bits of PSTATE that say at which exception level the CPU was (M[3:2]; 0 is user mode, in
/// AArch32 state too).
pub(super) const LEVEL: u64 = 0xc;

/// Name and index in struct user_pt_regs, in the order in which crash prints them.
const PRINTED: [(&str, usize); REGISTERS - 1] = [
    ("PC", 32),
    ("LR", 30),
    ("SP", 31),
    ("X29", 29),
    ("X28", 28),
    ("X27", 27),
    ("X26", 26),
    ("X25", 25),
    ("X24", 24),
    ("X23", 23),
    ("X22", 22),
    ("X21", 21),
    ("X20", 20),
    ("X19", 19),
    ("X18", 18),
    ("X17", 17),
    ("X16", 16),
    ("X15", 15),
    ("X14", 14),
    ("X13", 13),
    ("X12", 12),
    ("X11", 11),
    ("X10", 10),
    ("X9", 9),
    ("X8", 8),
    ("X7", 7),
    ("X6", 6),
    ("X5", 5),
    ("X4", 4),
    ("X3", 3),
    ("X2", 2),
    ("X1", 1),
    ("X0", 0),
];

/// struct pt_regs.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Arm64Registers {
    pub(super) words: [u64; REGISTERS],
    /// orig_x0 and syscallno, where there are such.
    pub(super) call: Option<(u64, u32)>,
}

impl Arm64Registers {
    /// Reads the registers of a PRSTATUS note, or the beginning of a struct pt_regs.
    #[must_use]
    pub fn parse(raw: &[u8]) -> Option<Arm64Registers> {
        let mut words = [0; REGISTERS];
        for (index, word) in words.iter_mut().enumerate() {
            *word = bytes::u64_at(raw, index * 8)?;
        }
        Some(Arm64Registers { words, call: None })
    }

    /// The program counter.
    #[must_use]
    pub fn pc(&self) -> VirtAddr {
        VirtAddr(self.words[reg::PC])
    }

    /// The stack pointer.
    #[must_use]
    pub fn sp(&self) -> VirtAddr {
        VirtAddr(self.words[reg::SP])
    }

    /// Whether the registers are those of user mode. A kernel thread has none: all its words are 0.
    #[must_use]
    pub fn user(&self) -> bool {
        let nothing = self.words[reg::PC] == 0 && self.words[reg::SP] == 0;
        self.words[reg::PSTATE] & LEVEL == 0 && !nothing
    }

    /// The registers as they are printed.
    #[must_use]
    pub fn exception_frame(&self, at: VirtAddr) -> ExceptionFrame {
        let wide = |(name, index): (&'static str, usize)| Register {
            name,
            value: self.words[index],
            digits: 16,
        };
        let mut registers: Vec<Register> = PRINTED.into_iter().map(wide).collect();
        if let Some((first, number)) = self.call.filter(|_| self.user()) {
            registers.push(Register { name: "ORIG_X0", value: first, digits: 16 });
            registers.push(Register { name: "SYSCALLNO", value: u64::from(number), digits: 8 });
        }
        registers.push(Register { name: "PSTATE", value: self.words[reg::PSTATE], digits: 8 });
        ExceptionFrame { at, user: self.user(), registers }
    }
}
