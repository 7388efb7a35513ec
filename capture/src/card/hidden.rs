//! Data symbols of a kernel whose symbol table has functions only (CONFIG_KALLSYMS_ALL is off, as on
//! Debian's arm64 kernels up to 6.1).
//!
//! Variables that modules may use are in the kernel's table of exports: entries of three 32-bit words,
//! each relative to its own place (struct kernel_symbol; kernel/module/internal.h, 6.1). It is found by
//! the entry of `init_uts_ns`, whose address VMCOREINFO has. Types are known by their header. Per-CPU
//! variables are among the types, by their place in `.data..percpu`; where that begins follows from one
//! of them that is exported as well. The image's constants are read once for all of this.

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

/// What is looked through: constants follow the code, and no kernel has more of them.
const MAX_CONSTANTS: u64 = 48 << 20;
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
}

impl Hidden {
    /// Looks through what lies from `text_end` on.
    pub fn find(memory: &mut KernelMemory<'_>, info: &Vmcoreinfo, text_end: u64) -> Hidden {
        let mut hidden = Hidden { types: None, anchor: None, per_cpu: None };
        let last = info.symbols().filter(|&it| it.wrapping_sub(text_end) < MAX_CONSTANTS).max();
        let end = last.unwrap_or(text_end).saturating_add(1 << 20);
        memory.allow(2 * end.saturating_sub(text_end));
        let known = info.symbol(ANCHOR);
        let mut at = text_end & !(BLOCK as u64 - 1);
        while at < end && (hidden.types.is_none() || hidden.anchor.is_none()) {
            let mut block = [0; BLOCK];
            if memory.read(at, &mut block).is_some() {
                hidden.look_through(memory, at, &block, known);
            }
            at = at.saturating_add(BLOCK as u64);
        }
        hidden.per_cpu = hidden.find_per_cpu(memory);
        hidden
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
