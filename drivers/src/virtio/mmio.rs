//! virtio over plain registers (section 4.2), of version 2, and of the legacy version 1 that QEMU
//! still gives its devices.

use crate::PhysAddr;
use crate::mmio::Registers;
use crate::virtio::queue::LEGACY_PAGE;
use crate::virtio::{OpenError, QueueAddresses, Transport};

/// Bytes of registers that drivers here use, the device's configuration among them.
pub const SIZE: u64 = 0x200;

/// Registers of both versions (section 4.2.2), and of one of them (4.2.2 and 4.2.4).
mod register {
    pub const MAGIC: u64 = 0x000;
    pub const VERSION: u64 = 0x004;
    pub const DEVICE_ID: u64 = 0x008;
    pub const DEVICE_FEATURES: u64 = 0x010;
    pub const DEVICE_FEATURES_SELECT: u64 = 0x014;
    pub const DRIVER_FEATURES: u64 = 0x020;
    pub const DRIVER_FEATURES_SELECT: u64 = 0x024;
    pub const LEGACY_PAGE_SIZE: u64 = 0x028;
    pub const QUEUE_SELECT: u64 = 0x030;
    pub const QUEUE_MAX_SIZE: u64 = 0x034;
    pub const QUEUE_SIZE: u64 = 0x038;
    pub const LEGACY_QUEUE_ALIGN: u64 = 0x03c;
    pub const LEGACY_QUEUE_PAGE: u64 = 0x040;
    pub const QUEUE_READY: u64 = 0x044;
    pub const QUEUE_NOTIFY: u64 = 0x050;
    pub const STATUS: u64 = 0x070;
    pub const QUEUE_DESC: u64 = 0x080;
    pub const QUEUE_DRIVER: u64 = 0x090;
    pub const QUEUE_DEVICE: u64 = 0x0a0;
    pub const CONFIG: u64 = 0x100;
}

/// "virt", as it reads.
const MAGIC: u32 = 0x7472_6976;

/// Kinds of device (section 5); 0 is a place where no device is.
const BLOCK_DEVICE: u32 = 2;
const CONSOLE: u32 = 3;
const SCSI_HOST: u32 = 8;

/// A device behind its registers.
pub struct MmioTransport<R> {
    registers: R,
    is_legacy: bool,
}

/// Whether a device of a known version is behind the registers, and of which kind it is.
fn device<R: Registers>(registers: &R) -> Option<u32> {
    let known = registers.read32(register::MAGIC) == MAGIC
        && matches!(registers.read32(register::VERSION), 1 | 2);
    known.then(|| registers.read32(register::DEVICE_ID)).filter(|&id| id != 0)
}

/// Whether the registers are those of a block device. Changes nothing.
pub fn is_block_device<R: Registers>(registers: &R) -> bool {
    device(registers) == Some(BLOCK_DEVICE)
}

/// Whether the registers are those of a SCSI host. Changes nothing.
pub fn is_scsi_host<R: Registers>(registers: &R) -> bool {
    device(registers) == Some(SCSI_HOST)
}

/// Whether the registers are those of a console. Changes nothing.
pub fn is_console<R: Registers>(registers: &R) -> bool {
    device(registers) == Some(CONSOLE)
}

/// Stops whatever device is behind the registers, so that it writes to memory no more: what
/// [`crate::pci::stop_bus_master`] is for PCI. It is not waited for. Where no device is, nothing
/// happens.
pub fn stop<R: Registers>(registers: &R) {
    if device(registers).is_some() {
        registers.write32(register::STATUS, 0);
    }
}

impl<R: Registers> MmioTransport<R> {
    /// The device behind `registers`, [`SIZE`] bytes of them. `None` when there is none of a known
    /// version.
    pub fn open(registers: R) -> Option<MmioTransport<R>> {
        device(&registers)?;
        let is_legacy = registers.read32(register::VERSION) == 1;
        Some(MmioTransport { registers, is_legacy })
    }

    fn features(&self, select: u32) -> u64 {
        self.registers.write32(register::DEVICE_FEATURES_SELECT, select);
        self.registers.read32(register::DEVICE_FEATURES).into()
    }

    /// Tells a legacy device the page that the queue begins with; it finds the rest by itself.
    fn enable_legacy_queue(&self, size: u16, PhysAddr(at): PhysAddr) -> Result<(), OpenError> {
        let page = at / LEGACY_PAGE as u64;
        let number = u32::try_from(page).map_err(|_| OpenError::Queue)?;
        if !at.is_multiple_of(LEGACY_PAGE as u64)
            || self.registers.read32(register::LEGACY_QUEUE_PAGE) != 0
        {
            return Err(OpenError::Queue);
        }
        self.registers.write32(register::LEGACY_PAGE_SIZE, LEGACY_PAGE as u32);
        self.registers.write32(register::QUEUE_SIZE, size.into());
        self.registers.write32(register::LEGACY_QUEUE_ALIGN, LEGACY_PAGE as u32);
        self.registers.write32(register::LEGACY_QUEUE_PAGE, number);
        Ok(())
    }
}

impl<R: Registers> Transport for MmioTransport<R> {
    fn is_legacy(&self) -> bool {
        self.is_legacy
    }

    fn status(&self) -> u8 {
        self.registers.read32(register::STATUS) as u8
    }

    fn set_status(&self, status: u8) {
        self.registers.write32(register::STATUS, status.into());
    }

    fn device_features(&self) -> u64 {
        let high = if self.is_legacy { 0 } else { self.features(1) };
        high << 32 | self.features(0)
    }

    fn set_driver_features(&self, features: u64) {
        self.registers.write32(register::DRIVER_FEATURES_SELECT, 0);
        self.registers.write32(register::DRIVER_FEATURES, features as u32);
        if !self.is_legacy {
            self.registers.write32(register::DRIVER_FEATURES_SELECT, 1);
            self.registers.write32(register::DRIVER_FEATURES, (features >> 32) as u32);
        }
    }

    fn max_queue_size(&self, index: u16) -> u16 {
        self.registers.write32(register::QUEUE_SELECT, index.into());
        self.registers.read32(register::QUEUE_MAX_SIZE).try_into().unwrap_or(u16::MAX)
    }

    fn enable_queue(
        &self,
        index: u16,
        size: u16,
        addresses: QueueAddresses,
    ) -> Result<(), OpenError> {
        self.registers.write32(register::QUEUE_SELECT, index.into());
        if self.is_legacy {
            return self.enable_legacy_queue(size, addresses.descriptors);
        }
        if self.registers.read32(register::QUEUE_READY) != 0 {
            return Err(OpenError::Queue);
        }
        let write_address = |register, PhysAddr(address)| {
            self.registers.write64_halves(register, address);
        };
        self.registers.write32(register::QUEUE_SIZE, size.into());
        write_address(register::QUEUE_DESC, addresses.descriptors);
        write_address(register::QUEUE_DRIVER, addresses.available);
        write_address(register::QUEUE_DEVICE, addresses.used);
        self.registers.write32(register::QUEUE_READY, 1);
        Ok(())
    }

    fn notify(&self, index: u16) {
        self.registers.write32(register::QUEUE_NOTIFY, index.into());
    }

    fn config16(&self, offset: u64) -> u16 {
        self.registers.read16(register::CONFIG.saturating_add(offset))
    }

    fn config32(&self, offset: u64) -> u32 {
        self.registers.read32(register::CONFIG.saturating_add(offset))
    }

    fn set_config32(&self, offset: u64, value: u32) {
        self.registers.write32(register::CONFIG.saturating_add(offset), value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::virtio::fake::{Bus, Temper, fake};

    #[test]
    fn only_block_devices_of_known_versions_are_taken() {
        for bus in [Bus::Legacy, Bus::Mmio] {
            let fake = fake(bus, Temper::Good);
            let version = fake.read32(register::VERSION);
            assert!(is_block_device(&fake));
            for (register, value) in
                [(register::MAGIC, 0), (register::VERSION, 3), (register::DEVICE_ID, 0)]
            {
                fake.pretend(register, value);
                assert!(!is_block_device(&fake));
                assert!(MmioTransport::open(fake.clone()).is_none());
                fake.pretend(register::MAGIC, MAGIC);
                fake.pretend(register::VERSION, version);
                fake.pretend(register::DEVICE_ID, 2);
            }
            fake.pretend(register::DEVICE_ID, 1);
            assert!(!is_block_device(&fake) && !is_console(&fake), "a network device");
            fake.pretend(register::DEVICE_ID, 3);
            assert!(!is_block_device(&fake) && is_console(&fake));
            fake.pretend(register::DEVICE_ID, 8);
            assert!(!is_block_device(&fake) && is_scsi_host(&fake));
        }
    }

    #[test]
    fn every_device_can_be_stopped_and_an_empty_place_is_left_alone() {
        let fake = fake(Bus::Mmio, Temper::Good);
        fake.pretend(register::DEVICE_ID, 0);
        stop(&fake);
        assert_eq!(fake.device.borrow().status, 0xf);
        fake.pretend(register::DEVICE_ID, 1);
        stop(&fake);
        assert_eq!(fake.device.borrow().status, 0);
    }

    #[test]
    fn legacy_queue_that_is_still_in_use_or_out_of_reach_is_refused() {
        let fake = fake(Bus::Legacy, Temper::Good);
        let transport = MmioTransport::open(fake.clone()).unwrap();
        transport.set_status(0);
        let at = |address| QueueAddresses {
            descriptors: PhysAddr(address),
            available: PhysAddr(address),
            used: PhysAddr(address),
        };
        assert_eq!(transport.enable_queue(0, 4, at(1 << 44)), Err(OpenError::Queue));
        assert_eq!(transport.enable_queue(0, 4, at(0x1800)), Err(OpenError::Queue));
        assert_eq!(transport.enable_queue(0, 4, at(0x1000)), Ok(()));
        assert_eq!(transport.enable_queue(0, 4, at(0x1000)), Err(OpenError::Queue));
    }
}
