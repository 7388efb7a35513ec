//! Memory that devices read and write by themselves.
//!
//! One pool, in the payload's own memory, handed out while disks are opened; the dump loop
//! allocates nothing.

#![allow(unsafe_code)]

use core::alloc::Layout;
use core::cell::UnsafeCell;
use core::ptr::NonNull;

use linked_list_allocator::Heap;
use spin::Mutex;
use zerocopy::{FromBytes, Immutable, IntoBytes};

use crate::PhysAddr;

/// Pages are handed out whole, so that no two users share a cache line.
const PAGE: usize = 4096;

/// Zero-initialized memory for a pool, to be put into a static.
#[repr(C, align(4096))]
pub struct DmaMemory<const SIZE: usize>(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are only ever reached through the one pool.
unsafe impl<const SIZE: usize> Sync for DmaMemory<SIZE> {}

impl<const SIZE: usize> Default for DmaMemory<SIZE> {
    fn default() -> Self {
        DmaMemory::new()
    }
}

impl<const SIZE: usize> DmaMemory<SIZE> {
    /// `SIZE` zeros.
    #[must_use]
    pub const fn new() -> Self {
        DmaMemory(UnsafeCell::new([0; SIZE]))
    }

    /// A pool over this memory.
    ///
    /// # Safety
    /// To be called once. The memory must be physically contiguous, and adding `offset` modulo
    /// 2^64 to a virtual address in it must give the physical one. `barrier` must be as
    /// [`DmaPool::new`] wants it.
    pub unsafe fn pool(&'static self, offset: u64, barrier: fn()) -> DmaPool {
        // SAFETY: static memory that nobody else reaches; the rest is the caller's promise.
        unsafe { DmaPool::new(NonNull::from(&self.0).cast(), SIZE, offset, barrier) }
    }
}

/// The pool that DMA buffers come from.
pub struct DmaPool {
    heap: Mutex<Heap>,
    /// One bit for each page in use: a device that is made up writes to no others, for the heap keeps
    /// its books in them.
    #[cfg(fuzzing)]
    pages: Mutex<u64>,
    base: NonNull<u8>,
    size: usize,
    /// Physical address of a byte minus its virtual address.
    offset: u64,
    barrier: fn(),
}

impl DmaPool {
    /// A pool over `size` bytes at `base`. `offset` is what must be added, modulo 2^64, to an
    /// address there to get its physical address. `barrier` keeps accesses to memory and to device
    /// registers that come before it in the program before those that come after, as devices see
    /// them.
    ///
    /// # Safety
    /// The memory must be the pool's alone for as long as the payload runs, writable, physically
    /// contiguous, and mapped as `offset` says.
    #[must_use]
    pub unsafe fn new(base: NonNull<u8>, size: usize, offset: u64, barrier: fn()) -> DmaPool {
        let mut heap = Heap::empty();
        // SAFETY: the caller hands the memory over to this pool.
        unsafe { heap.init(base.as_ptr(), size) };
        DmaPool {
            heap: Mutex::new(heap),
            #[cfg(fuzzing)]
            pages: Mutex::new(0),
            base,
            size,
            offset,
            barrier,
        }
    }

    /// Takes all memory back from whoever has it.
    ///
    /// # Safety
    /// No device may use it any more, and no buffer be used or dropped.
    pub unsafe fn reclaim(&self) {
        if self.heap.is_locked() {
            // SAFETY: whoever holds it does not run any more, by the caller's promise, and what it left
            // is replaced below.
            unsafe { self.heap.force_unlock() };
        }
        let mut heap = Heap::empty();
        // SAFETY: the memory is the pool's, and nobody else has it now.
        unsafe { heap.init(self.base.as_ptr(), self.size) };
        *self.heap.lock() = heap;
    }

    /// A zeroed buffer of at least `size` bytes, in whole pages. `None` when the pool is used up.
    #[must_use]
    pub fn allocate(&self, size: usize) -> Option<DmaBuffer<'_>> {
        let layout = Layout::from_size_align(size.next_multiple_of(PAGE), PAGE).ok()?;
        let base = self.heap.lock().allocate_first_fit(layout).ok()?;
        // SAFETY: the allocation is this buffer's alone and has the layout's size.
        unsafe { base.as_ptr().write_bytes(0, layout.size()) };
        let buffer = DmaBuffer { pool: self, base, layout };
        #[cfg(fuzzing)]
        buffer.each_page(|pages, page| *pages |= page);
        Some(buffer)
    }

    /// Whether somebody has the page with the byte at `offset` of the pool, which is of at most 64 pages.
    #[cfg(fuzzing)]
    pub fn is_in_use(&self, offset: usize) -> bool {
        *self.pages.lock() >> (offset / PAGE) & 1 != 0
    }

    /// Bytes of the pool that are in use.
    #[must_use]
    pub fn used(&self) -> usize {
        self.heap.lock().used()
    }
}

// SAFETY: the pointer is only handed to the heap, which is behind a lock.
unsafe impl Send for DmaPool {}
// SAFETY: likewise.
unsafe impl Sync for DmaPool {}

/// A buffer that a device may read and write at any time. So the payload never holds a reference
/// into it: every access copies. Accesses outside of it read zeros and write nothing, which only
/// a defect in a driver can cause.
pub struct DmaBuffer<'a> {
    pool: &'a DmaPool,
    base: NonNull<u8>,
    layout: Layout,
}

// SAFETY: the buffer is the only owner of its memory, and the pool is behind a lock.
unsafe impl Send for DmaBuffer<'_> {}

impl DmaBuffer<'_> {
    /// Size in bytes.
    #[must_use]
    pub fn size(&self) -> usize {
        self.layout.size()
    }

    #[cfg(fuzzing)]
    fn each_page(&self, mark: impl Fn(&mut u64, u64)) {
        let first = (self.base.as_ptr() as usize - self.pool.base.as_ptr() as usize) / PAGE;
        for page in first..first + self.size() / PAGE {
            mark(&mut self.pool.pages.lock(), 1 << page);
        }
    }

    /// The physical address of the byte at `offset`.
    #[must_use]
    pub fn phys(&self, offset: usize) -> PhysAddr {
        let address = (self.base.as_ptr() as u64).wrapping_add(self.pool.offset);
        PhysAddr(address.wrapping_add(offset as u64))
    }

    /// Keeps the order of accesses before and after this call, as devices see it.
    pub fn order(&self) {
        (self.pool.barrier)();
    }

    /// Reads a value at `offset`, a multiple of its size, in one piece.
    #[must_use]
    pub fn read<T: FromBytes>(&self, offset: usize) -> T {
        match self.pointer::<T>(offset) {
            // SAFETY: the bytes lie within the buffer, aligned; any bytes are a T. A device may
            // write meanwhile, hence volatile.
            Some(pointer) => unsafe { pointer.read_volatile() },
            None => T::new_zeroed(),
        }
    }

    /// Writes a value at `offset`, a multiple of its size, in one piece: a device that looks
    /// meanwhile sees all of it or nothing.
    pub fn write<T: IntoBytes + Immutable>(&self, offset: usize, value: T) {
        if let Some(pointer) = self.pointer::<T>(offset) {
            // SAFETY: as in `read`.
            unsafe { pointer.write_volatile(value) }
        }
    }

    fn pointer<T>(&self, offset: usize) -> Option<*mut T> {
        let size = size_of::<T>();
        let fits = self.holds(offset, size) && offset.is_multiple_of(size.max(1));
        debug_assert!(fits && align_of::<T>() <= size);
        // SAFETY: the offset lies within the buffer, which is aligned to a page.
        fits.then(|| unsafe { self.base.as_ptr().add(offset) }.cast())
    }

    /// Copies `bytes` to `offset`.
    pub fn write_bytes(&self, offset: usize, bytes: &[u8]) {
        debug_assert!(self.holds(offset, bytes.len()));
        if self.holds(offset, bytes.len()) {
            // SAFETY: the destination lies within the buffer, which no reference points into.
            unsafe {
                self.base.as_ptr().add(offset).copy_from_nonoverlapping(bytes.as_ptr(), bytes.len())
            }
        }
    }

    /// Copies the bytes at `offset` into `into`.
    pub fn read_bytes(&self, offset: usize, into: &mut [u8]) {
        debug_assert!(self.holds(offset, into.len()));
        if self.holds(offset, into.len()) {
            // SAFETY: the source lies within the buffer, which `into` cannot point into.
            unsafe {
                into.as_mut_ptr()
                    .copy_from_nonoverlapping(self.base.as_ptr().add(offset), into.len())
            }
        }
    }

    fn holds(&self, offset: usize, size: usize) -> bool {
        offset.checked_add(size).is_some_and(|end| end <= self.size())
    }
}

impl Drop for DmaBuffer<'_> {
    fn drop(&mut self) {
        #[cfg(fuzzing)]
        self.each_page(|pages, page| *pages &= !page);
        // SAFETY: allocated from this pool with this layout, and dropped once. Drivers reset their
        // device before they drop its buffers, or leak them.
        unsafe { self.pool.heap.lock().deallocate(self.base, self.layout) }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use core::sync::atomic::{Ordering, fence};
    use std::boxed::Box;

    /// A pool in ordinary memory, and what to add to its physical addresses to get pointers. They
    /// are small, as legacy devices need them.
    pub fn host_pool(size: usize) -> (&'static DmaPool, u64) {
        const PHYSICAL: u64 = 1 << 20;
        let memory = Box::leak(std::vec![0u64; (size + PAGE) / 8].into_boxed_slice());
        let base = memory.as_mut_ptr().cast::<u8>();
        let base = NonNull::new(base.wrapping_add(base.align_offset(PAGE))).unwrap();
        let to_pointer = base.as_ptr() as u64 - PHYSICAL;
        // SAFETY: leaked, so the memory is the pool's for ever, and nobody takes the physical
        // addresses for anything but what they are.
        let pool = unsafe {
            DmaPool::new(base, size, 0u64.wrapping_sub(to_pointer), || fence(Ordering::SeqCst))
        };
        (Box::leak(Box::new(pool)), to_pointer)
    }

    #[test]
    fn buffers_are_whole_zeroed_pages_and_come_back() {
        let (pool, _) = host_pool(64 << 10);
        let buffer = pool.allocate(100).unwrap();
        assert_eq!((buffer.size(), buffer.phys(0).0 % 4096), (4096, 0));
        buffer.write(8, 0x1122_3344_5566_7788u64);
        assert_eq!(buffer.read::<u64>(8), 0x1122_3344_5566_7788);
        assert_eq!(buffer.phys(8).0, buffer.phys(0).0 + 8);
        drop(buffer);
        assert_eq!(pool.used(), 0);
        assert_eq!(pool.allocate(4096).unwrap().read::<u64>(8), 0);
        assert!(pool.allocate(1 << 20).is_none());
    }

    #[test]
    fn abandoned_memory_can_be_taken_back() {
        let (pool, _) = host_pool(64 << 10);
        core::mem::forget(pool.allocate(60 << 10).unwrap());
        assert!(pool.allocate(60 << 10).is_none());
        // SAFETY: there is no device, and the buffer is forgotten.
        unsafe { pool.reclaim() };
        assert_eq!(pool.used(), 0);
        assert!(pool.allocate(60 << 10).is_some());
    }
}
