//! Data symbols of a kernel whose symbol table has functions only (CONFIG_KALLSYMS_ALL is off).
//!
//! Four kinds of data stand in for the table:
//!
//! - variables that modules may use are in the kernel's table of exports ([`super::exports`]);
//! - per-CPU variables are in BTF, by their place in `.data..percpu`; where that section begins
//!   follows from one of them that is exported;
//! - BTF itself is known by its header;
//! - the list of modules is known by its first element, for a module points to itself
//!   (`mkobj.mod`) and back to the list's head; likewise that of their types, which point to modules.
//!
//! What none of these has (`panic_cpu`, `crash_notes`, `tk_core`) stays unknown.

use std::cell::OnceCell;
use std::collections::HashMap;

use crate::{VirtAddr, bytes};

use super::image::{self, Piece};
use super::{Kernel, exports};

/// What was found of a kernel's hidden symbols; each part is looked for once, when first needed.
#[derive(Default)]
pub(super) struct Hidden {
    exports: OnceCell<HashMap<String, VirtAddr>>,
    types: OnceCell<Option<(VirtAddr, VirtAddr)>>,
    percpu: OnceCell<HashMap<String, VirtAddr>>,
    modules: OnceCell<Option<VirtAddr>>,
    module_types: OnceCell<Option<VirtAddr>>,
}

impl Hidden {
    /// The address of `name`, if one of the ways leads to it.
    pub fn find(&self, kernel: &Kernel<'_>, name: &str) -> Option<VirtAddr> {
        match name {
            "__start_BTF" => self.types(kernel).map(|(start, _)| start),
            "__stop_BTF" => self.types(kernel).map(|(_, stop)| stop),
            "modules" => *self.modules.get_or_init(|| module_list(kernel)),
            "btf_modules" => *self.module_types.get_or_init(|| module_types(kernel)),
            _ => {
                let exported = self.exports(kernel).get(name).copied();
                exported.or_else(|| self.percpu(kernel).get(name).copied())
            }
        }
    }

    fn exports(&self, kernel: &Kernel<'_>) -> &HashMap<String, VirtAddr> {
        self.exports.get_or_init(|| {
            let symbols = kernel.info.symbols().map(|(name, at)| (at, name)).collect();
            exports::find(&image::pieces(kernel.memory(), &kernel.info), &symbols)
        })
    }

    fn types(&self, kernel: &Kernel<'_>) -> Option<(VirtAddr, VirtAddr)> {
        *self.types.get_or_init(|| {
            let image = image::pieces(kernel.memory(), &kernel.info);
            let end = image.last().map(|last| last.start.offset(last.bytes.len() as u64))?;
            let found = image.iter().filter_map(|piece| types_in(piece, end));
            found.max_by_key(|it| it.1.0 - it.0.0)
        })
    }

    fn percpu(&self, kernel: &Kernel<'_>) -> &HashMap<String, VirtAddr> {
        self.percpu.get_or_init(|| {
            let Ok(types) = kernel.types() else { return HashMap::new() };
            let variables = types.variables(".data..percpu");
            let exports = self.exports(kernel);
            let base = variables.iter().find_map(|variable| {
                let address = exports.get(&variable.name)?;
                Some(address.back(u64::from(variable.offset)))
            });
            let Some(base) = base else { return HashMap::new() };
            let place = |it: super::btf::Variable| (it.name, base.offset(u64::from(it.offset)));
            variables.into_iter().map(place).collect()
        })
    }
}

/// Where BTF lies: its magic number, version 1, no flags, a header of 24 bytes, types right behind
/// it and strings right behind them (include/uapi/linux/btf.h).
/// They need not lie in one piece, for pages may be missing, but before the end of the image.
fn types_in(piece: &Piece<'_>, image_end: VirtAddr) -> Option<(VirtAddr, VirtAddr)> {
    const HEADER: u64 = 24;
    const START: [u8; 12] = [0x9f, 0xeb, 1, 0, HEADER as u8, 0, 0, 0, 0, 0, 0, 0];
    /// A kernel's types take megabytes; what is smaller is a program's, or chance.
    const LEAST: u64 = 64 << 10;
    let found = memchr::memmem::find_iter(&piece.bytes, &START).filter_map(|at| {
        let word = |skip| bytes::u32_at(&piece.bytes, at + skip).map(u64::from);
        let (types, strings_at, strings) = (word(12)?, word(16)?, word(20)?);
        let length = HEADER + types + strings;
        let start = piece.start.offset(at as u64);
        let fits = start.0.checked_add(length).is_some_and(|end| end <= image_end.0);
        (types == strings_at && length >= LEAST && fits).then(|| (start, start.offset(length)))
    });
    found.max_by_key(|(start, stop)| stop.0 - start.0)
}

/// The head of the list of modules (`modules`, kernel/module/main.c).
fn module_list(kernel: &Kernel<'_>) -> Option<VirtAddr> {
    let list = kernel.offset("module", "list").ok()?;
    let itself = kernel.offset("module", "mkobj.mod").ok()?;
    head_of(kernel, |first| is_module(kernel, itself, first.back(list)))
}

/// The head of the list of modules' types (`btf_modules`, kernel/bpf/btf.c), whose elements point to theirs.
fn module_types(kernel: &Kernel<'_>) -> Option<VirtAddr> {
    let list = kernel.offset("btf_module", "list").ok()?;
    let module = kernel.offset("btf_module", "module").ok()?;
    let itself = kernel.offset("module", "mkobj.mod").ok()?;
    let memory = kernel.memory();
    let points_to_module = |node: VirtAddr| {
        let module = memory.pointer(node.back(list).offset(module));
        module.is_ok_and(|module| is_module(kernel, itself, module))
    };
    // Other things point to modules, too: all elements up to the head must.
    head_of(kernel, |first| {
        let last = std::iter::successors(Some(first), |&node| {
            let next = memory.pointer(node).ok()?;
            points_to_module(next).then_some(next)
        });
        let last = last.take(MAX_MODULES).last().and_then(|last| memory.pointer(last).ok());
        points_to_module(first) && last.is_some_and(|head| memory.pointer(head) == Ok(first))
    })
}

/// More modules than anybody loads.
const MAX_MODULES: usize = 1 << 14;

/// Whether a struct module is at `at`: it points to itself, `itself` bytes behind its start.
fn is_module(kernel: &Kernel<'_>, itself: u64, at: VirtAddr) -> bool {
    kernel.memory().pointer(at.offset(itself)) == Ok(at)
}

/// The head of a list, in the image, whose first element is as wanted.
fn head_of(kernel: &Kernel<'_>, is_wanted: impl Fn(VirtAddr) -> bool) -> Option<VirtAddr> {
    let memory = kernel.memory();
    let is_head = |at: VirtAddr, first: VirtAddr| {
        memory.pointer(first.offset(8)) == Ok(at) && is_wanted(first)
    };
    image::pieces(memory, &kernel.info).iter().find_map(|piece| {
        let words = piece.bytes.chunks_exact(8).enumerate();
        words.into_iter().find_map(|(index, word)| {
            let first = VirtAddr(bytes::u64_at(word, 0)?);
            let at = piece.start.offset(index as u64 * 8);
            let pointer = first.0 >> 52 == 0xfff && first.0.is_multiple_of(8) && first != at;
            (pointer && is_head(at, first)).then_some(at)
        })
    })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::{EM_X86_64, FakeMemory, btf, put_symbols, symbol_lines, with_kernel};

    const BASE: u64 = 0xffff_ffff_8100_0000;
    const TABLES: u64 = 0xc000;
    const EXPORTS: u64 = 0x2000;
    const NAMES: u64 = 0x3000;
    const HEAD: u64 = 0x4000;
    /// struct module of the only module; its list_head is the second member.
    const MODULE: u64 = 0x5000;
    const TYPES: u64 = 0x10000;

    /// A kernel with one function in its symbol table.
    fn world() -> FakeMemory {
        let mut memory = FakeMemory::new(0x40000);
        memory.mapped(BASE, TABLES);
        put_symbols(&mut memory, BASE, &[(BASE, "T_stext"), (BASE + 0x100, "tfunction")]);
        let exports = [("cpu_number", 0x8008u64), ("init_task", 0x9000), ("init_uts_ns", 0x6000)];
        for (index, (name, value)) in exports.into_iter().enumerate() {
            let (at, text) = (EXPORTS + index as u64 * 12, NAMES + index as u64 * 16);
            memory.put(at, &((value - at) as u32).to_le_bytes());
            memory.put(at + 4, &((text - at - 4) as u32).to_le_bytes());
            memory.put(text, name.as_bytes());
        }
        memory.put_u64(HEAD, BASE + MODULE + 8);
        memory.put_u64(HEAD + 8, BASE + MODULE + 8);
        memory.put_u64(MODULE + 8, BASE + HEAD);
        memory.put_u64(MODULE + 16, BASE + HEAD);
        memory.put_u64(MODULE + 32, BASE + MODULE);
        memory.put(TYPES, &types());
        memory
    }

    /// struct module, and two variables of 4 and 8 bytes in `.data..percpu`. A kernel's types are
    /// never as few as these: the strings are filled up with zeros.
    fn types() -> Vec<u8> {
        let module: &[_] = &[("list", 8, None), ("mkobj", 32, Some("kobject"))];
        let mut blob = btf(&[
            ("kobject", 8, &[("mod", 0, None)]),
            ("module", 64, module),
            ("cpu_number", 4, &[]),
            ("runqueues", 8, &[]),
            (".data..percpu", 8, &[]),
        ]);
        let length = bytes::u32_at(&blob, 12).unwrap() as usize;
        let strings = blob.split_off(24 + length);
        let text = |name: &str| memchr::memmem::find(&strings, name.as_bytes()).unwrap() as u32;
        // Types 7 and 8 are the variables, of type 1; type 9 is the section.
        let words = [
            [text("cpu_number"), 14 << 24, 1, 0],
            [text("runqueues"), 14 << 24, 1, 0],
            [text(".data..percpu"), 15 << 24 | 2, 0x20, 7],
            [8, 4, 8, 0x10],
            [8, 0, 0, 0],
        ];
        blob.extend(words.concat()[..17].iter().flat_map(|word| word.to_le_bytes()));
        let types = (blob.len() - 24) as u32;
        for (at, value) in [(12, types), (16, types), (20, 0x10000)] {
            blob[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        blob.extend_from_slice(&strings);
        blob.resize(24 + types as usize + 0x10000, 0);
        blob
    }

    fn found(memory: &FakeMemory, name: &str) -> Option<u64> {
        let phys_base = -0x100_0000;
        let lines = format!(
            "SYMBOL(swapper_pg_dir)={:x}\nNUMBER(phys_base)={phys_base}\nSYMBOL(init_uts_ns)={:x}\n",
            BASE + TABLES,
            BASE + 0x6000
        );
        with_kernel(memory, EM_X86_64, &(lines + &symbol_lines(BASE)), |kernel| {
            kernel.symbol(name).unwrap().map(|at| at.0 - BASE)
        })
    }

    #[test]
    fn exported_variables_are_found() {
        assert_eq!(found(&world(), "init_task"), Some(0x9000));
        assert_eq!(found(&world(), "function"), Some(0x100));
        assert_eq!(found(&world(), "panic_cpu"), None);
    }

    #[test]
    fn types_are_found_by_their_header() {
        assert_eq!(found(&world(), "__start_BTF"), Some(TYPES));
        let length = types().len() as u64;
        assert_eq!(found(&world(), "__stop_BTF"), Some(TYPES + length));
    }

    #[test]
    fn per_cpu_variables_lie_where_an_exported_one_says() {
        // cpu_number is exported at 0x8008, and is 8 bytes into the section.
        assert_eq!(found(&world(), "runqueues"), Some(0x8010));
    }

    #[test]
    fn list_of_modules_is_found_by_a_module_that_points_to_itself() {
        assert_eq!(found(&world(), "modules"), Some(HEAD));
        let mut other = world();
        other.put_u64(MODULE + 32, BASE + 0x7000);
        assert_eq!(found(&other, "modules"), None);
    }

    #[test]
    fn damaged_tables_are_not_found_and_do_no_harm() {
        let mut memory = world();
        memory.put(TYPES + 12, &u32::MAX.to_le_bytes());
        memory.put(EXPORTS + 28, &[0xff; 4]);
        for name in ["__start_BTF", "runqueues", "modules", "init_task"] {
            assert_eq!(found(&memory, name), None, "{name}");
        }
    }
}
