//! Symbolizes and unwinds dumps of a dead Linux kernel, from the dump alone.
//!
//! Layers, each of which knows only those before it:
//!
//! - [`source`]: where the bytes come from, and the machine's physical memory above it;
//! - [`kernel`]: what kernel it is: VMCOREINFO, page tables, symbols, types, debug information;
//! - [`linux`]: its objects: tasks, per-CPU variables, modules, the log;
//! - [`unwind`]: stacks to frames;
//! - [`commands`]: what the user asks for, one file per command;
//! - [`render`]: how it looks.
//!
//! Beside them, [`receive`] is where a dump comes from over a serial line.
//!
//! Every byte of a dump is foreign: nothing here trusts a length, a pointer or a count in it.
//! Nothing is parsed before a command asks for it.
//!
//! ```no_run
//! # fn main() -> Result<(), host_analyzer::Error> {
//! use host_analyzer::{commands::bt, kernel::Kernel, source::Dump};
//! let dump = Dump::open("dump.elf".as_ref())?;
//! let kernel = Kernel::open(&dump, None)?;
//! bt::run(&kernel, &bt::Options::default(), &mut std::io::stdout())?;
//! # Ok(()) }
//! ```

#![deny(unsafe_code)]

pub mod address;
pub mod bytes;
pub mod commands;
mod error;
pub mod kernel;
pub mod linux;
pub mod receive;
pub mod render;
pub mod source;
#[cfg(test)]
mod testing;
pub mod unwind;
pub mod usable;

pub use address::{PhysAddr, VirtAddr};
pub use error::{Error, ReadContext, ReadError};
