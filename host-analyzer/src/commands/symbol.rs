//! `sym`: what [`Options`] says.

use std::io::Write;

use clap::Args;
use serde::Serialize;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::render::text;
use crate::{Error, VirtAddr};

use super::place::{hexadecimal, symbol};

/// Symbols: from names to addresses and back
///
/// Each word is an address in hexadecimal, or a symbol of the kernel or of a module. The letter in
/// parentheses says what the symbol is, as nm does. With a vmlinux, addresses have their source line.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// All symbols, in the order of their addresses
    #[arg(short, long)]
    pub list: bool,
    /// All symbols of this module
    #[arg(short, long, value_name = "NAME")]
    pub module: Option<String>,
    /// Symbols with this text in their names
    #[arg(short, long, value_name = "TEXT")]
    pub query: Option<String>,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// A symbol, or a place behind one.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
struct Found {
    /// In hexadecimal.
    address: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    kind: Option<char>,
    name: String,
    /// Bytes from the symbol's start.
    offset: u64,
    #[serde(skip_serializing_if = "Option::is_none")]
    module: Option<String>,
    #[serde(skip_serializing_if = "Option::is_none")]
    line: Option<String>,
}

impl Found {
    fn new(kind: char, name: &str, at: VirtAddr, module: Option<&str>) -> Found {
        Found {
            address: format!("{at:016x}"),
            kind: (kind != '?').then_some(kind),
            name: name.to_owned(),
            offset: 0,
            module: module.map(str::to_owned),
            line: None,
        }
    }
}

/// Runs the command.
///
/// # Errors
/// [`Error::NoPlace`] for what is neither, [`Error::NoSymbols`], [`Error::Usage`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let lists = options.list || options.module.is_some() || options.query.is_some();
    if words.is_empty() && !lists {
        let hint = "which symbol? Write a name or an address, or -l for all of them";
        return Err(Error::Usage(hint.to_owned()));
    }
    let mut found = if lists { listed(&linux, options)? } else { Vec::new() };
    for word in words {
        found.extend(named(&linux, word)?);
    }
    if options.json {
        let document = serde_json::to_value(&found).unwrap_or_default();
        return text::json(&document, out);
    }
    for it in &found {
        let kind = it.kind.map(|kind| format!(" ({kind})")).unwrap_or_default();
        let module = it.module.as_ref().map(|name| format!(" [{name}]")).unwrap_or_default();
        let offset = if it.offset == 0 { String::new() } else { format!("+{:#x}", it.offset) };
        let line = it.line.as_ref().map(|line| format!("  {line}")).unwrap_or_default();
        writeln!(out, "{}{kind} {}{offset}{module}{line}", it.address, it.name)?;
    }
    Ok(())
}

fn listed(linux: &Linux<'_, '_>, options: &Options) -> Result<Vec<Found>, Error> {
    let kernel = linux.kernel();
    let fits = |name: &str| options.query.as_ref().is_none_or(|text| name.contains(text.as_str()));
    let mut found = Vec::new();
    if options.module.is_none() {
        kernel.symbols()?.each(&mut |kind, name, at| {
            if fits(name) {
                found.push((at, Found::new(kind, name, at, None)));
            }
        });
    }
    let modules = &linux.modules().list;
    let wanted = |name: &str| options.module.as_ref().is_none_or(|wanted| wanted == name);
    if !modules.iter().any(|module| wanted(&module.name)) && options.module.is_some() {
        let name = options.module.clone().unwrap_or_default();
        return Err(Error::Usage(format!("no module {name} was loaded; `mod` lists them")));
    }
    for module in modules.iter().filter(|module| wanted(&module.name)) {
        module.each_symbol(kernel, &mut |kind, name, at| {
            if fits(name) {
                found.push((at, Found::new(kind, name, at, Some(&module.name))));
            }
        });
    }
    found.sort_by_key(|(at, _)| *at);
    Ok(found.into_iter().map(|(_, found)| found).collect())
}

/// What a word names: all symbols of this name, or what is at this address.
fn named(linux: &Linux<'_, '_>, word: &str) -> Result<Vec<Found>, Error> {
    let kernel = linux.kernel();
    if let Some(at) = hexadecimal(word).filter(|at| word.starts_with("0x") || at >> 47 != 0) {
        return at_address(linux, VirtAddr(at)).map(|found| vec![found]);
    }
    let mut found = Vec::new();
    kernel.symbols()?.each(&mut |kind, name, at| {
        if name == word {
            found.push(Found::new(kind, name, at, None));
        }
    });
    for module in &linux.modules().list {
        module.each_symbol(kernel, &mut |kind, name, at| {
            if name == word {
                found.push(Found::new(kind, name, at, Some(&module.name)));
            }
        });
    }
    // A variable that the table does not list may be known by other data.
    if found.is_empty()
        && let Some(at) = symbol(linux, word)?
    {
        found.push(Found::new('?', word, at, None));
    }
    if found.is_empty() {
        return match hexadecimal(word) {
            Some(at) => at_address(linux, VirtAddr(at)).map(|found| vec![found]),
            None => Err(Error::NoPlace(word.to_owned())),
        };
    }
    Ok(found)
}

fn at_address(linux: &Linux<'_, '_>, at: VirtAddr) -> Result<Found, Error> {
    let kernel = linux.kernel();
    let missing = || Error::NoPlace(format!("{at:#x}"));
    let place = linux.place(at).ok_or_else(missing)?;
    let start = at.back(place.offset);
    let mut letter = None;
    let mut note = |kind: char, name: &str, it: VirtAddr| {
        if it == start && name == place.name {
            letter = Some(kind);
        }
    };
    match &place.module {
        None => kernel.symbols()?.each(&mut note),
        Some(name) => {
            let module = linux.modules().list.iter().find(|module| module.name == *name);
            if let Some(module) = module {
                module.each_symbol(kernel, &mut note);
            }
        }
    }
    let own = kernel.source_frames(at).into_iter().next();
    let line = own.and_then(|it| Some(format!("{}:{}", it.position.file?, it.position.line)));
    let kind = letter.filter(|kind| *kind != '?');
    let (offset, module) = (place.offset, place.module);
    Ok(Found { address: format!("{at:016x}"), kind, name: place.name, offset, module, line })
}
