//! BTF: the kernel's own description of its types, read out of its memory.
//!
//! Documentation/bpf/btf.rst and include/uapi/linux/btf.h, 6.12. One pass over the type records
//! notes where each begins; structures are decoded when they are asked for.

mod decode;

use std::borrow::Cow;
use std::ops::Range;

use crate::bytes::{self, u32_at};

use super::types::TypeId;

const MAGIC: u16 = 0xeb9f;
/// Size of struct btf_header.
const HEADER: u32 = 24;
/// Size of struct btf_type, which every record begins with.
const RECORD: usize = 12;
/// Size of struct btf_member.
const MEMBER: usize = 12;
/// Bound for chains of typedefs and nested anonymous structures.
const MAX_DEPTH: u32 = 32;
/// More nameless structures than any structure has.
const MAX_NAMELESS: usize = 1 << 10;

/// Kinds of types that are looked into here.
mod kind {
    pub const INT: u32 = 1;
    pub const PTR: u32 = 2;
    pub const ARRAY: u32 = 3;
    pub const STRUCT: u32 = 4;
    pub const UNION: u32 = 5;
    pub const ENUM: u32 = 6;
    pub const FWD: u32 = 7;
    pub const TYPEDEF: u32 = 8;
    pub const VOLATILE: u32 = 9;
    pub const CONST: u32 = 10;
    pub const RESTRICT: u32 = 11;
    pub const FUNC: u32 = 12;
    pub const FUNC_PROTO: u32 = 13;
    pub const VAR: u32 = 14;
    pub const DATASEC: u32 = 15;
    pub const FLOAT: u32 = 16;
    pub const DECL_TAG: u32 = 17;
    pub const TYPE_TAG: u32 = 18;
    pub const ENUM64: u32 = 19;
}

/// A member of a structure, perhaps a nested one.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Field {
    /// Offset from the start of the outermost structure, in bytes.
    pub offset: usize,
    /// Offset of a bit field's lowest bit in the byte at `offset`; 0 for others.
    pub bit: u32,
    /// Width of a bit field in bits; 0 for others.
    pub width: u32,
    /// The member's type.
    pub kind: TypeId,
}

/// A variable of a section.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Variable {
    /// Its name.
    pub name: String,
    /// Where it lies, in bytes from the section's start.
    pub offset: u32,
    /// Its size in bytes.
    pub size: u32,
}

/// The types of a kernel.
pub struct Btf<'a> {
    data: Cow<'a, [u8]>,
    types: Range<usize>,
    strings: Range<usize>,
    /// Where each type's record begins in `types`; type 0 is void and has none.
    starts: Vec<u32>,
    /// Structures and unions: (offset of the name, number).
    structures: Vec<(u32, TypeId)>,
    whole: bool,
}

/// Where types and strings lie in a blob, by its header (struct btf_header).
fn sections(data: &[u8]) -> Result<(Range<usize>, Range<usize>), String> {
    if bytes::u16_at(data, 0) != Some(MAGIC) {
        return Err("BTF does not begin with its magic number".to_owned());
    }
    let header = u32_at(data, 4).unwrap_or(u32::MAX) as usize;
    let section = |at: usize| {
        let start = header.checked_add(u32_at(data, at)? as usize)?;
        let end = start.checked_add(u32_at(data, at + 4)? as usize)?;
        (end <= data.len()).then_some(start..end)
    };
    let sections = section(8).zip(section(16));
    sections.ok_or_else(|| "the sections of BTF lie outside of it".to_owned())
}

#[derive(Clone, Copy)]
struct Record {
    at: usize,
    name: u32,
    kind: u32,
    length: usize,
    flag: bool,
    /// Size in bytes or number of another type, depending on the kind.
    size_or_type: u32,
}

impl<'a> Btf<'a> {
    /// Indexes the types in `data`. A record that makes no sense ends the index; what came before
    /// it stays usable.
    ///
    /// # Errors
    /// A sentence that says what is wrong with the header.
    pub fn parse(data: Cow<'a, [u8]>) -> Result<Btf<'a>, String> {
        let (types, strings) = sections(&data)?;
        let mut btf =
            Btf { data, types, strings, starts: Vec::new(), structures: Vec::new(), whole: false };
        btf.index();
        Ok(btf)
    }

    /// These types and those of `split`, which goes on where these end: its numbers of types and its places
    /// of texts continue theirs.
    ///
    /// # Errors
    /// A sentence that says what is wrong with its header.
    pub fn with_more(&self, split: &[u8]) -> Result<Btf<'static>, String> {
        if !self.whole {
            return Err(
                "the kernel's own types, which they go on from, are not all there".to_owned()
            );
        }
        let (types, strings) = sections(split)?;
        let all = [
            &self.data[self.types.clone()],
            &split[types],
            &self.data[self.strings.clone()],
            &split[strings],
        ];
        let length = |parts: &[&[u8]]| parts.iter().map(|part| part.len() as u32).sum::<u32>();
        let (types, strings) = (length(&all[..2]), length(&all[2..]));
        let mut data = [&MAGIC.to_le_bytes()[..], &[1, 0]].concat();
        let header = [HEADER, 0, types, types, strings];
        data.extend(header.into_iter().flat_map(u32::to_le_bytes));
        all.iter().for_each(|part| data.extend_from_slice(part));
        Btf::parse(Cow::Owned(data))
    }

    fn index(&mut self) {
        let mut at = 0;
        let mut starts = Vec::with_capacity(self.types.len() / 32);
        let mut structures = Vec::new();
        while let Some(record) = self.record_at(at) {
            let Some(size) = record.size() else { break };
            starts.push(at as u32);
            let id = TypeId(starts.len() as u32);
            if matches!(record.kind, kind::STRUCT | kind::UNION) && record.name != 0 {
                structures.push((record.name, id));
            }
            at += size;
        }
        self.whole = at == self.types.len();
        (self.starts, self.structures) = (starts, structures);
    }

    /// The same, known to have holes where not even records show them.
    #[must_use]
    pub fn torn(self) -> Btf<'a> {
        Btf { whole: false, ..self }
    }

    /// Whether every record could be read; false when damage hides all types behind it.
    #[must_use]
    pub fn is_whole(&self) -> bool {
        self.whole
    }

    /// Number of types.
    #[must_use]
    pub fn len(&self) -> usize {
        self.starts.len()
    }

    /// Whether there are none.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.starts.is_empty()
    }

    /// The structure or union called `name`.
    #[must_use]
    pub fn structure(&self, name: &str) -> Option<TypeId> {
        let at = self.text_offset(name)?;
        self.structures.iter().find(|(offset, _)| *offset == at).map(|&(_, id)| id)
    }

    /// Where the text `name` is among the strings, each of which is there once.
    fn text_offset(&self, name: &str) -> Option<u32> {
        let strings = self.data.get(self.strings.clone())?;
        let needle = [b"\0", name.as_bytes(), b"\0"].concat();
        Some(memchr::memmem::find(strings, &needle)? as u32 + 1)
    }

    /// The member `path` (names joined by dots) of the structure called `name`. Anonymous
    /// structures and unions in between are looked through, as in C.
    #[must_use]
    pub fn member(&self, name: &str, path: &str) -> Option<Field> {
        self.member_of(self.structure(name)?, path)
    }

    /// The member `path` of the structure `id`.
    #[must_use]
    pub fn member_of(&self, id: TypeId, path: &str) -> Option<Field> {
        let mut field = Field { offset: 0, bit: 0, width: 0, kind: id };
        for name in path.split('.') {
            let inner = self.direct_member(field.kind, name, &mut Vec::new())?;
            let offset = field.offset.checked_add(inner.offset)?;
            field = Field { offset, ..inner };
        }
        Some(field)
    }

    /// `passed` are the places of the structures that are being looked through, or were in vain: a damaged one
    /// may be in itself, many times.
    fn direct_member(&self, id: TypeId, name: &str, passed: &mut Vec<usize>) -> Option<Field> {
        let record = self.resolve(id)?;
        let is_one = matches!(record.kind, kind::STRUCT | kind::UNION);
        if !is_one || passed.contains(&record.at) || passed.len() >= MAX_NAMELESS {
            return None;
        }
        passed.push(record.at);
        let types = self.data.get(self.types.clone())?;
        for index in 0..record.length {
            let at = record.at + RECORD + index * MEMBER;
            let name_at = u32_at(types, at)?;
            let kind = TypeId(u32_at(types, at + 4)?);
            let bits = u32_at(types, at + 8)?;
            // With the flag set, the upper byte is the width of a bit field.
            let (bits, width) =
                if record.flag { (bits & 0x00ff_ffff, bits >> 24) } else { (bits, 0) };
            let outer = Field { offset: bits as usize / 8, bit: bits % 8, width, kind };
            let found = match self.text(name_at) {
                Some(text) if text == name.as_bytes() => Some(outer),
                Some(b"") => self
                    .direct_member(kind, name, passed)
                    .map(|inner| Field { offset: outer.offset + inner.offset, ..inner }),
                _ => None,
            };
            if found.is_some() {
                return found;
            }
        }
        None
    }

    fn size_at_depth(&self, id: TypeId, depth: u32) -> Option<usize> {
        let record = self.resolve(id)?;
        match record.kind {
            kind::INT | kind::STRUCT | kind::UNION | kind::ENUM | kind::ENUM64 => {
                Some(record.size_or_type as usize)
            }
            kind::PTR => Some(8),
            kind::ARRAY if depth <= MAX_DEPTH => {
                let (element, count) = self.array(record)?;
                self.size_at_depth(element, depth + 1)?.checked_mul(count)
            }
            _ => None,
        }
    }

    /// Element type and number of elements of the array type `id`.
    #[must_use]
    pub fn array_of(&self, id: TypeId) -> Option<(TypeId, usize)> {
        self.resolve(id).filter(|record| record.kind == kind::ARRAY).and_then(|it| self.array(it))
    }

    fn array(&self, record: Record) -> Option<(TypeId, usize)> {
        let types = self.data.get(self.types.clone())?;
        let element = u32_at(types, record.at + RECORD)?;
        let count = u32_at(types, record.at + RECORD + 8)?;
        Some((TypeId(element), count as usize))
    }

    /// The variables of the section called `section`: names, offsets from its start and sizes in
    /// bytes. Kernels describe their per-CPU variables so, in `.data..percpu`.
    #[must_use]
    pub fn variables(&self, section: &str) -> Vec<Variable> {
        let starts = self.starts.iter().rev().map(|&at| self.record_at(at as usize));
        let wanted = starts.flatten().find(|record| {
            record.kind == kind::DATASEC && self.text(record.name) == Some(section.as_bytes())
        });
        let Some(record) = wanted else { return Vec::new() };
        (0..record.length).filter_map(|index| self.variable(record, index)).collect()
    }

    fn variable(&self, section: Record, index: usize) -> Option<Variable> {
        let types = self.data.get(self.types.clone())?;
        let at = section.at + RECORD + index * MEMBER;
        let variable = self.record(TypeId(u32_at(types, at)?))?;
        let name = String::from_utf8_lossy(self.text(variable.name)?).into_owned();
        let (offset, size) = (u32_at(types, at + 4)?, u32_at(types, at + 8)?);
        (variable.kind == kind::VAR).then_some(Variable { name, offset, size })
    }

    /// Looks through typedefs and qualifiers.
    fn resolve(&self, mut id: TypeId) -> Option<Record> {
        for _ in 0..MAX_DEPTH {
            let record = self.record(id)?;
            match record.kind {
                kind::TYPEDEF | kind::VOLATILE | kind::CONST | kind::RESTRICT | kind::TYPE_TAG => {
                    id = TypeId(record.size_or_type)
                }
                _ => return Some(record),
            }
        }
        None
    }

    fn record(&self, id: TypeId) -> Option<Record> {
        let index = (id.0 as usize).checked_sub(1)?;
        self.record_at(*self.starts.get(index)? as usize)
    }

    fn record_at(&self, at: usize) -> Option<Record> {
        let types = self.data.get(self.types.clone())?;
        let words: [u8; RECORD] = bytes::array(types, at)?;
        let info = u32_at(&words, 4)?;
        Some(Record {
            at,
            name: u32_at(&words, 0)?,
            kind: info >> 24 & 0x1f,
            length: (info & 0xffff) as usize,
            flag: info >> 31 != 0,
            size_or_type: u32_at(&words, 8)?,
        })
    }

    fn text(&self, offset: u32) -> Option<&[u8]> {
        let rest = self.data.get(self.strings.clone())?.get(offset as usize..)?;
        Some(&rest[..memchr::memchr(0, rest)?])
    }
}

impl Record {
    /// Bytes of the whole record; `None` for a kind that is not known.
    fn size(self) -> Option<usize> {
        let rest = match self.kind {
            kind::INT | kind::VAR | kind::DECL_TAG => 4,
            kind::ARRAY => 12,
            kind::STRUCT | kind::UNION | kind::DATASEC | kind::ENUM64 => self.length * 12,
            kind::ENUM | kind::FUNC_PROTO => self.length * 8,
            1..=kind::ENUM64 => 0,
            _ => return None,
        };
        Some(RECORD + rest)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::super::types::Types;
    use super::*;

    /// ```c
    /// typedef int number;                            // 1 int, 2 number
    /// struct inner { number low; number wide[3]; };  // 3 array, 4 inner
    /// union { struct inner in; int other; };         // 5, anonymous
    /// struct outer { number first; <the union>; unsigned flags:3, signal:1; };  // 6
    /// ```
    fn blob() -> Vec<u8> {
        let strings = b"\0int\0number\0inner\0low\0wide\0in\0other\0outer\0first\0flags\0signal\0";
        let text = |name: &str| {
            let needle = format!("\0{name}\0");
            memchr::memmem::find(strings, needle.as_bytes()).unwrap() as u32 + 1
        };
        let info = |kind: u32, length: u32| kind << 24 | length;
        let words: Vec<u32> = [
            &[text("int"), info(kind::INT, 0), 4, 32][..],
            &[text("number"), info(kind::TYPEDEF, 0), 1],
            &[0, info(kind::ARRAY, 0), 0, 2, 1, 3],
            &[text("inner"), info(kind::STRUCT, 2), 16],
            &[text("low"), 2, 0, text("wide"), 3, 32],
            &[0, info(kind::UNION, 2), 16, text("in"), 4, 0, text("other"), 1, 0],
            &[text("outer"), 1 << 31 | info(kind::STRUCT, 4), 24],
            &[text("first"), 2, 0, 0, 5, 32],
            &[text("flags"), 1, 3 << 24 | 160, text("signal"), 1, 1 << 24 | 163],
        ]
        .concat();
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        let header = [24, 0, types.len() as u32, types.len() as u32, strings.len() as u32];
        blob.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        blob.extend_from_slice(&types);
        blob.extend_from_slice(strings);
        blob
    }

    fn types() -> Btf<'static> {
        Btf::parse(blob().into()).unwrap()
    }

    #[test]
    fn members_are_found_by_name() {
        let types = types();
        assert_eq!((types.len(), types.is_whole()), (6, true));
        assert_eq!(types.member("inner", "wide").unwrap().offset, 4);
        assert_eq!(types.member("inner", "none"), None);
        assert_eq!(types.member("none", "low"), None);
    }

    #[test]
    fn anonymous_members_are_looked_through() {
        assert_eq!(types().member("outer", "other").unwrap().offset, 4);
        assert_eq!(types().member("outer", "in.wide").unwrap().offset, 8);
    }

    #[test]
    fn bit_fields_have_a_byte_and_a_bit() {
        let signal = types().member("outer", "signal").unwrap();
        assert_eq!((signal.offset, signal.bit, signal.width), (20, 3, 1));
    }

    #[test]
    fn sizes_look_through_typedefs_and_arrays() {
        let types = types();
        let wide = types.member("inner", "wide").unwrap().kind;
        assert_eq!(types.size_of(wide), Some(12));
        assert_eq!(types.array_of(wide), Some((TypeId(2), 3)));
        assert_eq!(types.size_of(types.structure("outer").unwrap()), Some(24));
        assert_eq!(types.size_of(TypeId(99)), None);
    }

    #[test]
    fn variables_of_a_section_are_listed() {
        // Two more types: a variable called `inner` of type 4, and the section `outer` with it.
        let blob = blob();
        let length = bytes::u32_at(&blob, 12).unwrap() as usize;
        let text = |name: &str| {
            let needle = format!("\0{name}\0");
            let strings = &blob[24 + length..];
            memchr::memmem::find(strings, needle.as_bytes()).unwrap() as u32 + 1
        };
        let words = [text("inner"), kind::VAR << 24, 4, 1];
        let section = [text("outer"), kind::DATASEC << 24 | 2, 0x60, 7, 0x40, 16, 1, 0, 4];
        let more: Vec<u8> = words.iter().chain(&section).flat_map(|it| it.to_le_bytes()).collect();
        let mut longer = blob[..24 + length].to_vec();
        longer.extend_from_slice(&more);
        longer.extend_from_slice(&blob[24 + length..]);
        for at in [12, 16] {
            let value = (length + more.len()) as u32;
            longer[at..at + 4].copy_from_slice(&value.to_le_bytes());
        }
        let types = Btf::parse(longer.into()).unwrap();
        let found = types.variables("outer");
        // What is no variable (type 1) is left out.
        assert_eq!(found, [Variable { name: "inner".to_owned(), offset: 0x40, size: 16 }]);
        assert!(types.variables("inner").is_empty());
    }

    #[test]
    fn what_is_no_btf_is_refused() {
        assert!(Btf::parse(vec![0; 100].into()).is_err());
        let mut lie = blob();
        lie[12] = 0xff;
        lie[13] = 0xff;
        assert!(Btf::parse(lie.into()).is_err());
    }

    #[test]
    fn types_before_damage_stay_known() {
        let mut blob = blob();
        let outer = 24 + 16 + 12 + 24 + 36 + 36;
        blob[outer + 7] = 31;
        let types = Btf::parse(blob.into()).unwrap();
        assert!(!types.is_whole());
        assert!(types.member("inner", "low").is_some());
    }

    #[test]
    fn types_of_a_module_go_on_where_the_kernels_end() {
        let base = types();
        let strings = base.strings.len() as u32;
        // typedef struct outer more; the text is the first of its own.
        let words = [24, 0, 12, 12, 5, strings, kind::TYPEDEF << 24, 6];
        let mut split = vec![0x9f, 0xeb, 1, 0];
        split.extend(words.iter().flat_map(|word| word.to_le_bytes()));
        split.extend_from_slice(b"more\0");
        let both = base.with_more(&split).unwrap();
        let more = both.named("more", |_| true);
        assert_eq!((more.as_slice(), both.len()), (&[TypeId(7)][..], 7));
        assert_eq!(both.size_of(TypeId(7)), Some(24));
        assert!(both.member("outer", "in.wide").is_some());
        assert!(base.with_more(&split[..30]).is_err());
    }

    #[test]
    fn structures_that_are_in_themselves_many_times_end() {
        // A nameless structure of eight nameless members, each of its own type.
        let count = 8;
        let mut words = vec![0, kind::STRUCT << 24 | count, 8];
        words.extend((0..count).flat_map(|_| [0, 1, 0]));
        // A prototype with itself as its parameters.
        words.extend([0, kind::FUNC_PROTO << 24 | count, 2]);
        words.extend((0..count).flat_map(|_| [0, 2]));
        let types: Vec<u8> = words.iter().flat_map(|word| word.to_le_bytes()).collect();
        let mut blob = vec![0x9f, 0xeb, 1, 0];
        let header = [HEADER, 0, types.len() as u32, types.len() as u32, 1];
        blob.extend(header.iter().flat_map(|word| word.to_le_bytes()));
        blob.extend_from_slice(&types);
        blob.push(0);
        let types = Btf::parse(blob.into()).unwrap();
        assert_eq!((types.len(), types.member_of(TypeId(1), "none")), (2, None));
        let _ = types.value(TypeId(1), &[0; 8]);
        assert!(types.declare(TypeId(2), "f").contains("endless"));
        let structure = types.get(TypeId(1)).structure().unwrap();
        assert!(!crate::render::value::declaration(&types, &structure, None).is_empty());
    }

    #[test]
    fn typedef_of_itself_ends() {
        let mut blob = blob();
        let typedef = 24 + 16;
        blob[typedef + 8] = 2;
        let types = Btf::parse(blob.into()).unwrap();
        assert_eq!(types.size_of(TypeId(2)), None);
    }

    proptest! {
        #[test]
        fn damaged_types_never_panic(at in 4usize..250, value: u32, cut in 0usize..60) {
            let mut blob = blob();
            let at = at.min(blob.len() - 4);
            blob[at..at + 4].copy_from_slice(&value.to_le_bytes());
            blob.truncate(blob.len() - cut);
            if let Ok(types) = Btf::parse(blob.into()) {
                let _ = types.member("outer", "in.wide").map(|field| types.size_of(field.kind));
                let _ = types.structure("inner").map(|id| types.size_of(id));
            }
        }
    }
}
