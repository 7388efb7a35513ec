//! The partitions of a disk with a GPT or an MBR, and where they are.

use std::io;

use format::gpt::{GptError, Header, PRIMARY_LBA};
use format::mbr;
use uuid::Uuid;

use crate::device::ReadAt;

/// One partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number as Linux counts: the 1 of `vda1`.
    pub number: u32,
    /// Its identity, which Linux calls PARTUUID; of a GPT alone.
    pub uuid: Option<Uuid>,
    /// First byte on the disk.
    pub start: u64,
    /// Size in bytes.
    pub size: u64,
}

/// Why the partitions of a disk are not known.
#[derive(Debug, thiserror::Error)]
pub enum PartitionError {
    /// There is no usable header.
    #[error(transparent)]
    Header(#[from] GptError),
    /// The header is good, its table is not.
    #[error("the GPT's partition table is damaged (checksum)")]
    Table,
    /// The disk could not be read.
    #[error("cannot read the partition table: {0}")]
    Io(#[from] io::Error),
}

/// The partitions of `disk` according to its primary GPT or, when that is broken, to the backup; without a
/// GPT to its MBR.
///
/// # Errors
/// What is wrong with the primary GPT, when neither the backup nor an MBR is good.
pub fn list<Disk: ReadAt + ?Sized>(
    disk: &Disk,
    sector_size: u32,
) -> Result<Vec<Partition>, PartitionError> {
    let sectors = disk.size() / u64::from(sector_size);
    list_from(disk, sector_size, PRIMARY_LBA).or_else(|primary| {
        let backup = list_from(disk, sector_size, sectors.saturating_sub(1));
        backup.or_else(|_| by_mbr(disk, sector_size)?.ok_or(primary))
    })
}

/// The partitions by the disk's MBR, if it has one.
fn by_mbr<Disk: ReadAt + ?Sized>(
    disk: &Disk,
    sector_size: u32,
) -> Result<Option<Vec<Partition>>, PartitionError> {
    struct Found<'a, Disk: ?Sized>(&'a Disk, u64, Vec<Partition>);

    impl<Disk: ReadAt + ?Sized> mbr::Visitor for Found<'_, Disk> {
        type Error = io::Error;

        fn read(&mut self, lba: u64) -> io::Result<[u8; 512]> {
            let mut sector = [0; 512];
            self.0.read_at(&mut sector, lba * self.1)?;
            Ok(sector)
        }

        fn partition(&mut self, entry: mbr::Entry) {
            let (start, size) = (entry.first_lba * self.1, entry.sectors * self.1);
            self.2.push(Partition { number: entry.number, uuid: None, start, size });
        }
    }

    let mut found = Found(disk, u64::from(sector_size), Vec::new());
    let is_there = mbr::each_partition(disk.size() / u64::from(sector_size), &mut found)?;
    Ok(is_there.then_some(found.2))
}

fn list_from<Disk: ReadAt + ?Sized>(
    disk: &Disk,
    sector_size: u32,
    lba: u64,
) -> Result<Vec<Partition>, PartitionError> {
    let bytes_per_sector = u64::from(sector_size);
    let mut sector = vec![0; sector_size as usize];
    disk.read_at(&mut sector, lba * bytes_per_sector)?;
    let header = Header::parse(&sector, lba, disk.size() / bytes_per_sector)?;

    let mut table = vec![0; (header.table_sectors() * bytes_per_sector) as usize];
    disk.read_at(&mut table, header.entries_lba * bytes_per_sector)?;
    let mut check = header.table_check();
    check.update(&table);
    if !check.is_intact() {
        return Err(PartitionError::Table);
    }
    let partitions = header.entries(0, &table).map(|entry| Partition {
        number: entry.index + 1,
        uuid: Some(Uuid::from_bytes_le(entry.unique_guid)),
        start: entry.first_lba * bytes_per_sector,
        size: entry.sectors() * bytes_per_sector,
    });
    Ok(partitions.collect())
}
