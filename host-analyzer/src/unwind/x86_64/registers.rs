//! The registers that x86_64 kernels save.

use crate::unwind::{ExceptionFrame, Register, Registers};
use crate::{VirtAddr, bytes};

/// Words of struct pt_regs.
pub(super) const PT_REGS: usize = 21;
/// Index of the first word that the hardware saves (ip, cs, flags, sp, ss).
pub(super) const HARDWARE_FRAME: usize = 16;

/// Indices into struct pt_regs.
pub(super) mod reg {
    pub const R13: usize = 2;
    pub const BP: usize = 4;
    pub const R10: usize = 7;
    pub const DX: usize = 12;
    pub const DI: usize = 14;
    pub const IP: usize = 16;
    pub const CS: usize = 17;
    pub const FLAGS: usize = 18;
    pub const SP: usize = 19;
}

/// Name and index in struct pt_regs, in the order in which crash prints them.
const PRINTED: [(&str, usize); PT_REGS] = [
    ("RIP", 16),
    ("RSP", 19),
    ("RFLAGS", 18),
    ("RAX", 10),
    ("RBX", 5),
    ("RCX", 11),
    ("RDX", 12),
    ("RSI", 13),
    ("RDI", 14),
    ("RBP", 4),
    ("R8", 9),
    ("R9", 8),
    ("R10", 7),
    ("R11", 6),
    ("R12", 3),
    ("R13", 2),
    ("R14", 1),
    ("R15", 0),
    ("ORIG_RAX", 15),
    ("CS", 17),
    ("SS", 20),
];

/// The numbers that debug information gives the registers of struct pt_regs, in its order.
const NUMBERS: [u16; 15] = [15, 14, 13, 12, 6, 3, 11, 10, 9, 8, 0, 2, 1, 4, 5];
/// That of rbp, and that of rsp.
pub(super) const NUMBER_BP: u16 = 6;
pub(super) const NUMBER_SP: u16 = 7;

/// struct pt_regs, as far as it is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct X86Registers {
    words: [u64; PT_REGS],
    /// Whether only the part that the hardware saves is known.
    partial: bool,
}

impl X86Registers {
    /// Reads a complete struct pt_regs (or the registers of a PRSTATUS note, which begin alike).
    #[must_use]
    pub fn parse(raw: &[u8]) -> Option<X86Registers> {
        let mut words = [0; PT_REGS];
        for (index, word) in words.iter_mut().enumerate() {
            *word = bytes::u64_at(raw, index * 8)?;
        }
        Some(X86Registers { words, partial: false })
    }

    pub(super) fn parse_hardware_frame(raw: &[u8]) -> Option<X86Registers> {
        let mut words = [0; PT_REGS];
        for (index, word) in words[HARDWARE_FRAME..].iter_mut().enumerate() {
            *word = bytes::u64_at(raw, index * 8)?;
        }
        Some(X86Registers { words, partial: true })
    }

    /// The program counter.
    #[must_use]
    pub fn pc(&self) -> VirtAddr {
        VirtAddr(self.words[reg::IP])
    }

    /// The stack pointer.
    #[must_use]
    pub fn sp(&self) -> VirtAddr {
        VirtAddr(self.words[reg::SP])
    }

    /// Whether the registers are those of user mode.
    #[must_use]
    pub fn user(&self) -> bool {
        self.words[reg::CS] & 3 != 0
    }

    pub(super) fn get(&self, index: usize) -> Option<u64> {
        (!self.partial || index >= HARDWARE_FRAME).then(|| self.words[index])
    }

    pub(super) fn numbered(&self) -> Registers {
        let known = |(index, number): (usize, u16)| Some((number, self.get(index)?));
        NUMBERS.into_iter().enumerate().filter_map(known).collect()
    }

    /// The registers as they are printed.
    #[must_use]
    pub fn exception_frame(&self, at: VirtAddr) -> ExceptionFrame {
        let print = |&(name, index): &(&'static str, usize)| {
            let (digits, mask) = match name {
                // From 6.9 on the upper parts of these words hold other things (FRED).
                "CS" | "SS" => (4, 0xffff),
                "RFLAGS" => (8, u64::MAX),
                _ => (16, u64::MAX),
            };
            Some(Register { name, value: self.get(index)? & mask, digits })
        };
        let registers = PRINTED.iter().filter_map(print).collect();
        ExceptionFrame { at, user: self.user(), registers }
    }
}

/// What looks like the registers of an exception, by what the hardware and the kernel always have there:
/// selectors, fixed bits of RFLAGS (Intel SDM volume 1, 3.4.3), and addresses of the right kind.
pub(super) fn plausible(registers: &X86Registers, is_text: impl Fn(VirtAddr) -> bool) -> bool {
    const FIXED: u64 = 1 << 1;
    const NEVER: u64 = !0x0020_0fd7 & !(0x3f << 16) & !0x7000;
    const KERNEL_CODE: u64 = 0x10;
    const USER_CODE: [u64; 2] = [0x33, 0x23];
    let word = |index: usize| registers.words[index];
    // From 6.9 on the upper parts of the selectors hold other things (FRED).
    let (code, flags) = (word(reg::CS) & 0xffff, word(reg::FLAGS));
    if flags & FIXED == 0 || flags & NEVER != 0 {
        return false;
    }
    let (pc, sp) = (registers.pc(), registers.sp());
    match code {
        KERNEL_CODE => sp.0 >> 63 == 1 && is_text(pc),
        _ if USER_CODE.contains(&code) => sp.0 >> 56 == 0 && pc.0 >> 56 == 0 && pc.0 != 0,
        _ => false,
    }
}
