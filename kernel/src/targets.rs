//! Finds the disk to write to: the first one with a reserved area that fits.

use core::fmt;

use capture::area::{self, Unusable, Wanted};
use capture::dump::{self, Buffers, Complete, Payload, Source};
use capture::{Disk, DiskError, Machine};
use drivers::block::BlockDevice;
use drivers::firmware::Firmware;
use drivers::pci::{self, Function};
use drivers::virtio::Transport;
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::mmio::{self, MmioTransport};
use drivers::virtio::pci::{PciTransport, is_block_device};
use drivers::{PhysAddr, Physical};

use format::area::Reason;
use heapless::Vec;

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
    /// An area, but nobody saved the dump in it.
    Unsaved,
    /// An area, but the dump did not get there.
    Dump(dump::Error),
}

impl Failure {
    /// Its number.
    pub fn reason(&self) -> Reason {
        match self {
            Failure::NoDisk => Reason::NoDisk,
            Failure::NoArea => Reason::NoArea,
            Failure::Unsaved => Reason::Unsaved,
            Failure::Dump(error) => error.reason(),
        }
    }

    /// How close to a dump it came.
    pub fn rank(&self) -> u8 {
        match self {
            Failure::NoDisk => 0,
            Failure::NoArea => 1,
            Failure::Unsaved => 2,
            Failure::Dump(_) => 3,
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Failure::Dump(error) => error.fmt(f),
            other => f.write_str(other.reason().text()),
        }
    }
}

/// What is to be written, and where it may go.
pub struct Job<'a> {
    /// Which area.
    pub wanted: Wanted,
    /// The dead kernel's memory.
    pub source: Source<'a>,
    /// What the vendor note says of us.
    pub payload: Payload<'a>,
    /// Buffers of the dump.
    pub buffers: &'a mut Buffers,
}

/// Most disks that are remembered because they do not answer.
const MAX_DEAD: usize = 16;

/// Disks that did not answer in time: each costs its deadline once, however many targets there are.
#[derive(Default)]
pub struct Dead(Vec<Place, MAX_DEAD>);

/// Where a disk is.
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

/// Writes the dump to the first area that the job allows.
pub fn dump_to_first(
    firmware: &Firmware,
    machine: &mut ThisMachine<'_>,
    job: &mut Job<'_>,
    dead: &mut Dead,
) -> Result<Complete, Failure> {
    let memory = machine.memory;
    let mut search = Search { result: Err(Failure::NoDisk), dead };
    arch::pci::each_config_space(firmware, memory, &mut |config| {
        pci::each_function(config, &mut |at| {
            let place = Place::Pci(at);
            if !search.is_over(machine, place) && is_block_device(pci::identity(config, at)) {
                let transport = PciTransport::open(config, memory, &PayloadClock, at);
                search.try_virtio_blk(machine, place, transport, job);
                pci::stop_bus_master(config, at);
            }
        });
    });
    for &at in &firmware.virtio_mmio {
        let place = Place::Mmio(at);
        if search.is_over(machine, place) {
            continue;
        }
        if memory.with_registers(at, mmio::SIZE, mmio::is_block_device) == Some(true) {
            let registers = memory.map_device(at, mmio::SIZE);
            let transport = registers.and_then(MmioTransport::open);
            let transport = transport.ok_or("its registers cannot be mapped");
            search.try_virtio_blk(machine, place, transport, job);
        }
    }
    search.result
}

/// The search for a disk that takes the dump.
struct Search<'a> {
    /// The dump, or what came closest to it.
    result: Result<Complete, Failure>,
    dead: &'a mut Dead,
}

impl Search<'_> {
    /// Whether a disk at `place` is not to be tried: the dump is written, the time is over, or it is
    /// dead.
    fn is_over(&self, machine: &ThisMachine<'_>, place: Place) -> bool {
        self.result.is_ok() || machine.is_time_over() || self.dead.0.contains(&place)
    }

    fn try_virtio_blk<T: Transport>(
        &mut self,
        machine: &mut ThisMachine<'_>,
        place: Place,
        transport: Result<T, impl fmt::Display>,
        job: &mut Job<'_>,
    ) {
        match transport {
            Ok(transport) => {
                let disk = VirtioBlk::open(transport, arch::dma_pool(), &PayloadClock);
                self.try_disk(machine, (place, &place), "virtio-blk", disk, job);
            }
            Err(why) => self.refuse((place, &place), &why),
        }
    }

    /// Tries a disk, or says why it cannot be used.
    fn try_disk<D: BlockDevice>(
        &mut self,
        machine: &mut ThisMachine<'_>,
        (place, name): (Place, &dyn fmt::Display),
        kind: &str,
        disk: Result<D, impl fmt::Display>,
        job: &mut Job<'_>,
    ) {
        let disk = match disk {
            Ok(disk) => disk,
            Err(why) => return self.refuse((place, name), &why),
        };
        let mut disk = ByteDisk(disk);
        say!("disk {name}: {kind}, {} MiB", disk.size() >> 20);
        let mut is_dead = false;
        let refused = &mut |partition, why| {
            is_dead |= why == Unusable::Disk(DiskError::Timeout);
            match partition {
                0 => say!("disk {name}: {why}"),
                partition => say!("disk {name}, partition {partition}: {why}"),
            }
        };
        let found = area::find(&mut disk, &job.wanted, job.buffers.notes(), refused);
        if let Some(unsaved) = found.unsaved {
            match dump::leave_card(&mut disk, &unsaved, job.buffers) {
                Ok(()) => say!("disk {name}: the crash card is beside the unsaved dump"),
                Err(why) => say!("disk {name}: no crash card beside the unsaved dump: {why}"),
            }
            self.fail(Failure::Unsaved);
        }
        match found.area {
            Some(area) => {
                let Job { source, payload, .. } = *job;
                match dump::write(machine, &mut disk, &area, source, payload, job.buffers) {
                    Ok(complete) => self.result = Ok(complete),
                    Err(error) => {
                        is_dead |= error == dump::Error::Disk(DiskError::Timeout);
                        say!("disk {name}: {error}");
                        self.fail(Failure::Dump(error));
                    }
                }
            }
            None => self.fail(Failure::NoArea),
        }
        if is_dead {
            let _ = self.dead.0.push(place);
        }
    }

    fn refuse(&mut self, (place, name): (Place, &dyn fmt::Display), why: &dyn fmt::Display) {
        say!("disk {name}: {why}");
        self.fail(Failure::NoArea);
        // Whatever it was, it will be so again.
        let _ = self.dead.0.push(place);
    }

    /// What came closest to a dump says best why there is none.
    fn fail(&mut self, failure: Failure) {
        if self.result.as_ref().is_err_and(|before| before.rank() <= failure.rank()) {
            self.result = Err(failure);
        }
    }
}
