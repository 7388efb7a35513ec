//! What kernel it was: its own description, address space, symbols, types, debug information.
//!
//! All of it comes out of the dump. A vmlinux adds lines and inlined functions, and its symbol
//! table where the dump's cannot be found. Nothing is read before it is asked for.

pub mod btf;
pub mod disassembly;
pub mod dwarf;
mod exports;
mod hidden;
mod image;
pub mod kallsyms;
mod kallsyms_search;
pub mod machine;
pub mod paging;
pub mod registers;
mod scan;
pub mod sparse;
pub mod symbols;
pub mod types;
pub mod virt;
pub mod vmcoreinfo;
pub mod vmlinux;

use std::cell::{Cell, OnceCell, RefCell};
use std::collections::HashMap;

use crate::source::{Completeness, Dump, NoteBook};
use crate::{Error, ReadError, VirtAddr};

use btf::{Btf, Field};
use dwarf::{DebugInfo, SourceFrame};
use hidden::Hidden;
use machine::Machine;
use symbols::{Symbol, Symbols};
use virt::{ImageFile, VirtualMemory};
use vmcoreinfo::Vmcoreinfo;
use vmlinux::{ElfSymbols, Vmlinux};

/// Symbols that commands commonly need: looked up together in one pass over all names.
const COMMON_SYMBOLS: &[&str] = &[
    "__per_cpu_offset",
    "__start_BTF",
    "__start_init_task",
    "__start_init_stack",
    "__end_init_task",
    "__end_init_stack",
    "__start_orc_unwind",
    "__start_orc_unwind_ip",
    "__stop_BTF",
    "__stop_orc_unwind",
    "__stop_orc_unwind_ip",
    "_end",
    "_etext",
    "_sinittext",
    "_text",
    "cea_exception_stacks",
    "crash_notes",
    "crashing_cpu",
    "current_task",
    "efi_rt_stack_top",
    "hardirq_stack_ptr",
    "init_task",
    "irq_stack_ptr",
    "modules",
    "nr_cpu_ids",
    "overflow_stack",
    "panic_cpu",
    "pcpu_hot",
    "prb",
    "runqueues",
    "sdei_stack_critical_ptr",
    "sdei_stack_normal_ptr",
    "__cpu_online_mask",
    "__cpu_present_mask",
    "avenrun",
    "cpu_khz",
    "node_data",
    "tk_core",
];

/// A dead kernel.
pub struct Kernel<'d> {
    dump: &'d Dump,
    machine: Machine,
    notes: NoteBook<'d>,
    info: Vmcoreinfo<'d>,
    /// How VMCOREINFO was found, when there is no note with it.
    scanned: Option<String>,
    memory: VirtualMemory<'d>,
    symbols: OnceCell<Box<dyn Symbols + 'd>>,
    found: RefCell<HashMap<String, Option<VirtAddr>>>,
    unlisted: RefCell<HashMap<String, Option<VirtAddr>>>,
    hidden: Hidden,
    vmlinux_symbols: OnceCell<Option<ElfSymbols<'d>>>,
    image: OnceCell<(VirtAddr, VirtAddr)>,
    types: OnceCell<Btf<'d>>,
    vmlinux: Option<&'d Vmlinux>,
    debug: OnceCell<DebugInfo<'d>>,
    /// What the dump lacked and vmlinux had.
    borrowed: RefCell<Vec<&'static str>>,
}

impl<'d> Kernel<'d> {
    /// Finds the kernel in a dump. `vmlinux`, when given, must be of that kernel.
    ///
    /// # Errors
    /// [`Error::Machine`], [`Error::NoVmcoreinfo`], [`Error::VmcoreinfoKey`],
    /// [`Error::BuildIdMismatch`].
    pub fn open(dump: &'d Dump, vmlinux: Option<&'d Vmlinux>) -> Result<Kernel<'d>, Error> {
        let machine = Machine::from_elf(dump.machine())?;
        let notes = dump.notes();
        let (info, scanned) = match notes.vmcoreinfo {
            Some(text) => (Vmcoreinfo::new(text), None),
            None => {
                let found = scan::scan(machine, dump)?;
                let said = found.said();
                (found.info, Some(said))
            }
        };
        let tables = paging::for_kernel(machine, &info)?;
        let image = vmlinux.map(|vmlinux| ImageFile {
            parts: vmlinux.constants(info.kernel_offset()),
            used: Cell::new(false),
        });
        let memory = VirtualMemory::new(dump, tables);
        let kernel = Kernel {
            dump,
            machine,
            notes,
            memory: match image {
                Some(image) => memory.with_image(image),
                None => memory,
            },
            info,
            scanned,
            borrowed: RefCell::default(),
            symbols: OnceCell::new(),
            found: RefCell::default(),
            unlisted: RefCell::default(),
            hidden: Hidden::default(),
            vmlinux_symbols: OnceCell::new(),
            image: OnceCell::new(),
            types: OnceCell::new(),
            vmlinux,
            debug: OnceCell::new(),
        };
        match vmlinux {
            Some(vmlinux) => kernel.check_build_id(vmlinux).map(|()| kernel),
            None => Ok(kernel),
        }
    }

    fn check_build_id(&self, vmlinux: &Vmlinux) -> Result<(), Error> {
        let (Some(theirs), Some(ours)) = (vmlinux.build_id(), self.build_id()) else {
            // One of them has none: nothing speaks against it.
            return Ok(());
        };
        if theirs == ours {
            return Ok(());
        }
        Err(Error::BuildIdMismatch {
            path: vmlinux.path().to_owned(),
            vmlinux: theirs,
            dump: ours,
            release: self.info.release().to_owned(),
        })
    }

    /// The kernel's build id in hexadecimal: from VMCOREINFO, or from the note in its image.
    #[must_use]
    pub fn build_id(&self) -> Option<String> {
        if let Some(id) = self.info.get("BUILD-ID") {
            return Some(id.to_owned());
        }
        let start = self.symbol("__start_notes").ok()??;
        let stop = self.symbol("__stop_notes").ok()??;
        let length = usize::try_from(stop.0.checked_sub(start.0)?).ok()?;
        vmlinux::build_id(&self.memory.bytes(start, length).ok()?)
    }

    /// The vmlinux, when one was given.
    #[must_use]
    pub fn vmlinux(&self) -> Option<&'d Vmlinux> {
        self.vmlinux
    }

    /// The functions inlined at the instruction `pc`, innermost first, then the function itself,
    /// each with its line. Empty without a vmlinux.
    #[must_use]
    pub fn source_frames(&self, pc: VirtAddr) -> Vec<SourceFrame> {
        self.debug_info().map(|debug| debug.frames(pc)).unwrap_or_default()
    }

    /// The debug information, when a vmlinux was given.
    #[must_use]
    pub fn debug_info(&self) -> Option<&DebugInfo<'d>> {
        let (vmlinux, offset) = (self.vmlinux?, self.info.kernel_offset());
        Some(self.debug.get_or_init(|| DebugInfo::new(vmlinux, offset)))
    }

    /// The dump it was found in.
    #[must_use]
    pub fn dump(&self) -> &'d Dump {
        self.dump
    }

    /// Its architecture.
    #[must_use]
    pub fn machine(&self) -> Machine {
        self.machine
    }

    /// The notes of the dump.
    #[must_use]
    pub fn notes(&self) -> &NoteBook<'d> {
        &self.notes
    }

    /// How the kernel describes itself.
    #[must_use]
    pub fn vmcoreinfo(&self) -> &Vmcoreinfo<'d> {
        &self.info
    }

    /// How VMCOREINFO was found, when the dump has no note with it.
    #[must_use]
    pub fn scanned(&self) -> Option<&str> {
        self.scanned.as_deref()
    }

    /// Its virtual memory.
    #[must_use]
    pub fn memory(&self) -> &VirtualMemory<'d> {
        &self.memory
    }

    /// Its symbol table.
    ///
    /// # Errors
    /// [`Error::NoSymbols`].
    pub fn symbols(&self) -> Result<&(dyn Symbols + 'd), Error> {
        let symbols = get_or_try(&self.symbols, || {
            let dump = symbols::from_dump(&self.memory, &self.info);
            if let Ok(table) = dump.as_ref()
                && table.is_whole()
            {
                return dump.map(|table| Box::new(table) as Box<dyn Symbols + 'd>);
            }
            let offset = self.info.kernel_offset();
            match self.vmlinux.and_then(|vmlinux| vmlinux.symbols(offset)) {
                Some(table) => {
                    self.borrowed.borrow_mut().push("symbols");
                    Ok(Box::new(table) as Box<dyn Symbols + 'd>)
                }
                None => dump.map(|table| Box::new(table) as Box<dyn Symbols + 'd>),
            }
        })?;
        Ok(symbols.as_ref())
    }

    /// The address of the symbol called `name`, if there is one: from the kernel's own table; when
    /// that one has functions only, from vmlinux, or found by other data.
    ///
    /// # Errors
    /// [`Error::NoSymbols`] when there is no symbol table at all.
    pub fn symbol(&self, name: &str) -> Result<Option<VirtAddr>, Error> {
        let listed = self.listed_symbol(name)?;
        if listed.is_some() || !self.has_functions_only()? {
            return Ok(listed);
        }
        if let Some(&address) = self.unlisted.borrow().get(name) {
            return Ok(address);
        }
        let address = self.unlisted_symbol(name);
        self.unlisted.borrow_mut().insert(name.to_owned(), address);
        Ok(address)
    }

    fn unlisted_symbol(&self, name: &str) -> Option<VirtAddr> {
        let moved = self.info.kernel_offset();
        let symbols = self.vmlinux_symbols.get_or_init(|| self.vmlinux?.symbols(moved));
        let from_file = symbols.as_ref().and_then(|it| it.find(&[name]).get(name).copied());
        from_file.or_else(|| self.hidden.find(self, name))
    }

    /// Whether the kernel's table has no data symbols (CONFIG_KALLSYMS_ALL is off).
    ///
    /// # Errors
    /// [`Error::NoSymbols`] when there is no symbol table at all.
    pub fn has_functions_only(&self) -> Result<bool, Error> {
        // Every kernel has this variable.
        Ok(self.listed_symbol("init_task")?.is_none())
    }

    fn listed_symbol(&self, name: &str) -> Result<Option<VirtAddr>, Error> {
        if let Some(&address) = self.found.borrow().get(name) {
            return Ok(address);
        }
        let wanted = if COMMON_SYMBOLS.contains(&name) { COMMON_SYMBOLS } else { &[name] };
        let addresses = self.symbols()?.find(wanted);
        let mut found = self.found.borrow_mut();
        for &name in wanted {
            found.insert(name.to_owned(), addresses.get(name).copied());
        }
        Ok(addresses.get(name).copied())
    }

    /// The address of a symbol that cannot be done without; `so` says what follows if it is missing.
    ///
    /// # Errors
    /// [`Error::NoSymbol`], [`Error::LostSymbol`], [`Error::NoSymbols`].
    pub fn need_symbol(&self, name: &str, so: &'static str) -> Result<VirtAddr, Error> {
        self.symbol(name)?.ok_or_else(|| match self.knows_all_symbols() {
            true => Error::NoSymbol(name.to_owned(), so),
            false => Error::LostSymbol(name.to_owned(), so),
        })
    }

    /// What the dump lacked and vmlinux had, so far.
    #[must_use]
    pub fn borrowed(&self) -> Vec<&'static str> {
        let code = self.memory.has_used_image().then_some("code or unwind tables");
        self.borrowed.borrow().iter().copied().chain(code).collect()
    }

    /// Whether all symbols and types are known: then what is not found among them does not exist.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.knows_all_symbols()
            && self.types().map_or_else(|_| self.symbols_say_no_types(), Btf::is_whole)
    }

    /// Whether a symbol that is not found does not exist. Those of a table that has functions only are
    /// looked for in all of the image, and may be in what the dump lacks of it.
    fn knows_all_symbols(&self) -> bool {
        let searched = || self.dump.completeness() == Completeness::Complete;
        self.symbols().is_ok_and(|symbols| symbols.is_whole())
            && (!self.has_functions_only().unwrap_or(true) || searched())
    }

    /// Whether there are no types because the kernel was built without.
    fn symbols_say_no_types(&self) -> bool {
        self.symbol("__start_BTF").is_ok_and(|start| start.is_none())
    }

    /// Whether `at` lies in the kernel's image, not in a module. No, when the image is not known.
    #[must_use]
    pub fn in_image(&self, at: VirtAddr) -> bool {
        self.image().is_ok_and(|&(start, end)| start <= at && at < end)
    }

    /// The symbol of the kernel's image (not of a module) that `at` lies in.
    #[must_use]
    pub fn image_symbol(&self, at: VirtAddr) -> Option<Symbol> {
        let &(start, end) = self.image().ok()?;
        if at < start || at >= end {
            return None;
        }
        let symbol = self.symbols().ok()?.covering(at)?;
        // What follows the end of the functions belongs to none of them, when they are all there is.
        let beyond = matches!(&*symbol.name, "_etext" | "_einittext");
        (!beyond || !self.has_functions_only().unwrap_or(false)).then_some(symbol)
    }

    /// Whether `at`, in the kernel's image, may be in its text: no, when it lies behind the end of it.
    #[must_use]
    pub fn may_be_text(&self, at: VirtAddr) -> bool {
        let end = self.listed_symbol("_etext").ok().flatten();
        let init = self.listed_symbol("_sinittext").ok().flatten();
        end.is_none_or(|end| at <= end) || init.is_some_and(|start| at >= start)
    }

    /// First and last address of the kernel's image; of its functions, when only they have symbols.
    fn image(&self) -> Result<&(VirtAddr, VirtAddr), Error> {
        get_or_try(&self.image, || {
            let so = "the kernel's image cannot be told from modules";
            let start = self.listed_symbol("_text")?.or(self.info.symbol("_stext"));
            let start = start.ok_or_else(|| Error::NoSymbol("_text".to_owned(), so))?;
            let end = self
                .listed_symbol("_end")?
                .map_or_else(|| self.symbols().map(|it| it.last()), |end| Ok(Some(end)))?;
            let end = end.ok_or_else(|| Error::NoSymbol("_end".to_owned(), so))?;
            Ok((start, end))
        })
    }

    /// Its types.
    ///
    /// # Errors
    /// [`Error::NoTypes`] says what is missing.
    pub fn types(&self) -> Result<&Btf<'d>, Error> {
        get_or_try(&self.types, || {
            let dump = self.types_in_dump();
            if dump.as_ref().is_ok_and(Btf::is_whole) {
                return dump;
            }
            let section = self.vmlinux.map(|vmlinux| vmlinux.section(".BTF")).unwrap_or_default();
            let file = Btf::parse(section.into());
            if file.is_ok() {
                self.borrowed.borrow_mut().push("types");
            }
            file.or(dump)
        })
    }

    fn types_in_dump(&self) -> Result<Btf<'d>, Error> {
        let missing = || {
            Error::NoTypes(match self.knows_all_symbols() {
                true => "the kernel has no BTF section".to_owned(),
                false => "BTF cannot be found in what the dump has of the kernel".to_owned(),
            })
        };
        let start = self.symbol("__start_BTF")?.ok_or_else(missing)?;
        let stop = self.symbol("__stop_BTF")?.ok_or_else(missing)?;
        let length = usize::try_from(stop.0.wrapping_sub(start.0)).unwrap_or(usize::MAX);
        let lost = |error: ReadError| Error::NoTypes(format!("BTF is lost: {error}"));
        let data = self.memory.sparse(start, length).map_err(lost)?;
        let whole = data.is_whole();
        let types = Btf::parse(data.into_filled());
        let types = types.map_err(|why| {
            Error::NoTypes(if whole {
                why
            } else {
                "the kernel's own (BTF) is not in the dump".to_owned()
            })
        })?;
        Ok(if whole { types } else { types.torn() })
    }

    /// The member `path` of the structure `name`, if this kernel has it.
    ///
    /// # Errors
    /// [`Error::NoTypes`] when there are no types at all, or so few of them that it cannot be told.
    pub fn field(&self, name: &str, path: &str) -> Result<Option<Field>, Error> {
        let types = self.types()?;
        match types.member(name, path) {
            None if !types.is_whole() => Err(Error::NoTypes(format!(
                "{name}.{path} is not among the {} types that could be read, and there are more",
                types.len()
            ))),
            field => Ok(field),
        }
    }

    /// The offset of a member that cannot be done without, in bytes.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn offset(&self, name: &str, path: &str) -> Result<u64, Error> {
        let field = self.field(name, path)?;
        let missing = || Error::NoMember(format!("struct {name} with member {path}"));
        field.map(|field| field.offset as u64).ok_or_else(missing)
    }

    /// The offset of the first of several members that exists: names change over the years.
    ///
    /// # Errors
    /// [`Error::NoMember`] names the newest, [`Error::NoTypes`].
    pub fn offset_of_any(&self, name: &str, paths: &[&str]) -> Result<u64, Error> {
        for path in paths {
            if let Some(field) = self.types()?.member(name, path) {
                return Ok(field.offset as u64);
            }
        }
        self.offset(name, paths.first().unwrap_or(&""))
    }
}

/// `OnceCell::get_or_init` for what can fail; a failure is not remembered.
pub(crate) fn get_or_try<T>(
    cell: &OnceCell<T>,
    make: impl FnOnce() -> Result<T, Error>,
) -> Result<&T, Error> {
    if let Some(value) = cell.get() {
        return Ok(value);
    }
    let value = make()?;
    Ok(cell.get_or_init(|| value))
}
