//! Prints the crash card of an ELF core, for those who work on it:
//! `cargo run -p capture --example card -- dump.elf`.
//!
//! The core's file stands for the memory of a crashed machine, and its headers for `elfcorehdr`.

use std::fmt;
use std::fs::File;
use std::os::unix::fs::FileExt;
use std::time::Instant;

use capture::architecture::Architecture;
use capture::card::{Card, Sink};
use capture::dump::Source;
use capture::elfcorehdr::Elfcorehdr;
use capture::old::OldMemory;
use capture::{Machine, OldPhys, Unreadable};

/// Enough for the notes of all CPUs, which a core has in one place.
const NOTES: usize = 1 << 20;
/// Where e_machine lies in an ELF header.
const E_MACHINE: u64 = 18;

struct Core {
    file: File,
    begun: Instant,
    reads: u64,
    bytes: u64,
}

impl Machine for Core {
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable> {
        self.reads += 1;
        self.bytes += into.len() as u64;
        self.file.read_exact_at(into, at.0).map_err(|_| Unreadable)
    }

    fn now_us(&self) -> u64 {
        self.begun.elapsed().as_micros() as u64
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        eprintln!("{line}");
    }
}

struct Lines;

impl Sink for Lines {
    fn line(&mut self, _: &mut dyn Machine, line: &str) {
        println!("{line}");
    }
}

fn main() {
    let path = std::env::args().nth(1).expect("usage: card DUMP");
    let file = File::open(&path).unwrap_or_else(|error| panic!("{path}: {error}"));
    let mut machine = Core { file, begun: Instant::now(), reads: 0, bytes: 0 };
    let mut number = [0; 2];
    machine.read_old(OldPhys(E_MACHINE), &mut number).expect("an ELF core");
    let of_machine = |it: &Architecture| it.elf_machine() == u16::from_le_bytes(number);
    let architecture = [Architecture::X86_64, Architecture::Aarch64].into_iter().find(of_machine);
    let architecture = architecture.expect("the core of a machine that is known");
    let mut scratch = vec![0; NOTES];
    let mut old = OldMemory::new();
    let headers = Elfcorehdr::open(&mut machine, architecture, OldPhys(0), 1 << 52)
        .and_then(|headers| headers.collect(&mut machine, &mut scratch, &mut old).map(|()| headers))
        .unwrap_or_else(|error| panic!("{path}: {error}"));

    let source = Source { headers: &headers, old: &old };
    let mut card = Card::new();
    for pass in 1..=2 {
        (machine.begun, machine.reads, machine.bytes) = (Instant::now(), 0, 0);
        match pass {
            1 => card.make(&mut machine, source, &mut scratch, &mut Lines),
            _ => card.make(&mut machine, source, &mut scratch, &mut Silence),
        }
        let Core { reads, bytes, .. } = machine;
        eprintln!("pass {pass}: {} us, {reads} reads, {} KiB", machine.now_us(), bytes >> 10);
    }
}

struct Silence;

impl Sink for Silence {
    fn line(&mut self, _: &mut dyn Machine, _: &str) {}
}
