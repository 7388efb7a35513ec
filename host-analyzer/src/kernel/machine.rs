//! The architectures whose dumps are read, and what of them is needed in more than one place.

use crate::{Error, VirtAddr, bytes};

/// An architecture.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Machine {
    /// ELF machine 62.
    X86_64,
    /// ELF machine 183: arm64 in the kernel's words.
    Aarch64,
}

/// Where a CPU stood, out of the registers of a PRSTATUS note.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Stand {
    /// Its program counter.
    pub pc: VirtAddr,
    /// Its stack pointer.
    pub sp: VirtAddr,
}

impl Machine {
    /// The architecture with this number in an ELF header.
    ///
    /// # Errors
    /// [`Error::Machine`].
    pub fn from_elf(number: u16) -> Result<Machine, Error> {
        match number {
            62 => Ok(Machine::X86_64),
            183 => Ok(Machine::Aarch64),
            other => Err(Error::Machine(other)),
        }
    }

    /// Where a CPU stood; `None` when its registers (pr_reg and what follows) are cut short.
    #[must_use]
    pub fn stand(self, registers: &[u8]) -> Option<Stand> {
        // struct user_regs_struct (arch/x86/include/asm/user_64.h): ip and sp are words 16 and 19;
        // struct user_pt_regs (arch/arm64/include/uapi/asm/ptrace.h): words 32 and 31.
        let (pc, sp) = match self {
            Machine::X86_64 => (16, 19),
            Machine::Aarch64 => (32, 31),
        };
        let word = |index: usize| bytes::u64_at(registers, index * 8).map(VirtAddr);
        Some(Stand { pc: word(pc)?, sp: word(sp)? })
    }

    /// Bytes of a call whose instruction itself says where it goes.
    #[must_use]
    pub fn direct_call_size(self) -> u64 {
        match self {
            Machine::X86_64 => 5,
            Machine::Aarch64 => 4,
        }
    }

    /// Where the instruction `code`, which ends at `at`, calls to; `None` when it is no such call: `call` with a
    /// displacement of 32 bits (Intel SDM volume 2A), `bl` (Arm ARM, DDI 0487, C6.2).
    #[must_use]
    pub fn direct_call(self, code: &[u8], at: VirtAddr) -> Option<VirtAddr> {
        const CALL: u8 = 0xe8;
        const BL: u32 = 0b10_0101;
        let (from, distance) = match self {
            Machine::X86_64 => {
                let distance = bytes::i32_at(code, 1).filter(|_| code[0] == CALL)?;
                (at, i64::from(distance))
            }
            Machine::Aarch64 => {
                let word = bytes::u32_at(code, 0).filter(|word| word >> 26 == BL)?;
                (at.back(4), i64::from((word << 6) as i32 >> 6) * 4)
            }
        };
        Some(from.offset(distance as u64))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn registers_lie_where_each_architecture_puts_them() {
        let raw: Vec<u8> = (0..34u64).flat_map(u64::to_le_bytes).collect();
        let stand = |machine: u16| Machine::from_elf(machine).unwrap().stand(&raw).unwrap();
        assert_eq!(stand(62), Stand { pc: VirtAddr(16), sp: VirtAddr(19) });
        assert_eq!(stand(183), Stand { pc: VirtAddr(32), sp: VirtAddr(31) });
        assert_eq!(Machine::Aarch64.stand(&raw[..256]), None);
        assert!(Machine::from_elf(40).is_err());
    }

    #[test]
    fn direct_calls_say_where_they_go() {
        let at = VirtAddr(0x1000);
        let back = [0xe8, 0xfb, 0xff, 0xff, 0xff];
        assert_eq!(Machine::X86_64.direct_call(&back, at), Some(VirtAddr(0xffb)));
        assert_eq!(Machine::X86_64.direct_call(&[0xe9, 0, 0, 0, 0], at), None);
        assert_eq!(Machine::X86_64.direct_call(&[0xe8], at), None);
        let back = 0x97ff_ffff_u32.to_le_bytes();
        assert_eq!(Machine::Aarch64.direct_call(&back, at), Some(VirtAddr(0xff8)));
        assert_eq!(Machine::Aarch64.direct_call(&0x1400_0001_u32.to_le_bytes(), at), None);
    }
}
