//! ORC: the kernel's unwind tables (x86_64), in all their versions.
//!
//! arch/x86/include/asm/orc_types.h and unwind_orc.c, 5.10 to 7.1. A table of instruction
//! addresses, each stored relative to its own place, and a parallel table of 6-byte entries.

use std::borrow::Cow;

use crate::bytes;
use crate::kernel::btf::Btf;
use crate::VirtAddr;

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
    /// Tells the version: the members of struct orc_entry say which flags there are, and the
    /// entries themselves how registers are numbered, for nearly all frames start from the stack
    /// pointer.
    #[must_use]
    pub fn detect(types: Option<&Btf<'_>>, entries: &[u8]) -> Version {
        let has = |name| types.is_some_and(|it| it.member("orc_entry", name).is_some());
        match (types.is_none(), has("end"), has("signal")) {
            (false, true, false) => Version::V1,
            (false, true, true) => Version::V2,
            _ => Version::by_numbering(entries),
        }
    }

    fn by_numbering(entries: &[u8]) -> Version {
        const SAMPLE: usize = 4096;
        const SP_V3: u16 = 5;
        const SP_V4: u16 = 3;
        let flags = entries.chunks_exact(ENTRY).take(SAMPLE).filter_map(|it| bytes::u16_at(it, 4));
        let (mut v3, mut v4) = (0, 0);
        for register in flags.map(|flags| flags & 0xf) {
            v3 += usize::from(register == SP_V3);
            v4 += usize::from(register == SP_V4);
        }
        if v4 > v3 { Version::V4 } else { Version::V3 }
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
    pub ips: Cow<'a, [u8]>,
    /// The entries.
    pub entries: Cow<'a, [u8]>,
    /// What the entries mean.
    pub version: Version,
}

impl Table<'_> {
    /// The entry for the instruction at `pc`: the last one that begins at or before it.
    #[must_use]
    pub fn find(&self, pc: VirtAddr) -> Option<Entry> {
        let count = (self.ips.len() / IP).min(self.entries.len() / ENTRY);
        let (mut low, mut high) = (0, count);
        while low < high {
            let middle = low + (high - low) / 2;
            if self.ip(middle)? <= pc {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let at = low.checked_sub(1)? * ENTRY;
        self.version.decode(self.entries.get(at..at + ENTRY)?)
    }

    fn ip(&self, index: usize) -> Option<VirtAddr> {
        let relative = bytes::i32_at(&self.ips, index * IP)?;
        Some(self.place.offset((index * IP) as u64).offset(i64::from(relative) as u64))
    }
}
