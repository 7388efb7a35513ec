//! What the drivers of all disks have in common: requests go into slots, come back in any order, and
//! every wait for one has a deadline.

use crate::PhysAddr;
use crate::block::{BlockDevice, BlockError, Lba};
use crate::clock::{Clock, Deadline};
use crate::dma::DmaBuffer;

/// Most requests under way at once.
pub const MAX_SLOTS: u16 = 32;

/// Longest time without any request being finished. Slow disks behind a hypervisor take seconds
/// for a flush.
pub(crate) const REQUEST_US: u64 = 20_000_000;

/// Buffers for the payload's own bytes, and their size.
const BOUNCES: usize = 4;
const BOUNCE: usize = 4096;
/// What they take together.
pub const BOUNCE_BYTES: usize = BOUNCES * BOUNCE;

/// What a disk is, by its own word, checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Geometry {
    /// Size of a block in bytes: a power of two from 512 to 4096.
    pub block_size: u32,
    /// Number of blocks.
    pub blocks: u64,
    /// Most bytes in one request: a multiple of 4096, not zero.
    pub max_request: u64,
    /// Requests that it takes at once: at most [`MAX_SLOTS`], not zero.
    pub slots: u16,
    /// Whether it has to be told to flush.
    pub has_flush: bool,
}

/// What a disk is to do.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// Read `size` bytes, whole blocks, from `at` on into memory at `memory`.
    Read {
        /// The first block.
        at: Lba,
        /// Where the bytes go.
        memory: PhysAddr,
        /// How many bytes.
        size: u32,
    },
    /// Write `size` bytes, whole blocks, at `memory` to `at`.
    Write {
        /// The first block.
        at: Lba,
        /// Where the bytes are.
        memory: PhysAddr,
        /// How many bytes.
        size: u32,
    },
    /// Bring all that was written to the medium.
    Flush,
}

/// A request that the disk is done with.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Finished {
    /// Its slot.
    pub slot: u16,
    /// Whether it was done; otherwise the disk reported an error.
    pub done: bool,
}

/// The disk gave back what it never was given, or said something impossible.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Lie;

/// A disk's own language. Dropping it makes the disk leave its memory alone.
pub trait Protocol {
    /// Memory of [`BOUNCE_BYTES`] that the disk may read and write.
    fn bounces(&self) -> &DmaBuffer<'_>;

    /// Whether the disk can fetch `size` bytes of memory at `memory`.
    fn reaches(&self, _memory: PhysAddr, _size: u64) -> bool {
        true
    }

    /// Hands `request` to the disk, in a slot that is free.
    fn submit(&mut self, slot: u16, request: Request);

    /// A request that is done since the last call, if any.
    ///
    /// # Errors
    /// [`Lie`]; nothing that the disk says is believed afterwards.
    fn finished(&mut self) -> Result<Option<Finished>, Lie>;
}

/// A disk that was reset and set up.
pub struct Queued<'a, P: Protocol> {
    protocol: P,
    clock: &'a dyn Clock,
    geometry: Geometry,
    /// Slots with something under way, as bits.
    busy: u32,
    /// The bounce buffer that a slot uses.
    bounce_of: [Option<u8>; MAX_SLOTS as usize],
    failed: Option<BlockError>,
}

impl<'a, P: Protocol> Queued<'a, P> {
    /// The disk behind `protocol`.
    pub fn new(protocol: P, geometry: Geometry, clock: &'a dyn Clock) -> Queued<'a, P> {
        let bounce_of = [None; MAX_SLOTS as usize];
        Queued { protocol, clock, geometry, busy: 0, bounce_of, failed: None }
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

    /// Whether nothing went wrong, and `size` bytes at `at` are whole blocks within the disk.
    fn check_range(&mut self, at: Lba, size: u64) -> Result<(), BlockError> {
        self.check()?;
        let block_size = u64::from(self.geometry.block_size);
        let end = at.0.checked_add(size / block_size);
        let within = end.is_some_and(|end| end <= self.geometry.blocks);
        if within && size.is_multiple_of(block_size) { Ok(()) } else { Err(BlockError::Range) }
    }

    /// The block `bytes` behind `at`.
    fn behind(&self, at: Lba, bytes: u64) -> Lba {
        Lba(at.0 + bytes / u64::from(self.geometry.block_size))
    }

    /// Takes back every request that the disk has finished. Returns whether there was one.
    fn collect(&mut self) -> Result<bool, BlockError> {
        let mut any = false;
        loop {
            match self.protocol.finished() {
                Ok(None) => break,
                Ok(Some(Finished { slot, done })) if self.is_busy(slot) => {
                    any = true;
                    self.busy &= !(1 << slot);
                    self.bounce_of[usize::from(slot)] = None;
                    if !done {
                        self.failed = Some(BlockError::Device);
                    }
                }
                Ok(Some(_)) | Err(Lie) => return self.fail(BlockError::Protocol),
            }
        }
        self.check()?;
        Ok(any)
    }

    fn is_busy(&self, slot: u16) -> bool {
        slot < MAX_SLOTS && self.busy & 1 << slot != 0
    }

    /// Waits until `ready` gives a value. The deadline starts anew with every finished request.
    fn wait<V>(&mut self, mut ready: impl FnMut(&mut Self) -> Option<V>) -> Result<V, BlockError> {
        loop {
            if let Some(value) = ready(self) {
                return Ok(value);
            }
            let deadline = Deadline::after_us(self.clock, REQUEST_US);
            let mut passed = false;
            while !self.collect()? {
                if passed {
                    return self.fail(BlockError::Timeout);
                }
                // Asked once more after the deadline: see Deadline::poll.
                passed = deadline.passed(self.clock);
                core::hint::spin_loop();
            }
        }
    }

    /// Hands a request to the disk as soon as a slot is free.
    fn submit(&mut self, request: Request, bounce: Option<u8>) -> Result<u16, BlockError> {
        self.collect()?;
        let slot = self.wait(|this| (0..this.geometry.slots).find(|&slot| !this.is_busy(slot)))?;
        self.busy |= 1 << slot;
        self.bounce_of[usize::from(slot)] = bounce;
        self.protocol.submit(slot, request);
        Ok(slot)
    }

    /// A bounce buffer that no request uses: its number, its offset, and where it is.
    fn free_bounce(&mut self) -> Result<(u8, usize, PhysAddr), BlockError> {
        let bounce = self.wait(|this| {
            (0..BOUNCES as u8).find(|bounce| !this.bounce_of.contains(&Some(*bounce)))
        })?;
        let offset = usize::from(bounce) * BOUNCE;
        Ok((bounce, offset, self.protocol.bounces().phys(offset)))
    }

    fn wait_for_all(&mut self) -> Result<(), BlockError> {
        self.collect()?;
        self.wait(|this| (this.busy == 0).then_some(()))
    }
}

impl<P: Protocol> BlockDevice for Queued<'_, P> {
    fn block_size(&self) -> u32 {
        self.geometry.block_size
    }

    fn blocks(&self) -> u64 {
        self.geometry.blocks
    }

    fn read(&mut self, at: Lba, into: &mut [u8]) -> Result<(), BlockError> {
        self.check_range(at, into.len() as u64)?;
        let mut at = at;
        for some in into.chunks_mut(BOUNCE) {
            let (bounce, offset, memory) = self.free_bounce()?;
            let size = some.len() as u32;
            let slot = self.submit(Request::Read { at, memory, size }, Some(bounce))?;
            self.wait(|this| (!this.is_busy(slot)).then_some(()))?;
            self.protocol.bounces().read_bytes(offset, some);
            at = self.behind(at, some.len() as u64);
        }
        Ok(())
    }

    fn write(&mut self, at: Lba, bytes: &[u8]) -> Result<(), BlockError> {
        self.check_range(at, bytes.len() as u64)?;
        let mut at = at;
        for some in bytes.chunks(BOUNCE) {
            let (bounce, offset, memory) = self.free_bounce()?;
            self.protocol.bounces().write_bytes(offset, some);
            let size = some.len() as u32;
            self.submit(Request::Write { at, memory, size }, Some(bounce))?;
            at = self.behind(at, some.len() as u64);
        }
        Ok(())
    }

    fn write_physical(&mut self, at: Lba, from: PhysAddr, size: u64) -> Result<(), BlockError> {
        self.check_range(at, size)?;
        if !self.protocol.reaches(from, size) {
            return Err(BlockError::Range);
        }
        let mut done = 0;
        while done < size {
            let some = (size - done).min(self.geometry.max_request);
            let memory = PhysAddr(from.0.wrapping_add(done));
            let at = self.behind(at, done);
            self.submit(Request::Write { at, memory, size: some as u32 }, None)?;
            done += some;
        }
        Ok(())
    }

    fn flush(&mut self) -> Result<(), BlockError> {
        self.check()?;
        self.wait_for_all()?;
        if self.geometry.has_flush {
            self.submit(Request::Flush, None)?;
            self.wait_for_all()?;
        }
        Ok(())
    }
}
