//! An ELF core that stands for a crashed machine: its file for the memory, its headers for
//! `elfcorehdr`.

use std::cell::Cell;
use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::rc::Rc;
use std::time::Instant;

use capture::architecture::Architecture;
use capture::elfcorehdr::Elfcorehdr;
use capture::old::OldMemory;
use capture::{Machine, OldPhys, Unreadable};
use goblin::elf::header::EM_AARCH64;

/// Enough for the notes of all CPUs, which a core has in one place.
pub const NOTES: usize = 1 << 20;
/// Where e_machine lies in an ELF header.
const E_MACHINE: u64 = 18;

/// The machine.
pub struct Core {
    file: File,
    pub begun: Instant,
    /// Microseconds that passed besides those of the clock.
    pub besides: Rc<Cell<u64>>,
    pub reads: u64,
    pub bytes: u64,
}

impl Machine for Core {
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable> {
        self.reads += 1;
        self.bytes += into.len() as u64;
        self.file.read_exact_at(into, at.0).map_err(|_| Unreadable)
    }

    fn now_us(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64 + self.besides.get()
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        eprintln!("{line}");
    }
}

/// The machine that the core at `path` is of, and what it says of its memory.
pub fn open(path: &str) -> (Core, Elfcorehdr, OldMemory) {
    let file = File::open(path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let (begun, besides) = (Instant::now(), Rc::default());
    let mut machine = Core { file, begun, besides, reads: 0, bytes: 0 };
    let mut number = [0; 2];
    machine.read_old(OldPhys(E_MACHINE), &mut number).expect("an ELF core");
    let architecture = match u16::from_le_bytes(number) {
        EM_AARCH64 => Architecture::Aarch64,
        _ => Architecture::X86_64,
    };
    let mut scratch = vec![0; NOTES];
    let mut old = OldMemory::new();
    let headers = Elfcorehdr::open(&mut machine, architecture, OldPhys(0), 1 << 52)
        .and_then(|headers| headers.collect(&mut machine, &mut scratch, &mut old).map(|()| headers))
        .unwrap_or_else(|error| panic!("{path}: {error}"));
    (machine, headers, old)
}
