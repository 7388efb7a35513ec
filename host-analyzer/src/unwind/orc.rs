//! ORC: the kernel's unwind tables (x86_64), in all their versions.
//!
//! arch/x86/include/asm/orc_types.h and unwind_orc.c, 5.10 to 7.1. A table of instruction
//! addresses, each stored relative to its own place, and a parallel table of 6-byte entries.

use crate::VirtAddr;
use crate::bytes;
use crate::kernel::btf::Btf;
use crate::kernel::sparse::Sparse;

/// Size of an entry.
pub const ENTRY: usize = 6;
/// Size of an instruction address.
const IP: usize = 4;

/// Layout of an entry's flags.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Version {
    /// To 6.2: two bits of type, then `end`.
    V1,
    /// 6.3: two bits of type, then `signal`, then `end`.
    V2,
    /// 6.4 to 7.0: three bits of type, then `signal`.
    V3,
    /// 7.1 on: as before, registers numbered anew.
    V4,
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

impl Version {
    /// Tells the version: the members of struct orc_entry say which flags there are; where the types
    /// are lost, the entries do.
    #[must_use]
    pub fn detect(types: Option<&Btf<'_>>, entries: &Sparse<'_>) -> Option<Version> {
        let types = types.filter(|types| types.is_whole());
        let has = |name| types.is_some_and(|it| it.member("orc_entry", name).is_some());
        match (has("end"), has("signal")) {
            (true, false) => Some(Version::V1),
            (true, true) => Some(Version::V2),
            _ => Version::by_entries(entries).or(types.map(|_| Version::V3)),
        }
    }

    /// Tells the version by the entries themselves: nearly all frames start from the stack pointer and
    /// are ordinary calls, and the end of a stack is a flag of its own in the first two. `None` when
    /// there are too few entries to tell.
    fn by_entries(entries: &Sparse<'_>) -> Option<Version> {
        const SAMPLE: usize = 1 << 16;
        const LEAST: usize = 8;
        let raw = (0..(entries.len() / ENTRY).min(SAMPLE))
            .filter_map(|index| entries.get(index * ENTRY..(index + 1) * ENTRY));
        let flags = raw.filter_map(|raw| bytes::u16_at(raw, 4));
        // What each version's ordinary call looks like, its types and register numbers.
        let (mut v1, mut v3, mut v4, mut ends_of_v2, mut ends_of_v1) = (0, 0, 0, 0, 0);
        for flags in flags {
            match (flags & 0xf, flags >> 8 & 7) {
                (5, 0 | 4) => v1 += 1,
                (5, 2) => v3 += 1,
                (3, 2) => v4 += 1,
                (0, _) if flags >> 11 & 1 == 1 => ends_of_v2 += 1,
                (0, 4) => ends_of_v1 += 1,
                _ => {}
            }
        }
        let most = v1.max(v3).max(v4);
        match most {
            _ if most < LEAST => None,
            _ if most == v4 => Some(Version::V4),
            _ if most == v3 => Some(Version::V3),
            _ if ends_of_v2 > ends_of_v1 => Some(Version::V2),
            _ => Some(Version::V1),
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
            (Version::V4, 3) => Base::Sp,
            (Version::V4, 5) => Base::Di,
            (Version::V4, 8) => Base::PreviousSp,
            (Version::V4, 10) => Base::BpIndirect,
            (Version::V4, _) => return None,
            (_, 1) => Base::PreviousSp,
            (_, 3) => Base::Di,
            (_, 5) => Base::Sp,
            (_, 8) => Base::BpIndirect,
            _ => return None,
        })
    }

    fn kind(self, flags: u16, sp: Base) -> Option<Kind> {
        match self {
            Version::V1 | Version::V2 => {
                let end = flags >> (if self == Version::V1 { 10 } else { 11 }) & 1 == 1;
                Some(match (sp, end, flags >> 8 & 3) {
                    (Base::Undefined, true, _) => Kind::EndOfStack,
                    (Base::Undefined, false, _) => Kind::Undefined,
                    (_, _, 0) => Kind::Call,
                    (_, _, 1) => Kind::Registers,
                    (_, _, 2) => Kind::HardwareFrame,
                    _ => return None,
                })
            }
            Version::V3 | Version::V4 => Some(match flags >> 8 & 7 {
                0 => Kind::Undefined,
                1 => Kind::EndOfStack,
                2 => Kind::Call,
                3 => Kind::Registers,
                4 => Kind::HardwareFrame,
                _ => return None,
            }),
        }
    }

    /// Decodes an entry; `None` when it means nothing in this version.
    #[must_use]
    pub fn decode(self, raw: &[u8]) -> Option<Entry> {
        let flags = bytes::u16_at(raw, 4)?;
        let sp = self.base(flags & 0xf)?;
        Some(Entry {
            sp,
            sp_offset: bytes::u16_at(raw, 0)? as i16,
            bp: self.base(flags >> 4 & 0xf)?,
            bp_offset: bytes::u16_at(raw, 2)? as i16,
            kind: self.kind(flags, sp)?,
        })
    }
}

/// The tables of the kernel's image or of a module.
pub struct Table<'a> {
    /// Where the instruction addresses lie; they are relative to this.
    pub place: VirtAddr,
    /// The instruction addresses, in ascending order.
    pub ips: Sparse<'a>,
    /// The entries.
    pub entries: Sparse<'a>,
    /// What the entries mean.
    pub version: Version,
}

/// What a table has for an instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Found {
    /// Its entry.
    Entry(Entry),
    /// No entry, or one that means nothing.
    Nothing,
    /// The part that would have it is not in the dump.
    Lost,
}

impl Table<'_> {
    /// The entry for the instruction at `pc`: the last one that begins at or before it.
    #[must_use]
    pub fn find(&self, pc: VirtAddr) -> Found {
        let count = (self.ips.len() / IP).min(self.entries.len() / ENTRY);
        let below = |index: usize| self.ip(index).map(|ip| ip <= pc);
        let Some(after) = self.ips.partition(count, IP, below) else { return Found::Lost };
        let Some(index) = after.checked_sub(1) else { return Found::Nothing };
        match self.entries.get(index * ENTRY..(index + 1) * ENTRY) {
            Some(raw) => self.version.decode(raw).map_or(Found::Nothing, Found::Entry),
            None => Found::Lost,
        }
    }

    fn ip(&self, index: usize) -> Option<VirtAddr> {
        let relative = bytes::i32_at(self.ips.get(index * IP..(index + 1) * IP)?, 0)?;
        Some(self.place.offset((index * IP) as u64).offset(i64::from(relative) as u64))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn raw(sp_offset: i16, bp_offset: i16, flags: u16) -> Vec<u8> {
        [sp_offset.to_le_bytes(), bp_offset.to_le_bytes(), flags.to_le_bytes()].concat()
    }

    #[test]
    fn ordinary_call_reads_alike_in_all_versions_but_for_the_numbers() {
        let entry = Entry {
            sp: Base::Sp,
            sp_offset: 24,
            bp: Base::PreviousSp,
            bp_offset: -16,
            kind: Kind::Call,
        };
        assert_eq!(Version::V1.decode(&raw(24, -16, 0x015)), Some(entry));
        assert_eq!(Version::V2.decode(&raw(24, -16, 0x015)), Some(entry));
        assert_eq!(Version::V3.decode(&raw(24, -16, 0x215)), Some(entry));
        assert_eq!(Version::V4.decode(&raw(24, -16, 0x283)), Some(entry));
    }

    #[test]
    fn saved_registers_are_told_from_what_the_hardware_saves() {
        let kind = |version: Version, flags| version.decode(&raw(0, 0, flags)).unwrap().kind;
        assert_eq!(kind(Version::V1, 0x105), Kind::Registers);
        assert_eq!(kind(Version::V1, 0x205), Kind::HardwareFrame);
        assert_eq!(kind(Version::V3, 0x305), Kind::Registers);
        assert_eq!(kind(Version::V3, 0x405), Kind::HardwareFrame);
        assert_eq!(kind(Version::V4, 0x303), Kind::Registers);
    }

    #[test]
    fn end_of_stack_is_a_flag_at_first_and_a_type_later() {
        let kind = |version: Version, flags| version.decode(&raw(0, 0, flags)).unwrap().kind;
        assert_eq!(kind(Version::V1, 1 << 10), Kind::EndOfStack);
        assert_eq!(kind(Version::V2, 1 << 11), Kind::EndOfStack);
        assert_eq!(kind(Version::V3, 0x100), Kind::EndOfStack);
        assert_eq!(kind(Version::V1, 0), Kind::Undefined);
        assert_eq!(kind(Version::V4, 0), Kind::Undefined);
    }

    #[test]
    fn unknown_numbers_decode_to_nothing() {
        assert_eq!(Version::V3.decode(&raw(0, 0, 0x70f)), None);
        assert_eq!(Version::V4.decode(&raw(0, 0, 0x201)), None);
        assert_eq!(Version::V1.decode(&[0; 5]), None);
    }

    #[test]
    fn version_is_told_by_what_most_entries_look_like() {
        let detect = |calls: u16, end: u16| {
            let calls = (0..100).flat_map(|_| raw(8, 0, calls));
            let entries: Vec<u8> = calls.chain(raw(0, 0, end)).collect();
            Version::detect(None, &Sparse::whole(entries))
        };
        assert_eq!(detect(0x015, 1 << 10), Some(Version::V1));
        assert_eq!(detect(0x015, 1 << 11), Some(Version::V2));
        assert_eq!(detect(0x205, 0x100), Some(Version::V3));
        assert_eq!(detect(0x203, 0x100), Some(Version::V4));
        assert_eq!(Version::detect(None, &Sparse::whole(raw(8, 0, 0x205))), None);
    }

    fn table(ips: &[u64], place: u64) -> Table<'static> {
        let relative = |(index, ip): (usize, &u64)| {
            (ip.wrapping_sub(place + index as u64 * 4) as i32).to_le_bytes()
        };
        let entry = |index: usize| raw(8 + index as i16 * 8, 0, 0x005);
        Table {
            place: VirtAddr(place),
            ips: Sparse::whole(ips.iter().enumerate().flat_map(relative).collect::<Vec<u8>>()),
            entries: Sparse::whole((0..ips.len()).flat_map(entry).collect::<Vec<u8>>()),
            version: Version::V1,
        }
    }

    #[test]
    fn last_entry_that_begins_before_an_instruction_rules_it() {
        let table = table(&[0x8100_0000, 0x8100_0004, 0x8100_0010], 0x82c5_d44c);
        let offset = |pc| match table.find(VirtAddr(pc)) {
            Found::Entry(entry) => Some(entry.sp_offset),
            _ => None,
        };
        assert_eq!(offset(0x8100_0003), Some(8));
        assert_eq!(offset(0x8100_0004), Some(16));
        assert_eq!(offset(0x8fff_ffff), Some(24));
        assert_eq!(offset(0x80ff_ffff), None);
    }

    proptest! {
        #[test]
        fn garbage_tables_never_panic(ips: Vec<u8>, entries: Vec<u8>, pc: u64) {
            for version in [Version::V1, Version::V2, Version::V3, Version::V4] {
                let (ips, entries) = (Sparse::whole(ips.clone()), Sparse::whole(entries.clone()));
                let _ = Table { place: VirtAddr(pc), ips, entries, version }.find(VirtAddr(pc));
            }
        }
    }
}
