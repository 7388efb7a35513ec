//! The disks of the machine: finds them, opens one after the other, and shows each to whoever looks for
//! one.

use core::fmt;

use capture::Disk;
use drivers::ahci::{self, AhciDisk};
use drivers::block::{BlockDevice, BlockError};
use drivers::clock::TimedOut;
use drivers::firmware::{Firmware, Iommu};
use drivers::iommu;
use drivers::nvme::{self, Nvme};
use drivers::pci::{self, ConfigSpace, Function, Identity};
use drivers::scsi::Unusable;
use drivers::virtio::Transport;
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::mmio::{self, MmioTransport};
use drivers::virtio::pci::{PciTransport, Unreachable, is_block_device, is_scsi_host};
use drivers::virtio::scsi::{self, ScsiError, VirtioScsi};
use drivers::{PhysAddr, Physical};
use heapless::Vec;

use crate::arch;
use crate::disk::ByteDisk;
use crate::memory::PhysicalMemory;
use crate::time::PayloadClock;
use crate::{say, watchdogs};

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

/// The controller itself, which is no disk's number.
const CONTROLLER: u32 = u32::MAX;

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

/// What becomes of the addresses that devices on PCI ask for.
#[derive(Clone, Copy, PartialEq, Eq)]
enum Addresses {
    /// There is no IOMMU that is known.
    InPlace,
    /// All IOMMUs are off.
    IommusOff,
    /// One is not, or there are too many.
    Elsewhere,
}

/// The machine's devices, none of which writes to memory any more.
pub struct Quiet<'a> {
    firmware: &'a Firmware,
    memory: &'a PhysicalMemory<'a>,
    addresses: Addresses,
}

impl<'a> Quiet<'a> {
    /// Stops all devices that can be found, for nobody shut them down, and then switches the IOMMUs off.
    /// Watchdogs are petted from now on.
    pub fn make(firmware: &'a Firmware, memory: &'a PhysicalMemory<'a>) -> Quiet<'a> {
        let mut watchdogs = watchdogs::Search::new(memory);
        arch::pci::each_config_space(firmware, memory, &mut |config| {
            pci::each_function(config, &mut |at| {
                pci::stop_bus_master(config, at);
                watchdogs.look_at(config, at);
            });
        });
        watchdogs.finish(firmware);
        for &at in &firmware.virtio_mmio {
            memory.with_registers(at, mmio::SIZE, mmio::stop);
        }
        Quiet { firmware, memory, addresses: switch_iommus_off(firmware, memory) }
    }

    /// Shows every disk to `visitor` until it wants no more.
    pub fn each_disk(&self, dead: &mut Dead, visitor: &mut dyn Visitor) {
        let Quiet { firmware, memory, addresses } = *self;
        let mut walk = Walk { memory, addresses, dead, visitor };
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
}

fn switch_iommus_off(firmware: &Firmware, memory: &PhysicalMemory<'_>) -> Addresses {
    let mut addresses = match (firmware.iommus.is_empty(), firmware.more_iommus) {
        (_, true) => Addresses::Elsewhere,
        (true, false) => Addresses::InPlace,
        (false, false) => Addresses::IommusOff,
    };
    for &Iommu { kind, base } in &firmware.iommus {
        let switched = memory.with_registers(base, iommu::SIZE, |registers| {
            iommu::switch_off(kind, registers, &PayloadClock)
        });
        match switched {
            Some(Ok(true)) => say!("IOMMU {base}: switched off"),
            Some(Ok(false)) => {}
            Some(Err(TimedOut)) | None => {
                say!("IOMMU {base}: cannot be switched off");
                addresses = Addresses::Elsewhere;
            }
        }
    }
    addresses
}

/// Whether a PCI function has disks that can be driven.
fn is_disk(identity: Identity) -> bool {
    is_block_device(identity)
        || is_scsi_host(identity)
        || nvme::is_controller(identity)
        || ahci::is_controller(identity)
}

/// A walk along the disks.
struct Walk<'a> {
    memory: &'a PhysicalMemory<'a>,
    addresses: Addresses,
    dead: &'a mut Dead,
    visitor: &'a mut dyn Visitor,
}

impl Walk<'_> {
    /// Opens what the PCI function is, if it is a disk.
    fn function(&mut self, config: &dyn ConfigSpace, at: Function) {
        let identity = pci::identity(config, at);
        let open = || {
            let transport = PciTransport::open(config, self.memory, &PayloadClock, at)?;
            let is_off = self.addresses == Addresses::IommusOff;
            Ok::<_, Unreachable>(if is_off { transport.with_iommus_off() } else { transport })
        };
        if self.addresses == Addresses::Elsewhere && is_disk(identity) {
            let why = "behind an IOMMU that cannot be switched off";
            return self.refuse((Place::Pci(at), 0), &at, &why);
        }
        if is_block_device(identity) {
            let transport = open();
            self.virtio_blk(Place::Pci(at), transport);
        } else if is_scsi_host(identity) {
            let transport = open();
            self.virtio_scsi(Place::Pci(at), transport);
        } else if nvme::is_controller(identity) {
            self.nvme(config, at);
        } else if ahci::is_controller(identity) {
            self.ahci(config, at);
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
        } else if is(mmio::is_scsi_host) == Some(true) {
            let transport = open();
            self.virtio_scsi(Place::Mmio(at), transport);
        }
    }

    fn virtio_blk<T: Transport>(&mut self, place: Place, transport: Result<T, impl fmt::Display>) {
        if self.is_dead(place, 0) {
            return;
        }
        match transport {
            Ok(transport) => {
                // One driver for all buses: so the payload stays small.
                let transport: &dyn Transport = &transport;
                let disk = VirtioBlk::open(transport, arch::dma_pool(), &PayloadClock);
                self.show((place, 0), &place, "virtio-blk", disk);
            }
            Err(why) => self.refuse((place, 0), &place, &why),
        }
    }

    /// Opens the disks behind a SCSI host, each after a reset of the host.
    fn virtio_scsi<T: Transport>(&mut self, place: Place, transport: Result<T, impl fmt::Display>) {
        const SILENT: ScsiError = ScsiError::Unit(Unusable::Broken(BlockError::Timeout));
        if self.is_dead(place, CONTROLLER) {
            return;
        }
        let transport = match transport {
            Ok(transport) => transport,
            Err(why) => return self.refuse((place, CONTROLLER), &place, &why),
        };
        let (transport, pool, clock) =
            (&transport as &dyn Transport, arch::dma_pool(), &PayloadClock);
        let units = match scsi::scan(transport, pool, clock) {
            Ok(units) => units,
            Err(why) => return self.refuse((place, CONTROLLER), &place, &why),
        };
        if units.more {
            say!("disk {place}: virtio-scsi with more than is looked at");
        } else if units.found.is_empty() {
            say!("disk {place}: virtio-scsi with nothing attached");
            let _ = self.dead.0.push((place, CONTROLLER));
        }
        let mut silent = 0;
        for unit in units.found {
            let number = u32::from(unit.target) << 16 | u32::from(unit.lun);
            if self.is_dead(place, number) {
                continue;
            }
            // One may be broken. More take too much time to wait for.
            if self.visitor.is_over() || silent == 2 {
                break;
            }
            let disk = VirtioScsi::open(transport, pool, clock, unit);
            silent += u8::from(matches!(disk, Err(SILENT)));
            self.show((place, number), &format_args!("{place} {unit}"), "virtio-scsi", disk);
        }
    }

    /// Opens the namespaces of an NVMe controller, each after a reset of the controller.
    fn nvme(&mut self, config: &dyn ConfigSpace, at: Function) {
        let place = Place::Pci(at);
        if self.is_dead(place, CONTROLLER) {
            return;
        }
        let registers = match nvme::map(config, self.memory, at) {
            Ok(registers) => registers,
            Err(why) => return self.refuse((place, CONTROLLER), &place, &why),
        };
        let (pool, clock) = (arch::dma_pool(), &PayloadClock);
        let go = || pci::enable(config, at, true);
        let namespaces = match nvme::scan(&registers, pool, clock, &go) {
            Ok(namespaces) => namespaces,
            Err(why) => return self.refuse((place, CONTROLLER), &place, &why),
        };
        if namespaces.is_empty() {
            self.refuse((place, CONTROLLER), &place, &"NVMe without a namespace");
        }
        for id in namespaces {
            if self.visitor.is_over() || self.is_dead(place, CONTROLLER) {
                return;
            }
            if self.is_dead(place, id) {
                continue;
            }
            // Not bus master while it may still be about what was before.
            pci::stop_bus_master(config, at);
            let disk = Nvme::open(&registers, pool, clock, &go, id);
            if let Err(why @ (nvme::OpenError::Reset | nvme::OpenError::Timeout)) = disk {
                return self.refuse((place, CONTROLLER), &place, &why);
            }
            self.show((place, id), &format_args!("{place} namespace {id}"), "NVMe", disk);
        }
    }

    /// Opens the disks on the ports of an AHCI controller, one after the other.
    fn ahci(&mut self, config: &dyn ConfigSpace, at: Function) {
        let place = Place::Pci(at);
        if self.is_dead(place, CONTROLLER) {
            return;
        }
        let controller = match ahci::open(config, self.memory, &PayloadClock, at) {
            Ok(controller) => controller,
            Err(why) => return self.refuse((place, CONTROLLER), &place, &why),
        };
        let kind = if controller.is_wide() { "AHCI" } else { "AHCI, memory below 4 GiB only" };
        for port in controller.ports() {
            let number = u32::from(port);
            if self.visitor.is_over() || self.is_dead(place, number) {
                continue;
            }
            let disk = AhciDisk::open(&controller, port, arch::dma_pool(), &PayloadClock);
            if !matches!(disk, Err(ahci::OpenError::NoDisk)) {
                self.show((place, number), &format_args!("{place} port {port}"), kind, disk);
            }
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
