//! Serial ports to print on and to dump over, with waits that end.

mod ns16550;
mod pl011;

pub use ns16550::{MemoryBackend, Ns16550};
pub use pl011::Pl011;

use heapless::Deque;

use crate::clock::{Clock, Deadline};
use crate::firmware::{Uart, UartKind};
use crate::mmio::Registers;

/// Longest wait for room in the transmitter. Sixteen characters at 300 baud take half a second; behind
/// a virtual machine's port may be a program that is busy for seconds. It is waited for once.
const SEND_US: u64 = 10_000_000;

/// Most bytes that are kept until somebody asks for them; later ones are lost.
const ARRIVED: usize = 2048;

/// The registers of a port that can send.
pub trait Transmitter {
    /// Makes the port ready as the dead kernel left it; with `baud`, set to that speed, 8 data bits,
    /// no parity. A speed that the port cannot have leaves it as it was. Returns whether the port is
    /// there and not stuck.
    fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool;

    /// Sends the first of `bytes`, as many as the port takes at once. Returns how many.
    fn send_some(&mut self, bytes: &[u8]) -> usize;

    /// The next byte that has arrived without an error.
    fn receive_one(&mut self) -> Option<u8>;

    /// Whether everything has left the port.
    fn is_idle(&mut self) -> bool;

    /// Longest wait for it to take something, or to have sent everything, in microseconds.
    fn patience_us(&mut self) -> u64 {
        SEND_US
    }
}

/// A serial port. A port that does not take a character in time is given up: output is
/// thrown away from then on, so that a broken port costs its deadline once.
pub struct SerialPort<T> {
    transmitter: T,
    alive: bool,
    /// What arrived and was not asked for yet: a port holds 16 bytes, and at 115200 bits per second
    /// sending a frame of the dump takes a thousand times as long as filling that.
    arrived: Deque<u8, ARRIVED>,
}

impl<T: Transmitter> SerialPort<T> {
    /// A port as the dead kernel left it; with `baud`, set to that speed, 8 data bits, no parity.
    pub fn open(clock: &dyn Clock, mut transmitter: T, baud: Option<u32>) -> SerialPort<T> {
        let alive = transmitter.prepare(clock, baud);
        SerialPort { transmitter, alive, arrived: Deque::new() }
    }

    /// Sends all of `bytes`, or as much as the port takes before its deadline, and takes in what
    /// arrives meanwhile. Returns whether all of it was taken.
    pub fn send(&mut self, clock: &dyn Clock, mut bytes: &[u8]) -> bool {
        while self.alive && !bytes.is_empty() {
            self.take_in();
            let mut sent = self.transmitter.send_some(bytes);
            if sent == 0 {
                let (transmitter, arrived) = (&mut self.transmitter, &mut self.arrived);
                let deadline = Deadline::after_us(clock, transmitter.patience_us());
                let room = deadline.poll(clock, || {
                    take_in(transmitter, arrived);
                    Some(transmitter.send_some(bytes)).filter(|&sent| sent > 0)
                });
                self.alive = room.is_ok();
                sent = room.unwrap_or(0);
            }
            bytes = bytes.get(sent..).unwrap_or(&[]);
        }
        self.alive
    }

    /// The next byte that arrived.
    pub fn receive(&mut self) -> Option<u8> {
        self.take_in();
        self.arrived.pop_front()
    }

    fn take_in(&mut self) {
        take_in(&mut self.transmitter, &mut self.arrived);
    }

    /// Waits until everything has left the port, or its deadline passes: a machine that is reset
    /// loses what is still in it.
    pub fn drain(&mut self, clock: &dyn Clock) {
        if self.alive {
            let transmitter = &mut self.transmitter;
            let deadline = Deadline::after_us(clock, transmitter.patience_us());
            let idle = || transmitter.is_idle().then_some(());
            self.alive = deadline.poll(clock, idle).is_ok();
        }
    }
}

/// Keeps what has arrived, no more at once than any port holds: one that is gone reads as anything.
fn take_in<T: Transmitter>(transmitter: &mut T, arrived: &mut Deque<u8, ARRIVED>) {
    const HELD: usize = 64;
    for _ in 0..HELD {
        let Some(byte) = transmitter.receive_one() else { return };
        let _ = arrived.push_back(byte);
    }
}

/// A port with registers in memory, of whatever kind firmware says it is.
pub enum MemoryPort<R: Registers> {
    /// A PL011, or the part of it that SBSA demands.
    Pl011(Pl011<R>),
    /// A 16550.
    Ns16550(Ns16550<MemoryBackend<R>>),
}

impl<R: Registers> MemoryPort<R> {
    /// The port that `uart` describes, with `registers` at its base, [`registers_size`] bytes of
    /// them.
    pub fn new(uart: &Uart, registers: R) -> MemoryPort<R> {
        match uart.kind {
            UartKind::Pl011 | UartKind::Sbsa => MemoryPort::Pl011(Pl011::new(uart, registers)),
            UartKind::Ns16550 { register_shift, register_width } => {
                let backend = MemoryBackend::new(registers, register_shift, register_width);
                MemoryPort::Ns16550(Ns16550::in_memory(backend, uart.clock_hz))
            }
        }
    }
}

impl<R: Registers> Transmitter for MemoryPort<R> {
    fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool {
        match self {
            MemoryPort::Pl011(port) => port.prepare(clock, baud),
            MemoryPort::Ns16550(port) => port.prepare(clock, baud),
        }
    }

    fn send_some(&mut self, bytes: &[u8]) -> usize {
        match self {
            MemoryPort::Pl011(port) => port.send_some(bytes),
            MemoryPort::Ns16550(port) => port.send_some(bytes),
        }
    }

    fn receive_one(&mut self) -> Option<u8> {
        match self {
            MemoryPort::Pl011(port) => port.receive_one(),
            MemoryPort::Ns16550(port) => port.receive_one(),
        }
    }

    fn is_idle(&mut self) -> bool {
        match self {
            MemoryPort::Pl011(port) => port.is_idle(),
            MemoryPort::Ns16550(port) => port.is_idle(),
        }
    }
}

/// Bytes of registers that a port of this kind has.
#[must_use]
pub fn registers_size(kind: UartKind) -> u64 {
    match kind {
        UartKind::Pl011 | UartKind::Sbsa => pl011::SIZE,
        UartKind::Ns16550 { register_shift, .. } => 8 << register_shift.min(3),
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;
    use core::cell::Cell;
    use std::vec::Vec;

    /// A clock that goes on by ten microseconds each time it is looked at.
    pub struct Ticking(pub Cell<u64>);

    impl Clock for Ticking {
        fn now_us(&self) -> u64 {
            self.0.set(self.0.get() + 10);
            self.0.get()
        }
    }

    /// Takes three characters at a time, and none while `stuck`; brings `input`.
    #[derive(Default)]
    struct Fake {
        sent: Vec<u8>,
        stuck: bool,
        input: Vec<u8>,
    }

    impl Transmitter for Fake {
        fn prepare(&mut self, _: &dyn Clock, _: Option<u32>) -> bool {
            true
        }

        fn send_some(&mut self, bytes: &[u8]) -> usize {
            let some = if self.stuck { 0 } else { bytes.len().min(3) };
            self.sent.extend(&bytes[..some]);
            some
        }

        fn receive_one(&mut self) -> Option<u8> {
            self.input.pop()
        }

        fn is_idle(&mut self) -> bool {
            !self.stuck
        }
    }

    #[test]
    fn everything_is_sent_in_order() {
        let clock = Ticking(Cell::new(0));
        let mut port = SerialPort::open(&clock, Fake::default(), None);
        port.send(&clock, b"tinykdump: the first line of many\r\n");
        assert_eq!(port.transmitter.sent, b"tinykdump: the first line of many\r\n");
    }

    #[test]
    fn what_arrives_while_something_is_sent_is_kept() {
        let clock = Ticking(Cell::new(0));
        let input = b"answer".iter().rev().copied().collect();
        let mut port = SerialPort::open(&clock, Fake { input, ..Fake::default() }, None);
        assert!(port.send(&clock, b"question"));
        assert!(port.transmitter.input.is_empty());
        let answer: Vec<u8> = core::iter::from_fn(|| port.receive()).collect();
        assert_eq!(answer, b"answer");
    }

    #[test]
    fn port_that_babbles_does_not_hold_up_what_is_sent() {
        let clock = Ticking(Cell::new(0));
        let input = std::vec![b'!'; 1 << 20];
        let mut port = SerialPort::open(&clock, Fake { input, ..Fake::default() }, None);
        assert!(port.send(&clock, b"question"));
        assert!(port.transmitter.input.len() > 1 << 19);
    }

    #[test]
    fn stuck_port_costs_its_deadline_once_and_is_given_up() {
        let clock = Ticking(Cell::new(0));
        let mut port = SerialPort::open(&clock, Fake { stuck: true, ..Fake::default() }, None);
        port.send(&clock, b"nobody");
        let after_first = clock.now_us();
        assert!((SEND_US..SEND_US + 1000).contains(&after_first));
        port.send(&clock, b"listens");
        assert!(clock.now_us() < after_first + 100);
        assert!(port.transmitter.sent.is_empty());
        port.drain(&clock);
        assert!(clock.now_us() < after_first + 200);
    }

    #[test]
    fn port_that_never_drains_is_waited_for_once() {
        let clock = Ticking(Cell::new(0));
        let mut port = SerialPort::open(&clock, Fake { stuck: true, ..Fake::default() }, None);
        port.drain(&clock);
        let after_first = clock.now_us();
        assert!((SEND_US..SEND_US + 1000).contains(&after_first));
        port.drain(&clock);
        assert!(clock.now_us() < after_first + 100);
    }
}
