//! virtio console device (section 5.3): its first port, which is there without any feature, polled.

use crate::clock::Clock;
use crate::dma::{DmaBuffer, DmaPool};
use crate::lent::Lent;
use crate::serial::Transmitter;
use crate::virtio::queue::{Buffer, Finished, Queue};
use crate::virtio::{FEATURE_VERSION_1, OpenError, Transport, begin, negotiate};

/// Queues of the first port (section 5.3.2).
mod queue {
    pub const RECEIVE: u16 = 0;
    pub const TRANSMIT: u16 = 1;
}

/// Buffers for what is to be sent, and their size: while the device takes one, the other is filled.
const OUTPUTS: usize = 2;
const OUTPUT: usize = 4096;

/// Buffers for what arrives, and their size.
const INPUTS: usize = 16;
const INPUT: usize = 256;

/// Longest time without any buffer being taken. Behind a console there may be a slow line, or a
/// program that was stopped for a moment.
const TAKE_US: u64 = 10_000_000;

/// A virtio console that was reset and set up. A device that lies is broken for good: it takes
/// nothing and brings nothing.
pub struct VirtioConsole<'a, T: Transport> {
    memory: Lent<'a, T, Memory<'a>>,
    /// What has arrived and was not asked for yet.
    arrived: Option<Arrived>,
    is_broken: bool,
}

/// What the device reads and writes by itself. Slot `n` of a queue has the buffer `n` of its kind.
struct Memory<'a> {
    receive: Queue<'a>,
    transmit: Queue<'a>,
    inputs: DmaBuffer<'a>,
    outputs: DmaBuffer<'a>,
}

/// The rest of a buffer in which bytes arrived.
#[derive(Clone, Copy)]
struct Arrived {
    slot: u16,
    next: usize,
    end: usize,
}

impl<'a, T: Transport> VirtioConsole<'a, T> {
    /// Resets the device and sets its first port up.
    ///
    /// # Errors
    /// [`OpenError`] when it cannot be used with this driver.
    pub fn open(
        transport: T,
        pool: &'a DmaPool,
        clock: &'a dyn Clock,
    ) -> Result<VirtioConsole<'a, T>, OpenError> {
        negotiate(&transport, clock, FEATURE_VERSION_1)?;
        let memory = Memory {
            receive: Queue::new(pool, &transport, queue::RECEIVE)?,
            transmit: Queue::new(pool, &transport, queue::TRANSMIT)?,
            inputs: pool.allocate(INPUTS * INPUT).ok_or(OpenError::Memory)?,
            outputs: pool.allocate(OUTPUTS * OUTPUT).ok_or(OpenError::Memory)?,
        };
        let memory = Lent::new(transport, clock, memory);
        for (index, queue) in
            [(queue::RECEIVE, &memory.receive), (queue::TRANSMIT, &memory.transmit)]
        {
            memory.device.enable_queue(index, queue.size(), queue.addresses())?;
        }
        begin(&memory.device);
        let mut console = VirtioConsole { memory, arrived: None, is_broken: false };
        while let Some(slot) = console.memory.receive.free_slot_below(INPUTS as u16) {
            console.post(slot);
        }
        Ok(console)
    }

    /// Gives the device a buffer to write to.
    fn post(&mut self, slot: u16) {
        let at = self.memory.inputs.phys(usize::from(slot) * INPUT);
        let buffer = Buffer { at, size: INPUT as u32, device_writes: true };
        self.memory.receive.submit(slot, &[buffer]);
        self.memory.device.notify(queue::RECEIVE);
    }

    /// The next buffer in which something arrived. One that is empty goes back to the device.
    fn next_input(&mut self) -> Option<Arrived> {
        let finished = self.memory.receive.finished();
        match finished {
            Ok(Some(Finished { slot, written: 0 })) => self.post(slot),
            Ok(Some(Finished { slot, written })) if written <= INPUT as u32 => {
                return Some(Arrived { slot, next: 0, end: written as usize });
            }
            Ok(None) => {}
            Ok(Some(_)) | Err(_) => self.is_broken = true,
        }
        None
    }

    /// Takes back every buffer that the device has sent.
    fn collect(&mut self) {
        loop {
            match self.memory.transmit.finished() {
                Ok(None) => return,
                Ok(Some(_)) => {}
                Err(_) => {
                    self.is_broken = true;
                    return;
                }
            }
        }
    }
}

impl<T: Transport> Transmitter for VirtioConsole<'_, T> {
    /// There is nothing left to do, and no speed.
    fn prepare(&mut self, _: &dyn Clock, _: Option<u32>) -> bool {
        !self.is_broken
    }

    fn send_some(&mut self, bytes: &[u8]) -> usize {
        self.collect();
        let slot = self.memory.transmit.free_slot_below(OUTPUTS as u16);
        let (false, Some(slot)) = (self.is_broken || bytes.is_empty(), slot) else { return 0 };
        let some = &bytes[..bytes.len().min(OUTPUT)];
        let offset = usize::from(slot) * OUTPUT;
        self.memory.outputs.write_bytes(offset, some);
        let at = self.memory.outputs.phys(offset);
        let buffer = Buffer { at, size: some.len() as u32, device_writes: false };
        self.memory.transmit.submit(slot, &[buffer]);
        self.memory.device.notify(queue::TRANSMIT);
        some.len()
    }

    fn receive_one(&mut self) -> Option<u8> {
        if self.is_broken {
            return None;
        }
        let arrived = self.arrived.take().or_else(|| self.next_input())?;
        let Arrived { slot, next, end } = arrived;
        let byte = self.memory.inputs.read(usize::from(slot) * INPUT + next);
        if next + 1 < end {
            self.arrived = Some(Arrived { next: next + 1, ..arrived });
        } else {
            self.post(slot);
        }
        Some(byte)
    }

    fn is_idle(&mut self) -> bool {
        self.collect();
        !self.memory.transmit.is_busy()
    }

    fn patience_us(&mut self) -> u64 {
        if self.is_broken { 0 } else { TAKE_US }
    }
}

#[cfg(test)]
#[path = "console_tests.rs"]
mod tests;
