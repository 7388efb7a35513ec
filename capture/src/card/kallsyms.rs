//! The kernel's symbol table, read in place: from an address to a name and back.
//!
//! scripts/kallsyms.c and kernel/kallsyms.c, 6.0 to 7.0: names are sequences of tokens (one length
//! byte, from 6.1 on two when bit 7 of the first is set); the first character of an expanded name is
//! the symbol's type. Addresses have one of four encodings, told apart by which of them yields the
//! known address of `_stext`. VMCOREINFO names the tables from 6.0 on, all but `kallsyms_markers`
//! (the place of every 256th name) and `kallsyms_seqs_of_names` (the order of the names, 6.2 on):
//! these two are found by the order in which the tables lie, and by their content.

use heapless::Vec;

use crate::vmcoreinfo::Vmcoreinfo;

use super::memory::KernelMemory;

#[path = "kallsyms_hidden.rs"]
mod hidden;

/// Bytes of a name that are kept: longer ones are Rust's and C++'s.
pub const NAME: usize = 128;
/// A name, without its type.
pub type Name = Vec<u8, NAME>;

/// More symbols than any kernel has.
const MAX_SYMBOLS: u32 = 1 << 22;
/// Names between two markers.
const STRIDE: u32 = 256;

/// How addresses are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Encoding {
    /// 64-bit addresses (to 6.10, without CONFIG_KALLSYMS_BASE_RELATIVE).
    Absolute,
    /// 32-bit offsets from a base.
    BaseRelative(u64),
    /// As before, but a value that is not negative is itself an address (a per-CPU symbol), and a
    /// negative one means `base - 1 - value` (x86_64, 4.6 to 6.14).
    AbsolutePercpu(u64),
    /// 32-bit offsets from the place they are stored at (7.0 on).
    PlaceRelative,
}

/// A symbol that an address lies in.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name.
    pub name: Name,
    /// Its type: `t` or `T` for functions.
    pub kind: u8,
    /// Where it begins.
    pub start: u64,
    /// Bytes up to the next symbol; 0 when there is none.
    pub size: u64,
}

/// Where the tables are.
#[derive(Clone, Copy, Debug)]
pub struct Kallsyms {
    count: u32,
    names: u64,
    tokens: u64,
    token_index: u64,
    addresses: u64,
    encoding: Encoding,
    markers: Option<u64>,
    order: Option<u64>,
}

impl Kallsyms {
    /// Finds the tables; `None` when VMCOREINFO does not name them or they make no sense.
    pub fn find(memory: &mut KernelMemory<'_>, info: &Vmcoreinfo) -> Option<Kallsyms> {
        let count = memory.u32(info.symbol("kallsyms_num_syms")?)?;
        if count == 0 || count > MAX_SYMBOLS {
            return None;
        }
        let absolute = info.symbol("kallsyms_addresses");
        let mut table = Kallsyms {
            count,
            names: info.symbol("kallsyms_names")?,
            tokens: info.symbol("kallsyms_token_table")?,
            token_index: info.symbol("kallsyms_token_index")?,
            addresses: absolute.or_else(|| info.symbol("kallsyms_offsets"))?,
            encoding: Encoding::Absolute,
            markers: None,
            order: None,
        };
        let base_at = info.symbol("kallsyms_relative_base");
        let base = base_at.and_then(|at| memory.u64(at));
        let encodings = match (absolute, base) {
            (Some(_), _) => [Encoding::Absolute; 2],
            (None, Some(base)) => [Encoding::AbsolutePercpu(base), Encoding::BaseRelative(base)],
            (None, None) => [Encoding::PlaceRelative; 2],
        };
        let text = info.symbol("_stext")?;
        let fits = |encoding: &Encoding| {
            let table = Kallsyms { encoding: *encoding, ..table };
            let index = table.lower_bound(memory, text);
            table.address(memory, index) == Some(text)
        };
        table.encoding = encodings.into_iter().find(fits)?;
        table.markers = table.find_markers(memory);
        table.order = table.find_order(memory, base_at);
        Some(table)
    }

    /// The symbol that `at` lies in. Of several at one address the first counts, as for the kernel.
    pub fn covering(&self, memory: &mut KernelMemory<'_>, at: u64) -> Option<Symbol> {
        let above = self.lower_bound(memory, at.checked_add(1)?);
        let start = self.address(memory, above.checked_sub(1)?)?;
        let first = self.lower_bound(memory, start);
        let end = self.address(memory, above).unwrap_or(start);
        let (kind, name) = self.name(memory, first)?;
        Some(Symbol { name, kind, start, size: end.saturating_sub(start) })
    }

    /// Finds the addresses of `names`, each into the slot of the same index.
    pub fn find_all<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        names: &[&str; N],
    ) -> [Option<u64>; N] {
        if let Some(order) = self.order {
            return names.map(|name| self.find_in_order(memory, order, name.as_bytes()));
        }
        let mut found = [None; N];
        let promising = self.promising_tokens(memory, names);
        let mut at = self.names;
        for index in 0..self.count {
            let Some((start, length)) = self.split(memory, at) else { break };
            let first = memory.u8(start).unwrap_or(0);
            if promising[usize::from(first)] {
                let text = self.expand(memory, start, length);
                let name = text.get(1..).unwrap_or_default();
                let wanted = found.iter_mut().zip(names).filter(|(slot, _)| slot.is_none());
                for (slot, _) in wanted.filter(|(_, wanted)| wanted.as_bytes() == name) {
                    *slot = self.address(memory, index);
                }
            }
            at = start + length;
        }
        found
    }

    /// Which tokens can be the first of one of `names`: most are passed over by this alone.
    fn promising_tokens(&self, memory: &mut KernelMemory<'_>, names: &[&str]) -> [bool; 256] {
        let mut promising = [false; 256];
        for (token, flag) in (0..=255u8).zip(&mut promising) {
            let mut text = Name::new();
            self.expand_token(memory, token, &mut text);
            let text = text.get(1..).unwrap_or_default();
            *flag = names.iter().any(|name| name.as_bytes().starts_with(text));
        }
        promising
    }

    /// Looks `name` up in the table of indices in the order of names: 3 bytes each, the highest first.
    fn find_in_order(&self, memory: &mut KernelMemory<'_>, order: u64, name: &[u8]) -> Option<u64> {
        let index = |memory: &mut KernelMemory<'_>, place: u32| {
            let bytes: [u8; 3] = memory.bytes(order.checked_add(u64::from(place) * 3)?)?;
            Some(u32::from_be_bytes([0, bytes[0], bytes[1], bytes[2]]))
        };
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let symbol = index(memory, middle)?;
            if self.name(memory, symbol)?.1.as_slice() < name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let symbol = index(memory, low)?;
        let found = low < self.count && self.name(memory, symbol)?.1 == name;
        if found { self.address(memory, symbol) } else { None }
    }

    /// The type and name of symbol `index`.
    fn name(&self, memory: &mut KernelMemory<'_>, index: u32) -> Option<(u8, Name)> {
        if index >= self.count {
            return None;
        }
        let (mut at, skip) = match self.markers {
            Some(markers) => {
                let marker = memory.u32(markers.checked_add(u64::from(index / STRIDE) * 4)?)?;
                (self.names.checked_add(u64::from(marker))?, index % STRIDE)
            }
            None => (self.names, index),
        };
        for _ in 0..skip {
            let (start, length) = self.split(memory, at)?;
            at = start + length;
        }
        let (start, length) = self.split(memory, at)?;
        let expanded = self.expand(memory, start, length);
        let (&kind, name) = expanded.split_first()?;
        Some((kind, Name::from_slice(name).ok()?))
    }

    /// Where the tokens of the name at `at` begin, and how many there are: they end below 2^64.
    fn split(&self, memory: &mut KernelMemory<'_>, at: u64) -> Option<(u64, u64)> {
        let first = u64::from(memory.u8(at)?);
        let (start, length) = if first & 0x80 == 0 {
            (at.checked_add(1)?, Some(first).filter(|&first| first != 0)?)
        } else {
            let second = u64::from(memory.u8(at.checked_add(1)?)?);
            (at.checked_add(2)?, (first & 0x7f) | second << 7)
        };
        start.checked_add(length).map(|_| (start, length))
    }

    /// The text of `length` tokens, its type included, as much of it as is kept.
    fn expand(&self, memory: &mut KernelMemory<'_>, at: u64, length: u64) -> Name {
        let mut text = Name::new();
        for index in 0..length {
            let Some(token) = at.checked_add(index).and_then(|at| memory.u8(at)) else { break };
            self.expand_token(memory, token, &mut text);
            if text.is_full() {
                break;
            }
        }
        text
    }

    fn expand_token(&self, memory: &mut KernelMemory<'_>, token: u8, into: &mut Name) {
        let index = self.token_index.checked_add(u64::from(token) * 2);
        let offset = index.and_then(|at| memory.u16(at));
        let Some(mut at) = offset.and_then(|it| self.tokens.checked_add(it.into())) else { return };
        while let Some(byte) = memory.u8(at).filter(|&byte| byte != 0) {
            if into.push(byte).is_err() {
                return;
            }
            at = at.wrapping_add(1);
        }
    }

    /// The number of symbols below `at`: they are in ascending order.
    fn lower_bound(&self, memory: &mut KernelMemory<'_>, at: u64) -> u32 {
        let (mut low, mut high) = (0, self.count);
        while low < high {
            let middle = low + (high - low) / 2;
            match self.address(memory, middle) {
                Some(address) if address < at => low = middle + 1,
                _ => high = middle,
            }
        }
        low
    }

    fn address(&self, memory: &mut KernelMemory<'_>, index: u32) -> Option<u64> {
        if index >= self.count {
            return None;
        }
        let at = self.addresses.checked_add(u64::from(index) * 4)?;
        Some(match self.encoding {
            Encoding::Absolute => memory.u64(self.addresses.checked_add(u64::from(index) * 8)?)?,
            Encoding::BaseRelative(base) => base.wrapping_add(u64::from(memory.u32(at)?)),
            Encoding::AbsolutePercpu(base) => match memory.u32(at)? as i32 {
                value @ 0.. => value as u64,
                value => base.wrapping_sub(1).wrapping_sub(i64::from(value) as u64),
            },
            Encoding::PlaceRelative => at.wrapping_add_signed(i64::from(memory.u32(at)? as i32)),
        })
    }
}

#[cfg(test)]
#[path = "kallsyms_tests.rs"]
mod tests;
