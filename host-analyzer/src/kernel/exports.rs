//! The kernel's table of exports: the symbols that modules may use.
//!
//! struct kernel_symbol (include/linux/export-internal.h; kernel/module/internal.h, 6.1): three
//! 32-bit words, each relative to its own place: value, name, namespace. The table is found by an
//! entry whose value VMCOREINFO knows (`init_uts_ns` is exported), and read from there in both
//! directions.

use std::collections::HashMap;

use crate::{VirtAddr, bytes};

use super::image::Piece;

/// Size of struct kernel_symbol.
const ENTRY: usize = 12;
/// Longest name of a symbol (KSYM_NAME_LEN).
const NAME: usize = 512;
/// Entries of another kind (padding between the tables of EXPORT_SYMBOL and EXPORT_SYMBOL_GPL) are
/// skipped, this many 32-bit words of them.
const GAP: usize = 16;

/// Reads the table out of the image. `known` are addresses and names of symbols, some of which are
/// exported. Empty when none of them is.
pub(super) fn find(
    image: &[Piece<'_>],
    known: &HashMap<VirtAddr, &str>,
) -> HashMap<String, VirtAddr> {
    let table = image.iter().find_map(|piece| Some((piece, anchor(piece, image, known)?)));
    let Some((piece, anchor)) = table else { return HashMap::new() };
    let mut found = HashMap::new();
    let forward = |at: usize| at.checked_add(4);
    let backward = |at: usize| at.checked_sub(4);
    collect(piece, image, anchor, &forward, &mut found);
    collect(piece, image, anchor, &backward, &mut found);
    found
}

/// Reads entries from `at` on; `next` steps by a word.
fn collect(
    piece: &Piece<'_>,
    image: &[Piece<'_>],
    at: usize,
    next: &dyn Fn(usize) -> Option<usize>,
    found: &mut HashMap<String, VirtAddr>,
) {
    let mut at = at;
    let mut gap = 0;
    while gap <= GAP {
        let words = match entry(piece, image, at) {
            Some((name, value)) => {
                found.entry(name).or_insert(value);
                gap = 0;
                ENTRY / 4
            }
            None => {
                gap += 1;
                1
            }
        };
        let step = (0..words).try_fold(at, |at, _| next(at));
        let Some(step) = step.filter(|&step| step < piece.bytes.len()) else { return };
        at = step;
    }
}

/// Where in `piece` an entry lies whose value and name are both known.
fn anchor(
    piece: &Piece<'_>,
    image: &[Piece<'_>],
    known: &HashMap<VirtAddr, &str>,
) -> Option<usize> {
    // Every word of the image is looked up, and there are few to look among.
    let mut sorted: Vec<(VirtAddr, &str)> = known.iter().map(|(&at, &name)| (at, name)).collect();
    sorted.sort_unstable();
    let name_of = |value: VirtAddr| {
        let index = sorted.binary_search_by_key(&value, |&(at, _)| at).ok()?;
        Some(sorted[index].1)
    };
    (0..piece.bytes.len() / 4).map(|index| index * 4).find(|&at| {
        let name = relative(piece, at).and_then(name_of);
        name.is_some_and(|name| entry(piece, image, at).is_some_and(|(it, _)| it == name))
    })
}

/// Name and value of the entry at `at`.
fn entry(piece: &Piece<'_>, image: &[Piece<'_>], at: usize) -> Option<(String, VirtAddr)> {
    Some((name(image, relative(piece, at + 4)?)?, relative(piece, at)?))
}

fn relative(piece: &Piece<'_>, at: usize) -> Option<VirtAddr> {
    let distance = bytes::i32_at(&piece.bytes, at)?;
    Some(piece.start.offset(at as u64).offset(i64::from(distance) as u64))
}

/// The text at `at` if it can be the name of a symbol.
fn name(image: &[Piece<'_>], at: VirtAddr) -> Option<String> {
    let inside = |piece: &&Piece<'_>| at.0.wrapping_sub(piece.start.0) < piece.bytes.len() as u64;
    let piece = image.iter().find(inside)?;
    let rest = piece.bytes.get((at.0 - piece.start.0) as usize..)?;
    let length = memchr::memchr(0, &rest[..rest.len().min(NAME)])?;
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$');
    let name = rest.get(..length).filter(|name| !name.is_empty() && name.iter().all(allowed))?;
    std::str::from_utf8(name).ok().map(str::to_owned)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BASE: u64 = 0xffff_8000_0801_0000;

    /// An image with names at 0x100, and a table of entries at each of the places given.
    fn image(tables: &[(usize, &[(&str, u64)])]) -> Vec<u8> {
        let mut image = vec![0; 0x1000];
        let mut text = 0x100;
        for (start, entries) in tables {
            for (index, (name, value)) in entries.iter().enumerate() {
                image[text..text + name.len()].copy_from_slice(name.as_bytes());
                let at = start + index * ENTRY;
                let value = value.wrapping_sub(BASE + at as u64) as i32;
                image[at..at + 4].copy_from_slice(&value.to_le_bytes());
                let name_at = text as i32 - (at as i32 + 4);
                image[at + 4..at + 8].copy_from_slice(&name_at.to_le_bytes());
                text += name.len() + 1;
            }
        }
        image
    }

    fn found(image: &[u8]) -> HashMap<String, VirtAddr> {
        let piece = Piece { start: VirtAddr(BASE), bytes: image.into() };
        find(&[piece], &HashMap::from([(VirtAddr(BASE + 0x900), "init_uts_ns")]))
    }

    #[test]
    fn table_is_found_by_an_entry_whose_address_is_known() {
        let first = [("avenrun", BASE + 0x800), ("init_task", BASE + 0x808)];
        let second = [("init_pid_ns", BASE + 0x810), ("init_uts_ns", BASE + 0x900)];
        // Some words lie between the two tables.
        let exports = found(&image(&[(0x400, &first), (0x420, &second)]));
        assert_eq!(exports.len(), 4);
        assert_eq!(exports["init_task"], VirtAddr(BASE + 0x808));
        assert_eq!(exports["init_pid_ns"], VirtAddr(BASE + 0x810));
    }

    #[test]
    fn pointer_to_a_known_place_is_no_entry_without_its_name() {
        let entries = [("init_uts", BASE + 0x900), ("init_task", BASE + 0x808)];
        assert!(found(&image(&[(0x400, &entries)])).is_empty());
    }

    #[test]
    fn table_at_the_very_edge_of_memory_ends_there() {
        let exports = found(&image(&[(0x1000 - ENTRY, &[("init_uts_ns", BASE + 0x900)])]));
        assert_eq!(exports.len(), 1);
        assert!(found(&[0xff; 7]).is_empty());
    }
}
