//! Symbols of the kernel's image, whichever table they come from.

use std::collections::HashMap;

use crate::{Error, VirtAddr};

use super::kallsyms::{Encoding, Kallsyms, Tables};
use super::kallsyms_search;
use super::sparse::Sparse;
use super::virt::VirtualMemory;
use super::vmcoreinfo::Vmcoreinfo;

/// A named place in the kernel.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Symbol {
    /// Its name, compiler suffixes included.
    pub name: String,
    /// Where it begins.
    pub start: VirtAddr,
    /// The first address after it.
    pub end: VirtAddr,
}

/// Stands for a name that is not in the dump.
pub const NAME_LOST: &str = "(name not in the dump)";

/// A table of the kernel's symbols.
pub trait Symbols {
    /// The symbol that `at` lies in.
    fn covering(&self, at: VirtAddr) -> Option<Symbol>;

    /// The addresses of those of `names` that exist, in one pass.
    fn find(&self, names: &[&str]) -> HashMap<String, VirtAddr>;

    /// Calls `with` with the type character (as nm prints it), name and address of every symbol, in the
    /// order of the table.
    fn each(&self, with: &mut dyn FnMut(char, &str, VirtAddr));

    /// The highest address that has a symbol.
    fn last(&self) -> Option<VirtAddr>;

    /// Whether all of the table is there. Where it is not, a symbol that is not found may exist.
    fn is_whole(&self) -> bool;
}

impl Symbols for Kallsyms<'_> {
    fn covering(&self, at: VirtAddr) -> Option<Symbol> {
        let (index, end) = Kallsyms::covering(self, at)?;
        let name = self.name(index).map_or_else(|| NAME_LOST.to_owned(), |(_, name)| name);
        Some(Symbol { name, start: self.address(index)?, end })
    }

    fn find(&self, names: &[&str]) -> HashMap<String, VirtAddr> {
        Kallsyms::find(self, names)
    }

    fn each(&self, with: &mut dyn FnMut(char, &str, VirtAddr)) {
        Kallsyms::each(self, with);
    }

    fn last(&self) -> Option<VirtAddr> {
        self.address(self.len().checked_sub(1)?)
    }

    fn is_whole(&self) -> bool {
        Kallsyms::is_whole(self)
    }
}

/// More symbols than any kernel has.
const MAX_SYMBOLS: u32 = 1 << 22;
/// More bytes than 256 tokens have.
const MAX_TOKENS: usize = 64 << 10;

/// Where the parts of the table lie.
struct Parts {
    names: VirtAddr,
    tokens: VirtAddr,
    index: VirtAddr,
    count: u32,
    places: AddressPlaces,
}

/// Where addresses may lie, and what they may be relative to.
struct AddressPlaces {
    absolute: Option<VirtAddr>,
    offsets: Option<VirtAddr>,
    base: Option<VirtAddr>,
}

impl Parts {
    /// As VMCOREINFO says, from 6.0 on.
    fn named(memory: &VirtualMemory<'_>, info: &Vmcoreinfo<'_>) -> Result<Parts, Error> {
        let place = |name: &str| {
            let missing = || Error::NoSymbols(format!("VMCOREINFO does not say where {name} is"));
            info.symbol(name).ok_or_else(missing)
        };
        let count = memory.u32(place("kallsyms_num_syms")?).map_err(unreadable)?;
        let (absolute, offsets) =
            (info.symbol("kallsyms_addresses"), info.symbol("kallsyms_offsets"));
        let base = info.symbol("kallsyms_relative_base");
        Ok(Parts {
            names: place("kallsyms_names")?,
            tokens: place("kallsyms_token_table")?,
            index: place("kallsyms_token_index")?,
            count,
            places: AddressPlaces { absolute, offsets, base },
        })
    }

    /// By their shape, before 6.0.
    fn found(memory: &VirtualMemory<'_>, info: &Vmcoreinfo<'_>) -> Result<Parts, Error> {
        let missing = || {
            let why = "VMCOREINFO does not say where its symbol table is (before 6.0), and it was not \
                       found by its shape";
            Error::NoSymbols(why.to_owned())
        };
        let found =
            kallsyms_search::find(&super::image::pieces(memory, info)).ok_or_else(missing)?;
        let count = u64::from(found.count);
        // In front of the number of symbols: either addresses, or offsets and what they are from.
        let base = found.count_at.back(8);
        Ok(Parts {
            names: found.names,
            tokens: found.tokens,
            index: found.index,
            count: found.count,
            places: AddressPlaces {
                absolute: Some(found.count_at.back(count * 8)),
                offsets: Some(base.back((count * 4).next_multiple_of(8))),
                base: Some(base),
            },
        })
    }
}

fn unreadable(error: crate::ReadError) -> Error {
    Error::NoSymbols(format!("its symbol table is lost: {error}"))
}

/// Finds the kernel's symbol table in its memory. VMCOREINFO names its parts from 6.0 on; before, they
/// are known by their shape.
///
/// # Errors
/// [`Error::NoSymbols`] says what is missing.
pub fn from_dump<'a>(
    memory: &VirtualMemory<'a>,
    info: &Vmcoreinfo<'_>,
) -> Result<Kallsyms<'a>, Error> {
    let fail = |text: &str| Error::NoSymbols(text.to_owned());
    let is_named = info.symbol("kallsyms_names").is_some();
    let parts = if is_named { Parts::named(memory, info)? } else { Parts::found(memory, info)? };
    let (tokens_at, index_at, names_at) = (parts.tokens, parts.index, parts.names);
    if parts.count == 0 || parts.count > MAX_SYMBOLS {
        return Err(fail("the number of its symbols is impossible"));
    }
    let count = parts.count as usize;
    let token_index = memory.bytes(index_at, 512).map_err(unreadable)?;
    let token_table = memory.bytes_up_to(tokens_at, MAX_TOKENS);
    // Names end somewhere before the next table; where that is unknown, 128 bytes a name bound it.
    let after = [tokens_at, index_at].into_iter().filter(|&at| at > names_at).min();
    let most = count * 128;
    let length = after.map_or(most, |at| most.min((at.0 - names_at.0) as usize));
    let names = memory.sparse(names_at, length).map_err(unreadable)?;
    let (addresses, encoding) = addresses(memory, info, &parts.places, count)?;
    Kallsyms::new(Tables {
        addresses,
        encoding,
        names,
        count,
        token_table: token_table.into(),
        token_index,
    })
    .ok_or_else(|| fail("the tokens of its symbol table make no sense"))
}

type Addresses<'a> = (Sparse<'a>, Encoding);

/// Reads the table of addresses and tells its encoding: the right one has `_stext` in it.
fn addresses<'a>(
    memory: &VirtualMemory<'a>,
    info: &Vmcoreinfo<'_>,
    places: &AddressPlaces,
    count: usize,
) -> Result<Addresses<'a>, Error> {
    let text = info.need_symbol("_stext")?;
    let mut candidates = Vec::new();
    if let Some(at) = places.offsets {
        let table = memory.sparse(at, count * 4).map_err(unreadable)?;
        let base = places.base.map(|base| memory.u64(base).map_err(unreadable)).transpose()?;
        let encodings = match base {
            Some(base) => vec![Encoding::AbsolutePercpu(base), Encoding::BaseRelative(base)],
            None => vec![Encoding::PlaceRelative(at)],
        };
        candidates.extend(encodings.into_iter().map(|encoding| (table.clone(), encoding)));
    }
    if let Some(at) = places.absolute {
        let table = memory.sparse(at, count * 8).map_err(unreadable)?;
        // Where nothing else can be, nothing need be asked for.
        if candidates.is_empty() {
            return Ok((table, Encoding::Absolute));
        }
        candidates.push((table, Encoding::Absolute));
    }
    // What VMCOREINFO names besides is asked for where a table lacks `_stext`.
    let torn = candidates.iter().any(|(table, _)| !table.is_whole());
    let others = info.symbols().map(|(_, address)| address).filter(|_| torn);
    for known in std::iter::once(text).chain(others) {
        let fits = |it: &(Sparse<'_>, Encoding)| super::kallsyms::holds(&it.0, it.1, count, known);
        if let Some(index) = candidates.iter().position(fits) {
            return Ok(candidates.swap_remove(index));
        }
    }
    Err(Error::NoSymbols("no known encoding yields _stext".to_owned()))
}
