//! The frames of a stack that are shown: the innermost and, of a stack that overflowed, the outermost.

use heapless::Vec;

use crate::architecture::Architecture;

use super::kernel::Kernel;
use super::unwind::{End, Frame, unwind};
use super::unwind_aarch64::Arm64Unwinder;
use super::unwind_x86_64::X86Unwinder;

/// Innermost frames that are kept, and outermost ones beyond these.
const FIRST: usize = 48;
const LAST: usize = 16;

/// A trace.
pub struct Trace {
    first: Vec<Frame, FIRST>,
    /// The newest takes the place of the oldest.
    last: Vec<Frame, LAST>,
    /// Frames that came after the first ones.
    further: usize,
    /// Why the frames ended.
    pub end: End,
}

impl Trace {
    /// Unwinds the stack of a CPU.
    pub fn of(kernel: &mut Kernel<'_>, architecture: Architecture, registers: &[u8]) -> Trace {
        let end = End::NoRegisters;
        let mut trace = Trace { first: Vec::new(), last: Vec::new(), further: 0, end };
        let keep = &mut |frame| trace.keep(frame);
        trace.end = match architecture {
            Architecture::X86_64 => unwind::<X86Unwinder>(kernel, registers, keep),
            Architecture::Aarch64 => unwind::<Arm64Unwinder>(kernel, registers, keep),
        };
        trace
    }

    fn keep(&mut self, frame: Frame) {
        if self.first.push(frame).is_ok() {
            return;
        }
        if self.last.push(frame).is_err()
            && let Some(slot) = self.last.get_mut(self.further % LAST)
        {
            *slot = frame;
        }
        self.further += 1;
    }

    /// The innermost frames.
    pub fn first(&self) -> &[Frame] {
        &self.first
    }

    /// How many frames follow them that are not kept.
    pub fn left_out(&self) -> usize {
        self.further - self.last.len()
    }

    /// The outermost frames behind those.
    pub fn last(&self) -> impl Iterator<Item = Frame> {
        // As long as there is room, all of them are before that, in their order.
        let (newer, older) = self.last.split_at(self.further % LAST);
        older.iter().chain(newer).copied()
    }
}

#[cfg(test)]
mod tests {
    use super::super::unwind::Kind;
    use super::*;

    fn shown(frames: u64) -> (std::vec::Vec<u64>, usize) {
        let end = End::UserMode;
        let mut trace = Trace { first: Vec::new(), last: Vec::new(), further: 0, end };
        (0..frames).for_each(|pc| trace.keep(Frame { pc, kind: Kind::ReturnAddress }));
        let all = trace.first().iter().copied().chain(trace.last());
        (all.map(|frame| frame.pc).collect(), trace.left_out())
    }

    #[test]
    fn what_is_not_too_much_is_kept_whole() {
        for frames in [0, 1, 48, 49, 64] {
            assert_eq!(shown(frames), ((0..frames).collect(), 0));
        }
    }

    #[test]
    fn of_a_long_trace_both_ends_are_kept() {
        for frames in [65, 70, 80, 1000] {
            let expected = (0..48).chain(frames - 16..frames).collect();
            assert_eq!(shown(frames), (expected, frames as usize - 64));
        }
    }
}
