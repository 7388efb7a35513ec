//! Data symbols of a kernel whose symbol table has functions only (CONFIG_KALLSYMS_ALL is off).
//!
//! Four kinds of data stand in for the table:
//!
//! - variables that modules may use are in the kernel's table of exports ([`super::exports`]);
//! - per-CPU variables are in BTF, by their place in `.data..percpu`; where that section begins
//!   follows from one of them that is exported;
//! - BTF itself is known by its header;
//! - the list of modules is known by its first element, for a module points to itself
//!   (`mkobj.mod`) and back to the list's head.
//!
//! What none of these has (`panic_cpu`, `crash_notes`, `tk_core`) stays unknown.

use std::borrow::Cow;
use std::cell::OnceCell;
use std::collections::HashMap;

use crate::{VirtAddr, bytes};

use super::{Kernel, exports};

/// What was found of a kernel's hidden symbols; each part is looked for once, when first needed.
#[derive(Default)]
pub(super) struct Hidden {
    exports: OnceCell<HashMap<String, VirtAddr>>,
    types: OnceCell<Option<(VirtAddr, VirtAddr)>>,
    percpu: OnceCell<HashMap<String, VirtAddr>>,
    modules: OnceCell<Option<VirtAddr>>,
}

/// A stretch of the kernel's image that lies together in memory.
pub(super) struct Piece<'a> {
    /// Its first address.
    pub start: VirtAddr,
    /// What is there.
    pub bytes: Cow<'a, [u8]>,
}

/// More than any kernel's image takes.
const IMAGE_SIZE: u64 = 512 << 20;
/// What is looked at behind the last place that VMCOREINFO names.
const MARGIN: u64 = 1 << 20;
/// Holes in the image (freed initialization code) are skipped in steps of this.
const STEP: u64 = 4096;

impl Hidden {
    /// The address of `name`, if one of the ways leads to it.
    pub fn find(&self, kernel: &Kernel<'_>, name: &str) -> Option<VirtAddr> {
        match name {
            "__start_BTF" => self.types(kernel).map(|(start, _)| start),
            "__stop_BTF" => self.types(kernel).map(|(_, stop)| stop),
            "modules" => *self.modules.get_or_init(|| module_list(kernel)),
            _ => {
                let exported = self.exports(kernel).get(name).copied();
                exported.or_else(|| self.percpu(kernel).get(name).copied())
            }
        }
    }

    fn exports(&self, kernel: &Kernel<'_>) -> &HashMap<String, VirtAddr> {
        self.exports.get_or_init(|| {
            let symbols = kernel.info.symbols().map(|(name, at)| (at, name)).collect();
            exports::find(&pieces(kernel), &symbols)
        })
    }

    fn types(&self, kernel: &Kernel<'_>) -> Option<(VirtAddr, VirtAddr)> {
        *self.types.get_or_init(|| {
            pieces(kernel).iter().filter_map(types_in).max_by_key(|it| it.1.0 - it.0.0)
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

/// The kernel's image, from `_stext` to a little behind the last symbol in VMCOREINFO, as far as it
/// is mapped and in the dump.
fn pieces<'d>(kernel: &Kernel<'d>) -> Vec<Piece<'d>> {
    let Some(first) = kernel.info.symbol("_stext") else { return Vec::new() };
    let inside = |at: &VirtAddr| at.0.wrapping_sub(first.0) < IMAGE_SIZE;
    let last = kernel.info.symbols().map(|(_, at)| at).filter(inside).max().unwrap_or(first);
    let length = (last.0 - first.0).saturating_add(MARGIN);
    let mut pieces = Vec::new();
    let mut skip = 0;
    while skip < length {
        let start = first.offset(skip);
        match kernel.memory().together(start, (length - skip) as usize) {
            Ok(bytes) => {
                skip += bytes.len() as u64;
                pieces.push(Piece { start, bytes });
            }
            Err(_) => skip += STEP - start.0 % STEP,
        }
    }
    pieces
}

/// Where BTF lies: its magic number, version 1, no flags, a header of 24 bytes, types right behind
/// it and strings right behind them (include/uapi/linux/btf.h).
fn types_in(piece: &Piece<'_>) -> Option<(VirtAddr, VirtAddr)> {
    const HEADER: u64 = 24;
    const START: [u8; 12] = [0x9f, 0xeb, 1, 0, HEADER as u8, 0, 0, 0, 0, 0, 0, 0];
    /// A kernel's types take megabytes; what is smaller is a program's, or chance.
    const LEAST: u64 = 64 << 10;
    let found = memchr::memmem::find_iter(&piece.bytes, &START).filter_map(|at| {
        let word = |skip| bytes::u32_at(&piece.bytes, at + skip).map(u64::from);
        let (types, strings_at, strings) = (word(12)?, word(16)?, word(20)?);
        let length = HEADER + types + strings;
        let fits = at as u64 + length <= piece.bytes.len() as u64;
        let start = piece.start.offset(at as u64);
        (types == strings_at && length >= LEAST && fits).then(|| (start, start.offset(length)))
    });
    found.max_by_key(|(start, stop)| stop.0 - start.0)
}

/// The head of the list of modules (`modules`, kernel/module/main.c).
fn module_list(kernel: &Kernel<'_>) -> Option<VirtAddr> {
    let list = kernel.offset("module", "list").ok()?;
    let itself = kernel.offset("module", "mkobj.mod").ok()?;
    let memory = kernel.memory();
    let is_head = |at: VirtAddr, first: VirtAddr| {
        let module = first.back(list);
        memory.pointer(first.offset(8)) == Ok(at)
            && memory.pointer(module.offset(itself)) == Ok(module)
    };
    pieces(kernel).iter().find_map(|piece| {
        let words = piece.bytes.chunks_exact(8).enumerate();
        words.into_iter().find_map(|(index, word)| {
            let first = VirtAddr(bytes::u64_at(word, 0)?);
            let at = piece.start.offset(index as u64 * 8);
            let pointer = first.0 >> 52 == 0xfff && first.0.is_multiple_of(8) && first != at;
            (pointer && is_head(at, first)).then_some(at)
        })
    })
}
