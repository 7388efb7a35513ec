//! The serial port that the dump goes over.

use capture::Machine;
use capture::card::Sink;
use capture::line::Line;
use capture::options::{Console, Port, PortPlace};
use drivers::firmware::{Firmware, Uart, UartKind};
use drivers::mmio::Mmio;
use drivers::serial::{MemoryPort, SerialPort, registers_size};
use drivers::{PhysAddr, Physical};

use crate::arch;
use crate::memory::PhysicalMemory;
use crate::time::PayloadClock;

/// A port of the dump's own.
pub struct OwnLine(SerialPort<arch::console::Named>);

impl OwnLine {
    /// Opens `port`, if it is there.
    pub fn open(port: &Port, memory: &PhysicalMemory<'_>) -> Option<OwnLine> {
        let registers = arch::console::named(port.place, memory)?;
        Some(OwnLine(SerialPort::open(&PayloadClock, registers, port.baud)))
    }

    /// Waits until everything has left it.
    pub fn drain(&mut self) {
        self.0.drain(&PayloadClock);
    }
}

/// The crash card on it.
impl Sink for OwnLine {
    fn line(&mut self, _: &mut dyn Machine, line: &str) {
        self.send(line.as_bytes());
        self.send(b"\r\n");
    }
}

impl Line for OwnLine {
    fn send(&mut self, bytes: &[u8]) -> bool {
        self.0.send(&PayloadClock, bytes)
    }

    fn receive(&mut self) -> Option<u8> {
        self.0.receive()
    }
}

/// Whether `port` is the console's.
pub fn is_console(port: &Port, console: Console, firmware: &Firmware) -> bool {
    match port.place {
        PortPlace::Pc(number) => number == console.port,
        PortPlace::Io(_) => false,
        PortPlace::Memory { at, .. } | PortPlace::Pl011 { at, .. } => {
            firmware.console.is_some_and(|uart| uart.base == PhysAddr(at))
        }
    }
}

/// The registers of a port in memory.
pub fn in_memory(place: PortPlace, memory: &PhysicalMemory<'_>) -> Option<MemoryPort<Mmio>> {
    let (at, kind) = match place {
        PortPlace::Pc(_) | PortPlace::Io(_) => return None,
        PortPlace::Memory { at, wide: false } => {
            (at, UartKind::Ns16550 { register_shift: 0, register_width: 1 })
        }
        PortPlace::Memory { at, wide: true } => {
            (at, UartKind::Ns16550 { register_shift: 2, register_width: 4 })
        }
        PortPlace::Pl011 { at, sbsa: false } => (at, UartKind::Pl011),
        PortPlace::Pl011 { at, sbsa: true } => (at, UartKind::Sbsa),
    };
    let base = PhysAddr(at);
    let registers = memory.map_device(base, registers_size(kind))?;
    Some(MemoryPort::new(&Uart { kind, base, clock_hz: None, baud: None }, registers))
}
