//! Unwinding in kernels made of a few pages: what the architectures' tests share.

mod aarch64;
mod x86_64;

use super::*;
use crate::testing::{
    EM_AARCH64, EM_X86_64, FakeMemory, btf, put_symbols, symbol_lines, with_kernel,
};

/// Runs the unwinder of a kernel of this machine, whose memory begins at physical address 0.
fn with_unwinder(
    memory: &FakeMemory,
    machine: u16,
    info: &str,
    run: impl FnOnce(&dyn Unwinder) -> Trace,
) -> Trace {
    with_kernel(memory, machine, info, |kernel| run(for_kernel(&Linux::new(kernel)).as_ref()))
}

fn pcs(trace: &Trace) -> Vec<u64> {
    trace.frames.iter().map(|frame| frame.pc.0).collect()
}

fn why(trace: &Trace) -> &str {
    let End::Stuck(why) = &trace.end else { panic!("{:?}", trace.end) };
    why
}
