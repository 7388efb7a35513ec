//! Memory for the compressor, the only thing that asks for some: a few large pieces, when a dump over
//! a line begins. The dump itself allocates nothing.

use core::alloc::{GlobalAlloc, Layout};
use core::cell::UnsafeCell;
use core::ptr::{self, NonNull};

use linked_list_allocator::Heap;
use spin::Mutex;

/// Bytes of it. The compressor takes 316 KiB.
const SIZE: usize = 336 << 10;

/// The memory, aligned as the heap wants its start.
#[repr(C, align(64))]
struct Memory(UnsafeCell<[u8; SIZE]>);

// SAFETY: the bytes are only ever reached through the heap.
unsafe impl Sync for Memory {}

static MEMORY: Memory = Memory(UnsafeCell::new([0; SIZE]));

/// The heap; empty until somebody asks.
struct Pieces(Mutex<Heap>);

#[global_allocator]
static HEAP: Pieces = Pieces(Mutex::new(Heap::empty()));

// SAFETY: the heap gives out pieces of its memory that do not overlap, as large and aligned as they
// were asked for.
unsafe impl GlobalAlloc for Pieces {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        // Nothing allocates in an exception, so the lock is free.
        let Some(mut heap) = self.0.try_lock() else { return ptr::null_mut() };
        if heap.size() == 0 {
            // SAFETY: the memory is static, and the heap's alone from here on.
            unsafe { heap.init(MEMORY.0.get().cast(), SIZE) };
        }
        heap.allocate_first_fit(layout).map_or(ptr::null_mut(), NonNull::as_ptr)
    }

    unsafe fn dealloc(&self, at: *mut u8, layout: Layout) {
        if let (Some(mut heap), Some(at)) = (self.0.try_lock(), NonNull::new(at)) {
            // SAFETY: the caller promises that `alloc` gave this piece for this layout.
            unsafe { heap.deallocate(at, layout) };
        }
    }
}
