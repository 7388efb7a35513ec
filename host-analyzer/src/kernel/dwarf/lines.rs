//! Places in the source: the line table, and the calls of inlined functions.

use gimli::{Attribute, AttributeValue, DebuggingInformationEntry, UnitRef, constants as dw};

use super::Reader;

/// A place in the source.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct Position {
    /// File, relative to the root of the kernel's source when that can be told.
    pub file: Option<String>,
    /// Line; 0 when the compiler did not say.
    pub line: u64,
}

/// Where an inlined function was called.
pub(super) fn of_call<'a>(
    unit: UnitRef<'_, Reader<'a>>,
    entry: &DebuggingInformationEntry<Reader<'a>>,
) -> gimli::Result<Position> {
    let number = |name| entry.attr(name).and_then(Attribute::udata_value);
    let index = match entry.attr_value(dw::DW_AT_call_file) {
        Some(AttributeValue::FileIndex(index)) => Some(index),
        _ => number(dw::DW_AT_call_file),
    };
    let file = index.map(|index| file_name(unit, index)).transpose()?.flatten();
    Ok(Position { file, line: number(dw::DW_AT_call_line).unwrap_or(0) })
}

/// The row of the line table that `pc` is in.
pub(super) fn of_instruction(
    unit: UnitRef<'_, Reader<'_>>,
    pc: u64,
) -> gimli::Result<Option<Position>> {
    let Some(program) = unit.line_program.clone() else { return Ok(None) };
    let mut rows = program.rows();
    let mut last: Option<(u64, u64, u64)> = None;
    while let Some((_, row)) = rows.next_row()? {
        if let Some((address, file, line)) = last
            && address <= pc
            && pc < row.address()
        {
            return Ok(Some(Position { file: file_name(unit, file)?, line }));
        }
        let line = row.line().map_or(0, u64::from);
        last = (!row.end_sequence()).then(|| (row.address(), row.file_index(), line));
    }
    Ok(None)
}

fn file_name(unit: UnitRef<'_, Reader<'_>>, index: u64) -> gimli::Result<Option<String>> {
    let Some(program) = &unit.line_program else { return Ok(None) };
    let header = program.header();
    let Some(file) = header.file(index) else { return Ok(None) };
    let text =
        |value| Ok::<_, gimli::Error>(unit.attr_string(value)?.to_string_lossy().into_owned());
    let name = text(file.path_name())?;
    let directory = file.directory(header).map(text).transpose()?.unwrap_or_default();
    let base = unit.comp_dir.map(|dir| dir.to_string_lossy().into_owned()).unwrap_or_default();
    Ok(Some(tidy(&base, &directory, &name)))
}

/// Puts a path together, resolves `.` and `..` in it, and leaves away the directories that it shares
/// with the one the kernel was built in: that much is the root of the source, or below it.
fn tidy(base: &str, directory: &str, name: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for path in [base, directory, name] {
        if path.starts_with('/') {
            parts.clear();
        }
        for part in path.split('/') {
            match part {
                "" | "." => {}
                ".." => {
                    parts.pop();
                }
                part => parts.push(part),
            }
        }
    }
    let root = base.split('/').filter(|part| !part.is_empty());
    let shared = root.zip(&parts).take_while(|(root, part)| root == *part).count();
    match shared {
        0 => format!("/{}", parts.join("/")),
        _ => parts.split_off(shared.min(parts.len() - 1)).join("/"),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_taken_relative_to_the_source() {
        let tree = "/build/linux-6.1";
        assert_eq!(tidy(tree, "kernel", "panic.c"), "kernel/panic.c");
        assert_eq!(tidy(tree, "./arch/x86/include/asm", "a.h"), "arch/x86/include/asm/a.h");
        let out = "/build/linux-6.1/debian/build";
        assert_eq!(tidy(out, "/build/linux-6.1/arch/x86", "entry.S"), "arch/x86/entry.S");
        assert_eq!(tidy(out, "../../kernel", "panic.c"), "kernel/panic.c");
        assert_eq!(tidy(tree, "/usr/include", "stdio.h"), "/usr/include/stdio.h");
        assert_eq!(tidy("", "", ""), "/");
    }
}
