//! The receiver's side of the serial stream, without any line, file or clock of its own.
//!
//! Bytes of the line go in, blocks come out through a [`Store`], and [`Receiver::speak`] gives the frames to
//! be sent. Layout and rules: docs/format.md, "The serial stream". Every byte is foreign: memory grows with
//! what arrived, never with what a frame claims.

use std::io;
use std::ops::Range;

use format::BLOCK;
use format::frame::{
    Begin, Decoder, Encoding, End, Event as Wire, Extent, Header, Kind, MAX_CONTENT, MAX_WIRE,
    Plan, Run, Stage, VERSION,
};
use miniz_oxide::inflate::decompress_slice_iter_to_slice;
use zerocopy::FromBytes;

use super::asker::Asker;
use super::blocks::BlockSet;
use super::head::HeadCopies;

/// Largest core that is believed in, in bytes, and largest head: those of `capture`, and a machine with
/// 128 TiB of memory.
const MAX_CORE: u64 = 1 << 47;
const MAX_HEAD: u64 = 256 << 20;
/// Blocks that may belong to the head while its size is not known.
const MAX_HEAD_BLOCKS: u64 = MAX_HEAD / BLOCK;
/// Most plans of a stream, so that a number is no plan only because it is in a frame.
const MAX_PLANS: u64 = 1 << 24;

static ZEROS: [u8; BLOCK as usize] = [0; BLOCK as usize];

/// Where blocks go.
pub trait Store {
    /// Takes whole blocks of the core, the first one's number being `first`. Blocks that are never
    /// written are zeros.
    ///
    /// # Errors
    /// What the system says: the stream cannot go on.
    fn write(&mut self, first: u64, bytes: &[u8]) -> io::Result<()>;
}

/// What a byte of the line was the last one of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Console text, or what became of frames that lost their delimiters.
    Text(&'a [u8]),
    /// So many bytes that are a damaged frame.
    Damaged(usize),
    /// A frame of this stream, which was taken.
    Taken(Kind),
    /// The first frame of another stream: it is for another [`Receiver::take`].
    OtherStream(Header, &'a [u8]),
    /// A frame that is right and says nothing to us: our own, sent back, or of a stream long gone.
    Ignored,
}

/// What the stream says of its core, all of it checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Outline {
    /// ELF machine of the dead kernel.
    pub machine: u16,
    /// How much of the memory is sent.
    pub extent: Extent,
    /// Blocks of the head.
    pub head_blocks: u64,
    /// Blocks of the core, were all of it sent.
    pub core_blocks: u64,
    /// Blocks that are to be sent, as far as the sender could tell.
    pub expected_blocks: u64,
}

impl Outline {
    fn read(content: &[u8]) -> Option<Outline> {
        let begin = Begin::read_from_bytes(content).ok()?;
        let (head, core) = (begin.head_size.get(), begin.core_size.get());
        let possible = begin.version.get() == VERSION
            && head.is_multiple_of(BLOCK)
            && core.is_multiple_of(BLOCK)
            && (BLOCK..=MAX_HEAD).contains(&head)
            && (head..=MAX_CORE).contains(&core);
        possible.then_some(Outline {
            machine: begin.machine.get(),
            extent: Extent::from_byte(begin.extent)?,
            head_blocks: head / BLOCK,
            core_blocks: core / BLOCK,
            expected_blocks: begin.expected_blocks.get().min(core / BLOCK),
        })
    }
}

/// What is known of a stage.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct StageState {
    /// Blocks that plans named.
    pub planned: u64,
    /// Of them those that have not arrived.
    pub missing: u64,
    /// Whether the plan that names itself the stage's last was heard.
    pub is_planned_out: bool,
}

/// Receives one stream.
pub struct Receiver {
    decoder: Box<Decoder<MAX_WIRE>>,
    content: Box<[u8; MAX_CONTENT]>,
    pub(super) state: State,
    asker: Asker,
}

/// What is known of the stream.
#[derive(Default)]
pub(super) struct State {
    pub stream: Option<u32>,
    pub outline: Option<Outline>,
    pub present: BlockSet,
    planned: [BlockSet; Stage::ALL.len()],
    planned_out: [bool; Stage::ALL.len()],
    /// Numbers of the plans that were heard.
    pub plans: BlockSet,
    /// Blocks of the plan whose blocks are coming now, and of all plans before.
    current: Vec<Range<u64>>,
    pub due: BlockSet,
    pub stage: Option<Stage>,
    pub head: HeadCopies,
    pub end: Option<End>,
    unreadable: BlockSet,
}

impl Default for Receiver {
    fn default() -> Self {
        Receiver::new()
    }
}

impl Receiver {
    /// A receiver for the stream that comes first.
    #[must_use]
    pub fn new() -> Receiver {
        Receiver {
            decoder: Box::new(Decoder::new()),
            content: Box::new([0; MAX_CONTENT]),
            state: State::default(),
            asker: Asker::default(),
        }
    }

    /// Takes the next byte of the line.
    ///
    /// # Errors
    /// Those of `store`.
    pub fn push(&mut self, byte: u8, store: &mut dyn Store) -> io::Result<Option<Event<'_>>> {
        let Receiver { decoder, content: buffer, state, asker } = self;
        Ok(match decoder.push(byte) {
            None => None,
            Some(Wire::Text(text)) => Some(Event::Text(text)),
            Some(Wire::Damaged(size)) => Some(Event::Damaged(size)),
            Some(Wire::Frame(header, content)) if state.is_another(&header, content) => {
                Some(Event::OtherStream(header, content))
            }
            Some(Wire::Frame(header, content)) => {
                Some(take(state, asker, buffer, &header, content, store)?)
            }
        })
    }

    /// Takes a frame that was decoded already: the first of this stream.
    ///
    /// # Errors
    /// Those of `store`.
    pub fn take(
        &mut self,
        header: &Header,
        content: &[u8],
        store: &mut dyn Store,
    ) -> io::Result<()> {
        let Receiver { content: buffer, state, asker, .. } = self;
        take(state, asker, buffer, header, content, store).map(drop)
    }

    /// What is to be sent now, `now_ms` milliseconds after some moment. Nothing before the first frame of
    /// the payload: what listens on the other end until then is a living machine.
    pub fn speak(&mut self, now_ms: u64) -> Option<Vec<u8>> {
        self.asker.speak(&self.state, now_ms)
    }

    /// Whether there is nothing more to wait for, as far as [`Receiver::speak`] was called.
    #[must_use]
    pub fn is_over(&self, now_ms: u64) -> bool {
        self.asker.is_over(&self.state, now_ms)
    }

    /// Whether everything that was to come is there: nothing is left to ask for.
    #[must_use]
    pub fn has_everything(&self) -> bool {
        self.state.has_everything()
    }

    /// Whether everything is there, and the payload says that it is the whole dump.
    #[must_use]
    pub fn is_complete(&self) -> bool {
        self.has_everything() && self.state.end.is_some_and(|end| end.complete.get() == 1)
    }

    /// The number of the stream, once a frame of it was heard.
    #[must_use]
    pub fn stream(&self) -> Option<u32> {
        self.state.stream
    }

    /// What the stream says of its core, once it did.
    #[must_use]
    pub fn outline(&self) -> Option<Outline> {
        self.state.outline
    }

    /// What the payload said at its end.
    #[must_use]
    pub fn end(&self) -> Option<End> {
        self.state.end
    }

    /// The blocks that have arrived.
    #[must_use]
    pub fn present(&self) -> &BlockSet {
        &self.state.present
    }

    /// The stage whose blocks are coming.
    #[must_use]
    pub fn stage(&self) -> Option<Stage> {
        self.state.stage
    }

    /// What is known of a stage.
    #[must_use]
    pub fn stage_state(&self, stage: Stage) -> StageState {
        let planned = &self.state.planned[stage as usize];
        let missing = planned.runs().flat_map(|run| self.state.present.lacking(run));
        StageState {
            planned: planned.count(),
            missing: missing.map(|gap| gap.end - gap.start).sum(),
            is_planned_out: self.state.planned_out[stage as usize],
        }
    }

    /// The runs of a stage's blocks that have not arrived.
    pub fn missing_of(&self, stage: Stage) -> impl Iterator<Item = Range<u64>> {
        self.state.planned[stage as usize].runs().flat_map(|run| self.state.present.lacking(run))
    }

    /// Blocks that must be there and are not: of a full dump all, else those that plans named.
    pub fn missing(&self) -> impl Iterator<Item = Range<u64>> {
        self.state.missing()
    }

    /// Plans that were sent and not heard, by the payload's count at its end or by the highest number.
    #[must_use]
    pub fn plans_lost(&self) -> u64 {
        self.state.plans_lost()
    }

    /// Blocks that the payload could not read; they are zeros.
    #[must_use]
    pub fn unreadable(&self) -> u64 {
        self.state.unreadable.count()
    }
}

fn take(
    state: &mut State,
    asker: &mut Asker,
    buffer: &mut [u8; MAX_CONTENT],
    header: &Header,
    content: &[u8],
    store: &mut dyn Store,
) -> io::Result<Event<'static>> {
    let from_payload = matches!(header.kind, Kind::Begin | Kind::Plan | Kind::Blocks | Kind::End);
    let is_ours = header.stream != 0 && header.stream == state.stream.unwrap_or(header.stream);
    let decoded = decode(header, content, buffer).filter(|_| from_payload && is_ours);
    let Some(content) = decoded else { return Ok(Event::Ignored) };
    state.stream = Some(header.stream);
    asker.heard();
    match header.kind {
        Kind::Begin => {
            state.begin(content);
            asker.plan_is_over();
        }
        Kind::Plan => {
            state.plan(header.offset, content);
            asker.plan_is_over();
            asker.plan_came();
        }
        Kind::Blocks => {
            if let Some(blocks) = state.blocks(header, content, store)? {
                asker.blocks_came(&blocks);
            }
        }
        _ => {
            if let Ok(end) = End::read_from_bytes(content) {
                state.at_end(end, header.sequence);
                asker.end_came();
            }
        }
    }
    Ok(Event::Taken(header.kind))
}

/// The content as it was before it was encoded; empty for blocks without content.
fn decode<'a>(
    header: &Header,
    content: &'a [u8],
    buffer: &'a mut [u8; MAX_CONTENT],
) -> Option<&'a [u8]> {
    let size = header.decoded_size()?;
    match header.encoding {
        Encoding::Deflate => {
            let buffer = buffer.get_mut(..size)?;
            let parts = std::iter::once(content);
            let came = decompress_slice_iter_to_slice(buffer, parts, false, true).ok()?;
            (came == size).then_some(buffer)
        }
        Encoding::Plain => Some(content),
        Encoding::Zeros | Encoding::Unreadable => Some(&[]),
    }
}

impl State {
    /// Whether a frame begins another stream.
    fn is_another(&self, header: &Header, content: &[u8]) -> bool {
        header.kind == Kind::Begin
            && header.stream != 0
            && self.stream.is_some_and(|ours| ours != header.stream)
            && {
                let mut buffer = [0; MAX_CONTENT];
                decode(header, content, &mut buffer).and_then(Outline::read).is_some()
            }
    }

    fn begin(&mut self, content: &[u8]) {
        self.settle();
        let Some(outline) = Outline::read(content) else { return };
        match &mut self.outline {
            Some(known) if known.core_blocks == outline.core_blocks => {
                known.expected_blocks = outline.expected_blocks;
            }
            Some(_) => {}
            None => {
                self.outline = Some(outline);
                self.head.forget_from(outline.head_blocks);
                let beyond = outline.core_blocks..u64::MAX;
                for set in [&mut self.present, &mut self.due, &mut self.unreadable]
                    .into_iter()
                    .chain(&mut self.planned)
                {
                    set.remove(beyond.clone());
                }
            }
        }
    }

    /// The blocks of the plan before have all been sent.
    fn settle(&mut self) {
        for run in self.current.drain(..) {
            self.due.insert(run);
        }
    }

    fn plan(&mut self, number: u64, content: &[u8]) {
        self.settle();
        let Ok((plan, runs)) = Plan::ref_from_prefix(content) else { return };
        let (Some(stage), Ok(runs)) = (Stage::from_byte(plan.stage), <[Run]>::ref_from_bytes(runs))
        else {
            return;
        };
        if number >= MAX_PLANS {
            return;
        }
        self.plans.insert(number..number + 1);
        self.stage = Some(stage);
        self.planned_out[stage as usize] |= plan.is_last_of_stage == 1;
        for run in runs {
            let blocks = self.believed(run.first()..run.first() + run.count());
            if self.planned[stage as usize].insert(blocks.clone()) {
                self.current.push(blocks);
            }
        }
    }

    /// The blocks that can be.
    fn believed(&self, blocks: Range<u64>) -> Range<u64> {
        let end = self.outline.map_or(MAX_CORE / BLOCK, |outline| outline.core_blocks);
        blocks.start.min(end)..blocks.end.min(end)
    }

    /// Takes blocks of the core. Returns those that it took.
    fn blocks(
        &mut self,
        header: &Header,
        content: &[u8],
        store: &mut dyn Store,
    ) -> io::Result<Option<Range<u64>>> {
        let first = header.offset / BLOCK;
        let named = first..first + u64::from(header.count);
        let blocks = self.believed(named.clone());
        if blocks != named {
            return Ok(None);
        }
        let head_end = self.outline.map_or(MAX_HEAD_BLOCKS, |outline| outline.head_blocks);
        let head = blocks.start.min(head_end)..blocks.end.min(head_end);
        for block in head.clone() {
            let at = ((block - first) * BLOCK) as usize;
            let bytes = content.get(at..at + BLOCK as usize).unwrap_or(&ZEROS);
            // What was sent later counts: the vendor note is finished only in the end.
            if self.head.take(block, header.sequence, bytes) {
                store.write(block, bytes)?;
            }
        }
        let memory = head.end.max(blocks.start)..blocks.end;
        if !content.is_empty() && !self.present.has_all(memory.clone()) {
            let at = ((memory.start - first) * BLOCK) as usize;
            store.write(memory.start, content.get(at..).unwrap_or_default())?;
        }
        if header.encoding == Encoding::Unreadable {
            self.unreadable.insert(blocks.clone());
        }
        Ok(self.present.insert(blocks.clone()).then_some(blocks))
    }

    fn at_end(&mut self, end: End, sequence: u32) {
        self.settle();
        self.head.ended(sequence);
        self.end = Some(end);
    }

    pub fn is_full(&self) -> bool {
        self.outline.is_some_and(|outline| outline.extent == Extent::Full)
    }

    /// Whether the head is there as the payload says it is in the end.
    pub fn head_is_right(&self) -> bool {
        let (Some(outline), Some(end)) = (self.outline, self.end) else { return false };
        self.head.crc(outline.head_blocks) == Some(end.head_crc.get())
    }

    pub fn plans_lost(&self) -> u64 {
        let highest = self.plans.runs().last().map_or(0, |run| run.end);
        let told = self.end.map_or(0, |end| u64::from(end.plans.get()));
        highest.max(told) - self.plans.count()
    }

    /// Whether plans must be sent again, or what is sent with each of them: the outline of the core.
    pub fn lacks_plans(&self) -> bool {
        self.outline.is_none() || (!self.is_full() && self.plans_lost() > 0)
    }

    pub fn has_everything(&self) -> bool {
        self.end.is_some()
            && !self.lacks_plans()
            && self.missing().next().is_none()
            && self.head_is_right()
    }

    pub fn missing(&self) -> Box<dyn Iterator<Item = Range<u64>> + '_> {
        match self.outline {
            Some(outline) if outline.extent == Extent::Full => {
                Box::new(self.present.lacking(0..outline.core_blocks))
            }
            _ => {
                let head = 0..self.outline.map_or(0, |outline| outline.head_blocks);
                let due = self.due.runs().chain(self.current.iter().cloned());
                Box::new(std::iter::once(head).chain(due).flat_map(|run| self.present.lacking(run)))
            }
        }
    }
}
