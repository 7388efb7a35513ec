//! From a stack to its frames.
//!
//! [`Unwinder`] is what an architecture gives; frames, exception frames and the reason for the end
//! are the same for all of them.

mod aarch64;
pub mod arguments;
pub mod orc;
pub mod prologue;
#[cfg(test)]
mod tests;
pub mod views;
mod x86_64;

use crate::VirtAddr;
use crate::kernel::machine::Machine;
pub use crate::kernel::registers::Registers;
use crate::linux::Linux;
use crate::linux::stacks::{Stack, Stacks};

pub use aarch64::{Arm64Registers, Arm64Unwinder};
pub use x86_64::{X86Registers, X86Unwinder};

/// A register and its value.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Register {
    /// Its name, as crash prints it.
    pub name: &'static str,
    /// Its value.
    pub value: u64,
    /// How many hexadecimal digits it is printed with.
    pub digits: usize,
}

/// The registers that an exception, an interrupt or a system call saved on the stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ExceptionFrame {
    /// Where it lies.
    pub at: VirtAddr,
    /// Whether it interrupted user mode.
    pub user: bool,
    /// The registers, in the order in which they are printed.
    pub registers: Vec<Register>,
}

/// How a frame's program counter is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum FrameKind {
    /// It is a register: the instruction itself.
    Registers,
    /// It is a return address: the instruction after the call.
    ReturnAddress,
}

/// How the way from a frame to its caller was found.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum CallerBy {
    /// By the unwind tables, or by frame records where the architecture demands them (or there was
    /// no way, or no caller).
    Tables,
    /// The tables leave this function out; the next word up the stack that follows a call of this
    /// very function was taken.
    CallSite,
    /// There are no tables for this code; it was taken to keep a frame pointer.
    FramePointer,
    /// The next word up the stack that follows a call was taken: it may be left over from before.
    Scan,
    /// It was interrupted while it had no frame record of its own (a leaf function, or one at its
    /// very start or end): the caller is in the link register.
    LinkRegister,
    /// By frame records; but whether it had one of its own when it was interrupted could not be
    /// told, and if it had none, its caller is not among the frames.
    Uncertain,
}

/// One frame of a stack.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The program counter.
    pub pc: VirtAddr,
    /// How it is known.
    pub kind: FrameKind,
    /// Where on the stack: the return address's slot, or the stack pointer with registers.
    pub at: VirtAddr,
    /// The exception frame that this frame's registers come from, if they do.
    pub exception: Option<ExceptionFrame>,
    /// What is known of its registers without debug information: all of them with [`FrameKind::Registers`],
    /// else the stack or frame pointer, and what a task saved when it stopped running.
    pub registers: Registers,
    /// How the way to its caller was found.
    pub caller: CallerBy,
}

impl Frame {
    /// The address to look symbols, lines and unwind rules up with: a return address may already
    /// belong to the next function when the call was the last instruction of its own.
    #[must_use]
    pub fn lookup_pc(&self) -> VirtAddr {
        match self.kind {
            FrameKind::Registers => self.pc,
            FrameKind::ReturnAddress => self.pc.back(1),
        }
    }
}

/// Why the frames ended.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum End {
    /// At the registers with which the kernel was entered.
    UserMode(ExceptionFrame),
    /// At the first function of a kernel thread.
    KernelThread,
    /// They could not be followed further; the text says why.
    Stuck(String),
}

/// The frames of a stack, innermost first.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Trace {
    /// The frames.
    pub frames: Vec<Frame>,
    /// Why they ended.
    pub end: End,
}

/// More frames than fit on any kernel stack, were each only a return address.
pub const MAX_FRAMES: usize = 4096;

/// Where an unwind begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Start<'a> {
    /// From the registers of a CPU, as the notes of the dump have them.
    Registers(&'a [u8]),
    /// From what the task at this address (struct task_struct) saved when it stopped running.
    Task(VirtAddr),
    /// From the return address that lies at this place on a stack.
    ReturnAddress(VirtAddr),
    /// From an instruction with this stack pointer (arm64: this frame pointer); nothing else is known.
    Instruction(VirtAddr, VirtAddr),
}

/// What an architecture knows of stacks.
///
/// Frames come innermost first, each function that was interrupted with the registers that the
/// exception saved. A trace always ends: every step climbs a stack or changes to one that was not
/// left before, and there are at most [`MAX_FRAMES`].
pub trait Unwinder {
    /// The stacks of a CPU, besides those of tasks. Those that cannot be found are left out.
    fn cpu_stacks(&self, cpu: u32) -> Stacks;

    /// Follows a stack from `start`. `stacks` are those that it may run on.
    fn unwind(&self, start: Start<'_>, stacks: &Stacks) -> Trace;

    /// The address of code that a word of a stack may be.
    fn code_address(&self, word: u64) -> VirtAddr;

    /// Whether the instruction before `at` is a call.
    fn follows_a_call(&self, at: VirtAddr) -> bool;

    /// What on a stack looks like registers that an exception, an interrupt or a system call saved,
    /// whether or not it is still in use.
    fn exception_frames(&self, stack: &Stack) -> Vec<ExceptionFrame>;
}

/// The unwinder for the kernel's architecture.
#[must_use]
pub fn for_kernel<'k>(linux: &'k Linux<'k, '_>) -> Box<dyn Unwinder + 'k> {
    match linux.kernel().machine() {
        Machine::X86_64 => Box::new(X86Unwinder::new(linux)),
        Machine::Aarch64 => Box::new(Arm64Unwinder::new(linux)),
    }
}

/// Sees to it that an unwind climbs.
struct Climb<'s> {
    stacks: &'s Stacks,
    /// The places that it was on, in turn.
    visited: Vec<Place>,
}

/// A stretch of memory that an unwind climbs in.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    /// A stack, by its number in the list.
    Stack(usize),
    /// Memory that is on no stack of the list: a block of it, by its number.
    Block(u64),
}

impl<'s> Climb<'s> {
    /// No stack is smaller (THREAD_SIZE of both architectures with pages of 4 KiB) but those of single
    /// exceptions; one that is larger, or lies across blocks, is climbed from one block to the next.
    const BLOCK: u64 = 16 << 10;

    fn new(stacks: &'s Stacks) -> Climb<'s> {
        Climb { stacks, visited: Vec::new() }
    }

    fn place(&self, at: VirtAddr) -> Place {
        let listed = self.stacks.list.iter().position(|stack| stack.holds(at));
        listed.map_or(Place::Block(at.0 / Climb::BLOCK), Place::Stack)
    }

    /// What speaks against a step from the address `here` to `there`.
    fn objection(&mut self, here: VirtAddr, there: VirtAddr) -> Option<String> {
        let (from, to) = (self.place(here), self.place(there));
        if self.visited.last() != Some(&from) {
            self.visited.push(from);
        }
        if from == to && there <= here {
            return Some(format!("the next frame ({there:#x}) would not be further up"));
        }
        if self.stacks.all && matches!(to, Place::Block(_)) {
            return Some(format!("the next frame ({there:#x}) is on no stack of this CPU"));
        }
        if from != to && self.visited.contains(&to) {
            return Some(format!("the next frame ({there:#x}) is on a stack already left"));
        }
        None
    }
}
