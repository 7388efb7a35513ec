//! What is told of a dump: while it comes, and in the end.

use std::fmt;
use std::ops::Range;
use std::path::PathBuf;

use format::BLOCK;
use format::frame::Stage;

use super::file::Shape;
use super::layout::CoreHead;
use super::receiver::{Receiver, StageState};

/// Physical ranges that are named; of the others only their number.
const NAMED_RANGES: usize = 5;

/// What has become of a dump.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Outcome {
    /// Its file.
    pub path: PathBuf,
    /// What is in the file.
    pub shape: Shape,
    /// Whether everything that was to be sent is there, by what the payload said in its end.
    pub is_complete: bool,
    /// Blocks that arrived.
    pub blocks: u64,
    /// Blocks that are missing, as far as is known, of each stage that lacks some.
    pub missing: Vec<(Stage, u64)>,
    /// Blocks that no plan named and that must be there.
    pub missing_unplanned: u64,
    /// Plans that did not arrive.
    pub plans_lost: u64,
    /// Physical addresses that are missing, the first few, and how many ranges there are in all.
    pub ranges: Vec<Range<u64>>,
    /// How many ranges there are in all.
    pub range_count: usize,
    /// Whether the payload's end was heard, and what it says of its work.
    pub ended: Option<bool>,
    /// Pages that the payload could not read.
    pub unreadable: u64,
}

impl Outcome {
    pub(super) fn of(
        path: PathBuf,
        receiver: &Receiver,
        shape: Shape,
        head: Option<&CoreHead>,
    ) -> Outcome {
        let missing = Stage::ALL.map(|stage| (stage, receiver.stage_state(stage).missing));
        let all: u64 = receiver.missing().map(|run| run.end - run.start).sum();
        let planned: u64 = missing.iter().map(|(_, count)| count).sum();
        let mut ranges = Vec::new();
        let mut range_count = 0;
        for run in receiver.missing() {
            for range in physical(head, run) {
                range_count += 1;
                if ranges.len() < NAMED_RANGES {
                    ranges.push(range);
                }
            }
        }
        Outcome {
            path,
            shape,
            is_complete: receiver.is_complete() && shape != Shape::None,
            blocks: receiver.present().count(),
            missing: missing.into_iter().filter(|(_, count)| *count > 0).collect(),
            missing_unplanned: all.saturating_sub(planned),
            plans_lost: receiver.plans_lost(),
            ranges,
            range_count,
            ended: receiver.end().map(|end| end.complete.get() == 1),
            unreadable: receiver.unreadable(),
        }
    }
}

/// The physical addresses of a run of blocks.
fn physical(head: Option<&CoreHead>, run: Range<u64>) -> impl Iterator<Item = Range<u64>> {
    let bytes = run.start * BLOCK..run.end * BLOCK;
    let loads = head.map_or(&[][..], CoreHead::loads);
    // The kernel's image comes first and lies in memory that has its own segment.
    loads.iter().enumerate().filter_map(move |(index, load)| {
        let is_shared = loads[index + 1..]
            .iter()
            .take(MAX_IMAGES)
            .any(|it| it.offset <= load.offset && load.offset < it.offset + it.size);
        let start = bytes.start.max(load.offset);
        let end = bytes.end.min(load.offset + load.size);
        let phys = |at: u64| load.phys + (at - load.offset);
        (start < end && !is_shared).then(|| phys(start)..phys(end))
    })
}

/// Segments after one of the kernel's image among which the memory that it shares is looked for.
const MAX_IMAGES: usize = 64;

impl fmt::Display for Outcome {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let path = self.path.display();
        match (self.shape, self.is_complete) {
            (Shape::None, _) if self.blocks == 0 => {
                return write!(f, "no dump came: no frame of one was on the line");
            }
            (Shape::None, _) => {
                return write!(
                    f,
                    "no dump: {} blocks came, but not the head, without which there is no ELF core. \
                     What came is kept in {path}.line: receive again with the same -o",
                    self.blocks
                );
            }
            (_, true) => write!(f, "{path}: complete, {} KiB", self.blocks * (BLOCK >> 10))?,
            (_, false) => write!(f, "{path}: INCOMPLETE, {} KiB", self.blocks * (BLOCK >> 10))?,
        }
        if self.unreadable > 0 {
            write!(f, "\n  {} pages could not be read on the machine", self.unreadable)?;
        }
        match self.ended {
            None => write!(f, "\n  the payload's end did not come: there may be more to it")?,
            Some(false) => write!(f, "\n  the payload says that it could not send everything")?,
            Some(true) => {}
        }
        for (stage, blocks) in &self.missing {
            write!(f, "\n  missing of {}: {blocks} blocks of 4 KiB", name(*stage))?;
        }
        if self.missing_unplanned > 0 {
            write!(f, "\n  missing besides: {} blocks of 4 KiB", self.missing_unplanned)?;
        }
        if self.plans_lost > 0 {
            write!(f, "\n  {} plans are missing: what they named is not known", self.plans_lost)?;
        }
        for range in &self.ranges {
            write!(f, "\n  missing: physical {:#x} to {:#x}", range.start, range.end)?;
        }
        if let more @ 1.. = self.range_count - self.ranges.len() {
            write!(f, "\n  and {more} more ranges")?;
        }
        Ok(())
    }
}

fn name(stage: Stage) -> &'static str {
    match stage {
        Stage::Head => "the head",
        Stage::Running => "stacks of the CPUs",
        Stage::Tasks => "all tasks",
        Stage::Log => "the log",
        Stage::PageTables => "page tables",
        Stage::PerCpu => "per-CPU variables",
        Stage::Data => "the kernel's data",
        Stage::Text => "the kernel's text",
        Stage::Rest => "other memory",
    }
}

/// What has come by now, and what can be done with it, in one line; `rate` is that of the line in
/// bytes per second.
#[must_use]
pub fn progress(receiver: &Receiver, rate: u64) -> String {
    let Some(outline) = receiver.outline() else { return format!("{rate} B/s") };
    let (has, of) = (receiver.present().count(), outline.expected_blocks);
    let stage = receiver.stage().map_or("", name);
    let usable = [("backtrace", Stage::Running), ("tasks", Stage::Tasks), ("log", Stage::Log)]
        .map(|(what, stage)| format!("{what}: {}", share(receiver.stage_state(stage))))
        .join(", ");
    format!("{rate} B/s, {has} of {of} blocks, {stage}; {usable}")
}

/// How much of a stage is there.
fn share(state: StageState) -> String {
    match state {
        StageState { missing: 0, is_planned_out: true, .. } => "yes".to_owned(),
        StageState { planned: 0, .. } => "no".to_owned(),
        StageState { planned, missing, .. } => format!("{} %", (planned - missing) * 99 / planned),
    }
}
