//! The kernel's symbol table where VMCOREINFO does not name it (before 6.0): known by its shape.
//!
//! The tables lie in the kernel's read-only data in this order (scripts/kallsyms.c, 4.20 to 5.19):
//! offsets, base, number of symbols, names, markers, tokens, index of the tokens, each aligned to eight
//! bytes. The index is looked for first: 256 ascending 16-bit offsets that end where it begins and before
//! each of which a token ends. Then the others are walked to, backwards.

use crate::{VirtAddr, bytes};

use super::image::Piece;

/// Where the parts of the table lie.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Place {
    /// `kallsyms_names`.
    pub names: VirtAddr,
    /// `kallsyms_token_table`.
    pub tokens: VirtAddr,
    /// `kallsyms_token_index`.
    pub index: VirtAddr,
    /// `kallsyms_num_syms`.
    pub count_at: VirtAddr,
    /// The number that is there.
    pub count: u32,
}

const ALIGN: usize = 8;
const TOKENS: usize = 256;
/// Names between two markers.
const STRIDE: usize = 256;
/// Bytes of a name at most: one of length, 127 tokens.
const MAX_NAME: usize = 128;
/// More bytes than all tokens have.
const MAX_TOKENS: usize = 16 << 10;

/// Looks for the table in the kernel's image.
#[must_use]
pub fn find(image: &[Piece<'_>]) -> Option<Place> {
    image.iter().find_map(|piece| {
        let at = |offset: usize| piece.start.offset(offset as u64);
        let aligned = (piece.start.0 as usize).wrapping_neg() % ALIGN;
        let starts = (aligned..piece.bytes.len()).step_by(ALIGN);
        starts.filter(|&start| is_index(&piece.bytes, start)).find_map(|index| {
            let tokens = tokens_before(&piece.bytes, index)?;
            let (names, count_at, count) = names_before(&piece.bytes, tokens)?;
            Some(Place {
                names: at(names),
                tokens: at(tokens),
                index: at(index),
                count_at: at(count_at),
                count,
            })
        })
    })
}

fn offset_of(bytes: &[u8], index: usize, token: usize) -> Option<usize> {
    bytes::u16_at(bytes, index + token * 2).map(usize::from)
}

/// Whether 256 offsets that can be those of tokens lie at `start`: from 0 on, each further than the one
/// before.
fn is_index(bytes: &[u8], start: usize) -> bool {
    if bytes.get(start..start + 2) != Some(&[0, 0]) {
        return false;
    }
    let mut before = 0;
    (1..TOKENS).all(|token| {
        let here = offset_of(bytes, start, token).unwrap_or(0);
        let ascends = here > before && here - before <= MAX_NAME;
        before = here;
        ascends
    })
}

/// Where the tokens begin whose index lies at `index`: each ends with a zero right before the next one.
fn tokens_before(bytes: &[u8], index: usize) -> Option<usize> {
    let last = offset_of(bytes, index, TOKENS - 1)?;
    let nearest = index.checked_sub(last + 1)?;
    let furthest = nearest.saturating_sub(MAX_NAME + ALIGN);
    let aligned = |start: &usize| index.wrapping_sub(*start).is_multiple_of(ALIGN);
    let candidates = (furthest..=nearest).rev().filter(aligned);
    candidates.filter(|_| last < MAX_TOKENS).into_iter().find(|&start| {
        (0..TOKENS).all(|token| {
            let from = offset_of(bytes, index, token).unwrap_or(0);
            let end = match token + 1 {
                TOKENS => memchr::memchr(0, &bytes[start + from..index]).map(|it| from + it),
                next => offset_of(bytes, index, next).map(|next| next - 1),
            };
            let Some(text) = end.and_then(|end| bytes.get(start + from..=start + end)) else {
                return false;
            };
            text.split_last().is_some_and(|(&zero, text)| zero == 0 && !text.contains(&0))
        })
    })
}

/// Where the names begin that lie before the tokens, where their number lies, and that number.
fn names_before(bytes: &[u8], tokens: usize) -> Option<(usize, usize, u32)> {
    // The markers may be padded.
    let markers =
        [tokens, tokens.checked_sub(4)?].into_iter().find_map(|end| markers(bytes, end))?;
    let (start, marks) = markers;
    let last = *marks.last()?;
    // Behind the last marker come at most so many names.
    let nearest = start.checked_sub(last)?;
    let furthest = nearest.saturating_sub(STRIDE * MAX_NAME + ALIGN);
    let fits = |names: &usize| {
        let count = bytes::u32_at(bytes, names.wrapping_sub(ALIGN)).unwrap_or(0) as usize;
        let first = marks.get(1).copied();
        count.div_ceil(STRIDE) == marks.len() && skip(bytes, *names, STRIDE) == first
    };
    let aligned = |names: &usize| start.wrapping_sub(*names).is_multiple_of(ALIGN);
    let names = (furthest..=nearest).filter(aligned).find(fits)?;
    Some((names, names - ALIGN, bytes::u32_at(bytes, names - ALIGN)?))
}

/// The markers that end at `end`, and where they begin: offsets of every 256th name, from 0 on.
fn markers(bytes: &[u8], end: usize) -> Option<(usize, Vec<usize>)> {
    /// More than 4 million symbols.
    const MOST: usize = 1 << 14;
    let mut marks = Vec::new();
    let mut at = end;
    let mut above = None;
    while marks.len() < MOST {
        at = at.checked_sub(4)?;
        let mark = bytes::u32_at(bytes, at)? as usize;
        let step = above.map(|above: usize| above.checked_sub(mark));
        if step
            .is_some_and(|step| !step.is_some_and(|it| (STRIDE..=STRIDE * MAX_NAME).contains(&it)))
        {
            return None;
        }
        marks.push(mark);
        if mark == 0 {
            marks.reverse();
            // A kernel has thousands of symbols.
            return (marks.len() > 4).then_some((at, marks));
        }
        above = Some(mark);
    }
    None
}

/// The offset behind `count` names, from the first of them at `names` on.
fn skip(bytes: &[u8], names: usize, count: usize) -> Option<usize> {
    let mut at = names;
    for _ in 0..count {
        at += 1 + usize::from(*bytes.get(at)?);
    }
    Some(at - names)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const START: VirtAddr = VirtAddr(0xffff_ffff_8200_0000);

    /// An image with a table of `count` names of three tokens each, `before` bytes into it.
    fn image(before: usize, count: usize) -> (Vec<u8>, [usize; 4]) {
        let mut bytes = vec![0x5a; before];
        let align = |bytes: &mut Vec<u8>| bytes.resize(bytes.len().next_multiple_of(ALIGN), 0);
        align(&mut bytes);
        let count_at = bytes.len();
        bytes.extend_from_slice(&(count as u64).to_le_bytes());
        let (names, mut marks) = (bytes.len(), Vec::new());
        for name in 0..count {
            if name % STRIDE == 0 {
                marks.push((bytes.len() - names) as u32);
            }
            bytes.extend_from_slice(&[3, 1, name as u8, 9]);
        }
        align(&mut bytes);
        bytes.extend(marks.iter().flat_map(|mark| mark.to_le_bytes()));
        align(&mut bytes);
        let (tokens, mut offsets) = (bytes.len(), Vec::new());
        for token in 0..TOKENS {
            offsets.push((bytes.len() - tokens) as u16);
            bytes.extend(std::iter::repeat_n(b'a' + (token % 26) as u8, token % 5));
            bytes.push(0);
        }
        align(&mut bytes);
        let index = bytes.len();
        bytes.extend(offsets.iter().flat_map(|offset| offset.to_le_bytes()));
        bytes.extend_from_slice(&[0x5a; 100]);
        (bytes, [count_at, names, tokens, index])
    }

    fn found(bytes: &[u8]) -> Option<Place> {
        find(&[Piece { start: START, bytes: bytes.into() }])
    }

    #[test]
    fn table_is_found_wherever_it_lies_and_however_many_names_it_has() {
        for (before, count) in [(0, 1280), (4001, 2000), (64, 1281), (8, 3000)] {
            let (bytes, [count_at, names, tokens, index]) = image(before, count);
            let at = |offset: usize| START.offset(offset as u64);
            let expected = Place {
                names: at(names),
                tokens: at(tokens),
                index: at(index),
                count_at: at(count_at),
                count: count as u32,
            };
            assert_eq!(found(&bytes), Some(expected), "{before} {count}");
        }
    }

    #[test]
    fn what_only_looks_like_a_table_at_its_end_is_none() {
        let (mut bytes, [count_at, _, tokens, _]) = image(64, 2000);
        let mut damaged = bytes.clone();
        damaged[count_at] = 1;
        damaged[count_at + 1] = 0;
        assert_eq!(found(&damaged), None);
        bytes[tokens + 8] = 0;
        assert_eq!(found(&bytes), None);
        assert_eq!(found(&[0; 4096]), None);
    }

    proptest! {
        #[test]
        fn damage_never_panics(at in 0usize..13_000, value: u8, cut in 0usize..13_000) {
            let (mut bytes, _) = image(64, 2000);
            let at = at.min(bytes.len() - 1);
            bytes[at] = value;
            bytes.truncate(bytes.len() - cut.min(bytes.len()));
            let _ = found(&bytes);
        }
    }
}
