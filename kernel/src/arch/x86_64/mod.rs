//! x86_64, entered through the 64-bit boot protocol.

pub mod clock;
pub mod console;
pub mod entry;
pub mod paging;
pub mod pci;
pub mod ports;
pub mod reset;
pub mod trap;

use core::sync::atomic::{Ordering, fence};

use capture::architecture::Architecture;

/// The architecture of the kernels that load this payload.
pub const KERNEL: Architecture = Architecture::X86_64;

/// The architecture's name.
pub const NAME: &str = "x86_64";

/// Keeps accesses before and after it in their order, as devices see them.
pub fn dma_barrier() {
    fence(Ordering::SeqCst);
}
