//! Writes the dump: head, memory, CRC32 table, and the trailer before and after.
//!
//! The order is what makes a dump that stops half-way readable: the trailer says `writing` before
//! anything else, the crash card follows before the first block of the core, the head stands before the
//! memory and says "incomplete", and only when everything else is on the medium do the head and then
//! the trailer say "complete".

use core::fmt;

use format::area::{Layout, Reason, State, Trailer};
use format::record::{self, Record};
use format::{BLOCK, CRC_CHUNK};
use zerocopy::IntoBytes;

use crate::area::Area;
use crate::card::{Card, Sink};
use crate::core_file::{self, CoreFile, E_FLAGS};
use crate::crc::{CrcTable, TableBlocks};
use crate::elfcorehdr::{Elfcorehdr, MAX_NOTE_BYTES};
use crate::old::OldMemory;
use crate::serial;
use crate::{Disk, DiskError, Machine, OldPhys};

const PAGE: usize = BLOCK as usize;

/// Most bytes in one request for old memory: long enough to keep a disk busy, short enough that
/// requests of all ranges interleave.
const MAX_REQUEST: u64 = CRC_CHUNK;

/// Time between two lines of progress, and between two times at which it is made sure how much is on
/// the disk.
const PROGRESS_US: u64 = 1_000_000;
const CHECKPOINT_US: u64 = 2_000_000;

/// How often a disk that refused something is asked whether it is done with everything.
const SETTLE: u32 = 16;

/// Unreadable pages that are named on the console; the others are only counted.
const NAMED_PAGES: u64 = 8;

/// What could not be read.
#[derive(Clone, Copy, Default)]
pub(crate) struct Unreadable {
    /// Pages, or parts of them.
    pub pages: u64,
    /// Where they are, as far as there is room.
    pub ranges: [record::Range; record::LISTED],
}

impl Unreadable {
    /// Adds a page, or `size` bytes of one. They come in the order of the core.
    pub fn add(&mut self, at: OldPhys, size: u64) {
        self.pages += 1;
        let used = self.ranges.iter().take_while(|range| range.size.get() > 0).count();
        if let Some(last) = used.checked_sub(1).map(|last| &mut self.ranges[last])
            && last.start.get() + last.size.get() == at.0
        {
            last.size += size;
        } else if let Some(free) = self.ranges.get_mut(used) {
            *free = record::Range { start: at.0.into(), size: size.into() };
        }
    }
}

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
    let mut writer = Writer {
        machine,
        disk,
        start: area.start,
        layout: area.layout,
        core,
        at: 0,
        crc: CrcTable::new(table),
        first_block_us: 0,
        pages_read: 0,
        unreadable: Unreadable::default(),
        said_us: 0,
        checked_us: 0,
        trailer: fresh_trailer(area, source),
    };
    let written = writer.write_all(source, payload, blocks, card);
    if let Err(error) = written {
        writer.trailer.state = State::Incomplete;
        writer.trailer.reason = error.reason();
        // The disk may be beyond writing even this; then `writing` stays, which says the same.
        let _ = writer.write_trailer();
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
pub(crate) fn record(source: Source<'_>, payload: Payload<'_>) -> Record {
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

struct Writer<'a> {
    machine: &'a mut dyn Machine,
    disk: &'a mut dyn Disk,
    start: u64,
    layout: Layout,
    core: CoreFile,
    /// Bytes of the core written so far: a multiple of the block size.
    at: u64,
    crc: CrcTable<'a>,
    first_block_us: u64,
    pages_read: u64,
    unreadable: Unreadable,
    said_us: u64,
    /// When it was made sure last how much is on the disk.
    checked_us: u64,
    trailer: Trailer,
}

impl Writer<'_> {
    fn write_all(
        &mut self,
        source: Source<'_>,
        payload: Payload<'_>,
        buffers: &mut Blocks,
        card: &str,
    ) -> Result<Complete, Error> {
        self.write_trailer()?;
        self.write_card(card, &mut buffers.page)?;
        self.first_block_us = self.machine.now_us();
        (self.said_us, self.checked_us) = (self.first_block_us, self.first_block_us);

        let first_block_us = self.first_block_us.into();
        let record = Record { first_block_us, ..record(source, payload) };
        self.write_head(source, card, &record, buffers)?;
        let core = self.core;
        for (offset, range) in core.ranges(source.old) {
            self.write_range(offset, range.source, range.size, &mut buffers.page)?;
        }
        if let Some((index, block)) = self.crc.finish() {
            self.disk.write(self.start + self.layout.crc_table + index * BLOCK, block)?;
        }
        self.disk.flush()?;

        let done_us = self.machine.now_us();
        let complete = !source.old.truncated;
        self.finish_head(&record, complete, done_us, buffers)?;
        let (first_block, table_crc) = self.crc.first_block();
        self.disk.write(self.start + self.layout.crc_table, first_block)?;
        self.disk.flush()?;

        let (state, reason) = match complete {
            true => (State::Complete, Reason::None),
            false => (State::Incomplete, Reason::TooManyRanges),
        };
        self.trailer = Trailer {
            state,
            reason,
            core_size: self.core.size,
            crc_count: self.crc.chunks(),
            crc_table_crc: table_crc,
            written: self.core.size,
            ..self.trailer
        };
        self.write_trailer()?;
        Ok(Complete {
            size: self.core.size,
            first_block_us: self.first_block_us,
            last_block_us: self.machine.now_us(),
            pages_read: self.pages_read,
            pages_unreadable: self.unreadable.pages,
        })
    }

    fn write_trailer(&mut self) -> Result<(), DiskError> {
        self.disk.write(self.start + self.layout.trailer, &self.trailer.to_block())?;
        self.disk.flush()
    }

    /// Makes sure that what was handed to the disk is on it, and writes down how much that is.
    fn checkpoint(&mut self) -> Result<(), DiskError> {
        self.disk.flush()?;
        self.trailer.written = self.at;
        self.write_trailer()?;
        self.checked_us = self.machine.now_us();
        Ok(())
    }

    /// Writes the crash card, and into the trailer that it is there. A disk that refuses its blocks may
    /// take others: then there is none.
    fn write_card(&mut self, card: &str, page: &mut [u8; PAGE]) -> Result<(), DiskError> {
        match write_card(self.disk, self.start + self.layout.card, card, page) {
            Ok(crc) => {
                (self.trailer.card_size, self.trailer.card_crc) = (card.len() as u32, crc);
            }
            Err(DiskError::Failed) => {
                self.machine.say(format_args!("the disk takes no crash card; the dump goes on"));
                // Errors of writes that were under way are told one by one.
                let settled = (0..SETTLE).any(|_| self.disk.flush().is_ok());
                return if settled { Ok(()) } else { Err(DiskError::Failed) };
            }
            Err(error) => return Err(error),
        }
        self.write_trailer()
    }

    /// Writes the head block by block, keeping the two blocks that are written again at the end.
    fn write_head(
        &mut self,
        source: Source<'_>,
        card: &str,
        record: &Record,
        buffers: &mut Blocks,
    ) -> Result<(), DiskError> {
        let record_block = self.core.record_at() / BLOCK * BLOCK;
        let mut blocks = HeadBlocks {
            disk: &mut *self.disk,
            crc: &mut self.crc,
            start: self.start,
            table: self.start + self.layout.crc_table,
            at: 0,
            filled: 0,
            block: &mut buffers.page,
            first: &mut buffers.first,
            record: (record_block, &mut buffers.record),
            result: Ok(()),
        };
        let notes = &mut buffers.notes;
        self.core.write_head(self.machine, source, notes, card, record, &mut |bytes| {
            blocks.take(bytes);
        });
        blocks.result?;
        self.at = blocks.at;
        Ok(())
    }

    /// Writes the head's two blocks again, now that everything else is on the disk.
    fn finish_head(
        &mut self,
        record: &Record,
        complete: bool,
        done_us: u64,
        buffers: &mut Blocks,
    ) -> Result<(), DiskError> {
        let record = Record {
            complete: u32::from(complete).into(),
            last_block_us: done_us.into(),
            pages_read: self.pages_read.into(),
            pages_unreadable: self.unreadable.pages.into(),
            unreadable: self.unreadable.ranges,
            ..*record
        };
        let (record_at, page) = (self.core.record_at(), &mut buffers.page);
        let in_block = (record_at % BLOCK) as usize;
        let in_first = record_at < BLOCK;
        *page = if in_first { buffers.first } else { buffers.record };
        page[in_block..in_block + record::SIZE].copy_from_slice(record.as_bytes());
        if !in_first {
            self.replace(record_at / BLOCK * BLOCK, &buffers.record, page)?;
            *page = buffers.first;
        }
        if complete {
            page[E_FLAGS..E_FLAGS + 4].fill(0);
        }
        self.replace(0, &buffers.first, page)
    }

    fn replace(
        &mut self,
        at: u64,
        before: &[u8; PAGE],
        after: &[u8; PAGE],
    ) -> Result<(), DiskError> {
        // The head is far smaller than what the first block of the table covers (1 GiB).
        if self.crc.replace(self.core.size, at, before, after) {
            self.disk.write(self.start + at, after)?;
        }
        Ok(())
    }

    /// Writes `size` bytes of old memory from `from` on to `offset` of the core. Whole blocks go by
    /// DMA, the odd ends through `page`.
    fn write_range(
        &mut self,
        offset: u64,
        from: OldPhys,
        size: u64,
        page: &mut [u8; PAGE],
    ) -> Result<(), Error> {
        let end = offset + size;
        let mut run = Run { offset, from, size: 0 };
        let mut at = offset;
        while at < end {
            let next = (at / BLOCK * BLOCK + BLOCK).min(end);
            let whole = next - at == BLOCK;
            let (lead, length) = ((at % BLOCK) as usize, (next - at) as usize);
            let source = OldPhys(from.0 + (at - offset));
            if !whole {
                page.fill(0);
            }
            let readable = self.machine.read_old(source, &mut page[lead..lead + length]).is_ok();
            if !readable {
                page.fill(0);
                self.unreadable(source, next - at);
            }
            self.pages_read += u64::from(readable);
            self.checksum(page)?;
            if whole && readable {
                if run.size == 0 {
                    run = Run { offset: at, from: source, size: 0 };
                }
                run.size += BLOCK;
            } else {
                self.post(&mut run)?;
                self.disk.write(self.start + at / BLOCK * BLOCK, page)?;
            }
            if run.size == MAX_REQUEST {
                self.post(&mut run)?;
            }
            if self.at.is_multiple_of(MAX_REQUEST) {
                self.post(&mut run)?;
                self.take_stock()?;
            }
            at = next;
        }
        Ok(self.post(&mut run)?)
    }

    /// Looks at the time: says how far the dump is, makes sure of it, ends it. Nothing is held back.
    fn take_stock(&mut self) -> Result<(), Error> {
        let is_over = self.machine.is_time_over();
        if is_over || self.machine.now_us() >= self.checked_us + CHECKPOINT_US {
            self.checkpoint()?;
        }
        if is_over {
            return Err(Error::OutOfTime);
        }
        self.progress();
        Ok(())
    }

    /// Hands a run of whole readable blocks to the disk.
    fn post(&mut self, run: &mut Run) -> Result<(), DiskError> {
        if run.size > 0 {
            self.disk.write_old(self.start + run.offset, run.from, run.size)?;
            run.size = 0;
        }
        Ok(())
    }

    fn checksum(&mut self, block: &[u8; PAGE]) -> Result<(), DiskError> {
        self.at += BLOCK;
        match self.crc.add(block) {
            Some((index, block)) => {
                self.disk.write(self.start + self.layout.crc_table + index * BLOCK, block)
            }
            None => Ok(()),
        }
    }

    fn unreadable(&mut self, at: OldPhys, size: u64) {
        self.unreadable.add(at, size);
        if self.unreadable.pages <= NAMED_PAGES {
            self.machine.say(format_args!("page at {at} cannot be read; it is zeros in the dump"));
        }
    }

    fn progress(&mut self) {
        let now = self.machine.now_us();
        if now < self.said_us + PROGRESS_US {
            return;
        }
        self.said_us = now;
        self.machine.say(format_args!(
            "{:3} %, {} of {} MiB, {} MB/s",
            self.at * 100 / self.core.size.max(1),
            self.at >> 20,
            self.core.size >> 20,
            self.at / (now - self.first_block_us).max(1)
        ));
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

/// Old memory that is waiting to be handed to the disk in one request.
struct Run {
    offset: u64,
    from: OldPhys,
    size: u64,
}

/// Gathers the pieces of the head into blocks.
struct HeadBlocks<'a, 'c> {
    disk: &'a mut dyn Disk,
    crc: &'a mut CrcTable<'c>,
    start: u64,
    table: u64,
    at: u64,
    filled: usize,
    block: &'a mut [u8; PAGE],
    first: &'a mut [u8; PAGE],
    record: (u64, &'a mut [u8; PAGE]),
    result: Result<(), DiskError>,
}

impl HeadBlocks<'_, '_> {
    fn take(&mut self, mut bytes: &[u8]) {
        while !bytes.is_empty() && self.result.is_ok() {
            let some = bytes.len().min(PAGE - self.filled);
            self.block[self.filled..self.filled + some].copy_from_slice(&bytes[..some]);
            self.filled += some;
            bytes = &bytes[some..];
            if self.filled == PAGE {
                self.result = self.write_block();
                self.filled = 0;
            }
        }
    }

    fn write_block(&mut self) -> Result<(), DiskError> {
        if self.at == 0 {
            *self.first = *self.block;
        }
        if self.at == self.record.0 {
            *self.record.1 = *self.block;
        }
        self.disk.write(self.start + self.at, self.block)?;
        self.at += BLOCK;
        match self.crc.add(self.block) {
            Some((index, block)) => self.disk.write(self.table + index * BLOCK, block),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
#[path = "dump_tests.rs"]
mod tests;
