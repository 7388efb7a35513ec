//! Serial ports at their traditional I/O ports.

use capture::options::{Console, PortPlace};
use drivers::clock::Clock;
use drivers::firmware::Firmware;
use drivers::mmio::Mmio;
use drivers::serial::{MemoryPort, Ns16550, Transmitter};
use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;

use crate::memory::PhysicalMemory;
use crate::port;

/// The registers of a serial port.
pub type Port = Ns16550<PioBackend>;

/// I/O ports of ttyS0 to ttyS3 (arch/x86/include/asm/serial.h, kernel 6.1).
const PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];

/// The registers of the serial port that the command line names. Firmware is not asked: it knows of
/// no port that is not at these addresses, or of one that Linux calls otherwise.
#[must_use]
pub fn port(options: Console, _: &Firmware, _: &PhysicalMemory<'_>) -> Option<Port> {
    pc_port(*PORTS.get(usize::from(options.port))?)
}

fn pc_port(port: u16) -> Option<Port> {
    // SAFETY: by long convention nothing but a serial port is at these ports; where there is none,
    // writes go nowhere and reads give all ones.
    unsafe { Uart16550::new_port(port) }.ok().map(Ns16550::of_pc)
}

/// The registers of a serial port that an option names.
pub enum Named {
    /// At I/O ports.
    Io(Port),
    /// In memory.
    Memory(MemoryPort<Mmio>),
}

/// The registers at `place`, if they can be there.
#[must_use]
pub fn named(place: PortPlace, memory: &PhysicalMemory<'_>) -> Option<Named> {
    match place {
        PortPlace::Pc(number) => pc_port(*PORTS.get(usize::from(number))?).map(Named::Io),
        PortPlace::Io(at) => pc_port(at).map(Named::Io),
        _ => port::in_memory(place, memory).map(Named::Memory),
    }
}

impl Transmitter for Named {
    fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool {
        match self {
            Named::Io(port) => port.prepare(clock, baud),
            Named::Memory(port) => port.prepare(clock, baud),
        }
    }

    fn send_some(&mut self, bytes: &[u8]) -> usize {
        match self {
            Named::Io(port) => port.send_some(bytes),
            Named::Memory(port) => port.send_some(bytes),
        }
    }

    fn receive_one(&mut self) -> Option<u8> {
        match self {
            Named::Io(port) => port.receive_one(),
            Named::Memory(port) => port.receive_one(),
        }
    }

    fn is_idle(&mut self) -> bool {
        match self {
            Named::Io(port) => port.is_idle(),
            Named::Memory(port) => port.is_idle(),
        }
    }
}
