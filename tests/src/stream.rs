//! What came over a line, taken apart by the description in docs/format.md alone.

use std::collections::BTreeSet;

use anyhow::{Context, Result, ensure};
use format::BLOCK;
use format::frame::{Decoder, Encoding, Event, Kind, MAX_WIRE};
use goblin::container::{Container, Ctx, Endian};
use goblin::elf::program_header::{PT_LOAD, ProgramHeader};

use crate::core_file::CoreFile;

/// Where the program headers of a core are, and where their number is.
const HEADERS: usize = 64;
const HEADER_COUNT: usize = 56;

/// The physical pages whose blocks came: of those that were sent over a line, and of those that were
/// received from it.
///
/// # Errors
/// When the head of the core was not sent.
pub fn pages(sent: &[u8], received: &[u8]) -> Result<(BTreeSet<u64>, BTreeSet<u64>)> {
    let head = blocks(sent).head;
    let count = head.get(HEADER_COUNT..HEADER_COUNT + 2).context("no head was sent")?;
    let count = usize::from(u16::from_le_bytes([count[0], count[1]]));
    let layout = Ctx { container: Container::Big, le: Endian::Little };
    let headers = ProgramHeader::parse(&head, HEADERS, count, layout)?;
    // The last ones are ranges of memory; one for the image, before them, shares their blocks.
    let loads: Vec<_> = headers.iter().filter(|header| header.p_type == PT_LOAD).collect();
    let page = |block: &u64| {
        let at = block * BLOCK;
        let load = loads.iter().rev().find(|load| {
            load.p_offset / BLOCK * BLOCK <= at && at < load.p_offset + load.p_filesz
        })?;
        Some((load.p_paddr / BLOCK * BLOCK + at - load.p_offset / BLOCK * BLOCK) / BLOCK)
    };
    let pages = |line: &[u8]| blocks(line).numbers.iter().filter_map(page).collect();
    let pages: (BTreeSet<u64>, BTreeSet<u64>) = (pages(sent), pages(received));
    ensure!(!pages.0.is_empty(), "no memory was sent");
    Ok(pages)
}

/// The physical pages that a core holds.
#[must_use]
pub fn pages_of(core: &CoreFile) -> BTreeSet<u64> {
    let pages = |start: u64, size: u64| start / BLOCK..(start + size).div_ceil(BLOCK);
    core.loads().flat_map(|load| pages(load.p_paddr, load.p_filesz)).collect()
}

#[derive(Default)]
struct Blocks {
    numbers: BTreeSet<u64>,
    /// The first blocks.
    head: Vec<u8>,
}

fn blocks(line: &[u8]) -> Blocks {
    let mut decoder = Box::new(Decoder::<MAX_WIRE>::new());
    let mut blocks = Blocks::default();
    for &byte in line {
        let Some(Event::Frame(header, content)) = decoder.push(byte) else { continue };
        if header.kind != Kind::Blocks {
            continue;
        }
        let first = header.offset / BLOCK;
        blocks.numbers.extend(first..first + u64::from(header.count));
        if first == 0 {
            blocks.head = match header.encoding {
                Encoding::Deflate => {
                    miniz_oxide::inflate::decompress_to_vec(content).unwrap_or_default()
                }
                _ => content.to_vec(),
            };
        }
    }
    blocks
}
