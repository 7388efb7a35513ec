//! `list`: what [`Options`] says.

use std::io::Write;

use clap::Args;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::list::{Walk, chain, walk};
use crate::render::text;
use crate::{Error, VirtAddr};

use super::place::place;
use super::structure;

/// The elements of a linked list
///
/// Follows the pointers from START to a null pointer or back to START. Kernel lists (struct list_head)
/// have a head that is no element: -H says that START is one. Where the pointers are broken, what can be
/// reached from the other end of a kernel list is shown too.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// Where the pointer lies in each element: bytes from its start, or STRUCTURE.MEMBER
    #[arg(short, long, value_name = "OFFSET | MEMBER", default_value = "0")]
    pub offset: String,
    /// START is the head of the list, a struct list_head
    #[arg(short = 'H', long)]
    pub head: bool,
    /// Stop before the element at this address
    #[arg(short, long, value_name = "ADDRESS")]
    pub end: Option<String>,
    /// From the last element to the first
    #[arg(short, long)]
    pub reverse: bool,
    /// What to show of each element: STRUCTURE, STRUCTURE.MEMBER or STRUCTURE.MEMBER,MEMBER
    #[arg(short, long, value_name = "STRUCTURE")]
    pub structure: Option<String>,
    /// Integers in hexadecimal
    #[arg(short = 'x', long)]
    pub hexadecimal: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

/// Runs the command.
///
/// # Errors
/// [`Error::Usage`], [`Error::NoPlace`], [`Error::NoSuchType`], [`Error::NoMember`], [`Error::Output`].
pub fn run(
    kernel: &Kernel<'_>,
    options: &Options,
    words: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let [start] = words else {
        let hint = "which list? Write the address where it starts, or the symbol";
        return Err(Error::Usage(hint.to_owned()));
    };
    let linux = Linux::new(kernel);
    let offset = match options.offset.as_str() {
        "0" => 0,
        text => structure::offset(&linux, None, text)?,
    };
    let start = place(&linux, start)?;
    let end = options.end.as_ref().map(|text| place(&linux, text)).transpose()?;
    let Walk { nodes, broken } = if options.head {
        walk(kernel.memory(), start)
    } else {
        chain(kernel.memory(), start, offset)
    };
    let element = |node: VirtAddr| if options.head { node.back(offset) } else { node };
    let mut elements: Vec<VirtAddr> =
        nodes.into_iter().map(element).take_while(|at| Some(*at) != end).collect();
    if options.reverse {
        elements.reverse();
    }
    if !options.json {
        text::completeness(kernel.dump(), out)?;
    }
    match &options.structure {
        Some(spec) => {
            let (hexadecimal, json) = (options.hexadecimal, options.json);
            let shape = structure::Options { hexadecimal, json, ..Default::default() };
            structure::show(&linux, spec, &shape, &elements, out)?;
        }
        None if options.json => {
            let all = elements.iter().map(|at| format!("{:#x}", at.0)).collect::<Vec<_>>();
            text::json(&all.into(), out)?;
        }
        None => {
            for at in &elements {
                writeln!(out, "{at:016x}")?;
            }
        }
    }
    if options.json { Ok(()) } else { text::problems(&broken.into_iter().collect::<Vec<_>>(), out) }
}
