//! The crash card: why the kernel died, on one page, before anything else is written.
//!
//! Kernel release, panic message, time, task, taint; the call trace and registers of the CPU that
//! panicked; the end of the log; what the other CPUs did. It comes from the notes, VMCOREINFO and what
//! that leads to in old memory: page tables, symbol table, unwind tables, types. Where a source is
//! missing, its part says so and the rest stands.
//!
//! Nothing here is needed for the dump, so nothing here may cost it: what is read, but for the notes, is
//! checked against the ranges of old memory, what all of that may cost is limited, and lists are walked
//! only so far.

#[cfg(test)]
mod arm64_tests;
pub(crate) mod btf;
pub(crate) mod cpus;
pub(crate) mod facts;
mod hidden;
mod kallsyms;
mod kernel;
mod log;
pub(crate) mod memory;
pub(crate) mod module;
mod orc;
pub(crate) mod paging;
mod report;
#[cfg(test)]
pub(crate) mod testing;
mod text;
mod trace;
mod unwind;
mod unwind_aarch64;
mod unwind_x86_64;

use format::area::CARD_BLOCK;
use heapless::Vec;

use crate::Machine;
use crate::dump::Source;

use facts::Facts;
use kernel::Kernel;
use memory::{Cache, KernelMemory};
use paging::Tables;
use report::Report;

/// Where the card's lines go.
pub trait Sink {
    /// Takes a line of printable UTF-8, without its end.
    fn line(&mut self, machine: &mut dyn Machine, line: &str);
}

/// The card, and what is known about the dead kernel.
pub struct Card {
    cache: Cache,
    /// At most one. (Not an `Option`: this is all zeros as long as nothing is known, and takes no room
    /// in the payload's image.)
    facts: Vec<Facts, 1>,
    text: Text,
}

/// The card's text: lines, an end of line of one byte after each.
struct Text {
    bytes: [u8; CARD_BLOCK as usize],
    size: usize,
}

impl Text {
    /// Adds a line, if all of it fits.
    fn add(&mut self, line: &str) {
        if self.bytes.len() - self.size <= line.len() {
            return;
        }
        for &byte in line.as_bytes().iter().chain(b"\n") {
            if let Some(slot) = self.bytes.get_mut(self.size) {
                *slot = byte;
                self.size += 1;
            }
        }
    }
}

/// Shows each line at once, and keeps it.
struct Both<'a> {
    text: &'a mut Text,
    shown: &'a mut dyn Sink,
}

impl Sink for Both<'_> {
    fn line(&mut self, machine: &mut dyn Machine, line: &str) {
        self.text.add(line);
        self.shown.line(machine, line);
    }
}

impl Default for Card {
    fn default() -> Card {
        Card::new()
    }
}

impl Card {
    /// Nothing is known yet.
    #[must_use]
    pub const fn new() -> Card {
        let text = Text { bytes: [0; CARD_BLOCK as usize], size: 0 };
        Card { cache: Cache::new(), facts: Vec::new(), text }
    }

    /// The dead kernel's memory, and where things are in it.
    pub(crate) fn open<'a>(
        &'a mut self,
        machine: &'a mut dyn Machine,
        source: Source<'a>,
    ) -> (KernelMemory<'a>, &'a Facts) {
        let (memory, facts, _) = self.parts(machine, source);
        (memory, facts)
    }

    fn parts<'a>(
        &'a mut self,
        machine: &'a mut dyn Machine,
        source: Source<'a>,
    ) -> (KernelMemory<'a>, &'a Facts, &'a mut Text) {
        let (architecture, old) = (source.headers.architecture(), source.old);
        let tables = Tables::find(architecture, &old.vmcoreinfo);
        let mut memory = KernelMemory::new(machine, old, tables, &mut self.cache);
        if self.facts.is_empty() {
            let _ = self.facts.push(Facts::find(&mut memory, architecture, &old.vmcoreinfo));
        }
        (memory, &self.facts[0], &mut self.text)
    }

    /// Makes the card, and gives it to `out` line by line as it comes. `scratch` takes the notes of a
    /// CPU.
    pub fn make(
        &mut self,
        machine: &mut dyn Machine,
        source: Source<'_>,
        scratch: &mut [u8],
        out: &mut dyn Sink,
    ) {
        let (memory, facts, text) = self.parts(machine, source);
        text.size = 0;
        let mut kernel = Kernel::new(memory, facts);
        let out = &mut Both { text, shown: out };
        let room = CARD_BLOCK as usize;
        Report { kernel: &mut kernel, source, scratch, out, room, is_told: false }.write();
    }

    /// Says on the card that no more of it comes, because making it failed.
    pub fn abandon(&mut self) {
        self.text.add("(the rest is missing: the payload failed while it made this card)");
    }

    /// The card that was made: lines, an end of line of one byte after each, at most [`CARD_BLOCK`]
    /// bytes. Empty before.
    #[must_use]
    pub fn text(&self) -> &str {
        let bytes = self.text.bytes.get(..self.text.size).unwrap_or_default();
        core::str::from_utf8(bytes).unwrap_or_default()
    }
}

#[cfg(test)]
#[path = "card_tests.rs"]
pub(crate) mod tests;
