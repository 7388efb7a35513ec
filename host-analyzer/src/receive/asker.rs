//! When to say what to the payload: that somebody listens, what is lacking, and that everything is there.
//!
//! The payload keeps one request and has 2 KiB for what it hears while it sends. So there is one request
//! under way at a time, until it was answered or is lost.

use std::ops::Range;

use format::frame::{self, Encoding, Header, Kind, Run};
use zerocopy::IntoBytes;

use super::receiver::State;

/// Most runs that the payload reads of one request, and blocks that are asked for at once: so few that an
/// answer does not take minutes.
const MAX_RUNS: usize = 128;
const MAX_BLOCKS: u64 = 1024;
/// How often something is said, so that the payload knows that it is heard.
const HELLO_MS: u64 = 1000;
/// A request is lost when the line was silent for so long, or busy with something else for so long.
const SILENT_MS: u64 = 3000;
const BUSY_MS: u64 = 30_000;
/// The payload tells its end every second while it has nothing else to do; one that it tells after a
/// request may have crossed it on the line, a second one did not.
const IDLE_ENDS: u32 = 2;
/// How long the last word is repeated for a payload that did not hear it, and how long one that ended
/// is waited for.
const LAST_WORD_MS: u64 = 2500;
const GONE_MS: u64 = 30_000;
/// Bytes of the longest frame that is sent: [`MAX_RUNS`] runs, header, checksum and stuffing.
const MAX_SAID: usize = MAX_RUNS * size_of::<Run>() + 64;

/// What was asked for.
struct Request {
    /// Blocks; none when it was plans.
    blocks: Vec<Range<u64>>,
    asked_ms: u64,
    progress_ms: u64,
    /// Whether some of it came.
    is_answered: bool,
    /// Ends that were heard since.
    ends: u32,
}

/// The voice of the receiver. It hears what came between two calls of [`Asker::speak`].
#[derive(Default)]
pub struct Asker {
    sequence: u32,
    request: Option<Request>,
    said_ms: Option<u64>,
    heard_ms: u64,
    looked_ms: u64,
    last_word_ms: Option<u64>,
    has_heard: bool,
    has_progress: bool,
    has_end: bool,
    /// There may be something to ask for that was not there before.
    has_news: bool,
}

impl Asker {
    /// A frame came.
    pub fn heard(&mut self) {
        self.has_heard = true;
    }

    /// What was sent until now is all there will be of the plans until now.
    pub fn plan_is_over(&mut self) {
        self.has_news = true;
    }

    /// A plan came.
    pub fn plan_came(&mut self) {
        if self.request.as_ref().is_some_and(|request| request.blocks.is_empty()) {
            self.progress();
        }
    }

    /// Blocks came.
    pub fn blocks_came(&mut self, came: &Range<u64>) {
        let Some(request) = &self.request else { return };
        if request.blocks.iter().any(|run| run.start < came.end && came.start < run.end) {
            self.progress();
        }
    }

    /// An end came.
    pub fn end_came(&mut self) {
        self.has_end = true;
        self.has_news = true;
        if let Some(request) = &mut self.request {
            request.ends += 1;
        }
    }

    fn progress(&mut self) {
        self.has_progress = true;
        if let Some(request) = &mut self.request {
            request.is_answered = true;
            request.ends = 0;
        }
    }

    /// Whether there is nothing more to wait for: the payload had time to hear that everything is there, or
    /// it ended and is gone.
    pub fn is_over(&self, state: &State, now_ms: u64) -> bool {
        let after = |then: u64, wait: u64| now_ms.saturating_sub(then) >= wait;
        self.last_word_ms.is_some_and(|then| state.has_everything() && after(then, LAST_WORD_MS))
            || (state.end.is_some() && !self.has_heard && after(self.heard_ms, GONE_MS))
    }

    /// What is to be said now.
    pub fn speak(&mut self, state: &State, now_ms: u64) -> Option<Vec<u8>> {
        let stream = state.stream?;
        if std::mem::take(&mut self.has_heard) {
            self.heard_ms = now_ms;
        }
        if std::mem::take(&mut self.has_progress)
            && let Some(request) = &mut self.request
        {
            request.progress_ms = now_ms;
        }
        if self.request.as_ref().is_some_and(|request| self.is_settled(request, state, now_ms)) {
            self.request = None;
            self.has_news = true;
        }
        let said = match self.next(state, now_ms) {
            Some((kind, runs)) => frame_of(kind, stream, self.sequence, &runs),
            None if self.said_ms.is_none_or(|then| now_ms.saturating_sub(then) >= HELLO_MS) => {
                frame_of(Kind::Hello, stream, self.sequence, &[])
            }
            None => return None,
        };
        self.sequence = self.sequence.wrapping_add(1);
        self.said_ms = Some(now_ms);
        Some(said)
    }

    /// Whether a request was answered, or is lost.
    fn is_settled(&self, request: &Request, state: &State, now_ms: u64) -> bool {
        let after = |then: u64, wait: u64| now_ms.saturating_sub(then) >= wait;
        let is_there = match request.blocks.as_slice() {
            [] => !state.lacks_plans(),
            runs => {
                let head = state.outline.map_or(0, |outline| outline.head_blocks);
                let has = |run: &Range<u64>| {
                    state.present.has_all(run.clone())
                        && (run.start >= head || state.head_is_right())
                };
                runs.iter().all(has)
            }
        };
        let is_over = request.is_answered && request.ends > 0;
        let is_idle = request.ends >= IDLE_ENDS;
        let is_silent = after(self.heard_ms.max(request.asked_ms), SILENT_MS);
        is_there || is_over || is_idle || is_silent || after(request.progress_ms, BUSY_MS)
    }

    /// What to say but that somebody listens.
    fn next(&mut self, state: &State, now_ms: u64) -> Option<(Kind, Vec<Run>)> {
        let has_end = std::mem::take(&mut self.has_end);
        if self.request.is_some() {
            return None;
        }
        // To look for what is missing costs time, and it changes seldom.
        let looks = self.has_news || now_ms.saturating_sub(self.looked_ms) >= HELLO_MS;
        if !looks {
            return None;
        }
        (self.has_news, self.looked_ms) = (false, now_ms);
        if state.has_everything() {
            let is_news = has_end || self.last_word_ms.is_none();
            self.last_word_ms = if is_news { Some(now_ms) } else { self.last_word_ms };
            return is_news.then_some((Kind::Done, Vec::new()));
        }
        let runs = lacking(state);
        let (kind, runs) = match state.end {
            Some(_) if state.lacks_plans() => (Kind::WantPlans, Vec::new()),
            _ if runs.is_empty() => return None,
            _ => (Kind::Want, runs),
        };
        self.request = Some(Request {
            blocks: runs.iter().map(|run| run.first()..run.first() + run.count()).collect(),
            asked_ms: now_ms,
            progress_ms: now_ms,
            is_answered: false,
            ends: 0,
        });
        Some((kind, runs))
    }
}

/// What can be asked for: before the end, blocks of plans whose turn is over; then everything.
fn lacking(state: &State) -> Vec<Run> {
    let Some(outline) = state.outline else { return Vec::new() };
    let head = outline.head_blocks;
    if state.end.is_none() {
        // The head comes in the end anyway.
        let due = state.due.runs().map(|run| run.start.max(head)..run.end.max(head));
        return cut(due.flat_map(|run| state.present.lacking(run)));
    }
    let runs = cut(state.missing());
    if !runs.is_empty() || state.head_is_right() {
        return runs;
    }
    let doubtful = cut(state.head.doubtful(head).map(|block| block..block + 1));
    if doubtful.is_empty() { cut(std::iter::once(0..head)) } else { doubtful }
}

/// As much of it as fits into a request.
fn cut(blocks: impl Iterator<Item = Range<u64>>) -> Vec<Run> {
    let mut left = MAX_BLOCKS;
    let mut runs: Vec<Range<u64>> = Vec::new();
    for blocks in blocks {
        let count = left.min(blocks.end - blocks.start);
        if count == 0 {
            break;
        }
        left -= count;
        let is_next = runs.last().is_some_and(|run| run.end == blocks.start);
        match runs.last_mut().filter(|_| is_next) {
            Some(run) => run.end += count,
            None => runs.push(blocks.start..blocks.start + count),
        }
        if runs.len() == MAX_RUNS {
            break;
        }
    }
    runs.into_iter().map(|run| Run::new(run.start, run.end - run.start)).collect()
}

fn frame_of(kind: Kind, stream: u32, sequence: u32, runs: &[Run]) -> Vec<u8> {
    let content = runs.as_bytes();
    // No more than MAX_RUNS.
    let count = content.len() as u32;
    let header = Header { kind, encoding: Encoding::Plain, stream, sequence, count, offset: 0 };
    let mut wire = vec![0; MAX_SAID];
    let size = frame::encode(&header, content, &mut wire).unwrap_or(0);
    wire.truncate(size);
    wire
}
