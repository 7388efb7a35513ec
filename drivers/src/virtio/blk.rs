//! virtio block device (section 5.2), polled, with up to 32 requests under way.

use crate::PhysAddr;
use crate::block::{BlockDevice, BlockError, Lba};
use crate::clock::{Clock, Deadline};
use crate::dma::{DmaBuffer, DmaPool};
use crate::virtio::lent::Lent;
use crate::virtio::queue::{Buffer, Finished, MAX_SLOTS, Queue};
use crate::virtio::{FEATURE_VERSION_1, OpenError, Transport, begin, negotiate};

/// Feature bits (section 5.2.3).
mod feature {
    pub const SIZE_MAX: u64 = 1 << 1;
    pub const READ_ONLY: u64 = 1 << 5;
    pub const BLK_SIZE: u64 = 1 << 6;
    pub const FLUSH: u64 = 1 << 9;
}

/// Offsets in the device configuration (section 5.2.4).
mod config {
    pub const CAPACITY: u64 = 0;
    pub const SIZE_MAX: u64 = 8;
    pub const BLK_SIZE: u64 = 20;
}

/// Request types (section 5.2.6).
mod request {
    pub const IN: u32 = 0;
    pub const OUT: u32 = 1;
    pub const FLUSH: u32 = 4;
}

/// Sectors in requests and in the capacity are of 512 bytes, whatever the block size.
const SECTOR: u64 = 512;

/// Longest time without any request being finished. Slow disks behind a hypervisor take seconds
/// for a flush.
const REQUEST_US: u64 = 20_000_000;

/// Most bytes in one request.
const MAX_REQUEST: u64 = 1 << 20;

/// Buffers for the payload's own bytes, and their size.
const BOUNCES: usize = 4;
const BOUNCE: usize = 4096;

/// Where the headers, of 16 bytes each, and the status bytes of the slots lie in their buffer.
const HEADER: usize = 16;
const STATUSES: usize = HEADER * MAX_SLOTS as usize;

/// Value of a status byte before the device has written it.
const UNWRITTEN: u8 = 0xff;

/// A virtio block device that was reset and set up.
pub struct VirtioBlk<'a, T: Transport> {
    memory: Lent<'a, T, Memory<'a>>,
    /// The bounce buffer that a slot uses.
    bounce_of: [Option<u8>; MAX_SLOTS as usize],
    block_size: u32,
    sectors: u64,
    max_request: u64,
    has_flush: bool,
    failed: Option<BlockError>,
}

/// What the device reads and writes by itself.
struct Memory<'a> {
    queue: Queue<'a>,
    headers: DmaBuffer<'a>,
    bounces: DmaBuffer<'a>,
}

impl<'a, T: Transport> VirtioBlk<'a, T> {
    /// Resets the device and sets it up.
    ///
    /// # Errors
    /// [`OpenError`] when it cannot be written with this driver.
    pub fn open(
        transport: T,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
    ) -> Result<VirtioBlk<'a, T>, OpenError> {
        let wanted = feature::SIZE_MAX
            | feature::READ_ONLY
            | feature::BLK_SIZE
            | feature::FLUSH
            | FEATURE_VERSION_1;
        let features = negotiate(&transport, clock, wanted)?;
        let limits = Limits::read(&transport, features)?;

        let memory = allocate(pool, &transport)?;
        let memory = Lent::new(transport, clock, memory);
        let queue = &memory.queue;
        memory.transport.enable_queue(0, queue.size(), queue.addresses())?;
        begin(&memory.transport);
        Ok(VirtioBlk {
            memory,
            bounce_of: [None; MAX_SLOTS as usize],
            block_size: limits.block_size,
            sectors: limits.sectors,
            max_request: limits.max_request,
            has_flush: features & feature::FLUSH != 0,
            failed: None,
        })
    }

    fn fail<V>(&mut self, error: BlockError) -> Result<V, BlockError> {
        self.failed = Some(error);
        Err(error)
    }

    /// Tells what went wrong before. An error that the device itself reported is told once: the
    /// queue is in order, and the next request may succeed.
    fn check(&mut self) -> Result<(), BlockError> {
        match self.failed {
            None => Ok(()),
            Some(error) => {
                if error == BlockError::Device {
                    self.failed = None;
                }
                Err(error)
            }
        }
    }

    /// The first sector of a request for `size` bytes at `at`, if it lies within the disk.
    fn sector(&mut self, at: Lba, size: u64) -> Result<u64, BlockError> {
        self.check()?;
        let sector = at.0.checked_mul(u64::from(self.block_size) / SECTOR);
        let within = sector.is_some_and(|sector| {
            sector.checked_add(size / SECTOR).is_some_and(|end| end <= self.sectors)
        });
        match sector {
            Some(sector) if within && size.is_multiple_of(self.block_size.into()) => Ok(sector),
            _ => Err(BlockError::Range),
        }
    }

    /// Takes back every request that the device has finished. Returns whether there was one.
    fn collect(&mut self) -> Result<bool, BlockError> {
        let mut any = false;
        loop {
            match self.memory.queue.finished() {
                Ok(None) => break,
                Ok(Some(Finished { slot, .. })) => {
                    any = true;
                    self.bounce_of[usize::from(slot)] = None;
                    let status: u8 = self.memory.headers.read(STATUSES + usize::from(slot));
                    match status {
                        0 => {}
                        UNWRITTEN => return self.fail(BlockError::Protocol),
                        _ => self.failed = Some(BlockError::Device),
                    }
                }
                Err(_) => return self.fail(BlockError::Protocol),
            }
        }
        self.check()?;
        Ok(any)
    }

    /// Waits until `ready` gives a value. The deadline starts anew with every finished request.
    fn wait<V>(&mut self, mut ready: impl FnMut(&mut Self) -> Option<V>) -> Result<V, BlockError> {
        loop {
            if let Some(value) = ready(self) {
                return Ok(value);
            }
            let deadline = Deadline::after_us(self.memory.clock, REQUEST_US);
            let mut passed = false;
            while !self.collect()? {
                if passed {
                    return self.fail(BlockError::Timeout);
                }
                // Asked once more after the deadline: see Deadline::poll.
                passed = deadline.passed(self.memory.clock);
                core::hint::spin_loop();
            }
        }
    }

    fn free_slot(&mut self) -> Result<u16, BlockError> {
        self.collect()?;
        self.wait(|this| this.memory.queue.free_slot())
    }

    fn free_bounce(&mut self) -> Result<u8, BlockError> {
        self.wait(|this| (0..BOUNCES as u8).find(|bounce| !this.bounce_of.contains(&Some(*bounce))))
    }

    /// Hands a request to the device.
    fn submit(&mut self, slot: u16, kind: u32, sector: u64, data: Option<Buffer>) {
        let header = usize::from(slot) * HEADER;
        let status = STATUSES + usize::from(slot);
        let headers = &self.memory.headers;
        headers.write(header, kind);
        headers.write(header + 4, 0u32);
        headers.write(header + 8, sector);
        headers.write(status, UNWRITTEN);
        let first = Buffer { at: headers.phys(header), size: HEADER as u32, device_writes: false };
        let last = Buffer { at: headers.phys(status), size: 1, device_writes: true };
        let queue = &mut self.memory.queue;
        match data {
            Some(data) => queue.submit(slot, &[first, data, last]),
            None => queue.submit(slot, &[first, last]),
        }
        self.memory.transport.notify(0);
    }

    /// Reads at most a bounce buffer.
    fn read_some(&mut self, sector: u64, into: &mut [u8]) -> Result<(), BlockError> {
        let slot = self.free_slot()?;
        let bounce = self.free_bounce()?;
        self.bounce_of[usize::from(slot)] = Some(bounce);
        let offset = usize::from(bounce) * BOUNCE;
        let at = self.memory.bounces.phys(offset);
        let data = Buffer { at, size: into.len() as u32, device_writes: true };
        self.submit(slot, request::IN, sector, Some(data));
        self.wait(|this| this.bounce_of[usize::from(slot)].is_none().then_some(()))?;
        self.memory.bounces.read_bytes(offset, into);
        Ok(())
    }
}

impl<T: Transport> BlockDevice for VirtioBlk<'_, T> {
    fn block_size(&self) -> u32 {
        self.block_size
    }

    fn blocks(&self) -> u64 {
        self.sectors * SECTOR / u64::from(self.block_size)
    }

    fn read(&mut self, at: Lba, into: &mut [u8]) -> Result<(), BlockError> {
        let mut sector = self.sector(at, into.len() as u64)?;
        for some in into.chunks_mut(BOUNCE) {
            self.read_some(sector, some)?;
            sector += some.len() as u64 / SECTOR;
        }
        Ok(())
    }

    fn write(&mut self, at: Lba, bytes: &[u8]) -> Result<(), BlockError> {
        let mut sector = self.sector(at, bytes.len() as u64)?;
        for some in bytes.chunks(BOUNCE) {
            let slot = self.free_slot()?;
            let bounce = self.free_bounce()?;
            self.bounce_of[usize::from(slot)] = Some(bounce);
            let offset = usize::from(bounce) * BOUNCE;
            self.memory.bounces.write_bytes(offset, some);
            let at = self.memory.bounces.phys(offset);
            let data = Buffer { at, size: some.len() as u32, device_writes: false };
            self.submit(slot, request::OUT, sector, Some(data));
            sector += some.len() as u64 / SECTOR;
        }
        Ok(())
    }

    fn write_physical(&mut self, at: Lba, from: PhysAddr, size: u64) -> Result<(), BlockError> {
        let mut sector = self.sector(at, size)?;
        let mut done = 0;
        while done < size {
            let some = (size - done).min(self.max_request);
            let slot = self.free_slot()?;
            let at = PhysAddr(from.0.wrapping_add(done));
            let data = Buffer { at, size: some as u32, device_writes: false };
            self.submit(slot, request::OUT, sector, Some(data));
            sector += some / SECTOR;
            done += some;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.sector(Lba(0), 0)?;
        self.collect()?;
        self.wait(|this| (!this.memory.queue.is_busy()).then_some(()))?;
        if self.has_flush {
            let slot = self.free_slot()?;
            self.submit(slot, request::FLUSH, 0, None);
            self.wait(|this| (!this.memory.queue.is_busy()).then_some(()))?;
        }
        Ok(())
    }
}

fn allocate<'a>(pool: &'a DmaPool, transport: &dyn Transport) -> Result<Memory<'a>, OpenError> {
    let queue = Queue::new(pool, transport, 0)?;
    let headers = pool.allocate(STATUSES + usize::from(MAX_SLOTS)).ok_or(OpenError::Memory)?;
    let bounces = pool.allocate(BOUNCES * BOUNCE).ok_or(OpenError::Memory)?;
    Ok(Memory { queue, headers, bounces })
}

/// What the device says about itself, checked.
struct Limits {
    block_size: u32,
    sectors: u64,
    max_request: u64,
}

impl Limits {
    fn read(transport: &dyn Transport, features: u64) -> Result<Limits, OpenError> {
        if features & feature::READ_ONLY != 0 {
            return Err(OpenError::ReadOnly);
        }
        let has = |feature| features & feature != 0;
        let block_size =
            if has(feature::BLK_SIZE) { transport.config32(config::BLK_SIZE) } else { 512 };
        if !matches!(block_size, 512 | 1024 | 2048 | 4096) {
            return Err(OpenError::Config);
        }
        let most =
            if has(feature::SIZE_MAX) { transport.config32(config::SIZE_MAX) } else { u32::MAX };
        let max_request = u64::from(most).min(MAX_REQUEST) / 4096 * 4096;
        let low = transport.config32(config::CAPACITY);
        let high = transport.config32(config::CAPACITY + 4);
        let sectors = u64::from(high) << 32 | u64::from(low);
        if max_request == 0 || sectors > u64::MAX / SECTOR {
            return Err(OpenError::Config);
        }
        Ok(Limits { block_size, sectors, max_request })
    }
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
