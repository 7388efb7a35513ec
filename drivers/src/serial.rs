//! 16550 serial ports, with waits that end.

use uart_16550::backend::Backend;
use uart_16550::spec::FIFO_SIZE;
use uart_16550::spec::registers::LSR;
use uart_16550::{BaudRate, Config, InitError, Uart16550};

use crate::clock::{Clock, Deadline};

/// Longest wait for room in the transmitter: sixteen characters at 300 baud take half a second.
const SEND_US: u64 = 600_000;

/// A serial port to print on. A port that does not take a character in time is given up: output is
/// thrown away from then on, so that a broken port costs its deadline once.
pub struct SerialPort<B: Backend> {
    uart: Uart16550<B>,
    alive: bool,
    /// Characters that an empty transmitter takes at once.
    depth: usize,
}

impl<B: Backend> SerialPort<B> {
    /// A port as the dead kernel left it; with `baud`, set to that speed, 8 data bits, no parity.
    pub fn open(clock: &dyn Clock, mut uart: Uart16550<B>, baud: Option<u32>) -> SerialPort<B> {
        let mut alive = uart.check_present();
        if let (true, Some(baud)) = (alive, baud) {
            // `init` waits without a deadline until the transmitter is empty, and Linux may have
            // left characters in it: so wait here first, with one.
            let empty = Deadline::after_us(clock, SEND_US)
                .poll(clock, || uart.lsr().contains(LSR::TRANSMITTER_EMPTY).then_some(()));
            let config = Config { baud_rate: BaudRate::from_integer(baud), ..Config::DEFAULT };
            // A speed that the port cannot have leaves it as it was.
            alive = empty.is_ok() && !matches!(uart.init(config), Err(InitError::DeviceNotPresent));
        }
        let depth = if uart.isr().fifo_enabled() { FIFO_SIZE } else { 1 };
        SerialPort { uart, alive, depth }
    }

    /// Sends all of `bytes`, or as much as the port takes before its deadline.
    pub fn send(&mut self, clock: &dyn Clock, mut bytes: &[u8]) {
        while self.alive && !bytes.is_empty() {
            let some = &bytes[..bytes.len().min(self.depth)];
            let uart = &mut self.uart;
            let sent =
                Deadline::after_us(clock, SEND_US).poll(clock, || match uart.send_bytes(some) {
                    0 => None,
                    sent => Some(sent),
                });
            match sent {
                Ok(sent) => bytes = bytes.get(sent..).unwrap_or(&[]),
                Err(_) => self.alive = false,
            }
        }
    }
}

#[cfg(test)]
#[allow(unsafe_code)]
mod tests {
    use super::*;
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    struct Ticking(Cell<u64>);

    impl Clock for Ticking {
        fn now_us(&self) -> u64 {
            self.0.set(self.0.get() + 10);
            self.0.get()
        }
    }

    /// Registers of a port; the line status says "busy" while `stuck`.
    struct Fake<'a> {
        registers: [u8; 8],
        stuck: bool,
        sent: &'a RefCell<Vec<u8>>,
    }

    impl Backend for Fake<'_> {
        unsafe fn read(&mut self, register: u8) -> u8 {
            match register {
                5 if self.stuck => 0,
                5 => 0x60,
                2 => 0xc1,
                _ => self.registers[usize::from(register)],
            }
        }

        unsafe fn write(&mut self, register: u8, value: u8) {
            let divisor_latch = self.registers[3] & 0x80 != 0;
            if register == 0 && !divisor_latch {
                self.sent.borrow_mut().push(value);
            }
            self.registers[usize::from(register)] = value;
        }
    }

    fn port(
        sent: &RefCell<Vec<u8>>,
        stuck: bool,
        baud: Option<u32>,
    ) -> (SerialPort<Fake<'_>>, Ticking) {
        let clock = Ticking(Cell::new(0));
        let fake = Fake { registers: [0; 8], stuck, sent };
        // SAFETY: the fake has registers at every offset.
        let uart = unsafe { Uart16550::new_with_backend(fake) };
        (SerialPort::open(&clock, uart, baud), clock)
    }

    #[test]
    fn everything_is_sent_in_order() {
        let sent = RefCell::default();
        let (mut port, clock) = port(&sent, false, Some(115_200));
        port.send(&clock, b"tinykdump: the first line of many\r\n");
        assert_eq!(*sent.borrow(), b"tinykdump: the first line of many\r\n");
    }

    #[test]
    fn stuck_port_costs_its_deadline_once_and_is_given_up() {
        let sent = RefCell::default();
        let (mut port, clock) = port(&sent, true, None);
        port.send(&clock, b"nobody");
        let after_first = clock.now_us();
        assert!((SEND_US..SEND_US + 1000).contains(&after_first));
        port.send(&clock, b"listens");
        assert!(clock.now_us() < after_first + 100);
        assert!(sent.borrow().is_empty());
    }

    #[test]
    fn speed_that_the_port_cannot_have_leaves_it_as_it_was() {
        let sent = RefCell::default();
        let (mut port, clock) = port(&sent, false, Some(12_345));
        port.send(&clock, b"still here");
        assert_eq!(*sent.borrow(), b"still here");
    }

    #[test]
    fn stuck_port_is_not_set_up() {
        let sent = RefCell::default();
        let (mut port, clock) = port(&sent, true, Some(9600));
        port.send(&clock, b"nobody");
        assert!(clock.now_us() < SEND_US + 1000);
    }
}
