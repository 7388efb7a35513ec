//! arm64 stacks, by frame records.
//!
//! The kernel is built with frame pointers: x29 points to a record (the caller's x29, the return
//! address), and so on up the stack and over to other stacks. Where an exception was taken, the
//! entry code puts a record into struct pt_regs itself. The rules are those of
//! arch/arm64/kernel/stacktrace.c and entry.S, 6.1 to 6.14; beyond them, the caller of a function
//! that was interrupted without a record of its own is found ([`super::prologue`]).

mod registers;

use crate::kernel::Kernel;
use crate::kernel::types::Types;
use crate::linux::Linux;
use crate::linux::stacks::{Stack, Stacks};
use crate::{Error, ReadContext, ReadError, VirtAddr, bytes};

use super::prologue::{self, Record};
use super::{
    CallerBy, Climb, End, ExceptionFrame, Frame, FrameKind, MAX_FRAMES, Registers, Start, Trace,
    Unwinder,
};
use registers::{LEVEL, REGISTERS, reg};

pub use registers::Arm64Registers;

/// Where things lie in struct pt_regs, in bytes.
#[derive(Clone, Copy, Debug)]
struct Layout {
    /// The record that the entry code makes.
    record: u64,
    /// All of it.
    size: u64,
    /// From that record, what says which kind it is (struct frame_record_meta, 6.13 on).
    kind: Option<u64>,
    /// orig_x0 and syscallno.
    call: Option<(u64, u64)>,
}

impl Layout {
    /// Offset of `stackframe` from 5.11 to 6.14 at least, for kernels whose types are lost.
    const RECORD: u64 = 304;

    fn new(kernel: &Kernel<'_>) -> Layout {
        let offset = |path| Some(kernel.field("pt_regs", path).ok()??.offset as u64);
        let record = offset("stackframe").unwrap_or(Layout::RECORD);
        let kind = offset("stackframe.type").and_then(|at| at.checked_sub(record));
        let size = kernel.types().ok().and_then(|it| it.size_of(it.structure("pt_regs")?));
        let size = size.map_or(record + 32, |size| size as u64);
        Layout { record, size, kind, call: offset("orig_x0").zip(offset("syscallno")) }
    }
}

/// Kinds of records in struct pt_regs (arch/arm64/include/asm/stacktrace/frame.h, 6.14).
mod kind {
    pub const FINAL: u64 = 1;
    pub const PT_REGS: u64 = 2;
}

/// Unwinds by frame records.
pub struct Arm64Unwinder<'k, 'd> {
    linux: &'k Linux<'k, 'd>,
    layout: Layout,
    /// The bits that a kernel's address has set, and that a signed one may have clear (PAC).
    signature: u64,
}

/// Where the unwinder stands.
#[derive(Clone, Debug)]
struct State {
    pc: VirtAddr,
    kind: FrameKind,
    /// Where on the stack this frame is shown to be.
    at: VirtAddr,
    /// x29: the record that leads to the caller.
    record: VirtAddr,
    /// The last address of the stack that was used up. Records must climb, not the stack pointers in
    /// the registers of exceptions: that of a stack that overflowed points outside of it.
    used: VirtAddr,
    /// All registers, right after an exception.
    registers: Option<Box<Arm64Registers>>,
    /// What a task saved when it stopped running.
    saved: Option<Box<Registers>>,
}

impl State {
    fn new(pc: VirtAddr, kind: FrameKind, at: VirtAddr, record: VirtAddr, used: VirtAddr) -> State {
        State { pc, kind, at, record, used, registers: None, saved: None }
    }

    /// What is known of the registers.
    fn known(&self) -> Registers {
        let mut known = match &self.registers {
            Some(all) => (0..=reg::SP as u16).zip(all.words).collect(),
            None => self.saved.as_deref().copied().unwrap_or_default(),
        };
        known.set(reg::FP as u16, self.record.0);
        known
    }
}

/// What a step came to.
enum Step {
    To(State, Option<ExceptionFrame>),
    End(End),
}

impl<'k, 'd> Arm64Unwinder<'k, 'd> {
    /// An unwinder for the stacks of a kernel.
    #[must_use]
    pub fn new(linux: &'k Linux<'k, 'd>) -> Arm64Unwinder<'k, 'd> {
        let kernel = linux.kernel();
        let info = kernel.vmcoreinfo();
        // The kernel's mask covers all bits that are not translated (asm/pointer_auth.h). One of 0
        // says that it does not sign; where there is none, addresses are as wide as TCR_EL1 says.
        let width = info.number("TCR_EL1_T1SZ").and_then(|size| u32::try_from(size).ok());
        let by_width = || width.and_then(|size| u64::MAX.checked_shl(64u32.checked_sub(size)?));
        let mask = info.number("KERNELPACMASK").map(|mask| mask as u64);
        let signature = mask.or_else(by_width).unwrap_or(0);
        Arm64Unwinder { linux, layout: Layout::new(kernel), signature }
    }

    fn kernel(&self) -> &'k Kernel<'d> {
        self.linux.kernel()
    }

    /// A return address without its signature. Bit 55 tells kernel addresses from user ones, which
    /// are never signed here.
    fn unsigned(&self, address: u64) -> VirtAddr {
        const KERNEL: u64 = 1 << 55;
        VirtAddr(if address & KERNEL != 0 { address | self.signature } else { address })
    }

    /// What a task saved when it stopped running: struct cpu_context (asm/processor.h).
    fn saved(&self, task: VirtAddr) -> Result<State, String> {
        let memory = self.kernel().memory();
        let place = |name: &str| {
            let path = format!("thread.cpu_context.{name}");
            let member = self.kernel().offset("task_struct", &path);
            member.map(|member| task.offset(member)).map_err(|error| error.to_string())
        };
        let word = |name: &str| {
            let word = memory.u64(place(name)?);
            word.map_err(|error| format!("its saved registers are lost: {error}"))
        };
        let (pc, sp) = (self.unsigned(word("pc")?), VirtAddr(word("sp")?));
        // A task that never ran "returns" to the very start of ret_from_fork.
        let never_ran = self.linux.place(pc).is_some_and(|place| place.offset == 0);
        let kind = if never_ran { FrameKind::Registers } else { FrameKind::ReturnAddress };
        let record = VirtAddr(word("fp")?);
        // x19 to x28 lie one behind the other.
        let first = place("x19").ok();
        let kept = (0..10u16).filter_map(|index| {
            let at = first?.offset(u64::from(index) * 8);
            Some((19 + index, memory.u64(at).ok()?))
        });
        let mut saved: Registers = kept.collect();
        saved.set(reg::SP as u16, sp.0);
        let saved = Some(Box::new(saved));
        Ok(State { saved, ..State::new(pc, kind, sp, record, sp.back(1)) })
    }

    fn begin(&self, start: Start<'_>) -> Result<Step, String> {
        Ok(match start {
            Start::Registers(raw) => {
                let registers = Arm64Registers::parse(raw).ok_or("its registers are cut short")?;
                from_exception(registers, registers.sp(), registers.sp().back(1))
            }
            Start::Task(task) => Step::To(self.saved(task)?, None),
            Start::ReturnAddress(at) => {
                // A frame record: the caller's x29, then the return address.
                let memory = self.kernel().memory();
                let lost = |error: ReadError| error.to_string();
                let pc = self.unsigned(memory.u64(at).map_err(lost)?);
                let record = memory.pointer(at.back(8)).map_err(lost)?;
                let kind = FrameKind::ReturnAddress;
                Step::To(State::new(pc, kind, at, record, at.offset(7)), None)
            }
            Start::Instruction(pc, record) => {
                let kind = FrameKind::Registers;
                Step::To(State::new(pc, kind, record, record, record.back(1)), None)
            }
        })
    }

    fn step(&self, state: &State, frame: &mut Frame) -> Result<Step, String> {
        if let Some(registers) = &state.registers {
            let (caller, by) = self.interrupted(registers);
            frame.caller = by;
            if let Some(pc) = caller {
                let kind = FrameKind::ReturnAddress;
                let next = State { pc, kind, registers: None, ..state.clone() };
                return Ok(Step::To(next, None));
            }
        }
        self.follow_record(state)
    }

    fn follow_record(&self, state: &State) -> Result<Step, String> {
        let at = state.record;
        if at.is_null() {
            return Ok(Step::End(End::KernelThread));
        }
        if !at.0.is_multiple_of(8) {
            return Err(format!("its frame record would be at {at:#x}, which is not aligned"));
        }
        let memory = self.kernel().memory();
        let lost = |error: ReadError| format!("its frame record cannot be read: {error}");
        let (record, lr) =
            (memory.pointer(at).map_err(lost)?, memory.u64(at.offset(8)).map_err(lost)?);
        let ends = record.is_null() && lr == 0;
        let kind = match self.layout.kind {
            Some(kind) if ends => memory.u64(at.offset(kind)).map_err(lost)?,
            _ if ends => kind::FINAL,
            // Before 6.13 the record in struct pt_regs is an ordinary one: the interrupted x29 and pc.
            None if self.is_exception(at, record, lr).map_err(lost)? => kind::PT_REGS,
            // Before 5.11 the first task's last record has what x30 was when the CPU was turned on
            // (__primary_switched, arch/arm64/kernel/head.S, 5.10).
            _ if record.is_null() && !self.is_code(self.unsigned(lr)) => {
                return Ok(Step::End(End::KernelThread));
            }
            _ => {
                let (pc, kind) = (self.unsigned(lr), FrameKind::ReturnAddress);
                let next = State::new(pc, kind, at.offset(8), record, at.offset(15));
                return Ok(Step::To(next, None));
            }
        };
        let base = at.back(self.layout.record);
        match kind {
            kind::FINAL => self.end(base).map(Step::End).map_err(lost),
            kind::PT_REGS => {
                let registers = self.registers_in(base).map_err(lost)?;
                Ok(from_exception(registers, base, at.offset(15)))
            }
            other => Err(format!("the record at {at:#x} is of the unknown kind {other}")),
        }
    }

    /// What is at the end of a stack: the registers with which the kernel was entered, if it was.
    fn end(&self, base: VirtAddr) -> Result<End, ReadError> {
        match self.registers_in(base) {
            Ok(registers) if registers.user() => Ok(End::UserMode(registers.exception_frame(base))),
            Err(error) if error.is_lost() => Err(error),
            _ => Ok(End::KernelThread),
        }
    }

    /// Whether the record at `at` is part of a struct pt_regs: then its two words are there twice,
    /// and the CPU was not in user mode. An error when the dump lacks what would tell.
    fn is_exception(&self, at: VirtAddr, record: VirtAddr, lr: u64) -> Result<bool, ReadError> {
        match self.registers_in(at.back(self.layout.record)) {
            Ok(registers) => {
                let same = registers.words[reg::FP] == record.0 && registers.words[reg::PC] == lr;
                Ok(same && registers.words[reg::PSTATE] & LEVEL != 0)
            }
            Err(error) if error.is_lost() => Err(error),
            Err(_) => Ok(false),
        }
    }

    /// The registers of an exception of the kernel itself at `base`, if those are there.
    fn exception_frame_at(&self, base: VirtAddr) -> Option<ExceptionFrame> {
        let memory = self.kernel().memory();
        let at = base.offset(self.layout.record);
        let (record, lr) = (memory.pointer(at).ok()?, memory.u64(at.offset(8)).ok()?);
        let is_one = match self.layout.kind {
            Some(kind) => {
                record.is_null() && lr == 0 && memory.u64(at.offset(kind)).ok()? == kind::PT_REGS
            }
            None => lr >> 63 == 1 && self.is_exception(at, record, lr).ok()?,
        };
        let registers = self.registers_in(base).ok()?;
        // The upper half of PSTATE is reserved.
        let plausible = is_one && registers.words[reg::PSTATE] >> 32 == 0;
        plausible.then(|| registers.exception_frame(base))
    }

    fn registers_in(&self, base: VirtAddr) -> Result<Arm64Registers, ReadError> {
        let memory = self.kernel().memory();
        let raw = memory.bytes(base, REGISTERS * 8)?;
        let registers = Arm64Registers::parse(&raw).ok_or(ReadError::NotMapped(base))?;
        let call = self.layout.call.and_then(|(first, number)| {
            let number = memory.u32(base.offset(number)).ok()?;
            Some((memory.u64(base.offset(first)).ok()?, number))
        });
        Ok(Arm64Registers { call, ..registers })
    }
}

fn from_exception(registers: Arm64Registers, base: VirtAddr, used: VirtAddr) -> Step {
    let frame = registers.exception_frame(base);
    if registers.user() {
        return Step::End(End::UserMode(frame));
    }
    let (pc, at, kind) = (registers.pc(), registers.sp(), FrameKind::Registers);
    let record = VirtAddr(registers.words[reg::FP]);
    let registers = Some(Box::new(registers));
    Step::To(State { registers, ..State::new(pc, kind, at, record, used) }, Some(frame))
}

impl Arm64Unwinder<'_, '_> {
    /// The caller of a function that was interrupted, when x30 has it, and how sure that is.
    fn interrupted(&self, registers: &Arm64Registers) -> (Option<VirtAddr>, CallerBy) {
        let link = self.unsigned(registers.words[reg::LR]);
        let callers = self.linux.place(link.back(1)).is_some();
        let Some(function) = self.function(registers.pc()) else {
            // A jump to nowhere: whoever called left its return address in x30.
            let called = callers && self.call_before(link).is_some();
            return if called {
                (Some(link), CallerBy::LinkRegister)
            } else {
                (None, CallerBy::Uncertain)
            };
        };
        let at = (registers.pc().0.wrapping_sub(function.start.0) / 4) as usize;
        match prologue::record_at(&function.code, at) {
            Some(Record::Own) => (None, CallerBy::Tables),
            Some(Record::Callers) if callers => (Some(link), CallerBy::LinkRegister),
            // A call of this very function, directly before the place that x30 leads to.
            None if callers && self.call_before(link) == Some(Some(function.start)) => {
                self.called_from(link, &function, VirtAddr(registers.words[reg::FP]))
            }
            _ => (None, CallerBy::Uncertain),
        }
    }

    /// The caller of a function whose code does not tell, when x30 still has its return address: its
    /// own record has the same one, the caller's record that of the caller.
    fn called_from(
        &self,
        link: VirtAddr,
        function: &Function,
        record: VirtAddr,
    ) -> (Option<VirtAddr>, CallerBy) {
        let caller = self.linux.place(link.back(1)).map(|place| link.back(1).back(place.offset));
        // A function that calls itself can have the same address in both, or in x30 alone.
        let recursive = caller == Some(function.start);
        match self.kernel().memory().u64(record.offset(8)) {
            _ if recursive => (None, CallerBy::Uncertain),
            Ok(same) if self.unsigned(same) == link => (None, CallerBy::Tables),
            Ok(_) => (Some(link), CallerBy::LinkRegister),
            Err(_) => (None, CallerBy::Uncertain),
        }
    }

    /// The function with `pc` in it, and its code as far as it is in the dump.
    fn function(&self, pc: VirtAddr) -> Option<Function> {
        const INSTRUCTION: u64 = 4;
        /// Where the end of a function is not known (modules), its code is taken to go on so far.
        const REACH: u64 = 8 << 10;
        let place = self.linux.place(pc)?;
        let start = pc.back(place.offset);
        let end = match self.kernel().image_symbol(pc) {
            Some(symbol) => symbol.end,
            None => pc.offset(REACH),
        };
        let most = prologue::MAX_CODE as u64 * INSTRUCTION;
        let length = end.0.saturating_sub(start.0).min(most) as usize;
        let code = self.kernel().memory().bytes_up_to(start, length);
        let words = code.chunks_exact(4).filter_map(|word| bytes::u32_at(word, 0));
        Some(Function { start, code: words.collect() })
    }

    /// Whether the instruction before `at` is a call, and of what: `bl` says it, `blr` does not.
    fn call_before(&self, at: VirtAddr) -> Option<Option<VirtAddr>> {
        let word = self.kernel().memory().u32(at.back(4)).ok()?;
        let target = self.kernel().machine().direct_call(&word.to_le_bytes(), at);
        if target.is_some() {
            return Some(target);
        }
        // blr, and blraa and the like
        (word & 0xfeff_f000 == 0xd63f_0000).then_some(None)
    }

    /// The stack on which the firmware's runtime services are called; there is one (6.3 on).
    fn firmware_stack(&self) -> Result<Option<Stack>, Error> {
        let Some(pointer) = self.kernel().symbol("efi_rt_stack_top")? else { return Ok(None) };
        let end = self.kernel().memory().pointer(pointer).reading("the EFI stack's address")?;
        let start = end.back(self.linux.thread_size());
        Ok(Some(Stack { name: "EFI".to_owned(), start, end }).filter(|_| !end.is_null()))
    }

    /// A stack whose lowest address is in a per-CPU pointer.
    fn pointed(&self, symbol: &str, cpu: u32, name: &str) -> Result<Option<Stack>, Error> {
        let Some(at) = self.per_cpu(symbol, cpu)? else { return Ok(None) };
        let start = self.kernel().memory().pointer(at).reading("a stack's address")?;
        let end = start.offset(self.linux.thread_size());
        Ok(Some(Stack { name: name.to_owned(), start, end }).filter(|_| !start.is_null()))
    }

    /// The stack for a stack that overflowed, in the per-CPU area itself.
    fn overflow_stack(&self, cpu: u32) -> Result<Option<Stack>, Error> {
        const SIZE: u64 = 4096;
        let stack =
            |start: VirtAddr| Stack { name: "overflow".to_owned(), start, end: start.offset(SIZE) };
        Ok(self.per_cpu("overflow_stack", cpu)?.map(stack))
    }

    fn per_cpu(&self, symbol: &str, cpu: u32) -> Result<Option<VirtAddr>, Error> {
        let Some(symbol) = self.kernel().symbol(symbol)? else { return Ok(None) };
        Ok(self.linux.percpu()?.address(symbol, cpu))
    }
}

/// A function of the kernel.
struct Function {
    start: VirtAddr,
    code: Vec<u32>,
}

impl Unwinder for Arm64Unwinder<'_, '_> {
    /// arch/arm64/include/asm/stacktrace.h, 6.12: IRQ, SDEI and EFI stacks are as large as a task's, the
    /// overflow stack has 4 KiB in the per-CPU area itself.
    fn cpu_stacks(&self, cpu: u32) -> Stacks {
        let found = [
            self.pointed("irq_stack_ptr", cpu, "IRQ"),
            self.pointed("sdei_stack_normal_ptr", cpu, "SDEI normal"),
            self.pointed("sdei_stack_critical_ptr", cpu, "SDEI critical"),
            self.overflow_stack(cpu),
            self.firmware_stack(),
        ];
        let all = found.iter().all(Result::is_ok) && self.kernel().is_whole();
        Stacks { list: found.into_iter().flatten().flatten().collect(), all }
    }

    fn code_address(&self, word: u64) -> VirtAddr {
        self.unsigned(word)
    }

    fn follows_a_call(&self, at: VirtAddr) -> bool {
        self.call_before(at).is_some()
    }

    /// By the record that the entry code puts into struct pt_regs, which tells them for certain. The
    /// registers of user mode are at the very end of a task's stack (kernel_entry in entry.S).
    fn exception_frames(&self, stack: &Stack) -> Vec<ExceptionFrame> {
        let size = self.layout.size;
        let last = stack.end.back(size);
        let bases = (stack.start.0..last.0).step_by(8).map(VirtAddr);
        let mut found: Vec<_> = bases.filter_map(|base| self.exception_frame_at(base)).collect();
        let entered = self.registers_in(last).ok().filter(Arm64Registers::user);
        found.extend(entered.map(|registers| registers.exception_frame(last)));
        found
    }

    fn unwind(&self, start: Start<'_>, stacks: &Stacks) -> Trace {
        match self.begin(start) {
            Ok(Step::To(first, _)) => self.follow(first, stacks),
            Ok(Step::End(end)) => Trace { frames: Vec::new(), end },
            Err(why) => Trace { frames: Vec::new(), end: End::Stuck(why) },
        }
    }
}

impl Arm64Unwinder<'_, '_> {
    fn follow(&self, first: State, stacks: &Stacks) -> Trace {
        let mut frames = Vec::new();
        let mut state = first;
        let mut exception = None;
        let mut climb = Climb::new(stacks);
        loop {
            let mut frame = Frame {
                pc: state.pc,
                kind: state.kind,
                at: state.at,
                exception: exception.take(),
                registers: state.known(),
                caller: CallerBy::Tables,
            };
            let step = self.step(&state, &mut frame);
            // The caller in x30 takes nothing from the stack.
            let climbs = frame.caller != CallerBy::LinkRegister;
            frames.push(frame);
            let (next, from) = match step {
                Ok(Step::To(next, from)) => (next, from),
                Ok(Step::End(end)) => return Trace { frames, end },
                Err(why) => return Trace { frames, end: End::Stuck(why) },
            };
            let why = if frames.len() >= MAX_FRAMES {
                Some("there are more frames than a stack can hold".to_owned())
            } else {
                let objection = climbs.then(|| climb.objection(state.used, next.used)).flatten();
                objection.or_else(|| self.no_text(&next))
            };
            if let Some(why) = why {
                return Trace { frames, end: End::Stuck(why) };
            }
            (state, exception) = (next, from);
        }
    }

    /// Whether a return address may lead to code. BPF programs and trampolines have no symbols, but keep
    /// frame records.
    fn is_code(&self, pc: VirtAddr) -> bool {
        let mapped = || self.kernel().memory().translate(pc).is_ok();
        self.linux.place(pc.back(1)).is_some() || mapped()
    }

    /// What speaks against the address of `next`.
    fn no_text(&self, next: &State) -> Option<String> {
        if next.kind == FrameKind::ReturnAddress && !self.is_code(next.pc) {
            return Some(format!("{:#x} is not an address of the kernel's text", next.pc));
        }
        None
    }
}
