//! The dump from its first frame to its end.

use format::BLOCK;
use format::frame::{
    Begin, Encoding, End, Extent, Kind, MAX_BLOCKS, MAX_CONTENT, MAX_RUNS, Plan, Run, Stage,
    VERSION,
};
use format::record::{self, Record};
use heapless::Vec;
use zerocopy::IntoBytes;

use crate::card::Card;
use crate::core_file::{CoreFile, E_FLAGS};
use crate::dump::{self, Error, Payload, Silence, Source};
use crate::line::Line;
use crate::unreadable::Unreadable;
use crate::{Machine, OldPhys};

use super::order;
use super::places::Places;
use super::repair::pieces;
use super::sender::{Frames, Request, Sender};
use super::sent::Sent;
use super::staged::Staged;

const PAGE: usize = BLOCK as usize;

/// Runs of a plan: short enough that what a lost plan hides is little, and that console and receiver are
/// heard from often.
const PLANNED: usize = 1024;

/// Buffers of the stream, outside of the stack.
pub struct Buffers {
    frames: Frames,
    sent: Sent,
    plan: Vec<Run, PLANNED>,
}

const _: () = assert!(PLANNED <= MAX_RUNS);

impl Default for Buffers {
    fn default() -> Buffers {
        Buffers::new()
    }
}

impl Buffers {
    /// Empty buffers.
    #[must_use]
    pub const fn new() -> Buffers {
        Buffers { frames: Frames::new(), sent: Sent::new(), plan: Vec::new() }
    }
}

/// What is to be sent.
#[derive(Clone, Copy)]
pub struct Job<'a> {
    /// The dead kernel's memory.
    pub source: Source<'a>,
    /// What the vendor note says of us.
    pub payload: Payload<'a>,
    /// How much of the memory.
    pub extent: Extent,
    /// Speed of the line in bits per second, if it is known: else what can be seen of it counts.
    pub baud: Option<u32>,
}

/// A dump that was sent whole. Times are microseconds since the payload's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complete {
    /// Bytes put on the line.
    pub wire_bytes: u64,
    /// When the first block was sent, and the last.
    pub first_block_us: u64,
    /// When the last block was sent.
    pub last_block_us: u64,
    /// Pages of old memory sent.
    pub pages_read: u64,
    /// Pages that could not be read.
    pub pages_unreadable: u64,
    /// Whether a receiver said that it has everything.
    pub confirmed: bool,
}

/// Sends the dump over `line`.
///
/// # Errors
/// [`Error`]; what was sent until then is with the receiver.
pub fn write(
    machine: &mut dyn Machine,
    line: &mut dyn Line,
    job: Job<'_>,
    buffers: &mut dump::Buffers,
) -> Result<Complete, Error> {
    let (notes, card, Buffers { frames, sent, plan }) = buffers.for_line();
    let source = job.source;
    if card.text().is_empty() {
        card.make(machine, source, notes, &mut Silence);
    }
    // A line has no end: there is room for every core.
    let (headers, old) = (source.headers, source.old);
    let core =
        CoreFile::plan(machine, headers, notes, old, card.text(), u64::MAX).map_err(Error::Plan)?;
    let places = {
        let (mut memory, facts) = card.open(machine, source);
        Places::find(&mut memory, source.headers.architecture(), facts)
    };
    // A crash at another time has another number; 0 means none.
    let stream = format::crc32(source.old.vmcoreinfo.bytes()).max(1);
    let sender = Sender::new(line, frames, stream, job.baud);
    let first_block_us = machine.now_us();
    let numbers = Numbers { first_block_us, ..Numbers::default() };
    let mut stream = Stream {
        sender,
        job,
        core,
        sent,
        plan,
        numbers,
        wire_again: 0,
        again: false,
        is_cut_short: false,
        result: Ok(()),
    };
    stream.run(machine, card, &places, notes)
}

/// What is counted.
#[derive(Clone, Copy, Default)]
pub(super) struct Numbers {
    first_block_us: u64,
    last_block_us: u64,
    /// Plans sent in this walk, and in all of the first one.
    plans: u32,
    all_plans: u32,
    blocks: u64,
    pages_read: u64,
    unreadable: Unreadable,
    head_crc: u32,
}

pub(super) struct Stream<'a> {
    pub(super) sender: Sender<'a>,
    pub(super) job: Job<'a>,
    pub(super) core: CoreFile,
    sent: &'a mut Sent,
    /// Runs of the next plan.
    plan: &'a mut Vec<Run, PLANNED>,
    pub(super) numbers: Numbers,
    /// Bytes on the line because a receiver asked for them.
    pub(super) wire_again: u64,
    /// Plans are sent again, without their blocks.
    pub(super) again: bool,
    /// The time was over before everything was sent.
    is_cut_short: bool,
    /// The first failure, for walks that do not end with it.
    pub(super) result: Result<(), Error>,
}

impl Stream<'_> {
    fn run(
        &mut self,
        machine: &mut dyn Machine,
        card: &mut Card,
        places: &Places,
        notes: &mut [u8],
    ) -> Result<Complete, Error> {
        let walked = self.walk(machine, card, places, notes);
        if walked == Err(Error::OutOfTime) {
            // What was planned and did not come is missing.
            self.numbers.all_plans = self.numbers.plans;
            self.is_cut_short = true;
            self.end(machine)?;
        }
        walked?;
        self.numbers.all_plans = self.numbers.plans;
        self.numbers.last_block_us = machine.now_us();
        self.head(machine, notes, card.text(), true, &[])?;
        self.end(machine)?;
        if self.sender.heard_us.is_none() {
            // Whoever listens there cannot ask: what the rest hangs on comes twice.
            self.plans_again(machine, card, places, notes)?;
            self.head(machine, notes, card.text(), true, &[])?;
            self.end(machine)?;
        }
        let confirmed = self.repair(machine, card, places, notes)?;
        let Numbers { first_block_us, last_block_us, pages_read, unreadable, .. } = self.numbers;
        Ok(Complete {
            wire_bytes: self.sender.wire_bytes,
            first_block_us,
            last_block_us,
            pages_read,
            pages_unreadable: unreadable.pages,
            confirmed,
        })
    }

    /// Sends everything of the extent; or again, only what belongs to it.
    fn walk(
        &mut self,
        machine: &mut dyn Machine,
        card: &mut Card,
        places: &Places,
        notes: &mut [u8],
    ) -> Result<(), Error> {
        self.numbers.plans = 0;
        self.sent.clear();
        self.plan.clear();
        let extent = self.job.extent;
        for stage in Stage::ALL.into_iter().filter(|stage| stage.extent() <= extent) {
            if stage == Stage::Head {
                let blocks = self.core.head_size / BLOCK;
                self.plan_blocks(machine, stage, 0, blocks);
                self.send_plan(machine, stage, true);
                if !self.again {
                    self.head(machine, notes, card.text(), false, &[])?;
                }
                continue;
            }
            let source = self.job.source;
            let mut staged = Staged { stream: self, stage };
            order::walk(stage, machine, source, card, places, notes, &mut staged);
            self.result?;
        }
        Ok(())
    }

    pub(super) fn plans_again(
        &mut self,
        machine: &mut dyn Machine,
        card: &mut Card,
        places: &Places,
        notes: &mut [u8],
    ) -> Result<(), Error> {
        self.again = true;
        let outcome = self.walk(machine, card, places, notes);
        self.again = false;
        outcome
    }

    /// Puts those of `count` blocks from `first` on that were not sent yet into the plan, and sends it
    /// whenever it is full.
    pub(super) fn plan_blocks(
        &mut self,
        machine: &mut dyn Machine,
        stage: Stage,
        first: u64,
        count: u64,
    ) {
        let end = first + count;
        let mut at = first;
        while at < end && self.result.is_ok() {
            let (is_sent, count) = self.sent.alike(at, (end - at).min(Run::MAX_COUNT));
            if !is_sent {
                let follows = |run: &&mut Run| {
                    run.first() + run.count() == at && run.count() + count <= Run::MAX_COUNT
                };
                match self.plan.last_mut().filter(follows) {
                    Some(run) => *run = Run::new(run.first(), run.count() + count),
                    None => {
                        if self.plan.is_full() {
                            self.send_plan(machine, stage, false);
                        }
                        let _ = self.plan.push(Run::new(at, count));
                    }
                }
                self.sent.add(at, count);
            }
            at += count;
        }
    }

    /// Sends the plan and, unless it is sent again, its blocks.
    pub(super) fn send_plan(
        &mut self,
        machine: &mut dyn Machine,
        stage: Stage,
        is_last_of_stage: bool,
    ) {
        if self.result.is_ok() {
            self.result = self.try_send_plan(machine, stage, is_last_of_stage);
        }
        self.plan.clear();
    }

    fn try_send_plan(
        &mut self,
        machine: &mut dyn Machine,
        stage: Stage,
        is_last_of_stage: bool,
    ) -> Result<(), Error> {
        let planned: u64 = self.plan.iter().map(Run::count).sum();
        self.sender.begin(machine, &self.begin(planned))?;
        let plan = Plan {
            stage: stage as u8,
            is_last_of_stage: is_last_of_stage.into(),
            reserved: [0; 6],
        };
        let head = size_of::<Plan>();
        let content = &mut self.sender.frames.content;
        content[..head].copy_from_slice(plan.as_bytes());
        let runs = self.plan.as_slice().as_bytes();
        content[head..head + runs.len()].copy_from_slice(runs);
        let number = self.numbers.plans;
        self.numbers.plans += 1;
        self.sender.prepared(machine, Kind::Plan, number.into(), head + runs.len())?;
        if self.again || stage == Stage::Head {
            return Ok(());
        }
        for index in 0..self.plan.len() {
            let run = self.plan[index];
            self.send_run(machine, run)?;
        }
        Ok(())
    }

    fn begin(&self, planned: u64) -> Begin {
        let core = &self.core;
        let expected = match self.job.extent {
            Extent::Full => core.size / BLOCK,
            _ => self.numbers.blocks + planned,
        };
        Begin {
            version: VERSION.into(),
            machine: self.job.source.headers.architecture().elf_machine().into(),
            extent: self.job.extent as u8,
            reserved: [0; 3],
            head_size: core.head_size.into(),
            core_size: core.size.into(),
            expected_blocks: expected.into(),
            payload: self.job.payload.version_field(),
        }
    }

    /// Sends the blocks of a run, and what the receiver asks for meanwhile.
    fn send_run(&mut self, machine: &mut dyn Machine, run: Run) -> Result<(), Error> {
        for (first, count) in pieces(run.first(), run.first() + run.count()) {
            self.send_blocks(machine, first, count)?;
            self.numbers.blocks += count;
            if self.sender.request.take_if(|it| *it == Request::Blocks).is_some() {
                let runs = self.sender.frames.wanted.clone();
                self.send_again(machine, &runs)?;
            }
        }
        Ok(())
    }

    /// Sends blocks of memory: a few in one frame, and those without content counted.
    pub(super) fn send_blocks(
        &mut self,
        machine: &mut dyn Machine,
        first: u64,
        count: u64,
    ) -> Result<(), Error> {
        let mut empty = Empty { encoding: Encoding::Zeros, first, count: 0 };
        let (mut at, end) = (first, first + count);
        while at < end {
            if machine.is_time_over() {
                return Err(Error::OutOfTime);
            }
            let most = (end - at).min(MAX_BLOCKS as u64) as usize;
            let (blocks, encoding) = self.read_alike(machine, at, most);
            match encoding {
                Some(encoding) if encoding == empty.encoding => empty.count += blocks as u64,
                Some(encoding) => {
                    self.send_empty(machine, &empty)?;
                    empty = Empty { encoding, first: at, count: blocks as u64 };
                }
                None => {
                    self.send_empty(machine, &empty)?;
                    self.sender.blocks(machine, at * BLOCK, blocks)?;
                    empty = Empty { first: at + blocks as u64, count: 0, ..empty };
                }
            }
            at += blocks as u64;
        }
        self.send_empty(machine, &empty)
    }

    fn send_empty(&mut self, machine: &mut dyn Machine, empty: &Empty) -> Result<(), Error> {
        match empty.count {
            0 => Ok(()),
            count => self.sender.empty_blocks(machine, empty.encoding, empty.first * BLOCK, count),
        }
    }

    /// Reads some blocks of the core, at most `most`, to where frames begin: those that can be read, or
    /// those that cannot. Returns how many, and what stands for them if they have no content.
    fn read_alike(
        &mut self,
        machine: &mut dyn Machine,
        first: u64,
        most: usize,
    ) -> (usize, Option<Encoding>) {
        let (mut blocks, mut is_readable) = (0, true);
        while blocks < most {
            let readable = self.read_block(machine, first + blocks as u64, blocks * PAGE);
            if blocks > 0 && readable != is_readable {
                break;
            }
            is_readable = readable;
            blocks += 1;
        }
        let content = &self.sender.frames.content[..blocks * PAGE];
        let zeros = is_readable && content.iter().all(|&byte| byte == 0);
        if is_readable {
            self.numbers.pages_read += blocks as u64;
            (blocks, zeros.then_some(Encoding::Zeros))
        } else {
            for block in first..first + blocks as u64 {
                if let Some(InBlock { from, size, .. }) = self.in_block(block) {
                    self.numbers.unreadable.add(from, size);
                }
            }
            (blocks, Some(Encoding::Unreadable))
        }
    }

    /// Reads a block of the core to `into` of the content; whether it can be read.
    fn read_block(&mut self, machine: &mut dyn Machine, block: u64, into: usize) -> bool {
        let part = self.in_block(block);
        let content = &mut self.sender.frames.content[into..into + PAGE];
        let Some(InBlock { from, lead, size }) = part else {
            content.fill(0);
            return false;
        };
        if size < BLOCK {
            content.fill(0);
        }
        machine.read_old(from, &mut content[lead as usize..(lead + size) as usize]).is_ok()
    }

    /// What of old memory is in a block of the core: a range may begin or end inside of it.
    fn in_block(&self, block: u64) -> Option<InBlock> {
        let offset = block * BLOCK;
        let (at, range) = self.core.range_at(self.job.source.old, offset)?;
        let (start, end) = (offset.max(at), (offset + BLOCK).min(at + range.size));
        let from = OldPhys(range.source.0 + (start - at));
        Some(InBlock { from, lead: start - offset, size: end - start })
    }

    /// Sends the blocks of the head, or of them those that are `wanted`; as they are in the end when
    /// it is `done`.
    pub(super) fn head(
        &mut self,
        machine: &mut dyn Machine,
        notes: &mut [u8],
        card: &str,
        done: bool,
        wanted: &[Run],
    ) -> Result<(), Error> {
        let record = self.record(done);
        let complete = done && self.is_whole();
        let source = self.job.source;
        let core = self.core;
        let mut crc = crc32fast::Hasher::new();
        // Of the head as many blocks as a frame has room for, and again from the start for the next
        // ones: it is made piece by piece.
        let blocks = core.head_size / BLOCK;
        let mut first = 0;
        while first < blocks {
            let count = (blocks - first).min(MAX_BLOCKS as u64);
            let content = &mut self.sender.frames.content;
            let mut window =
                Window { start: first * BLOCK, at: 0, complete, content: &mut content[..] };
            core.write_head(machine, source, notes, card, &record, &mut |piece| window.take(piece));
            crc.update(&content[..count as usize * PAGE]);
            let is_wanted =
                |run: &Run| run.first() < first + count && first < run.first() + run.count();
            if wanted.is_empty() || wanted.iter().any(is_wanted) {
                self.sender.blocks(machine, first * BLOCK, count as usize)?;
            }
            first += count;
        }
        self.numbers.head_crc = crc.finalize();
        if !done {
            self.numbers.blocks += blocks;
        }
        Ok(())
    }

    /// Whether what is sent is all of the memory that is believed in.
    fn is_whole(&self) -> bool {
        !self.job.source.old.truncated && !self.is_cut_short
    }

    fn record(&self, done: bool) -> Record {
        let Numbers { first_block_us, last_block_us, pages_read, unreadable, .. } = self.numbers;
        let record = Record {
            first_block_us: first_block_us.into(),
            ..dump::fresh_record(self.job.source, self.job.payload)
        };
        if !done {
            return record;
        }
        Record {
            complete: u32::from(self.is_whole()).into(),
            last_block_us: last_block_us.into(),
            pages_read: pages_read.into(),
            pages_unreadable: unreadable.pages.into(),
            unreadable: unreadable.ranges,
            ..record
        }
    }

    pub(super) fn end(&mut self, machine: &mut dyn Machine) -> Result<(), Error> {
        let end = End {
            complete: u32::from(self.is_whole()).into(),
            plans: self.numbers.all_plans.into(),
            head_crc: self.numbers.head_crc.into(),
            reserved: 0.into(),
            pages_read: self.numbers.pages_read.into(),
            pages_unreadable: self.numbers.unreadable.pages.into(),
        };
        self.sender.small(machine, Kind::End, 0, end.as_bytes())
    }
}

/// Old memory in a block.
struct InBlock {
    from: OldPhys,
    /// Where in the block it begins.
    lead: u64,
    size: u64,
}

/// Blocks without content that are waiting to be sent as one frame.
struct Empty {
    encoding: Encoding,
    first: u64,
    count: u64,
}

/// Cuts a frame's content out of the pieces of the head.
struct Window<'a> {
    start: u64,
    at: u64,
    complete: bool,
    content: &'a mut [u8],
}

impl Window<'_> {
    fn take(&mut self, piece: &[u8]) {
        for &byte in piece {
            let skip = self.at.checked_sub(self.start);
            let slot = skip.and_then(|skip| self.content.get_mut(usize::try_from(skip).ok()?));
            if let Some(slot) = slot {
                let in_flags = (E_FLAGS as u64..E_FLAGS as u64 + 4).contains(&self.at);
                *slot = if self.complete && in_flags { 0 } else { byte };
            }
            self.at += 1;
        }
    }
}

const _: () = assert!(MAX_CONTENT == MAX_BLOCKS * PAGE && record::SIZE <= PAGE);
