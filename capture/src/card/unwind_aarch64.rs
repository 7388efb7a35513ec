//! arm64 stacks, by frame records.
//!
//! The kernel is built with frame pointers: x29 points to a record (the caller's x29, the return
//! address), and so on up the stack and over to other stacks. Where an exception was taken, the entry
//! code puts a record into struct pt_regs itself. The rules are those of
//! arch/arm64/kernel/stacktrace.c and entry.S, 6.1 to 6.14.

use super::facts::Member;
use super::kernel::Kernel;
use super::unwind::{End, Frame, Kind, Step, Unwinder};

/// Indices into struct user_pt_regs (arch/arm64/include/uapi/asm/ptrace.h): x0 to x30, sp, pc, pstate.
mod reg {
    pub const FP: usize = 29;
    pub const LR: usize = 30;
    pub const SP: usize = 31;
    pub const PC: usize = 32;
    pub const PSTATE: usize = 33;
}

/// The bits of PSTATE that say at which exception level the CPU was (M[3:2]; 0 is user mode, in
/// AArch32 state too).
const LEVEL: u64 = 0xc;

/// Offset of the record that the entry code makes in struct pt_regs, from 5.11 to 6.14 at least, for
/// kernels whose types are lost; and, from the record, of what says which kind it is (6.13 on).
const RECORD: u64 = 304;
const RECORD_KIND: u64 = 16;

/// Kinds of such records (arch/arm64/include/asm/stacktrace/frame.h, 6.14).
const FINAL: u64 = 1;
const PT_REGS: u64 = 2;

/// Where the unwinder stands.
#[derive(Clone, Copy)]
pub struct Arm64Unwinder {
    pc: u64,
    kind: Kind,
    /// x29: the record that leads to the caller.
    record: u64,
    /// x30, right after an exception.
    link: Option<u64>,
}

impl Unwinder for Arm64Unwinder {
    fn begin(raw: &[u8]) -> Result<Arm64Unwinder, End> {
        let (raw, _) = raw.as_chunks::<8>();
        let word = |index: usize| raw.get(index).map(|word| u64::from_le_bytes(*word));
        let words = [reg::FP, reg::LR, reg::PC, reg::PSTATE].map(word);
        let [Some(record), Some(link), Some(pc), Some(state)] = words else {
            return Err(End::NoRegisters);
        };
        if state & LEVEL == 0 {
            return Err(End::UserMode);
        }
        Ok(Arm64Unwinder { pc, kind: Kind::Registers, record, link: Some(link) })
    }

    fn frame(&self) -> Frame {
        Frame { pc: self.pc, kind: self.kind }
    }

    fn step(&self, kernel: &mut Kernel<'_>) -> Step<Arm64Unwinder> {
        if let Some(pc) = self.callers_link(kernel) {
            return Step::To(Arm64Unwinder { pc, kind: Kind::LinkRegister, link: None, ..*self });
        }
        if self.record == 0 {
            return Step::End(End::KernelThread);
        }
        self.follow(kernel).unwrap_or(Step::End(End::Unknown))
    }
}

impl Arm64Unwinder {
    fn follow(&self, kernel: &mut Kernel<'_>) -> Option<Step<Arm64Unwinder>> {
        let at = self.record;
        if !at.is_multiple_of(8) {
            return None;
        }
        let record = kernel.memory.u64(at)?;
        let link = kernel.memory.u64(at.checked_add(8)?)?;
        let base =
            at.checked_sub(kernel.facts.member(Member::RegistersRecord).unwrap_or(RECORD))?;
        let has_kind = kernel.facts.member(Member::RecordKind).is_some();
        let kind = match (record, link) {
            (0, 0) if has_kind => kernel.memory.u64(at.checked_add(RECORD_KIND)?)?,
            (0, 0) => FINAL,
            // Before 6.13 the record in struct pt_regs is an ordinary one: the interrupted x29 and pc.
            _ if !has_kind && is_exception(kernel, base, record, link) => PT_REGS,
            _ => {
                let (pc, kind) = (unsigned(kernel, link), Kind::ReturnAddress);
                let next = Arm64Unwinder { pc, kind, record, link: None };
                return Some(self.checked(next));
            }
        };
        match kind {
            FINAL => Some(Step::End(end(kernel, base))),
            PT_REGS => {
                let word = |kernel: &mut Kernel<'_>, index| word(kernel, base, index);
                if word(kernel, reg::PSTATE)? & LEVEL == 0 {
                    return Some(Step::End(End::UserMode));
                }
                let (pc, record) = (word(kernel, reg::PC)?, word(kernel, reg::FP)?);
                let link = Some(word(kernel, reg::LR)?);
                Some(Step::To(Arm64Unwinder { pc, kind: Kind::Registers, record, link }))
            }
            _ => None,
        }
    }

    /// Records climb a stack; only between stacks, which lie apart, they may go down.
    fn checked(&self, next: Arm64Unwinder) -> Step<Arm64Unwinder> {
        const STACK: u64 = 4096;
        let back = self.record.checked_sub(next.record);
        match back {
            Some(back) if back < STACK && next.record != 0 => Step::End(End::NotFurther),
            _ => Step::To(next),
        }
    }

    /// The caller of a function that was interrupted before it made its record, or after it took it
    /// down, or that makes none: x29 still leads to the caller's record, and only x30 to the caller.
    ///
    /// A function with a record of its own has the same return address in it as in x30; and once it
    /// has called another, x30 leads back into itself.
    fn callers_link(&self, kernel: &mut Kernel<'_>) -> Option<u64> {
        let link = unsigned(kernel, self.link?);
        let caller = link.checked_sub(4)?;
        let saved = kernel.memory.u64(self.record.checked_add(8)?);
        if saved.is_some_and(|saved| unsigned(kernel, saved) == link)
            || kernel.code(caller).is_none()
        {
            return None;
        }
        let here = kernel.place(self.pc).map(|place| place.function.start);
        let there = kernel.place(caller).map(|place| place.function.start);
        let word = kernel.memory.u32(caller)?;
        // bl; blr, blraa and the like
        let is_call = word >> 26 == 0b10_0101 || word & 0xfeff_f000 == 0xd63f_0000;
        (is_call && here != there).then_some(link)
    }
}

/// A return address without its signature. Bit 55 tells kernel addresses from user ones, which are
/// never signed here.
fn unsigned(kernel: &Kernel<'_>, address: u64) -> u64 {
    const KERNEL: u64 = 1 << 55;
    if address & KERNEL != 0 { address | kernel.facts.signature } else { address }
}

fn word(kernel: &mut Kernel<'_>, base: u64, index: usize) -> Option<u64> {
    kernel.memory.u64(base.checked_add(index as u64 * 8)?)
}

/// Whether there is a struct pt_regs at `base` whose record this is: then its two words are there
/// twice, and the CPU was not in user mode.
fn is_exception(kernel: &mut Kernel<'_>, base: u64, record: u64, link: u64) -> bool {
    word(kernel, base, reg::FP) == Some(record)
        && word(kernel, base, reg::PC) == Some(link)
        && word(kernel, base, reg::PSTATE).is_some_and(|state| state & LEVEL != 0)
}

/// What is at the end of a stack: the registers with which the kernel was entered, if it was. Those of
/// a kernel thread are all 0.
fn end(kernel: &mut Kernel<'_>, base: u64) -> End {
    let words = [reg::PC, reg::SP, reg::PSTATE].map(|index| word(kernel, base, index));
    match words {
        [Some(pc), Some(sp), Some(state)] if state & LEVEL == 0 && (pc, sp) != (0, 0) => {
            End::UserMode
        }
        _ => End::KernelThread,
    }
}
