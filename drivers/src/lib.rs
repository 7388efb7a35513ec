//! Devices of a crashed machine, behind traits.
//!
//! Nobody shut these devices down, interrupts are off, and any of them may be what broke. So every
//! driver here polls, every wait has a [`clock::Deadline`], every device is reset before use, and
//! nothing that a device says is believed without a check. Drivers know no architecture: ports,
//! mappings and the clock come from the payload through [`pci::ConfigSpace`], [`Physical`] and
//! [`clock::Clock`].

#![no_std]
#![deny(unsafe_code)]

#[cfg(test)]
extern crate std;

pub mod ahci;
pub mod block;
pub mod clock;
pub mod dma;
pub mod firmware;
pub mod iommu;
pub mod lent;
pub mod mmio;
pub mod nvme;
pub mod pci;
pub mod scsi;
pub mod serial;
pub mod virtio;
pub mod watchdog;

use core::fmt;

/// A physical address.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub struct PhysAddr(pub u64);

impl fmt::Display for PhysAddr {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{:#x}", self.0)
    }
}

/// Physical memory as drivers and firmware parsers see it.
pub trait Physical {
    /// Copies memory at `at` into `into`. Returns whether all of it could be read.
    fn read(&self, at: PhysAddr, into: &mut [u8]) -> bool;

    /// Maps `size` bytes of device registers at `at`, uncached. `None` when no room is left for
    /// mappings or the address is impossible.
    fn map_device(&self, at: PhysAddr, size: u64) -> Option<mmio::Mmio>;
}
