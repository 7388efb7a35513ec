//! From the registers of a CPU to the functions that it was in.

use core::fmt;

use super::kernel::Kernel;

/// Most frames of a trace: more than fit on any kernel stack, were each only a return address.
const MAX_FRAMES: usize = 4096;

/// How a frame's program counter is known.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// It is a register: the instruction itself, at which the function was interrupted.
    Registers,
    /// It is a return address: the instruction after the call.
    ReturnAddress,
    /// As before, but from arm64's x30: the function that was interrupted had not saved it yet. The
    /// kernel's own trace leaves such callers out.
    LinkRegister,
}

/// One frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The program counter.
    pub pc: u64,
    /// How it is known.
    pub kind: Kind,
}

impl Frame {
    /// The address to look names and rules up with: a return address may already belong to the next
    /// function when the call was the last instruction of its own.
    pub fn lookup(&self) -> u64 {
        match self.kind {
            Kind::Registers => self.pc,
            Kind::ReturnAddress | Kind::LinkRegister => self.pc.wrapping_sub(1),
        }
    }
}

/// Why the frames ended.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum End {
    /// At the registers with which the kernel was entered from user mode.
    UserMode,
    /// At the first function of a kernel thread.
    KernelThread,
    /// The registers are cut short.
    NoRegisters,
    /// No unwind tables were found (x86_64).
    NoTables,
    /// The tables say nothing about a function.
    NoRule,
    /// The value of a register or a word of the stack is not known.
    Unknown,
    /// The next frame would not be further up the stack.
    NotFurther,
    /// The next address is none of the kernel's text.
    NoText(u64),
    /// There are more frames than a stack can hold.
    TooMany,
}

impl fmt::Display for End {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            End::UserMode => "entered from user mode",
            End::KernelThread => "end of the stack",
            End::NoRegisters => "stopped: its registers are cut short",
            End::NoTables => "stopped: the kernel's unwind tables were not found",
            End::NoRule => "stopped: the unwind tables say nothing about this function",
            End::Unknown => "stopped: the next frame cannot be read",
            End::NotFurther => "stopped: the next frame would not be further up",
            End::NoText(at) => return write!(f, "stopped: {at:#018x} is not in the kernel's text"),
            End::TooMany => "stopped: more frames than a stack can hold",
        })
    }
}

/// Where to go from a frame.
pub enum Step<State> {
    /// To its caller.
    To(State),
    /// Nowhere.
    End(End),
}

/// What an architecture knows of its stacks.
pub trait Unwinder: Sized {
    /// Begins at the registers of a CPU, as its note has them.
    ///
    /// # Errors
    /// The reason why there is not even one frame.
    fn begin(registers: &[u8]) -> Result<Self, End>;

    /// The frame where it stands.
    fn frame(&self) -> Frame;

    /// The way to the caller.
    fn step(&self, kernel: &mut Kernel<'_>) -> Step<Self>;
}

/// Calls `each` with the frames of a stack, innermost first, and says why they ended.
pub fn unwind<U: Unwinder>(
    kernel: &mut Kernel<'_>,
    registers: &[u8],
    each: &mut dyn FnMut(Frame),
) -> End {
    let mut state = match U::begin(registers) {
        Ok(state) => state,
        Err(end) => return end,
    };
    for _ in 0..MAX_FRAMES {
        each(state.frame());
        let next = match state.step(kernel) {
            Step::To(next) => next,
            Step::End(end) => return end,
        };
        let frame = next.frame();
        // BPF programs and trampolines are not in the symbol table, but there is memory.
        let plausible = frame.kind == Kind::Registers
            || kernel.code(frame.lookup()).is_some()
            || kernel.memory.has(frame.pc);
        if !plausible {
            return End::NoText(frame.pc);
        }
        state = next;
    }
    End::TooMany
}
