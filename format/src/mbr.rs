//! Partitions of a disk with an MBR, the logical ones inside of an extended partition too.
//!
//! Each sector is a table of four entries at byte 446 and ends with 55 AA. Those of the first sector are the
//! primary partitions; the entry of an extended one leads to a chain of further tables, each with
//! one logical partition and the way to the next table.
//!
//! Source: UEFI Specification 2.10, section 5.2 "LBA 0 Format"; for the chain block/partitions/msdos.c,
//! kernel 6.12, whose numbers are counted here, too.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U16, U32};

/// First number of a logical partition.
const FIRST_LOGICAL: u32 = 5;

/// Most tables of a chain that are followed: a chain may lead back into itself.
const MAX_CHAIN: u32 = 128;

/// Type of the entry of a disk whose table is a GPT.
const PROTECTIVE: u8 = 0xee;

/// Types of extended partitions.
const EXTENDED: [u8; 3] = [0x05, 0x0f, 0x85];

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawTable {
    code: [u8; 446],
    entries: [RawEntry; 4],
    signature: U16<LE>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawEntry {
    boot: u8,
    first_chs: [u8; 3],
    kind: u8,
    last_chs: [u8; 3],
    first_lba: U32<LE>,
    sectors: U32<LE>,
}

const _: () = assert!(size_of::<RawTable>() == 512);

impl RawEntry {
    fn is_extended(&self) -> bool {
        EXTENDED.contains(&self.kind)
    }

    fn is_used(&self) -> bool {
        self.kind != 0 && self.sectors.get() > 0
    }
}

/// A partition, in sectors of the disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Its number as Linux counts: primary ones are 1 to 4, logical ones 5 and up.
    pub number: u32,
    /// First LBA.
    pub first_lba: u64,
    /// Number of sectors; all of them are on the disk.
    pub sectors: u64,
}

/// Who goes through the partitions of a disk.
pub trait Visitor {
    /// What goes wrong.
    type Error;

    /// Reads the first 512 bytes of the sector at `lba`, which is on the disk.
    ///
    /// # Errors
    /// The walk ends with it.
    fn read(&mut self, lba: u64) -> Result<[u8; 512], Self::Error>;

    /// Looks at a partition.
    fn partition(&mut self, entry: Entry);
}

/// Shows every partition of a disk of `disk_sectors` sectors to `visitor`. Returns whether there is an MBR: a
/// disk with a GPT has none that counts, nor has one whose table is impossible, as a boot sector that ends with
/// the same two bytes.
///
/// # Errors
/// That of the visitor.
pub fn each_partition<V: Visitor>(disk_sectors: u64, visitor: &mut V) -> Result<bool, V::Error> {
    let Some(entries) = table(&visitor.read(0)?) else { return Ok(false) };
    if entries.iter().any(|entry| entry.kind == PROTECTIVE || entry.boot & 0x7f != 0) {
        return Ok(false);
    }
    let inside = |number, first_lba: u64, sectors: u64| {
        let is_on_disk = first_lba > 0 && first_lba + sectors <= disk_sectors;
        is_on_disk.then_some(Entry { number, first_lba, sectors })
    };
    let mut extended = None;
    for (number, entry) in (1..).zip(&entries).filter(|(_, entry)| entry.is_used()) {
        let (first, sectors) = (u64::from(entry.first_lba.get()), entry.sectors.get());
        if entry.is_extended() {
            extended = extended.or(Some(first));
        } else if let Some(entry) = inside(number, first, sectors.into()) {
            visitor.partition(entry);
        }
    }
    let Some(base) = extended else { return Ok(true) };
    let (mut at, mut number) = (base, FIRST_LOGICAL);
    for _ in 0..MAX_CHAIN {
        if at == 0 || at >= disk_sectors {
            break;
        }
        let Some(entries) = table(&visitor.read(at)?) else { break };
        let used = || entries.iter().filter(|entry| entry.is_used());
        for entry in used().filter(|entry| !entry.is_extended()) {
            let first = at + u64::from(entry.first_lba.get());
            if let Some(entry) = inside(number, first, entry.sectors.get().into()) {
                visitor.partition(entry);
            }
            number += 1;
        }
        let Some(next) = used().find(|entry| entry.is_extended()) else { break };
        at = base + u64::from(next.first_lba.get());
    }
    Ok(true)
}

fn table(sector: &[u8; 512]) -> Option<[RawEntry; 4]> {
    let table = RawTable::ref_from_bytes(sector).ok()?;
    (table.signature.get() == 0xaa55).then_some(table.entries)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const SECTORS: u64 = 4096;

    /// Type, first LBA and sectors of an entry.
    type Fields = (u8, u32, u32);

    /// A disk with tables: where, and the entries.
    fn disk(tables: &[(usize, &[Fields])]) -> Vec<u8> {
        let mut disk = vec![0; SECTORS as usize * 512];
        for (lba, entries) in tables {
            let sector = &mut disk[lba * 512..][..512];
            for ((kind, first, sectors), entry) in
                entries.iter().zip(sector[446..510].chunks_mut(16))
            {
                entry[4] = *kind;
                entry[8..12].copy_from_slice(&first.to_le_bytes());
                entry[12..16].copy_from_slice(&sectors.to_le_bytes());
            }
            sector[510..].copy_from_slice(&[0x55, 0xaa]);
        }
        disk
    }

    struct Found<'a>(&'a [u8], Vec<(u32, u64, u64)>);

    impl Visitor for Found<'_> {
        type Error = ();

        fn read(&mut self, lba: u64) -> Result<[u8; 512], ()> {
            Ok(self.0[lba as usize * 512..][..512].try_into().unwrap())
        }

        fn partition(&mut self, entry: Entry) {
            self.1.push((entry.number, entry.first_lba, entry.sectors));
        }
    }

    fn partitions(disk: &[u8]) -> Option<Vec<(u32, u64, u64)>> {
        let mut found = Found(disk, Vec::new());
        each_partition(SECTORS, &mut found).unwrap().then_some(found.1)
    }

    #[test]
    fn primary_and_logical_partitions_have_the_numbers_that_linux_gives() {
        let disk = disk(&[
            (0, &[(0x83, 64, 100), (0, 0, 0), (0x0f, 1000, 3000), (0x82, 200, 300)]),
            (1000, &[(0x83, 8, 500), (0x05, 600, 900)]),
            (1600, &[(0x83, 16, 700)]),
        ]);
        let expected = [(1, 64, 100), (4, 200, 300), (5, 1008, 500), (6, 1616, 700)];
        assert_eq!(partitions(&disk).unwrap(), expected);
    }

    #[test]
    fn chain_that_leads_into_itself_or_out_of_the_disk_ends() {
        let round = disk(&[(0, &[(0x05, 1000, 3000)]), (1000, &[(0x83, 8, 9), (0x05, 0, 900)])]);
        assert_eq!(partitions(&round).unwrap().len(), MAX_CHAIN as usize);
        let out = disk(&[(0, &[(0x05, 1000, 3000)]), (1000, &[(0x83, 8, 9), (0x05, u32::MAX, 9)])]);
        assert_eq!(partitions(&out).unwrap(), [(5, 1008, 9)]);
    }

    #[test]
    fn partitions_beyond_the_disk_are_passed_over() {
        let table = [(0x83, 64, 5000), (0x83, u32::MAX, u32::MAX), (0x83, 0, 10), (0x83, 4000, 96)];
        assert_eq!(partitions(&disk(&[(0, &table)])).unwrap(), [(4, 4000, 96)]);
    }

    #[test]
    fn disk_with_a_gpt_or_without_a_table_has_no_mbr() {
        assert_eq!(partitions(&disk(&[])), None);
        assert_eq!(partitions(&disk(&[(0, &[(0xee, 1, 4095)])])), None);
        let mut boot_sector = disk(&[(0, &[(0x83, 64, 100)])]);
        boot_sector[446] = 0x7f;
        assert_eq!(partitions(&boot_sector), None);
    }
}
