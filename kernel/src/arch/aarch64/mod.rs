//! aarch64, entered through the arm64 boot protocol at EL1 or EL2.

pub mod clock;
pub mod console;
pub mod entry;
pub mod paging;
pub mod pci;
pub mod ports;
pub mod reset;
pub mod trap;

use aarch64_cpu::asm::barrier;
use capture::architecture::Architecture;

/// The architecture of the kernels that load this payload.
pub const KERNEL: Architecture = Architecture::Aarch64;

/// The architecture's name.
pub const NAME: &str = "aarch64";

/// Keeps accesses before and after it in their order, as devices see them: they are in the outer
/// shareable domain, further away than the compiler's own fence reaches.
pub fn dma_barrier() {
    barrier::dmb(barrier::OSH);
}
