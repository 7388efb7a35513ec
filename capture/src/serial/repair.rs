//! What a receiver asks for, and how long it is listened to.

use format::BLOCK;
use format::frame::Run;

use crate::Machine;
use crate::card::Card;
use crate::dump::Error;

use super::places::Places;
use super::sender::Request;
use super::stream::Stream;

/// How long the end waits for somebody who was never heard, and for one who fell silent; and how long
/// for one who is heard but asks for nothing.
const STRANGER_US: u64 = 3_000_000;
const SILENT_US: u64 = 15_000_000;
const IDLE_US: u64 = 60_000_000;
/// How often the end is told meanwhile: it may get lost too.
const TELL_US: u64 = 1_000_000;
/// What is sent again at most, for each byte that was sent: one who asks for ever is no receiver.
pub(super) const AGAIN: u64 = 8;
/// Blocks after which the receiver's requests are looked at: what it lacks should not come much later
/// than what it has.
pub(super) const ANSWER_EVERY: u64 = 128;

impl Stream<'_> {
    /// Answers the receiver until it has everything or is not heard any more. Returns whether it said
    /// that it has.
    pub(super) fn repair(
        &mut self,
        machine: &mut dyn Machine,
        card: &mut Card,
        places: &Places,
        notes: &mut [u8],
    ) -> Result<bool, Error> {
        let begun = machine.now_us();
        let (mut asked, mut told) = (begun, begun);
        loop {
            self.sender.listen(machine);
            let now = machine.now_us();
            let silent = match self.sender.heard_us {
                Some(heard) => now.saturating_sub(heard.max(begun)) > SILENT_US,
                None => now - begun > STRANGER_US,
            };
            let is_enough = silent || self.is_spent() || machine.is_time_over();
            if is_enough || now.saturating_sub(asked) > IDLE_US {
                return Ok(false);
            }
            match self.sender.request.take() {
                None if now.saturating_sub(told) < TELL_US => continue,
                None => self.end(machine)?,
                Some(Request::Done) => return Ok(true),
                Some(request) => {
                    self.answer(machine, request, card, places, notes)?;
                    asked = machine.now_us();
                }
            }
            told = machine.now_us();
        }
    }

    /// Sends what was asked for, and the end.
    fn answer(
        &mut self,
        machine: &mut dyn Machine,
        request: Request,
        card: &mut Card,
        places: &Places,
        notes: &mut [u8],
    ) -> Result<(), Error> {
        if request == Request::Plans {
            self.again(|stream| stream.plans_again(machine, card, places, notes))?;
        } else {
            let runs = self.sender.frames.wanted.clone();
            let head = self.core.head_size / BLOCK;
            if runs.iter().any(|run| run.first() < head) {
                self.again(|stream| stream.head(machine, notes, card.text(), true, &runs))?;
            }
            self.send_again(machine, &runs)?;
        }
        self.again(|stream| stream.end(machine))
    }

    /// Sends memory again that the receiver lacks, unless it has asked for too much.
    pub(super) fn send_again(
        &mut self,
        machine: &mut dyn Machine,
        runs: &[Run],
    ) -> Result<(), Error> {
        let head = self.core.head_size / BLOCK;
        for run in runs {
            let (first, end) = (run.first().max(head), run.first() + run.count());
            if end > self.core.size / BLOCK {
                continue;
            }
            for (first, count) in pieces(first, end) {
                if self.is_spent() {
                    return Ok(());
                }
                let before = self.numbers;
                let sent = self.again(|stream| stream.send_blocks(machine, first, count));
                self.numbers = before;
                sent?;
            }
        }
        Ok(())
    }

    /// Whether more was sent again than a receiver can need.
    fn is_spent(&self) -> bool {
        self.wire_again / AGAIN > self.sender.wire_bytes - self.wire_again
    }

    /// Does what the receiver asked for, and counts what it costs.
    fn again(&mut self, send: impl FnOnce(&mut Self) -> Result<(), Error>) -> Result<(), Error> {
        let before = self.sender.wire_bytes;
        let sent = send(self);
        self.wire_again += self.sender.wire_bytes - before;
        sent
    }
}

/// The blocks from `first` to `end` in pieces of [`ANSWER_EVERY`] at most: first block and count.
pub(super) fn pieces(first: u64, end: u64) -> impl Iterator<Item = (u64, u64)> {
    let count = end.saturating_sub(first).div_ceil(ANSWER_EVERY);
    (0..count).map(move |index| {
        let at = first + index * ANSWER_EVERY;
        (at, (end - at).min(ANSWER_EVERY))
    })
}
