//! virtio devices, version 1 ("modern"), and behind plain registers the legacy ones before it too.
//!
//! Source: Virtual I/O Device (VIRTIO) Version 1.2; section numbers are of that document.

pub mod blk;
pub mod console;
#[cfg(test)]
mod fake;
#[cfg(test)]
mod fake_scsi;
pub mod mmio;
pub mod pci;
pub mod queue;
pub mod scsi;

use crate::PhysAddr;
use crate::clock::{Clock, Deadline, TimedOut};
use crate::lent::Reset;

/// Bits of the device status (section 2.1).
pub mod status {
    /// The driver has seen the device.
    pub const ACKNOWLEDGE: u8 = 1;
    /// The driver knows how to drive it.
    pub const DRIVER: u8 = 2;
    /// The driver is ready.
    pub const DRIVER_OK: u8 = 4;
    /// The features are settled.
    pub const FEATURES_OK: u8 = 8;
    /// The driver gave the device up.
    pub const FAILED: u8 = 128;
}

/// The device follows version 1 (section 6).
pub const FEATURE_VERSION_1: u64 = 1 << 32;

/// What the device asks for goes through an IOMMU, or is otherwise not what it is for the processor.
pub const FEATURE_ACCESS_PLATFORM: u64 = 1 << 33;

/// Longest wait for a device to finish its reset. Nothing in the specification bounds it; QEMU and
/// real devices take microseconds.
const RESET_US: u64 = 1_000_000;

/// Addresses of the three parts of a queue.
#[derive(Clone, Copy, Debug)]
pub struct QueueAddresses {
    /// Descriptor table.
    pub descriptors: PhysAddr,
    /// Available ring, written by the driver.
    pub available: PhysAddr,
    /// Used ring, written by the device.
    pub used: PhysAddr,
}

/// How a driver talks to a device, over whatever bus.
pub trait Transport {
    /// Whether the device follows the specification's draft before version 1 (section 1.3.1): it has
    /// 32 feature bits that count without being agreed upon, and its queues are laid out for it.
    fn is_legacy(&self) -> bool {
        false
    }

    /// Features that may be taken although no driver asks for them.
    fn further_features(&self) -> u64 {
        0
    }

    /// Reads the device status; all ones when the device is gone.
    fn status(&self) -> u8;

    /// Writes the device status; 0 begins a reset.
    fn set_status(&self, status: u8);

    /// Reads the features that the device offers.
    fn device_features(&self) -> u64;

    /// Writes the features that the driver takes.
    fn set_driver_features(&self, features: u64);

    /// The largest size of queue `index`; 0 when there is none.
    fn max_queue_size(&self, index: u16) -> u16;

    /// Sets queue `index` up without interrupts, and enables it.
    ///
    /// # Errors
    /// [`OpenError::Queue`] when the device cannot have it there.
    fn enable_queue(
        &self,
        index: u16,
        size: u16,
        addresses: QueueAddresses,
    ) -> Result<(), OpenError>;

    /// Tells the device that queue `index`, which was enabled, has something new.
    fn notify(&self, index: u16);

    /// Reads two bytes of the device-specific configuration.
    fn config16(&self, offset: u64) -> u16;

    /// Reads four bytes of the device-specific configuration.
    fn config32(&self, offset: u64) -> u32;

    /// Writes four bytes of the device-specific configuration.
    fn set_config32(&self, offset: u64, value: u32);
}

/// A device that is opened more than once, for each of the disks behind it, or over one of several
/// buses.
impl<T: Transport + ?Sized> Transport for &T {
    fn is_legacy(&self) -> bool {
        (*self).is_legacy()
    }
    fn further_features(&self) -> u64 {
        (*self).further_features()
    }
    fn status(&self) -> u8 {
        (*self).status()
    }
    fn set_status(&self, status: u8) {
        (*self).set_status(status);
    }
    fn device_features(&self) -> u64 {
        (*self).device_features()
    }
    fn set_driver_features(&self, features: u64) {
        (*self).set_driver_features(features);
    }
    fn max_queue_size(&self, index: u16) -> u16 {
        (*self).max_queue_size(index)
    }
    fn enable_queue(&self, index: u16, size: u16, at: QueueAddresses) -> Result<(), OpenError> {
        (*self).enable_queue(index, size, at)
    }
    fn notify(&self, index: u16) {
        (*self).notify(index);
    }
    fn config16(&self, offset: u64) -> u16 {
        (*self).config16(offset)
    }
    fn config32(&self, offset: u64) -> u32 {
        (*self).config32(offset)
    }
    fn set_config32(&self, offset: u64, value: u32) {
        (*self).set_config32(offset, value);
    }
}

/// Why a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// It did not finish its reset, or is gone.
    Reset,
    /// It does not follow version 1 of the specification, or insists on a feature that this driver
    /// does not take: [`FEATURE_ACCESS_PLATFORM`], where it is not known that our addresses go nowhere
    /// else.
    Features,
    /// Its queue is missing or too small.
    Queue,
    /// Its configuration makes no sense.
    Config,
    /// It cannot be written.
    ReadOnly,
    /// No DMA memory is left.
    Memory,
}

impl core::fmt::Display for OpenError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            OpenError::Reset => "does not reset",
            OpenError::Features => "does not speak virtio 1, or only through an IOMMU",
            OpenError::Queue => "has no usable queue",
            OpenError::Config => "has an impossible configuration",
            OpenError::ReadOnly => "is read-only",
            OpenError::Memory => "no DMA memory is left for it",
        })
    }
}

impl<T: Transport> Reset for T {
    fn reset(&self, clock: &dyn Clock) -> Result<(), TimedOut> {
        self.set_status(0);
        Deadline::after_us(clock, RESET_US).poll(clock, || (self.status() == 0).then_some(()))
    }
}

/// Resets a device and settles the features: all those of `wanted` that it offers, version 1 among
/// them unless the device is a legacy one. Returns what was settled.
///
/// # Errors
/// [`OpenError::Reset`] or [`OpenError::Features`].
pub fn negotiate(
    transport: &impl Transport,
    clock: &dyn Clock,
    wanted: u64,
) -> Result<u64, OpenError> {
    transport.reset(clock).map_err(|TimedOut| OpenError::Reset)?;
    let begun = status::ACKNOWLEDGE | status::DRIVER;
    transport.set_status(begun);
    let offered = transport.device_features();
    if transport.is_legacy() {
        let features = offered & wanted & !FEATURE_VERSION_1;
        transport.set_driver_features(features);
        return Ok(features);
    }
    let features = offered & (wanted | FEATURE_VERSION_1 | transport.further_features());
    if features & FEATURE_VERSION_1 == 0 {
        transport.set_status(status::FAILED);
        return Err(OpenError::Features);
    }
    transport.set_driver_features(features);
    transport.set_status(begun | status::FEATURES_OK);
    if transport.status() != begun | status::FEATURES_OK {
        transport.set_status(status::FAILED);
        return Err(OpenError::Features);
    }
    Ok(features)
}

/// Tells a device whose features are settled and whose queues are enabled that it may begin.
pub fn begin(transport: &dyn Transport) {
    let agreed = if transport.is_legacy() { 0 } else { status::FEATURES_OK };
    transport.set_status(status::ACKNOWLEDGE | status::DRIVER | agreed | status::DRIVER_OK);
}
