//! virtio SCSI host device (section 5.6), polled: finds the logical units that are attached to it,
//! and drives one of them with up to 16 commands under way.
//!
//! Of its queues only the first request queue is set up. The control queue would abort commands,
//! for which the device is reset instead; what the event queue would tell is not needed.

use core::fmt;

use heapless::Vec;

use crate::block::{self, BOUNCE_BYTES, BlockError, Geometry, Lie, Protocol, Queued, Request};
use crate::clock::{Clock, Deadline};
use crate::dma::{DmaBuffer, DmaPool};
use crate::lent::Lent;
use crate::scsi::{self, Carrier, Cdb, MAX_ANSWER, Outcome, Unusable};
use crate::virtio::queue::{self, Buffer, Queue};
use crate::virtio::{FEATURE_VERSION_1, OpenError, Transport, begin, negotiate};

/// The first request queue (section 5.6.2).
const REQUESTS: u16 = 2;

/// Offsets in the device configuration (section 5.6.4).
mod config {
    pub const MAX_SECTORS: u64 = 8;
    pub const CMD_PER_LUN: u64 = 12;
    pub const SENSE_SIZE: u64 = 20;
    pub const CDB_SIZE: u64 = 24;
    pub const MAX_TARGET: u64 = 30;
    pub const MAX_LUN: u64 = 32;
}

/// Values of `sense_size` and `cdb_size` after a reset (section 5.6.4).
const SENSE_SIZE: u32 = 96;
const CDB_SIZE: u32 = 32;

/// A request and its parts (section 5.6.6.1).
mod header {
    pub const LUN: usize = 0;
    pub const ID: usize = 8;
    pub const CDB: usize = 19;
    pub const SIZE: usize = CDB + super::CDB_SIZE as usize;
}

/// What the device answers, and its parts (likewise).
mod response {
    pub const SENSE_LEN: usize = 0;
    pub const RESIDUAL: usize = 4;
    pub const STATUS: usize = 10;
    pub const RESPONSE: usize = 11;
    pub const SENSE: usize = 12;
    pub const SIZE: usize = SENSE + super::SENSE_SIZE as usize;
}

/// Values of the response (likewise).
mod responded {
    pub const OK: u8 = 0;
    pub const ABORTED: u8 = 2;
    pub const BAD_TARGET: u8 = 3;
    pub const RESET: u8 = 4;
    pub const BUSY: u8 = 5;
    /// Before the device has written it.
    pub const UNWRITTEN: u8 = 0xff;
}

/// Most commands under way: what has room in a page.
const SLOTS: usize = 16;
/// Where request and response of a slot lie.
const SLOT: usize = 192;
const RESPONSE: usize = 64;
const _: () =
    assert!(header::SIZE <= RESPONSE && RESPONSE + response::SIZE <= SLOT && SLOT * SLOTS <= 4096);

/// Most bytes in one request.
const MAX_REQUEST: u64 = 1 << 20;

/// The unit of `max_sectors`.
const SECTOR: u64 = 512;

/// Most units of a device that are looked at.
const MAX_UNITS: usize = 64;

/// Longest time to find them. A target that is not there is denied at once.
const SCAN_US: u64 = 60_000_000;

/// Address of a logical unit.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Unit {
    /// The target that it belongs to.
    pub target: u8,
    /// Its number there, below 16384.
    pub lun: u16,
}

impl fmt::Display for Unit {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "target {} lun {}", self.target, self.lun)
    }
}

impl Unit {
    /// As the device takes it (section 5.6.6.1): 1, the target, a unit number of one level. Flat
    /// space addressing (SAM-5) for small numbers too, as Linux always has it (its
    /// drivers/scsi/virtio_scsi.c), so that is what devices are known to take.
    fn address(self) -> [u8; 8] {
        let [high, low] = self.lun.to_be_bytes();
        [1, self.target, 0x40 | high, low, 0, 0, 0, 0]
    }
}

/// The logical units that a device has.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Units {
    /// Those that were found.
    pub found: Vec<Unit, MAX_UNITS>,
    /// Whether there are more, or may be.
    pub more: bool,
}

/// Why a disk cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum ScsiError {
    /// The device that it is attached to cannot be.
    Host(OpenError),
    /// The unit itself cannot be.
    Unit(Unusable),
}

impl fmt::Display for ScsiError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            ScsiError::Host(error) => error.fmt(f),
            ScsiError::Unit(error) => error.fmt(f),
        }
    }
}

impl From<OpenError> for ScsiError {
    fn from(error: OpenError) -> ScsiError {
        ScsiError::Host(error)
    }
}

impl From<Unusable> for ScsiError {
    fn from(error: Unusable) -> ScsiError {
        ScsiError::Unit(error)
    }
}

/// Resets the device and asks every target for its units. What they are is not asked yet.
///
/// # Errors
/// [`ScsiError`] when the device cannot be used, or broke down before there was any unit.
pub fn scan<T: Transport>(
    transport: T,
    pool: &DmaPool,
    clock: &dyn Clock,
) -> Result<Units, ScsiError> {
    let mut host = Host::open(transport, pool, clock)?;
    let deadline = Deadline::after_us(clock, SCAN_US);
    let mut units = Units::default();
    let max_target = u8::try_from(host.limits.max_target).unwrap_or(u8::MAX);
    let max_lun = host.limits.max_lun;
    for target in 0..=max_target {
        if deadline.passed(clock) {
            units.more = true;
            break;
        }
        let mut carrier = At { host: &mut host, unit: Unit { target, lun: 0 } };
        let mut full = false;
        let more = scsi::report_luns(&mut carrier, clock, &mut |lun| {
            if u32::from(lun) <= max_lun {
                full |= units.found.push(Unit { target, lun }).is_err();
            }
        });
        match more {
            Ok(more) => units.more |= more || full,
            Err(error) if units.found.is_empty() => return Err(Unusable::from(error).into()),
            Err(_) => {
                units.more = true;
                break;
            }
        }
    }
    Ok(units)
}

/// A disk behind a virtio SCSI host device that was reset and set up.
pub type VirtioScsi<'a, T> = Queued<'a, Scsi<'a, T>>;

/// The language of a disk behind a virtio SCSI host device.
pub struct Scsi<'a, T: Transport> {
    host: Host<'a, T>,
    unit: Unit,
    block_size: u32,
    under_way: [Option<UnderWay>; SLOTS],
}

/// A request that was handed to the device.
#[derive(Clone, Copy)]
struct UnderWay {
    request: Request,
    /// Whether it was interrupted once already.
    again: bool,
}

impl<'a, T: Transport> VirtioScsi<'a, T> {
    /// Resets the device, and looks at one of its units.
    ///
    /// # Errors
    /// [`ScsiError`] when it cannot be written with this driver.
    pub fn open(
        transport: T,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
        unit: Unit,
    ) -> Result<VirtioScsi<'a, T>, ScsiError> {
        let mut host = Host::open(transport, pool, clock)?;
        let identity = scsi::identify(&mut At { host: &mut host, unit }, clock)?;
        let max_request = host.limits.max_request.min(identity.max_transfer) / 4096 * 4096;
        if max_request == 0 {
            return Err(OpenError::Config.into());
        }
        let geometry = Geometry {
            block_size: identity.block_size,
            blocks: identity.blocks,
            max_request,
            slots: host.limits.slots,
            // Whether it has a cache is not asked: one without says so then, or does nothing.
            has_flush: true,
        };
        let block_size = identity.block_size;
        let disk = Scsi { host, unit, block_size, under_way: [None; SLOTS] };
        Ok(Queued::new(disk, geometry, clock))
    }
}

impl<T: Transport> Scsi<'_, T> {
    fn hand_over(&mut self, slot: u16, request: Request) {
        let blocks = |size: u32| size / self.block_size;
        let (cdb, data) = match request {
            Request::Read { at, memory, size } => {
                let data = Buffer { at: memory, size, device_writes: true };
                (scsi::read(at, blocks(size)), Some(data))
            }
            Request::Write { at, memory, size } => {
                let data = Buffer { at: memory, size, device_writes: false };
                (scsi::write(at, blocks(size)), Some(data))
            }
            Request::Flush => (scsi::synchronize_cache(), None),
        };
        self.host.submit(slot, self.unit, &cdb, data);
    }
}

impl<T: Transport> Protocol for Scsi<'_, T> {
    fn bounces(&self) -> &DmaBuffer<'_> {
        &self.host.memory.bounces
    }

    fn submit(&mut self, slot: u16, request: Request) {
        if let Some(under_way) = self.under_way.get_mut(usize::from(slot)) {
            *under_way = Some(UnderWay { request, again: false });
        }
        self.hand_over(slot, request);
    }

    /// A request that was interrupted goes back to the device once, one that came too early as
    /// often as there is time.
    fn finished(&mut self) -> Result<Option<block::Finished>, Lie> {
        let Some(Answer { slot, outcome, residual }) = self.host.answer()? else {
            return Ok(None);
        };
        let under_way = self.under_way.get_mut(usize::from(slot)).and_then(Option::as_mut);
        let Some(under_way) = under_way else { return Err(Lie) };
        let request = under_way.request;
        let done = match outcome {
            Outcome::Good => residual == 0,
            Outcome::Illegal => request == Request::Flush,
            Outcome::Interrupted if !under_way.again => {
                under_way.again = true;
                self.hand_over(slot, request);
                return Ok(None);
            }
            Outcome::Busy => {
                self.hand_over(slot, request);
                return Ok(None);
            }
            // This is not the disk any more whose mark was read: nothing is written to it again.
            Outcome::MediumChanged | Outcome::Absent => return Err(Lie),
            Outcome::Interrupted | Outcome::NotReady | Outcome::Failed => false,
        };
        Ok(Some(block::Finished { slot, done }))
    }
}

/// What the device says about itself, checked.
#[derive(Clone, Copy)]
struct Limits {
    /// Most bytes in one request: not rounded yet.
    max_request: u64,
    slots: u16,
    max_target: u16,
    max_lun: u32,
}

/// A device that was reset and set up.
struct Host<'a, T: Transport> {
    memory: Lent<'a, T, Memory<'a>>,
    limits: Limits,
}

/// What the device reads and writes by itself.
struct Memory<'a> {
    queue: Queue<'a>,
    /// Requests and responses of the slots.
    commands: DmaBuffer<'a>,
    bounces: DmaBuffer<'a>,
}

/// How a command ended, and how many bytes were not transferred.
struct Answer {
    slot: u16,
    outcome: Outcome,
    residual: u32,
}

impl<'a, T: Transport> Host<'a, T> {
    fn open(
        transport: T,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
    ) -> Result<Host<'a, T>, OpenError> {
        negotiate(&transport, clock, FEATURE_VERSION_1)?;
        let limits = limits(&transport)?;
        let queue = Queue::new(pool, &transport, REQUESTS)?;
        let limits = Limits { slots: limits.slots.min(queue.slots()), ..limits };
        let commands = pool.allocate(SLOT * SLOTS).ok_or(OpenError::Memory)?;
        let bounces = pool.allocate(BOUNCE_BYTES).ok_or(OpenError::Memory)?;
        let memory = Lent::new(transport, clock, Memory { queue, commands, bounces });
        let queue = &memory.queue;
        memory.device.enable_queue(REQUESTS, queue.size(), queue.addresses())?;
        begin(&memory.device);
        Ok(Host { memory, limits })
    }

    /// Hands a command to the device. Its data comes before the response or behind it, because
    /// what the device reads comes first (section 2.7.4.2).
    fn submit(&mut self, slot: u16, unit: Unit, cdb: &Cdb, data: Option<Buffer>) {
        let at = usize::from(slot) * SLOT;
        let commands = &self.memory.commands;
        // Priority, and a task attribute that lets the unit do commands in any order, are zeros.
        commands.write_bytes(at, &[0; SLOT]);
        commands.write_bytes(at + header::LUN, &unit.address());
        commands.write(at + header::ID, u64::from(slot));
        commands.write_bytes(at + header::CDB, cdb);
        commands.write(at + RESPONSE + response::RESPONSE, responded::UNWRITTEN);
        let header = commands.phys(at);
        let header = Buffer { at: header, size: header::SIZE as u32, device_writes: false };
        let response = commands.phys(at + RESPONSE);
        let response = Buffer { at: response, size: response::SIZE as u32, device_writes: true };
        let queue = &mut self.memory.queue;
        match data {
            Some(data) if data.device_writes => queue.submit(slot, &[header, response, data]),
            Some(data) => queue.submit(slot, &[header, data, response]),
            None => queue.submit(slot, &[header, response]),
        }
        self.memory.device.notify(REQUESTS);
    }

    /// A command that ended since the last call, if any.
    fn answer(&mut self) -> Result<Option<Answer>, Lie> {
        let Some(queue::Finished { slot, .. }) = self.memory.queue.finished()? else {
            return Ok(None);
        };
        let at = usize::from(slot) * SLOT + RESPONSE;
        let commands = &self.memory.commands;
        let outcome = match commands.read(at + response::RESPONSE) {
            responded::OK => {
                let mut sense = [0; SENSE_SIZE as usize];
                commands.read_bytes(at + response::SENSE, &mut sense);
                let size: u32 = commands.read(at + response::SENSE_LEN);
                let sense = sense.get(..size as usize).unwrap_or(&sense);
                scsi::outcome(commands.read(at + response::STATUS), sense)
            }
            responded::ABORTED | responded::RESET => Outcome::Interrupted,
            responded::BUSY => Outcome::Busy,
            responded::BAD_TARGET => Outcome::Absent,
            responded::UNWRITTEN => return Err(Lie),
            _ => Outcome::Failed,
        };
        let residual = commands.read(at + response::RESIDUAL);
        Ok(Some(Answer { slot, outcome, residual }))
    }
}

/// A unit of a device that nothing else uses meanwhile.
struct At<'h, 'a, T: Transport> {
    host: &'h mut Host<'a, T>,
    unit: Unit,
}

impl<T: Transport> Carrier for At<'_, '_, T> {
    fn execute(&mut self, cdb: &Cdb, into: &mut [u8]) -> Result<Outcome, BlockError> {
        const { assert!(MAX_ANSWER <= BOUNCE_BYTES) };
        let bounces = &self.host.memory.bounces;
        bounces.write_bytes(0, &[0xff; MAX_ANSWER]);
        let size = into.len().min(MAX_ANSWER) as u32;
        let data = Buffer { at: bounces.phys(0), size, device_writes: true };
        self.host.submit(0, self.unit, cdb, (size != 0).then_some(data));
        let clock = self.host.memory.clock;
        let answer = Deadline::after_us(clock, block::REQUEST_US)
            .poll(clock, || self.host.answer().transpose())
            .map_err(|_| BlockError::Timeout)?
            .map_err(|Lie| BlockError::Protocol)?;
        self.host.memory.bounces.read_bytes(0, &mut into[..size as usize]);
        Ok(answer.outcome)
    }
}

/// Reads the configuration. What is zero there means what Linux takes it for: commands one by one,
/// and as many sectors as fit into 16 bits. How many segments a command may have does not matter:
/// its data is one.
fn limits(transport: &dyn Transport) -> Result<Limits, OpenError> {
    for (offset, size) in [(config::SENSE_SIZE, SENSE_SIZE), (config::CDB_SIZE, CDB_SIZE)] {
        // A reset restores them, by the specification.
        if transport.config32(offset) != size {
            transport.set_config32(offset, size);
        }
        if transport.config32(offset) != size {
            return Err(OpenError::Config);
        }
    }
    let sectors = match transport.config32(config::MAX_SECTORS) {
        0 => 0xffff,
        sectors => u64::from(sectors),
    };
    let commands = transport.config32(config::CMD_PER_LUN).clamp(1, SLOTS as u32);
    Ok(Limits {
        max_request: (sectors * SECTOR).min(MAX_REQUEST),
        slots: commands as u16,
        max_target: transport.config16(config::MAX_TARGET),
        max_lun: transport.config32(config::MAX_LUN),
    })
}

#[cfg(test)]
#[path = "scsi_tests.rs"]
mod tests;
