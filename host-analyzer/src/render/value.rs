//! Values and types, as text in the manner of crash and gdb, and as JSON.

use std::fmt::Write;

use serde_json::json;

use crate::VirtAddr;
use crate::kernel::types::{Structure, Type, TypeId, Types, Value};
use crate::linux::Linux;

/// Base of the numbers that are shown.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum Radix {
    /// Ten.
    #[default]
    Decimal,
    /// Sixteen.
    Hexadecimal,
}

/// Shows values of a kernel.
pub struct Values<'a, 'k, 'd> {
    /// Names what pointers lead to.
    pub linux: &'a Linux<'k, 'd>,
    /// How integers are shown.
    pub radix: Radix,
}

/// Most characters that are shown of a text that a pointer leads to.
const TEXT: usize = 200;

impl Values<'_, '_, '_> {
    /// The value as C writes it, further lines indented by `indent` columns.
    #[must_use]
    pub fn text(&self, value: &Value, indent: usize) -> String {
        match value {
            Value::Integer { number, size } => self.number(*number, *size),
            Value::Wide(bits) => format!("{bits:#x}"),
            Value::Boolean(value) => value.to_string(),
            Value::Constant(Some(name), _) => name.clone(),
            Value::Constant(None, number) => number.to_string(),
            Value::Float(number) => number.to_string(),
            Value::Pointer(at) | Value::CodePointer(at) => {
                let name = self.symbol(*at).map(|name| format!(" <{name}>")).unwrap_or_default();
                format!("{:#x}{name}", at.0)
            }
            Value::TextPointer(at) => {
                let text = self.string(*at).map(|text| format!(" {}", quoted(text.as_bytes())));
                format!("{:#x}{}", at.0, text.unwrap_or_default())
            }
            Value::Text(bytes) => quoted(bytes),
            Value::Structure(members) => {
                let mut text = "{\n".to_owned();
                let pad = " ".repeat(indent + 2);
                for (index, (name, _, member)) in members.iter().enumerate() {
                    let comma = if index + 1 == members.len() { "" } else { "," };
                    let equals = if name.is_empty() { "" } else { " = " };
                    let shown = self.text(member, indent + 2);
                    let _ = writeln!(text, "{pad}{name}{equals}{shown}{comma}");
                }
                text + &" ".repeat(indent) + "}"
            }
            Value::Array(elements) => self.array(elements, indent),
            Value::Unknown(why) => format!("<{why}>"),
        }
    }

    fn array(&self, elements: &[Value], indent: usize) -> String {
        /// Fewer equal elements in a row are shown each (gdb's `repeats` threshold).
        const REPEATS: usize = 10;
        let mut parts = Vec::new();
        let mut rest = elements;
        while let Some(first) = rest.first() {
            let same = rest.iter().take_while(|it| *it == first).count();
            let shown = self.text(first, indent);
            if same >= REPEATS {
                parts.push(format!("{shown} <repeats {same} times>"));
                rest = &rest[same..];
            } else {
                parts.push(shown);
                rest = &rest[1..];
            }
        }
        format!("{{{}}}", parts.join(", "))
    }

    fn number(&self, number: i128, size: usize) -> String {
        match self.radix {
            Radix::Decimal => number.to_string(),
            Radix::Hexadecimal => {
                let unused = 128 - 8 * size.clamp(1, 16) as u32;
                format!("{:#x}", (number as u128) << unused >> unused)
            }
        }
    }

    /// The value as JSON: numbers as numbers, pointers and what has 128 bits as texts in hexadecimal (they
    /// do not fit into what most readers of JSON have for numbers), what cannot be told as `null`.
    #[must_use]
    pub fn json(&self, value: &Value) -> serde_json::Value {
        match value {
            Value::Integer { number, .. } => number_json(*number),
            Value::Wide(bits) => json!(format!("{bits:#x}")),
            Value::Boolean(value) => json!(value),
            Value::Constant(Some(name), _) => json!(name),
            Value::Constant(None, number) => number_json(*number),
            Value::Float(number) => json!(number),
            Value::Pointer(at) | Value::CodePointer(at) | Value::TextPointer(at) => {
                json!(format!("{:#x}", at.0))
            }
            Value::Text(bytes) => json!(crate::bytes::c_string(bytes)),
            Value::Structure(members) => {
                let mut map = serde_json::Map::new();
                for (name, _, member) in members {
                    match (name.as_str(), self.json(member)) {
                        // As in C, the members of a nameless one are those of the one around it.
                        ("", serde_json::Value::Object(inner)) => map.extend(inner),
                        ("", _) => {}
                        (name, member) => drop(map.insert(name.to_owned(), member)),
                    }
                }
                map.into()
            }
            Value::Array(elements) => elements.iter().map(|it| self.json(it)).collect(),
            Value::Unknown(_) => serde_json::Value::Null,
        }
    }

    fn symbol(&self, at: VirtAddr) -> Option<String> {
        let place = self.linux.place(at)?;
        Some(match place.offset {
            0 => place.name,
            offset => format!("{}+{offset}", place.name),
        })
    }

    fn string(&self, at: VirtAddr) -> Option<String> {
        let text = self.linux.kernel().memory().string(at, TEXT).ok()?;
        let is_text = text.chars().all(|it| !it.is_control() || it == '\n' || it == '\t');
        is_text.then_some(text)
    }
}

fn number_json(number: i128) -> serde_json::Value {
    match (u64::try_from(number), i64::try_from(number)) {
        (Ok(number), _) => json!(number),
        (_, Ok(number)) => json!(number),
        _ => json!(number.to_string()),
    }
}

/// Characters as C writes them; zeros at the end are left out.
fn quoted(bytes: &[u8]) -> String {
    let end = bytes.iter().rposition(|&byte| byte != 0).map_or(0, |last| last + 1);
    let mut text = "\"".to_owned();
    for &byte in &bytes[..end] {
        match byte {
            b'"' | b'\\' => text.extend(['\\', char::from(byte)]),
            b'\n' => text.push_str("\\n"),
            b'\t' => text.push_str("\\t"),
            b' '..=b'~' => text.push(char::from(byte)),
            _ => drop(write!(text, "\\{byte:03o}")),
        }
    }
    text + "\""
}

/// How a structure or union is declared. With `offsets`, each member's place, from `base` on, stands in
/// front of it.
#[must_use]
pub fn declaration(types: &dyn Types, structure: &Structure, offsets: Option<u64>) -> String {
    let keyword = if structure.union { "union" } else { "struct" };
    let mut text = format!("{keyword} {} {{\n", structure.name).replace("  ", " ");
    members(types, structure, offsets, 1, 0, &mut text);
    text + "}\n" + &format!("SIZE: {}\n", structure.size)
}

fn members(
    types: &dyn Types,
    structure: &Structure,
    offsets: Option<u64>,
    depth: usize,
    before: usize,
    text: &mut String,
) {
    const MAX_DEPTH: usize = 16;
    /// No structure takes as much; damaged ones that are in themselves would.
    const MAX_TEXT: usize = 1 << 20;
    for member in &structure.members {
        if text.len() > MAX_TEXT {
            return;
        }
        let at = before + member.bits / 8;
        let place = offsets.map(|base| match base {
            0 => format!("{:>7} ", format!("[{at}]")),
            base => format!("[{:x}] ", base.wrapping_add(at as u64)),
        });
        let place = place.unwrap_or_default();
        let blank = " ".repeat(place.len());
        let pad = "    ".repeat(depth);
        let name = match member.width {
            0 => member.name.clone(),
            width => format!("{} : {width}", member.name),
        };
        // What has no name of its own is declared where it is used.
        match nameless(types, member.kind) {
            Some((inner, around)) if depth < MAX_DEPTH => {
                let keyword = if inner.union { "union" } else { "struct" };
                let _ = writeln!(text, "{blank}{pad}{keyword} {{");
                members(types, &inner, offsets, depth + 1, at, text);
                let name = around.replace('@', &name);
                let space = if name.is_empty() { "" } else { " " };
                let _ = writeln!(text, "{blank}{pad}}}{space}{name};");
            }
            _ => {
                let _ = writeln!(text, "{place}{pad}{};", types.declare(member.kind, &name));
            }
        }
    }
}

/// The structure without a name that a member is (or an array of), and what stands around the member's
/// name, `@`.
fn nameless(types: &dyn Types, mut id: TypeId) -> Option<(Structure, String)> {
    let mut around = "@".to_owned();
    for _ in 0..8 {
        match types.get(id) {
            Type::Structure(structure) if structure.name.is_empty() => {
                return Some((structure, around));
            }
            Type::Array(element, count) => {
                around = format!("{around}[{count}]");
                id = element;
            }
            Type::Qualified(_, inner) | Type::Tagged(inner) => id = inner,
            _ => return None,
        }
    }
    None
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn texts_are_quoted_as_in_c_without_the_zeros_behind_them() {
        assert_eq!(quoted(b"kworker/0:1\0\0\0\0\0"), "\"kworker/0:1\"");
        assert_eq!(quoted(b"a\"b\\\n\x01\0z"), "\"a\\\"b\\\\\\n\\001\\000z\"");
        assert_eq!(quoted(&[0; 4]), "\"\"");
    }
}
