//! Loaded modules: which one an address lies in, its symbols, its unwind tables.
//!
//! include/linux/module.h and kernel/module/kallsyms.c, 6.1 to 6.12; where the members lie is in the
//! kernel's types.

use super::facts::{Facts, Member};
use super::kallsyms::{Name, Symbol};
use super::memory::KernelMemory;
use super::orc;

/// More modules than any machine has loaded, and more symbols and unwind entries than any module has.
const MAX_MODULES: u32 = 2048;
const MAX_SYMBOLS: u32 = 1 << 17;
const MAX_ORC: u32 = 1 << 20;
/// Size of Elf64_Sym, and where its section and value are.
const SYMBOL: u64 = 24;
const SYMBOL_SECTION: u64 = 6;
const SYMBOL_VALUE: u64 = 8;
/// Size of struct mod_kallsyms, and of what most symbols' names take.
const MOD_KALLSYMS: u64 = 32;
const USUAL_NAME: u64 = 24;
/// Length of module.name (MODULE_NAME_LEN).
const MODULE_NAME: usize = 56;

/// A loaded module.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Module {
    /// Where its struct module is.
    address: u64,
    /// Its text.
    start: u64,
    /// Bytes of it.
    size: u64,
}

impl Module {
    /// The module with `at` in its text.
    pub fn covering(memory: &mut KernelMemory<'_>, facts: &Facts, at: u64) -> Option<Module> {
        let head = facts.modules?;
        let link = facts.member(Member::ModuleList)?;
        let mut node = memory.u64(head)?;
        for _ in 0..MAX_MODULES {
            if node == head {
                return None;
            }
            let module = Module::read(memory, facts, node.checked_sub(link)?)?;
            if module.has(at) {
                return Some(module);
            }
            node = memory.u64(node)?;
        }
        None
    }

    /// Whether `at` is in its text.
    pub fn has(&self, at: u64) -> bool {
        at.checked_sub(self.start).is_some_and(|skip| skip < self.size)
    }

    /// Text is mem[MOD_TEXT] (index 0) from 6.4 on; in core_layout before, where it comes first.
    fn read(memory: &mut KernelMemory<'_>, facts: &Facts, address: u64) -> Option<Module> {
        let (outer, base, size) = match facts.member(Member::ModuleMemory) {
            Some(outer) => (outer, Member::MemoryBase, Member::MemorySize),
            None => (facts.member(Member::ModuleLayout)?, Member::LayoutBase, Member::LayoutSize),
        };
        let inner = address.checked_add(outer)?;
        Some(Module {
            address,
            start: memory.u64(inner.checked_add(facts.member(base)?)?)?,
            size: memory.u32(inner.checked_add(facts.member(size)?)?)?.into(),
        })
    }

    /// What its frames are named and unwound by: the arrays of its symbols and of its unwind tables, each
    /// with its size in bytes.
    pub fn tables(
        &self,
        memory: &mut KernelMemory<'_>,
        facts: &Facts,
    ) -> impl Iterator<Item = (u64, u64)> + use<> {
        let member = |at: u64, member| at.checked_add(facts.member(member)?);
        let symbols = member(self.address, Member::ModuleSymbols).and_then(|at| memory.u64(at));
        let arch = member(self.address, Member::ModuleArch);
        let mut array = |from: Option<u64>, at, count, most: u32, size: u64| {
            let start = memory.u64(member(from?, at)?)?;
            let count = memory.u32(member(from?, count)?)?.min(most);
            Some((start, u64::from(count) * size))
        };
        [
            symbols.map(|at| (at, MOD_KALLSYMS)),
            array(symbols, Member::SymbolTable, Member::SymbolCount, MAX_SYMBOLS, SYMBOL),
            array(symbols, Member::SymbolNames, Member::SymbolCount, MAX_SYMBOLS, USUAL_NAME),
            array(arch, Member::OrcIps, Member::OrcCount, MAX_ORC, orc::IP),
            array(arch, Member::OrcEntries, Member::OrcCount, MAX_ORC, orc::ENTRY),
        ]
        .into_iter()
        .flatten()
    }

    /// Its name.
    pub fn name(&self, memory: &mut KernelMemory<'_>, facts: &Facts) -> Name {
        let mut buffer = [0; MODULE_NAME];
        let at = facts.member(Member::ModuleName).and_then(|it| self.address.checked_add(it));
        let length = at.map_or(0, |at| memory.text(at, &mut buffer));
        Name::from_slice(buffer.get(..length).unwrap_or_default()).unwrap_or_default()
    }

    /// The symbol before `at` in the module's own table: the nearest one, and of several at one
    /// address the first, as the kernel does.
    pub fn symbol(&self, memory: &mut KernelMemory<'_>, facts: &Facts, at: u64) -> Option<Symbol> {
        let table = memory.u64(self.address.checked_add(facts.member(Member::ModuleSymbols)?)?)?;
        let member = |member| table.checked_add(facts.member(member)?);
        let count = memory.u32(member(Member::SymbolCount)?)?.min(MAX_SYMBOLS);
        let symbols = memory.u64(member(Member::SymbolTable)?)?;
        let strings = memory.u64(member(Member::SymbolNames)?)?;
        let (mut best, mut name_at, mut next) = (0, None, self.start.saturating_add(self.size));
        for index in 0..u64::from(count) {
            let symbol = symbols.checked_add(index * SYMBOL)?;
            let value = memory.u64(symbol.checked_add(SYMBOL_VALUE)?)?;
            let nearer = if value <= at { best < value } else { value < next };
            if !nearer || value < self.start {
                continue;
            }
            let name = strings.wrapping_add(memory.u32(symbol)?.into());
            let section = memory.u16(symbol.checked_add(SYMBOL_SECTION)?)?;
            if section == 0 || is_no_name(memory, name) {
                continue;
            }
            if value <= at {
                (best, name_at) = (value, Some(name));
            } else {
                next = value;
            }
        }
        let mut buffer = [0; super::kallsyms::NAME];
        let length = memory.text(name_at?, &mut buffer);
        let name = Name::from_slice(buffer.get(..length)?).ok()?;
        Some(Symbol { name, kind: b't', start: best, size: next.saturating_sub(best) })
    }

    /// Its unwind tables, if it has any; they are of the same version as the kernel's.
    pub fn orc(
        &self,
        memory: &mut KernelMemory<'_>,
        facts: &Facts,
        version: orc::Version,
    ) -> Option<orc::Table> {
        let part = self.address.checked_add(facts.member(Member::ModuleArch)?)?;
        let member = |member| part.checked_add(facts.member(member)?);
        Some(orc::Table {
            ips: memory.u64(member(Member::OrcIps)?)?,
            entries: memory.u64(member(Member::OrcEntries)?)?,
            count: memory.u32(member(Member::OrcCount)?)?.min(MAX_ORC).into(),
            version,
        })
    }
}

/// Whether the text at `at` is empty or a mark that the assembler made (is_mapping_symbol,
/// include/linux/module_symbol.h, 6.12): `$x`, `$d`, `.L...`, `L0...`.
fn is_no_name(memory: &mut KernelMemory<'_>, at: u64) -> bool {
    let [first, second] = memory.bytes(at).unwrap_or([0; 2]);
    match first {
        0 => true,
        b'$' => matches!(second, b'a' | b'd' | b't' | b'x'),
        b'.' => second == b'L',
        b'L' => second == b'0',
        _ => false,
    }
}
