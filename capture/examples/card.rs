//! Prints the crash card of an ELF core, for those who work on it:
//! `cargo run -p capture --example card -- dump.elf`.

mod support;

use std::time::Instant;

use capture::Machine;
use capture::card::{Card, Sink};
use capture::dump::Source;

/// Prints the card, or not.
struct Lines {
    shown: bool,
}

impl Sink for Lines {
    fn line(&mut self, _: &mut dyn Machine, line: &str) {
        if self.shown {
            println!("{line}");
        }
    }
}

fn main() {
    let path = std::env::args().nth(1).expect("usage: card DUMP");
    let (mut machine, headers, old) = support::open(&path);
    let mut scratch = vec![0; support::NOTES];
    let source = Source { headers: &headers, old: &old };
    let mut card = Card::new();
    for pass in 1..=2 {
        (machine.begun, machine.reads, machine.bytes) = (Instant::now(), 0, 0);
        card.make(&mut machine, source, &mut scratch, &mut Lines { shown: pass == 1 });
        let support::Core { reads, bytes, .. } = machine;
        eprintln!("pass {pass}: {} us, {reads} reads, {} KiB", machine.now_us(), bytes >> 10);
    }
}
