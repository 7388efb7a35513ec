//! A payload that sends a made-up core, and lines that spoil what it sends.

use std::collections::BTreeSet;

use format::BLOCK;
use format::frame::{
    self, Begin, Decoder, Encoding, End, Event, Extent, Header, Kind, MAX_WIRE, Plan, Run, Stage,
};
use zerocopy::{FromBytes, IntoBytes};

/// Blocks of the head, and of the two segments of memory behind it.
pub const HEAD: u64 = 3;
const FIRST: u64 = 200;
const SECOND: u64 = 140;
pub const BLOCKS: u64 = HEAD + FIRST + SECOND;
const PAGE: usize = BLOCK as usize;
pub const STREAM: u32 = 0x1234_5678;
/// Physical and virtual addresses of the segments and of the kernel's image, which lies in the first.
pub const FIRST_AT: u64 = 0x10_0000;
pub const SECOND_AT: u64 = 0x4000_0000;
const DIRECT: u64 = 0xffff_8880_0000_0000;
const IMAGE: u64 = 0xffff_ffff_8100_0000;
const IMAGE_BLOCK: u64 = 50;
const IMAGE_BLOCKS: u64 = 40;
/// Where the notes are: after four program headers.
const NOTES: u64 = 64 + 4 * 56;
pub const CARD: &str = "kernel   6.1.0-test\npanic    why\n";

/// The core as it is in the end, or as it is first.
pub fn core(done: bool) -> Vec<u8> {
    let mut core = vec![0u8; (BLOCKS * BLOCK) as usize];
    core[..20].copy_from_slice(b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0\x04\0\x3e\0");
    core[32] = 64;
    core[48] = u8::from(!done);
    core[52..58].copy_from_slice(&[64, 0, 56, 0, 4, 0]);
    let notes = notes(done);
    let size = notes.len() as u64;
    let first = HEAD * BLOCK;
    let headers = [
        (4u32, [NOTES, 0, 0, size]),
        (
            1,
            [
                first + IMAGE_BLOCK * BLOCK,
                IMAGE,
                FIRST_AT + IMAGE_BLOCK * BLOCK,
                IMAGE_BLOCKS * BLOCK,
            ],
        ),
        (1, [first, DIRECT + FIRST_AT, FIRST_AT, FIRST * BLOCK]),
        (1, [first + FIRST * BLOCK, DIRECT + SECOND_AT, SECOND_AT, SECOND * BLOCK]),
    ];
    for (index, (kind, [offset, virt, phys, size])) in headers.into_iter().enumerate() {
        let at = 64 + index * 56;
        core[at..at + 4].copy_from_slice(&kind.to_le_bytes());
        for (field, value) in [offset, virt, phys, size, size].into_iter().enumerate() {
            core[at + 8 + field * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }
    }
    core[NOTES as usize..][..notes.len()].copy_from_slice(&notes);
    for block in HEAD..BLOCKS {
        let bytes = &mut core[(block * BLOCK) as usize..][..PAGE];
        // Some are zeros, some compress, some do not.
        let mut state = block as u32;
        for (at, byte) in bytes.iter_mut().enumerate() {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            *byte = match block % 5 {
                0 => 0,
                1 => (block + at as u64 / 64) as u8,
                _ => (state >> 24) as u8,
            };
        }
    }
    core
}

/// The card, filler that makes the head longer than one block, and what is known only in the end.
fn notes(done: bool) -> Vec<u8> {
    let mut notes = Vec::new();
    let mut put = |kind: u32, desc: &[u8]| {
        for field in [10, desc.len() as u32, kind] {
            notes.extend(field.to_le_bytes());
        }
        notes.extend(b"TINYKDUMP\0\0\0");
        notes.extend(desc);
        notes.resize(notes.len().next_multiple_of(4), 0);
    };
    put(0x544b_4402, CARD.as_bytes());
    put(0x544b_44ff, &[if done { 7 } else { 3 }; 9000]);
    notes
}

/// A plan: its stage, whether it is the stage's last, its runs.
type Planned = (Stage, bool, Vec<(u64, u64)>);

/// What is sent. Each block of memory is in a plan; one is in two.
fn plans(extent: Extent) -> Vec<Planned> {
    let mut plans = vec![
        (Stage::Head, true, vec![(0, HEAD)]),
        (Stage::Running, true, vec![(10, 3), (100, 1), (220, 9)]),
        (Stage::Tasks, false, (0..20).map(|index| (30 + index * 3, 1)).collect()),
        (Stage::Tasks, true, vec![(100, 2), (300, 20)]),
        (Stage::Log, true, vec![(205, 15)]),
    ];
    if extent == Extent::Full {
        let named: BTreeSet<u64> = blocks_of(&plans).collect();
        let rest: Vec<u64> = (0..BLOCKS).filter(|block| !named.contains(block)).collect();
        for (index, some) in rest.chunks(60).enumerate() {
            let is_last = (index + 1) * 60 >= rest.len();
            let runs = some.iter().map(|&block| (block, 1)).collect();
            plans.push((Stage::Rest, is_last, runs));
        }
    }
    plans
}

fn blocks_of(plans: &[Planned]) -> impl Iterator<Item = u64> {
    plans.iter().flat_map(|(_, _, runs)| runs).flat_map(|&(first, count)| first..first + count)
}

/// The blocks that are sent.
pub fn sent(extent: Extent) -> BTreeSet<u64> {
    blocks_of(&plans(extent)).collect()
}

/// Sends the dump and answers.
pub struct Payload {
    extent: Extent,
    stream: u32,
    sequence: u32,
    first: Vec<u8>,
    last: Vec<u8>,
    /// Each frame as it goes over the wire, and text between.
    pub wire: Vec<Vec<u8>>,
    heard: Box<Decoder<2048>>,
    /// Whether a receiver said that it has everything.
    pub is_done: bool,
    pub requests: usize,
}

impl Payload {
    pub fn new(extent: Extent, stream: u32) -> Payload {
        Payload {
            extent,
            stream,
            sequence: 0,
            first: core(false),
            last: core(true),
            wire: Vec::new(),
            heard: Box::default(),
            is_done: false,
            requests: 0,
        }
    }

    /// Everything that is sent when nobody answers.
    pub fn one_way(extent: Extent, stream: u32) -> Vec<Vec<u8>> {
        let mut payload = Payload::new(extent, stream);
        payload.send();
        payload.plans(false);
        payload.head(true);
        payload.end();
        payload.wire
    }

    /// Sends everything once.
    pub fn send(&mut self) {
        self.say("crash card");
        self.plans(true);
        self.head(true);
        self.end();
    }

    fn say(&mut self, text: &str) {
        self.wire.push(format!("[    0.1] tinykdump: {text}\r\n").into_bytes());
    }

    fn plans(&mut self, with_blocks: bool) {
        for (number, (stage, is_last, runs)) in plans(self.extent).into_iter().enumerate() {
            let begin = Begin {
                version: frame::VERSION.into(),
                machine: 62.into(),
                extent: self.extent as u8,
                reserved: [0; 3],
                head_size: (HEAD * BLOCK).into(),
                core_size: (BLOCKS * BLOCK).into(),
                expected_blocks: (sent(self.extent).len() as u64).into(),
                payload: [0; 64],
            };
            self.frame(Kind::Begin, begin.as_bytes(), 0);
            let plan =
                Plan { stage: stage as u8, is_last_of_stage: is_last.into(), reserved: [0; 6] };
            let runs: Vec<Run> =
                runs.iter().map(|&(first, count)| Run::new(first, count)).collect();
            let content = [plan.as_bytes(), runs.as_bytes()].concat();
            self.frame(Kind::Plan, &content, number as u64);
            if with_blocks && stage == Stage::Head {
                self.head(false);
            } else if with_blocks {
                runs.iter().for_each(|run| self.blocks(run.first(), run.count()));
                self.say("a stage more");
            }
        }
    }

    fn head(&mut self, done: bool) {
        let core = if done { self.last.clone() } else { self.first.clone() };
        // In two frames, so that one of them can be lost.
        self.packed(0, &core[..2 * PAGE]);
        self.packed(2, &core[2 * PAGE..HEAD as usize * PAGE]);
    }

    fn blocks(&mut self, first: u64, count: u64) {
        let core = self.last.clone();
        let mut at = first;
        while at < first + count {
            let most = (first + count - at).min(4);
            let bytes = |count: u64| &core[(at * BLOCK) as usize..][..(count * BLOCK) as usize];
            let is_zero = |count| bytes(count).iter().all(|&byte| byte == 0);
            let count = if is_zero(1) { 1 } else { most };
            if is_zero(count) {
                self.raw(Kind::Blocks, Encoding::Zeros, count as u32, at * BLOCK, &[]);
            } else {
                let bytes = bytes(count).to_vec();
                self.packed(at, &bytes);
            }
            at += count;
        }
    }

    fn packed(&mut self, first: u64, bytes: &[u8]) {
        let count = (bytes.len() / PAGE) as u32;
        let packed = miniz_oxide::deflate::compress_to_vec(bytes, 6);
        let (encoding, content) = if packed.len() < bytes.len() {
            (Encoding::Deflate, packed.as_slice())
        } else {
            (Encoding::Plain, bytes)
        };
        self.raw(Kind::Blocks, encoding, count, first * BLOCK, content);
    }

    pub fn end(&mut self) {
        let end = End {
            complete: 1.into(),
            plans: (plans(self.extent).len() as u32).into(),
            head_crc: format::crc32(&self.last[..HEAD as usize * PAGE]).into(),
            reserved: 0.into(),
            pages_read: 1.into(),
            pages_unreadable: 0.into(),
        };
        self.frame(Kind::End, end.as_bytes(), 0);
    }

    fn frame(&mut self, kind: Kind, content: &[u8], offset: u64) {
        self.raw(kind, Encoding::Plain, content.len() as u32, offset, content);
    }

    fn raw(&mut self, kind: Kind, encoding: Encoding, count: u32, offset: u64, content: &[u8]) {
        let (stream, sequence) = (self.stream, self.sequence);
        self.sequence += 1;
        let header = Header { kind, encoding, stream, sequence, count, offset };
        let mut wire = vec![0; MAX_WIRE];
        let size = frame::encode(&header, content, &mut wire).unwrap();
        wire.truncate(size);
        self.wire.push(wire);
    }

    /// Hears the receiver, and answers.
    pub fn hear(&mut self, bytes: &[u8]) {
        for &byte in bytes {
            let Some(Event::Frame(header, content)) = self.heard.push(byte) else { continue };
            assert_eq!(header.stream, self.stream, "a request for somebody else");
            let content = content.to_vec();
            match header.kind {
                Kind::Hello => continue,
                Kind::Done => self.is_done = true,
                Kind::WantPlans => self.plans(false),
                Kind::Want => {
                    let runs = <[Run]>::ref_from_bytes(&content).unwrap();
                    assert!((1..=128).contains(&runs.len()));
                    if runs.iter().any(|run| run.first() < HEAD) {
                        self.head(true);
                    }
                    for run in runs {
                        let first = run.first().max(HEAD);
                        let end = run.first() + run.count();
                        self.blocks(first, end.saturating_sub(first));
                    }
                }
                kind => panic!("a receiver does not say {kind:?}"),
            }
            self.requests += 1;
            self.end();
        }
    }
}
