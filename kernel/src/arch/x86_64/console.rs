//! Serial ports at their traditional I/O ports.

use capture::options::Console;
use drivers::firmware::Firmware;
use drivers::serial::Ns16550;
use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;

use crate::memory::PhysicalMemory;

/// The registers of a serial port.
pub type Port = Ns16550<PioBackend>;

/// I/O ports of ttyS0 to ttyS3 (arch/x86/include/asm/serial.h, kernel 6.1).
const PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];

/// The registers of the serial port that the command line names. Firmware is not asked: it knows of
/// no port that is not at these addresses, or of one that Linux calls otherwise.
#[must_use]
pub fn port(options: Console, _: &Firmware, _: &PhysicalMemory<'_>) -> Option<Port> {
    let port = *PORTS.get(usize::from(options.port))?;
    // SAFETY: by long convention nothing but a serial port is at these ports; where there is none,
    // writes go nowhere and reads give all ones.
    unsafe { Uart16550::new_port(port) }.ok().map(Ns16550::of_pc)
}
