//! The crash card, read back from what the payload printed.

use std::collections::BTreeMap;

use anyhow::{Context, Result, bail};

use crate::trace::Frame;

/// The parts of a card that a test compares.
#[derive(Debug, Default, PartialEq, Eq)]
pub struct Card {
    /// The lines of its head by their first word: `kernel`, `panic`, `cause`, `time`, `task`, `taint`.
    pub head: BTreeMap<String, String>,
    /// The innermost frames of the CPU that crashed.
    pub first: Vec<Frame>,
    /// How many frames the card leaves out behind these.
    pub left_out: usize,
    /// The outermost frames behind those.
    pub last: Vec<Frame>,
    /// Its registers.
    pub registers: BTreeMap<String, u64>,
    /// The end of the kernel's log.
    pub log: Vec<String>,
}

impl Card {
    /// Reads a card from the lines that the payload printed, its prefix cut off.
    ///
    /// # Errors
    /// When a part is missing, is there twice, or a line of the trace is no frame.
    pub fn read(lines: &[&str]) -> Result<Card> {
        let mut card = Card::default();
        let at = |header: &str| {
            let found = lines.iter().position(|line| line.starts_with(header));
            found.with_context(|| format!("no {header:?} in {lines:#?}"))
        };
        let (trace, registers) = (at("call trace of CPU ")?, at("registers of CPU ")?);
        let start = at("kernel   ")?;
        for line in &lines[start..trace] {
            let (name, rest) = line.split_once(' ').with_context(|| format!("{line:?}"))?;
            if card.head.insert(name.to_owned(), rest.trim_start().to_owned()).is_some() {
                bail!("{name:?} is there twice in {lines:#?}");
            }
        }
        for line in &lines[trace + 1..registers] {
            card.read_frame(line.trim())?;
        }
        let indented = |from: usize| lines[from + 1..].iter().take_while(|it| it.starts_with("  "));
        for line in indented(registers) {
            let words: Vec<&str> = line.split_whitespace().collect();
            let (pairs, _) = words.as_chunks::<2>();
            for [name, value] in pairs {
                card.registers.insert((*name).to_owned(), u64::from_str_radix(value, 16)?);
            }
        }
        let log = lines[at("log, its end")? + 1..].iter().take_while(|line| line.starts_with('['));
        card.log = log.map(|line| line.trim_end().to_owned()).collect();
        Ok(card)
    }

    fn read_frame(&mut self, line: &str) -> Result<()> {
        if let Some(note) = line.strip_prefix('(') {
            if let Some(count) = note.strip_suffix(" frames left out)") {
                self.left_out = count.parse()?;
            }
            return Ok(());
        }
        let frame = Frame::at(line).or_else(|| {
            let address = line.strip_prefix("0x")?.split_whitespace().next()?;
            Some(Frame {
                function: line.to_owned(),
                module: None,
                offset: None,
                address: Some(u64::from_str_radix(address, 16).ok()?),
                inlined: false,
            })
        });
        let frame = frame.with_context(|| format!("not a frame: {line:?}"))?;
        let frames = if self.left_out == 0 { &mut self.first } else { &mut self.last };
        frames.push(frame);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::trace::listing;

    #[test]
    fn parts_of_a_card_are_told_apart() {
        let lines = [
            "kernel 6.1, 252 MiB of memory",
            "kernel   6.1",
            "task     CPU 1, PID 0, command \"swapper/1\"",
            "call trace of CPU 1",
            "  inner+0xa/0x20 [crash]  (interrupted)",
            "  (109 frames left out)",
            "  0xffffcd08d8092010 (no symbol)",
            "  (entered from user mode)",
            "registers of CPU 1",
            "  rip 00000000000000ff  rsp 0000000000000001",
            "log, its end",
            "[    3.2] guest: crashing",
            "CPU 0: PID 0",
            "registers of CPU 0",
            "  rip 0000000000000002",
        ];
        let card = Card::read(&lines).unwrap();
        assert_eq!(card.head["kernel"], "6.1");
        assert_eq!(listing(&card.first), ["inner+0xa [crash]"]);
        assert_eq!((card.left_out, card.last[0].address), (109, Some(0xffff_cd08_d809_2010)));
        assert_eq!(card.registers["rip"], 0xff);
        assert_eq!(card.log, ["[    3.2] guest: crashing"]);
    }
}
