//! A pair of queues (4.1): commands go into the one, and come back through the other.

use crate::PhysAddr;
use crate::dma::{DmaBuffer, DmaPool};

use super::command::{COMMAND, Command};

/// Size of a completion in bytes (4.6).
const COMPLETION: usize = 16;

/// A command that came back.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Completed {
    /// The number of the queue that it went into, by the controller's word.
    pub queue: u16,
    /// Its number, likewise.
    pub id: u16,
    /// What became of it: 0 when it was done (4.6.1).
    pub status: u16,
    /// What the doorbell of completions is to be told.
    pub head: u16,
}

/// Both queues, with as many entries.
pub struct Pair<'a> {
    submissions: DmaBuffer<'a>,
    completions: DmaBuffer<'a>,
    entries: u16,
    tail: u16,
    head: u16,
    /// What the phase bit of a new completion is.
    phase: bool,
}

impl<'a> Pair<'a> {
    /// Queues of `entries`, at most a page of commands. `None` when the pool is used up.
    pub fn new(pool: &'a DmaPool, entries: u16) -> Option<Pair<'a>> {
        let submissions = pool.allocate(COMMAND * usize::from(entries))?;
        let completions = pool.allocate(COMPLETION * usize::from(entries))?;
        Some(Pair { submissions, completions, entries, tail: 0, head: 0, phase: true })
    }

    /// How many entries each has.
    pub fn entries(&self) -> u16 {
        self.entries
    }

    /// Where the queues are: submissions, completions.
    pub fn addresses(&self) -> (PhysAddr, PhysAddr) {
        (self.submissions.phys(0), self.completions.phys(0))
    }

    /// Puts a command into the queue, and returns what its doorbell is to be told. The controller sees the
    /// command before that.
    pub fn submit(&mut self, command: &Command) -> u16 {
        let at = usize::from(self.tail) * COMMAND;
        for (index, word) in command.words().iter().enumerate() {
            self.submissions.write(at + index * 4, *word);
        }
        self.tail = (self.tail + 1) % self.entries;
        self.submissions.order();
        self.tail
    }

    /// The next command that came back.
    pub fn completed(&mut self) -> Option<Completed> {
        let at = usize::from(self.head) * COMPLETION;
        let last: u32 = self.completions.read(at + 12);
        if (last >> 16 & 1 != 0) != self.phase {
            return None;
        }
        self.completions.order();
        let queue: u32 = self.completions.read(at + 8);
        self.head += 1;
        if self.head == self.entries {
            (self.head, self.phase) = (0, !self.phase);
        }
        // Without "do not retry" and "more".
        let status = (last >> 17) as u16 & 0x7ff;
        Some(Completed { queue: (queue >> 16) as u16, id: last as u16, status, head: self.head })
    }
}
