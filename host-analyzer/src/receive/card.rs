//! The crash card out of a log of a serial line.

use std::io;

use format::BLOCK;
use format::note::Notes;
use format::record;

use super::blocks::BlockSet;
use super::layout::CoreHead;
use super::receiver::{Event, Receiver, Store};
use super::text::ConsoleText;

/// What precedes the text on the payload's lines, but for those of the card.
const SPEAKER: &str = "tinykdump: ";
/// What the lines before and after the card say.
const BEGINS: &str = "crash card:";
const ENDS: &str = "end of the crash card";

/// Bytes of the head that are kept: registers of all CPUs, VMCOREINFO and the card fit.
const MAX_KEPT: u64 = 64 << 20;

/// The beginning of the core, in memory.
#[derive(Default)]
struct Beginning(Vec<u8>);

impl Store for Beginning {
    fn write(&mut self, first: u64, bytes: &[u8]) -> io::Result<()> {
        let at = first * BLOCK;
        let end = at + bytes.len() as u64;
        // No further than bytes that came: what is written far away is memory.
        if end <= MAX_KEPT.min(self.0.len() as u64 + MAX_AHEAD) {
            if self.0.len() < end as usize {
                self.0.resize(end as usize, 0);
            }
            self.0[at as usize..end as usize].copy_from_slice(bytes);
        }
        Ok(())
    }
}

/// How far blocks of the head may be ahead of those that came before, when some were lost.
const MAX_AHEAD: u64 = 1 << 20;

/// The first crash card in the bytes of a serial line: that of the dump if its head is there, else the one
/// that was printed; `None` when there is neither.
#[must_use]
pub fn card_of_log(log: &[u8]) -> Option<String> {
    let (mut receiver, mut head) = (Receiver::new(), Beginning::default());
    let (mut console, mut text) = (ConsoleText::default(), String::new());
    for &byte in log {
        // The store never fails.
        match receiver.push(byte, &mut head).ok()? {
            Some(Event::Text(bytes)) => text += &console.push(bytes),
            Some(Event::Damaged(_)) => text += &console.damaged(),
            _ => {}
        }
    }
    text += &console.flush();
    in_head(&receiver, &head.0).or_else(|| printed(&text))
}

/// The card in the head's notes.
fn in_head(receiver: &Receiver, bytes: &[u8]) -> Option<String> {
    let outline = receiver.outline()?;
    let present: &BlockSet = receiver.present();
    let head = CoreHead::read(
        outline.head_blocks * BLOCK,
        outline.core_blocks * BLOCK,
        &mut |at, into| {
            let there = usize::try_from(at).ok().and_then(|at| bytes.get(at..)?.get(..into.len()));
            there.map(|there| into.copy_from_slice(there)).is_some()
        },
    )?;
    let notes = head.notes(present);
    let notes = bytes.get(notes.start as usize..notes.end as usize)?;
    let note = Notes::new(notes)
        .find(|note| (note.name, note.kind) == (record::NAME, record::CARD_KIND))?;
    let card = std::str::from_utf8(note.desc).ok()?.trim_end_matches('\0');
    (!card.is_empty()).then(|| card.to_owned())
}

/// The card among the lines of the console.
fn printed(text: &str) -> Option<String> {
    let said = |line: &str| line.split_once(SPEAKER).map_or(line, |(_, said)| said).to_owned();
    let mut lines = text.lines().map(said);
    lines.find(|line| line == BEGINS)?;
    let mut card = String::new();
    // A card whose end did not come is as much of it as there is.
    for line in lines.take_while(|line| line != ENDS) {
        card += &line;
        card.push('\n');
    }
    (!card.is_empty()).then_some(card)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn printed_card_is_what_lies_between_its_marks() {
        let log = b"[   12.3] Kernel panic\r\n[    0.03] tinykdump: 64 MiB\r\n\
            [    0.033123] tinykdump: crash card:\r\nkernel   6.1.0\r\n\
\x20 frame\r\n[    0.034] tinykdump: end of the crash card\r\n\
            [    0.035] tinykdump: more\r\n";
        assert_eq!(card_of_log(log).as_deref(), Some("kernel   6.1.0\n  frame\n"));
        assert_eq!(card_of_log(b"login: \r\n"), None);
    }

    #[test]
    fn card_on_a_port_of_its_own_has_bare_marks_and_may_lack_its_end() {
        let whole = b"tinykdump 0.1\r\ncrash card:\r\nkernel   6.1.0\r\nend of the crash card\r\n";
        assert_eq!(card_of_log(whole).as_deref(), Some("kernel   6.1.0\n"));
        let cut = b"crash card:\r\nkernel   6.1.0\r\npan";
        assert_eq!(card_of_log(cut).as_deref(), Some("kernel   6.1.0\npan\n"));
    }
}
