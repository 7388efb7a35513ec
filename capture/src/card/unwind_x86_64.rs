//! x86_64 stacks, by ORC.
//!
//! The rules are those of arch/x86/kernel/unwind_orc.c, 6.1 and 6.12; the layout of saved registers
//! that of struct pt_regs (arch/x86/include/asm/ptrace.h).

use super::kernel::{Code, Kernel};
use super::orc::{self, Base, Entry};
use super::unwind::{End, Frame, Kind, Step, Unwinder};

/// Words of struct pt_regs, and the first one that the hardware saves (ip, cs, flags, sp, ss).
const WORDS: usize = 21;
const HARDWARE: usize = 16;

/// Indices into struct pt_regs.
mod reg {
    pub const R13: usize = 2;
    pub const BP: usize = 4;
    pub const R10: usize = 7;
    pub const DX: usize = 12;
    pub const DI: usize = 14;
    pub const IP: usize = 16;
    pub const CS: usize = 17;
    pub const SP: usize = 19;
}

/// How far up the stack a return address is looked for, in words.
const REACH: u64 = 512;

/// Where the unwinder stands.
#[derive(Clone, Copy)]
pub struct X86Unwinder {
    pc: u64,
    kind: Kind,
    sp: u64,
    bp: Option<u64>,
    /// All registers, right after a complete struct pt_regs.
    registers: Option<[u64; WORDS]>,
}

impl Unwinder for X86Unwinder {
    fn begin(raw: &[u8]) -> Result<X86Unwinder, End> {
        let mut words = [0; WORDS];
        let (raw, _) = raw.as_chunks::<8>();
        let raw = raw.get(..WORDS).ok_or(End::NoRegisters)?;
        words.iter_mut().zip(raw).for_each(|(word, raw)| *word = u64::from_le_bytes(*raw));
        match X86Unwinder::interrupted(&words, Some(words[reg::BP]), Some(words)) {
            Step::To(state) => Ok(state),
            Step::End(end) => Err(end),
        }
    }

    fn frame(&self) -> Frame {
        Frame { pc: self.pc, kind: self.kind }
    }

    fn step(&self, kernel: &mut Kernel<'_>) -> Step<X86Unwinder> {
        let Some(table) = kernel.facts.orc else { return Step::End(End::NoTables) };
        let rule = self.rule(kernel, table);
        match rule.kind {
            orc::Kind::EndOfStack => Step::End(End::KernelThread),
            orc::Kind::Undefined => self.call_site(kernel).map_or(Step::End(End::NoRule), Step::To),
            _ => self.follow(kernel, rule).unwrap_or(Step::End(End::Unknown)),
        }
    }
}

impl X86Unwinder {
    /// Goes on at registers that were saved.
    fn interrupted(
        words: &[u64; WORDS],
        bp: Option<u64>,
        registers: Option<[u64; WORDS]>,
    ) -> Step<X86Unwinder> {
        if words[reg::CS] & 3 != 0 {
            return Step::End(End::UserMode);
        }
        let (pc, sp, kind) = (words[reg::IP], words[reg::SP], Kind::Registers);
        Step::To(X86Unwinder { pc, kind, sp, bp, registers })
    }

    /// The rule for a frame; without tables it is taken to keep a frame pointer.
    fn rule(&self, kernel: &mut Kernel<'_>, table: orc::Table) -> Entry {
        let at = self.frame().lookup();
        if self.pc == 0 {
            return orc::BAD_CALL;
        }
        let rule = match kernel.code(at) {
            Some(Code::Image) => table.find(&mut kernel.memory, at),
            Some(Code::Module(module)) => module
                .orc(&mut kernel.memory, kernel.facts, table.version)
                .and_then(|table| table.find(&mut kernel.memory, at)),
            None if self.kind == Kind::Registers => Some(orc::BAD_CALL),
            None => None,
        };
        rule.unwrap_or(orc::FRAME_POINTER)
    }

    fn follow(&self, kernel: &mut Kernel<'_>, rule: Entry) -> Option<Step<X86Unwinder>> {
        let frame = self.canonical_address(kernel, rule)?;
        let mut words = [0; WORDS];
        match rule.kind {
            orc::Kind::Registers => {
                for (word, index) in words.iter_mut().zip(0..) {
                    *word = kernel.memory.u64(frame.checked_add(index * 8)?)?;
                }
                Some(X86Unwinder::interrupted(&words, Some(words[reg::BP]), Some(words)))
            }
            orc::Kind::HardwareFrame => {
                for (word, index) in words[HARDWARE..].iter_mut().zip(0..) {
                    *word = kernel.memory.u64(frame.checked_add(index * 8)?)?;
                }
                let bp = self.frame_pointer(kernel, rule, frame);
                Some(X86Unwinder::interrupted(&words, bp, None))
            }
            _ => {
                // Other stacks are changed to by registers and by words of the stack only.
                if frame <= self.sp && matches!(rule.sp, Base::Sp | Base::Bp) {
                    return Some(Step::End(End::NotFurther));
                }
                let pc = kernel.memory.u64(frame.checked_sub(8)?)?;
                let bp = self.frame_pointer(kernel, rule, frame);
                let kind = Kind::ReturnAddress;
                Some(Step::To(X86Unwinder { pc, kind, sp: frame, bp, registers: None }))
            }
        }
    }

    /// The frame's canonical address: the caller's stack pointer, or where registers were saved.
    fn canonical_address(&self, kernel: &mut Kernel<'_>, rule: Entry) -> Option<u64> {
        let register = |index: usize| Some(self.registers?[index]);
        let offset = i64::from(rule.sp_offset);
        let address = match rule.sp {
            Base::Sp => self.sp.wrapping_add_signed(offset),
            Base::Bp => self.bp?.wrapping_add_signed(offset),
            Base::SpIndirect => kernel.memory.u64(self.sp)?.wrapping_add_signed(offset),
            Base::BpIndirect => kernel.memory.u64(self.bp?.wrapping_add_signed(offset))?,
            // For these the offset is not used (unwind_orc.c).
            Base::R10 => register(reg::R10)?,
            Base::R13 => register(reg::R13)?,
            Base::Di => register(reg::DI)?,
            Base::Dx => register(reg::DX)?,
            Base::Undefined | Base::PreviousSp => return None,
        };
        address.is_multiple_of(8).then_some(address)
    }

    fn frame_pointer(&self, kernel: &mut Kernel<'_>, rule: Entry, frame: u64) -> Option<u64> {
        let offset = i64::from(rule.bp_offset);
        match rule.bp {
            Base::PreviousSp => kernel.memory.u64(frame.wrapping_add_signed(offset)),
            Base::Bp => kernel.memory.u64(self.bp?.wrapping_add_signed(offset)),
            _ => self.bp,
        }
    }

    /// The caller of a function that the tables leave out (STACK_FRAME_NON_STANDARD; in 6.1
    /// `__crash_kexec`, where every kdump begins): the first word up the stack that is the return
    /// address of a direct call of this very function.
    fn call_site(&self, kernel: &mut Kernel<'_>) -> Option<X86Unwinder> {
        let function = kernel.place(self.frame().lookup())?.function.start;
        for index in 0..REACH {
            let slot = self.sp.checked_add(index * 8)?;
            let pc = kernel.memory.u64(slot)?;
            if is_behind_call_of(kernel, pc, function) {
                let (kind, sp) = (Kind::ReturnAddress, slot.checked_add(8)?);
                return Some(X86Unwinder { pc, kind, sp, bp: self.bp, registers: None });
            }
        }
        None
    }
}

/// Whether the instruction before `at` is `call function` (e8, 32-bit displacement).
fn is_behind_call_of(kernel: &mut Kernel<'_>, at: u64, function: u64) -> bool {
    const CALL: u8 = 0xe8;
    let Some([operation, distance @ ..]) =
        at.checked_sub(5).and_then(|it| kernel.memory.bytes::<5>(it))
    else {
        return false;
    };
    let target = at.wrapping_add_signed(i64::from(i32::from_le_bytes(distance)));
    operation == CALL && target == function && kernel.code(at.wrapping_sub(1)) == Some(Code::Image)
}
