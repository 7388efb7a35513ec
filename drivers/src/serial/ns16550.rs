//! 16550 serial ports, behind I/O ports or memory.

#![allow(unsafe_code)]

use uart_16550::backend::Backend;
use uart_16550::spec::registers::{IER, LCR, LSR, MCR, offsets};
use uart_16550::spec::{CLK_FREQUENCY_HZ, FIFO_SIZE, NUM_REGISTERS};
use uart_16550::{BaudRate, Config, InitError, Uart16550};

use crate::clock::{Clock, Deadline};
use crate::mmio::Registers;
use crate::serial::{SEND_US, Transmitter};

/// A speed may be this fraction off: receivers sample ten bits without losing step up to a twentieth.
const SPEED_TOLERANCE: u32 = 32;

/// A 16550.
pub struct Ns16550<B: Backend> {
    uart: Uart16550<B>,
    clock_hz: Option<u32>,
    /// Characters that an empty transmitter takes at once.
    depth: usize,
}

impl<B: Backend> Ns16550<B> {
    /// The port of a PC, whose clock is that of the first PC.
    pub fn of_pc(uart: Uart16550<B>) -> Ns16550<B> {
        Ns16550 { uart, clock_hz: Some(CLK_FREQUENCY_HZ), depth: 1 }
    }
}

impl<R: Registers> Ns16550<MemoryBackend<R>> {
    /// A port in memory, with the frequency that its speed is divided from, if that is known.
    pub fn in_memory(
        backend: MemoryBackend<R>,
        clock_hz: Option<u32>,
    ) -> Ns16550<MemoryBackend<R>> {
        // SAFETY: the backend takes any register number: those that it lacks read as all ones.
        let uart = unsafe { Uart16550::new_with_backend(backend) };
        Ns16550 { uart, clock_hz, depth: 1 }
    }
}

impl<B: Backend> Ns16550<B> {
    /// Makes a port that is there able to send and to hear, however its last driver was interrupted:
    /// that may have been while it set the speed, sent a break or tested the port.
    fn free(&mut self) {
        let uart = &mut self.uart;
        let format = uart.lcr() - (LCR::DLAB | LCR::SET_BREAK);
        // SAFETY: writes a register that every port has.
        unsafe { uart.backend_mut().write(offsets::LCR as u8, format.bits()) };
        uart.disable_interrupts(IER::all());
        // Many a line takes nothing from, and brings nothing to, a side that is not ready.
        let signals = (uart.mcr() | MCR::DTR | MCR::RTS) - MCR::LOOP_BACK;
        // SAFETY: likewise.
        unsafe { uart.backend_mut().write(offsets::MCR as u8, signals.bits()) };
    }
}

impl<B: Backend> Transmitter for Ns16550<B> {
    fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool {
        let mut alive = self.uart.check_present();
        if alive {
            self.free();
        }
        let uart = &mut self.uart;
        let config = baud.zip(self.clock_hz).and_then(|(baud, clock_hz)| config(baud, clock_hz));
        if let (true, Some(config)) = (alive, config) {
            // `init` waits without a deadline until the transmitter is empty, and Linux may have
            // left characters in it: so wait here first, with one.
            let empty = Deadline::after_us(clock, SEND_US)
                .poll(clock, || uart.lsr().contains(LSR::TRANSMITTER_EMPTY).then_some(()));
            alive = empty.is_ok() && !matches!(uart.init(config), Err(InitError::DeviceNotPresent));
        }
        self.depth = if uart.isr().fifo_enabled() { FIFO_SIZE } else { 1 };
        alive
    }

    fn send_some(&mut self, bytes: &[u8]) -> usize {
        self.uart.send_bytes(&bytes[..bytes.len().min(self.depth)])
    }

    fn receive_one(&mut self) -> Option<u8> {
        let mut byte = [0];
        (self.uart.receive_bytes(&mut byte) == 1).then_some(byte[0])
    }

    fn is_idle(&mut self) -> bool {
        self.uart.lsr().contains(LSR::TRANSMITTER_EMPTY)
    }
}

/// The set-up for a speed, if the port can have it.
fn config(baud: u32, clock_hz: u32) -> Option<Config> {
    let per_step = baud.checked_mul(16).filter(|&per_step| per_step != 0)?;
    let divisor = clock_hz.checked_add(per_step / 2)? / per_step;
    // The crate wants a clock that is an exact multiple: this is it, as far as the divisor goes.
    let frequency = divisor.checked_mul(per_step).filter(|&frequency| frequency != 0)?;
    let near = frequency.abs_diff(clock_hz) <= clock_hz / SPEED_TOLERANCE;
    let baud_rate = BaudRate::from_integer(baud);
    near.then_some(Config { baud_rate, frequency, ..Config::DEFAULT })
}

/// Registers of a 16550 in memory, apart from each other and as wide as the machine has them.
pub struct MemoryBackend<R> {
    registers: R,
    shift: u8,
    wide: bool,
}

impl<R: Registers> MemoryBackend<R> {
    /// Registers that are `1 << shift` bytes apart and are accessed by `width` bytes: 4, or else 1.
    pub fn new(registers: R, shift: u8, width: u8) -> MemoryBackend<R> {
        MemoryBackend { registers, shift: shift.min(3), wide: width == 4 }
    }

    fn offset(&self, register: u8) -> u64 {
        debug_assert!(usize::from(register) < NUM_REGISTERS);
        u64::from(register) << self.shift
    }
}

impl<R: Registers> Backend for MemoryBackend<R> {
    // Nothing here is unsafe: `Registers` bounds every access. The trait only says so.
    unsafe fn read(&mut self, register: u8) -> u8 {
        let offset = self.offset(register);
        if self.wide { self.registers.read32(offset) as u8 } else { self.registers.read8(offset) }
    }

    unsafe fn write(&mut self, register: u8, value: u8) {
        let offset = self.offset(register);
        if self.wide {
            self.registers.write32(offset, value.into());
        } else {
            self.registers.write8(offset, value);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::firmware::{Uart, UartKind};
    use crate::serial::tests::Ticking;
    use crate::serial::{MemoryPort, SerialPort};
    use crate::{PhysAddr, serial};
    use core::cell::{Cell, RefCell};
    use std::vec::Vec;

    /// Registers of a port, which demands its stride and width; the line status says "busy" while
    /// `stuck`.
    #[derive(Default)]
    struct Device {
        registers: RefCell<[u8; 8]>,
        divisor: Cell<u16>,
        stuck: bool,
        gone: bool,
        shift: u8,
        width: u8,
        sent: RefCell<Vec<u8>>,
        input: RefCell<Vec<u8>>,
    }

    impl Device {
        fn register(&self, offset: u64, width: u8) -> usize {
            assert_eq!((offset % (1 << self.shift), width), (0, self.width));
            (offset >> self.shift) as usize
        }

        fn get(&self, offset: u64, width: u8) -> u8 {
            match self.register(offset, width) {
                _ if self.gone => 0xff,
                0 => self.input.borrow_mut().pop().expect("nothing has arrived"),
                5 => {
                    let arrived = u8::from(!self.input.borrow().is_empty());
                    arrived | if self.stuck { 0 } else { 0x60 }
                }
                2 => 0xc1,
                register => self.registers.borrow()[register],
            }
        }

        fn set(&self, offset: u64, value: u8, width: u8) {
            let mut registers = self.registers.borrow_mut();
            let divisor_latch = registers[3] & 0x80 != 0;
            match (self.register(offset, width), divisor_latch) {
                (0, false) => self.sent.borrow_mut().push(value),
                (0, true) => self.divisor.set(self.divisor.get() & 0xff00 | u16::from(value)),
                (1, true) => self.divisor.set(self.divisor.get() & 0xff | u16::from(value) << 8),
                (register, _) => registers[register] = value,
            }
        }
    }

    impl Registers for &Device {
        fn read8(&self, offset: u64) -> u8 {
            self.get(offset, 1)
        }
        fn read16(&self, _: u64) -> u16 {
            panic!("no such width")
        }
        fn read32(&self, offset: u64) -> u32 {
            u32::from(self.get(offset, 4)) | 0xdead_be00
        }
        fn write8(&self, offset: u64, value: u8) {
            self.set(offset, value, 1);
        }
        fn write16(&self, _: u64, _: u16) {
            panic!("no such width")
        }
        fn write32(&self, offset: u64, value: u32) {
            self.set(offset, value as u8, 4);
        }
    }

    fn device(shift: u8, width: u8) -> Device {
        Device { shift, width, ..Device::default() }
    }

    fn open(
        device: &Device,
        clock_hz: Option<u32>,
        baud: Option<u32>,
    ) -> (SerialPort<MemoryPort<&Device>>, Ticking) {
        let kind = UartKind::Ns16550 { register_shift: device.shift, register_width: device.width };
        let uart = Uart { kind, base: PhysAddr(0), clock_hz, baud: None };
        assert_eq!(serial::registers_size(kind), 8 << device.shift);
        let clock = Ticking(Cell::new(0));
        (SerialPort::open(&clock, MemoryPort::new(&uart, device), baud), clock)
    }

    /// The registers 1, 3 and 4 of a port in use: interrupts, format, signals.
    fn used(interrupts: u8, format: u8, signals: u8) -> Device {
        let device = device(0, 1);
        let registers = [0, interrupts, 0, format, signals, 0, 0, 0];
        device.registers.replace(registers);
        device
    }

    const PC: Option<u32> = Some(CLK_FREQUENCY_HZ);

    #[test]
    fn everything_is_sent_in_order_whatever_the_stride_and_the_width() {
        for (shift, width) in [(0, 1), (1, 1), (2, 1), (2, 4), (3, 4)] {
            let device = device(shift, width);
            let (mut port, clock) = open(&device, PC, Some(115_200));
            port.send(&clock, b"tinykdump: the first line of many\r\n");
            assert_eq!(*device.sent.borrow(), b"tinykdump: the first line of many\r\n");
            assert_eq!(device.divisor.get(), 1);
        }
    }

    #[test]
    fn port_that_its_driver_was_interrupted_at_sends_and_hears() {
        // While the speed was set, the line held in a break, the port connected to itself.
        let device = used(0x05, 0xc3, 0x18);
        device.input.borrow_mut().extend(b"olleh");
        let (mut port, clock) = open(&device, PC, None);
        assert!(port.send(&clock, b"here"));
        assert_eq!(*device.sent.borrow(), b"here");
        assert_eq!(device.registers.borrow()[..5], [0, 0, 0, 0x03, 0x0b]);
        let heard: Vec<u8> = core::iter::from_fn(|| port.receive()).collect();
        assert_eq!(heard, b"hello");
    }

    #[test]
    fn speed_that_the_port_cannot_have_leaves_it_as_it_was() {
        for (clock_hz, baud) in [(PC, 12_345), (PC, u32::MAX), (PC, 0), (None, 9600), (PC, 1)] {
            let device = device(0, 1);
            let (mut port, clock) = open(&device, clock_hz, Some(baud));
            port.send(&clock, b"still here");
            assert_eq!(*device.sent.borrow(), b"still here");
            assert_eq!(device.divisor.get(), 0, "{baud}");
        }
    }

    #[test]
    fn speed_that_is_near_enough_is_taken() {
        let device = device(2, 4);
        open(&device, Some(24_000_000), Some(115_200));
        assert_eq!(device.divisor.get(), 13);
    }

    #[test]
    fn stuck_port_is_not_set_up() {
        let device = Device { stuck: true, ..device(0, 1) };
        let (mut port, clock) = open(&device, PC, Some(9600));
        port.send(&clock, b"nobody");
        assert!(clock.now_us() < SEND_US + 1000);
        assert_eq!(device.divisor.get(), 0);
    }

    #[test]
    fn port_that_is_not_there_is_never_waited_for() {
        let device = Device { gone: true, ..device(0, 1) };
        let (mut port, clock) = open(&device, PC, Some(9600));
        port.send(&clock, b"nobody");
        assert!(clock.now_us() < 100);
    }
}
