//! The reserved area, read where it lies: a whole disk, a partition, or an image of either.
//!
//! `format::area` says how it is laid out. The core is at its start, the mark in its last block.

use std::ops::Range;

use format::area::{Layout, State, Trailer};
use format::{BLOCK, gpt, mbr};

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
        .or_else(|| mbr_partitions(disk).into_iter().find_map(|range| area_in(disk, range)))
}

fn area_in(disk: &[u8], range: Range<usize>) -> Option<AreaInfo> {
    let area = disk.get(range.clone())?;
    let block = area.len().checked_sub(BLOCK as usize)?;
    let trailer = Trailer::parse(&area[block..]).ok()?;
    if trailer.area_size != area.len() as u64 {
        return None;
    }
    // A dump whose end was never written has no size yet: take what is there for certain or, when
    // nobody wrote that down, all that can belong to it.
    let size = match (trailer.core_size, trailer.written) {
        (0, 0) => Layout::new(trailer.area_size)?.crc_table,
        (0, written) => written,
        (size, _) => size,
    };
    Some(AreaInfo { trailer, core: range.start..range.start.checked_add(size as usize)? })
}

/// The byte ranges of the GPT partitions of `disk`, for sectors of 512 and of 4096 bytes: those of
/// the first table, or, when that one is damaged, of the backup at the end.
fn gpt_partitions(disk: &[u8]) -> Vec<Range<usize>> {
    let table = |sector: usize| {
        let sectors = (disk.len() / sector) as u64;
        let lbas = [gpt::PRIMARY_LBA, sectors.saturating_sub(1)];
        lbas.into_iter().find_map(|lba| gpt_at(disk, sector, lba))
    };
    [512, 4096].into_iter().find_map(table).unwrap_or_default()
}

fn gpt_at(disk: &[u8], sector: usize, lba: u64) -> Option<Vec<Range<usize>>> {
    let bytes = |lba: u64, count: u64| {
        let start = usize::try_from(lba).ok()?.checked_mul(sector)?;
        disk.get(start..start.checked_add(usize::try_from(count).ok()?.checked_mul(sector)?)?)
    };
    let header = gpt::Header::parse(bytes(lba, 1)?, lba, (disk.len() / sector) as u64).ok()?;
    let table = bytes(header.entries_lba, header.table_sectors())?;
    let mut check = header.table_check();
    check.update(table);
    let byte = |lba: u64| usize::try_from(lba).ok()?.checked_mul(sector);
    let range = |entry: gpt::Entry| {
        let range = byte(entry.first_lba)?..byte(entry.last_lba.checked_add(1)?)?;
        (range.end <= disk.len()).then_some(range)
    };
    check.is_intact().then(|| header.entries(0, table).filter_map(range).collect())
}

/// The byte ranges of the MBR's partitions, for both sizes of sectors: marks are only where one makes sense.
fn mbr_partitions(disk: &[u8]) -> Vec<Range<usize>> {
    struct Walk<'a> {
        disk: &'a [u8],
        sector: u64,
        found: Vec<Range<usize>>,
    }

    impl mbr::Visitor for Walk<'_> {
        type Error = ();

        fn read(&mut self, lba: u64) -> Result<[u8; 512], ()> {
            let at = usize::try_from(lba * self.sector).map_err(drop)?;
            self.disk.get(at..).and_then(|bytes| bytes.first_chunk()).copied().ok_or(())
        }

        fn partition(&mut self, entry: mbr::Entry) {
            let [start, size] =
                [entry.first_lba, entry.sectors].map(|it| (it * self.sector) as usize);
            self.found.push(start..start + size);
        }
    }

    let partitions = [512, 4096].into_iter().flat_map(|sector| {
        let mut walk = Walk { disk, sector, found: Vec::new() };
        let sectors = disk.len() as u64 / sector;
        let _ = mbr::each_partition(sectors, &mut walk);
        walk.found
    });
    partitions.collect()
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
        let last = ((start + area.len()) / 512 - 1) as u64;
        let sectors = (disk.len() / 512) as u64;
        disk[1024 + 128..][..16].fill(7);
        put(&mut disk, 1024 + 128 + 32, &2048u64.to_le_bytes());
        put(&mut disk, 1024 + 128 + 40, &last.to_le_bytes());
        put(&mut disk, 512, b"EFI PART");
        put(&mut disk, 512 + 12, &92u32.to_le_bytes());
        for (at, value) in [(24, 1u64), (40, 34), (48, sectors - 34), (72, 2)] {
            put(&mut disk, 512 + at, &value.to_le_bytes());
        }
        let table = format::crc32(&disk[1024..1024 + 128 * 128]);
        for (at, value) in [(80, 128u32), (84, 128), (88, table)] {
            put(&mut disk, 512 + at, &value.to_le_bytes());
        }
        seal(&mut disk);
        (disk, start)
    }

    #[test]
    fn area_in_an_mbr_partition_is_found() {
        for sector in [512usize, 4096] {
            let start = 16 * sector;
            let mut disk = vec![0; start];
            disk.extend(area(State::Complete, 100));
            let entry = &mut disk[446..462];
            entry[4] = 0x83;
            entry[8..12].copy_from_slice(&16u32.to_le_bytes());
            entry[12..].copy_from_slice(&((AREA / sector) as u32).to_le_bytes());
            disk[510..512].copy_from_slice(&[0x55, 0xaa]);
            assert_eq!(find(&disk).unwrap().core, start..start + 100);
        }
    }

    fn put(disk: &mut [u8], at: usize, bytes: &[u8]) {
        disk[at..at + bytes.len()].copy_from_slice(bytes);
    }

    /// Makes the checksum of the GPT header right.
    fn seal(disk: &mut [u8]) {
        put(disk, 512 + 16, &[0; 4]);
        let crc = format::crc32(&disk[512..512 + 92]);
        put(disk, 512 + 16, &crc.to_le_bytes());
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
    fn of_an_unfinished_dump_only_that_is_read_which_is_there_for_certain() {
        let mut disk = area(State::Incomplete, 0);
        let block = AREA - BLOCK as usize;
        let trailer = Trailer::parse(&disk[block..]).unwrap();
        let written = Trailer { written: 3 << 20, ..trailer };
        disk[block..].copy_from_slice(&written.to_block());
        assert_eq!(find(&disk).unwrap().core, 0..3 << 20);
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
            put(&mut disk, at, &value.to_le_bytes());
            seal(&mut disk);
            disk.truncate(disk.len() - cut * 512);
            let _ = find(&disk);
        }
    }
}
