//! The reserved area, read where it lies: a whole disk, a partition, or an image of either.
//!
//! `format::area` says how it is laid out. The core is at its start, the mark in its last block.

use std::ops::Range;

use format::BLOCK;
use format::area::{Layout, State, Trailer};

use crate::bytes;

/// A reserved area that was found.
#[derive(Clone, Debug)]
pub struct AreaInfo {
    /// Its mark and state.
    pub trailer: Trailer,
    /// Where in the file the core lies.
    pub(super) core: Range<usize>,
}

impl AreaInfo {
    /// Whether there is nothing in the area.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.trailer.state == State::Empty
    }

    /// Says what the trailer has against the dump, when it has something.
    #[must_use]
    pub fn problem(&self) -> Option<String> {
        match self.trailer.state {
            State::Empty | State::Complete => None,
            State::Writing => Some("the payload never came to the end of it".to_owned()),
            State::Incomplete => Some(format!("it ended early: {}", self.trailer.reason.text())),
        }
    }
}

/// Looks for a reserved area: `disk` as a whole, then the partitions in it.
pub(super) fn find(disk: &[u8]) -> Option<AreaInfo> {
    area_in(disk, 0..disk.len())
        .or_else(|| gpt_partitions(disk).into_iter().find_map(|range| area_in(disk, range)))
}

fn area_in(disk: &[u8], range: Range<usize>) -> Option<AreaInfo> {
    let area = disk.get(range.clone())?;
    let block = area.len().checked_sub(BLOCK as usize)?;
    let trailer = Trailer::parse(&area[block..]).ok()?;
    if trailer.area_size != area.len() as u64 {
        return None;
    }
    // A dump whose end was never written has no size yet: take all that can belong to it.
    let size = match trailer.core_size {
        0 => Layout::new(trailer.area_size)?.crc_table,
        size => size,
    };
    Some(AreaInfo { trailer, core: range.start..range.start.checked_add(size as usize)? })
}

/// Bounds for a partition table that makes sense (UEFI 2.10, 5.3: 128 entries of 128 bytes).
const MAX_PARTITIONS: u32 = 1024;

/// The byte ranges of the GPT partitions of `disk`, for sectors of 512 and of 4096 bytes.
fn gpt_partitions(disk: &[u8]) -> Vec<Range<usize>> {
    [512, 4096].into_iter().find_map(|sector| gpt_with_sector(disk, sector)).unwrap_or_default()
}

fn gpt_with_sector(disk: &[u8], sector: u64) -> Option<Vec<Range<usize>>> {
    let header = disk.get(sector as usize..)?;
    if !header.starts_with(b"EFI PART") {
        return None;
    }
    let table = usize::try_from(bytes::u64_at(header, 72)?.checked_mul(sector)?).ok()?;
    let count = bytes::u32_at(header, 80)?.min(MAX_PARTITIONS) as usize;
    let size = bytes::u32_at(header, 84)? as usize;
    if size < 128 {
        return None;
    }
    let partition = |index: usize| {
        let at = table.checked_add(index.checked_mul(size)?)?;
        let first = bytes::u64_at(disk, at.checked_add(32)?)?;
        let last = bytes::u64_at(disk, at.checked_add(40)?)?;
        let end = usize::try_from(last.checked_add(1)?.checked_mul(sector)?).ok()?;
        let start = usize::try_from(first.checked_mul(sector)?).ok()?;
        (first != 0 && start < end && end <= disk.len()).then_some(start..end)
    };
    Some((0..count).filter_map(partition).collect())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const AREA: usize = 4 << 20;

    fn area(state: State, core_size: u64) -> Vec<u8> {
        let mut trailer = Trailer::empty([7; 16], AREA as u64);
        trailer.state = state;
        trailer.core_size = core_size;
        trailer.crc_count = core_size.div_ceil(format::CRC_CHUNK);
        let mut disk = vec![0; AREA];
        disk[AREA - BLOCK as usize..].copy_from_slice(&trailer.to_block());
        disk
    }

    /// A disk with 512-byte sectors whose second partition is `area`.
    fn partitioned(area: &[u8]) -> (Vec<u8>, usize) {
        let start = 2048 * 512;
        let mut disk = vec![0; start];
        disk.extend_from_slice(area);
        disk.resize(disk.len() + 34 * 512, 0);
        disk[512..520].copy_from_slice(b"EFI PART");
        disk[512 + 72..][..8].copy_from_slice(&2u64.to_le_bytes());
        disk[512 + 80..][..4].copy_from_slice(&128u32.to_le_bytes());
        disk[512 + 84..][..4].copy_from_slice(&128u32.to_le_bytes());
        let last = ((start + area.len()) / 512 - 1) as u64;
        disk[1024 + 128 + 32..][..8].copy_from_slice(&2048u64.to_le_bytes());
        disk[1024 + 128 + 40..][..8].copy_from_slice(&last.to_le_bytes());
        (disk, start)
    }

    #[test]
    fn whole_disk_is_an_area() {
        let found = find(&area(State::Complete, 8192)).unwrap();
        assert_eq!(found.core, 0..8192);
        assert_eq!(found.problem(), None);
    }

    #[test]
    fn partition_of_a_disk_image_is_an_area() {
        let (disk, start) = partitioned(&area(State::Complete, 8192));
        assert_eq!(find(&disk).unwrap().core, start..start + 8192);
    }

    #[test]
    fn dump_that_was_never_finished_is_read_as_far_as_it_can_go() {
        let found = find(&area(State::Writing, 0)).unwrap();
        assert_eq!(found.core.end as u64, Layout::new(AREA as u64).unwrap().crc_table);
        assert!(found.problem().unwrap().contains("never came to the end"));
    }

    #[test]
    fn empty_area_is_known_as_such() {
        assert!(find(&area(State::Empty, 0)).unwrap().is_empty());
    }

    #[test]
    fn mark_that_speaks_of_another_size_is_not_believed() {
        let mut disk = vec![0; 4096];
        disk.extend(area(State::Complete, 8192));
        assert!(find(&disk).is_none());
    }

    proptest! {
        #[test]
        fn damaged_partition_tables_never_panic(at in 512usize..1400, value: u64, cut in 0usize..99) {
            let (mut disk, _) = partitioned(&area(State::Complete, 8192));
            disk[at..at + 8].copy_from_slice(&value.to_le_bytes());
            disk.truncate(disk.len() - cut * 512);
            let _ = find(&disk);
        }
    }
}
