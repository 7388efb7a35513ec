//! Memory that a device reads and writes by itself, until it is reset.

#![allow(unsafe_code)]

use core::mem::ManuallyDrop;
use core::ops::{Deref, DerefMut};

use crate::clock::{Clock, TimedOut};

/// A device that can be made to leave all memory alone.
pub trait Reset {
    /// Resets the device and waits until it has.
    ///
    /// # Errors
    /// [`TimedOut`] when it does not: then nobody knows what it still does.
    fn reset(&self, clock: &dyn Clock) -> Result<(), TimedOut>;
}

/// A device with the memory that it was told of. The memory goes back to its pool only when the
/// device certainly writes to it no more; if it does not reset, never.
pub struct Lent<'a, D: Reset, M> {
    /// The way to the device.
    pub device: D,
    /// The time that its waits are measured with.
    pub clock: &'a dyn Clock,
    memory: ManuallyDrop<M>,
}

impl<'a, D: Reset, M> Lent<'a, D, M> {
    /// Takes charge of `memory`, which the device is about to be told of, or was.
    pub fn new(device: D, clock: &'a dyn Clock, memory: M) -> Lent<'a, D, M> {
        Lent { device, clock, memory: ManuallyDrop::new(memory) }
    }
}

impl<D: Reset, M> Deref for Lent<'_, D, M> {
    type Target = M;

    fn deref(&self) -> &M {
        &self.memory
    }
}

impl<D: Reset, M> DerefMut for Lent<'_, D, M> {
    fn deref_mut(&mut self) -> &mut M {
        &mut self.memory
    }
}

impl<D: Reset, M> Drop for Lent<'_, D, M> {
    fn drop(&mut self) {
        if self.device.reset(self.clock).is_ok() {
            // SAFETY: done once, here, and nobody reaches the memory afterwards.
            unsafe { ManuallyDrop::drop(&mut self.memory) }
        }
    }
}
