//! x86_64, entered through the 64-bit boot protocol.

pub mod clock;
pub mod console;
mod entry;
pub mod paging;
pub mod pci;
pub mod reset;
pub mod trap;

/// The architecture's name.
pub const NAME: &str = "x86_64";
