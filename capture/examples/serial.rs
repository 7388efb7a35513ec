//! Sends an ELF core as the payload would over a serial line, for those who work on it:
//! `cargo run -p capture --example serial -- dump.elf minimal|kernel|full BAUD > line`.
//!
//! Tells how much of each stage is on the line. Nobody answers.

mod support;

use std::cell::Cell;
use std::io::Write;
use std::rc::Rc;

use capture::dump::{Buffers, Payload, Source};
use capture::line::Line;
use capture::serial::{self, Job};
use format::frame::{Decoder, Event, Extent, Kind, MAX_WIRE, Stage};

/// A line that takes everything at once, counts, and puts the clock forward.
struct Counting {
    baud: u64,
    clock: Rc<Cell<u64>>,
    out: std::io::BufWriter<std::io::Stdout>,
    decoder: Box<Decoder<MAX_WIRE>>,
    stages: [(u64, u64, u64); Stage::ALL.len() + 1],
    stage: usize,
}

impl Line for Counting {
    fn send(&mut self, bytes: &[u8]) -> bool {
        for &byte in bytes {
            let Some(Event::Frame(header, content)) = self.decoder.push(byte) else { continue };
            match header.kind {
                Kind::Plan => {
                    let plan = miniz_oxide::inflate::decompress_to_vec(content);
                    self.stage = usize::from(plan.unwrap_or(content.to_vec())[0]);
                }
                Kind::End => self.stage = Stage::ALL.len(),
                Kind::Blocks => self.stages[self.stage].1 += u64::from(header.count),
                _ => {}
            }
        }
        self.stages[self.stage].0 += bytes.len() as u64;
        self.stages[self.stage].2 += 1;
        // A byte takes ten bits.
        let us = bytes.len() as u64 * 10_000_000 / self.baud;
        self.clock.set(self.clock.get() + us);
        self.out.write_all(bytes).is_ok()
    }

    fn receive(&mut self) -> Option<u8> {
        None
    }
}

fn main() {
    let usage = "usage: serial DUMP minimal|kernel|full BAUD";
    let path = std::env::args().nth(1).expect(usage);
    let extent = match std::env::args().nth(2).expect(usage).as_str() {
        "minimal" => Extent::Minimal,
        "kernel" => Extent::Kernel,
        "full" => Extent::Full,
        other => panic!("{other}: {usage}"),
    };
    let baud = std::env::args().nth(3).and_then(|text| text.parse().ok()).expect(usage);
    let (mut machine, headers, old) = support::open(&path);
    let source = Source { headers: &headers, old: &old };
    let payload = Payload { version: "tinykdump example", memory_used: 0 };
    let mut line = Counting {
        baud,
        clock: machine.besides.clone(),
        out: std::io::BufWriter::new(std::io::stdout()),
        decoder: Box::default(),
        stages: Default::default(),
        stage: 0,
    };
    let mut buffers = Box::new(Buffers::new());
    let job = Job { source, payload, extent, baud: Some(baud as u32) };
    let sent = serial::write(&mut machine, &mut line, job, &mut buffers).expect("nothing fails");
    let mut sum = 0;
    for (index, (bytes, blocks, frames)) in line.stages.iter().enumerate() {
        sum += bytes;
        let stage = Stage::ALL.get(index);
        eprintln!("{stage:?}: {frames} frames, {blocks} blocks, {bytes} bytes, {sum} in all");
    }
    eprintln!("{sent:?} after {} reads of {} KiB", machine.reads, machine.bytes >> 10);
}
