//! Areas that are files in a file system: their extents, and the marks in them.
//!
//! The payload knows no file system. It writes to the extents that the handoff names, on the whole disk,
//! and only while the marks in them say that they are still the file's. So the file is made of blocks that are
//! plainly its own, and made immutable, lest a defragmenter or a person moves them.

use std::fs::{self, OpenOptions};
use std::io::{self, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use format::BLOCK;
use format::area::{TAIL, Trailer};
use format::handoff::{Extent, ExtentMark};
use indicatif::ProgressBar;
use rustix::fs::{FallocateFlags, IFlags, fallocate, fstatfs, ioctl_getflags};
use rustix::io::Errno;

use crate::device::{Access, Device, DeviceNumber, OpenError, ReadAt};
use crate::fiemap::{self, FileExtent};
use crate::in_use::{System, Whereabouts};

/// Magic numbers of the file systems whose files stay where they are (statfs(2)): ext2, ext3 and ext4;
/// XFS.
const FILE_SYSTEMS: [i64; 2] = [0xef53, 0x5846_5342];

/// Bytes written at a time while a file is made.
const PIECE: usize = 1 << 20;

/// Why a file cannot be an area.
#[derive(Debug, thiserror::Error)]
pub enum FileError {
    /// There is one already.
    #[error("{0} exists; leave --size out to reserve it again, or name a file that does not exist")]
    Exists(PathBuf),
    /// It could not be made.
    #[error("cannot make {path} with {size} bytes: {source}; nothing of it is left")]
    Make {
        /// The file.
        path: PathBuf,
        /// Its size.
        size: u64,
        /// What the kernel said.
        source: io::Error,
    },
    /// It is in a file system that moves data about, or that is not known.
    #[error(
        "{0} is on a file system that is neither ext4 nor XFS; only there do a file's blocks stay \
         where they are. Reserve a partition instead, or put the file elsewhere"
    )]
    FileSystem(PathBuf),
    /// The file system writes data to its journal, and from there over the dump at the next mount.
    #[error(
        "{0} has its data journaled (chattr +j, or data=journal): after a crash the journal would be \
         played back over the dump. Put it on a file system mounted without that"
    )]
    Journaled(PathBuf),
    /// The file system is not on a plain disk or partition.
    #[error(
        "{path} is on {device}, which is not a plain disk or partition (LVM, device mapper, RAID, \
         loop): the payload cannot reach through that. Reserve a partition instead"
    )]
    NotPlain {
        /// The file.
        path: PathBuf,
        /// What it is on.
        device: String,
    },
    /// Part of it is not plainly its own.
    #[error(
        "{path}: its blocks from byte {at} on are {problem}; remove it and let \
         `loader reserve --size` make it anew"
    )]
    Blocks {
        /// The file.
        path: PathBuf,
        /// Where in the file.
        at: u64,
        /// What is wrong.
        problem: &'static str,
    },
    /// The marks are not on the disk.
    #[error(
        "{path}: the block at {position} of the file is not at {at} of {disk}, where the file system \
         says; this kind of file cannot be an area. Reserve a partition instead"
    )]
    Elsewhere {
        /// The file.
        path: PathBuf,
        /// Where in the file, in bytes.
        position: u64,
        /// The disk.
        disk: PathBuf,
        /// Where on it, in bytes.
        at: u64,
    },
    /// The disk cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// Something could not be found out, or written.
    #[error("cannot {action} {path}: {source}")]
    Io {
        /// The file.
        path: PathBuf,
        /// What was tried.
        action: &'static str,
        /// What the kernel said.
        source: io::Error,
    },
}

/// Makes a file of `size` zeros, all of them written: of blocks that are only allocated a file system
/// says after a crash that they are zeros.
///
/// # Errors
/// [`FileError`]; then there is no file.
pub fn make(path: &Path, size: u64) -> Result<(), FileError> {
    let failed = |source| FileError::Make { path: path.to_path_buf(), size, source };
    let mut file =
        OpenOptions::new().write(true).create_new(true).open(path).map_err(|error| match error
            .kind()
        {
            io::ErrorKind::AlreadyExists => FileError::Exists(path.to_path_buf()),
            _ => failed(error),
        })?;
    let mut write = || {
        // As far as possible in one piece. ext2 and ext3 cannot; there the writes allocate.
        match fallocate(&file, FallocateFlags::empty(), 0, size) {
            Ok(()) | Err(Errno::OPNOTSUPP) => {}
            Err(error) => return Err(error.into()),
        }
        let zeros = vec![0; PIECE];
        let bar = ProgressBar::new(size);
        let mut left = size;
        while left > 0 {
            let some = left.min(PIECE as u64);
            file.write_all(&zeros[..some as usize])?;
            left -= some;
            bar.inc(some);
        }
        bar.finish_and_clear();
        file.sync_all()
    };
    write().map_err(|error| {
        let _ = fs::remove_file(path);
        failed(error)
    })
}

/// Where a file lies.
#[derive(Clone, Debug)]
pub struct FileArea {
    /// The whole disk.
    pub disk: Whereabouts,
    /// Its pieces in the order of the file, as they lie on the whole disk.
    pub extents: Vec<Extent>,
}

impl FileArea {
    /// Finds out where the open file `device` lies.
    ///
    /// # Errors
    /// [`FileError`] says why it cannot be an area.
    pub fn of(device: &Device, system: &System) -> Result<FileArea, FileError> {
        let path = || device.path().to_path_buf();
        let io_error = |action| move |source| FileError::Io { path: path(), action, source };
        let file = device.file();
        let kind =
            fstatfs(file).map_err(|error| io_error("look at the file system of")(error.into()))?;
        if !FILE_SYSTEMS.contains(&kind.f_type) {
            return Err(FileError::FileSystem(path()));
        }
        let metadata = file.metadata().map_err(io_error("look at"))?;
        let number = DeviceNumber::from_raw(metadata.dev());
        let flags = ioctl_getflags(file).unwrap_or(IFlags::empty());
        let journaled = system.journals_data(number).map_err(io_error("look at the mount of"))?;
        if journaled || flags.contains(IFlags::JOURNALING) {
            return Err(FileError::Journaled(path()));
        }
        let disk = system.whereabouts(number).map_err(io_error("find the disk of"))?;
        if let Some(device) = disk.made_of_others {
            return Err(FileError::NotPlain { path: path(), device });
        }
        let pieces = fiemap::extents(file).map_err(io_error("find the blocks of"))?;
        let extents = join(&pieces, device.size(), disk.start);
        let extents =
            extents.map_err(|(at, problem)| FileError::Blocks { path: path(), at, problem })?;
        Ok(FileArea { disk, extents })
    }

    /// Writes the marks through the file system, and looks at them on the disk itself.
    ///
    /// # Errors
    /// [`FileError`]
    pub fn mark(&self, device: &Device, uuid: [u8; 16]) -> Result<(), FileError> {
        let written = self
            .marks(uuid, device.size())
            .try_for_each(|mark| device.write(&mark.to_block(), mark.position));
        let synced = written.and_then(|()| device.file().sync_all());
        synced.map_err(|source| FileError::Io {
            path: device.path().to_path_buf(),
            action: "write to",
            source,
        })?;
        self.verify(device, uuid)
    }

    /// Looks whether the marks are where the payload will look for them.
    ///
    /// # Errors
    /// [`FileError::Elsewhere`], or that the disk cannot be read.
    pub fn verify(&self, device: &Device, uuid: [u8; 16]) -> Result<(), FileError> {
        let disk = Device::open(&self.disk.node, Access::Read)?;
        let mut block = [0; BLOCK as usize];
        for mark in self.marks(uuid, device.size()) {
            disk.read_at(&mut block, mark.at).map_err(|source| FileError::Io {
                path: self.disk.node.clone(),
                action: "read",
                source,
            })?;
            if !mark.is_in(&block) {
                return Err(FileError::Elsewhere {
                    path: device.path().to_path_buf(),
                    position: mark.position,
                    disk: self.disk.node.clone(),
                    at: mark.at,
                });
            }
        }
        Ok(())
    }

    /// The marks of a file of `size` bytes. The trailer stands for the one in its last block.
    fn marks(&self, uuid: [u8; 16], size: u64) -> impl Iterator<Item = ExtentMark> {
        let begins = self.extents.iter().scan(0, |position, extent| {
            let begin = *position;
            *position += extent.size;
            Some((begin, *extent))
        });
        let marks = begins.flat_map(move |(begin, extent)| {
            extent.marks().map(move |offset| ExtentMark {
                uuid,
                position: begin + offset,
                at: extent.start + offset,
            })
        });
        marks.filter(move |mark| mark.position != size - BLOCK)
    }
}

/// Joins what lies side by side. `start` is where the file system begins on the disk. The error says where
/// in the file something is wrong, and what.
fn join(pieces: &[FileExtent], size: u64, start: u64) -> Result<Vec<Extent>, (u64, &'static str)> {
    let mut extents: Vec<Extent> = Vec::new();
    let mut at = 0;
    for piece in pieces {
        if at >= size {
            break;
        }
        if let Some(problem) = piece.problem {
            return Err((at, problem));
        }
        if piece.logical != at {
            return Err((at, "a hole"));
        }
        let extent = Extent { start: start + piece.physical, size: piece.length.min(size - at) };
        if !extent.size.is_multiple_of(BLOCK) || !extent.start.is_multiple_of(512) {
            return Err((at, "in pieces smaller than 4 KiB"));
        }
        match extents.last_mut() {
            Some(last) if last.start + last.size == extent.start => last.size += extent.size,
            _ => extents.push(extent),
        }
        at += extent.size;
    }
    match extents.last() {
        _ if at < size => Err((at, "a hole")),
        Some(last) if last.size < TAIL => Err((size - last.size, "less than 64 KiB in one piece")),
        _ => Ok(extents),
    }
}

/// Makes the file that has `trailer` ready for the next crash: marks its extents.
///
/// # Errors
/// [`FileError`]
pub fn mark_again(device: &Device, trailer: &Trailer, system: &System) -> Result<(), FileError> {
    FileArea::of(device, system)?.mark(device, trailer.uuid)
}

#[cfg(test)]
mod tests {
    use super::*;

    const MIB: u64 = 1 << 20;

    fn piece(logical: u64, physical: u64, length: u64) -> FileExtent {
        FileExtent { logical, physical, length, problem: None }
    }

    #[test]
    fn pieces_side_by_side_are_one_extent_on_the_whole_disk() {
        let pieces = [
            piece(0, 8 * MIB, MIB),
            piece(MIB, 9 * MIB, MIB),
            piece(2 * MIB, 4 * MIB, MIB),
            // Allocated beyond the end of the file.
            piece(3 * MIB, 20 * MIB, 8 * MIB),
        ];
        let extents = join(&pieces, 4 * MIB, MIB).unwrap();
        let extent = |start, size| Extent { start, size };
        assert_eq!(
            extents,
            [extent(9 * MIB, 2 * MIB), extent(5 * MIB, MIB), extent(21 * MIB, MIB)]
        );
        let area = FileArea { disk: Whereabouts::default(), extents };
        let marks: Vec<_> =
            area.marks([1; 16], 4 * MIB).map(|mark| (mark.position, mark.at)).collect();
        assert_eq!(
            marks,
            [
                (0, 9 * MIB),
                (2 * MIB - 4096, 11 * MIB - 4096),
                (2 * MIB, 5 * MIB),
                (3 * MIB - 4096, 6 * MIB - 4096),
                (3 * MIB, 21 * MIB),
            ]
        );
    }

    #[test]
    fn blocks_that_are_not_plainly_the_files_are_refused() {
        let shared = FileExtent { problem: Some("shared"), ..piece(MIB, 9 * MIB, MIB) };
        let refused = |pieces: &[FileExtent]| join(pieces, 2 * MIB, 0).unwrap_err();
        assert_eq!(refused(&[piece(0, 8 * MIB, MIB), shared]), (MIB, "shared"));
        assert_eq!(refused(&[piece(4096, 8 * MIB, 2 * MIB)]), (0, "a hole"));
        assert_eq!(refused(&[piece(0, 8 * MIB, MIB)]), (MIB, "a hole"));
        assert_eq!(refused(&[]), (0, "a hole"));
        let small = "in pieces smaller than 4 KiB";
        assert_eq!(refused(&[piece(0, 8 * MIB, 1024), piece(1024, 0, 2 * MIB)]), (0, small));
        let end = 2 * MIB - 4096;
        let tail = (end, "less than 64 KiB in one piece");
        assert_eq!(refused(&[piece(0, 8 * MIB, end), piece(end, 0, 4096)]), tail);
    }
}
