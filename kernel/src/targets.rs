//! Finds the disk to write to: the first one with a reserved area that fits.

use core::fmt;

use capture::area::{self, Found, Unusable, Uuid, Wanted};
use capture::dump::{self, Buffers, Complete, Payload, Source};
use capture::file::FileDisk;
use capture::{Disk, DiskError, Machine};
use drivers::firmware::Firmware;
use format::BLOCK;
use format::area::Reason;
use format::handoff::Handoff;
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
    /// Files that are areas.
    pub handoff: Option<&'a Handoff<'a>>,
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
pub fn mark_failed(
    firmware: &Firmware,
    memory: &PhysicalMemory<'_>,
    handoff: Option<&Handoff<'_>>,
    buffers: &mut Buffers,
) {
    let Some(uuid) = WRITING.try_lock().and_then(|writing| *writing) else { return };
    let quiet = Quiet::make(firmware, memory);
    // SAFETY: no device is bus master any more, and whoever had buffers never runs again.
    unsafe { arch::dma_pool().reclaim() };
    let wanted = Wanted { uuid: Some(uuid), ..Wanted::default() };
    let mut mark = Mark { wanted, handoff, scratch: buffers.notes(), done: false };
    quiet.each_disk(&mut Dead::default(), &mut mark);
}

/// The search for the area in which to say that the payload failed.
struct Mark<'a> {
    wanted: Wanted,
    handoff: Option<&'a Handoff<'a>>,
    scratch: &'a mut [u8],
    done: bool,
}

impl Visitor for Mark<'_> {
    fn is_over(&self) -> bool {
        self.done
    }

    fn visit(&mut self, name: &dyn fmt::Display, _: &str, disk: &mut dyn Disk) -> bool {
        let found = area::find(disk, &self.wanted, self.scratch, &mut |_, _| {});
        self.mark(name, disk, found);
        each_file(self.handoff, disk, &mut |file| {
            if !self.done {
                let block = &mut self.scratch[..BLOCK as usize];
                let (found, _) = area::find_in_file(file, &self.wanted, block);
                self.mark(name, file, found);
            }
        });
        true
    }

    fn refuse(&mut self, _: &dyn fmt::Display, _: &dyn fmt::Display) {}
}

impl Mark<'_> {
    fn mark(&mut self, name: &dyn fmt::Display, disk: &mut dyn Disk, found: Found) {
        // That it was begun makes the dump in a file one that is to be saved.
        let Some(area) = found.area.or(found.unsaved) else { return };
        self.done = true;
        match dump::mark_failed(disk, &area) {
            Ok(()) => say!("disk {name}: the dump there is marked incomplete"),
            Err(why) => {
                say!("disk {name}: the dump there stays marked as being written: {why}")
            }
        }
    }
}

/// Shows each file that may be on `disk` as a disk of its own.
fn each_file(
    handoff: Option<&Handoff<'_>>,
    disk: &mut dyn Disk,
    each: &mut dyn FnMut(&mut FileDisk<'_>),
) {
    let Some(handoff) = handoff else { return };
    for file in handoff.files() {
        if let Some(mut file) = FileDisk::new(disk, handoff, file) {
            each(&mut file);
        }
    }
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
        is_dead |= self.write_to(name, disk, found);
        each_file(self.job.handoff, disk, &mut |file| {
            if is_dead || self.is_over() {
                return;
            }
            let block = &mut self.job.buffers.notes()[..BLOCK as usize];
            let (found, result) = area::find_in_file(file, &self.job.wanted, block);
            if let Err(why) = result {
                is_dead = why == Unusable::Disk(DiskError::Timeout);
                say!("disk {name}, file {}: {why}", Uuid(&file.file().uuid));
            }
            is_dead |= self.write_to(name, file, found);
        });
        !is_dead
    }

    fn refuse(&mut self, name: &dyn fmt::Display, why: &dyn fmt::Display) {
        say!("disk {name}: {why}");
        self.fail(Failure::NoArea);
    }
}

impl Search<'_, '_, '_> {
    /// Writes what may be written to what was found on a disk. Returns whether it fell silent.
    fn write_to(&mut self, name: &dyn fmt::Display, disk: &mut dyn Disk, found: Found) -> bool {
        if let Some(unsaved) = found.unsaved {
            match dump::leave_card(disk, &unsaved, self.job.buffers) {
                Ok(()) => say!("disk {name}: the crash card is beside the unsaved dump"),
                Err(why) => say!("disk {name}: no crash card beside the unsaved dump: {why}"),
            }
            self.fail(Failure::Unsaved);
        }
        let Some(area) = found.area else {
            self.fail(Failure::NoArea);
            return false;
        };
        let Job { source, payload, .. } = *self.job;
        let buffers = &mut *self.job.buffers;
        *WRITING.lock() = Some(area.trailer.uuid);
        let written = dump::write(self.machine, disk, &area, source, payload, buffers);
        *WRITING.lock() = None;
        match written {
            Ok(complete) => {
                self.result = Ok(complete);
                false
            }
            Err(error) => {
                say!("disk {name}: {error}");
                self.fail(Failure::Dump(error));
                error == dump::Error::Disk(DiskError::Timeout)
            }
        }
    }

    /// What came closest to a dump says best why there is none.
    fn fail(&mut self, failure: Failure) {
        if self.result.as_ref().is_err_and(|before| before.rank() <= failure.rank()) {
            self.result = Err(failure);
        }
    }
}
