//! Lines on the serial console, each with the time since the payload's first instruction.

use core::fmt::{self, Write};

use capture::Machine;
use capture::card::Sink;
use capture::line::Line;
use capture::options::Console;
use drivers::firmware::Firmware;
use drivers::serial::SerialPort;
use spin::Mutex;

use crate::memory::PhysicalMemory;
use crate::port::{self, Uart};
use crate::time::PayloadClock;

static PORT: Mutex<Option<SerialPort<Uart>>> = Mutex::new(None);

/// Opens the console's port, if it is not open and enough is known of the machine. Without one, lines
/// go nowhere. Returns whether it was opened now.
pub fn open(options: Console, firmware: &Firmware, memory: &PhysicalMemory<'_>) -> bool {
    let mut open = PORT.lock();
    if open.is_some() {
        return false;
    }
    let place = port::console(options, firmware);
    *open = place
        .and_then(|place| Uart::at(place, |at, size| memory.map_early(at, size)))
        .map(|registers| SerialPort::open(&PayloadClock, registers, options.baud));
    open.is_some()
}

/// Prints one line. In a trap that interrupted a line, nothing is printed.
pub fn line(text: fmt::Arguments<'_>) {
    if let Some(mut port) = PORT.try_lock()
        && let Some(port) = port.as_mut()
    {
        let us = drivers::clock::Clock::now_us(&PayloadClock);
        let (seconds, us) = (us / 1_000_000, us % 1_000_000);
        let _ = Lines(port).write_fmt(format_args!("[{seconds:5}.{us:06}] tinykdump: {text}\r\n"));
    }
}

/// The crash card on the console: without times, which would make it half as long again, and the
/// line may be slow.
pub struct CardLines;

impl Sink for CardLines {
    fn line(&mut self, _: &mut dyn Machine, line: &str) {
        let mut console = ConsoleLine;
        console.send(line.as_bytes());
        console.send(b"\r\n");
    }
}

/// The console's port as the line that the dump goes over.
pub struct ConsoleLine;

impl Line for ConsoleLine {
    fn send(&mut self, bytes: &[u8]) -> bool {
        let mut port = PORT.lock();
        port.as_mut().is_some_and(|port| port.send(&PayloadClock, bytes))
    }

    fn receive(&mut self) -> Option<u8> {
        PORT.lock().as_mut()?.receive()
    }
}

/// Takes the port from whoever holds it, and ends the line that it may be in.
///
/// # Safety
/// Whoever holds it must never run again.
pub unsafe fn take_from_abandoned() {
    if PORT.is_locked() {
        // SAFETY: the caller's promise. The port is a few words, valid whatever was being sent.
        unsafe { PORT.force_unlock() };
        ConsoleLine.send(b"\r\n");
    }
}

/// Waits until the last line is on the wire.
pub fn drain() {
    if let Some(mut port) = PORT.try_lock()
        && let Some(port) = port.as_mut()
    {
        port.drain(&PayloadClock);
    }
}

struct Lines<'a>(&'a mut SerialPort<Uart>);

impl Write for Lines<'_> {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        self.0.send(&PayloadClock, text.as_bytes());
        Ok(())
    }
}

/// Prints one line on the console, in the manner of `println!`.
#[macro_export]
macro_rules! say {
    ($($argument:tt)*) => { $crate::console::line(format_args!($($argument)*)) };
}
