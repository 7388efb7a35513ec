//! Symbols of the kernel's image, whichever table they come from.

use std::collections::HashMap;

use crate::{Error, VirtAddr};

use super::kallsyms::{Encoding, Kallsyms, Tables};
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

/// Finds the kernel's symbol table in its memory. VMCOREINFO names its parts from 6.0 on.
///
/// # Errors
/// [`Error::NoSymbols`] says what is missing.
pub fn from_dump<'a>(
    memory: &VirtualMemory<'a>,
    info: &Vmcoreinfo<'_>,
) -> Result<Kallsyms<'a>, Error> {
    let fail = |text: &str| Error::NoSymbols(text.to_owned());
    let place = |name: &str| {
        let missing = format!("VMCOREINFO does not say where {name} is (kernels before 6.0)");
        info.symbol(name).ok_or(Error::NoSymbols(missing))
    };
    let unreadable = |error| Error::NoSymbols(format!("its symbol table is lost: {error}"));
    let names_at = place("kallsyms_names")?;
    let tokens_at = place("kallsyms_token_table")?;
    let index_at = place("kallsyms_token_index")?;
    let count = memory.u32(place("kallsyms_num_syms")?).map_err(unreadable)?;
    if count == 0 || count > MAX_SYMBOLS {
        return Err(fail("the number of its symbols is impossible"));
    }
    let count = count as usize;
    let token_index = memory.bytes(index_at, 512).map_err(unreadable)?;
    let token_table = memory.bytes_up_to(tokens_at, MAX_TOKENS);
    // Names end somewhere before the next table; where that is unknown, 128 bytes a name bound it.
    let after = [tokens_at, index_at].into_iter().filter(|&at| at > names_at).min();
    let most = count * 128;
    let length = after.map_or(most, |at| most.min((at.0 - names_at.0) as usize));
    let names = memory.sparse(names_at, length).map_err(unreadable)?;
    let (addresses, encoding) = addresses(memory, info, count)?;
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
    count: usize,
) -> Result<Addresses<'a>, Error> {
    let unreadable = |error| Error::NoSymbols(format!("its symbol addresses are lost: {error}"));
    if let Some(at) = info.symbol("kallsyms_addresses") {
        return Ok((memory.sparse(at, count * 8).map_err(unreadable)?, Encoding::Absolute));
    }
    let missing = || Error::NoSymbols("VMCOREINFO does not name kallsyms_offsets".to_owned());
    let at = info.symbol("kallsyms_offsets").ok_or_else(missing)?;
    let table = memory.sparse(at, count * 4).map_err(unreadable)?;
    let mut candidates = vec![Encoding::PlaceRelative(at)];
    if let Some(base) = info.symbol("kallsyms_relative_base") {
        let base = memory.u64(base).map_err(unreadable)?;
        candidates = vec![Encoding::AbsolutePercpu(base), Encoding::BaseRelative(base)];
    }
    // What VMCOREINFO names besides is asked for where the table lacks `_stext`.
    let text = info.need_symbol("_stext")?;
    let others = info.symbols().map(|(_, address)| address).filter(|_| !table.is_whole());
    let encoding = std::iter::once(text)
        .chain(others)
        .find_map(|known| {
            let fits = |it: &Encoding| super::kallsyms::holds(&table, *it, count, known);
            candidates.iter().copied().find(fits)
        })
        .ok_or_else(|| Error::NoSymbols("no known encoding yields _stext".to_owned()))?;
    Ok((table, encoding))
}
