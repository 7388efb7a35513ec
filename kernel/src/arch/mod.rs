//! What the payload needs of an architecture. Each architecture is a module with the same files:
//!
//! | file | gives |
//! |---|---|
//! | `entry.rs`, `entry.s` | the first instructions, up to the call of [`crate::main`] with a [`crate::boot::BootInfo`]; [`entry::start_over`]: on with another function, on an empty stack |
//! | `paging.rs` | [`paging::init`]: own page tables as [`paging::Tables`], which fill the windows at [`paging::OLD_WINDOW`] and [`paging::DEVICE_WINDOW`] |
//! | `trap.rs`, `trap.s` | [`trap::init`]: every exception is caught; [`trap::copy_old`]: reads that may fail; [`trap::DEVICE_ACCESS`]: the way to device registers |
//! | `clock.rs` | [`clock::ticks`], [`clock::ticks_per_second`] |
//! | `console.rs` | [`console::IO_PORTS`], [`console::io_port`]: serial ports that are not in memory |
//! | `pci.rs` | [`pci::each_config_space`]: PCI configuration space |
//! | `ports.rs` | [`ports::IoPorts`] |
//! | `reset.rs` | [`reset::reboot`], [`reset::power_off`], [`reset::halt`], none of which returns |
//!
//! and `mod.rs` itself its `NAME`, the `KERNEL` that loads it, and `dma_barrier`, which devices heed.
//!
//! Memory that the dead kernel used is only ever reached through [`trap::copy_old`], read-only.

#[cfg(target_arch = "aarch64")]
mod aarch64;
#[cfg(target_arch = "aarch64")]
pub use aarch64::*;
#[cfg(target_arch = "x86_64")]
mod x86_64;
#[cfg(target_arch = "x86_64")]
pub use x86_64::*;

use drivers::dma::{DmaMemory, DmaPool};
use spin::Once;

/// Memory for queues and buffers of one disk at a time, in bytes.
const DMA_BYTES: usize = 44 << 10;

/// The memory that devices may read and write by themselves.
pub fn dma_pool() -> &'static DmaPool {
    static MEMORY: DmaMemory<DMA_BYTES> = DmaMemory::new();
    static POOL: Once<DmaPool> = Once::new();
    // SAFETY: runs once. On every architecture the payload's image is one piece of memory, mapped
    // at its physical addresses.
    POOL.call_once(|| unsafe { MEMORY.pool(0, dma_barrier) })
}
