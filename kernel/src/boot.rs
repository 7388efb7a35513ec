//! What every architecture tells the rest of the payload about how it was started.

use capture::options::MAX_COMMAND_LINE;
use drivers::PhysAddr;
use heapless::Vec;

/// How the payload was started, in terms that no architecture owns.
pub struct BootInfo {
    /// The command line, cut at the end of the last whole character.
    pub command_line: Vec<u8, MAX_COMMAND_LINE>,
    /// Root pointer of the ACPI tables, if the machine has them.
    pub acpi_root: Option<PhysAddr>,
    /// The first physical address that the processor cannot address.
    pub physical_limit: u64,
    /// Physical memory of the payload itself: image, stacks, tables and buffers.
    pub own_memory: core::ops::Range<u64>,
}

impl BootInfo {
    /// The command line as text; what follows the first byte that is not UTF-8 is left out.
    #[must_use]
    pub fn command_line(&self) -> &str {
        match core::str::from_utf8(&self.command_line) {
            Ok(text) => text,
            Err(error) => {
                let valid = &self.command_line[..error.valid_up_to()];
                core::str::from_utf8(valid).unwrap_or("")
            }
        }
    }
}
