//! BTF, the kernel's own description of its types: where members of a few structures lie.
//!
//! Documentation/bpf/btf.rst and include/uapi/linux/btf.h, 6.12. There is no room for an index of a
//! hundred thousand types, so they are read from the first to the last, once for all members that
//! are wanted; a second time only for those that hide in an anonymous structure or union.

use heapless::Vec;

use super::memory::KernelMemory;

const MAGIC: u16 = 0xeb9f;
/// Size of struct btf_type, which every record begins with, and of struct btf_member.
const RECORD: u64 = 12;
const MEMBER: u64 = 12;
/// More types than any kernel has.
const MAX_TYPES: u32 = 1 << 20;
/// Longer names are not looked for.
const NAME: usize = 32;

/// Kinds of types that matter, and those whose records are longer than the head.
mod kind {
    pub const INT: u32 = 1;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const DECL_TAG: u32 = 17;
    pub const ENUM64: u32 = 19;
}

/// The section of per-CPU variables.
const PER_CPU: &[u8] = b".data..percpu";

/// A structure and a member of it.
pub type Wanted = (&'static str, &'static str);

/// An anonymous member in which wanted ones may be.
#[derive(Clone, Copy)]
struct Anonymous {
    /// The structure that it is in.
    structure: &'static str,
    kind: u32,
    offset: u32,
}

/// The section as it lies in memory.
struct Section {
    types: u64,
    types_end: u64,
    strings: u64,
}

struct Record {
    at: u64,
    name: u32,
    kind: u32,
    length: u32,
    /// Whether the upper byte of a member's offset is the width of a bit field.
    has_bit_fields: bool,
}

/// Finds the offsets of `wanted` members in the section at `start..stop`, in bytes. `enough` says when
/// no further one is worth the search.
pub fn offsets<const N: usize>(
    memory: &mut KernelMemory<'_>,
    (start, stop): (u64, u64),
    wanted: &[Wanted; N],
    enough: &dyn Fn(&[Option<u32>; N]) -> bool,
) -> [Option<u32>; N] {
    let mut found = [None; N];
    let Some(section) = Section::open(memory, start, stop) else { return found };
    let mut hidden: Vec<Anonymous, 8> = Vec::new();
    section.each(memory, &mut |memory, _, record| {
        if record.kind == kind::STRUCT
            && let Some(structure) = section.wanted_name(memory, record.name, wanted)
        {
            section.search(memory, record, (structure, 0), wanted, &mut found, &mut hidden);
            return !enough(&found);
        }
        true
    });
    let mut left = hidden.len();
    if left > 0 && !enough(&found) {
        section.each(memory, &mut |memory, id, record| {
            for &Anonymous { structure, offset, .. } in hidden.iter().filter(|it| it.kind == id) {
                // One level deep is as deep as kernels hide what is wanted here.
                let deeper = &mut Vec::new();
                let place = (structure, offset);
                section.search(memory, record, place, wanted, &mut found, deeper);
                left = left.saturating_sub(1);
            }
            left > 0
        });
    }
    found
}

/// Finds where the per-CPU variables `names` lie in `.data..percpu`, in bytes, and how large that is.
pub fn per_cpu_variables<const N: usize>(
    memory: &mut KernelMemory<'_>,
    (start, stop): (u64, u64),
    names: &[&str; N],
) -> ([Option<u32>; N], u32) {
    let (mut ids, mut data) = ([None; N], None);
    let Some(section) = Section::open(memory, start, stop) else { return ([None; N], 0) };
    section.each(memory, &mut |memory, id, record| {
        let mut buffer = [0; NAME];
        match record.kind {
            kind::VAR => {
                let text = section.text(memory, record.name, &mut buffer);
                let wanted = ids.iter_mut().zip(names);
                let named = wanted.filter(|(_, name)| name.as_bytes() == text);
                named.for_each(|(slot, _)| *slot = Some(id));
            }
            kind::DATASEC if section.text(memory, record.name, &mut buffer) == PER_CPU => {
                let size = memory.u32(record.at.saturating_add(RECORD - 4));
                data = Some((record.at, record.length, size.unwrap_or(0)));
            }
            _ => {}
        }
        true
    });
    let Some((at, length, size)) = data else { return ([None; N], 0) };
    // struct btf_var_secinfo: the variable, its offset, its size.
    let mut offsets = [None; N];
    for index in 0..u64::from(length) {
        let at = at.saturating_add(RECORD + index * MEMBER);
        let Some((id, offset)) = memory.u32(at).zip(memory.u32(at.saturating_add(4))) else {
            break;
        };
        let wanted = offsets.iter_mut().zip(ids).filter(|(_, wanted)| *wanted == Some(id));
        wanted.for_each(|(slot, _)| *slot = Some(offset));
    }
    (offsets, size)
}

impl Section {
    fn open(memory: &mut KernelMemory<'_>, start: u64, stop: u64) -> Option<Section> {
        if memory.u16(start)? != MAGIC {
            return None;
        }
        let header = start.checked_add(memory.u32(start.checked_add(4)?)?.into())?;
        let mut word = |offset| memory.u32(start.checked_add(offset)?).map(u64::from);
        let types = header.checked_add(word(8)?)?;
        let types_end = types.checked_add(word(12)?)?;
        let strings = header.checked_add(word(16)?)?;
        (types_end <= stop && strings <= stop).then_some(Section { types, types_end, strings })
    }

    /// Gives every record to `each`, with its number, until that returns false.
    fn each(
        &self,
        memory: &mut KernelMemory<'_>,
        each: &mut dyn FnMut(&mut KernelMemory<'_>, u32, &Record) -> bool,
    ) {
        let mut at = self.types;
        for id in 1..=MAX_TYPES {
            if at >= self.types_end {
                return;
            }
            let Some(head) = memory.bytes::<8>(at) else { return };
            let [name, info] = [0, 4]
                .map(|it| u32::from_le_bytes([head[it], head[it + 1], head[it + 2], head[it + 3]]));
            let record = Record {
                at,
                name,
                kind: info >> 24 & 0x1f,
                length: info & 0xffff,
                has_bit_fields: info >> 31 != 0,
            };
            let Some(size) = record.size() else { return };
            if !each(memory, id, &record) {
                return;
            }
            at = at.saturating_add(size);
        }
    }

    /// The wanted structure that is called as the text at `name` says.
    fn wanted_name<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        name: u32,
        wanted: &[Wanted; N],
    ) -> Option<&'static str> {
        let first = memory.u8(self.strings.checked_add(name.into())?)?;
        if !wanted.iter().any(|(structure, _)| structure.as_bytes().first() == Some(&first)) {
            return None;
        }
        let mut buffer = [0; NAME];
        let text = self.text(memory, name, &mut buffer);
        wanted.iter().find(|(it, _)| it.as_bytes() == text).map(|&(structure, _)| structure)
    }

    fn text<'b>(
        &self,
        memory: &mut KernelMemory<'_>,
        name: u32,
        buffer: &'b mut [u8; NAME],
    ) -> &'b [u8] {
        let length = memory.text(self.strings.saturating_add(name.into()), buffer);
        buffer.get(..length).unwrap_or_default()
    }

    /// Looks through the members of a record for those wanted of `structure`, which it is, or lies in
    /// at an offset.
    fn search<const N: usize>(
        &self,
        memory: &mut KernelMemory<'_>,
        record: &Record,
        (structure, base): (&'static str, u32),
        wanted: &[Wanted; N],
        found: &mut [Option<u32>; N],
        hidden: &mut Vec<Anonymous, 8>,
    ) {
        if !matches!(record.kind, kind::STRUCT | kind::UNION) {
            return;
        }
        let mut anonymous: Vec<Anonymous, 8> = Vec::new();
        for index in 0..u64::from(record.length) {
            let at = record.at.saturating_add(RECORD + index * MEMBER);
            let words = [0, 4, 8].map(|skip| memory.u32(at.saturating_add(skip)));
            let [Some(name), Some(kind), Some(bits)] = words else { return };
            let bits = if record.has_bit_fields { bits & 0x00ff_ffff } else { bits };
            let offset = base.saturating_add(bits / 8);
            let mut buffer = [0; NAME];
            let text = self.text(memory, name, &mut buffer);
            if text.is_empty() {
                let _ = anonymous.push(Anonymous { structure, kind, offset });
            }
            let slots = found.iter_mut().zip(wanted).filter(|(slot, _)| slot.is_none());
            for (slot, &(of, member)) in slots {
                if of == structure && member.as_bytes() == text {
                    *slot = Some(offset);
                }
            }
        }
        let has = |(slot, &(of, _)): (&Option<u32>, &Wanted)| slot.is_some() && of == structure;
        if !found.iter().zip(wanted).any(has) {
            let _ = hidden.extend_from_slice(&anonymous);
        }
    }
}

impl Record {
    /// Bytes of the whole record; `None` for a kind that is not known.
    fn size(&self) -> Option<u64> {
        let length = u64::from(self.length);
        let rest = match self.kind {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => length * 12,
            kind::ENUM | kind::FUNC_PROTO => length * 8,
            1..=kind::ENUM64 => 0,
            _ => return None,
        };
        Some(RECORD + rest)
    }
}

#[cfg(test)]
#[path = "btf_tests.rs"]
mod tests;
