//! Loaded modules: where their text lies, their symbols, their unwind tables.

use std::borrow::Cow;

use crate::kernel::Kernel;
use crate::{Error, ReadError, VirtAddr, bytes};

use super::{Place, list};

/// Length of module.name (MODULE_NAME_LEN).
pub(super) const NAME: usize = 56;
/// Size and members of Elf64_Sym.
const SYMBOL: usize = 24;
const SYMBOL_SECTION: usize = 6;
const SYMBOL_VALUE: usize = 8;
/// Longest symbol name (KSYM_NAME_LEN from 6.1 on).
const SYMBOL_NAME: usize = 512;
/// Bounds for what a module says of itself.
const MAX_SYMBOLS: u32 = 1 << 20;
const MAX_ORC: u32 = 1 << 20;

/// A loaded module.
#[derive(Clone, Debug)]
pub struct Module {
    /// Its name.
    pub name: String,
    /// Its text.
    pub start: VirtAddr,
    /// The first address after it.
    pub end: VirtAddr,
    /// Address of its struct module.
    pub address: VirtAddr,
    /// Its ORC tables, when it has any.
    pub orc: Option<ModuleOrc>,
}

/// Where a module's ORC tables lie (struct mod_arch_specific, x86).
#[derive(Clone, Copy, Debug)]
pub struct ModuleOrc {
    /// Table of instruction addresses.
    pub ips: VirtAddr,
    /// Table of entries.
    pub entries: VirtAddr,
    /// Number of entries in each.
    pub count: u32,
}

/// All loaded modules, and what could not be read.
#[derive(Debug, Default)]
pub struct Modules {
    /// The modules.
    pub list: Vec<Module>,
    /// What is missing, one sentence each.
    pub problems: Vec<String>,
}

/// Where the members of struct module lie.
struct Layout {
    list: u64,
    name: u64,
    start: u64,
    size: u64,
    orc: Option<(u64, u64, u64)>,
}

impl Layout {
    fn new(kernel: &Kernel<'_>) -> Result<Layout, Error> {
        let module = "module";
        // Text is mem[MOD_TEXT] (index 0) from 6.4 on, core_layout before.
        let (start, size) = match kernel.field(module, "mem")? {
            Some(field) => {
                let at = field.offset as u64;
                let inner = |name| kernel.offset("module_memory", name);
                (at + inner("base")?, at + inner("size")?)
            }
            None => (
                kernel.offset(module, "core_layout.base")?,
                // With core_layout the text comes first, and the rest has no code in it.
                kernel.offset_of_any(module, &["core_layout.text_size", "core_layout.size"])?,
            ),
        };
        let orc = || {
            let at = |path| kernel.offset(module, path).ok();
            Some((at("arch.orc_unwind_ip")?, at("arch.orc_unwind")?, at("arch.num_orcs")?))
        };
        Ok(Layout {
            list: kernel.offset(module, "list")?,
            name: kernel.offset(module, "name")?,
            start,
            size,
            orc: orc(),
        })
    }

    fn read(&self, kernel: &Kernel<'_>, address: VirtAddr) -> Result<Module, ReadError> {
        let memory = kernel.memory();
        let start = memory.pointer(address.offset(self.start))?;
        let size = memory.u32(address.offset(self.size))?;
        let name = memory.bytes(address.offset(self.name), NAME)?;
        let orc = self.orc.map(|(ips, entries, count)| {
            Ok(ModuleOrc {
                ips: memory.pointer(address.offset(ips))?,
                entries: memory.pointer(address.offset(entries))?,
                count: memory.u32(address.offset(count))?.min(MAX_ORC),
            })
        });
        Ok(Module {
            name: bytes::c_string(&name),
            start,
            end: start.offset(u64::from(size)),
            address,
            orc: orc.transpose()?.filter(|orc| orc.count != 0),
        })
    }
}

impl Modules {
    /// Walks the kernel's list.
    #[must_use]
    pub fn load(kernel: &Kernel<'_>) -> Modules {
        let mut modules = Modules::default();
        if let Err(error) = modules.fill(kernel) {
            modules.problems.push(format!("modules: {error}"));
        }
        modules
    }

    fn fill(&mut self, kernel: &Kernel<'_>) -> Result<(), Error> {
        let head = kernel.need_symbol("modules", "modules cannot be listed")?;
        let layout = Layout::new(kernel)?;
        let walk = list::walk(kernel.memory(), head);
        self.problems.extend(walk.broken.map(|why| format!("modules: {why}")));
        for node in walk.nodes {
            let address = node.back(layout.list);
            match layout.read(kernel, address) {
                Ok(module) => self.list.push(module),
                Err(error) => self.problems.push(format!("module at {address:#x}: {error}")),
            }
        }
        Ok(())
    }

    /// The module whose text has `at` in it.
    #[must_use]
    pub fn covering(&self, at: VirtAddr) -> Option<&Module> {
        self.list.iter().find(|module| module.start <= at && at < module.end)
    }

    /// Names the function of a module that `at` lies in; the module alone when its symbols cannot
    /// be read.
    #[must_use]
    pub fn place(&self, kernel: &Kernel<'_>, at: VirtAddr) -> Option<Place> {
        let module = self.covering(at)?;
        let symbol = module.symbol(kernel, at);
        let (name, start) = symbol.unwrap_or_else(|| ("(no symbol)".to_owned(), module.start));
        let offset = at.0.wrapping_sub(start.0);
        Some(Place { name, offset, module: Some(module.name.clone()) })
    }
}

impl Module {
    /// Calls `with` with the type character, name and address of every symbol in the module's own table
    /// (struct mod_kallsyms).
    pub fn each_symbol(&self, kernel: &Kernel<'_>, with: &mut dyn FnMut(char, &str, VirtAddr)) {
        let Some(table) = SymbolTable::read(kernel, self) else { return };
        for (value, name, kind) in table.entries() {
            if let Some(name) = table.name(kernel, name) {
                with(kind, &name, value);
            }
        }
    }

    /// The symbol before `at` in the module's own table: the nearest one, and of several at one address
    /// the first, as kernel/module/kallsyms.c does.
    fn symbol(&self, kernel: &Kernel<'_>, at: VirtAddr) -> Option<(String, VirtAddr)> {
        let table = SymbolTable::read(kernel, self)?;
        let inside = table.entries().filter(|&(value, ..)| self.start <= value && value <= at);
        let nearest = |best: Option<(VirtAddr, u32)>, (value, name, _): (VirtAddr, u32, char)| {
            best.filter(|&(start, _)| start >= value).or(Some((value, name)))
        };
        let (start, name) = inside.fold(None, nearest)?;
        Some((table.name(kernel, name)?, start))
    }
}

/// A module's symbols (struct mod_kallsyms).
struct SymbolTable<'d> {
    symbols: Cow<'d, [u8]>,
    /// The characters that say what each is, from 5.5 on.
    kinds: Cow<'d, [u8]>,
    strings: VirtAddr,
}

impl<'d> SymbolTable<'d> {
    fn read(kernel: &Kernel<'d>, module: &Module) -> Option<SymbolTable<'d>> {
        let memory = kernel.memory();
        let table = module.address.offset(kernel.offset("module", "kallsyms").ok()?);
        let table = memory.pointer(table).ok()?;
        let member = |name| Some(table.offset(kernel.offset("mod_kallsyms", name).ok()?));
        let count = memory.u32(member("num_symtab")?).ok()?.min(MAX_SYMBOLS) as usize;
        let symbols = memory.bytes(memory.pointer(member("symtab")?).ok()?, count * SYMBOL).ok()?;
        let kinds = || memory.bytes(memory.pointer(member("typetab")?).ok()?, count).ok();
        let strings = memory.pointer(member("strtab")?).ok()?;
        Some(SymbolTable { symbols, kinds: kinds().unwrap_or_default(), strings })
    }

    /// Address, offset of the name and type character of those that are defined and named.
    fn entries(&self) -> impl Iterator<Item = (VirtAddr, u32, char)> {
        let entry = |(index, symbol): (usize, &[u8])| {
            let name = bytes::u32_at(symbol, 0)?;
            let value = VirtAddr(bytes::u64_at(symbol, SYMBOL_VALUE)?);
            let defined = bytes::u16_at(symbol, SYMBOL_SECTION)? != 0;
            let kind = self.kinds.get(index).map_or('?', |&kind| char::from(kind));
            (defined && name != 0).then_some((value, name, kind))
        };
        self.symbols.chunks_exact(SYMBOL).enumerate().filter_map(entry)
    }

    fn name(&self, kernel: &Kernel<'_>, offset: u32) -> Option<String> {
        let name = kernel.memory().string(self.strings.offset(offset.into()), SYMBOL_NAME).ok()?;
        (!name.is_empty()).then_some(name)
    }
}
