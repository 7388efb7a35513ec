//! Serial ports at I/O ports.

use drivers::serial::Ns16550;
use uart_16550::Uart16550;
use uart_16550::backend::PioBackend;

/// I/O ports of ttyS0 to ttyS3 (arch/x86/include/asm/serial.h, kernel 6.1).
pub const IO_PORTS: [u16; 4] = [0x3f8, 0x2f8, 0x3e8, 0x2e8];

/// The registers of a serial port.
pub type IoPort = Ns16550<PioBackend>;

/// The registers of the serial port at the I/O ports from `at` on.
pub fn io_port(at: u16) -> Option<IoPort> {
    // SAFETY: by long convention nothing but a serial port is at the ports in IO_PORTS, and others
    // are only named by whoever set the machine up; where there is none, writes go nowhere and reads
    // give all ones.
    unsafe { Uart16550::new_port(at) }.ok().map(Ns16550::of_pc)
}
