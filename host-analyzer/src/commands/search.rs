//! `search`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::render::text;
use crate::source::Memory;
use crate::{Error, PhysAddr, VirtAddr};

use super::place::{hexadecimal, place};

/// Where in memory a value or a text is
///
/// Searches all physical memory in the dump for aligned 64-bit words, and shows each by its address in the
/// kernel's direct map (or the physical one, where it has none) with the word itself. A word is a number in
/// hexadecimal, or a symbol, whose address is searched for.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Search for texts instead of numbers, at any address
    #[arg(short = 'c', long)]
    pub text: bool,
    /// Bits that do not matter, in hexadecimal
    #[arg(short, long, value_name = "MASK", conflicts_with = "text")]
    pub mask: Option<String>,
    /// Search only from this virtual address on
    #[arg(short, long, value_name = "ADDRESS", requires = "end")]
    pub start: Option<String>,
    /// Search only up to this virtual address
    #[arg(short, long, value_name = "ADDRESS", requires = "start")]
    pub end: Option<String>,
    /// Show physical addresses
    #[arg(short, long)]
    pub physical: bool,
    /// Stop after so many
    #[arg(short = 'n', long, value_name = "COUNT")]
    pub most: Option<usize>,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Bytes that are searched at once; pieces overlap by the longest text.
const PIECE: usize = 1 << 20;
const MAX_TEXT: usize = 256;

enum Wanted {
    Words(Vec<(u64, u64)>),
    Texts(Vec<memchr::memmem::Finder<'static>>),
}

impl Wanted {
    fn new(linux: &Linux<'_, '_>, options: &Options, words: &[String]) -> Result<Wanted, Error> {
        if words.is_empty() {
            return Err(Error::Usage("search for what? Write a number or a symbol".to_owned()));
        }
        if options.text {
            if let Some(bad) = words.iter().find(|it| it.is_empty() || it.len() > MAX_TEXT) {
                return Err(Error::Usage(format!("texts have 1 to {MAX_TEXT} bytes: {bad:?}")));
            }
            let finder = |text: &String| memchr::memmem::Finder::new(text).into_owned();
            return Ok(Wanted::Texts(words.iter().map(finder).collect()));
        }
        let mask = match &options.mask {
            Some(text) => hexadecimal(text)
                .ok_or_else(|| Error::Usage(format!("{text} is no mask in hexadecimal")))?,
            None => 0,
        };
        let value = |word: &String| match hexadecimal(word) {
            Some(value) => Ok((value | mask, mask)),
            None => place(linux, word).map(|at| (at.0 | mask, mask)),
        };
        words.iter().map(value).collect::<Result<_, _>>().map(Wanted::Words)
    }

    /// Bytes by which pieces must overlap.
    fn overlap(&self) -> usize {
        match self {
            Wanted::Words(_) => 0,
            Wanted::Texts(texts) => texts.iter().map(|it| it.needle().len() - 1).max().unwrap_or(0),
        }
    }

    /// Offsets in `piece` of what is searched for, in ascending order, and what is there.
    fn find(&self, piece: &[u8]) -> Vec<(usize, String)> {
        match self {
            Wanted::Words(wanted) => {
                let words = piece.chunks_exact(8).enumerate();
                let hit = |(index, raw): (usize, &[u8])| {
                    let word = u64::from_le_bytes(raw.try_into().ok()?);
                    let is_it = wanted.iter().any(|&(value, mask)| word | mask == value);
                    is_it.then(|| (index * 8, format!("{word:016x}")))
                };
                words.filter_map(hit).collect()
            }
            Wanted::Texts(texts) => {
                let one = |finder: &memchr::memmem::Finder<'static>| -> Vec<_> {
                    let shown = |at: usize| {
                        let end = piece.len().min(at + 56);
                        (at, text::characters(&piece[at..end]))
                    };
                    finder.find_iter(piece).map(shown).collect()
                };
                let mut all: Vec<_> = texts.iter().flat_map(one).collect();
                all.sort_unstable();
                all
            }
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::NoPlace`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let wanted = Wanted::new(&linux, options, words)?;
    let mut found: Vec<(u64, String)> = Vec::new();
    let most = options.most.unwrap_or(usize::MAX);
    let mut take = |at: u64, shown: String| {
        let at = match options.physical || options.start.is_some() {
            true => at,
            false => linux.direct_map(PhysAddr(at)).map_or(at, |virt| virt.0),
        };
        if options.json {
            found.push((at, shown));
            return Ok(());
        }
        writeln!(out, "{at:016x}: {shown}")
    };
    match (&options.start, &options.end) {
        (Some(start), Some(end)) => {
            let (start, end) = (place(&linux, start)?, place(&linux, end)?);
            search_virtual(kernel, &wanted, start, end, most, &mut take)?;
        }
        _ => search_physical(kernel, &wanted, most, &mut take)?,
    }
    if options.json {
        let one =
            |(at, shown): &(u64, String)| json!({"address": format!("{at:#x}"), "found": shown});
        return text::json(&found.iter().map(one).collect(), out);
    }
    Ok(())
}

/// What is done with each place that was found.
type Take<'a> = &'a mut dyn FnMut(u64, String) -> std::io::Result<()>;

fn search_physical(
    kernel: &Kernel<'_>,
    wanted: &Wanted,
    mut most: usize,
    take: Take<'_>,
) -> Result<(), Error> {
    for range in kernel.dump().ranges() {
        let mut at = range.start;
        while at < range.end && most > 0 {
            let max = PIECE.min((range.end - at) as usize);
            let Ok(run) = kernel.dump().run(PhysAddr(at), max) else {
                at = (at / 4096 + 1) * 4096;
                continue;
            };
            for (offset, shown) in wanted.find(&run).into_iter().take(most) {
                most -= 1;
                take(at + offset as u64, shown)?;
            }
            at += advance(run.len(), wanted.overlap(), at + run.len() as u64 == range.end);
        }
    }
    Ok(())
}

fn search_virtual(
    kernel: &Kernel<'_>,
    wanted: &Wanted,
    start: VirtAddr,
    end: VirtAddr,
    mut most: usize,
    take: Take<'_>,
) -> Result<(), Error> {
    let mut at = start.0 / 8 * 8;
    while at < end.0 && most > 0 {
        let max = PIECE.min((end.0 - at) as usize);
        let run = kernel.memory().bytes_up_to(VirtAddr(at), max);
        if run.is_empty() {
            let Some(next) = behind_hole(kernel, VirtAddr(at)) else { break };
            at = next;
            continue;
        }
        for (offset, shown) in wanted.find(&run).into_iter().take(most) {
            most -= 1;
            take(at + offset as u64, shown)?;
        }
        let is_last = run.len() < max || at + run.len() as u64 >= end.0;
        at += advance(run.len(), wanted.overlap(), is_last);
    }
    Ok(())
}

/// The next address behind one that maps nothing, or leads to what is not in the dump: as far on as the
/// page tables tell.
fn behind_hole(kernel: &Kernel<'_>, at: VirtAddr) -> Option<u64> {
    let tables = kernel.memory().tables();
    let possible = tables.next_possible(at);
    if possible != at {
        return Some(possible.0);
    }
    let mut last = None;
    let found = tables.walk(kernel.memory().physical(), at, &mut |entry| last = Some(entry.level));
    let span = last.map_or(1 << 12, |level| tables.span(level));
    match found {
        Ok(mapping) => at.0.checked_add(mapping.length.min(1 << 12)),
        Err(_) => (at.0 / span + 1).checked_mul(span),
    }
}

/// How far to go on after a piece: what could begin at its end is looked at again.
fn advance(length: usize, overlap: usize, is_last: bool) -> u64 {
    let again = if is_last { 0 } else { overlap.min(length - 1) };
    (length - again) as u64
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn words_are_found_where_they_are_aligned_and_bits_that_do_not_matter_may_differ() {
        let wanted = Wanted::Words(vec![(0x1234 | 0xff, 0xff)]);
        let mut piece = vec![0; 32];
        piece[8..10].copy_from_slice(&[0x56, 0x12]);
        piece[17..19].copy_from_slice(&[0x56, 0x12]);
        assert_eq!(wanted.find(&piece), [(8, "0000000000001256".to_owned())]);
    }

    #[test]
    fn pieces_overlap_by_what_a_text_needs_and_nothing_is_found_twice() {
        let wanted = Wanted::Texts(vec![memchr::memmem::Finder::new("abc").into_owned()]);
        let bytes = b"xxabcxxxabc";
        let (mut at, mut hits) = (0, Vec::new());
        while at < bytes.len() {
            let piece = &bytes[at..bytes.len().min(at + 4)];
            hits.extend(wanted.find(piece).into_iter().map(|(offset, _)| at + offset));
            at += advance(piece.len(), wanted.overlap(), at + piece.len() == bytes.len()) as usize;
        }
        assert_eq!(hits, [2, 8]);
    }
}
