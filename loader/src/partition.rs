//! The partitions of a disk with a GPT, and where they are.

use std::io;

use format::gpt::{GptError, Header, PRIMARY_LBA};
use uuid::Uuid;

use crate::device::ReadAt;

/// One partition of a GPT.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Partition {
    /// Its number as Linux counts: the 1 of `vda1`.
    pub number: u32,
    /// Its identity, which Linux calls PARTUUID.
    pub uuid: Uuid,
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

/// The partitions of `disk` according to its primary GPT or, when that is broken, to the backup.
///
/// # Errors
/// What is wrong with the primary one, when the backup is not good either.
pub fn list<Disk: ReadAt + ?Sized>(
    disk: &Disk,
    sector_size: u32,
) -> Result<Vec<Partition>, PartitionError> {
    let sectors = disk.size() / u64::from(sector_size);
    list_from(disk, sector_size, PRIMARY_LBA).or_else(|primary| {
        list_from(disk, sector_size, sectors.saturating_sub(1)).map_err(|_| primary)
    })
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
        uuid: Uuid::from_bytes_le(entry.unique_guid),
        start: entry.first_lba * bytes_per_sector,
        size: entry.sectors() * bytes_per_sector,
    });
    Ok(partitions.collect())
}
