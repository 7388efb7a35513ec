//! `struct` and `union`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::kernel::btf::{Btf, Field};
use crate::kernel::types::{Member, Structure, Type, TypeId, Types};
use crate::linux::Linux;
use crate::linux::module_types::Described;
use crate::render::text;
use crate::render::value::{Radix, Values, declaration};
use crate::{Error, ReadContext, VirtAddr};

use super::place::{number, place};

/// A structure's declaration, or what is in one
///
/// TYPE alone shows how the structure or union (or the typedef of one) is declared and its size. With an
/// address or a symbol, the values at that place; `:CPU` behind a symbol means that CPU's copy. TYPE.MEMBER
/// shows one member, which may be a nested one (`task_struct.se.vruntime`), TYPE.MEMBER,MEMBER several. A
/// further number says how many structures lie there one after another. What the kernel itself does not
/// describe is looked for in the modules.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Show the offsets of the members in bytes; with an address, where each lies
    #[arg(short, long)]
    pub offsets: bool,
    /// The address is not that of the structure but of what lies in it at this offset in bytes, or is
    /// this member
    #[arg(short, long, value_name = "OFFSET | MEMBER")]
    pub link: Option<String>,
    /// Integers in hexadecimal
    #[arg(short = 'x', long)]
    pub hexadecimal: bool,
    /// The bytes themselves
    #[arg(short, long)]
    pub raw: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Most structures that are shown at once.
const MAX_COUNT: u64 = 1 << 20;

/// What of a type is wanted.
struct Wanted<'k> {
    /// What describes it.
    types: Described<'k>,
    /// Its name as the user wrote it.
    name: String,
    id: TypeId,
    structure: Structure,
    /// The members, by their paths; none means all.
    members: Vec<(String, Field)>,
}

/// Runs the command.
///
/// # Errors
/// [`Error::NoSuchType`], [`Error::NoMember`], [`Error::NoPlace`], [`Error::Usage`], [`Error::Read`] when
/// nothing of the structure can be read, [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let (spec, rest) = words.split_first().ok_or_else(|| {
        Error::Usage("which structure? Write its name, as in `struct task_struct`".to_owned())
    })?;
    let linux = Linux::new(kernel);
    let wanted = wanted(&linux, spec)?;
    let Some((at, rest)) = rest.split_first() else {
        return declare(&wanted, options, out);
    };
    let places = places(&linux, &wanted, options, at, rest)?;
    if !options.json {
        text::completeness(kernel.dump(), out)?;
    }
    Shows { linux: &linux, wanted: &wanted, options }.all(&places, out)
}

fn wanted<'l>(linux: &'l Linux<'_, '_>, spec: &str) -> Result<Wanted<'l>, Error> {
    let (name, members) = match spec.split_once('.') {
        Some((name, members)) => (name, members.split(',').collect()),
        None => (spec, Vec::new()),
    };
    let types = linux.types_that(|types| named(types, name).is_some())?;
    let (id, structure) = find(&types, name)?;
    let select = |path: &str| {
        let missing = || Error::NoMember(format!("{name} with member {path}"));
        let field = types.member_of(id, path).ok_or_else(missing)?;
        Ok((path.to_owned(), field))
    };
    let members = members.into_iter().map(select).collect::<Result<_, Error>>()?;
    Ok(Wanted { types, name: name.to_owned(), id, structure, members })
}

fn named(types: &Btf<'_>, name: &str) -> Option<(TypeId, Structure)> {
    let fits = |kind: &Type| matches!(kind, Type::Structure(_) | Type::Typedef(..));
    types.named(name, fits).into_iter().find_map(|id| {
        let (bare, kind) = types.bare(id);
        Some((bare, kind.structure()?))
    })
}

/// The structure, union, or typedef of one that is called `name`.
///
/// # Errors
/// [`Error::NoSuchType`], with names that are alike.
fn find(types: &Btf<'_>, name: &str) -> Result<(TypeId, Structure), Error> {
    named(types, name).ok_or_else(|| {
        let alike: Vec<String> =
            types.type_names().filter(|it| it.contains(name)).take(5).collect();
        let hint = match alike.as_slice() {
            _ if name.len() < 3 => String::new(),
            [] => String::new(),
            some => format!("; there are {}", some.join(", ")),
        };
        Error::NoSuchType(name.to_owned(), hint)
    })
}

fn declare(wanted: &Wanted<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let types = &*wanted.types;
    let offsets = options.offsets.then_some(0);
    if options.json {
        let one = |path: &str, field: &Field| {
            let size = types.size_of(field.kind);
            json!({"name": path, "offset": field.offset, "bit": field.bit, "width": field.width,
                "size": size, "type": types.type_name(field.kind)})
        };
        let members: Vec<_> = match wanted.members.as_slice() {
            [] => wanted
                .structure
                .members
                .iter()
                .map(|member| {
                    let (offset, bit) = (member.bits / 8, (member.bits % 8) as u32);
                    let Member { kind, width, .. } = *member;
                    one(&member.name, &Field { offset, bit, width, kind })
                })
                .collect(),
            some => some.iter().map(|(path, it)| one(path, it)).collect(),
        };
        let whole = json!({"type": wanted.name, "size": wanted.structure.size, "members": members});
        return text::json(&whole, out);
    }
    if wanted.members.is_empty() {
        write!(out, "{}", declaration(types, &wanted.structure, offsets))?;
        return Ok(());
    }
    let keyword = if wanted.structure.union { "union" } else { "struct" };
    writeln!(out, "{keyword} {} {{", wanted.name)?;
    for (path, selected) in &wanted.members {
        let name = path.rsplit('.').next().unwrap_or(path);
        let place = format!("[{}]", selected.offset);
        writeln!(out, "{place:>7}     {};", types.declare(selected.kind, name))?;
    }
    writeln!(out, "}}\nSIZE: {}", wanted.structure.size)?;
    Ok(())
}

/// Shows what `spec` names of the structures at `places`.
///
/// # Errors
/// As [`run`].
pub(super) fn show(
    linux: &Linux<'_, '_>,
    spec: &str,
    options: &Options,
    places: &[VirtAddr],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let wanted = wanted(linux, spec)?;
    Shows { linux, wanted: &wanted, options }.all(places, out)
}

/// The offset in bytes that `text` says, as a number or as a member of the structure called `name`, which
/// may stand in front of it.
///
/// # Errors
/// [`Error::NoMember`], [`Error::NoSuchType`].
pub(super) fn offset(linux: &Linux<'_, '_>, name: Option<&str>, text: &str) -> Result<u64, Error> {
    if let Some(offset) = number(text) {
        return Ok(offset);
    }
    let (name, member) = match (name, text.split_once('.')) {
        (Some(name), Some((first, member))) if first == name => (name, member),
        (Some(name), _) => (name, text),
        (None, Some((name, member))) => (name, member),
        (None, None) => {
            return Err(Error::Usage(format!("{text} is no offset; write STRUCTURE.MEMBER")));
        }
    };
    let types = linux.types_that(|types| named(types, name).is_some())?;
    let field = types.member_of(find(&types, name)?.0, member);
    let missing = || Error::NoMember(format!("{name} with member {member}"));
    Ok(field.ok_or_else(missing)?.offset as u64)
}

/// Where the structures begin.
fn places(
    linux: &Linux<'_, '_>,
    wanted: &Wanted<'_>,
    options: &Options,
    at: &str,
    rest: &[String],
) -> Result<Vec<VirtAddr>, Error> {
    let link = options.link.as_ref().map(|text| offset(linux, Some(&wanted.name), text));
    let count = match rest {
        [] => 1,
        [count] => number(count)
            .filter(|count| (1..=MAX_COUNT).contains(count))
            .ok_or_else(|| Error::Usage(format!("{count} is no number of structures")))?,
        [_, more, ..] => return Err(Error::Usage(format!("what is {more} for?"))),
    };
    let size = wanted.structure.size as u64;
    let first = place(linux, at)?.back(link.transpose()?.unwrap_or(0));
    Ok((0..count).map(|index| first.offset(index * size)).collect())
}

struct Shows<'a, 'k, 'd> {
    linux: &'a Linux<'k, 'd>,
    wanted: &'a Wanted<'a>,
    options: &'a Options,
}

impl Shows<'_, '_, '_> {
    fn all(&self, places: &[VirtAddr], out: &mut dyn Write) -> Result<(), Error> {
        let radix = if self.options.hexadecimal { Radix::Hexadecimal } else { Radix::Decimal };
        let values = Values { linux: self.linux, radix };
        let memory = self.linux.kernel().memory();
        let types = &*self.wanted.types;
        let mut documents = Vec::new();
        for &at in places {
            let size = self.wanted.structure.size;
            let raw = match memory.bytes(at, size) {
                Ok(raw) => raw.into_owned(),
                // A structure across a page that is not there is shown up to it.
                Err(error) => match memory.bytes_up_to(at, size) {
                    some if some.is_empty() && places.len() == 1 => {
                        return Err(error).reading("the structure");
                    }
                    some => some,
                },
            };
            if self.options.raw && !self.options.json {
                text::hex_dump(at.0, &raw, out)?;
            } else if self.options.json {
                documents.push(self.json(types, &values, at, &raw));
            } else {
                self.one(types, &values, at, &raw, places.len() > 1, out)?;
            }
        }
        if self.options.json { text::json(&documents.into(), out) } else { Ok(()) }
    }

    fn one(
        &self,
        types: &Btf<'_>,
        values: &Values<'_, '_, '_>,
        at: VirtAddr,
        raw: &[u8],
        several: bool,
        out: &mut dyn Write,
    ) -> Result<(), Error> {
        if several {
            writeln!(out, "{at:016x}")?;
        }
        if self.options.offsets {
            write!(out, "{}", declaration(types, &self.wanted.structure, Some(at.0)))?;
            return Ok(());
        }
        if self.wanted.members.is_empty() {
            let keyword = if self.wanted.structure.union { "union" } else { "struct" };
            let shown = values.text(&types.value(self.wanted.id, raw), 0);
            writeln!(out, "{keyword} {} {shown}", self.wanted.name)?;
            return Ok(());
        }
        for (path, selected) in &self.wanted.members {
            let value = types.member_at(selected, raw);
            writeln!(out, "  {path} = {}", values.text(&value, 2))?;
        }
        Ok(())
    }

    fn json(
        &self,
        types: &Btf<'_>,
        values: &Values<'_, '_, '_>,
        at: VirtAddr,
        raw: &[u8],
    ) -> serde_json::Value {
        let value = match self.wanted.members.as_slice() {
            [] => values.json(&types.value(self.wanted.id, raw)),
            some => {
                let one = |(path, selected): &(String, Field)| {
                    let value = types.member_at(selected, raw);
                    (path.clone(), values.json(&value))
                };
                some.iter().map(one).collect::<serde_json::Map<_, _>>().into()
            }
        };
        json!({"address": format!("{:#x}", at.0), "type": self.wanted.name, "value": value})
    }
}
