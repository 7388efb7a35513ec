//! The ports that the payload knows: which one an option means, how it is opened, and the dump's own.

use capture::Machine;
use capture::card::Sink;
use capture::line::Line;
use capture::options::{Console, Port, PortPlace};
use drivers::clock::Clock;
use drivers::firmware::{self, Firmware, UartKind};
use drivers::mmio::Mmio;
use drivers::serial::{MemoryPort, SerialPort, Transmitter, registers_size};
use drivers::virtio::console::VirtioConsole;
use drivers::virtio::mmio::{self, MmioTransport};
use drivers::virtio::pci::{self as virtio_pci, PciTransport};
use drivers::virtio::{OpenError, Transport};
use drivers::{PhysAddr, Physical, pci};

use crate::arch::console::{IO_PORTS, IoPort, io_port};
use crate::memory::PhysicalMemory;
use crate::time::PayloadClock;
use crate::{arch, say};

/// Where a serial port is.
#[derive(Clone, Copy)]
pub enum Place {
    /// At I/O ports from this one on.
    Io(u16),
    /// In memory, of this kind.
    Memory(firmware::Uart),
}

/// The place of the console's port, if that is known. What the command line names counts, as far as
/// this machine can have it; else it is the first of the ports that have always been at the same
/// addresses, and where there are none such, what firmware calls its console.
pub fn console(options: Console, firmware: &Firmware) -> Option<Place> {
    let named = options.place.and_then(|place| resolve(place, firmware));
    let usual = || IO_PORTS.first().map(|&at| Place::Io(at));
    named.or_else(usual).or(firmware.console.map(Place::Memory))
}

/// Whether `port` is the console's.
pub fn is_console(port: &Port, options: Console, firmware: &Firmware) -> bool {
    match (resolve(port.place, firmware), console(options, firmware)) {
        (Some(Place::Io(port)), Some(Place::Io(console))) => port == console,
        (Some(Place::Memory(port)), Some(Place::Memory(console))) => port.base == console.base,
        _ => false,
    }
}

/// Where the serial port `place` is. `None` for what this machine cannot have, and for what is no
/// serial port.
fn resolve(place: PortPlace, firmware: &Firmware) -> Option<Place> {
    let (at, kind) = match place {
        PortPlace::Pc(number) => return IO_PORTS.get(usize::from(number)).copied().map(Place::Io),
        PortPlace::Io(at) => return IO_PORTS.first().map(|_| Place::Io(at)),
        PortPlace::VirtioConsole => return None,
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
    // Firmware may know the clock that its speed is divided from.
    let known = firmware.console.filter(|console| console.base == base);
    let clock_hz = known.and_then(|console| console.clock_hz);
    let baud = known.and_then(|console| console.baud);
    Some(Place::Memory(firmware::Uart { kind, base, clock_hz, baud }))
}

/// The registers of a serial port.
pub enum Uart {
    /// At I/O ports.
    Io(IoPort),
    /// In memory.
    Memory(MemoryPort<Mmio>),
}

impl Uart {
    /// The registers at `place`, which `map` maps if they are in memory.
    pub fn at(place: Place, map: impl FnOnce(PhysAddr, u64) -> Option<Mmio>) -> Option<Uart> {
        match place {
            Place::Io(at) => io_port(at).map(Uart::Io),
            Place::Memory(uart) => {
                let registers = map(uart.base, registers_size(uart.kind))?;
                Some(Uart::Memory(MemoryPort::new(&uart, registers)))
            }
        }
    }

    fn inner(&mut self) -> &mut dyn Transmitter {
        match self {
            Uart::Io(port) => port,
            Uart::Memory(port) => port,
        }
    }
}

/// Whatever a dump of its own line goes through.
enum AnyPort {
    Uart(Uart),
    VirtioPci(VirtioConsole<'static, PciTransport<Mmio>>),
    VirtioMmio(VirtioConsole<'static, MmioTransport<Mmio>>),
}

impl AnyPort {
    fn inner(&mut self) -> &mut dyn Transmitter {
        match self {
            AnyPort::Uart(port) => port,
            AnyPort::VirtioPci(port) => port,
            AnyPort::VirtioMmio(port) => port,
        }
    }
}

/// Makes a [`Transmitter`] of what has one inside.
macro_rules! transmit_through_inner {
    ($port:ty) => {
        impl Transmitter for $port {
            fn prepare(&mut self, clock: &dyn Clock, baud: Option<u32>) -> bool {
                self.inner().prepare(clock, baud)
            }

            fn send_some(&mut self, bytes: &[u8]) -> usize {
                self.inner().send_some(bytes)
            }

            fn receive_one(&mut self) -> Option<u8> {
                self.inner().receive_one()
            }

            fn is_idle(&mut self) -> bool {
                self.inner().is_idle()
            }

            fn patience_us(&mut self) -> u64 {
                self.inner().patience_us()
            }
        }
    };
}

transmit_through_inner!(Uart);
transmit_through_inner!(AnyPort);

/// A port of the dump's own.
pub struct OwnLine(SerialPort<AnyPort>);

impl OwnLine {
    /// Opens `port`, if it is there. The dead kernel's memory is known.
    pub fn open(port: &Port, firmware: &Firmware, memory: &PhysicalMemory<'_>) -> Option<OwnLine> {
        let registers = if port.place == PortPlace::VirtioConsole {
            find_virtio_console(firmware, memory)?
        } else {
            let place = resolve(port.place, firmware)?;
            AnyPort::Uart(Uart::at(place, |at, size| memory.map_device(at, size))?)
        };
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

/// The first virtio console that can be driven.
fn find_virtio_console(firmware: &Firmware, memory: &PhysicalMemory<'_>) -> Option<AnyPort> {
    let mut found = None;
    arch::pci::each_config_space(firmware, memory, &mut |config| {
        pci::each_function(config, &mut |at| {
            if found.is_some() || !virtio_pci::is_console(pci::identity(config, at)) {
                return;
            }
            found = match PciTransport::open(config, memory, &PayloadClock, at) {
                Ok(transport) => open_virtio(transport)
                    .inspect_err(|error| say!("console {at}: {error}"))
                    .map(AnyPort::VirtioPci)
                    .ok(),
                Err(error) => {
                    say!("console {at}: {error}");
                    None
                }
            };
            if found.is_none() {
                pci::stop_bus_master(config, at);
            }
        });
    });
    for &at in &firmware.virtio_mmio {
        if found.is_some() {
            break;
        }
        if memory.with_registers(at, mmio::SIZE, mmio::is_console) == Some(true) {
            let registers = memory.map_device(at, mmio::SIZE);
            found = registers.and_then(MmioTransport::open).and_then(|transport| {
                open_virtio(transport)
                    .inspect_err(|error| say!("console {at}: {error}"))
                    .map(AnyPort::VirtioMmio)
                    .ok()
            });
        }
    }
    found
}

fn open_virtio<T: Transport>(transport: T) -> Result<VirtioConsole<'static, T>, OpenError> {
    VirtioConsole::open(transport, arch::dma_pool(), &PayloadClock)
}
