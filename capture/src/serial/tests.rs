//! Whole dumps over lines that lose frames, answer, or break.

use std::boxed::Box;
use std::collections::{BTreeMap, BTreeSet, VecDeque};
use std::vec;
use std::vec::Vec;

use core::cell::Cell;
use core::fmt;

use format::frame::{
    self, Begin, Decoder, Encoding, End, Event, Extent, Header, Kind, MAX_WIRE, Plan, Run, Stage,
};
use format::record::{self, Record};
use format::{BLOCK, area::Trailer};
use miniz_oxide::inflate::decompress_to_vec;
use zerocopy::{FromBytes, IntoBytes};

use super::repair::{AGAIN, ANSWER_EVERY};
use super::*;
use crate::card::testing::World;
use crate::card::tests::panicked;
use crate::dump::{self, Payload, Source};
use crate::fake::{FakeDisk, FakeMachine};
use crate::line::Line;
use crate::{Machine, OldPhys, Unreadable, area};

const PAYLOAD: Payload<'static> = Payload { version: "tinykdump test", memory_used: 12345 };

/// A machine on which time passes whenever somebody looks.
struct Ticking<'a>(&'a mut FakeMachine, Cell<u64>);

impl Machine for Ticking<'_> {
    fn read_old(&mut self, at: OldPhys, into: &mut [u8]) -> Result<(), Unreadable> {
        self.0.read_old(at, into)
    }

    fn now_us(&self) -> u64 {
        self.1.set(self.1.get() + 100);
        self.1.get()
    }

    fn is_time_over(&self) -> bool {
        self.0.time_is_over_us.is_some_and(|end| self.now_us() >= end)
    }

    fn say(&mut self, line: fmt::Arguments<'_>) {
        self.0.say(line);
    }
}

/// The other end of the line, and what becomes of frames on the way there.
struct Receiver {
    decoder: Box<Decoder<MAX_WIRE>>,
    /// Whether a frame, by its sequence number, is lost.
    loses: fn(u32) -> bool,
    /// Whether it can answer.
    answers: bool,
    answer: VecDeque<u8>,
    blocks: BTreeMap<u64, Vec<u8>>,
    copies: BTreeMap<u64, usize>,
    unreadable: BTreeSet<u64>,
    planned: BTreeMap<u64, Stage>,
    plans: BTreeSet<u64>,
    ends: Vec<End>,
    begin: Option<Begin>,
    /// Bytes that the line takes before it breaks.
    takes: usize,
    /// What it asks for after every frame, if it is one that never has enough.
    nags: Option<&'static [Run]>,
    /// What blocks came, first and count, in their order.
    order: Vec<(u64, u64)>,
}

impl Receiver {
    fn new(loses: fn(u32) -> bool, answers: bool) -> Receiver {
        Receiver {
            decoder: Box::default(),
            loses,
            answers,
            answer: VecDeque::new(),
            blocks: BTreeMap::new(),
            copies: BTreeMap::new(),
            unreadable: BTreeSet::new(),
            planned: BTreeMap::new(),
            plans: BTreeSet::new(),
            ends: Vec::new(),
            begin: None,
            takes: usize::MAX,
            nags: None,
            order: Vec::new(),
        }
    }

    fn missing(&self) -> Vec<u64> {
        self.planned.keys().filter(|block| !self.blocks.contains_key(block)).copied().collect()
    }

    /// The blocks from the first to the last as one file, with zeros for those that are not there.
    fn core(&self) -> Vec<u8> {
        let size = self.begin.unwrap().core_size.get();
        let zeros = vec![0; BLOCK as usize];
        let block = |block| self.blocks.get(&block).unwrap_or(&zeros).clone();
        (0..size / BLOCK).flat_map(block).collect()
    }

    fn take(&mut self, header: Header, content: &[u8]) {
        let content = match header.encoding {
            Encoding::Deflate => decompress_to_vec(content).unwrap(),
            _ => content.to_vec(),
        };
        match header.kind {
            Kind::Begin => self.begin = Some(Begin::read_from_bytes(&content).unwrap()),
            Kind::Plan => {
                let (plan, runs) = Plan::read_from_prefix(&content).unwrap();
                let stage = Stage::from_byte(plan.stage).unwrap();
                self.plans.insert(header.offset);
                for run in <[Run]>::ref_from_bytes(runs).unwrap() {
                    for block in run.first()..run.first() + run.count() {
                        self.planned.entry(block).or_insert(stage);
                    }
                }
            }
            Kind::Blocks => {
                self.order.push((header.offset / BLOCK, header.count.into()));
                let zeros = vec![0; BLOCK as usize];
                for index in 0..u64::from(header.count) {
                    let block = header.offset / BLOCK + index;
                    let bytes = content.chunks(BLOCK as usize).nth(index as usize);
                    self.blocks.insert(block, bytes.unwrap_or(&zeros).to_vec());
                    *self.copies.entry(block).or_default() += 1;
                    if header.encoding == Encoding::Unreadable {
                        self.unreadable.insert(block);
                    }
                }
            }
            Kind::End => {
                let end = End::read_from_bytes(&content).unwrap();
                self.ends.push(end);
                if self.answers {
                    self.reply(header.stream, &end);
                }
            }
            kind => panic!("{kind:?} from the payload"),
        }
    }

    fn reply(&mut self, stream: u32, end: &End) {
        let head = self.begin.map_or(0, |begin| begin.head_size.get());
        let is_final = self.missing().is_empty()
            && format::crc32(&self.core()[..head as usize]) == end.head_crc.get();
        let mut missing = self.missing();
        if missing.is_empty() && !is_final {
            missing.extend(0..head / BLOCK);
        }
        let runs: Vec<Run> = missing.iter().take(100).map(|&block| Run::new(block, 1)).collect();
        let (kind, content) = match runs.as_slice() {
            _ if self.plans.len() < end.plans.get() as usize => (Kind::WantPlans, &[][..]),
            [] => (Kind::Done, &[][..]),
            runs => (Kind::Want, runs.as_bytes()),
        };
        self.say(stream, kind, content);
    }

    fn say(&mut self, stream: u32, kind: Kind, content: &[u8]) {
        let count = content.len() as u32;
        let header =
            Header { kind, encoding: Encoding::Plain, stream, sequence: 0, count, offset: 0 };
        let mut wire = vec![0; MAX_WIRE];
        let size = frame::encode(&header, content, &mut wire).unwrap();
        self.answer.extend(b"noise");
        self.answer.extend(&wire[..size]);
    }
}

impl Line for Receiver {
    fn send(&mut self, bytes: &[u8]) -> bool {
        let Some(left) = self.takes.checked_sub(bytes.len()) else { return false };
        self.takes = left;
        for &byte in bytes {
            if let Some(Event::Frame(header, content)) = self.decoder.push(byte) {
                let content = content.to_vec();
                if !(self.loses)(header.sequence) {
                    self.take(header, &content);
                }
                if let Some(runs) = self.nags {
                    self.say(header.stream, Kind::Want, runs.as_bytes());
                }
            }
        }
        true
    }

    fn receive(&mut self) -> Option<u8> {
        self.answer.pop_front()
    }
}

fn send(world: &World, extent: Extent, receiver: &mut Receiver) -> Result<Complete, dump::Error> {
    world.crash(|machine, source| send_from(machine, source, extent, receiver))
}

fn send_from(
    machine: &mut FakeMachine,
    source: Source<'_>,
    extent: Extent,
    receiver: &mut Receiver,
) -> Result<Complete, dump::Error> {
    let mut machine = Ticking(machine, Cell::new(0));
    let job = Job { source, payload: PAYLOAD, extent, baud: None };
    write(&mut machine, receiver, job, &mut Box::new(dump::Buffers::new()))
}

/// The core that goes to a disk.
fn on_a_disk(machine: &mut FakeMachine, source: Source<'_>) -> Vec<u8> {
    const AREA: u64 = 16 << 20;
    let old = machine.clone();
    let mut disk = FakeDisk::new(AREA, &old);
    let trailer = Trailer::empty(*b"0123456789abcdef", AREA).to_block();
    let at = disk.bytes.len() - trailer.len();
    disk.bytes[at..].copy_from_slice(&trailer);
    let mut buffers = Box::new(dump::Buffers::new());
    let area = area::find(&mut disk, &area::Wanted::default(), buffers.notes(), &mut |_, _| {})
        .area
        .unwrap();
    let complete = dump::write(machine, &mut disk, &area, source, PAYLOAD, &mut buffers).unwrap();
    disk.bytes.truncate(complete.size as usize);
    disk.bytes
}

/// Cuts the vendor note's record, which has times in it, out of a core.
fn cut_record(mut core: Vec<u8>) -> (Record, Vec<u8>) {
    let at = core.windows(PAYLOAD.version.len()).position(|it| it == PAYLOAD.version.as_bytes());
    let at = at.unwrap() - 8;
    let record = core.splice(at..at + record::SIZE, []).collect::<Vec<u8>>();
    (Record::from_desc(&record).unwrap(), core)
}

#[test]
fn full_dump_over_a_line_equals_the_one_on_a_disk() {
    panicked().crash(|machine, source| {
        let mut receiver = Receiver::new(|_| false, false);
        let complete = send_from(machine, source, Extent::Full, &mut receiver).unwrap();
        let (record, core) = cut_record(receiver.core());
        let (disk_record, disk_core) = cut_record(on_a_disk(machine, source));
        assert!(core == disk_core);
        assert_eq!(receiver.missing(), []);
        assert_eq!(record.complete.get(), 1);
        assert_eq!(record.pages_read, disk_record.pages_read);
        assert_eq!(record.pages_read.get(), complete.pages_read);

        let end = *receiver.ends.last().unwrap();
        let head = receiver.begin.unwrap().head_size.get() as usize;
        assert_eq!(end.head_crc.get(), format::crc32(&receiver.core()[..head]));
        assert_eq!((end.complete.get(), end.plans.get() as usize), (1, receiver.plans.len()));
    });
}

#[test]
fn memory_is_sent_once_and_the_head_at_the_end_again() {
    let mut receiver = Receiver::new(|_| false, false);
    send(&panicked(), Extent::Full, &mut receiver).unwrap();
    let head = receiver.begin.unwrap().head_size.get() / BLOCK;
    for (&block, &copies) in &receiver.copies {
        // First, in the end, and once more where nobody answers.
        assert_eq!(copies, if block < head { 3 } else { 1 }, "block {block}");
    }
    assert!(receiver.ends.len() >= 2);
}

#[test]
fn line_that_loses_frames_both_ways_ends_exact() {
    panicked().crash(|machine, source| {
        for loses in
            [|it| it % 7 == 3, |it| it % 3 == 0, |it| (2..40).contains(&it)] as [fn(u32) -> bool; 3]
        {
            let mut receiver = Receiver::new(loses, true);
            let complete = send_from(machine, source, Extent::Full, &mut receiver).unwrap();
            assert!(complete.confirmed);
            assert!(cut_record(receiver.core()).1 == cut_record(on_a_disk(machine, source)).1);
        }
    });
}

#[test]
fn one_way_line_says_exactly_what_it_lost() {
    let mut whole = Receiver::new(|_| false, false);
    send(&panicked(), Extent::Kernel, &mut whole).unwrap();
    let mut lossy = Receiver::new(|sequence| sequence % 11 == 9, false);
    let complete = send(&panicked(), Extent::Kernel, &mut lossy).unwrap();
    assert!(!complete.confirmed);
    assert_eq!(lossy.planned, whole.planned);
    let lost: Vec<u64> =
        whole.blocks.keys().filter(|block| !lossy.blocks.contains_key(block)).copied().collect();
    assert!(!lost.is_empty());
    assert_eq!(lossy.missing(), lost);
}

#[test]
fn stack_of_the_cpu_that_panicked_comes_before_the_log() {
    use crate::card::testing::at;
    let mut receiver = Receiver::new(|_| false, false);
    send(&panicked(), Extent::Full, &mut receiver).unwrap();
    let head = receiver.begin.unwrap().head_size.get();
    // The world's memory begins at physical address 0, right behind the head.
    let stage_of = |at: u64| receiver.planned[&((head + at) / BLOCK)];
    assert_eq!(stage_of(at::STACK), Stage::Running);
    assert_eq!(stage_of(at::PAGE_TABLES), Stage::Running, "they lead to the stack");
    assert_eq!(stage_of(at::LOG), Stage::Log);
    assert_eq!(stage_of(at::TEXT), Stage::Text);
}

#[test]
fn kernel_that_tells_nothing_is_sent_whole() {
    let mut receiver = Receiver::new(|_| false, false);
    World::x86_64().crash(|machine, source| {
        let tables = 0x1000;
        machine.poisoned.push(tables);
        send_from(machine, source, Extent::Full, &mut receiver).unwrap();
        machine.poisoned.clear();
        let (_, disk) = cut_record(on_a_disk(machine, source));
        let (_, mut core) = cut_record(receiver.core());
        let head = receiver.begin.unwrap().head_size.get() as usize;
        let page = head + tables as usize - record::SIZE;
        core[page..page + 4096].copy_from_slice(&disk[page..page + 4096]);
        assert!(core == disk);
    });
    assert_eq!(receiver.unreadable.len(), 1);
    assert_eq!(receiver.ends.last().unwrap().pages_unreadable.get(), 1);
}

#[test]
fn broken_line_ends_the_dump_wherever_it_breaks() {
    let mut whole = Receiver::new(|_| false, false);
    let complete = send(&panicked(), Extent::Kernel, &mut whole).unwrap();
    for part in 0..10 {
        let mut receiver = Receiver::new(|_| false, false);
        receiver.takes = (complete.wire_bytes * part / 10) as usize;
        let sent = send(&panicked(), Extent::Kernel, &mut receiver);
        assert_eq!(sent, Err(dump::Error::Line));
    }
}

#[test]
fn receiver_that_never_has_enough_does_not_keep_the_machine() {
    let mut whole = Receiver::new(|_| false, false);
    let once = send(&panicked(), Extent::Full, &mut whole).unwrap().wire_bytes;
    let head = whole.begin.unwrap().head_size.get() / BLOCK;
    let all = whole.begin.unwrap().core_size.get() / BLOCK - head;
    // Everything again and again, nothing, and blocks that the core does not have.
    let everything = Vec::leak(vec![Run::new(head, all); 100]);
    let beyond = Vec::leak(vec![Run::new(1 << 40, 1)]);
    for runs in [everything, &mut [], beyond] {
        let mut receiver = Receiver::new(|_| false, false);
        receiver.nags = Some(runs);
        let complete = send(&panicked(), Extent::Full, &mut receiver).unwrap();
        assert!(!complete.confirmed);
        assert!(receiver.blocks == whole.blocks || receiver.missing().is_empty());
        assert!(complete.wire_bytes < once * (AGAIN + 4), "{} {once}", complete.wire_bytes);
    }
}

#[test]
fn what_is_asked_for_comes_before_the_rest_of_a_long_run() {
    let asked = Vec::leak(vec![Run::new(4, 1)]);
    let mut receiver = Receiver::new(|_| false, false);
    receiver.nags = Some(asked);
    send(&panicked(), Extent::Full, &mut receiver).unwrap();
    let all = receiver.begin.unwrap().core_size.get() / BLOCK;
    let mut waited = 0;
    for &(first, count) in &receiver.order {
        waited = if (first..first + count).contains(&4) { 0 } else { waited + count };
        // Asked for in the middle of one piece, it comes behind that or the next one.
        assert!(waited <= 2 * ANSWER_EVERY, "{waited} of {all}");
    }
    assert!(all > 8 * ANSWER_EVERY, "{all}");
}

#[test]
fn dump_that_runs_out_of_time_ends_and_says_that_it_is_not_complete() {
    panicked().crash(|machine, source| {
        machine.time_is_over_us = Some(20_000);
        for answers in [false, true] {
            let mut receiver = Receiver::new(|_| false, answers);
            let sent = send_from(machine, source, Extent::Full, &mut receiver);
            assert_eq!(sent, Err(dump::Error::OutOfTime));
            assert_eq!(receiver.ends.last().unwrap().complete.get(), 0);
            assert!(!receiver.missing().is_empty());
            assert!(receiver.blocks.len() > 4);
        }
    });
}
