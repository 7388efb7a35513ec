//! The lockless ring of 5.10 and later (kernel/printk/printk_ringbuffer.h, 6.1).
//!
//! A descriptor leads to the record's text in the data ring and has its metadata in a third array
//! at the same index.

use std::ops::Range;

use crate::kernel::sparse::Sparse;
use crate::kernel::virt::VirtualMemory;
use crate::kernel::vmcoreinfo::Vmcoreinfo;
use crate::{Error, ReadContext, bytes};

use super::{Log, Record};

/// Bounds for the ring's sizes: LOG_BUF_LEN_MAX is 2 GiB, descriptors are at most as many.
const MAX_DESCRIPTOR_BITS: u32 = 24;
const MAX_TEXT_BITS: u32 = 31;

/// States of a descriptor that have text in them (desc_committed, desc_finalized).
const WITH_TEXT: [u64; 2] = [1, 2];
/// The state's position in a descriptor's state_var; the rest is its id.
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;

/// Where things lie in the ring's structures, in bytes.
struct Layout {
    desc_size: usize,
    state: usize,
    begin: usize,
    next: usize,
    info_size: usize,
    sequence: usize,
    time: usize,
    length: usize,
    /// What is not in every kernel.
    caller: Option<usize>,
    /// Offset and length of what a device is called.
    device: Vec<(&'static str, usize, usize)>,
}

impl Layout {
    fn new(info: &Vmcoreinfo<'_>) -> Result<Layout, Error> {
        let lpos = info.need_offset("prb_desc.text_blk_lpos")?;
        Ok(Layout {
            desc_size: info.need_size("prb_desc")?,
            state: info.need_offset("prb_desc.state_var")?,
            begin: lpos + info.need_offset("prb_data_blk_lpos.begin")?,
            next: lpos + info.need_offset("prb_data_blk_lpos.next")?,
            info_size: info.need_size("printk_info")?,
            sequence: info.need_offset("printk_info.seq")?,
            time: info.need_offset("printk_info.ts_nsec")?,
            length: info.need_offset("printk_info.text_len")?,
            caller: info.offset("printk_info.caller_id"),
            device: device(info).unwrap_or_default(),
        })
    }
}

/// Where the names of a device are in a struct printk_info, and how long they may be.
fn device(info: &Vmcoreinfo<'_>) -> Option<Vec<(&'static str, usize, usize)>> {
    let base = info.offset("printk_info.dev_info")?;
    let name = |key, name: &str| {
        let length = info.number(&format!("LENGTH(printk_info_{name})"));
        let offset = info.offset(&format!("dev_printk_info.{name}"))?;
        Some((key, base + offset, length.and_then(|it| usize::try_from(it).ok())?))
    };
    Some(vec![name("SUBSYSTEM", "subsystem")?, name("DEVICE", "device")?])
}

/// The ring's three arrays, each as far as it is in the dump.
struct Ring<'a> {
    layout: Layout,
    descriptors: Sparse<'a>,
    infos: Sparse<'a>,
    text: Sparse<'a>,
    tail: u64,
    head: u64,
    count: u64,
}

/// Reads the ring that `info` describes out of `memory`.
pub(super) fn read(info: &Vmcoreinfo<'_>, memory: &VirtualMemory<'_>) -> Result<Log, Error> {
    let ring = Ring::open(info, memory)?;
    let mut log = Log::default();
    let records = ring.head.wrapping_sub(ring.tail).min(ring.count - 1);
    for step in 0..=records {
        let id = ring.head.wrapping_sub(records - step) & ID_MASK;
        match ring.record(id) {
            Ok(Some(record)) => log.records.push(record),
            Ok(None) => {}
            Err(Lost::Damaged) => log.damaged += 1,
            Err(Lost::Missing { bytes }) => {
                log.missing += 1;
                log.missing_bytes += bytes;
            }
        }
    }
    Ok(log)
}

fn about(info: &[u8], &(key, at, length): &(&str, usize, usize)) -> Option<(String, String)> {
    let name = bytes::c_string(info.get(at..at.checked_add(length)?)?);
    (!name.is_empty()).then(|| (key.to_owned(), name))
}

/// Why a record cannot be had.
enum Lost {
    /// It makes no sense.
    Damaged,
    /// The dump lacks it; so many bytes of text are known to have been in it.
    Missing { bytes: u64 },
}

/// A record of which not even the length is known.
const MISSING: Lost = Lost::Missing { bytes: 0 };

impl<'a> Ring<'a> {
    fn open(info: &Vmcoreinfo<'_>, memory: &VirtualMemory<'a>) -> Result<Ring<'a>, Error> {
        let layout = Layout::new(info)?;
        let ring = memory.pointer(info.need_symbol("prb")?).reading("the log (prb)")?;
        let descs = ring.offset(info.need_offset("printk_ringbuffer.desc_ring")? as u64);
        let data = ring.offset(info.need_offset("printk_ringbuffer.text_data_ring")? as u64);
        let desc_member = |name: &str| {
            let offset = info.need_offset(&format!("prb_desc_ring.{name}"))?;
            Ok::<_, Error>(descs.offset(offset as u64))
        };
        let what = "the log's descriptors";
        let bits = memory.u32(desc_member("count_bits")?).reading(what)?.min(MAX_DESCRIPTOR_BITS);
        let count = 1u64 << bits;
        let descriptors = memory.pointer(desc_member("descs")?).reading(what)?;
        let infos = memory.pointer(desc_member("infos")?).reading(what)?;
        let size_bits = data.offset(info.need_offset("prb_data_ring.size_bits")? as u64);
        let size_bits = memory.u32(size_bits).reading("the log's text")?.min(MAX_TEXT_BITS);
        let text = data.offset(info.need_offset("prb_data_ring.data")? as u64);
        let text = memory.pointer(text).reading("the log's text")?;
        Ok(Ring {
            descriptors: memory
                .sparse(descriptors, count as usize * layout.desc_size)
                .reading(what)?,
            infos: memory.sparse(infos, count as usize * layout.info_size).reading(what)?,
            text: memory.sparse(text, 1 << size_bits).reading("the log's text")?,
            tail: memory.u64(desc_member("tail_id")?).reading(what)? & ID_MASK,
            head: memory.u64(desc_member("head_id")?).reading(what)? & ID_MASK,
            layout,
            count,
        })
    }

    /// The record of descriptor `id`; `None` when it has none (yet, or any more).
    fn record(&self, id: u64) -> Result<Option<Record>, Lost> {
        let index = (id % self.count) as usize;
        let layout = &self.layout;
        let at = index * layout.desc_size;
        let desc = self.descriptors.get(at..at + layout.desc_size).ok_or(MISSING)?;
        let state = bytes::u64_at(desc, layout.state).ok_or(Lost::Damaged)?;
        if state & ID_MASK != id || !WITH_TEXT.contains(&(state >> STATE_SHIFT)) {
            return Ok(None);
        }
        let begin = bytes::u64_at(desc, layout.begin).ok_or(Lost::Damaged)?;
        let next = bytes::u64_at(desc, layout.next).ok_or(Lost::Damaged)?;
        let block = self.block(begin, next)?;
        let at = index * layout.info_size;
        let missing = Lost::Missing { bytes: block.len() as u64 };
        let info = self.infos.get(at..at + layout.info_size).ok_or(missing)?;
        let length = bytes::u16_at(info, layout.length).ok_or(Lost::Damaged)?;
        let end = block.end.min(block.start + usize::from(length));
        let missing = Lost::Missing { bytes: (end - block.start) as u64 };
        let text = self.text.get(block.start..end).ok_or(missing)?;
        Ok(Some(Record {
            sequence: bytes::u64_at(info, layout.sequence).ok_or(Lost::Damaged)?,
            time: bytes::u64_at(info, layout.time).ok_or(Lost::Damaged)?,
            // struct printk_info: text_len, facility, then flags (5 bits) and level (3 bits).
            level: info.get(layout.length + 3).ok_or(Lost::Damaged)? >> 5,
            text: String::from_utf8_lossy(text).into_owned(),
            caller: layout.caller.and_then(|at| bytes::u32_at(info, at)),
            about: layout.device.iter().filter_map(|it| about(info, it)).collect(),
        }))
    }

    /// Where the text between two logical positions lies. Odd ones mean that there is none; a block that
    /// would cross the end of the ring lies at its start instead. The descriptor's id precedes the text.
    fn block(&self, begin: u64, next: u64) -> Result<Range<usize>, Lost> {
        const ID: u64 = 8;
        if begin & 1 != 0 {
            return Ok(0..0);
        }
        let size = self.text.len() as u64;
        let exact = next.is_multiple_of(size);
        let wrapped = begin / size != next / size && !exact;
        let start = if wrapped { 0 } else { begin % size };
        let end = if exact { size } else { next % size };
        let text = start + ID;
        if text > end { Err(Lost::Damaged) } else { Ok(text as usize..end as usize) }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::FakeMemory;

    const VIRT: u64 = 0xffff_8880_0000_0000;
    const RING: u64 = 0x8000;
    const DESCS: u64 = 0x9000;
    const INFOS: u64 = 0xa000;
    const TEXT: u64 = 0xb000;

    /// The layout of 6.1, four descriptors, 256 bytes of text.
    const INFO: &[u8] = b"SYMBOL(prb)=ffff888000008000
OFFSET(printk_ringbuffer.desc_ring)=0
OFFSET(printk_ringbuffer.text_data_ring)=48
OFFSET(prb_desc_ring.count_bits)=0
OFFSET(prb_desc_ring.descs)=8
OFFSET(prb_desc_ring.infos)=16
OFFSET(prb_desc_ring.head_id)=24
OFFSET(prb_desc_ring.tail_id)=32
SIZE(prb_desc)=24
OFFSET(prb_desc.state_var)=0
OFFSET(prb_desc.text_blk_lpos)=8
OFFSET(prb_data_blk_lpos.begin)=0
OFFSET(prb_data_blk_lpos.next)=8
SIZE(printk_info)=88
OFFSET(printk_info.seq)=0
OFFSET(printk_info.ts_nsec)=8
OFFSET(printk_info.text_len)=16
OFFSET(prb_data_ring.size_bits)=0
OFFSET(prb_data_ring.data)=8
";

    fn ring(tail: u64, head: u64) -> FakeMemory {
        let mut memory = FakeMemory::new(0x10000);
        memory.put_u64(RING, VIRT + RING + 8);
        let ring = RING + 8;
        memory.put_u64(ring, 2);
        memory.put_u64(ring + 8, VIRT + DESCS);
        memory.put_u64(ring + 16, VIRT + INFOS);
        memory.put_u64(ring + 24, head);
        memory.put_u64(ring + 32, tail);
        memory.put_u64(ring + 48, 8);
        memory.put_u64(ring + 56, VIRT + TEXT);
        memory
    }

    fn put(memory: &mut FakeMemory, id: u64, state: u64, blocks: (u64, u64), text: &str) {
        let index = id % 4;
        for (word, value) in [state << 62 | id, blocks.0, blocks.1].into_iter().enumerate() {
            memory.put_u64(DESCS + index * 24 + word as u64 * 8, value);
        }
        let info = INFOS + index * 88;
        memory.put_u64(info, id);
        memory.put_u64(info + 8, id * 1_000_000_000);
        memory.put(info + 16, &(text.len() as u16).to_le_bytes());
        memory.put(info + 19, &[6 << 5 | 1]);
        if blocks.0 & 1 == 0 {
            let wrapped = blocks.0 / 256 != blocks.1 / 256 && !blocks.1.is_multiple_of(256);
            let at = if wrapped { 0 } else { blocks.0 % 256 };
            memory.put(TEXT + at + 8, text.as_bytes());
        }
    }

    fn read(mut memory: FakeMemory) -> Log {
        let tables = memory.mapped(VIRT, 0x1000);
        Log::from_memory(&Vmcoreinfo::new(INFO), &memory.space(tables)).unwrap()
    }

    fn texts(log: &Log) -> Vec<&str> {
        log.records.iter().map(|record| record.text.as_str()).collect()
    }

    #[test]
    fn records_are_read_from_the_tail_to_the_head() {
        let mut memory = ring(5, 7);
        put(&mut memory, 5, 2, (0, 32), "first");
        put(&mut memory, 6, 2, (32, 64), "two\nlines");
        put(&mut memory, 7, 1, (64, 96), "not final yet");
        let log = read(memory);
        assert_eq!(texts(&log), ["first", "two\nlines", "not final yet"]);
        let first = &log.records[0];
        assert_eq!((first.sequence, first.time, first.level), (5, 5_000_000_000, 6));
    }

    #[test]
    fn text_that_would_cross_the_end_lies_at_the_start() {
        let mut memory = ring(5, 6);
        put(&mut memory, 5, 2, (224, 256 + 32), "wrapped");
        put(&mut memory, 6, 2, (256 + 224, 512), "fits to the end");
        assert_eq!(texts(&read(memory)), ["wrapped", "fits to the end"]);
    }

    #[test]
    fn records_without_text_or_not_yet_written_are_no_damage() {
        let mut memory = ring(4, 7);
        put(&mut memory, 4, 3, (0, 32), "reusable");
        put(&mut memory, 5, 0, (0, 32), "reserved");
        put(&mut memory, 6, 2, (3, 3), "");
        put(&mut memory, 7, 2, (32, 64), "last");
        let log = read(memory);
        assert_eq!((texts(&log), log.damaged), (vec!["", "last"], 0));
    }

    #[test]
    fn record_whose_positions_make_no_sense_costs_only_itself() {
        let mut memory = ring(5, 6);
        put(&mut memory, 5, 2, (64, 72), "x");
        put(&mut memory, 6, 2, (96, 128), "good");
        memory.put_u64(DESCS + 24 + 16, 32);
        let log = read(memory);
        assert_eq!((texts(&log), log.damaged), (vec!["good"], 1));
    }

    #[test]
    fn record_whose_text_is_not_in_the_dump_is_counted_and_the_others_are_shown() {
        let mut memory = ring(5, 7);
        // 8 KiB of text, two pages.
        memory.put_u64(RING + 8 + 48, 13);
        put(&mut memory, 6, 2, (4096, 4096 + 32), "lost");
        put(&mut memory, 5, 2, (0, 32), "first");
        put(&mut memory, 7, 2, (64, 96), "last");
        let tables = memory.mapped(VIRT, 0x1000);
        memory.punch(TEXT + 4096);
        let log = Log::from_memory(&Vmcoreinfo::new(INFO), &memory.space(tables)).unwrap();
        assert_eq!((texts(&log), log.missing, log.missing_bytes), (vec!["first", "last"], 1, 4));
        assert!(!log.is_whole());
    }

    #[test]
    fn records_without_a_descriptor_are_counted() {
        let mut memory = ring(5, 6);
        let tables = memory.mapped(VIRT, 0x1000);
        memory.punch(DESCS);
        let log = Log::from_memory(&Vmcoreinfo::new(INFO), &memory.space(tables)).unwrap();
        assert_eq!((log.records.len(), log.missing), (0, 2));
    }

    proptest! {
        #[test]
        fn damaged_rings_never_panic(writes in prop::collection::vec((0u64..0x3100, any::<u64>()), 8)) {
            let mut memory = ring(5, 7);
            put(&mut memory, 5, 2, (0, 32), "first");
            put(&mut memory, 7, 2, (224, 256 + 32), "wrapped");
            for (at, value) in writes {
                memory.put_u64(RING + at, value);
                memory.put_u64(RING + 8 + at % 64, value % 4096);
            }
            let tables = memory.mapped(VIRT, 0x1000);
            let _ = Log::from_memory(&Vmcoreinfo::new(INFO), &memory.space(tables));
        }
    }
}
