//! The log: the lockless ring of 5.10 and later.
//!
//! kernel/printk/printk_ringbuffer.h, 6.1; VMCOREINFO carries the layout. A descriptor leads to a
//! record's text in the data ring and has its metadata in a third array at the same index.

use heapless::Vec;

use crate::vmcoreinfo::Vmcoreinfo;

use super::memory::KernelMemory;
use super::text::contains;

/// Bytes of a record's text that are read; printk's own records have at most 1024.
pub const TEXT: usize = 1024;
/// Bytes of a line that is kept.
pub const LINE: usize = 200;
/// A line of the log.
pub type Line = Vec<u8, LINE>;

/// States of a descriptor that have text in them (desc_committed, desc_finalized), and where the state
/// is in its state_var; the rest is its id.
const WITH_TEXT: [u64; 2] = [1, 2];
const STATE_SHIFT: u32 = 62;
const ID_MASK: u64 = (1 << STATE_SHIFT) - 1;
/// Bounds: LOG_BUF_LEN_MAX is 2 GiB, and there are never more descriptors than bytes.
const MAX_DESCRIPTOR_BITS: u32 = 26;
const MAX_TEXT_BITS: u32 = 31;
/// Bytes of an array that are believed.
const MAX_AREA: u64 = 64 << 20;

/// Records that are searched for what the kernel said when it died.
const SEARCHED: u64 = 2048;
/// How long before the last record a cause may have been said, in nanoseconds: older ones are of
/// troubles that the kernel survived.
const RECENT: u64 = 30_000_000_000;

/// What is said before the stack of a death that is not yet a panic (arch/x86/mm/fault.c,
/// arch/x86/kernel/{traps,dumpstack}.c, arch/arm64/kernel/traps.c, lib/bug.c, kernel/watchdog.c, 6.12).
const CAUSES: [&str; 8] = [
    "BUG: ",
    "kernel BUG at",
    "general protection fault",
    "Unable to handle kernel",
    "double fault",
    "Insufficient stack space",
    "Watchdog detected hard LOCKUP",
    "Uhhuh. NMI received",
];
/// What is said then of the exception itself, in general words: it counts when there is nothing better.
const EXCEPTIONS: [&str; 4] =
    ["Internal error: ", "invalid opcode:", "divide error:", "stack segment:"];
const PANIC: &str = "Kernel panic - not syncing";

/// Where things lie in the ring's structures, in bytes.
#[derive(Clone, Copy)]
struct Layout {
    desc_size: u64,
    state: u64,
    begin: u64,
    next: u64,
    info_size: u64,
    time: u64,
    length: u64,
}

/// The ring.
#[derive(Clone, Copy)]
pub struct Log {
    layout: Layout,
    descriptors: u64,
    infos: u64,
    text: u64,
    text_size: u64,
    tail: u64,
    head: u64,
    count: u64,
}

/// One record.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Record {
    /// Nanoseconds since boot.
    pub time: u64,
    /// Where its text is.
    text: u64,
    /// Bytes of text.
    pub length: usize,
}

/// What the kernel said when it died.
#[derive(Default)]
pub struct LastWords {
    /// When the last record was made, in nanoseconds since boot.
    pub time: Option<u64>,
    /// The newest `Kernel panic` line.
    pub panic: Option<(u64, Line)>,
    /// The newest line that says what led to it.
    pub cause: Option<(u64, Line)>,
    /// The newest line that says what kind of exception it was.
    exception: Option<(u64, Line)>,
    /// The newest line with `CPU:`, `PID:`, `Comm:` and the taint.
    pub who: Option<Line>,
}

impl Log {
    /// Where its arrays are, and how large: descriptors, texts, metadata.
    pub fn areas(&self) -> [(u64, u64); 3] {
        let array = |at, size: u64| (at, size.saturating_mul(self.count).min(MAX_AREA));
        [
            array(self.descriptors, self.layout.desc_size),
            (self.text, self.text_size.min(MAX_AREA)),
            array(self.infos, self.layout.info_size),
        ]
    }

    /// Finds the ring; `None` for kernels before 5.10, or when its head cannot be read.
    pub fn find(memory: &mut KernelMemory<'_>, info: &Vmcoreinfo) -> Option<Log> {
        let offset = |name: &str| info.value("OFFSET", name);
        let lpos = offset("prb_desc.text_blk_lpos")?;
        let layout = Layout {
            desc_size: info.value("SIZE", "prb_desc")?,
            state: offset("prb_desc.state_var")?,
            begin: lpos.checked_add(offset("prb_data_blk_lpos.begin")?)?,
            next: lpos.checked_add(offset("prb_data_blk_lpos.next")?)?,
            info_size: info.value("SIZE", "printk_info")?,
            time: offset("printk_info.ts_nsec")?,
            length: offset("printk_info.text_len")?,
        };
        let ring = memory.u64(info.symbol("prb")?)?;
        let part =
            |of: &str, member: &str| ring.checked_add(offset(of)?)?.checked_add(offset(member)?);
        let desc = |member| part("printk_ringbuffer.desc_ring", member);
        let data = |member| part("printk_ringbuffer.text_data_ring", member);
        let bits = memory.u32(desc("prb_desc_ring.count_bits")?)?;
        let text_bits = memory.u32(data("prb_data_ring.size_bits")?)?;
        if bits > MAX_DESCRIPTOR_BITS || text_bits > MAX_TEXT_BITS {
            return None;
        }
        Some(Log {
            layout,
            descriptors: memory.u64(desc("prb_desc_ring.descs")?)?,
            infos: memory.u64(desc("prb_desc_ring.infos")?)?,
            text: memory.u64(data("prb_data_ring.data")?)?,
            text_size: 1 << text_bits,
            tail: memory.u64(desc("prb_desc_ring.tail_id")?)? & ID_MASK,
            head: memory.u64(desc("prb_desc_ring.head_id")?)? & ID_MASK,
            count: 1 << bits,
        })
    }

    /// How many records there are at most.
    pub fn len(&self) -> u64 {
        (self.head.wrapping_sub(self.tail) & ID_MASK).saturating_add(1).min(self.count)
    }

    /// The record that was made `back` records before the last one; `None` when it has no text (yet,
    /// or any more), or makes no sense.
    pub fn record(&self, memory: &mut KernelMemory<'_>, back: u64) -> Option<Record> {
        let Layout { desc_size, info_size, .. } = self.layout;
        let id = self.head.wrapping_sub(back) & ID_MASK;
        let index = id % self.count;
        let desc = self.descriptors.checked_add(index.checked_mul(desc_size)?)?;
        let state = memory.u64(desc.checked_add(self.layout.state)?)?;
        if state & ID_MASK != id || !WITH_TEXT.contains(&(state >> STATE_SHIFT)) {
            return None;
        }
        let begin = memory.u64(desc.checked_add(self.layout.begin)?)?;
        let next = memory.u64(desc.checked_add(self.layout.next)?)?;
        let info = self.infos.checked_add(index.checked_mul(info_size)?)?;
        let length = memory.u16(info.checked_add(self.layout.length)?)?;
        let (text, most) = self.text_of(begin, next)?;
        Some(Record {
            time: memory.u64(info.checked_add(self.layout.time)?)?,
            text,
            length: u64::from(length).min(most) as usize,
        })
    }

    /// The text between two logical positions. Odd ones mean that there is none; a block that would
    /// cross the end of the ring lies at its start instead. The descriptor's id precedes the text.
    fn text_of(&self, begin: u64, next: u64) -> Option<(u64, u64)> {
        const ID: u64 = 8;
        if begin & 1 != 0 {
            return None;
        }
        let size = self.text_size;
        let exact = next.is_multiple_of(size);
        let wrapped = begin / size != next / size && !exact;
        let start = if wrapped { 0 } else { begin % size };
        let end = if exact { size } else { next % size };
        let most = end.checked_sub(start)?.checked_sub(ID)?;
        Some((self.text.checked_add(start)?.checked_add(ID)?, most))
    }

    /// Reads the text of a record, and returns as much of it as fits and can be read.
    pub fn read<'b>(
        &self,
        memory: &mut KernelMemory<'_>,
        record: &Record,
        buffer: &'b mut [u8],
    ) -> &'b [u8] {
        let length = record.length.min(buffer.len());
        let Some(text) = buffer.get_mut(..length) else { return &[] };
        match memory.read(record.text, text) {
            Some(()) => text,
            None => &[],
        }
    }

    /// Looks for what the kernel said when it died.
    pub fn last_words(&self, memory: &mut KernelMemory<'_>) -> LastWords {
        let mut words = LastWords::default();
        for back in 0..self.len().min(SEARCHED) {
            let Some(record) = self.record(memory, back) else { continue };
            let last = *words.time.get_or_insert(record.time);
            let mut buffer = [0; LINE];
            let text = self.read(memory, &record, &mut buffer);
            for line in text.split(|&byte| byte == b'\n') {
                words.hear(line, record.time, last);
            }
            let done = words.panic.is_some() && words.cause.is_some() && words.who.is_some();
            if done || record.time < last.saturating_sub(RECENT) {
                break;
            }
        }
        words.cause = words.cause.or(words.exception.take());
        words
    }
}

impl LastWords {
    fn hear(&mut self, line: &[u8], time: u64, last: u64) {
        let kept = || Line::from_slice(line).unwrap_or_default();
        let says = |sign: &str| contains(line, sign);
        // The line that ends the report repeats the reason behind a mark of its own.
        if self.panic.is_none() && says(PANIC) && !line.starts_with(b"---[") {
            self.panic = Some((time, kept()));
        } else if time < last.saturating_sub(RECENT) {
            return;
        } else if EXCEPTIONS.iter().any(|sign| says(sign)) {
            // First: arm64 says `Internal error: Oops - BUG: ` behind the line with file and number.
            self.exception.get_or_insert_with(|| (time, kept()));
        } else if self.cause.is_none() && CAUSES.iter().any(|sign| says(sign)) {
            self.cause = Some((time, kept()));
        }
        if self.who.is_none() && says("CPU: ") && says(" PID: ") && says(" Comm: ") {
            self.who = Some(kept());
        }
    }
}
