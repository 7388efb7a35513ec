//! PCI configuration space: memory-mapped where firmware says so, else through two I/O ports.

use drivers::firmware::Firmware;
use drivers::pci::{ConfigSpace, Ecam, Function};
use x86_64::instructions::port::{Port, PortWriteOnly};

use crate::memory::PhysicalMemory;

/// Calls `each` with every configuration space of the machine. Memory-mapped space that does not
/// show the same host bridge as the ports is not believed.
pub fn each_config_space(
    firmware: &Firmware,
    memory: &PhysicalMemory<'_>,
    each: &mut dyn FnMut(&dyn ConfigSpace),
) {
    const HOST_BRIDGE: Function = Function { segment: 0, bus: 0, device: 0, function: 0 };
    let spaces = firmware.pci.iter().map(|host| Ecam { host, pages: memory });
    let bridge = ConfigPorts.read(HOST_BRIDGE, 0);
    if spaces.clone().any(|space| space.read(HOST_BRIDGE, 0) == bridge) {
        spaces.for_each(|space| each(&space));
    } else {
        each(&ConfigPorts);
    }
}

/// Configuration mechanism #1 (PCI Local Bus Specification 3.0, 3.2.2.3.2): one word at a time,
/// its address in port 0xCF8, its value in port 0xCFC.
struct ConfigPorts;

impl ConfigPorts {
    fn select(at: Function, offset: u16) {
        let Function { bus, device, function, .. } = at;
        let address = 1 << 31
            | u32::from(bus) << 16
            | u32::from(device & 31) << 11
            | u32::from(function & 7) << 8
            | u32::from(offset & 0xfc);
        // SAFETY: selects a register and has no other effect.
        unsafe { PortWriteOnly::<u32>::new(0xcf8).write(address) }
    }
}

impl ConfigSpace for ConfigPorts {
    fn read(&self, at: Function, offset: u16) -> u32 {
        if at.segment != 0 || offset > 0xff {
            return u32::MAX;
        }
        ConfigPorts::select(at, offset);
        // SAFETY: reads the selected register; the payload runs on one CPU without interrupts, so
        // nothing came between.
        unsafe { Port::<u32>::new(0xcfc).read() }
    }

    fn write(&self, at: Function, offset: u16, value: u32) {
        if at.segment == 0 && offset <= 0xff {
            ConfigPorts::select(at, offset);
            // SAFETY: writes the selected register of a function that the caller drives.
            unsafe { Port::<u32>::new(0xcfc).write(value) }
        }
    }

    fn buses(&self) -> (u16, u8, u8) {
        (0, 0, 255)
    }
}
