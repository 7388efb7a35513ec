//! What every architecture tells the rest of the payload about how it was started.

use capture::options::MAX_COMMAND_LINE;
use drivers::PhysAddr;
use heapless::String;

/// How the payload was started, in terms that no architecture owns.
pub struct BootInfo {
    /// The command line; a byte that is not ASCII stands as `?`, so that the word which it spoils is
    /// refused and the others are understood.
    pub command_line: String<MAX_COMMAND_LINE>,
    /// Root pointer of the ACPI tables, if the machine has them.
    pub acpi_root: Option<PhysAddr>,
    /// The first physical address that the processor cannot address.
    pub physical_limit: u64,
    /// Physical memory of the payload itself: image, stacks, tables and buffers.
    pub own_memory: core::ops::Range<u64>,
}
