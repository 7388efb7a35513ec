//! ORC: the kernel's unwind tables (x86_64), in all their versions.
//!
//! arch/x86/include/asm/orc_types.h and unwind_orc.c, 5.10 to 7.1. A table of instruction addresses,
//! each stored relative to its own place, and a parallel table of 6-byte entries. Versions are told
//! by what most entries have in common: they are of ordinary calls, and start from the stack pointer.

use super::memory::KernelMemory;

/// Size of an entry and of an instruction's address.
pub const ENTRY: u64 = 6;
pub const IP: u64 = 4;
/// More entries than any kernel has.
const MAX_ENTRIES: u64 = 1 << 24;

/// Layout of an entry's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// To 6.3: two bits of type.
    TwoBits,
    /// 6.4 to 7.0: three bits of type.
    ThreeBits,
    /// 7.1 on: as before, registers numbered anew.
    Renumbered,
}

/// What a value is computed from.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Base {
    /// Nothing is known.
    Undefined,
    /// The frame's canonical address (the caller's stack pointer).
    PreviousSp,
    /// A register.
    Dx,
    /// A register.
    Di,
    /// A register.
    Bp,
    /// A register.
    Sp,
    /// A register.
    R10,
    /// A register.
    R13,
    /// The word that the frame pointer plus the offset points to.
    BpIndirect,
    /// The word that the stack pointer points to, plus the offset.
    SpIndirect,
}

/// What lies at the address that an entry computes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// The tables know nothing about this place.
    Undefined,
    /// There is no caller.
    EndOfStack,
    /// A return address just below it.
    Call,
    /// A complete struct pt_regs.
    Registers,
    /// The part of struct pt_regs that the hardware saves.
    HardwareFrame,
}

/// How to get from a frame to its caller's.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// What the canonical address is computed from.
    pub sp: Base,
    /// Added to it.
    pub sp_offset: i16,
    /// What the caller's frame pointer is loaded from.
    pub bp: Base,
    /// Added to it.
    pub bp_offset: i16,
    /// What lies there.
    pub kind: Kind,
}

/// For code without tables (BPF, trampolines): there is a frame pointer, perhaps.
pub const FRAME_POINTER: Entry =
    Entry { sp: Base::Bp, sp_offset: 16, bp: Base::PreviousSp, bp_offset: -16, kind: Kind::Call };

/// For a call to nowhere: nothing was pushed after the return address.
pub const BAD_CALL: Entry =
    Entry { sp: Base::Sp, sp_offset: 8, bp: Base::Undefined, bp_offset: 0, kind: Kind::Call };

/// The tables of the kernel's image or of a module.
#[derive(Clone, Copy, Debug)]
pub struct Table {
    /// Where the instructions' addresses are.
    pub ips: u64,
    /// Where the entries are.
    pub entries: u64,
    /// How many there are.
    pub count: u64,
    /// What the entries mean.
    pub version: Version,
}

impl Table {
    /// The image's tables: `ips` from `__start_orc_unwind_ip` to `__stop_orc_unwind_ip`, `entries` from
    /// `__start_orc_unwind` on.
    pub fn of_image(memory: &mut KernelMemory<'_>, ips: (u64, u64), entries: u64) -> Option<Table> {
        let count = ips.1.checked_sub(ips.0)? / IP;
        if !(1..=MAX_ENTRIES).contains(&count) {
            return None;
        }
        let version = Version::detect(memory, entries, count);
        Some(Table { ips: ips.0, entries, count, version })
    }

    /// The entry for the instruction at `pc`: the last one that begins at or before it.
    pub fn find(&self, memory: &mut KernelMemory<'_>, pc: u64) -> Option<Entry> {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let place = self.ips.checked_add(middle * IP)?;
            if place.wrapping_add_signed(i64::from(memory.u32(place)? as i32)) <= pc {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let raw = memory.bytes(self.entries.checked_add(low.checked_sub(1)? * ENTRY)?)?;
        self.version.decode(raw)
    }
}

impl Version {
    fn detect(memory: &mut KernelMemory<'_>, entries: u64, count: u64) -> Version {
        const SAMPLES: u64 = 256;
        const TYPE_CALL: u16 = 2;
        const SP_RENUMBERED: u16 = 3;
        let (mut three_bits, mut renumbered, mut all) = (0u64, 0u64, 0u64);
        let step = (count / SAMPLES).max(1);
        for index in 0..count.min(SAMPLES) {
            let at = entries.wrapping_add(index * step * ENTRY + 4);
            let Some(flags) = memory.u16(at) else { continue };
            all += 1;
            three_bits += u64::from(flags >> 8 & 7 == TYPE_CALL);
            renumbered += u64::from(flags & 0xf == SP_RENUMBERED);
        }
        match (three_bits > all / 2, renumbered > all / 2) {
            (false, _) => Version::TwoBits,
            (true, false) => Version::ThreeBits,
            (true, true) => Version::Renumbered,
        }
    }

    fn base(self, number: u16) -> Option<Base> {
        Some(match (self, number) {
            (_, 0) => Base::Undefined,
            (_, 2) => Base::Dx,
            (_, 4) => Base::Bp,
            (_, 6) => Base::R10,
            (_, 7) => Base::R13,
            (_, 9) => Base::SpIndirect,
            (Version::Renumbered, 3) => Base::Sp,
            (Version::Renumbered, 5) => Base::Di,
            (Version::Renumbered, 8) => Base::PreviousSp,
            (Version::Renumbered, 10) => Base::BpIndirect,
            (Version::Renumbered, _) => return None,
            (_, 1) => Base::PreviousSp,
            (_, 3) => Base::Di,
            (_, 5) => Base::Sp,
            (_, 8) => Base::BpIndirect,
            _ => return None,
        })
    }

    fn kind(self, flags: u16, sp: Base) -> Option<Kind> {
        Some(match self {
            Version::TwoBits => {
                // `end` is bit 10, and in 6.3, where bit 10 is `signal`, bit 11. Neither is set beside
                // an undefined stack pointer for another reason.
                let ends = flags & 0xc00 != 0;
                match (sp, flags >> 8 & 3) {
                    (Base::Undefined, _) if ends => Kind::EndOfStack,
                    (Base::Undefined, _) => Kind::Undefined,
                    (_, 0) => Kind::Call,
                    (_, 1) => Kind::Registers,
                    (_, 2) => Kind::HardwareFrame,
                    _ => return None,
                }
            }
            Version::ThreeBits | Version::Renumbered => match flags >> 8 & 7 {
                0 => Kind::Undefined,
                1 => Kind::EndOfStack,
                2 => Kind::Call,
                3 => Kind::Registers,
                4 => Kind::HardwareFrame,
                _ => return None,
            },
        })
    }

    /// Decodes an entry; `None` when it means nothing in this version.
    fn decode(self, raw: [u8; ENTRY as usize]) -> Option<Entry> {
        let [sp_low, sp_high, bp_low, bp_high, flags_low, flags_high] = raw;
        let flags = u16::from_le_bytes([flags_low, flags_high]);
        let sp = self.base(flags & 0xf)?;
        Some(Entry {
            sp,
            sp_offset: i16::from_le_bytes([sp_low, sp_high]),
            bp: self.base(flags >> 4 & 0xf)?,
            bp_offset: i16::from_le_bytes([bp_low, bp_high]),
            kind: self.kind(flags, sp)?,
        })
    }
}

#[cfg(test)]
#[path = "orc_tests.rs"]
mod tests;
