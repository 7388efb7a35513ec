//! What is known of the registers of a frame.

use super::machine::Machine;

/// Registers by the numbers that debug information gives them: x86_64 rax rdx rcx rbx rsi rdi rbp rsp r8 to
/// r15 (System V ABI, AMD64 supplement, figure 3.36), arm64 x0 to x30 and sp (DWARF for the Arm 64-bit
/// Architecture, 4.1).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Registers {
    values: [u64; Registers::COUNT],
    /// A bit for each that is known.
    known: u32,
}

impl Registers {
    const COUNT: usize = 32;

    /// The value of a register, if it is known.
    #[must_use]
    pub fn get(&self, number: u16) -> Option<u64> {
        let known = self.known.checked_shr(u32::from(number))? & 1 != 0;
        known.then(|| self.values[usize::from(number)])
    }

    /// Notes the value of a register; numbers of others than the general ones are passed over.
    pub fn set(&mut self, number: u16, value: u64) {
        if let Some(place) = self.values.get_mut(usize::from(number)) {
            *place = value;
            self.known |= 1 << number;
        }
    }

    /// These, and those of `others` that are not known here.
    #[must_use]
    pub fn or(mut self, others: &Registers) -> Registers {
        for number in 0..Registers::COUNT as u16 {
            if let (None, Some(value)) = (self.get(number), others.get(number)) {
                self.set(number, value);
            }
        }
        self
    }
}

/// The name of the register with this number.
#[must_use]
pub fn name(machine: Machine, number: u16) -> String {
    const X86: [&str; 8] = ["rax", "rdx", "rcx", "rbx", "rsi", "rdi", "rbp", "rsp"];
    match (machine, number) {
        (Machine::X86_64, 0..8) => X86[usize::from(number)].to_owned(),
        (Machine::X86_64, 8..16) => format!("r{number}"),
        (Machine::Aarch64, 0..31) => format!("x{number}"),
        (Machine::Aarch64, 31) => "sp".to_owned(),
        (_, other) => format!("register {other}"),
    }
}

/// The number of the stack pointer.
#[must_use]
pub fn stack_pointer(machine: Machine) -> u16 {
    match machine {
        Machine::X86_64 => 7,
        Machine::Aarch64 => 31,
    }
}

/// Whether functions give a register back as they found it (System V ABI, AMD64 supplement, 3.2.1;
/// AAPCS64, 6.1.1).
#[must_use]
pub fn is_kept(machine: Machine, number: u16) -> bool {
    match machine {
        Machine::X86_64 => matches!(number, 3 | 6 | 12..=15),
        Machine::Aarch64 => matches!(number, 19..=29),
    }
}

impl FromIterator<(u16, u64)> for Registers {
    fn from_iter<I: IntoIterator<Item = (u16, u64)>>(known: I) -> Registers {
        let mut registers = Registers::default();
        known.into_iter().for_each(|(number, value)| registers.set(number, value));
        registers
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_was_set_is_known() {
        let one: Registers = [(3, 30), (31, 310), (32, 320)].into_iter().collect();
        assert_eq!((one.get(3), one.get(31)), (Some(30), Some(310)));
        assert_eq!((one.get(0), one.get(32), one.get(u16::MAX)), (None, None, None));
        let other: Registers = [(3, 33), (4, 40)].into_iter().collect();
        let both = one.or(&other);
        assert_eq!((both.get(3), both.get(4)), (Some(30), Some(40)));
    }
}
