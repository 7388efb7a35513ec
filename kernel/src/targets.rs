//! Finds the disk to write to: the first one with a reserved area that fits.

use core::fmt;

use capture::area::{self, Unusable, Wanted};
use capture::dump::{self, Buffers, Complete, Payload, Source};
use capture::{Disk, DiskError, Machine};
use drivers::firmware::Firmware;
use format::area::Reason;
use spin::Mutex;

use crate::disks::{Dead, Quiet, Visitor};
use crate::memory::PhysicalMemory;
use crate::{ThisMachine, arch, say};

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

/// Writes the dump to the first area that the job allows.
pub fn dump_to_first(
    quiet: &Quiet<'_>,
    machine: &mut ThisMachine<'_>,
    job: &mut Job<'_>,
    dead: &mut Dead,
) -> Result<Complete, Failure> {
    let mut search = Search { machine, job, result: Err(Failure::NoDisk) };
    quiet.each_disk(dead, &mut search);
    search.result
}

/// The area that a dump is being written to.
static WRITING: Mutex<Option<[u8; 16]>> = Mutex::new(None);

/// Says in the area to which a dump was being written that the payload failed. Whatever wrote there is
/// never to run again.
pub fn mark_failed(firmware: &Firmware, memory: &PhysicalMemory<'_>, buffers: &mut Buffers) {
    let Some(uuid) = WRITING.try_lock().and_then(|writing| *writing) else { return };
    let quiet = Quiet::make(firmware, memory);
    // SAFETY: no device is bus master any more, and whoever had buffers never runs again.
    unsafe { arch::dma_pool().reclaim() };
    let wanted = Wanted { uuid: Some(uuid), ..Wanted::default() };
    let mut mark = Mark { wanted, scratch: buffers.notes(), done: false };
    quiet.each_disk(&mut Dead::default(), &mut mark);
}

/// The search for the area in which to say that the payload failed.
struct Mark<'a> {
    wanted: Wanted,
    scratch: &'a mut [u8],
    done: bool,
}

impl Visitor for Mark<'_> {
    fn is_over(&self) -> bool {
        self.done
    }

    fn visit(&mut self, name: &dyn fmt::Display, _: &str, disk: &mut dyn Disk) -> bool {
        let found = area::find(disk, &self.wanted, self.scratch, &mut |_, _| {});
        if let Some(area) = found.area {
            self.done = true;
            match dump::mark_failed(disk, &area) {
                Ok(()) => say!("disk {name}: the dump there is marked incomplete"),
                Err(why) => {
                    say!("disk {name}: the dump there stays marked as being written: {why}")
                }
            }
        }
        true
    }

    fn refuse(&mut self, _: &dyn fmt::Display, _: &dyn fmt::Display) {}
}

/// The search for a disk that takes the dump.
struct Search<'a, 'm, 'j> {
    machine: &'a mut ThisMachine<'m>,
    job: &'a mut Job<'j>,
    /// The dump, or what came closest to it.
    result: Result<Complete, Failure>,
}

impl Visitor for Search<'_, '_, '_> {
    fn is_over(&self) -> bool {
        self.result.is_ok() || self.machine.is_time_over()
    }

    fn visit(&mut self, name: &dyn fmt::Display, kind: &str, disk: &mut dyn Disk) -> bool {
        say!("disk {name}: {kind}, {} MiB", disk.size() >> 20);
        let mut is_dead = false;
        let refused = &mut |partition, why| {
            is_dead |= why == Unusable::Disk(DiskError::Timeout);
            match partition {
                0 => say!("disk {name}: {why}"),
                partition => say!("disk {name}, partition {partition}: {why}"),
            }
        };
        let found = area::find(disk, &self.job.wanted, self.job.buffers.notes(), refused);
        if let Some(unsaved) = found.unsaved {
            match dump::leave_card(disk, &unsaved, self.job.buffers) {
                Ok(()) => say!("disk {name}: the crash card is beside the unsaved dump"),
                Err(why) => say!("disk {name}: no crash card beside the unsaved dump: {why}"),
            }
            self.fail(Failure::Unsaved);
        }
        match found.area {
            Some(area) => {
                let Job { source, payload, .. } = *self.job;
                let buffers = &mut *self.job.buffers;
                *WRITING.lock() = Some(area.trailer.uuid);
                let written = dump::write(self.machine, disk, &area, source, payload, buffers);
                *WRITING.lock() = None;
                match written {
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
        !is_dead
    }

    fn refuse(&mut self, name: &dyn fmt::Display, why: &dyn fmt::Display) {
        say!("disk {name}: {why}");
        self.fail(Failure::NoArea);
    }
}

impl Search<'_, '_, '_> {
    /// What came closest to a dump says best why there is none.
    fn fail(&mut self, failure: Failure) {
        if self.result.as_ref().is_err_and(|before| before.rank() <= failure.rank()) {
            self.result = Err(failure);
        }
    }
}
