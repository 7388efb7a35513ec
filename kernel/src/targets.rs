//! Finds the disk to write to: the first one with a reserved area that fits.

use core::fmt;

use capture::Disk;
use capture::area;
use capture::dump::{self, Buffers, Complete, Payload, Source};
use capture::options::To;
use drivers::Physical;
use drivers::block::BlockDevice;
use drivers::firmware::Firmware;
use drivers::pci;
use drivers::virtio::Transport;
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::mmio::{self, MmioTransport};
use drivers::virtio::pci::{PciTransport, is_block_device};

use crate::arch;
use crate::disk::ByteDisk;
use crate::memory::PhysicalMemory;
use crate::time::PayloadClock;
use crate::{ThisMachine, say};

/// Why no disk holds the dump.
pub enum Failure {
    /// No disk that the payload can drive.
    NoDisk,
    /// Disks, but no area on them that may be written.
    NoArea,
    /// An area, but the dump did not get there.
    Dump(dump::Error),
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::NoDisk => f.write_str("no disk that this payload can drive was found"),
            Failure::NoArea => {
                f.write_str("no disk has a reserved area to write to (make one: loader reserve)")
            }
            Failure::Dump(error) => error.fmt(f),
        }
    }
}

/// What is to be written, and where it may go.
pub struct Job<'a> {
    /// Which area.
    pub to: To,
    /// The dead kernel's memory.
    pub source: Source<'a>,
    /// What the vendor note says of us.
    pub payload: Payload<'a>,
    /// Buffers of the dump.
    pub buffers: &'a mut Buffers,
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

/// Writes the dump to the first area that the job allows.
pub fn dump_to_first(
    firmware: &Firmware,
    machine: &mut ThisMachine<'_>,
    job: &mut Job<'_>,
) -> Result<Complete, Failure> {
    let memory = machine.memory;
    let mut search = Search { result: Err(Failure::NoDisk) };
    arch::pci::each_config_space(firmware, memory, &mut |config| {
        pci::each_function(config, &mut |at| {
            if !search.is_over() && is_block_device(pci::identity(config, at)) {
                let transport = PciTransport::open(config, memory, &PayloadClock, at);
                search.try_virtio_blk(machine, &at, transport, job);
                pci::stop_bus_master(config, at);
            }
        });
    });
    for &at in &firmware.virtio_mmio {
        if search.is_over() {
            break;
        }
        if memory.with_registers(at, mmio::SIZE, mmio::is_block_device) == Some(true) {
            let registers = memory.map_device(at, mmio::SIZE);
            let transport = registers.and_then(MmioTransport::open);
            let transport = transport.ok_or("its registers cannot be mapped");
            search.try_virtio_blk(machine, &at, transport, job);
        }
    }
    search.result
}

/// The search for a disk that takes the dump.
struct Search {
    /// The dump, or what came closest to it.
    result: Result<Complete, Failure>,
}

impl Search {
    fn is_over(&self) -> bool {
        self.result.is_ok()
    }

    fn try_virtio_blk<T: Transport>(
        &mut self,
        machine: &mut ThisMachine<'_>,
        name: &dyn fmt::Display,
        transport: Result<T, impl fmt::Display>,
        job: &mut Job<'_>,
    ) {
        match transport {
            Ok(transport) => {
                let disk = VirtioBlk::open(transport, arch::dma_pool(), &PayloadClock);
                self.try_disk(machine, name, "virtio-blk", disk, job);
            }
            Err(why) => self.refuse(name, &why),
        }
    }

    /// Tries the disk `name`, or says why it cannot be used.
    fn try_disk<D: BlockDevice>(
        &mut self,
        machine: &mut ThisMachine<'_>,
        name: &dyn fmt::Display,
        kind: &str,
        disk: Result<D, impl fmt::Display>,
        job: &mut Job<'_>,
    ) {
        let disk = match disk {
            Ok(disk) => disk,
            Err(why) => return self.refuse(name, &why),
        };
        let mut disk = ByteDisk(disk);
        say!("disk {name}: {kind}, {} MiB", disk.size() >> 20);
        let refused = &mut |partition, why: area::Unusable| match partition {
            0 => say!("disk {name}: {why}"),
            partition => say!("disk {name}, partition {partition}: {why}"),
        };
        let Some(area) = area::find(&mut disk, job.to, job.buffers.notes(), refused) else {
            return self.no_area();
        };
        let written = dump::write(machine, &mut disk, &area, job.source, job.payload, job.buffers);
        self.result = written.map_err(|error| {
            say!("disk {name}: {error}");
            Failure::Dump(error)
        });
    }

    fn refuse(&mut self, name: &dyn fmt::Display, why: &dyn fmt::Display) {
        say!("disk {name}: {why}");
        self.no_area();
    }

    /// What came closest to a dump says best why there is none.
    fn no_area(&mut self) {
        if !matches!(self.result, Err(Failure::Dump(_))) {
            self.result = Err(Failure::NoArea);
        }
    }
}
