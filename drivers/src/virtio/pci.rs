//! virtio over PCI (section 4.1), with registers found through vendor capabilities.

use core::cell::Cell;
use core::fmt;

use crate::clock::{Clock, TimedOut};
use crate::lent::Reset;
use crate::mmio::{Mmio, Registers};
use crate::pci::{self, BarError, ConfigSpace, Function};
use crate::virtio::{FEATURE_ACCESS_PLATFORM, OpenError, QueueAddresses, Transport};
use crate::{PhysAddr, Physical};

const VENDOR: u16 = 0x1af4;
const VENDOR_CAPABILITY: u8 = 9;

/// What a capability describes (section 4.1.4).
#[derive(Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
enum Structure {
    Common = 1,
    Notify = 2,
    Device = 4,
}

/// Registers of the common configuration (section 4.1.4.3).
mod common {
    pub const DEVICE_FEATURE_SELECT: u64 = 0x00;
    pub const DEVICE_FEATURE: u64 = 0x04;
    pub const DRIVER_FEATURE_SELECT: u64 = 0x08;
    pub const DRIVER_FEATURE: u64 = 0x0c;
    pub const MSIX_CONFIG: u64 = 0x10;
    pub const DEVICE_STATUS: u64 = 0x14;
    pub const QUEUE_SELECT: u64 = 0x16;
    pub const QUEUE_SIZE: u64 = 0x18;
    pub const QUEUE_MSIX_VECTOR: u64 = 0x1a;
    pub const QUEUE_ENABLE: u64 = 0x1c;
    pub const QUEUE_NOTIFY_OFF: u64 = 0x1e;
    pub const QUEUE_DESC: u64 = 0x20;
    pub const QUEUE_DRIVER: u64 = 0x28;
    pub const QUEUE_DEVICE: u64 = 0x30;
    pub const SIZE: u64 = 0x38;
}

/// "No interrupt" in the MSI-X registers.
const NO_VECTOR: u16 = 0xffff;

/// The part of the device configuration that drivers here read.
const DEVICE_CONFIG_SIZE: u64 = 64;

/// Most queues that drivers here use.
const QUEUES: usize = 3;

/// Most bytes of notification registers that are mapped.
const MAX_NOTIFY: u64 = 64 << 10;

/// Whether it is a disk, by the PCI device ids of that kind (section 5), modern and transitional.
#[must_use]
pub fn is_block_device(identity: pci::Identity) -> bool {
    identity.vendor == VENDOR && matches!(identity.device, 0x1042 | 0x1001)
}

/// Whether it is a SCSI host, likewise.
#[must_use]
pub fn is_scsi_host(identity: pci::Identity) -> bool {
    identity.vendor == VENDOR && matches!(identity.device, 0x1048 | 0x1004)
}

/// Whether it is a console, likewise.
#[must_use]
pub fn is_console(identity: pci::Identity) -> bool {
    identity.vendor == VENDOR && matches!(identity.device, 0x1043 | 0x1003)
}

/// A device behind PCI registers.
pub struct PciTransport<R> {
    common: R,
    notify: R,
    notify_multiplier: u32,
    /// Where the queues that were enabled have their notification registers.
    notify_at: [Cell<u64>; QUEUES],
    device: R,
    further_features: u64,
}

/// Why the registers of a device cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// It does not have all of them: it is a legacy device.
    Missing,
    /// They are where the processor does not reach them.
    Bar(BarError),
    /// It does not reset.
    Reset,
}

impl fmt::Display for Unreachable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unreachable::Missing => f.write_str("lacks the registers of virtio 1"),
            Unreachable::Bar(error) => error.fmt(f),
            Unreachable::Reset => f.write_str("does not reset"),
        }
    }
}

/// One structure of registers, as its capability describes it.
struct Place {
    bar: u8,
    offset: u64,
    size: u64,
    capability: u16,
}

impl PciTransport<Mmio> {
    /// Finds and maps the registers of the function at `at`, resets it, and only then lets it be
    /// bus master: it may still hold the dead kernel's queues.
    ///
    /// # Errors
    /// [`Unreachable`] when it does not have all registers, they cannot be reached, or it does not
    /// reset.
    pub fn open(
        config: &dyn ConfigSpace,
        physical: &dyn Physical,
        clock: &dyn Clock,
        at: Function,
    ) -> Result<PciTransport<Mmio>, Unreachable> {
        let map = |structure, least: u64, most: u64| {
            let place = find(config, at, structure).ok_or(Unreachable::Missing)?;
            let size = place.size.min(most);
            if size < least {
                return Err(Unreachable::Missing);
            }
            pci::map_bar(config, physical, at, place.bar, place.offset, size)
                .map(|registers| (registers, place))
                .map_err(Unreachable::Bar)
        };
        // Before its memory is decoded: it may have none yet.
        pci::stop_bus_master(config, at);
        let (common, _) = map(Structure::Common, common::SIZE, common::SIZE)?;
        let (notify, place) = map(Structure::Notify, 2, MAX_NOTIFY)?;
        let (device, _) = map(Structure::Device, 8, DEVICE_CONFIG_SIZE)?;
        let notify_multiplier = config.read(at, place.capability + 16);
        let notify_at = Default::default();
        let transport = PciTransport {
            common,
            notify,
            notify_multiplier,
            notify_at,
            device,
            further_features: 0,
        };
        pci::enable(config, at, false);
        transport.reset(clock).map_err(|TimedOut| Unreachable::Reset)?;
        pci::enable(config, at, true);
        Ok(transport)
    }

    /// The same for a machine whose IOMMUs, all of them, are switched off: a device that insists on going
    /// through one reaches memory in its place.
    #[must_use]
    pub fn with_iommus_off(self) -> PciTransport<Mmio> {
        PciTransport { further_features: FEATURE_ACCESS_PLATFORM, ..self }
    }
}

fn find(config: &dyn ConfigSpace, at: Function, structure: Structure) -> Option<Place> {
    pci::find_capability(config, at, &mut |id, capability| {
        let kind = (config.read(at, capability) >> 24) as u8;
        (id == VENDOR_CAPABILITY && kind == structure as u8).then(|| Place {
            bar: config.read(at, capability + 4) as u8,
            offset: config.read(at, capability + 8).into(),
            size: config.read(at, capability + 12).into(),
            capability,
        })
    })
}

impl<R: Registers> Transport for PciTransport<R> {
    fn further_features(&self) -> u64 {
        self.further_features
    }

    fn status(&self) -> u8 {
        self.common.read8(common::DEVICE_STATUS)
    }

    fn set_status(&self, status: u8) {
        self.common.write8(common::DEVICE_STATUS, status);
    }

    fn device_features(&self) -> u64 {
        self.common.write32(common::DEVICE_FEATURE_SELECT, 0);
        let low = self.common.read32(common::DEVICE_FEATURE);
        self.common.write32(common::DEVICE_FEATURE_SELECT, 1);
        let high = self.common.read32(common::DEVICE_FEATURE);
        u64::from(high) << 32 | u64::from(low)
    }

    fn set_driver_features(&self, features: u64) {
        self.common.write32(common::DRIVER_FEATURE_SELECT, 0);
        self.common.write32(common::DRIVER_FEATURE, features as u32);
        self.common.write32(common::DRIVER_FEATURE_SELECT, 1);
        self.common.write32(common::DRIVER_FEATURE, (features >> 32) as u32);
    }

    fn max_queue_size(&self, index: u16) -> u16 {
        self.common.write16(common::QUEUE_SELECT, index);
        self.common.read16(common::QUEUE_SIZE)
    }

    fn enable_queue(
        &self,
        index: u16,
        size: u16,
        addresses: QueueAddresses,
    ) -> Result<(), OpenError> {
        let notify_at = self.notify_at.get(usize::from(index)).ok_or(OpenError::Queue)?;
        let write_address = |register, PhysAddr(address)| {
            self.common.write64_halves(register, address);
        };
        self.common.write16(common::MSIX_CONFIG, NO_VECTOR);
        self.common.write16(common::QUEUE_SELECT, index);
        self.common.write16(common::QUEUE_MSIX_VECTOR, NO_VECTOR);
        self.common.write16(common::QUEUE_SIZE, size);
        write_address(common::QUEUE_DESC, addresses.descriptors);
        write_address(common::QUEUE_DRIVER, addresses.available);
        write_address(common::QUEUE_DEVICE, addresses.used);
        let notify = u64::from(self.common.read16(common::QUEUE_NOTIFY_OFF));
        notify_at.set(notify * u64::from(self.notify_multiplier));
        self.common.write16(common::QUEUE_ENABLE, 1);
        Ok(())
    }

    fn notify(&self, index: u16) {
        if let Some(at) = self.notify_at.get(usize::from(index)) {
            self.notify.write16(at.get(), index);
        }
    }

    fn config16(&self, offset: u64) -> u16 {
        self.device.read16(offset)
    }

    fn config32(&self, offset: u64) -> u32 {
        self.device.read32(offset)
    }

    fn set_config32(&self, offset: u64, value: u32) {
        self.device.write32(offset, value);
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::pci::tests::{AT, FakeConfig};
    use crate::virtio::{FEATURE_VERSION_1, status};
    use core::cell::RefCell;
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Registers that remember what was written, and give it back.
    #[derive(Default)]
    struct Memory(RefCell<BTreeMap<u64, u32>>, RefCell<Vec<(u64, u32)>>);

    impl Memory {
        fn get(&self, offset: u64) -> u32 {
            self.0.borrow().get(&offset).copied().unwrap_or(0)
        }
        fn set(&self, offset: u64, value: u32) {
            self.0.borrow_mut().insert(offset, value);
            self.1.borrow_mut().push((offset, value));
        }
    }

    impl Registers for Memory {
        fn read8(&self, offset: u64) -> u8 {
            self.get(offset) as u8
        }
        fn read16(&self, offset: u64) -> u16 {
            self.get(offset) as u16
        }
        fn read32(&self, offset: u64) -> u32 {
            self.get(offset)
        }
        fn write8(&self, offset: u64, value: u8) {
            self.set(offset, value.into());
        }
        fn write16(&self, offset: u64, value: u16) {
            self.set(offset, value.into());
        }
        fn write32(&self, offset: u64, value: u32) {
            self.set(offset, value);
        }
    }

    #[test]
    fn structures_are_found_through_their_capabilities() {
        let config = FakeConfig::new(&[
            (0x04, 1 << 20),
            (0x34, 0x40),
            (0x40, 0x0110_5009),
            (0x44, 4),
            (0x48, 0),
            (0x4c, 0x1000),
            (0x50, 0x0214_0009),
            (0x54, 4),
            (0x58, 0x3000),
            (0x5c, 0x1000),
            (0x60, 4),
        ]);
        let notify = find(&config, AT, Structure::Notify).unwrap();
        assert_eq!((notify.bar, notify.offset, notify.size), (4, 0x3000, 0x1000));
        assert!(find(&config, AT, Structure::Device).is_none());
    }

    #[test]
    fn queue_is_enabled_last_and_without_interrupts() {
        let transport = PciTransport {
            common: Memory::default(),
            notify: Memory::default(),
            notify_multiplier: 4,
            notify_at: Default::default(),
            device: Memory::default(),
            further_features: 0,
        };
        let addresses = QueueAddresses {
            descriptors: PhysAddr(0x1_2345_6000),
            available: PhysAddr(0x1000),
            used: PhysAddr(0x2000),
        };
        transport.common.set(0x1e, 3);
        transport.enable_queue(0, 128, addresses).unwrap();
        assert_eq!(transport.common.get(0x20), 0x2345_6000);
        assert_eq!(transport.common.get(0x24), 1);
        assert_eq!(transport.common.get(0x1a), 0xffff);
        assert_eq!(transport.common.1.borrow().last(), Some(&(0x1c, 1)));

        transport.common.set(0x1e, 5);
        transport.enable_queue(1, 128, addresses).unwrap();
        assert_eq!(transport.enable_queue(3, 128, addresses), Err(OpenError::Queue));
        for queue in [0, 1, 3] {
            transport.notify(queue);
        }
        assert_eq!(*transport.notify.1.borrow(), [(12, 0), (20, 1)]);
        transport.set_status(status::DRIVER);
        assert_eq!(transport.status(), status::DRIVER);
        transport.set_driver_features(FEATURE_VERSION_1 | 4);
        assert_eq!(transport.common.get(0x0c), 1);
    }
}
