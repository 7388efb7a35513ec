//! NVMe: controllers, and their namespaces as disks, polled.
//!
//! A controller is reset before use and after it; each namespace is opened after a reset of its own, so that
//! nothing of what went wrong with one is left for the next.
//!
//! Source: NVM Express Base Specification 1.4; section numbers are of that document.

mod command;
mod queue;

use heapless::Vec;

use crate::Physical;
use crate::block::{
    BOUNCE_BYTES, Finished, Geometry, Lie, Protocol, Queued, Request as BlockRequest,
};
use crate::clock::{Clock, Deadline, TimedOut};
use crate::dma::{DmaBuffer, DmaPool};
use crate::lent::{Lent, Reset};
use crate::mmio::{Mmio, Registers};
use crate::pci::{self, BarError, ConfigSpace, Function, Identity};
use command::{Command, MAX_REQUEST, PRP_LIST};
use queue::Pair;

/// Registers (3.1).
mod register {
    pub const CAP: u64 = 0x00;
    pub const VS: u64 = 0x08;
    pub const INTMS: u64 = 0x0c;
    pub const CC: u64 = 0x14;
    pub const CSTS: u64 = 0x1c;
    pub const AQA: u64 = 0x24;
    pub const ASQ: u64 = 0x28;
    pub const ACQ: u64 = 0x30;
    pub const DOORBELLS: u64 = 0x1000;
}

/// Controller configuration (3.1.5): entries of 64 and 16 bytes, pages of 4 KiB, the NVM command set.
const CC_ENABLE: u32 = 1;
const CC_ENTRY_SIZES: u32 = 6 << 16 | 4 << 20;

/// Controller status (3.1.6).
const CSTS_READY: u32 = 1;
const CSTS_FATAL: u32 = 1 << 1;

/// The first version with a list of active namespaces: 1.1 (3.1.2).
const VERSION_1_1: u32 = 0x0001_0100;

/// The number that means every namespace (6.1.2).
const ALL_NAMESPACES: u32 = u32::MAX;

/// Unit of the time that a controller claims for getting ready, in microseconds (3.1.1, CAP.TO).
const TIMEOUT_UNIT_US: u64 = 500_000;

/// Longest wait for an administrative command.
const ADMIN_US: u64 = 5_000_000;

/// Entries of the administrative queues, and most of those for reading and writing.
const ADMIN_ENTRIES: u16 = 16;
const MAX_ENTRIES: u16 = 32;

/// Requests under way at once.
const MAX_SLOTS: u16 = 16;

/// Larger steps between doorbells (CAP.DSTRD) than this only emulated controllers may have.
const MAX_STRIDE: u32 = 8;

/// Most namespaces of a controller that are looked at.
pub const MAX_NAMESPACES: usize = 64;

/// Size of a page, which queues and what is identified take.
const PAGE: usize = 4096;

/// Whether it is an NVMe controller, by its class.
#[must_use]
pub fn is_controller(identity: Identity) -> bool {
    identity.class == 0x0108 && identity.interface == 2
}

/// How many bytes of registers the controller has that are used, by the first of them. `None` when it is
/// gone, or its doorbells are farther apart than any known controller's.
fn registers_size(registers: &dyn Registers) -> Option<u64> {
    let high = registers.read32(register::CAP + 4);
    let stride = high & 0xf;
    let doorbells = (4 * 4) << stride;
    (high != u32::MAX && stride <= MAX_STRIDE).then_some(register::DOORBELLS + doorbells)
}

/// Maps the registers of the controller at `at`, which is no bus master then, and sends no interrupts as
/// messages: while it may, its interrupt mask is not to be touched (3.1.3), and completions of the
/// administrative queue would raise them.
///
/// # Errors
/// [`Unreachable`]
pub fn map(
    config: &dyn ConfigSpace,
    physical: &dyn Physical,
    at: Function,
) -> Result<Mmio, Unreachable> {
    let map = |size| pci::map_bar(config, physical, at, 0, 0, size).map_err(Unreachable::Bar);
    // Before its memory is decoded: it may have none yet.
    pci::stop_bus_master(config, at);
    pci::stop_messages(config, at);
    let first = map(register::DOORBELLS)?;
    pci::enable(config, at, false);
    map(registers_size(&first).ok_or(Unreachable::Gone)?)
}

/// Why the registers of a controller cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unreachable {
    /// They are where the processor does not reach them.
    Bar(BarError),
    /// They say nothing that makes sense.
    Gone,
}

impl core::fmt::Display for Unreachable {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            Unreachable::Bar(error) => error.fmt(f),
            Unreachable::Gone => f.write_str("does not answer"),
        }
    }
}

/// Why a controller or a namespace cannot be used.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum OpenError {
    /// It does not stop, does not get ready, or is gone.
    Reset,
    /// It cannot do what every NVMe disk can: pages of 4 KiB, the NVM command set.
    Capabilities,
    /// It does not answer an administrative command.
    Timeout,
    /// It refused an administrative command: the status (4.6.1), without phase and "more".
    Refused(u16),
    /// It gave back what it never was given.
    Protocol,
    /// The namespace has blocks that are not of 512 to 4096 bytes, or metadata in them.
    Format,
    /// The namespace cannot be written.
    ReadOnly,
    /// No DMA memory is left.
    Memory,
}

impl core::fmt::Display for OpenError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            OpenError::Reset => "does not get ready",
            OpenError::Capabilities => "cannot do what an NVMe disk can",
            OpenError::Timeout => "does not answer",
            OpenError::Refused(status) => {
                return write!(f, "refuses a command, status {status:#x}");
            }
            OpenError::Protocol => "broke its protocol",
            OpenError::Format => "has blocks of a kind that this payload does not write",
            OpenError::ReadOnly => "is read-only",
            OpenError::Memory => "no DMA memory is left for it",
        })
    }
}

/// The controller's registers.
struct Device<'r> {
    registers: &'r dyn Registers,
    /// Between two doorbells, as a power of two of 4 bytes.
    stride: u32,
    /// Longest wait until it is ready, or not, in microseconds.
    ready_us: u64,
}

impl Device<'_> {
    fn ring(&self, doorbell: u16, value: u16) {
        let at = register::DOORBELLS + ((u64::from(doorbell) * 4) << self.stride);
        self.registers.write32(at, value.into());
    }

    /// Waits until the controller is ready, or is not.
    fn wait_ready(&self, clock: &dyn Clock, ready: bool) -> Result<(), TimedOut> {
        let status = Deadline::after_us(clock, self.ready_us).poll(clock, || {
            let status = self.registers.read32(register::CSTS);
            let is_gone = status == u32::MAX;
            let is_dead = ready && status & CSTS_FATAL != 0;
            (is_gone || is_dead || ready == (status & CSTS_READY != 0)).then_some(status)
        })?;
        if status == u32::MAX || ready && status & CSTS_FATAL != 0 { Err(TimedOut) } else { Ok(()) }
    }
}

impl Reset for Device<'_> {
    /// Stops the controller at once. A shutdown, which would flush first, is none of ours: what the dead
    /// kernel wrote is its own business (7.6.2), and ours was flushed.
    fn reset(&self, clock: &dyn Clock) -> Result<(), TimedOut> {
        let configuration = self.registers.read32(register::CC);
        self.registers.write32(register::CC, configuration & !CC_ENABLE);
        self.wait_ready(clock, false)
    }
}

/// What the controller reads and writes by itself.
struct Memory<'a> {
    admin: Pair<'a>,
    io: Pair<'a>,
    prp_lists: DmaBuffer<'a>,
    bounces: DmaBuffer<'a>,
}

/// A controller that runs.
struct Controller<'a, 'r> {
    memory: Lent<'a, Device<'r>, Memory<'a>>,
    /// Most bytes in a request, as far as the controller goes.
    max_request: u64,
    has_cache: bool,
    /// Namespaces that it may have.
    namespaces: u32,
}

impl<'a, 'r> Controller<'a, 'r> {
    /// Stops the controller and sets it up. It must not be bus master before; `go` makes it one, once it
    /// has certainly stopped.
    fn open(
        registers: &'r dyn Registers,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
        go: &dyn Fn(),
    ) -> Result<Controller<'a, 'r>, OpenError> {
        let [low, high] = [0, 4].map(|half| registers.read32(register::CAP + half));
        if (low, high) == (u32::MAX, u32::MAX) {
            return Err(OpenError::Reset);
        }
        let ready_us = (u64::from(low >> 24) + 1) * TIMEOUT_UNIT_US;
        let device = Device { registers, stride: high & 0xf, ready_us };
        if registers.read32(register::CC) & CC_ENABLE != 0 {
            // What one does that is stopped while it gets ready is undefined (3.1.5). One that never gets
            // ready is stopped all the same.
            let _ = device.wait_ready(clock, true);
        }
        device.reset(clock).map_err(|TimedOut| OpenError::Reset)?;
        // CAP.CSS has the NVM command set, CAP.MPSMIN is 4 KiB, CAP.MQES is one less than it says.
        let (sets, smallest_page) = (high >> 5 & 0xff, high >> 16 & 0xf);
        let entries = (low as u16).saturating_add(1).min(MAX_ENTRIES);
        if sets & 1 == 0 || smallest_page != 0 || device.stride > MAX_STRIDE || entries < 2 {
            return Err(OpenError::Capabilities);
        }
        let memory = Memory {
            admin: Pair::new(pool, ADMIN_ENTRIES).ok_or(OpenError::Memory)?,
            io: Pair::new(pool, entries).ok_or(OpenError::Memory)?,
            prp_lists: pool.allocate(PRP_LIST * usize::from(MAX_SLOTS)).ok_or(OpenError::Memory)?,
            bounces: pool.allocate(BOUNCE_BYTES).ok_or(OpenError::Memory)?,
        };
        go();
        let memory = Lent::new(device, clock, memory);
        let mut controller =
            Controller { memory, max_request: MAX_REQUEST, has_cache: true, namespaces: 0 };
        controller.start()?;
        controller.identify()?;
        controller.make_queues()?;
        Ok(controller)
    }

    /// Tells the controller where its administrative queues are, and lets it run (7.6.1).
    fn start(&mut self) -> Result<(), OpenError> {
        let Device { registers, .. } = self.memory.device;
        let last = u32::from(ADMIN_ENTRIES - 1);
        registers.write32(register::INTMS, u32::MAX);
        registers.write32(register::AQA, last << 16 | last);
        let (submissions, completions) = self.memory.admin.addresses();
        registers.write64_halves(register::ASQ, submissions.0);
        registers.write64_halves(register::ACQ, completions.0);
        registers.write32(register::CC, CC_ENTRY_SIZES | CC_ENABLE);
        self.memory.device.wait_ready(self.memory.clock, true).map_err(|TimedOut| OpenError::Reset)
    }

    /// Takes what matters of the controller's description (5.15.2.2).
    fn identify(&mut self) -> Result<(), OpenError> {
        self.admin(Command::identify(command::CONTROLLER, 0))?;
        let data = &self.memory.bounces;
        let [transfer, cache] = [77, 525].map(|at| data.read::<u8>(at));
        self.max_request = largest_request(transfer);
        self.has_cache = cache & 1 != 0;
        self.namespaces = data.read(516);
        Ok(())
    }

    /// Makes the queues for reading and writing: completions first (5.3, 5.4).
    fn make_queues(&mut self) -> Result<(), OpenError> {
        // One of each (5.21.1.7).
        self.admin(Command::set_queue_count())?;
        let (submissions, completions) = self.memory.io.addresses();
        let entries = self.memory.io.entries();
        self.admin(Command::create_completion_queue(completions, entries))?;
        self.admin(Command::create_submission_queue(submissions, entries))
    }

    /// Does an administrative command, with the first page of the bounce buffers for its data.
    fn admin(&mut self, command: Command) -> Result<(), OpenError> {
        let command = command.with_page(self.memory.bounces.phys(0));
        let tail = self.memory.admin.submit(&command.with_id(0));
        self.memory.device.ring(0, tail);
        let clock = self.memory.clock;
        let deadline = Deadline::after_us(clock, ADMIN_US);
        loop {
            let passed = deadline.passed(clock);
            if let Some(done) = self.memory.admin.completed() {
                self.memory.device.ring(1, done.head);
                return match done {
                    queue::Completed { queue: 0, id: 0, status: 0, .. } => Ok(()),
                    queue::Completed { queue: 0, id: 0, status, .. } => {
                        Err(OpenError::Refused(status))
                    }
                    _ => Err(OpenError::Protocol),
                };
            }
            if passed {
                return Err(OpenError::Timeout);
            }
            core::hint::spin_loop();
        }
    }
}

/// Most bytes in a request to a controller whose largest transfer (MDTS, 5.15.2.2) is this: a power of two
/// of its smallest page, or 0 for any.
fn largest_request(transfer: u8) -> u64 {
    if transfer == 0 {
        return MAX_REQUEST;
    }
    // Bounded before it is shifted: shifted out of the word it would be a request of nothing, without end.
    ((PAGE as u64) << transfer.min(16)).min(MAX_REQUEST)
}

/// Finds the active namespaces of a controller, as many as are looked at. `go` makes it bus master.
///
/// # Errors
/// [`OpenError`] when the controller cannot be used.
pub fn scan(
    registers: &dyn Registers,
    pool: &DmaPool,
    clock: &dyn Clock,
    go: &dyn Fn(),
) -> Result<Vec<u32, MAX_NAMESPACES>, OpenError> {
    let mut controller = Controller::open(registers, pool, clock, go)?;
    // A controller of version 1.0 takes the question for another one.
    if registers.read32(register::VS) >= VERSION_1_1 {
        match controller.admin(Command::identify(command::ACTIVE_NAMESPACES, 0)) {
            Ok(()) => {
                let data = &controller.memory.bounces;
                let ids = (0..MAX_NAMESPACES).map(|index| data.read::<u32>(index * 4));
                return Ok(ids.take_while(|&id| id != 0 && id != ALL_NAMESPACES).collect());
            }
            Err(OpenError::Refused(_)) => {}
            Err(error) => return Err(error),
        }
    }
    // Without a list any number may be one.
    Ok((1..=controller.namespaces).take(MAX_NAMESPACES).collect())
}

/// A namespace of a controller, as a disk.
pub type Nvme<'a, 'r> = Queued<'a, Namespace<'a, 'r>>;

/// The language of namespaces.
pub struct Namespace<'a, 'r> {
    controller: Controller<'a, 'r>,
    id: u32,
    block_size: u32,
}

impl<'a, 'r> Nvme<'a, 'r> {
    /// Resets the controller behind `registers` and sets it up for its namespace `id`. `go` makes it bus
    /// master.
    ///
    /// # Errors
    /// [`OpenError`] when it cannot be written with this driver.
    pub fn open(
        registers: &'r dyn Registers,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
        go: &dyn Fn(),
        id: u32,
    ) -> Result<Nvme<'a, 'r>, OpenError> {
        let mut controller = Controller::open(registers, pool, clock, go)?;
        controller.admin(Command::identify(command::NAMESPACE, id))?;
        // 5.15.2.1: size, current format, attributes, and formats of 4 bytes each.
        let data = &controller.memory.bounces;
        let blocks: u64 = data.read(0);
        let [format, attributes] = [26, 99].map(|at| data.read::<u8>(at));
        let format = usize::from(format & 0xf | format >> 1 & 0x30);
        let [metadata_low, metadata_high, shift, _]: [u8; 4] = data.read(128 + 4 * format);
        if attributes & 1 != 0 {
            return Err(OpenError::ReadOnly);
        }
        if !(9..=12).contains(&shift) || (metadata_low, metadata_high) != (0, 0) {
            return Err(OpenError::Format);
        }
        let block_size = 1 << shift;
        if blocks > u64::MAX / u64::from(block_size) {
            return Err(OpenError::Format);
        }
        let geometry = Geometry {
            block_size,
            blocks,
            max_request: controller.max_request,
            // A queue with all entries taken would look empty.
            slots: MAX_SLOTS.min(controller.memory.io.entries() - 1),
            has_flush: controller.has_cache,
        };
        Ok(Queued::new(Namespace { controller, id, block_size }, geometry, clock))
    }
}

impl Protocol for Namespace<'_, '_> {
    fn bounces(&self) -> &DmaBuffer<'_> {
        &self.controller.memory.bounces
    }

    fn submit(&mut self, slot: u16, request: BlockRequest) {
        let memory = &mut *self.controller.memory;
        let lists = (&memory.prp_lists, usize::from(slot) * PRP_LIST);
        let command = Command::of(request, (self.id, self.block_size), lists).with_id(slot);
        let tail = memory.io.submit(&command);
        self.controller.memory.device.ring(2, tail);
    }

    fn finished(&mut self) -> Result<Option<Finished>, Lie> {
        let Some(done) = self.controller.memory.io.completed() else { return Ok(None) };
        self.controller.memory.device.ring(3, done.head);
        if done.queue != 1 {
            return Err(Lie);
        }
        Ok(Some(Finished { slot: done.id, done: done.status == 0 }))
    }
}

#[cfg(test)]
mod fake;
#[cfg(test)]
mod tests;
