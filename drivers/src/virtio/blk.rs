//! virtio block device (section 5.2), polled, with up to 32 requests under way.

use crate::block::{self, BOUNCE_BYTES, Geometry, Lba, Lie, Protocol, Queued, Request};
use crate::clock::Clock;
use crate::dma::{DmaBuffer, DmaPool};
use crate::lent::Lent;
use crate::virtio::queue::{self, Buffer, MAX_SLOTS, Queue};
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

/// Most bytes in one request.
const MAX_REQUEST: u64 = 1 << 20;

/// Where the headers, of 16 bytes each, and the status bytes of the slots lie in their buffer.
const HEADER: usize = 16;
const STATUSES: usize = HEADER * MAX_SLOTS as usize;

/// Value of a status byte before the device has written it.
const UNWRITTEN: u8 = 0xff;

/// A virtio block device that was reset and set up.
pub type VirtioBlk<'a, T> = Queued<'a, Blk<'a, T>>;

/// The language of virtio block devices.
pub struct Blk<'a, T: Transport> {
    memory: Lent<'a, T, Memory<'a>>,
    /// Sectors of a block.
    block_sectors: u64,
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
        let geometry = geometry(&transport, features)?;

        let memory = allocate(pool, &transport)?;
        let geometry = Geometry { slots: memory.queue.slots(), ..geometry };
        let memory = Lent::new(transport, clock, memory);
        let queue = &memory.queue;
        memory.device.enable_queue(0, queue.size(), queue.addresses())?;
        begin(&memory.device);
        let block_sectors = u64::from(geometry.block_size) / SECTOR;
        Ok(Queued::new(Blk { memory, block_sectors }, geometry, clock))
    }
}

impl<T: Transport> Protocol for Blk<'_, T> {
    fn bounces(&self) -> &DmaBuffer<'_> {
        &self.memory.bounces
    }

    fn submit(&mut self, slot: u16, request: Request) {
        let (kind, at, data) = match request {
            Request::Read { at, memory, size } => {
                (request::IN, at, Some(Buffer { at: memory, size, device_writes: true }))
            }
            Request::Write { at, memory, size } => {
                (request::OUT, at, Some(Buffer { at: memory, size, device_writes: false }))
            }
            Request::Flush => (request::FLUSH, Lba(0), None),
        };
        let header = usize::from(slot) * HEADER;
        let status = STATUSES + usize::from(slot);
        let headers = &self.memory.headers;
        headers.write(header, kind);
        headers.write(header + 4, 0u32);
        headers.write(header + 8, at.0 * self.block_sectors);
        headers.write(status, UNWRITTEN);
        let first = Buffer { at: headers.phys(header), size: HEADER as u32, device_writes: false };
        let last = Buffer { at: headers.phys(status), size: 1, device_writes: true };
        let queue = &mut self.memory.queue;
        match data {
            Some(data) => queue.submit(slot, &[first, data, last]),
            None => queue.submit(slot, &[first, last]),
        }
        self.memory.device.notify(0);
    }

    fn finished(&mut self) -> Result<Option<block::Finished>, Lie> {
        let Some(queue::Finished { slot, .. }) = self.memory.queue.finished()? else {
            return Ok(None);
        };
        match self.memory.headers.read(STATUSES + usize::from(slot)) {
            UNWRITTEN => Err(Lie),
            status => Ok(Some(block::Finished { slot, done: status == 0 })),
        }
    }
}

fn allocate<'a>(pool: &'a DmaPool, transport: &dyn Transport) -> Result<Memory<'a>, OpenError> {
    let queue = Queue::new(pool, transport, 0)?;
    let headers = pool.allocate(STATUSES + usize::from(MAX_SLOTS)).ok_or(OpenError::Memory)?;
    let bounces = pool.allocate(BOUNCE_BYTES).ok_or(OpenError::Memory)?;
    Ok(Memory { queue, headers, bounces })
}

/// What the device says about itself, checked.
fn geometry(transport: &dyn Transport, features: u64) -> Result<Geometry, OpenError> {
    let has = |feature| features & feature != 0;
    if has(feature::READ_ONLY) {
        return Err(OpenError::ReadOnly);
    }
    let block_size =
        if has(feature::BLK_SIZE) { transport.config32(config::BLK_SIZE) } else { 512 };
    if !matches!(block_size, 512 | 1024 | 2048 | 4096) {
        return Err(OpenError::Config);
    }
    let most = if has(feature::SIZE_MAX) { transport.config32(config::SIZE_MAX) } else { u32::MAX };
    let max_request = u64::from(most).min(MAX_REQUEST) / 4096 * 4096;
    let low = transport.config32(config::CAPACITY);
    let high = transport.config32(config::CAPACITY + 4);
    let sectors = u64::from(high) << 32 | u64::from(low);
    if max_request == 0 || sectors > u64::MAX / SECTOR {
        return Err(OpenError::Config);
    }
    let blocks = sectors * SECTOR / u64::from(block_size);
    Ok(Geometry { block_size, blocks, max_request, slots: 1, has_flush: has(feature::FLUSH) })
}

#[cfg(test)]
#[path = "blk_tests.rs"]
mod tests;
