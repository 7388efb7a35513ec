//! The serial port that firmware calls its console: in memory, of whatever kind.

use capture::options::{Console, PortPlace};
use drivers::firmware::Firmware;
use drivers::mmio::Mmio;
use drivers::serial::{MemoryPort, registers_size};

use crate::memory::PhysicalMemory;
use crate::port;

/// The registers of a serial port.
pub type Port = MemoryPort<Mmio>;

/// The registers of the console's port, if firmware names one. Its number on the command line is not
/// looked at: which port Linux calls `ttyAMA1` or `ttyS1` depends on the order of its drivers.
#[must_use]
pub fn port(_: Console, firmware: &Firmware, memory: &PhysicalMemory<'_>) -> Option<Port> {
    let uart = firmware.console?;
    let registers = memory.map_early(uart.base, registers_size(uart.kind))?;
    Some(MemoryPort::new(&uart, registers))
}

/// The registers of a serial port that an option names.
pub type Named = MemoryPort<Mmio>;

/// The registers at `place`, if they can be there: all ports are in memory.
#[must_use]
pub fn named(place: PortPlace, memory: &PhysicalMemory<'_>) -> Option<Named> {
    port::in_memory(place, memory)
}
