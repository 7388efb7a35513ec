//! A split virtqueue (section 2.7) whose descriptors are fixed chains of three.
//!
//! Slot `n` owns descriptors `3n` to `3n + 2`: header, data, status. So nothing is ever searched
//! or allocated, and a slot number that the device gives back is checked against what is under way.

use crate::PhysAddr;
use crate::block::Lie;
pub use crate::block::MAX_SLOTS;
use crate::dma::{DmaBuffer, DmaPool};
use crate::virtio::{OpenError, QueueAddresses, Transport};

/// Descriptors of a slot.
const CHAIN: u16 = 3;

const DESCRIPTOR_BYTES: usize = 16;
const NEXT: u16 = 1;
const DEVICE_WRITES: u16 = 2;
/// The driver wants no interrupts (section 2.7.6).
const NO_INTERRUPT: u16 = 1;

/// A part of a request: an address, a size, and whether the device writes there.
#[derive(Clone, Copy, Debug)]
pub struct Buffer {
    /// Where it is.
    pub at: PhysAddr,
    /// Size in bytes, not zero.
    pub size: u32,
    /// Whether the device writes it; otherwise it reads it.
    pub device_writes: bool,
}

/// A request that the device has finished.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its slot, which is free again.
    pub slot: u16,
    /// How many bytes the device wrote, by its own word.
    pub written: u32,
}

/// Bytes of a page of legacy devices.
pub const LEGACY_PAGE: usize = 4096;

/// A queue in DMA memory.
pub struct Queue<'a> {
    memory: DmaBuffer<'a>,
    size: u16,
    used_ring: usize,
    available: u16,
    seen: u16,
    busy: u32,
}

impl<'a> Queue<'a> {
    /// The memory of queue `index` of a device, which still needs to be told of it.
    ///
    /// # Errors
    /// [`OpenError::Queue`] when the device has no such queue or one that is too small for a single
    /// slot, [`OpenError::Memory`] when the pool is used up.
    pub fn new(
        pool: &'a DmaPool,
        transport: &dyn Transport,
        index: u16,
    ) -> Result<Queue<'a>, OpenError> {
        let max_size = transport.max_queue_size(index);
        // A power of two, as devices want it, and no more than the slots need.
        let most = (MAX_SLOTS * CHAIN).next_power_of_two();
        let largest = 1 << max_size.checked_ilog2().ok_or(OpenError::Queue)?;
        let size = most.min(largest);
        if size < CHAIN {
            return Err(OpenError::Queue);
        }
        let used_ring = used_offset(size, transport.is_legacy());
        let bytes = used_ring + 6 + 8 * usize::from(size);
        let memory = pool.allocate(bytes).ok_or(OpenError::Memory)?;
        memory.write(available_offset(size), NO_INTERRUPT);
        Ok(Queue { memory, size, used_ring, available: 0, seen: 0, busy: 0 })
    }

    /// Number of descriptors.
    #[must_use]
    pub fn size(&self) -> u16 {
        self.size
    }

    /// What the device needs to know.
    #[must_use]
    pub fn addresses(&self) -> QueueAddresses {
        QueueAddresses {
            descriptors: self.memory.phys(0),
            available: self.memory.phys(available_offset(self.size)),
            used: self.memory.phys(self.used_ring),
        }
    }

    /// How many slots there are.
    #[must_use]
    pub fn slots(&self) -> u16 {
        (self.size / CHAIN).min(MAX_SLOTS)
    }

    /// A slot that is free and below `limit`.
    #[must_use]
    pub fn free_slot_below(&self, limit: u16) -> Option<u16> {
        (0..self.slots().min(limit)).find(|slot| self.busy & 1 << slot == 0)
    }

    /// Whether anything is under way.
    #[must_use]
    pub fn is_busy(&self) -> bool {
        self.busy != 0
    }

    /// Hands a request of one to three parts to the device, which still needs to be notified.
    pub fn submit(&mut self, slot: u16, parts: &[Buffer]) {
        let head = slot * CHAIN;
        for (index, part) in (0..CHAIN).zip(parts) {
            let last = usize::from(index) + 1 == parts.len();
            let flags =
                if last { 0 } else { NEXT } | if part.device_writes { DEVICE_WRITES } else { 0 };
            let at = usize::from(head + index) * DESCRIPTOR_BYTES;
            self.memory.write(at, part.at.0);
            self.memory.write(at + 8, part.size);
            self.memory.write(at + 12, flags);
            self.memory.write(at + 14, if last { 0 } else { head + index + 1 });
        }
        let ring = available_offset(self.size);
        let entry = usize::from(self.available % self.size);
        self.memory.write(ring + 4 + 2 * entry, head);
        self.available = self.available.wrapping_add(1);
        self.busy |= 1 << slot;
        // The device must see the request before the index that announces it.
        self.memory.order();
        self.memory.write(ring + 2, self.available);
        self.memory.order();
    }

    /// A request that the device has finished since the last call, if any.
    ///
    /// # Errors
    /// [`Lie`] when the device names a slot that has nothing under way.
    pub fn finished(&mut self) -> Result<Option<Finished>, Lie> {
        let ring = self.used_ring;
        let index: u16 = self.memory.read(ring + 2);
        if index == self.seen {
            return Ok(None);
        }
        self.memory.order();
        let entry = usize::from(self.seen % self.size);
        let head: u32 = self.memory.read(ring + 4 + 8 * entry);
        let written: u32 = self.memory.read(ring + 8 + 8 * entry);
        self.seen = self.seen.wrapping_add(1);
        let slot = head / u32::from(CHAIN);
        let under_way = head.is_multiple_of(u32::from(CHAIN))
            && slot < u32::from(MAX_SLOTS)
            && self.busy & 1 << slot != 0;
        if !under_way {
            return Err(Lie);
        }
        self.busy &= !(1 << slot);
        Ok(Some(Finished { slot: slot as u16, written }))
    }
}

fn available_offset(size: u16) -> usize {
    DESCRIPTOR_BYTES * usize::from(size)
}

/// The used ring follows the available ring, whose last word is unused: as densely as the device
/// allows (section 2.7), or on a page of its own, where a legacy device looks for it (section 2.7.2).
/// Linux has always asked for a page, so that is what devices are known to do.
fn used_offset(size: u16, is_legacy: bool) -> usize {
    let alignment = if is_legacy { LEGACY_PAGE } else { 4 };
    (available_offset(size) + 6 + 2 * usize::from(size)).next_multiple_of(alignment)
}
