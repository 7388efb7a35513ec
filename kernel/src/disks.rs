//! The disks of the machine: finds them, opens one after the other, and shows each to whoever looks for
//! one.

use core::fmt;

use capture::Disk;
use drivers::block::BlockDevice;
use drivers::firmware::Firmware;
use drivers::pci::{self, ConfigSpace, Function};
use drivers::virtio::Transport;
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::mmio::{self, MmioTransport};
use drivers::virtio::pci::{PciTransport, is_block_device};
use drivers::{PhysAddr, Physical};
use heapless::Vec;

use crate::arch;
use crate::disk::ByteDisk;
use crate::memory::PhysicalMemory;
use crate::time::PayloadClock;

/// Who looks for a disk.
pub trait Visitor {
    /// Whether no further one is wanted.
    fn is_over(&self) -> bool;

    /// Looks at the disk `name`. Returns whether it answers: one that does not is not shown again.
    fn visit(&mut self, name: &dyn fmt::Display, kind: &str, disk: &mut dyn Disk) -> bool;

    /// Hears why the disk `name` cannot be used.
    fn refuse(&mut self, name: &dyn fmt::Display, why: &dyn fmt::Display);
}

/// Most disks that are remembered because they do not answer.
const MAX_DEAD: usize = 16;

/// Disks that did not answer in time: each costs its deadline once, however often the disks are gone
/// through.
#[derive(Default)]
pub struct Dead(Vec<(Place, u32), MAX_DEAD>);

/// Where a controller is.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Place {
    Pci(Function),
    Mmio(PhysAddr),
}

impl fmt::Display for Place {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Place::Pci(at) => at.fmt(f),
            Place::Mmio(at) => at.fmt(f),
        }
    }
}

/// Stops all devices that can be found: nobody shut them down, and from here on none of them writes
/// to memory.
pub fn quiesce(firmware: &Firmware, memory: &PhysicalMemory<'_>) {
    arch::pci::each_config_space(firmware, memory, &mut |config| {
        pci::each_function(config, &mut |at| pci::stop_bus_master(config, at));
    });
    for &at in &firmware.virtio_mmio {
        memory.with_registers(at, mmio::SIZE, mmio::stop);
    }
}

/// Shows every disk to `visitor` until it wants no more.
pub fn each(
    firmware: &Firmware,
    memory: &PhysicalMemory<'_>,
    dead: &mut Dead,
    visitor: &mut dyn Visitor,
) {
    let mut walk = Walk { memory, dead, visitor };
    arch::pci::each_config_space(firmware, memory, &mut |config| {
        pci::each_function(config, &mut |at| {
            if !walk.visitor.is_over() {
                walk.function(config, at);
            }
        });
    });
    for &at in &firmware.virtio_mmio {
        if !walk.visitor.is_over() {
            walk.virtio_mmio(at);
        }
    }
}

/// A walk along the disks.
struct Walk<'a> {
    memory: &'a PhysicalMemory<'a>,
    dead: &'a mut Dead,
    visitor: &'a mut dyn Visitor,
}

impl Walk<'_> {
    /// Opens what the PCI function is, if it is a disk.
    fn function(&mut self, config: &dyn ConfigSpace, at: Function) {
        let identity = pci::identity(config, at);
        let open = || PciTransport::open(config, self.memory, &PayloadClock, at);
        if is_block_device(identity) {
            let transport = open();
            self.virtio_blk(Place::Pci(at), transport);
        } else {
            return;
        }
        pci::stop_bus_master(config, at);
    }

    fn virtio_mmio(&mut self, at: PhysAddr) {
        let is = |kind: fn(&_) -> bool| self.memory.with_registers(at, mmio::SIZE, kind);
        let open = || {
            let registers = self.memory.map_device(at, mmio::SIZE);
            let transport = registers.and_then(MmioTransport::open);
            transport.ok_or("its registers cannot be mapped")
        };
        if is(mmio::is_block_device) == Some(true) {
            let transport = open();
            self.virtio_blk(Place::Mmio(at), transport);
        }
    }

    fn virtio_blk<T: Transport>(&mut self, place: Place, transport: Result<T, impl fmt::Display>) {
        if self.is_dead(place, 0) {
            return;
        }
        match transport {
            Ok(transport) => {
                let disk = VirtioBlk::open(transport, arch::dma_pool(), &PayloadClock);
                self.show((place, 0), &place, "virtio-blk", disk);
            }
            Err(why) => self.refuse((place, 0), &place, &why),
        }
    }

    /// Shows the disk `name`, number `unit` of the controller at a place, or tells why it cannot be used.
    fn show<D: BlockDevice>(
        &mut self,
        at: (Place, u32),
        name: &dyn fmt::Display,
        kind: &str,
        disk: Result<D, impl fmt::Display>,
    ) {
        match disk {
            Ok(disk) => {
                if !self.visitor.visit(name, kind, &mut ByteDisk(disk)) {
                    let _ = self.dead.0.push(at);
                }
            }
            Err(why) => self.refuse(at, name, &why),
        }
    }

    /// Tells why a disk cannot be used, this time and any other.
    fn refuse(&mut self, at: (Place, u32), name: &dyn fmt::Display, why: &dyn fmt::Display) {
        self.visitor.refuse(name, why);
        let _ = self.dead.0.push(at);
    }

    fn is_dead(&self, place: Place, unit: u32) -> bool {
        self.dead.0.contains(&(place, unit))
    }
}
