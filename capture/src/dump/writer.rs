//! Writes a dump in its order: trailer, crash card, head, memory, table, and the head and the trailer again.

use format::area::{Layout, Reason, State, Trailer};
use format::record::{self, Record};
use format::{BLOCK, CRC_CHUNK};
use zerocopy::IntoBytes;

use super::{Blocks, Complete, Error, PAGE, Payload, Source, fresh_record, write_card};
use crate::area::Area;
use crate::core_file::{CoreFile, E_FLAGS};
use crate::crc::{CrcTable, TableBlocks};
use crate::unreadable::Unreadable;
use crate::{Disk, DiskError, Machine, OldPhys};

/// Most bytes in one request for old memory: long enough to keep a disk busy, short enough that
/// requests of all ranges interleave.
const MAX_REQUEST: u64 = CRC_CHUNK;

/// Time between two lines of progress, and between two times at which it is made sure how much is on
/// the disk.
const PROGRESS_US: u64 = 1_000_000;
pub(super) const CHECKPOINT_US: u64 = 2_000_000;

/// How often a disk that refused something is asked whether it is done with everything.
const SETTLE: u32 = 16;

/// Unreadable pages that are named on the console; the others are only counted.
const NAMED_PAGES: u64 = 8;

/// A dump that is being written.
pub(super) struct Writer<'a> {
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

impl<'a> Writer<'a> {
    /// Begins with `core` in `area` of `disk`; `trailer` is how it begins.
    pub(super) fn new(
        machine: &'a mut dyn Machine,
        disk: &'a mut dyn Disk,
        area: &Area,
        core: CoreFile,
        table: &'a mut TableBlocks,
        trailer: Trailer,
    ) -> Writer<'a> {
        Writer {
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
            trailer,
        }
    }

    /// Says in the trailer why it ended early. The disk may be beyond writing even this; then `writing`
    /// stays, which says the same.
    pub(super) fn give_up(&mut self, reason: Reason) {
        self.trailer.state = State::Incomplete;
        self.trailer.reason = reason;
        let _ = self.write_trailer();
    }

    /// Writes all of it.
    pub(super) fn write_all(
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
        let record = Record { first_block_us, ..fresh_record(source, payload) };
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
