//! The vendor note: what the payload has to say about the dump it wrote.
//!
//! An ELF note named [`NAME`] of type [`KIND`], the last in the core's PT_NOTE. Its descriptor ends
//! with a [`Record`]; whatever lies before it is filler that keeps the record inside one 4 KiB
//! block, so that the payload can write it again when the numbers are known. So readers take the
//! last bytes of the descriptor, [`Record::from_desc`].

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32, U64};

/// Name of the note.
pub const NAME: &[u8] = b"TINYKDUMP";

/// Type of the note, `TKD` and a number. Small numbers are taken: crash and makedumpfile look at the
/// type of a note alone, and would take type 1 for the registers of a CPU.
pub const KIND: u32 = 0x544b_4401;

/// Type of the note of the same name that holds the crash card, as it is in the area's card block: text.
/// It lies before the vendor note, if there is a card.
pub const CARD_KIND: u32 = 0x544b_4402;

/// Version of the record's layout.
pub const VERSION: u32 = 2;

/// Ranges of unreadable memory that a record names.
pub const LISTED: usize = 32;

/// A range of physical memory.
#[derive(
    Clone, Copy, Debug, Default, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout,
)]
#[repr(C)]
pub struct Range {
    /// Its first byte.
    pub start: U64<LE>,
    /// Its size in bytes; 0 when there is none.
    pub size: U64<LE>,
}

/// What the payload says about a dump, as it lies in the note. Times count from the payload's
/// first instruction, in microseconds.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Record {
    /// [`VERSION`].
    pub version: U32<LE>,
    /// 1 once the dump is complete, 0 while it is being written.
    pub complete: U32<LE>,
    /// Name, version and git revision of the payload: UTF-8, padded with zeros.
    pub payload: [u8; 64],
    /// When the first block of the core was handed to the disk.
    pub first_block_us: U64<LE>,
    /// When the last block was on the disk.
    pub last_block_us: U64<LE>,
    /// Pages of old memory in the core.
    pub pages_read: U64<LE>,
    /// Pages of old memory that could not be read; they are zeros in the core.
    pub pages_unreadable: U64<LE>,
    /// Program headers of elfcorehdr that were impossible and left out.
    pub headers_dropped: U64<LE>,
    /// Memory that the payload used, in bytes: image, stacks, tables and buffers.
    pub memory_used: U64<LE>,
    /// Where the unreadable pages are: the first [`LISTED`] ranges of them.
    pub unreadable: [Range; LISTED],
}

/// Size of a [`Record`] in bytes.
pub const SIZE: usize = size_of::<Record>();

impl Record {
    /// The record at the end of a vendor note's descriptor; `None` when the descriptor is too
    /// short or the record is of another version.
    #[must_use]
    pub fn from_desc(desc: &[u8]) -> Option<Record> {
        let (_, record) = Record::read_from_suffix(desc).ok()?;
        (record.version.get() == VERSION).then_some(record)
    }

    /// The physical memory that could not be read, as far as there is room to name it.
    pub fn unreadable(&self) -> impl Iterator<Item = core::ops::Range<u64>> {
        self.unreadable.iter().filter_map(|range| {
            let start = range.start.get();
            let end = start.checked_add(range.size.get())?;
            (start < end).then_some(start..end)
        })
    }

    /// Name and version of the payload that wrote the dump; empty when it is not text.
    #[must_use]
    pub fn payload(&self) -> &str {
        core::str::from_utf8(&self.payload).unwrap_or("").trim_end_matches('\0')
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn record_lies_as_docs_format_md_says() {
        let mut payload = [0; 64];
        payload[..4].copy_from_slice(b"tiny");
        let record = Record {
            version: 2.into(),
            complete: 1.into(),
            payload,
            first_block_us: 2.into(),
            last_block_us: 3.into(),
            pages_read: 4.into(),
            pages_unreadable: 5.into(),
            headers_dropped: 6.into(),
            memory_used: 7.into(),
            unreadable: core::array::from_fn(|index| Range {
                start: (8 + 2 * index as u64).into(),
                size: if index < 2 { (9 + 2 * index as u64).into() } else { 0.into() },
            }),
        };
        let bytes = record.as_bytes();
        assert_eq!(bytes.len(), 632);
        assert_eq!(&bytes[..12], [2, 0, 0, 0, 1, 0, 0, 0, b't', b'i', b'n', b'y']);
        assert!(record.unreadable().eq([8..17, 10..21]));
        for (index, value) in (2u64..=11).enumerate() {
            assert_eq!(&bytes[72 + index * 8..][..8], value.to_le_bytes());
        }

        let mut desc = std::vec![0; 500];
        desc.extend_from_slice(bytes);
        assert_eq!(Record::from_desc(&desc), Some(record));
        assert_eq!(record.payload(), "tiny");
        assert_eq!(Record::from_desc(&bytes[1..]), None);
    }
}
