//! The architectures whose dumps are read: one place that tells them apart.
//!
//! [`super::paging::for_kernel`] and [`crate::unwind::for_kernel`] choose by it; nothing else asks.

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
}
