//! The kernel's own symbol table, read out of its memory.
//!
//! scripts/kallsyms.c and kernel/kallsyms.c, 5.10 to 7.0: names are sequences of tokens (one length
//! byte, from 6.1 on two when bit 7 of the first is set); the first character of an expanded name
//! is the symbol's type. Addresses are kept in one of four encodings, told apart by which of them
//! yields the known address of `_stext`.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;

use crate::{VirtAddr, bytes};

use super::sparse::Sparse;

/// How addresses are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Encoding {
    /// 64-bit addresses (CONFIG_KALLSYMS_BASE_RELATIVE off, to 6.10).
    Absolute,
    /// 32-bit offsets from a base.
    BaseRelative(u64),
    /// As before, but a value that is not negative is itself an absolute address (a per-CPU
    /// symbol), and a negative one means `base - 1 - value` (x86_64, 4.6 to 6.14).
    AbsolutePercpu(u64),
    /// 32-bit offsets from the place they are stored at (7.0 on).
    PlaceRelative(VirtAddr),
}

/// The tables, as they lie in memory.
pub struct Tables<'a> {
    /// Offsets or addresses, one for each symbol, in ascending order of address.
    pub addresses: Sparse<'a>,
    /// How they are to be read.
    pub encoding: Encoding,
    /// Compressed names, in the same order.
    pub names: Sparse<'a>,
    /// Number of symbols.
    pub count: usize,
    /// Zero-terminated texts of the tokens.
    pub token_table: Cow<'a, [u8]>,
    /// 256 16-bit offsets into them.
    pub token_index: Cow<'a, [u8]>,
}

/// A symbol table. Names are expanded only when they are needed.
pub struct Kallsyms<'a> {
    tables: Tables<'a>,
    tokens: Vec<(usize, usize)>,
    /// Offset of every [`STRIDE`]th name: the kernel's own `kallsyms_markers`, or by counting.
    marks: OnceCell<Vec<u32>>,
}

/// Names between two marks.
const STRIDE: usize = 256;

impl<'a> Kallsyms<'a> {
    /// A symbol table on `tables`; `None` when the token tables make no sense.
    #[must_use]
    pub fn new(tables: Tables<'a>) -> Option<Kallsyms<'a>> {
        let token = |index: usize| {
            let start = usize::from(bytes::u16_at(&tables.token_index, index * 2)?);
            let length = memchr::memchr(0, tables.token_table.get(start..)?)?;
            Some((start, start + length))
        };
        let tokens = (0..256).map(token).collect::<Option<Vec<_>>>()?;
        Some(Kallsyms { tables, tokens, marks: OnceCell::new() })
    }

    /// Number of symbols.
    #[must_use]
    pub fn len(&self) -> usize {
        self.tables.count
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// The address of symbol `index`.
    #[must_use]
    pub fn address(&self, index: usize) -> Option<VirtAddr> {
        if index >= self.len() {
            return None;
        }
        decode_address(&self.tables.addresses, self.tables.encoding, index)
    }

    /// The symbol that `at` lies in: its index and the address after it. Of several symbols at one
    /// address the first counts, as for the kernel itself.
    #[must_use]
    pub fn covering(&self, at: VirtAddr) -> Option<(usize, VirtAddr)> {
        let above = self.partition(|address| address <= at)?;
        let start = self.address(above.checked_sub(1)?)?;
        let first = self.partition(|address| address < start)?;
        let end = self.address(above).unwrap_or(VirtAddr(u64::MAX));
        Some((first, end))
    }

    /// The type character and name of symbol `index`.
    #[must_use]
    pub fn name(&self, index: usize) -> Option<(char, String)> {
        let marks = self.marks.get_or_init(|| self.mark_names());
        let mut at = *marks.get(index / STRIDE)? as usize;
        for _ in 0..index % STRIDE {
            at = self.split(at)?.1;
        }
        self.expand(self.split(at)?.0)
    }

    /// The type character and name that tokens spell.
    fn expand(&self, tokens: &[u8]) -> Option<(char, String)> {
        let mut expanded = Vec::new();
        for &token in tokens {
            expanded.extend_from_slice(self.token(token));
        }
        let (&kind, name) = expanded.split_first()?;
        Some((char::from(kind), String::from_utf8_lossy(name).into_owned()))
    }

    /// Calls `with` with the type character, name and address of every symbol that is there.
    pub fn each(&self, with: &mut dyn FnMut(char, &str, VirtAddr)) {
        self.each_tokens(&mut |index, tokens| {
            if let (Some((kind, name)), Some(at)) = (self.expand(tokens), self.address(index)) {
                with(kind, &name, at);
            }
        });
    }

    /// Calls `with` with the number and the tokens of every name, in one pass over all of them.
    fn each_tokens(&self, with: &mut dyn FnMut(usize, &[u8])) {
        let marks = self.marks.get_or_init(|| self.mark_names());
        let mut at = Some(0);
        for index in 0..self.len() {
            if index % STRIDE == 0 {
                at = marks.get(index / STRIDE).map(|&mark| mark as usize);
            }
            // A name that makes no sense costs those up to the next mark.
            let split = at.and_then(|at| self.split(at));
            at = split.map(|(_, next)| next);
            if let Some((tokens, _)) = split {
                with(index, tokens);
            }
        }
    }

    /// Finds the first symbol of each name in one pass over all names.
    #[must_use]
    pub fn find(&self, names: &[&str]) -> HashMap<String, VirtAddr> {
        let mut found = HashMap::new();
        let promising = self.promising_tokens(names);
        self.each_tokens(&mut |index, tokens| {
            let begins = tokens.first().is_some_and(|&first| promising[usize::from(first)]);
            let spelled = || names.iter().find(|name| self.spells(tokens, name.as_bytes()));
            let hit = if begins { spelled() } else { None };
            if let (Some(name), Some(address)) = (hit, self.address(index)) {
                found.entry((*name).to_owned()).or_insert(address);
            }
        });
        found
    }

    /// Which tokens can be the first of one of `names`.
    fn promising_tokens(&self, names: &[&str]) -> [bool; 256] {
        let mut promising = [false; 256];
        for (token, flag) in (0..=255u8).zip(&mut promising) {
            let text = self.token(token).get(1..).unwrap_or_default();
            *flag = names.iter().any(|name| name.as_bytes().starts_with(text));
        }
        promising
    }

    /// Whether the tokens spell a type character and then `name`.
    fn spells(&self, tokens: &[u8], name: &[u8]) -> bool {
        let mut rest = name;
        let mut skip = 1;
        for &token in tokens {
            let text = self.token(token).get(skip..).unwrap_or_default();
            let Some(after) = rest.strip_prefix(text) else { return false };
            (rest, skip) = (after, 0);
        }
        rest.is_empty()
    }

    fn token(&self, token: u8) -> &[u8] {
        let (start, end) = self.tokens[usize::from(token)];
        &self.tables.token_table[start..end]
    }

    /// The tokens of the name at `at`, and where the next name begins.
    fn split(&self, at: usize) -> Option<(&[u8], usize)> {
        let names = &self.tables.names;
        let byte = |at: usize| names.get(at..at.checked_add(1)?).map(|raw| usize::from(raw[0]));
        let first = byte(at)?;
        let (length, start) = if first & 0x80 == 0 {
            (first, at + 1)
        } else {
            ((first & 0x7f) | byte(at + 1)? << 7, at + 2)
        };
        Some((names.get(start..start + length)?, start + length))
    }

    fn mark_names(&self) -> Vec<u32> {
        self.markers().unwrap_or_else(|| self.count_names())
    }

    /// Finds `kallsyms_markers`, which VMCOREINFO does not name: 32-bit offsets that follow the
    /// names, aligned, before the next table (scripts/kallsyms.c, 4.20 on). They are looked for
    /// from the end by their shape: a zero, then offsets each some 256 names further on.
    fn markers(&self) -> Option<Vec<u32>> {
        const ALIGN: usize = 4;
        let names = self.tables.names.filled();
        let count = self.len().div_ceil(STRIDE);
        if count < 2 {
            return None;
        }
        let last = names.len().checked_sub(count * 4)?;
        let mark = |at: usize, index: usize| bytes::u32_at(names, at + index * 4);
        let plausible = |&at: &usize| {
            let ascends = |index: usize| {
                let step = mark(at, index)?.checked_sub(mark(at, index - 1)?)? as usize;
                Some((STRIDE * 2..=STRIDE * 128).contains(&step))
            };
            // Damage may have hit the markers too: most of them must make sense.
            let good = || (1..count).filter(|&index| ascends(index) == Some(true)).count();
            let begins =
                mark(at, 0) == Some(0) && (1..count.min(4)).any(|it| ascends(it) == Some(true));
            begins && good() >= count - 1 - count / 8
        };
        let at = (0..=last / ALIGN).rev().map(|step| step * ALIGN).find(plausible)?;
        (0..count).map(|index| mark(at, index)).collect()
    }

    fn count_names(&self) -> Vec<u32> {
        let mut marks = Vec::with_capacity(self.len().div_ceil(STRIDE).min(1 << 20));
        let mut at = 0;
        for index in 0..self.len() {
            if index % STRIDE == 0 {
                marks.push(at as u32);
            }
            let Some((_, next)) = self.split(at) else { break };
            at = next;
        }
        marks
    }

    /// The number of symbols, from the first on, whose address satisfies `below`; `None` when that is
    /// hidden by what is missing of the table.
    fn partition(&self, below: impl Fn(VirtAddr) -> bool) -> Option<usize> {
        let Tables { addresses, encoding, .. } = &self.tables;
        let count = self.len().min(addresses.len() / encoding.size());
        addresses.partition(count, encoding.size(), |index| self.address(index).map(&below))
    }

    /// Whether all of it is in the dump.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.tables.addresses.is_whole() && self.tables.names.is_whole()
    }
}

impl Encoding {
    /// Size of an address in the table, in bytes.
    #[must_use]
    pub fn size(self) -> usize {
        if self == Encoding::Absolute { 8 } else { 4 }
    }
}

fn decode_address(table: &Sparse<'_>, encoding: Encoding, index: usize) -> Option<VirtAddr> {
    let at = index.checked_mul(encoding.size())?;
    let raw = table.get(at..at.checked_add(encoding.size())?)?;
    let word = || bytes::u32_at(raw, 0);
    let address = match encoding {
        Encoding::Absolute => bytes::u64_at(raw, 0)?,
        Encoding::BaseRelative(base) => base.wrapping_add(u64::from(word()?)),
        Encoding::AbsolutePercpu(base) => match word()? as i32 {
            value @ 0.. => value as u64,
            value => base.wrapping_sub(1).wrapping_sub(i64::from(value) as u64),
        },
        Encoding::PlaceRelative(place) => {
            let here = place.offset(index as u64 * 4);
            here.offset(i64::from(word()? as i32) as u64).0
        }
    };
    Some(VirtAddr(address))
}

/// Whether a table of `count` addresses in this encoding has `wanted` in it.
#[must_use]
pub fn holds(table: &Sparse<'_>, encoding: Encoding, count: usize, wanted: VirtAddr) -> bool {
    (0..count).any(|index| decode_address(table, encoding, index) == Some(wanted))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const BASE: u64 = 0xffff_ffff_8100_0000;

    /// Four symbols at offsets 0, 0x10, 0x10 and 0x40 from the base. Token 1 is "tvfs_", 2 "read",
    /// 3 "write", 4 "Tpanic"; all others are their own character.
    fn tables(encoding: Encoding, addresses: Vec<u8>) -> Tables<'static> {
        let mut token_table = Vec::new();
        let mut token_index = Vec::new();
        for token in 0..=255u8 {
            token_index.extend_from_slice(&(token_table.len() as u16).to_le_bytes());
            match token {
                1 => token_table.extend_from_slice(b"tvfs_"),
                2 => token_table.extend_from_slice(b"read"),
                3 => token_table.extend_from_slice(b"write"),
                4 => token_table.extend_from_slice(b"Tpanic"),
                0 => {}
                other => token_table.push(other),
            }
            token_table.push(0);
        }
        let long = [&[0x80 | 2, 1, b'T'][..], &[b'x'; 129]].concat();
        let names = [&[1, 4][..], &[2, 1, 2], &[2, 1, 3], &long].concat();
        Tables {
            addresses: Sparse::whole(addresses),
            encoding,
            names: Sparse::whole(names),
            count: 4,
            token_table: token_table.into(),
            token_index: token_index.into(),
        }
    }

    fn words(values: [i32; 4]) -> Vec<u8> {
        values.iter().flat_map(|value| value.to_le_bytes()).collect()
    }

    fn relative() -> Kallsyms<'static> {
        Kallsyms::new(tables(Encoding::BaseRelative(BASE), words([0, 0x10, 0x10, 0x40]))).unwrap()
    }

    #[test]
    fn names_are_expanded_from_tokens() {
        let symbols = relative();
        assert_eq!(symbols.name(0), Some(('T', "panic".to_owned())));
        assert_eq!(symbols.name(2), Some(('t', "vfs_write".to_owned())));
        assert_eq!(symbols.name(4), None);
    }

    #[test]
    fn long_names_have_two_length_bytes() {
        assert_eq!(relative().name(3), Some(('T', "x".repeat(129))));
    }

    #[test]
    fn names_behind_damage_are_found_by_the_markers() {
        // Three blocks of names "Ta", each two tokens long; the markers follow.
        let mut tables = tables(Encoding::BaseRelative(BASE), vec![0; 4 * 3 * STRIDE]);
        let mut names = [2, b'T', b'a'].repeat(3 * STRIDE);
        names.truncate(names.len() - 3);
        names.extend_from_slice(&[2, b'T', b'z', 0]);
        names.resize(names.len().next_multiple_of(8), 0);
        for block in 0..3u32 {
            names.extend_from_slice(&(block * 3 * STRIDE as u32).to_le_bytes());
        }
        names[30] = 0x7f;
        tables.names = Sparse::whole(names);
        tables.count = 3 * STRIDE;
        let symbols = Kallsyms::new(tables).unwrap();
        assert_eq!(symbols.name(STRIDE), Some(('T', "a".to_owned())));
        assert!(symbols.find(&["z"]).contains_key("z"));
    }

    #[test]
    fn every_encoding_yields_the_same_addresses() {
        let place = VirtAddr(BASE + 0x1000);
        let absolute = [0, 0x10, 0x10, 0x40].map(|offset: u64| (BASE + offset).to_le_bytes());
        let from_place = [0, 0x10, 0x10, 0x40].map(|offset: i32| offset - 0x1000);
        let from_place: Vec<i32> =
            from_place.iter().enumerate().map(|(index, it)| it - index as i32 * 4).collect();
        let encodings = [
            (Encoding::Absolute, absolute.concat()),
            (Encoding::BaseRelative(BASE), words([0, 0x10, 0x10, 0x40])),
            (Encoding::AbsolutePercpu(BASE), words([-1, -0x11, -0x11, -0x41])),
            (Encoding::PlaceRelative(place), words(from_place.try_into().unwrap())),
        ];
        for (encoding, addresses) in encodings {
            assert!(
                holds(&Sparse::whole(addresses.clone()), encoding, 4, VirtAddr(BASE + 0x40)),
                "{encoding:?}"
            );
            let symbols = Kallsyms::new(tables(encoding, addresses)).unwrap();
            let all: Vec<_> =
                (0..4).map(|index| symbols.address(index).unwrap().0 - BASE).collect();
            assert_eq!(all, [0, 0x10, 0x10, 0x40], "{encoding:?}");
        }
    }

    #[test]
    fn per_cpu_symbols_keep_their_small_addresses() {
        let tables = tables(Encoding::AbsolutePercpu(BASE), words([0, 0x1fb80, -1, -2]));
        let symbols = Kallsyms::new(tables).unwrap();
        assert_eq!(symbols.address(1), Some(VirtAddr(0x1fb80)));
        assert_eq!(symbols.address(2), Some(VirtAddr(BASE)));
    }

    #[test]
    fn first_of_several_symbols_at_an_address_names_it() {
        let symbols = relative();
        assert_eq!(symbols.covering(VirtAddr(BASE + 0x3f)), Some((1, VirtAddr(BASE + 0x40))));
        assert_eq!(symbols.covering(VirtAddr(BASE - 1)), None);
    }

    #[test]
    fn names_are_found_in_one_pass_and_prefixes_are_no_matches() {
        let found = relative().find(&["vfs_write", "pan", "panic", "vfs_writes"]);
        assert_eq!(found.len(), 2);
        assert_eq!(found["vfs_write"], VirtAddr(BASE + 0x10));
        assert_eq!(found["panic"], VirtAddr(BASE));
    }

    proptest! {
        #[test]
        fn damaged_tables_never_panic(
            names in prop::collection::vec(any::<u8>(), 0..200),
            at in 0usize..256,
            token: u16,
            count in 0usize..100_000,
        ) {
            let mut tables = tables(Encoding::BaseRelative(BASE), words([0, 9, 5, 7]));
            tables.token_index.to_mut()[at * 2..at * 2 + 2].copy_from_slice(&token.to_le_bytes());
            tables.names = Sparse::whole(names);
            tables.count = count;
            if let Some(symbols) = Kallsyms::new(tables) {
                let _ = symbols.find(&["panic", "x"]);
                let _ = (symbols.name(3), symbols.name(count / 2));
                let _ = symbols.covering(VirtAddr(BASE + 8));
            }
        }
    }
}
