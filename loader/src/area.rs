//! The reserved area on a device: the whole device, or one partition of it.

use std::io;
use std::path::PathBuf;

use format::BLOCK;
use format::area::{CARD_BLOCK, HEAD, Layout, Trailer, TrailerError};

use crate::device::{Device, ReadAt};
use crate::file_area::{self, FileError};
use crate::in_use::System;
use crate::partition::{self, Partition};

/// What lies in the last block of a device or partition.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Nothing of ours.
    Absent,
    /// The mark of an area that ends here and has just this size.
    Valid(Trailer, Layout),
    /// An intact mark, of an area of another size: the last partition of this disk, or this
    /// device before somebody resized it.
    OtherSize(u64),
    /// A mark that cannot be relied on.
    Unusable(TrailerError),
}

impl Mark {
    /// Reads the mark of the area that has `size` bytes from `start` on.
    ///
    /// # Errors
    /// The block could not be read.
    pub fn read<Disk: ReadAt + ?Sized>(disk: &Disk, start: u64, size: u64) -> io::Result<Mark> {
        let Some(layout) = Layout::new(size) else { return Ok(Mark::Absent) };
        let mut block = [0; BLOCK as usize];
        disk.read_at(&mut block, start + layout.trailer)?;
        Ok(match Trailer::parse(&block) {
            Ok(trailer) if trailer.area_size == size => Mark::Valid(trailer, layout),
            Ok(trailer) => Mark::OtherSize(trailer.area_size),
            Err(TrailerError::Magic) => Mark::Absent,
            Err(error) => Mark::Unusable(error),
        })
    }
}

/// Why no area is found on a device.
#[derive(Debug, thiserror::Error)]
pub enum FindError {
    /// There is none.
    #[error(
        "{0} carries no reservation mark, and no partition of it does; \
         `loader reserve` makes one"
    )]
    NoMark(PathBuf),
    /// The mark is there and cannot be relied on.
    #[error(
        "{path}: {error}; the payload will not write here, reserve it again with \
             `loader reserve --force {path}` (a dump in it is lost then)"
    )]
    Unusable {
        /// The device.
        path: PathBuf,
        /// What is wrong with the mark.
        error: TrailerError,
    },
    /// The mark is of an area of another size.
    #[error(
        "{path} has {size} bytes, but its last block carries the mark of an area of \
             {marked} bytes; if this is a whole disk, name the partition instead; if it was \
             resized, reserve it again with `loader reserve --force {path}`"
    )]
    OtherSize {
        /// The device.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// The size in the mark.
        marked: u64,
    },
    /// More than one partition carries a mark.
    #[error(
        "partitions {numbers} of {path} are all dump areas; name the one you mean \
             (of an image: make its partitions visible with `losetup -P`)"
    )]
    Several {
        /// The device.
        path: PathBuf,
        /// The partitions, such as "1, 3".
        numbers: String,
    },
    /// The device could not be read.
    #[error("cannot read {path}: {source}")]
    Io {
        /// The device.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Why an area was not made empty.
#[derive(Debug, thiserror::Error)]
pub enum EmptyError {
    /// A write or the flush failed.
    #[error(transparent)]
    Io(#[from] io::Error),
    /// The file is empty, but nobody can mark its extents.
    #[error(transparent)]
    File(#[from] FileError),
}

/// A reserved area. Its bytes are read with offsets from its own start.
#[derive(Debug)]
pub struct Area<'device> {
    device: &'device Device,
    start: u64,
    /// Its mark as it was when the area was found.
    pub trailer: Trailer,
    /// Where things are in it.
    pub layout: Layout,
    /// The partition that it fills; `None` when it fills the device.
    pub partition: Option<Partition>,
}

impl<'device> Area<'device> {
    /// Finds the area on `device`: the device as a whole, else the one partition with a mark.
    ///
    /// # Errors
    /// [`FindError`] says why there is none, or not just one.
    pub fn find(device: &'device Device) -> Result<Area<'device>, FindError> {
        let path = device.path().to_path_buf();
        let io_error = |source| FindError::Io { path: path.clone(), source };
        let whole = Mark::read(device, 0, device.size()).map_err(io_error)?;
        if let Mark::Valid(trailer, layout) = whole {
            return Ok(Area { device, start: 0, trailer, layout, partition: None });
        }
        let mut marked = Vec::new();
        for partition in partitions(device) {
            let mark = Mark::read(device, partition.start, partition.size).map_err(io_error)?;
            if let Mark::Valid(trailer, layout) = mark {
                let start = partition.start;
                marked.push(Area { device, start, trailer, layout, partition: Some(partition) });
            }
        }
        if marked.len() > 1 {
            return Err(FindError::Several { path, numbers: numbers(&marked) });
        }
        marked.pop().ok_or(match whole {
            Mark::Unusable(error) => FindError::Unusable { path, error },
            Mark::OtherSize(marked) => FindError::OtherSize { path, size: device.size(), marked },
            Mark::Absent | Mark::Valid(..) => FindError::NoMark(path),
        })
    }

    /// Makes the area empty: the trailer first, then the beginning of the core, which the payload
    /// wants to find cleared; or the marks of a file, which it wants to find. Returns when both are on the
    /// medium.
    ///
    /// # Errors
    /// A write or the flush failed.
    pub fn empty(&self) -> Result<(), EmptyError> {
        let trailer = self.trailer.emptied();
        self.device.write_durably(&trailer.to_block(), self.start + self.layout.trailer)?;
        if trailer.in_file {
            return Ok(file_area::mark_again(self.device, &trailer, &System::default())?);
        }
        Ok(self.device.write_durably(&[0; HEAD as usize], self.start)?)
    }

    /// The crash card; `None` when there is none, in an area that was saved since, too, or it is damaged.
    ///
    /// # Errors
    /// The block cannot be read.
    pub fn card(&self) -> io::Result<Option<String>> {
        let mut block = vec![0; CARD_BLOCK as usize];
        self.read_at(&mut block, self.layout.card)?;
        Ok(self.trailer.card(&block).map(str::to_owned))
    }

    /// The area's name for messages: the device's path and, if so, the partition's number.
    #[must_use]
    pub fn name(&self) -> String {
        let path = self.device.path().display();
        match self.partition {
            Some(partition) => format!("{path} (partition {})", partition.number),
            None => path.to_string(),
        }
    }
}

impl ReadAt for Area<'_> {
    fn size(&self) -> u64 {
        self.layout.area_size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64);
        if end.is_none_or(|end| end > self.size()) {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        self.device.read_at(buffer, self.start + offset)
    }
}

/// The partitions of `device`, of an image for either sector size: only one makes sense, and marks are only where
/// it does.
fn partitions(device: &Device) -> Vec<Partition> {
    let lists = device.sector_sizes().into_iter().map(|size| partition::list(device, size));
    lists.flatten().flatten().collect()
}

fn numbers(areas: &[Area<'_>]) -> String {
    let partitions = areas.iter().filter_map(|area| area.partition);
    let numbers: Vec<_> = partitions.map(|partition| partition.number.to_string()).collect();
    numbers.join(", ")
}
