//! Finds the disk to write to: the first one with a reserved area that fits.

use core::fmt;

use capture::Disk;
use capture::area;
use capture::dump::{self, Buffers, Complete, Payload, Source};
use capture::options::To;
use drivers::dma::DmaPool;
use drivers::pci::{self, ConfigSpace, Function};
use drivers::virtio::blk::VirtioBlk;
use drivers::virtio::pci::{PciTransport, is_block_device};

use crate::arch;
use crate::disk::ByteDisk;
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

/// Writes the dump to the first area that the job allows.
pub fn dump_to_first(
    config: &dyn ConfigSpace,
    machine: &mut ThisMachine<'_>,
    job: &mut Job<'_>,
) -> Result<Complete, Failure> {
    // Nobody shut these devices down: from here on none that is found here writes to memory.
    pci::each_function(config, &mut |at| pci::stop_bus_master(config, at));

    let pool = arch::dma_pool();
    let mut result = Err(Failure::NoDisk);
    pci::each_function(config, &mut |at| {
        if result.is_ok() || !is_block_device(pci::identity(config, at)) {
            return;
        }
        match (try_disk(config, machine, pool, at, job), &result) {
            // What came closest to a dump says best why there is none.
            (Err(Failure::NoArea), Err(Failure::Dump(_))) => {}
            (tried, _) => result = tried,
        }
        pci::stop_bus_master(config, at);
    });
    result
}

fn try_disk(
    config: &dyn ConfigSpace,
    machine: &mut ThisMachine<'_>,
    pool: &DmaPool,
    at: Function,
    job: &mut Job<'_>,
) -> Result<Complete, Failure> {
    let transport =
        PciTransport::open(config, machine.memory, &PayloadClock, at).map_err(|error| {
            say!("disk {at}: {error}");
            Failure::NoArea
        })?;
    let driver = VirtioBlk::open(transport, pool, &PayloadClock).map_err(|error| {
        say!("disk {at}: {error}");
        Failure::NoArea
    })?;
    let mut disk = ByteDisk(driver);
    say!("disk {at}: virtio-blk, {} MiB", disk.size() >> 20);

    let found =
        area::find(&mut disk, job.to, job.buffers.notes(), &mut |partition, why| match partition {
            0 => say!("disk {at}: {why}"),
            partition => say!("disk {at}, partition {partition}: {why}"),
        });
    let area = found.ok_or(Failure::NoArea)?;
    dump::write(machine, &mut disk, &area, job.source, job.payload, job.buffers).map_err(|error| {
        say!("disk {at}: {error}");
        Failure::Dump(error)
    })
}
