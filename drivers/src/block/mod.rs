//! What every disk can do.

mod queued;

use core::fmt;

pub(crate) use queued::REQUEST_US;
pub use queued::{BOUNCE_BYTES, Finished, Geometry, Lie, MAX_SLOTS, Protocol, Queued, Request};

use crate::PhysAddr;

/// Number of a block on a disk, in the disk's own block size.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct Lba(pub u64);

/// Why a disk did not do what it was asked for. After [`BlockError::Protocol`] and
/// [`BlockError::Timeout`] it does nothing more: every later call gives the same error.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum BlockError {
    /// It reported an error.
    Device,
    /// It broke its protocol.
    Protocol,
    /// It did not answer in time.
    Timeout,
    /// The request is not within the disk, or not made of whole blocks, or its memory is where the
    /// disk's controller does not reach.
    Range,
}

impl fmt::Display for BlockError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            BlockError::Device => "the disk reported an error",
            BlockError::Protocol => "the disk broke its protocol",
            BlockError::Timeout => "the disk did not answer in time",
            BlockError::Range => "a request outside of the disk, or of the memory that it reaches",
        })
    }
}

/// A disk. Writes are posted: they may be under way when the call returns, in any order among
/// themselves; [`BlockDevice::flush`] waits for all of them. Reads wait for their data, not for
/// writes posted before.
pub trait BlockDevice {
    /// Size of a block in bytes: a power of two from 512 to 4096.
    fn block_size(&self) -> u32;

    /// Number of blocks.
    fn blocks(&self) -> u64;

    /// Reads whole blocks from `at` on.
    ///
    /// # Errors
    /// [`BlockError`], also of writes posted before.
    fn read(&mut self, at: Lba, into: &mut [u8]) -> Result<(), BlockError>;

    /// Posts a write of whole blocks, whose bytes are copied first.
    ///
    /// # Errors
    /// [`BlockError`], also of writes posted before.
    fn write(&mut self, at: Lba, bytes: &[u8]) -> Result<(), BlockError>;

    /// Posts a write of `size` bytes, whole blocks, that the device takes from memory by itself.
    ///
    /// # Errors
    /// [`BlockError`], also of writes posted before.
    fn write_physical(&mut self, at: Lba, from: PhysAddr, size: u64) -> Result<(), BlockError>;

    /// Waits for all posted writes and until they are on the medium.
    ///
    /// # Errors
    /// [`BlockError`], also of writes posted before.
    fn flush(&mut self) -> Result<(), BlockError>;
}
