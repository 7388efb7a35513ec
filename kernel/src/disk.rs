//! A driver's block device as the disk that the dump logic asks for: bytes instead of blocks.

use capture::{Disk, DiskError, OldPhys};
use drivers::PhysAddr;
use drivers::block::{BlockDevice, BlockError, Lba};

/// A block device, addressed in bytes.
pub struct ByteDisk<D: BlockDevice>(pub D);

impl<D: BlockDevice> ByteDisk<D> {
    fn lba(&self, offset: u64) -> Result<Lba, DiskError> {
        let size = u64::from(self.0.block_size());
        if offset.is_multiple_of(size) { Ok(Lba(offset / size)) } else { Err(DiskError::Range) }
    }
}

fn disk_error(error: BlockError) -> DiskError {
    match error {
        BlockError::Device | BlockError::Protocol => DiskError::Failed,
        BlockError::Timeout => DiskError::Timeout,
        BlockError::Range => DiskError::Range,
    }
}

impl<D: BlockDevice> Disk for ByteDisk<D> {
    fn size(&self) -> u64 {
        self.0.blocks().saturating_mul(self.0.block_size().into())
    }

    fn sector_size(&self) -> u32 {
        self.0.block_size()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        let at = self.lba(offset)?;
        self.0.read(at, into).map_err(disk_error)
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        let at = self.lba(offset)?;
        self.0.write(at, bytes).map_err(disk_error)
    }

    fn write_old(&mut self, offset: u64, from: OldPhys, size: u64) -> Result<(), DiskError> {
        let at = self.lba(offset)?;
        self.0.write_physical(at, PhysAddr(from.0), size).map_err(disk_error)
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.0.flush().map_err(disk_error)
    }
}
