//! ARM's PL011, and the part of it that the server base system architecture demands.
//!
//! Source: PrimeCell UART (PL011) Technical Reference Manual, ARM DDI 0183, chapter 3; ARM Server
//! Base System Architecture, ARM DEN 0029, appendix B. All accesses are of 32 bits, which both take.

use crate::clock::{Clock, Deadline};
use crate::firmware::{Uart, UartKind};
use crate::mmio::Registers;
use crate::serial::{SEND_US, Transmitter};

/// Bytes of registers that are used.
pub(super) const SIZE: u64 = 0x48;

/// Registers. SBSA has only the first two of these.
mod register {
    pub const DATA: u64 = 0x00;
    pub const FLAGS: u64 = 0x18;
    pub const INTEGER_DIVISOR: u64 = 0x24;
    pub const FRACTIONAL_DIVISOR: u64 = 0x28;
    pub const LINE_CONTROL: u64 = 0x2c;
    pub const CONTROL: u64 = 0x30;
}

/// Bits of the flag register.
mod flag {
    pub const BUSY: u32 = 1 << 3;
    pub const RECEIVER_EMPTY: u32 = 1 << 4;
    pub const TRANSMITTER_FULL: u32 = 1 << 5;
    pub const TRANSMITTER_EMPTY: u32 = 1 << 7;
}

/// Bits of the control register.
mod control {
    pub const ENABLE: u32 = 1;
    pub const TRANSMIT: u32 = 1 << 8;
    pub const RECEIVE: u32 = 1 << 9;
    pub const CTS_FLOW: u32 = 1 << 15;
}

/// Bits of the data register, beside the byte that arrived: what was wrong with it.
const DATA_ERRORS: u32 = 0xf << 8;

/// Eight bits with FIFOs, no parity, one stop bit.
const EIGHT_BITS_WITH_FIFO: u32 = 0b11 << 5 | 1 << 4;

/// The speed of a port that nobody has ever set up, when firmware does not say one.
const DEFAULT_BAUD: u32 = 115_200;

/// A PL011.
pub struct Pl011<R> {
    registers: R,
    /// Only data and flags exist.
    is_sbsa: bool,
    clock_hz: Option<u32>,
    firmware_baud: Option<u32>,
}

impl<R: Registers> Pl011<R> {
    /// The port that `uart` describes, with `registers` at its base.
    pub fn new(uart: &Uart, registers: R) -> Pl011<R> {
        let is_sbsa = uart.kind == UartKind::Sbsa;
        Pl011 { registers, is_sbsa, clock_hz: uart.clock_hz, firmware_baud: uart.baud }
    }

    /// A port cannot be both full and empty, and one that is gone says so.
    fn present(&self) -> bool {
        const IMPOSSIBLE: u32 = flag::TRANSMITTER_FULL | flag::TRANSMITTER_EMPTY;
        self.registers.read32(register::FLAGS) & IMPOSSIBLE != IMPOSSIBLE
    }

    fn is_set_up(&self) -> bool {
        self.registers.read32(register::INTEGER_DIVISOR) & 0xffff != 0
    }

    /// Sets speed and format. To be done while the port is off.
    fn set_up(&self, divisor: u32) {
        self.registers.write32(register::INTEGER_DIVISOR, divisor >> 6);
        self.registers.write32(register::FRACTIONAL_DIVISOR, divisor & 0x3f);
        // This write makes the divisor count as well.
        self.registers.write32(register::LINE_CONTROL, EIGHT_BITS_WITH_FIFO);
    }
}

impl<R: Registers> Transmitter for Pl011<R> {
    fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool {
        if self.is_sbsa || !self.present() {
            return self.present();
        }
        let baud = match baud {
            None if self.is_set_up() => None,
            None => self.firmware_baud.or(Some(DEFAULT_BAUD)),
            told => told,
        };
        let divisor = baud.zip(self.clock_hz).and_then(|(baud, hz)| divisor(baud, hz));
        if let Some(divisor) = divisor {
            let idle = Deadline::after_us(clock, SEND_US).poll(clock, || {
                (self.registers.read32(register::FLAGS) & flag::BUSY == 0).then_some(())
            });
            if idle.is_err() {
                return false;
            }
            self.registers.write32(register::CONTROL, 0);
            self.set_up(divisor);
            let on = control::ENABLE | control::TRANSMIT | control::RECEIVE;
            self.registers.write32(register::CONTROL, on);
        }
        // Linux turns a port that is only its console on for every line, and off after it; and it
        // sends without asking the other side meanwhile.
        let before = self.registers.read32(register::CONTROL);
        let listening = control::ENABLE | control::TRANSMIT | control::RECEIVE;
        let on = (before | listening) & !control::CTS_FLOW;
        if on != before {
            self.registers.write32(register::CONTROL, on);
        }
        true
    }

    fn send_some(&mut self, bytes: &[u8]) -> usize {
        for (sent, &byte) in bytes.iter().enumerate() {
            if self.registers.read32(register::FLAGS) & flag::TRANSMITTER_FULL != 0 {
                return sent;
            }
            self.registers.write32(register::DATA, byte.into());
        }
        bytes.len()
    }

    fn receive_one(&mut self) -> Option<u8> {
        if self.registers.read32(register::FLAGS) & flag::RECEIVER_EMPTY != 0 {
            return None;
        }
        let data = self.registers.read32(register::DATA);
        (data & DATA_ERRORS == 0).then_some(data as u8)
    }

    fn is_idle(&mut self) -> bool {
        self.registers.read32(register::FLAGS) & flag::BUSY == 0
    }
}

/// The divisor for a speed in units of 1/64 (section 3.3.6), if the port can have it.
fn divisor(baud: u32, clock_hz: u32) -> Option<u32> {
    let (baud, clock_hz) = (u64::from(baud), u64::from(clock_hz));
    let divisor = (4 * clock_hz + baud / 2).checked_div(baud)?;
    (64..=0xffff << 6).contains(&divisor).then_some(divisor as u32)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::PhysAddr;
    use crate::serial::tests::Ticking;
    use crate::serial::{MemoryPort, SerialPort};
    use core::cell::{Cell, RefCell};
    use std::collections::BTreeMap;
    use std::vec::Vec;

    /// Registers of a port whose FIFO takes a few characters and is emptied when it was found full
    /// often enough.
    #[derive(Default)]
    struct Device {
        registers: RefCell<BTreeMap<u64, u32>>,
        written: RefCell<Vec<(u64, u32)>>,
        waiting: Cell<usize>,
        polls: Cell<usize>,
        stuck: bool,
        busy: bool,
        gone: bool,
        sent: RefCell<Vec<u8>>,
    }

    const FIFO: usize = 4;

    impl Registers for &Device {
        fn read8(&self, _: u64) -> u8 {
            panic!("access of 8 bits")
        }
        fn read16(&self, _: u64) -> u16 {
            panic!("access of 16 bits")
        }
        fn read32(&self, offset: u64) -> u32 {
            if self.gone {
                return u32::MAX;
            }
            if offset != 0x18 {
                return self.registers.borrow().get(&offset).copied().unwrap_or(0);
            }
            let busy = if self.busy { 1 << 3 } else { 0 };
            if self.waiting.get() < FIFO && !self.stuck {
                return busy;
            }
            self.polls.set(self.polls.get() + 1);
            if self.polls.get().is_multiple_of(5) {
                self.waiting.set(0);
            }
            1 << 5 | busy
        }
        fn write8(&self, _: u64, _: u8) {
            panic!("access of 8 bits")
        }
        fn write16(&self, _: u64, _: u16) {
            panic!("access of 16 bits")
        }
        fn write32(&self, offset: u64, value: u32) {
            self.written.borrow_mut().push((offset, value));
            if offset == 0 {
                assert!(self.waiting.get() < FIFO, "a character was lost");
                self.waiting.set(self.waiting.get() + 1);
                self.sent.borrow_mut().push(value as u8);
            }
            self.registers.borrow_mut().insert(offset, value);
        }
    }

    fn open(
        device: &Device,
        kind: UartKind,
        baud: Option<u32>,
    ) -> (SerialPort<MemoryPort<&Device>>, Ticking) {
        let uart = Uart { kind, base: PhysAddr(0), clock_hz: Some(24_000_000), baud: Some(9600) };
        let clock = Ticking(Cell::new(0));
        (SerialPort::open(&clock, MemoryPort::new(&uart, device), baud), clock)
    }

    /// A port that Linux has set up and turned off.
    fn used() -> Device {
        let device = Device::default();
        device.registers.borrow_mut().extend([(0x24, 13), (0x28, 1), (0x2c, 0x70), (0x30, 0x8200)]);
        device
    }

    #[test]
    fn everything_is_sent_in_order_through_a_full_fifo() {
        for kind in [UartKind::Pl011, UartKind::Sbsa] {
            let device = used();
            let (mut port, clock) = open(&device, kind, None);
            port.send(&clock, b"tinykdump: the first line of many\r\n");
            assert_eq!(*device.sent.borrow(), b"tinykdump: the first line of many\r\n");
        }
    }

    #[test]
    fn port_that_linux_left_off_is_turned_on_and_keeps_its_speed() {
        let device = used();
        open(&device, UartKind::Pl011, None);
        assert_eq!(*device.written.borrow(), [(0x30, 0x301)]);
    }

    #[test]
    fn sbsa_port_is_not_set_up() {
        let device = used();
        open(&device, UartKind::Sbsa, Some(115_200));
        assert!(device.written.borrow().is_empty());
    }

    #[test]
    fn speed_is_set_while_the_port_is_off() {
        let device = used();
        open(&device, UartKind::Pl011, Some(115_200));
        let expected = [(0x30, 0), (0x24, 13), (0x28, 1), (0x2c, 0x70), (0x30, 0x301)];
        assert_eq!(*device.written.borrow(), expected);
    }

    #[test]
    fn port_that_nobody_set_up_gets_the_speed_that_firmware_says() {
        let device = Device::default();
        open(&device, UartKind::Pl011, None);
        assert_eq!(device.registers.borrow()[&0x24], 156);
        assert_eq!(device.registers.borrow()[&0x2c], 0x70);
    }

    #[test]
    fn speed_that_the_port_cannot_have_leaves_it_as_it_was() {
        for baud in [0, 1, 5, 1_600_000, u32::MAX] {
            let device = used();
            let (mut port, clock) = open(&device, UartKind::Pl011, Some(baud));
            port.send(&clock, b"here");
            assert_eq!(*device.sent.borrow(), b"here");
            assert_eq!(device.registers.borrow()[&0x24], 13, "{baud}");
        }
    }

    #[test]
    fn stuck_port_costs_its_deadline_once_and_is_given_up() {
        let device = Device { stuck: true, ..used() };
        let (mut port, clock) = open(&device, UartKind::Sbsa, None);
        port.send(&clock, b"nobody");
        port.send(&clock, b"listens");
        assert!((SEND_US..SEND_US + 1000).contains(&clock.now_us()));
        assert!(device.sent.borrow().is_empty());
    }

    #[test]
    fn port_that_never_falls_idle_is_given_up_untouched() {
        let device = Device { busy: true, ..used() };
        let (mut port, clock) = open(&device, UartKind::Pl011, Some(115_200));
        port.send(&clock, b"nobody");
        assert!(clock.now_us() < SEND_US + 1000);
        assert!(device.written.borrow().is_empty());
    }

    #[test]
    fn port_that_is_not_there_is_never_waited_for() {
        for kind in [UartKind::Pl011, UartKind::Sbsa] {
            let device = Device { gone: true, ..Device::default() };
            let (mut port, clock) = open(&device, kind, Some(9600));
            port.send(&clock, b"nobody");
            assert!(clock.now_us() < 100);
        }
    }
}
