//! A SATA disk on a port of an AHCI controller.

use crate::PhysAddr;
use crate::ahci::identify::{IDENTIFY_BYTES, Identity};
use crate::ahci::port::{self, FATAL, Port, status};
use crate::ahci::{Controller, OpenError, capability};
use crate::block::{
    BOUNCE_BYTES, Finished, Geometry, Lba, Lie, MAX_SLOTS, Protocol, Queued, Request,
};
use crate::clock::{Clock, Deadline, TimedOut};
use crate::dma::{DmaBuffer, DmaPool};
use crate::lent::{Lent, Reset};
use crate::mmio::Registers;

/// Commands (ATA8-ACS 7; the queued ones Serial ATA Revision 3.0, 13.6.4 and 13.6.5).
mod code {
    pub const READ_DMA_EXT: u8 = 0x25;
    pub const WRITE_DMA_EXT: u8 = 0x35;
    pub const READ_FPDMA_QUEUED: u8 = 0x60;
    pub const WRITE_FPDMA_QUEUED: u8 = 0x61;
    pub const FLUSH_CACHE_EXT: u8 = 0xea;
    pub const IDENTIFY_DEVICE: u8 = 0xec;
}

/// Most bytes in one request: one entry of the table of regions, which holds 4 MiB (section 4.2.3.3),
/// and as many sectors as a command counts.
const MAX_REQUEST: u64 = 1 << 20;

/// Longest wait for the answer to IDENTIFY DEVICE.
const IDENTIFY_US: u64 = 5_000_000;

/// What lies where in the port's memory: the command list (section 4.2.2), what the disk says (section
/// 4.2.1), and a command table for every slot (section 4.2.3), each aligned as it must be.
const HEADER: usize = 32;
const RECEIVED: usize = HEADER * MAX_SLOTS as usize;
const TABLES: usize = 2048;
const TABLE: usize = 256;
const COMMAND_BYTES: usize = TABLES + TABLE * MAX_SLOTS as usize;
/// The regions of memory within a command table.
const REGIONS: usize = 0x80;

/// A register FIS from the host, with a command in it (Serial ATA Revision 3.0, 10.3.4).
const FIS_BYTES: usize = 20;
const FIS_TYPE: u8 = 0x27;
const FIS_IS_COMMAND: u8 = 1 << 7;
/// The device register: the address is one of a sector.
const DEVICE_LBA: u8 = 1 << 6;

/// A command header's first word (section 4.2.2): the FIS' length in words, whether the disk gets
/// data, and how many regions of memory there are.
const HEADER_FIS_WORDS: u32 = FIS_BYTES as u32 / 4;
const HEADER_WRITE: u32 = 1 << 6;
const HEADER_REGIONS_SHIFT: u32 = 16;

/// A disk that was reset and set up.
pub type AhciDisk<'a, R> = Queued<'a, Ata<'a, R>>;

/// The language of SATA disks behind AHCI.
pub struct Ata<'a, R: Registers> {
    memory: Lent<'a, Port<'a, R>, Memory<'a>>,
    /// Sector size in bytes, a power of two.
    block_size: u32,
    /// Whether reads and writes are queued.
    queues: bool,
    /// Slots with something under way, as bits; then those that are to be told of.
    under_way: u32,
    done: u32,
    failed: u32,
    /// The port could not be started again, or is gone: what is under way stays so.
    is_dead: bool,
}

/// What the controller reads and writes by itself.
struct Memory<'a> {
    commands: DmaBuffer<'a>,
    bounces: DmaBuffer<'a>,
}

/// A command and where its data goes.
struct Command {
    code: u8,
    features: u16,
    at: Lba,
    count: u16,
    /// Where, and how many bytes.
    data: Option<(PhysAddr, u32)>,
    is_write: bool,
    is_queued: bool,
}

impl Command {
    /// A command without data.
    fn new(code: u8) -> Command {
        let data = None;
        Command { code, features: 0, at: Lba(0), count: 0, data, is_write: false, is_queued: false }
    }

    fn fis(&self) -> [u8; FIS_BYTES] {
        let at = self.at.0.to_le_bytes();
        let (features, count) = (self.features.to_le_bytes(), self.count.to_le_bytes());
        let mut fis = [0; FIS_BYTES];
        fis[..4].copy_from_slice(&[FIS_TYPE, FIS_IS_COMMAND, self.code, features[0]]);
        fis[4..8].copy_from_slice(&[at[0], at[1], at[2], DEVICE_LBA]);
        fis[8..12].copy_from_slice(&[at[3], at[4], at[5], features[1]]);
        fis[12..14].copy_from_slice(&count);
        fis
    }
}

impl<'a, R: Registers> AhciDisk<'a, R> {
    /// Sets up the disk on `port` of a controller that was reset.
    ///
    /// # Errors
    /// [`OpenError::NoDisk`] when there is none; others when there is one that cannot be written with
    /// this driver.
    pub fn open(
        controller: &'a Controller<R>,
        port: u8,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
    ) -> Result<AhciDisk<'a, R>, OpenError> {
        let port = Port::new(controller, port);
        port.wait_for_link(clock)?;
        port.stop(clock).map_err(|TimedOut| OpenError::Stop)?;
        let commands = pool.allocate(COMMAND_BYTES).ok_or(OpenError::Memory)?;
        let bounces = pool.allocate(BOUNCE_BYTES).ok_or(OpenError::Memory)?;
        let reached =
            |buffer: &DmaBuffer<'_>| controller.reaches(buffer.phys(0), buffer.size() as u64);
        if !reached(&commands) || !reached(&bounces) {
            return Err(OpenError::Memory);
        }
        let memory = Lent::new(port, clock, Memory { commands, bounces });
        let mut ata = Ata {
            memory,
            block_size: 512,
            queues: false,
            under_way: 0,
            done: 0,
            failed: 0,
            is_dead: false,
        };
        ata.start()?;
        let identity = ata.identify(clock)?;
        ata.block_size = identity.block_size;
        let depth =
            identity.queue_depth.filter(|_| controller.has(capability::NATIVE_COMMAND_QUEUING));
        ata.queues = depth.is_some();
        let geometry = Geometry {
            block_size: identity.block_size,
            blocks: identity.blocks,
            max_request: MAX_REQUEST,
            slots: depth.unwrap_or(1).min(controller.slots()),
            has_flush: identity.has_flush,
        };
        Ok(Queued::new(ata, geometry, clock))
    }
}

impl<R: Registers> Ata<'_, R> {
    /// Starts the stopped port, with a disk that was reset.
    fn start(&self) -> Result<(), OpenError> {
        let (port, commands) = (&self.memory.device, &self.memory.commands);
        port.receive(commands.phys(0), commands.phys(RECEIVED));
        port.wait_until_ready(self.memory.clock)?;
        if !port.is_disk() {
            return Err(OpenError::NoDisk);
        }
        port.start();
        Ok(())
    }

    /// Asks the disk what it is (ATA8-ACS 7.16).
    fn identify(&mut self, clock: &dyn Clock) -> Result<Identity, OpenError> {
        let data = Some((self.memory.bounces.phys(0), IDENTIFY_BYTES as u32));
        self.issue(0, &Command { data, ..Command::new(code::IDENTIFY_DEVICE) });
        let finished =
            Deadline::after_us(clock, IDENTIFY_US).poll(clock, || self.finished().transpose());
        match finished {
            Ok(Ok(Finished { slot: 0, done: true })) => {
                let mut data = [0; IDENTIFY_BYTES];
                self.memory.bounces.read_bytes(0, &mut data);
                Identity::parse(&data)
            }
            _ => Err(OpenError::Identify),
        }
    }

    fn transfer(&self, slot: u16, at: Lba, data: (PhysAddr, u32), is_write: bool) -> Command {
        let sectors = (data.1 / self.block_size) as u16;
        let data = Some(data);
        if self.queues {
            let code = if is_write { code::WRITE_FPDMA_QUEUED } else { code::READ_FPDMA_QUEUED };
            // The count is in the features, and the tag, the slot, where the count would be.
            let (features, count) = (sectors, slot << 3);
            Command { code, features, at, count, data, is_write, is_queued: true }
        } else {
            let code = if is_write { code::WRITE_DMA_EXT } else { code::READ_DMA_EXT };
            Command { at, count: sectors, data, is_write, ..Command::new(code) }
        }
    }

    /// Hands a command to the controller (section 5.5.1).
    fn issue(&mut self, slot: u16, command: &Command) {
        let (port, commands) = (&self.memory.device, &self.memory.commands);
        let table = TABLES + TABLE * usize::from(slot);
        commands.write_bytes(table, &command.fis());
        if let Some((PhysAddr(memory), size)) = command.data {
            commands.write(table + REGIONS, memory);
            commands.write(table + REGIONS + 8, 0u32);
            commands.write(table + REGIONS + 12, size.saturating_sub(1));
        }
        let write = if command.is_write { HEADER_WRITE } else { 0 };
        let regions = u32::from(command.data.is_some()) << HEADER_REGIONS_SHIFT;
        let header = HEADER * usize::from(slot);
        commands.write(header, HEADER_FIS_WORDS | write | regions);
        commands.write(header + 4, 0u32);
        commands.write(header + 8, commands.phys(table).0);
        // The controller must see the command before the bit that announces it.
        commands.order();
        let bit = 1 << slot;
        self.under_way |= bit;
        if self.is_dead {
            return;
        }
        if command.is_queued {
            port.write(port::at::SATA_ACTIVE, bit);
        }
        port.write(port::at::COMMAND_ISSUE, bit);
    }

    /// A request whose end is known and was not told yet.
    fn tell(&mut self) -> Option<Finished> {
        let done = self.done != 0;
        let slots = if done { &mut self.done } else { &mut self.failed };
        let slot = (*slots != 0).then(|| slots.trailing_zeros() as u16)?;
        *slots &= !(1 << slot);
        Some(Finished { slot, done })
    }

    /// Looks at the port for requests that have ended.
    fn look(&mut self) -> Result<(), Lie> {
        let port = &self.memory.device;
        // First what is still active, then errors: an error may end a request without a success.
        let active = port.read(port::at::SATA_ACTIVE) | port.read(port::at::COMMAND_ISSUE);
        let happened = port.read(port::at::INTERRUPT_STATUS);
        let done = self.under_way & !active;
        let bad = status::ERROR | status::FAULT;
        let failed =
            happened & FATAL != 0 || done != 0 && port.read(port::at::TASK_FILE) & bad != 0;
        let unknown = active & !self.under_way != 0;
        if (failed || unknown) && port.is_gone() {
            self.is_dead = true;
            return Ok(());
        }
        if unknown {
            return Err(Lie);
        }
        self.memory.commands.order();
        if !failed {
            (self.done, self.under_way) = (done, active);
            return Ok(());
        }
        // What is still active was not done, with queued commands all of it (section 6.2.2.2). If
        // nothing is, nobody knows which one it was.
        self.failed = if active == 0 { self.under_way } else { active };
        self.done = self.under_way & !self.failed;
        self.under_way = 0;
        self.is_dead = self.recover().is_err();
        Ok(())
    }

    /// Gets the port going again after an error (section 6.2.2). A disk that refuses a queued command
    /// refuses all that follow, until it is asked why or reset (Serial ATA Revision 3.0, 13.6.3): it is
    /// always reset.
    fn recover(&self) -> Result<(), OpenError> {
        let (port, clock) = (&self.memory.device, self.memory.clock);
        port.reset(clock).map_err(|TimedOut| OpenError::Stop)?;
        port.reset_disk(clock)?;
        self.start()
    }
}

impl<R: Registers> Protocol for Ata<'_, R> {
    fn bounces(&self) -> &DmaBuffer<'_> {
        &self.memory.bounces
    }

    fn reaches(&self, memory: PhysAddr, size: u64) -> bool {
        self.memory.device.controller.reaches(memory, size)
    }

    fn submit(&mut self, slot: u16, request: Request) {
        let command = match request {
            Request::Read { at, memory, size } => self.transfer(slot, at, (memory, size), false),
            Request::Write { at, memory, size } => self.transfer(slot, at, (memory, size), true),
            Request::Flush => Command::new(code::FLUSH_CACHE_EXT),
        };
        self.issue(slot, &command);
    }

    fn finished(&mut self) -> Result<Option<Finished>, Lie> {
        if self.done | self.failed == 0 && self.under_way != 0 && !self.is_dead {
            self.look()?;
        }
        Ok(self.tell())
    }
}
