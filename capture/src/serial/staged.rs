//! From physical memory, in the order in which it is to be sent, to blocks of the core in plans.

use core::fmt;

use format::BLOCK;
use format::frame::Stage;

use crate::Machine;
use crate::old::Range;

use super::order::Taker;
use super::stream::Stream;

/// What a stage is called on the console.
struct Name(Stage);

impl fmt::Display for Name {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.0 {
            Stage::Head => "headers and registers",
            Stage::Running => "stacks of the CPUs",
            Stage::Tasks => "tasks and their stacks",
            Stage::Log => "log",
            Stage::PageTables => "page tables",
            Stage::PerCpu => "per-CPU variables",
            Stage::Data => "data",
            Stage::Text => "text and constants",
            Stage::Rest => "all other memory",
        })
    }
}

/// Takes what belongs to a stage.
pub struct Staged<'s, 'a> {
    pub stream: &'s mut Stream<'a>,
    pub stage: Stage,
}

impl Taker for Staged<'_, '_> {
    fn take(&mut self, machine: &mut dyn Machine, phys: u64, size: u64) {
        let old = self.stream.job.source.old;
        let (core, stage) = (self.stream.core, self.stage);
        for (offset, range) in core.ranges(old) {
            let Range { phys: begins, size: length, .. } = range;
            let start = phys.max(begins);
            let end = phys.saturating_add(size).min(begins.saturating_add(length));
            if start < end {
                let first = (offset + (start - begins)) / BLOCK;
                let after = (offset + (end - begins)).div_ceil(BLOCK);
                self.stream.plan_blocks(machine, stage, first, after - first);
            }
        }
    }

    fn end_of(&mut self, machine: &mut dyn Machine, stage: Stage) {
        self.stream.send_plan(machine, stage, true);
        if !self.stream.again && self.stream.result.is_ok() {
            let sent = self.stream.sender.wire_bytes >> 10;
            machine.say(format_args!("{} sent, {sent} KiB on the line", Name(stage)));
        }
    }
}
