//! The receiver of the serial stream on foreign frames and foreign bytes.
//!
//! Fuzzed bytes alone never have the right checksum. So the input is a sequence of instructions: most make a
//! frame with fuzzed fields and content, right by its form; the rest put bytes on the line as they are.

#![no_main]

use std::io;

use format::BLOCK;
use format::frame::{Encoding, Header, Kind, MAX_CONTENT, MAX_WIRE, Stage, encode};
use host_analyzer::receive::{ConsoleText, Event, Receiver, Store, progress};
use libfuzzer_sys::fuzz_target;

/// Takes everything, and checks that it is whole blocks of a frame.
struct Sink;

impl Store for Sink {
    fn write(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        assert!(!bytes.is_empty() && bytes.len().is_multiple_of(BLOCK as usize));
        assert!(bytes.len() <= MAX_CONTENT);
        assert!(first < 1 << 35);
        Ok(())
    }
}

/// Takes the input apart.
struct Input<'a>(&'a [u8]);

impl<'a> Input<'a> {
    fn take(&mut self, size: usize) -> &'a [u8] {
        let (taken, rest) = self.0.split_at(size.min(self.0.len()));
        self.0 = rest;
        taken
    }

    fn number(&mut self, size: usize) -> u64 {
        self.take(size).iter().fold(0, |number, &byte| number << 8 | u64::from(byte))
    }

    /// A frame, or bytes as they are.
    fn wire(&mut self) -> Vec<u8> {
        const KINDS: [Kind; 5] = [Kind::Begin, Kind::Plan, Kind::Blocks, Kind::End, Kind::Want];
        const ENCODINGS: [Encoding; 4] =
            [Encoding::Plain, Encoding::Deflate, Encoding::Zeros, Encoding::Unreadable];
        let what = self.number(1) as usize;
        let Some(&kind) = KINDS.get(what & 7) else {
            let size = self.number(1) as usize;
            return self.take(size).to_vec();
        };
        let encoding = ENCODINGS[what >> 3 & 3];
        let offset = match kind {
            Kind::Blocks => (self.number(2) << (what >> 5 & 3) * 11) * BLOCK,
            _ => self.number(1),
        };
        let count = match kind {
            Kind::Blocks if encoding == Encoding::Plain => 1 + what as u32 % 4,
            Kind::Blocks => self.number(2) as u32,
            _ => 0,
        };
        let size = self.number(1) as usize;
        let mut content = self.take(size).to_vec();
        let count = match (kind, encoding) {
            (Kind::Blocks, Encoding::Plain) => {
                content.resize((u64::from(count) * BLOCK) as usize, 7);
                count
            }
            (Kind::Blocks, _) => count,
            (_, Encoding::Deflate) => self.number(2) as u32,
            _ => content.len() as u32,
        };
        let sequence = self.number(1) as u32;
        let stream = if what & 0x80 == 0 { 1 } else { self.number(1) as u32 };
        let header = Header { kind, encoding, stream, sequence, count, offset };
        let mut wire = vec![0; MAX_WIRE];
        let size = encode(&header, &content, &mut wire).unwrap_or(0);
        wire.truncate(size);
        wire
    }
}

fuzz_target!(|bytes: &[u8]| {
    let mut input = Input(bytes);
    let (mut receiver, mut text) = (Receiver::new(), ConsoleText::default());
    let mut now_ms = 0;
    while !input.0.is_empty() {
        let mut other = None;
        for byte in input.wire() {
            match receiver.push(byte, &mut Sink).expect("the sink takes everything") {
                Some(Event::Text(bytes)) => {
                    let shown = text.push(bytes);
                    assert!(
                        !shown.contains(|it: char| it.is_control() && it != '\n' && it != '\t')
                    );
                }
                Some(Event::OtherStream(header, content)) => {
                    other = Some((header, content.to_vec()));
                }
                _ => {}
            }
        }
        if let Some((header, content)) = other {
            receiver = Receiver::new();
            receiver.take(&header, &content, &mut Sink).expect("the sink takes everything");
        }
        now_ms += 700;
        if let Some(said) = receiver.speak(now_ms) {
            assert!(!said.is_empty() && said.len() < 1500, "more than the payload has room for");
        }
        let _ = progress(&receiver, 1);
    }
    if let Some(outline) = receiver.outline() {
        assert!(receiver.present().count() <= outline.core_blocks);
        let missing = Stage::ALL.map(|stage| receiver.stage_state(stage));
        assert!(missing.iter().all(|stage| stage.missing <= stage.planned));
        if receiver.has_everything() {
            assert_eq!(receiver.missing().count(), 0);
        }
    }
});
