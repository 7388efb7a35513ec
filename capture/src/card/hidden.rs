//! Data symbols of a kernel whose symbol table has functions only (CONFIG_KALLSYMS_ALL is off, as on
//! Debian's arm64 kernels up to 6.1).
//!
//! Variables that modules may use are in the kernel's table of exports: entries of three 32-bit words,
//! each relative to its own place (struct kernel_symbol; kernel/module/internal.h, 6.1). It is found by
//! the entry of `init_uts_ns`, whose address VMCOREINFO has. Types are known by their header. Per-CPU
//! variables are among the types, by their place in `.data..percpu`; where that begins follows from one
//! of them that is exported as well. The image's constants are read once for all of this. The list of
//! modules is known by its first element: a module points to itself, and back to the list's head. Its head
//! is in the image's data, which are read once for it.

use crate::vmcoreinfo::Vmcoreinfo;

use super::btf;
use super::memory::KernelMemory;

/// Size of an entry of the table of exports.
const ENTRY: u64 = 12;
/// Between the tables of EXPORT_SYMBOL and EXPORT_SYMBOL_GPL can be so many words of padding.
const GAP: u32 = 16;
/// More than any kernel exports.
const MAX_EXPORTS: u32 = 1 << 16;
/// Longest name that is looked for.
const NAME: usize = 32;
/// An exported symbol that VMCOREINFO knows too.
const ANCHOR: &str = "init_uts_ns";

/// Per-CPU variables that are exported (kernel/sched/core.c, mm/vmstat.c, net/core/dev.c,
/// arch/arm64/kernel/smp.c; 6.1).
const EXPORTED_PER_CPU: [&str; 4] = ["kstat", "vm_event_states", "softnet_data", "cpu_number"];

/// How types begin: magic number, version 1, no flags, a header of 24 bytes.
const TYPES: [u8; 8] = [0x9f, 0xeb, 1, 0, 24, 0, 0, 0];
/// A kernel's types take megabytes; what is smaller is chance.
const LEAST_TYPES: u64 = 64 << 10;

/// What is looked through: constants and data follow the code, and no kernel has more of them.
const MAX_CONSTANTS: u64 = 48 << 20;
/// What is not known of the image lies so close to what is.
const MARGIN: u64 = 1 << 20;
/// Modules are not farther from the image than a branch reaches, through a table at most (module_alloc,
/// arch/arm64/kernel/module.c, 6.1).
const MODULES_REACH: u64 = 4 << 30;
/// Bytes that are read at once.
const BLOCK: usize = 2048;

/// What was found.
#[derive(Clone, Copy)]
pub struct Hidden {
    /// Where the types begin and end.
    pub types: Option<(u64, u64)>,
    /// The anchor's entry in the table of exports.
    anchor: Option<u64>,
    /// Where `.data..percpu` begins, as a symbol table would have it, and how large it is.
    pub per_cpu: Option<(u64, u64)>,
    /// The head of the list of modules.
    modules: Option<u64>,
    /// Where the image begins and ends, and where its code does.
    image: (u64, u64),
    text_end: u64,
}

impl Hidden {
    fn new(info: &Vmcoreinfo, text_end: u64) -> Hidden {
        let last = info.symbols().filter(|&it| it.wrapping_sub(text_end) < MAX_CONSTANTS).max();
        let end = last.unwrap_or(text_end).saturating_add(MARGIN);
        let image = (info.symbol("_stext").unwrap_or(text_end).saturating_sub(MARGIN), end);
        Hidden { types: None, anchor: None, per_cpu: None, modules: None, image, text_end }
    }

    /// Looks through what lies from `text_end` on.
    pub fn find(memory: &mut KernelMemory<'_>, info: &Vmcoreinfo, text_end: u64) -> Hidden {
        let mut hidden = Hidden::new(info, text_end);
        let known = info.symbol(ANCHOR);
        let mut at = text_end;
        while let Some((start, block)) = hidden.next_block(memory, &mut at) {
            hidden.look_through(memory, start, &block, known);
            if hidden.types.is_some() && hidden.anchor.is_some() {
                break;
            }
        }
        hidden.per_cpu = hidden.find_per_cpu(memory);
        hidden
    }

    /// The block of the image's constants and data at or behind `at` that can be read, and where it
    /// begins; `at` is behind it then.
    fn next_block(
        &self,
        memory: &mut KernelMemory<'_>,
        at: &mut u64,
    ) -> Option<(u64, [u8; BLOCK])> {
        while *at < self.image.1 {
            let start = *at & !(BLOCK as u64 - 1);
            *at = start.saturating_add(BLOCK as u64);
            memory.allow(2 * BLOCK as u64);
            let mut block = [0; BLOCK];
            if memory.read(start, &mut block).is_some() {
                return Some((start, block));
            }
        }
        None
    }

    /// Looks for the list of modules (`modules`, kernel/module/main.c, 6.1). In a struct module, `list` is
    /// where it is linked and `itself` where it points to itself (mkobj.mod).
    pub fn find_modules(
        &mut self,
        memory: &mut KernelMemory<'_>,
        list: u64,
        itself: u64,
    ) -> Option<u64> {
        // Data follow the types, which are constants.
        let mut at = self.types.map_or(self.text_end, |types| types.1);
        while let Some((start, block)) = self.next_block(memory, &mut at) {
            let (words, _) = block.as_chunks::<8>();
            for (index, word) in (0u64..).zip(words) {
                let (head, first) = (start + index * 8, u64::from_le_bytes(*word));
                if self.may_be_module(first) && is_module_list(memory, head, first, list, itself) {
                    self.modules = Some(head);
                    return self.modules;
                }
            }
        }
        None
    }

    /// Whether a module may be at `at`: near the image, and not in it.
    fn may_be_module(&self, at: u64) -> bool {
        let (start, end) = self.image;
        at.is_multiple_of(8) && !(start..end).contains(&at) && at.abs_diff(start) < MODULES_REACH
    }

    fn look_through(
        &mut self,
        memory: &mut KernelMemory<'_>,
        at: u64,
        block: &[u8; BLOCK],
        known: Option<u64>,
    ) {
        let (words, _) = block.as_chunks::<4>();
        for (index, word) in (0u64..).zip(words) {
            // Within the block, which may be the last one of all addresses.
            let place = at + index * 4;
            if self.types.is_none() && *word == TYPES[..4] {
                self.types = types_at(memory, place);
            }
            let is_known = known == Some(relative(place, *word));
            if self.anchor.is_none() && is_known && is_called(memory, place, ANCHOR) {
                self.anchor = Some(place);
            }
        }
    }

    /// Finds the addresses of `names`, each into the slot of the same index.
    pub fn find_all<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        names: &[&str; N],
    ) -> [Option<u64>; N] {
        let mut found = self.exported(memory, names);
        if let Some((types, (base, _))) = self.types.zip(self.per_cpu) {
            let (offsets, _) = btf::per_cpu_variables(memory, types, names);
            for (slot, offset) in found.iter_mut().zip(offsets) {
                *slot = slot.or(offset.and_then(|offset| base.checked_add(offset.into())));
            }
        }
        for (slot, name) in found.iter_mut().zip(names) {
            *slot = match *name {
                "modules" => self.modules,
                "__start_BTF" => self.types.map(|types| types.0),
                "__stop_BTF" => self.types.map(|types| types.1),
                "__per_cpu_start" => self.per_cpu.map(|(start, _)| start),
                "__per_cpu_end" => self.per_cpu.and_then(|(start, size)| start.checked_add(size)),
                _ => *slot,
            };
        }
        found
    }

    fn exported<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        names: &[&str; N],
    ) -> [Option<u64>; N] {
        let mut found = [None; N];
        let Some(anchor) = self.anchor else { return found };
        for forward in [true, false] {
            let (mut at, mut misses) = (anchor, 0);
            for _ in 0..MAX_EXPORTS {
                let mut buffer = [0; NAME];
                let name = name_of(memory, at, &mut buffer);
                let step = if name.is_some() { ENTRY } else { 4 };
                misses = if name.is_some() { 0 } else { misses + 1 };
                if misses > GAP {
                    break;
                }
                let wanted = found.iter_mut().zip(names);
                for (slot, _) in wanted.filter(|(_, it)| name == Some(it.as_bytes())) {
                    *slot = memory.bytes(at).map(|word| relative(at, word));
                }
                let next = if forward { at.checked_add(step) } else { at.checked_sub(step) };
                let Some(next) = next else { break };
                at = next;
            }
        }
        found
    }

    fn find_per_cpu(&self, memory: &mut KernelMemory<'_>) -> Option<(u64, u64)> {
        let exported = self.exported(memory, &EXPORTED_PER_CPU);
        let (offsets, size) = btf::per_cpu_variables(memory, self.types?, &EXPORTED_PER_CPU);
        let both = exported.into_iter().zip(offsets).find_map(|(at, offset)| at.zip(offset));
        let (at, offset) = both?;
        Some((at.checked_sub(offset.into())?, size.into()))
    }
}

/// Whether `head` is the head of the list whose first node, at `first`, is a module's.
fn is_module_list(
    memory: &mut KernelMemory<'_>,
    head: u64,
    first: u64,
    list: u64,
    itself: u64,
) -> bool {
    let back = first.checked_add(8).and_then(|at| memory.u64(at));
    let module = first.checked_sub(list).filter(|_| back == Some(head));
    let Some((module, place)) = module.and_then(|at| Some((at, at.checked_add(itself)?))) else {
        return false;
    };
    memory.u64(place) == Some(module)
}

/// The address that a word at `place` means, which is relative to that.
fn relative(place: u64, word: [u8; 4]) -> u64 {
    place.wrapping_add_signed(i32::from_le_bytes(word).into())
}

/// The name of the entry at `at`, as much of it as there is room for; `None` when it cannot be one.
fn name_of<'b>(
    memory: &mut KernelMemory<'_>,
    at: u64,
    buffer: &'b mut [u8; NAME],
) -> Option<&'b [u8]> {
    let place = at.checked_add(4)?;
    let name = relative(place, memory.bytes(place)?);
    let length = memory.text(name, buffer);
    let name = buffer.get(..length).filter(|name| !name.is_empty())?;
    let allowed = |byte: &u8| byte.is_ascii_alphanumeric() || matches!(byte, b'_' | b'.' | b'$');
    name.iter().all(allowed).then_some(name)
}

fn is_called(memory: &mut KernelMemory<'_>, at: u64, name: &str) -> bool {
    name_of(memory, at, &mut [0; NAME]) == Some(name.as_bytes())
}

/// Where types that begin at `at` end; `None` when there are none. They lie right behind their header
/// and the strings behind them (Documentation/bpf/btf.rst, 6.12).
fn types_at(memory: &mut KernelMemory<'_>, at: u64) -> Option<(u64, u64)> {
    if memory.bytes::<8>(at)? != TYPES {
        return None;
    }
    let mut word = |skip| memory.u32(at.checked_add(skip)?).map(u64::from);
    let (types_at, types, strings_at, strings) = (word(8)?, word(12)?, word(16)?, word(20)?);
    let fits = types_at == 0 && strings_at == types && types >= LEAST_TYPES;
    let end = at.checked_add(24)?.checked_add(types)?.checked_add(strings)?;
    fits.then_some((at, end))
}

#[cfg(test)]
#[path = "hidden_tests.rs"]
mod tests;
