//! Serial ports: all are in memory.

use drivers::mmio::Mmio;
use drivers::serial::MemoryPort;

/// Ports at the same addresses on every machine: none. Which port Linux calls `ttyAMA1` or `ttyS1`
/// depends on the order of its drivers.
pub const IO_PORTS: [u16; 0] = [];

/// The registers of a port at I/O ports, of which there is none.
pub type IoPort = MemoryPort<Mmio>;

/// No port: there are no I/O ports.
pub fn io_port(_: u16) -> Option<IoPort> {
    None
}
