//! PCI configuration space: memory-mapped, where firmware says.

use drivers::firmware::Firmware;
use drivers::pci::{ConfigSpace, Ecam};

use crate::memory::PhysicalMemory;

/// Calls `each` with every configuration space of the machine.
pub fn each_config_space(
    firmware: &Firmware,
    memory: &PhysicalMemory<'_>,
    each: &mut dyn FnMut(&dyn ConfigSpace),
) {
    for host in &firmware.pci {
        each(&Ecam { host, pages: memory });
    }
}
