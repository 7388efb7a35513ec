//! The record buffer of kernels before 5.10 (struct printk_log, kernel/printk/printk.c, 4.19 and 5.4).
//!
//! Records lie one behind the other: a head, the text, pairs of names and values. A length of 0 says that
//! the next record is at the start of the buffer.

use crate::kernel::virt::VirtualMemory;
use crate::kernel::vmcoreinfo::Vmcoreinfo;
use crate::{Error, ReadContext, bytes};

use super::{Log, Record};

/// LOG_BUF_LEN_MAX.
const MAX_LENGTH: u64 = 1 << 31;

/// Where things lie in the head of a record, in bytes.
struct Layout {
    size: usize,
    time: usize,
    length: usize,
    text: usize,
    pairs: usize,
}

/// Reads the buffer that `info` describes out of `memory`. A record that makes no sense hides those behind it.
pub(super) fn read(info: &Vmcoreinfo<'_>, memory: &VirtualMemory<'_>) -> Result<Log, Error> {
    let layout = Layout {
        size: info.need_size("printk_log")?,
        time: info.need_offset("printk_log.ts_nsec")?,
        length: info.need_offset("printk_log.len")?,
        text: info.need_offset("printk_log.text_len")?,
        pairs: info.need_offset("printk_log.dict_len")?,
    };
    let what = "the log";
    let start = memory.pointer(info.need_symbol("log_buf")?).reading(what)?;
    let number = |name| memory.u32(info.need_symbol(name)?).reading(what).map(u64::from);
    let (size, first, next) =
        (number("log_buf_len")?, number("log_first_idx")?, number("log_next_idx")?);
    let size = size.min(MAX_LENGTH);
    let buffer = memory.sparse(start, size as usize).reading(what)?;
    let mut log = Log::default();
    let (mut at, mut wrapped) = (first, false);
    for sequence in 0.. {
        // Every record moves on by its head at least, and the end is passed once: this ends.
        if at == next && (wrapped || first <= next) {
            break;
        }
        let place = at as usize;
        let Some(head) = buffer.get(place..place.saturating_add(layout.size)) else {
            log.missing += 1;
            break;
        };
        let number = |at: usize| bytes::u16_at(head, at).map_or(0, usize::from);
        let (length, text, pairs) =
            (number(layout.length), number(layout.text), number(layout.pairs));
        if length == 0 && !wrapped {
            (at, wrapped) = (0, true);
            continue;
        }
        if length < layout.size + text + pairs {
            log.damaged += 1;
            break;
        }
        at += length as u64;
        let text_at = place + layout.size;
        match buffer.get(text_at..text_at + text + pairs) {
            None => {
                log.missing += 1;
                log.missing_bytes += text as u64;
            }
            Some(content) => log.records.push(Record {
                sequence,
                time: bytes::u64_at(head, layout.time).unwrap_or(0),
                // Behind dict_len: the facility, then flags (5 bits) and level (3 bits), then who wrote it.
                level: head.get(layout.pairs + 3).map_or(0, |flags| flags >> 5),
                text: String::from_utf8_lossy(&content[..text]).into_owned(),
                caller: bytes::u32_at(head, layout.pairs + 4),
                about: content[text..].split(|&byte| byte == 0).filter_map(pair).collect(),
            }),
        }
    }
    Ok(log)
}

fn pair(raw: &[u8]) -> Option<(String, String)> {
    let text = String::from_utf8_lossy(raw);
    text.split_once('=').map(|(name, value)| (name.to_owned(), value.to_owned()))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::FakeMemory;

    const VIRT: u64 = 0xffff_8880_0000_0000;
    const BUFFER: u64 = 0x9000;
    const VARIABLES: u64 = 0x8000;

    /// The layout of 4.19 without CONFIG_PRINTK_CALLER.
    const INFO: &[u8] = b"SYMBOL(log_buf)=ffff888000008000
SYMBOL(log_buf_len)=ffff888000008008
SYMBOL(log_first_idx)=ffff88800000800c
SYMBOL(log_next_idx)=ffff888000008010
SIZE(printk_log)=16
OFFSET(printk_log.ts_nsec)=0
OFFSET(printk_log.len)=8
OFFSET(printk_log.text_len)=10
OFFSET(printk_log.dict_len)=12
";

    fn buffer(first: u32, next: u32) -> FakeMemory {
        let mut memory = FakeMemory::new(0x10000);
        memory.put_u64(VARIABLES, VIRT + BUFFER);
        let numbers = [512, first, next].map(u32::to_le_bytes).concat();
        memory.put(VARIABLES + 8, &numbers);
        memory
    }

    /// Puts a record and returns where the next one begins.
    fn put(memory: &mut FakeMemory, at: u32, text: &str, pairs: &str) -> u32 {
        let length = (16 + text.len() + pairs.len()).next_multiple_of(8) as u16;
        let place = BUFFER + u64::from(at);
        memory.put_u64(place, 7_000_000_000 + u64::from(at));
        let lengths = [length, text.len() as u16, pairs.len() as u16].map(u16::to_le_bytes);
        memory.put(place + 8, &lengths.concat());
        memory.put(place + 15, &[4 << 5 | 2]);
        memory.put(place + 16, format!("{text}{pairs}").as_bytes());
        at + u32::from(length)
    }

    fn read(mut memory: FakeMemory) -> Log {
        let tables = memory.mapped(VIRT, 0x1000);
        super::read(&Vmcoreinfo::new(INFO), &memory.space(tables)).unwrap()
    }

    fn texts(log: &Log) -> Vec<&str> {
        log.records.iter().map(|record| record.text.as_str()).collect()
    }

    #[test]
    fn records_lie_one_behind_the_other() {
        let mut memory = buffer(0, 0);
        let second = put(&mut memory, 0, "first", "");
        let next = put(&mut memory, second, "about a disk", "SUBSYSTEM=block\0DEVICE=b8:0");
        memory.put(VARIABLES + 16, &next.to_le_bytes());
        let log = read(memory);
        assert_eq!(texts(&log), ["first", "about a disk"]);
        assert_eq!((log.records[0].level, log.records[0].time), (4, 7_000_000_000));
        assert!(log.records[0].about.is_empty());
        let about = &log.records[1].about;
        assert_eq!(about[1], ("DEVICE".to_owned(), "b8:0".to_owned()));
    }

    #[test]
    fn length_of_0_leads_back_to_the_start() {
        let mut memory = buffer(400, 0);
        put(&mut memory, 400, "older", "");
        let next = put(&mut memory, 0, "newer", "");
        memory.put(VARIABLES + 16, &next.to_le_bytes());
        let log = read(memory);
        assert_eq!((texts(&log), log.damaged), (vec!["older", "newer"], 0));
    }

    #[test]
    fn empty_log_has_no_records() {
        assert_eq!(read(buffer(64, 64)).records, []);
    }

    proptest! {
        #[test]
        fn damaged_buffers_never_panic(
            first in 0u32..1024,
            next in 0u32..1024,
            writes in prop::collection::vec((0u64..600, any::<u64>()), 8),
        ) {
            let mut memory = buffer(first, next);
            put(&mut memory, 0, "first", "");
            for (at, value) in writes {
                memory.put_u64(BUFFER + at, value);
            }
            read(memory);
        }
    }
}
