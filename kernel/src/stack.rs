//! Stacks of the payload, each with a page below it that is never mapped.

use core::cell::UnsafeCell;

/// Size of the page below a stack, in bytes.
const GUARD_SIZE: usize = 4096;

/// A stack, whose first push goes below its end; below it lies a page that is never mapped, so that
/// a stack that is too small faults.
#[repr(C, align(4096))]
pub struct Stack<const SIZE: usize> {
    guard: UnsafeCell<[u8; GUARD_SIZE]>,
    bytes: UnsafeCell<[u8; SIZE]>,
}

// SAFETY: only the processor reaches the bytes, as its stack.
unsafe impl<const SIZE: usize> Sync for Stack<SIZE> {}

impl<const SIZE: usize> Stack<SIZE> {
    /// An empty stack.
    pub const fn new() -> Self {
        Stack { guard: UnsafeCell::new([0; GUARD_SIZE]), bytes: UnsafeCell::new([0; SIZE]) }
    }

    /// The address at which an empty stack's pointer stands.
    pub fn top(&self) -> u64 {
        self.bytes.get() as u64 + SIZE as u64
    }

    /// Address of the guard page.
    pub fn guard(&self) -> u64 {
        self.guard.get() as u64
    }
}
