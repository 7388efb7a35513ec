//! Frames as debug information sees them: with the registers that their callees gave back.

use crate::kernel::Kernel;
use crate::kernel::dwarf::{Caller, View};

use super::{Frame, FrameKind, Unwinder};

/// The frames of a stack, innermost first, each with what is known of its registers: by what the unwinder
/// knows, and by call frame information from the frames below it. That is believed as long as it leads where
/// the unwinder was led. None without debug information.
#[must_use]
pub fn views(kernel: &Kernel<'_>, unwinder: &dyn Unwinder, frames: &[Frame]) -> Vec<View> {
    let Some(debug) = kernel.debug_info() else { return Vec::new() };
    let (machine, memory) = (kernel.machine(), kernel.memory());
    let mut views: Vec<View> = Vec::with_capacity(frames.len());
    let mut given_back = None;
    for (index, frame) in frames.iter().enumerate() {
        let known = match given_back.take() {
            Some(registers) => frame.registers.or(&registers),
            None => frame.registers,
        };
        let caller = debug.caller(machine, memory, frame.lookup_pc(), &known);
        let next = frames.get(index + 1).filter(|next| next.exception.is_none());
        let fits = caller.zip(next).is_some_and(|(caller, next)| leads_to(unwinder, &caller, next));
        // Without a frame above it nothing speaks against it.
        let cfa = caller.filter(|_| fits || next.is_none()).map(|caller| caller.cfa);
        given_back = caller.filter(|_| fits).map(|caller| caller.registers);
        views.push(View {
            pc: frame.pc,
            lookup: frame.lookup_pc(),
            registers: known,
            cfa,
            has_caller: fits,
        });
    }
    views
}

/// Whether call frame information and the unwinder agree on the caller.
fn leads_to(unwinder: &dyn Unwinder, caller: &Caller, next: &Frame) -> bool {
    if next.kind != FrameKind::ReturnAddress {
        return false;
    }
    match (caller.slot, caller.link) {
        (Some(slot), _) => slot == next.at,
        // In a register, perhaps signed.
        (None, Some(link)) => unwinder.code_address(link) == next.pc,
        (None, None) => false,
    }
}
