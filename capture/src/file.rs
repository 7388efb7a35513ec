//! A file in a file system as the area: its extents, in the order of the file, are a disk of their own.

use format::BLOCK;
use format::handoff::{Extent, ExtentMark, File, Handoff};

use crate::{Disk, DiskError, OldPhys};

/// The disk that a file's extents make up. What is written to it goes to the whole disk below.
pub struct FileDisk<'a> {
    disk: &'a mut dyn Disk,
    handoff: &'a Handoff<'a>,
    file: File,
    /// The extent that was used last: its number, and where it begins in the file.
    index: u32,
    position: u64,
}

/// A part of an extent.
struct Part {
    /// Where it is on the disk.
    at: u64,
    /// Where it is in the request.
    offset: u64,
    size: u64,
}

impl<'a> FileDisk<'a> {
    /// The extents of `file` on `disk`, if it is the disk that the file was on.
    pub fn new(
        disk: &'a mut dyn Disk,
        handoff: &'a Handoff<'a>,
        file: File,
    ) -> Option<FileDisk<'a>> {
        let is_it = disk.size() == file.disk_size;
        is_it.then_some(FileDisk { disk, handoff, file, index: 0, position: 0 })
    }

    /// Which file it is.
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Looks whether all extents are still the file's. `block` is of one block.
    ///
    /// # Errors
    /// Where in the file the first block lies that is not, or the disk's error.
    pub fn check_marks(&mut self, block: &mut [u8]) -> Result<(), NotMarked> {
        let FileDisk { handoff, file, .. } = *self;
        let uuid = file.uuid;
        let mut before = 0;
        for index in 0..file.extents {
            let extent = handoff.extent(&file, index).ok_or(NotMarked::At(before))?;
            for offset in extent.marks() {
                let (position, at) = (before + offset, extent.start + offset);
                // The last block of the file is the trailer.
                if position == file.area_size - BLOCK {
                    break;
                }
                self.disk.read(at, block).map_err(NotMarked::Disk)?;
                if !(ExtentMark { uuid, position, at }.is_in(block)) {
                    return Err(NotMarked::At(position));
                }
            }
            before += extent.size;
        }
        Ok(())
    }

    /// The extent with the byte at `offset` of the file, and where it begins there.
    fn extent_at(&mut self, offset: u64) -> Option<(Extent, u64)> {
        if offset < self.position {
            (self.index, self.position) = (0, 0);
        }
        loop {
            let extent = self.handoff.extent(&self.file, self.index)?;
            if offset - self.position < extent.size {
                return Some((extent, self.position));
            }
            self.index += 1;
            self.position += extent.size;
        }
    }

    /// Does `each` to the parts of a request, one for each extent that it touches.
    fn each_part(
        &mut self,
        offset: u64,
        size: u64,
        mut each: impl FnMut(&mut dyn Disk, Part) -> Result<(), DiskError>,
    ) -> Result<(), DiskError> {
        let end = offset.checked_add(size).filter(|&end| end <= self.file.area_size);
        let end = end.ok_or(DiskError::Range)?;
        let mut at = offset;
        while at < end {
            let (extent, begin) = self.extent_at(at).ok_or(DiskError::Range)?;
            let inside = at - begin;
            let size = (extent.size - inside).min(end - at);
            each(self.disk, Part { at: extent.start + inside, offset: at - offset, size })?;
            at += size;
        }
        Ok(())
    }
}

/// Why a file is not written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum NotMarked {
    /// The block at this place in the file, in bytes, is not marked as being there.
    At(u64),
    /// The disk does not do what it is asked for.
    Disk(DiskError),
}

impl Disk for FileDisk<'_> {
    fn size(&self) -> u64 {
        self.file.area_size
    }

    fn sector_size(&self) -> u32 {
        self.disk.sector_size()
    }

    fn read(&mut self, offset: u64, into: &mut [u8]) -> Result<(), DiskError> {
        self.each_part(offset, into.len() as u64, |disk, Part { at, offset, size }| {
            disk.read(at, &mut into[offset as usize..(offset + size) as usize])
        })
    }

    fn write(&mut self, offset: u64, bytes: &[u8]) -> Result<(), DiskError> {
        self.each_part(offset, bytes.len() as u64, |disk, Part { at, offset, size }| {
            disk.write(at, &bytes[offset as usize..(offset + size) as usize])
        })
    }

    fn write_old(&mut self, offset: u64, from: OldPhys, size: u64) -> Result<(), DiskError> {
        self.each_part(offset, size, |disk, Part { at, offset, size }| {
            disk.write_old(at, OldPhys(from.0 + offset), size)
        })
    }

    fn flush(&mut self) -> Result<(), DiskError> {
        self.disk.flush()
    }
}

#[cfg(test)]
#[path = "file_tests.rs"]
mod tests;
