//! The whole logic of a dump, from `elfcorehdr` to a committed ELF core.
//!
//! Nothing here knows a device, an address of its own or an allocator. Old memory, the clock and
//! the console are behind [`Machine`], the place to write to behind [`Disk`]; both are given by the
//! payload on a crashed machine, and by fakes in the tests.
//!
//! In the order of a dump: [`options`] reads the command line, [`elfcorehdr`] turns what the dead
//! kernel claims into an [`old::OldMemory`] that can be trusted, [`area`] finds the place that may
//! be written, [`core_file`] lays the core out, [`dump`] writes it.

#![no_std]
#![forbid(unsafe_code)]

#[cfg(test)]
extern crate std;

extern crate alloc;

pub mod architecture;
pub mod area;
pub mod card;
pub mod core_file;
pub mod crc;
pub mod dump;
pub mod elfcorehdr;
#[cfg(test)]
mod fake;
pub mod file;
pub mod line;
pub mod old;
pub mod options;
pub mod serial;
mod unreadable;
pub mod vmcoreinfo;

use core::fmt;

/// A physical address in the dead kernel's memory: an allegation until it has been checked against
/// what the machine can address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct OldPhys(pub u64);

impl fmt::Display for OldPhys {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Old memory that could not be read: a hole, device memory, or a poisoned page.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unreadable;

/// What the dump logic asks of the machine that it runs on.
pub trait Machine {
    /// Copies old memory from `at` on into `into`.
    ///
    /// # Errors
    /// [`Unreadable`] when any byte of it cannot be read; `into` then holds anything.
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable>;

    /// Microseconds since the payload's first instruction.
    fn now_us(&self) -> u64;

    /// Whether the time that there is for the dump is over.
    fn is_time_over(&self) -> bool {
        false
    }

    /// One line for the console.
    fn say(&mut self, line: fmt::Arguments<'_>);
}

/// Why a disk did not do what it was asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DiskError {
    /// It reported an error, or broke its protocol.
    Failed,
    /// It did not answer before its deadline.
    Timeout,
    /// The request lies outside of the disk, is not made of whole blocks of 4 KiB, or is about memory
    /// that the disk does not reach.
    Range,
}

impl fmt::Display for DiskError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            DiskError::Failed => "the disk reported an error",
            DiskError::Timeout => "the disk did not answer in time",
            DiskError::Range => "a request outside of the disk, or of the memory that it reaches",
        })
    }
}

/// A disk, addressed in bytes. Writes are of whole blocks ([`format::BLOCK`]), at offsets that are
/// multiples of the sector size: a partition need not begin at a multiple of 4 KiB.
///
/// Writes are posted: they may be under way when the call returns, in any order, and an error may
/// be told by a later call, but no later than by the next [`Disk::flush`].
pub trait Disk {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Size of a sector in bytes: 512 or 4096.
    fn sector_size(&self) -> u32;

    /// Reads at `offset`, a multiple of the sector size, and waits for the data.
    ///
    /// # Errors
    /// [`DiskError`], also of writes posted before.
    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError>;

    /// Posts a write of the payload's own bytes.
    ///
    /// # Errors
    /// [`DiskError`], also of writes posted before.
    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError>;

    /// Posts a write of `size` bytes of old memory, which the device takes by itself.
    ///
    /// # Errors
    /// [`DiskError`], also of writes posted before.
    fn write_old(&mut self, offset: u64, from: OldPhys, size: u64) -> Result<(), DiskError>;

    /// Waits until everything written is on the medium.
    ///
    /// # Errors
    /// [`DiskError`], also of writes posted before.
    fn flush(&mut self) -> Result<(), DiskError>;
}
