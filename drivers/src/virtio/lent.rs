//! Memory that a device reads and writes by itself, until it is reset.

#![allow(unsafe_code)]

use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};

use crate::clock::Clock;
use crate::virtio::{Transport, reset};

/// A device with the memory that it was told of. The memory goes back to its pool only when the
/// device certainly writes to it no more; if it does not reset, never.
pub struct Lent<'a, T: Transport, M> {
    /// The way to the device.
    pub transport: T,
    /// The time that its waits are measured with.
    pub clock: &'a dyn Clock,
    memory: ManuallyDrop<M>,
}

impl<'a, T: Transport, M> Lent<'a, T, M> {
    /// Takes charge of `memory`, which the device is about to be told of, or was.
    pub fn new(transport: T, clock: &'a dyn Clock, memory: M) -> Lent<'a, T, M> {
        Lent { transport, clock, memory: ManuallyDrop::new(memory) }
    }
}

impl<T: Transport, M> Deref for Lent<'_, T, M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.memory
    }
}

impl<T: Transport, M> DerefMut for Lent<'_, T, M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.memory
    }
}

impl<T: Transport, M> Drop for Lent<'_, T, M> {
    fn drop(&mut self) {
        if reset(&self.transport, self.clock).is_ok() {
            // SAFETY: done once, here, and nobody reaches the memory afterwards.
            unsafe { ManuallyDrop::drop(&mut self.memory) }
        }
    }
}
