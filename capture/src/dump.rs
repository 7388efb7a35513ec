//! Writes the dump: head, memory, CRC32 table, and the trailer before and after.
//!
//! The order is what makes a dump that stops half-way readable: the trailer says `writing` before
//! anything else, the crash card follows before the first block of the core, the head stands before the
//! memory and says "incomplete", and only when everything else is on the medium do the head and then
//! the trailer say "complete".

mod writer;

use core::fmt;

use format::BLOCK;
use format::area::{Reason, State, Trailer};
use format::record::{self, Record};
use writer::Writer;

use crate::area::Area;
use crate::card::{Card, Sink};
use crate::core_file::{self, CoreFile};
use crate::crc::TableBlocks;
use crate::elfcorehdr::{Elfcorehdr, MAX_NOTE_BYTES};
use crate::old::OldMemory;
use crate::serial;
use crate::{Disk, DiskError, Machine};

const PAGE: usize = BLOCK as usize;

/// Buffers of the dump, outside of the stack.
#[derive(Default)]
pub struct Buffers {
    blocks: Blocks,
    table: TableBlocks,
    card: Card,
    serial: serial::Buffers,
}

impl Buffers {
    /// Empty buffers.
    #[must_use]
    pub const fn new() -> Buffers {
        Buffers {
            blocks: Blocks::new(),
            table: TableBlocks::new(),
            card: Card::new(),
            serial: serial::Buffers::new(),
        }
    }

    /// Makes the crash card of `source`, and gives it to `out` line by line as it comes.
    pub fn make_card(&mut self, machine: &mut dyn Machine, source: Source<'_>, out: &mut dyn Sink) {
        self.card.make(machine, source, &mut self.blocks.notes, out);
    }

    /// Ends the crash card where making it failed.
    pub fn abandon_card(&mut self) {
        self.card.abandon();
    }

    /// The crash card, if it was made.
    #[must_use]
    pub fn card_text(&self) -> &str {
        self.card.text()
    }

    /// What a dump over a line needs of them.
    pub(crate) fn for_line(&mut self) -> (&mut [u8], &mut Card, &mut serial::Buffers) {
        (&mut self.blocks.notes, &mut self.card, &mut self.serial)
    }

    /// The buffer for notes, for those who need one before the dump begins.
    pub fn notes(&mut self) -> &mut [u8] {
        &mut self.blocks.notes
    }
}

/// Aligned, and the page first, which is then summed up by words.
#[repr(C, align(64))]
struct Blocks {
    /// For a page of old memory, and for a block in the making.
    page: [u8; PAGE],
    /// For notes.
    notes: [u8; MAX_NOTE_BYTES],
    /// The first block of the core as it was written first.
    first: [u8; PAGE],
    /// The block of the vendor note's record as it was written first.
    record: [u8; PAGE],
}

impl Default for Blocks {
    fn default() -> Blocks {
        Blocks::new()
    }
}

impl Blocks {
    const fn new() -> Blocks {
        Blocks { page: [0; PAGE], notes: [0; MAX_NOTE_BYTES], first: [0; PAGE], record: [0; PAGE] }
    }
}

/// What is to be dumped.
#[derive(Clone, Copy)]
pub struct Source<'a> {
    /// The dead kernel's headers.
    pub headers: &'a Elfcorehdr,
    /// What of them is believed.
    pub old: &'a OldMemory,
}

/// What the payload says about itself in the vendor note.
#[derive(Clone, Copy, Debug)]
pub struct Payload<'a> {
    /// Name, version and git revision.
    pub version: &'a str,
    /// Memory it uses, in bytes.
    pub memory_used: u64,
}

impl Payload<'_> {
    /// Its version as formats have it: cut, or padded with zeros.
    pub(crate) fn version_field(&self) -> [u8; 64] {
        let mut field = [0; 64];
        field.iter_mut().zip(self.version.bytes()).for_each(|(to, from)| *to = from);
        field
    }
}

/// Why a dump ended early.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Error {
    /// It cannot be laid out in this area; nothing but the crash card was written.
    Plan(core_file::Error),
    /// The disk failed; the area holds a part of the dump.
    Disk(DiskError),
    /// The line does not take any more.
    Line,
    /// The time that there is for it was over.
    OutOfTime,
}

impl Error {
    /// Its number.
    #[must_use]
    pub fn reason(&self) -> Reason {
        match self {
            Error::Plan(_) => Reason::NoRoom,
            Error::Disk(DiskError::Timeout) => Reason::DiskTimeout,
            Error::Disk(DiskError::Failed | DiskError::Range) => Reason::DiskError,
            Error::Line => Reason::LineBroken,
            Error::OutOfTime => Reason::OutOfTime,
        }
    }
}

impl fmt::Display for Error {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Error::Plan(error) => error.fmt(f),
            Error::Disk(error) => error.fmt(f),
            Error::Line | Error::OutOfTime => f.write_str(self.reason().text()),
        }
    }
}

impl From<DiskError> for Error {
    fn from(error: DiskError) -> Error {
        Error::Disk(error)
    }
}

/// A dump that was written whole. Times are microseconds since the payload's first instruction.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Complete {
    /// Size of the core in bytes.
    pub size: u64,
    /// When the first block of the core was handed to the disk.
    pub first_block_us: u64,
    /// When everything was on the medium.
    pub last_block_us: u64,
    /// Pages of old memory read.
    pub pages_read: u64,
    /// Pages that could not be read and are zeros in the core.
    pub pages_unreadable: u64,
}

/// Writes the dump of `source` to `area` of `disk`.
///
/// # Errors
/// [`Error`]; the trailer then says "incomplete", if the disk still lets itself be written.
pub fn write(
    machine: &mut dyn Machine,
    disk: &mut dyn Disk,
    area: &Area,
    source: Source<'_>,
    payload: Payload<'_>,
    buffers: &mut Buffers,
) -> Result<Complete, Error> {
    let Buffers { blocks, table, card, .. } = buffers;
    if card.text().is_empty() {
        card.make(machine, source, &mut blocks.notes, &mut Silence);
    }
    let card = card.text();
    let (headers, old, room) = (source.headers, source.old, area.layout.crc_table);
    let core = match CoreFile::plan(machine, headers, &mut blocks.notes, old, card, room) {
        Ok(core) => core,
        Err(error) => {
            let trailer = Trailer {
                state: State::Incomplete,
                reason: Reason::NoRoom,
                ..fresh_trailer(area, source)
            };
            if let Err(why) = write_card_alone(disk, area, trailer, card, &mut blocks.page) {
                machine.say(format_args!("nor is the crash card there: {why}"));
            }
            return Err(Error::Plan(error));
        }
    };
    machine.say(format_args!(
        "writing {} MiB in {} ranges to area {}",
        core.size.div_ceil(1 << 20),
        source.old.ranges().len(),
        crate::area::Uuid(&area.trailer.uuid)
    ));
    let mut writer = Writer::new(machine, disk, area, core, table, fresh_trailer(area, source));
    let written = writer.write_all(source, payload, blocks, card);
    if let Err(error) = written {
        writer.give_up(error.reason());
    }
    written
}

/// Leaves the crash card in an area whose dump nobody saved yet; the dump stays as it is. A card that was
/// left there already is not written again.
///
/// # Errors
/// [`DiskError`]
pub fn leave_card(
    disk: &mut dyn Disk,
    area: &Area,
    buffers: &mut Buffers,
) -> Result<(), DiskError> {
    let card = buffers.card.text();
    let before = area.trailer;
    if before.later_cards > 0 && before.card_crc == format::crc32(card.as_bytes()) {
        return Ok(());
    }
    let later_cards = before.later_cards.saturating_add(1);
    let trailer = Trailer { later_cards, ..before };
    write_card_alone(disk, area, trailer, card, &mut buffers.blocks.page)
}

/// Says in the trailer of a dump that was being written that the payload failed meanwhile. What the trailer
/// says of how much is there stays.
///
/// # Errors
/// [`DiskError`]
pub fn mark_failed(disk: &mut dyn Disk, area: &Area) -> Result<(), DiskError> {
    if area.trailer.state != State::Writing {
        return Ok(());
    }
    let (state, reason) = (State::Incomplete, Reason::PayloadFailed);
    let trailer = Trailer { state, reason, ..area.trailer };
    disk.write(area.start + area.layout.trailer, &trailer.to_block())?;
    disk.flush()
}

/// When the kernel crashed, in seconds since 1970 by its own clock (crash_save_vmcoreinfo,
/// kernel/vmcore_info.c, 6.12).
#[must_use]
pub fn crash_time(old: &OldMemory) -> Option<u64> {
    old.vmcoreinfo.get("CRASHTIME")?.parse().ok()
}

/// The trailer of a dump that begins.
fn fresh_trailer(area: &Area, source: Source<'_>) -> Trailer {
    Trailer {
        state: State::Writing,
        sequence: area.trailer.sequence.wrapping_add(1),
        crash_time: crash_time(source.old).unwrap_or(0),
        ..area.trailer.emptied()
    }
}

/// What the vendor note says before the first block.
pub(crate) fn fresh_record(source: Source<'_>, payload: Payload<'_>) -> Record {
    Record {
        version: record::VERSION.into(),
        complete: 0.into(),
        payload: payload.version_field(),
        first_block_us: 0.into(),
        last_block_us: 0.into(),
        pages_read: 0.into(),
        pages_unreadable: 0.into(),
        headers_dropped: source.old.dropped.into(),
        memory_used: payload.memory_used.into(),
        unreadable: [record::Range::default(); record::LISTED],
    }
}

/// Writes the crash card to `at` in whole blocks, the last one filled up with zeros. Returns its CRC32.
fn write_card(
    disk: &mut dyn Disk,
    at: u64,
    card: &str,
    page: &mut [u8; PAGE],
) -> Result<u32, DiskError> {
    for (at, part) in (at..).step_by(PAGE).zip(card.as_bytes().chunks(PAGE)) {
        page.fill(0);
        page[..part.len()].copy_from_slice(part);
        disk.write(at, page)?;
    }
    disk.flush()?;
    Ok(format::crc32(card.as_bytes()))
}

/// Writes the crash card and nothing else to an area, and then `trailer` with its size.
fn write_card_alone(
    disk: &mut dyn Disk,
    area: &Area,
    trailer: Trailer,
    card: &str,
    page: &mut [u8; PAGE],
) -> Result<(), DiskError> {
    let card_crc = write_card(disk, area.start + area.layout.card, card, page)?;
    let trailer = Trailer { card_size: card.len() as u32, card_crc, ..trailer };
    disk.write(area.start + area.layout.trailer, &trailer.to_block())?;
    disk.flush()
}

/// Where a card goes that nobody watches.
pub(crate) struct Silence;

impl Sink for Silence {
    fn line(&mut self, _: &mut dyn Machine, _: &str) {}
}

#[cfg(test)]
#[path = "dump_tests.rs"]
mod tests;
