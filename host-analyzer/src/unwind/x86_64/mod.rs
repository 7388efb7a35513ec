//! x86_64 stacks, by ORC.
//!
//! The rules are those of arch/x86/kernel/unwind_orc.c, 6.1 and 6.12; the layout of saved
//! registers that of struct pt_regs (arch/x86/include/asm/ptrace.h).

mod registers;

use std::cell::{OnceCell, RefCell};
use std::collections::HashMap;

use crate::kernel::Kernel;
use crate::kernel::types::Types;
use crate::linux::Linux;
use crate::linux::stacks::{Stack, Stacks};
use crate::{Error, ReadContext, ReadError, VirtAddr, bytes};

use super::orc::{self, Base, Entry, Found, Kind, Table, Version};
use super::{
    CallerBy, Climb, End, ExceptionFrame, Frame, FrameKind, MAX_FRAMES, Registers, Start, Trace,
    Unwinder,
};
use registers::{HARDWARE_FRAME, NUMBER_BP, NUMBER_SP, PT_REGS, plausible, reg};

pub use registers::X86Registers;

/// IRQ_STACK_SIZE (arch/x86/include/asm/page_64_types.h, 6.1), without KASAN.
const IRQ_STACK_SIZE: u64 = 16 << 10;
/// The exception stacks of struct cea_exception_stacks (arch/x86/include/asm/cpu_entry_area.h).
const EXCEPTION_STACKS: [&str; 5] = ["DF", "NMI", "DB", "MCE", "VC"];

/// Unwinds by the ORC tables of the kernel and its modules.
pub struct X86Unwinder<'k, 'd> {
    linux: &'k Linux<'k, 'd>,
    image: OnceCell<Tables<'d>>,
    modules: RefCell<HashMap<VirtAddr, Tables<'d>>>,
}

/// The unwind tables of the kernel's image or of a module.
enum Tables<'d> {
    /// They are here.
    Table(Table<'d>),
    /// There are none.
    None,
    /// There may be some, but not in the dump.
    Lost,
}

/// Where the unwinder stands.
#[derive(Clone, Debug)]
struct State {
    pc: VirtAddr,
    kind: FrameKind,
    sp: VirtAddr,
    bp: Option<u64>,
    /// All registers, right after an exception frame.
    registers: Option<Box<X86Registers>>,
    /// What a task saved when it stopped running.
    saved: Option<Box<Registers>>,
}

impl State {
    fn new(pc: VirtAddr, kind: FrameKind, sp: VirtAddr, bp: Option<u64>) -> State {
        State { pc, kind, sp, bp, registers: None, saved: None }
    }

    /// What is known of the registers.
    fn known(&self) -> Registers {
        let mut known = match (&self.registers, &self.saved) {
            (Some(all), _) => all.numbered(),
            (None, saved) => saved.as_deref().copied().unwrap_or_default(),
        };
        known.set(NUMBER_SP, self.sp.0);
        if let Some(bp) = self.bp {
            known.set(NUMBER_BP, bp);
        }
        known
    }
}

/// What a step came to.
enum Step {
    To(State, Option<ExceptionFrame>),
    End(End),
}

impl<'k, 'd> X86Unwinder<'k, 'd> {
    /// An unwinder for the stacks of a kernel.
    #[must_use]
    pub fn new(linux: &'k Linux<'k, 'd>) -> X86Unwinder<'k, 'd> {
        X86Unwinder { linux, image: OnceCell::new(), modules: RefCell::default() }
    }

    fn kernel(&self) -> &'k Kernel<'d> {
        self.linux.kernel()
    }

    /// The rule for a frame, and how far it can be trusted; an error when it may be in what the dump
    /// lacks.
    fn rule(&self, state: &State, lookup: VirtAddr) -> Result<(Entry, CallerBy), String> {
        if state.pc.is_null() {
            return Ok((orc::BAD_CALL, CallerBy::Tables));
        }
        let lost = || format!("the unwind tables for {lookup:#x} are not in the dump");
        let found = match self.kernel().in_image(lookup) {
            true => match self.image.get_or_init(|| self.image_table()) {
                Tables::Table(table) => table.find(lookup),
                Tables::None => Found::Nothing,
                Tables::Lost => Found::Lost,
            },
            false => self.module_rule(lookup),
        };
        match found {
            Found::Entry(entry) => Ok((entry, CallerBy::Tables)),
            Found::Lost => Err(lost()),
            Found::Nothing if state.kind == FrameKind::Registers => {
                let known = self.linux.place(lookup).is_some();
                let rule = if known { orc::FRAME_POINTER } else { orc::BAD_CALL };
                Ok((rule, CallerBy::FramePointer))
            }
            Found::Nothing => Ok((orc::FRAME_POINTER, CallerBy::FramePointer)),
        }
    }

    fn image_table(&self) -> Tables<'d> {
        let kernel = self.kernel();
        let section = |start: &str, stop: &str| {
            let start = kernel.symbol(start).ok()??;
            let stop = kernel.symbol(stop).ok()??;
            let length = usize::try_from(stop.0.checked_sub(start.0)?).ok()?;
            Some((start, kernel.memory().sparse(start, length).ok()?))
        };
        let ips = section("__start_orc_unwind_ip", "__stop_orc_unwind_ip");
        let entries = section("__start_orc_unwind", "__stop_orc_unwind");
        let (Some((place, ips)), Some((_, entries))) = (ips, entries) else {
            // A kernel without such tables has no such symbols, and keeps frame pointers.
            let whole = kernel.symbols().is_ok_and(|symbols| symbols.is_whole());
            return if whole { Tables::None } else { Tables::Lost };
        };
        match Version::detect(kernel.types().ok(), &entries) {
            Some(version) => Tables::Table(Table { place, ips, entries, version }),
            None => Tables::Lost,
        }
    }

    fn module_rule(&self, lookup: VirtAddr) -> Found {
        let modules = self.linux.modules();
        let Some(module) = modules.covering(lookup) else {
            // It may be in one that could not be read.
            return if modules.problems.is_empty() { Found::Nothing } else { Found::Lost };
        };
        let mut tables = self.modules.borrow_mut();
        let table = tables.entry(module.address).or_insert_with(|| {
            let Some(orc) = module.orc else { return Tables::None };
            let memory = self.kernel().memory();
            let count = orc.count as usize;
            let Tables::Table(image) = self.image.get_or_init(|| self.image_table()) else {
                return Tables::Lost;
            };
            let ips = memory.sparse(orc.ips, count * 4);
            let entries = memory.sparse(orc.entries, count * orc::ENTRY);
            let (Ok(ips), Ok(entries)) = (ips, entries) else { return Tables::Lost };
            Tables::Table(Table { place: orc.ips, ips, entries, version: image.version })
        });
        match table {
            Tables::Table(table) => table.find(lookup),
            Tables::None => Found::Nothing,
            Tables::Lost => Found::Lost,
        }
    }

    /// What a task saved when it stopped running: its thread.sp points to a struct
    /// inactive_task_frame (arch/x86/include/asm/switch_to.h): r15 r14 r13 r12 bx bp, return address.
    fn saved(&self, task: VirtAddr) -> Result<State, String> {
        const NUMBERS: [u16; 6] = [15, 14, 13, 12, 3, NUMBER_BP];
        const BP: u64 = 5 * 8;
        const RETURN_ADDRESS: u64 = 6 * 8;
        let lost = |error: ReadError| format!("its saved registers are lost: {error}");
        let memory = self.kernel().memory();
        let member = self.kernel().offset("task_struct", "thread.sp");
        let member = member.map_err(|error| error.to_string())?;
        let sp = memory.pointer(task.offset(member)).map_err(lost)?;
        let pc = memory.pointer(sp.offset(RETURN_ADDRESS)).map_err(lost)?;
        let bp = memory.u64(sp.offset(BP)).map_err(lost)?;
        let word =
            |(index, number): (u64, u16)| Some((number, memory.u64(sp.offset(index * 8)).ok()?));
        let saved = Some(Box::new((0..).zip(NUMBERS).filter_map(word).collect()));
        // A task that never ran "returns" to the very start of ret_from_fork.
        let place = self.linux.place(pc);
        let never_ran = place.is_some_and(|place| place.offset == 0);
        let kind = if never_ran { FrameKind::Registers } else { FrameKind::ReturnAddress };
        let sp = sp.offset(RETURN_ADDRESS + 8);
        Ok(State { pc, kind, sp, bp: Some(bp), registers: None, saved })
    }

    fn begin(&self, start: Start<'_>) -> Result<Step, String> {
        let (pc, kind, sp) = match start {
            Start::Registers(raw) => {
                let registers = X86Registers::parse(raw).ok_or("its registers are cut short")?;
                return Ok(from_exception(registers, registers.get(reg::BP), registers.sp()));
            }
            Start::Task(task) => return Ok(Step::To(self.saved(task)?, None)),
            Start::ReturnAddress(at) => {
                let pc = self.kernel().memory().pointer(at).map_err(|error| error.to_string())?;
                (pc, FrameKind::ReturnAddress, at.offset(8))
            }
            Start::Instruction(pc, sp) => (pc, FrameKind::Registers, sp),
        };
        Ok(Step::To(State::new(pc, kind, sp, None), None))
    }

    fn step(&self, state: &State, frame: &mut Frame) -> Result<Step, String> {
        let (rule, caller) = self.rule(state, frame.lookup_pc())?;
        frame.caller = caller;
        match rule.kind {
            Kind::EndOfStack => return Ok(Step::End(End::KernelThread)),
            Kind::Undefined => {
                let step = self.call_site(state, frame.lookup_pc())?;
                frame.caller = CallerBy::CallSite;
                return Ok(step);
            }
            _ => {}
        }
        let lost = |error: ReadError| format!("its frame cannot be read: {error}");
        let cfa = self.canonical_address(state, rule)?;
        let memory = self.kernel().memory();
        match rule.kind {
            Kind::Registers => {
                let raw = memory.bytes(cfa, PT_REGS * 8).map_err(lost)?;
                let registers = X86Registers::parse(&raw).ok_or("its registers are cut short")?;
                Ok(from_exception(registers, registers.get(reg::BP), cfa))
            }
            Kind::HardwareFrame => {
                let raw = memory.bytes(cfa, (PT_REGS - HARDWARE_FRAME) * 8).map_err(lost)?;
                let registers = X86Registers::parse_hardware_frame(&raw);
                let registers = registers.ok_or("its registers are cut short")?;
                let bp = self.frame_pointer(state, rule, cfa);
                Ok(from_exception(registers, bp, cfa))
            }
            _ => {
                let pc = memory.pointer(cfa.back(8)).map_err(lost)?;
                let bp = self.frame_pointer(state, rule, cfa);
                let kind = FrameKind::ReturnAddress;
                Ok(Step::To(State::new(pc, kind, cfa, bp), None))
            }
        }
    }

    /// The caller of a function that the tables leave out (STACK_FRAME_NON_STANDARD; in 6.1
    /// `__crash_kexec`, where every kdump begins): the first word up the stack that is the return
    /// address of a direct call of this very function.
    fn call_site(&self, state: &State, lookup: VirtAddr) -> Result<Step, String> {
        /// How far up the stack a return address is looked for, in bytes.
        const REACH: usize = 4096;
        let memory = self.kernel().memory();
        let nothing = || format!("the unwind tables say nothing about {:#x}", state.pc);
        let place = self.linux.place(lookup).ok_or_else(nothing)?;
        let function = lookup.back(place.offset);
        let stack = memory.bytes_up_to(state.sp, REACH);
        let words = stack.chunks_exact(8).filter_map(|word| bytes::u64_at(word, 0));
        for (index, word) in words.enumerate() {
            match self.follows_call_of(VirtAddr(word), function) {
                Ok(false) => {}
                Ok(true) => {
                    let sp = state.sp.offset(index as u64 * 8 + 8);
                    let (pc, kind) = (VirtAddr(word), FrameKind::ReturnAddress);
                    return Ok(Step::To(State::new(pc, kind, sp, state.bp), None));
                }
                Err(error) => {
                    return Err(format!("whether {word:#x} called it cannot be told: {error}"));
                }
            }
        }
        let end = state.sp.offset(stack.len() as u64);
        match memory.u64(end) {
            Err(error) if stack.len() < REACH && error.is_lost() => Err(format!(
                "{}, and the stack that would tell who called it is lost: {error}",
                nothing()
            )),
            _ => Err(nothing()),
        }
    }

    /// Whether the instruction before `at` is `call function`.
    fn follows_call_of(&self, at: VirtAddr, function: VirtAddr) -> Result<bool, ReadError> {
        let kernel = self.kernel();
        // Text comes first in the image; what lies behind it is not called from.
        let inside = at.0 >> 63 == 1 && kernel.in_image(at.back(1)) && kernel.may_be_text(at);
        if !inside {
            return Ok(false);
        }
        let machine = kernel.machine();
        let size = machine.direct_call_size();
        match kernel.memory().bytes(at.back(size), size as usize) {
            Err(error) if error.is_lost() => Err(error),
            Err(_) => Ok(false),
            Ok(call) => Ok(machine.direct_call(&call, at) == Some(function)),
        }
    }

    fn canonical_address(&self, state: &State, rule: Entry) -> Result<VirtAddr, String> {
        let register = |index: usize, name: &str| {
            let value = state.registers.as_ref().and_then(|registers| registers.get(index));
            value.ok_or_else(|| format!("its frame starts from {name}, whose value is not known"))
        };
        let bp = || state.bp.ok_or("its frame starts from rbp, whose value is not known");
        let offset = i64::from(rule.sp_offset) as u64;
        let load = |at: u64| {
            let word = self.kernel().memory().u64(VirtAddr(at));
            word.map_err(|error| format!("its caller's stack pointer cannot be read: {error}"))
        };
        let address = match rule.sp {
            Base::Sp => state.sp.0.wrapping_add(offset),
            Base::Bp => bp()?.wrapping_add(offset),
            Base::SpIndirect => load(state.sp.0)?.wrapping_add(offset),
            Base::BpIndirect => load(bp()?.wrapping_add(offset))?,
            // For these the offset is not used (unwind_orc.c).
            Base::R10 => register(reg::R10, "r10")?,
            Base::R13 => register(reg::R13, "r13")?,
            Base::Di => register(reg::DI, "rdi")?,
            Base::Dx => register(reg::DX, "rdx")?,
            Base::Undefined | Base::PreviousSp => {
                return Err(format!("the unwind rule for {:#x} is impossible", state.pc));
            }
        };
        if address % 8 != 0 {
            return Err(format!("its frame would be at {address:#x}, which is not aligned"));
        }
        Ok(VirtAddr(address))
    }

    fn frame_pointer(&self, state: &State, rule: Entry, cfa: VirtAddr) -> Option<u64> {
        let offset = i64::from(rule.bp_offset) as u64;
        let memory = self.kernel().memory();
        match rule.bp {
            Base::PreviousSp => memory.u64(cfa.offset(offset)).ok(),
            Base::Bp => memory.u64(VirtAddr(state.bp?.wrapping_add(offset))).ok(),
            _ => state.bp,
        }
    }
}

fn from_exception(registers: X86Registers, bp: Option<u64>, at: VirtAddr) -> Step {
    let frame = registers.exception_frame(at);
    if registers.user() {
        return Step::End(End::UserMode(frame));
    }
    let (pc, sp, kind) = (registers.pc(), registers.sp(), FrameKind::Registers);
    let registers = Some(Box::new(registers));
    Step::To(State { registers, ..State::new(pc, kind, sp, bp) }, Some(frame))
}

impl Unwinder for X86Unwinder<'_, '_> {
    fn code_address(&self, word: u64) -> VirtAddr {
        VirtAddr(word)
    }

    /// `call` with a displacement (e8), or through a register or memory (ff /2), in all its lengths
    /// (Intel SDM volume 2A, CALL).
    fn follows_a_call(&self, at: VirtAddr) -> bool {
        const LONGEST: usize = 7;
        let Ok(code) = self.kernel().memory().bytes(at.back(LONGEST as u64), LONGEST) else {
            return false;
        };
        let indirect = |length: usize| {
            let code = &code[LONGEST - length..];
            let (opcode, form) = if code[0] & 0xf0 == 0x40 { (1, 2) } else { (0, 1) };
            code.get(opcode) == Some(&0xff) && code.get(form).is_some_and(|it| it >> 3 & 7 == 2)
        };
        code[LONGEST - 5] == 0xe8 || [2, 3, 4, 6, 7].into_iter().any(indirect)
    }

    fn exception_frames(&self, stack: &Stack) -> Vec<ExceptionFrame> {
        let bytes = self.kernel().memory().bytes_up_to(stack.start, stack.size());
        let is_text = |at: VirtAddr| self.linux.code(at).is_some();
        let one = |(index, raw): (usize, &[u8])| {
            let registers = X86Registers::parse(raw)?;
            let at = stack.start.offset(index as u64 * 8);
            plausible(&registers, is_text).then(|| registers.exception_frame(at))
        };
        bytes.windows(PT_REGS * 8).step_by(8).enumerate().filter_map(one).collect()
    }

    fn cpu_stacks(&self, cpu: u32) -> Stacks {
        let (irq, exceptions) = (self.irq_stack(cpu), self.exception_stacks(cpu));
        let all = irq.is_ok() && exceptions.is_ok() && self.kernel().is_whole();
        let mut list: Vec<Stack> = irq.ok().flatten().into_iter().collect();
        list.extend(exceptions.unwrap_or_default());
        Stacks { list, all }
    }

    fn unwind(&self, start: Start<'_>, stacks: &Stacks) -> Trace {
        match self.begin(start) {
            Ok(Step::To(first, _)) => self.follow(first, stacks),
            Ok(Step::End(end)) => Trace { frames: Vec::new(), end },
            Err(why) => Trace { frames: Vec::new(), end: End::Stuck(why) },
        }
    }
}

impl X86Unwinder<'_, '_> {
    /// The stack of hard interrupts: `hardirq_stack_ptr`, from 6.2 to 6.14 in `pcpu_hot`.
    fn irq_stack(&self, cpu: u32) -> Result<Option<Stack>, Error> {
        let symbol = match self.kernel().symbol("hardirq_stack_ptr")? {
            Some(at) => at,
            None => {
                let Some(hot) = self.kernel().symbol("pcpu_hot")? else { return Ok(None) };
                hot.offset(self.kernel().offset("pcpu_hot", "hardirq_stack_ptr")?)
            }
        };
        let Some(at) = self.linux.percpu()?.address(symbol, cpu) else { return Ok(None) };
        let top = self.kernel().memory().pointer(at).reading("the IRQ stack's address")?;
        Ok(Some(top).filter(|top| !top.is_null()).map(|top| {
            // The pointer is the top itself or the last word below it (5.13 on).
            let end = VirtAddr(top.0.saturating_add(8) & !0xfff);
            Stack { name: "IRQ".to_owned(), start: end.back(IRQ_STACK_SIZE), end }
        }))
    }

    fn exception_stacks(&self, cpu: u32) -> Result<Vec<Stack>, Error> {
        let Some(symbol) = self.kernel().symbol("cea_exception_stacks")? else {
            return Ok(Vec::new());
        };
        let Some(at) = self.linux.percpu()?.address(symbol, cpu) else { return Ok(Vec::new()) };
        let base = self.kernel().memory().pointer(at).reading("the exception stacks' address")?;
        if base.is_null() {
            return Ok(Vec::new());
        }
        let types = self.kernel().types()?;
        let stack = |name: &str| {
            let field = types.member("cea_exception_stacks", &format!("{name}_stack"))?;
            let start = base.offset(field.offset as u64);
            let end = start.offset(types.size_of(field.kind)? as u64);
            Some(Stack { name: format!("{name} exception"), start, end })
        };
        Ok(EXCEPTION_STACKS.into_iter().filter_map(stack).collect())
    }

    fn follow(&self, first: State, stacks: &Stacks) -> Trace {
        let mut frames = Vec::new();
        let mut state = first;
        let mut exception = None;
        let mut climb = Climb::new(stacks);
        loop {
            let mut frame = frame_of(&state, exception.take());
            let step = self.step(&state, &mut frame);
            let blind =
                frame.caller != CallerBy::Tables && self.linux.place(frame.lookup_pc()).is_none();
            frames.push(frame);
            let (next, from) = match step {
                Ok(Step::To(next, from)) => (next, from),
                Ok(Step::End(end)) => return Trace { frames, end },
                Err(why) => return Trace { frames, end: End::Stuck(why) },
            };
            let limit = frames.len() >= MAX_FRAMES;
            let why = if limit {
                Some("there are more frames than a stack can hold".to_owned())
            } else {
                climb.objection(state.sp, next.sp).or_else(|| self.no_text(&next, blind))
            };
            if let Some(why) = why {
                return Trace { frames, end: End::Stuck(why) };
            }
            (state, exception) = (next, from);
        }
    }

    /// What speaks against the address of `next`.
    fn no_text(&self, next: &State, blind: bool) -> Option<String> {
        let known = self.linux.place(next.pc.back(1)).is_some();
        if next.kind == FrameKind::ReturnAddress && !known {
            // BPF programs and trampolines have no symbols: one such frame is let through.
            let mapped = self.kernel().memory().translate(next.pc).is_ok();
            if blind || !mapped {
                return Some(format!("{:#x} is not an address of the kernel's text", next.pc));
            }
        }
        None
    }
}

fn frame_of(state: &State, exception: Option<ExceptionFrame>) -> Frame {
    let at = match state.kind {
        FrameKind::Registers => state.sp,
        FrameKind::ReturnAddress => state.sp.back(8),
    };
    let registers = state.known();
    Frame { pc: state.pc, kind: state.kind, at, exception, registers, caller: CallerBy::Tables }
}
