//! A disk, a partition or an image file, opened for one command.
//!
//! All I/O is positioned and ordinary: no mapping, no shared file offset.

use std::fs::{File, OpenOptions, TryLockError};
use std::io;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt};
use std::path::{Path, PathBuf};

use rustix::fs::{Advice, IFlags, OFlags, ioctl_getflags, ioctl_setflags};

/// Bytes that can be read at any offset: a device, an area in it, or a test's stand-in.
pub trait ReadAt {
    /// Size in bytes.
    fn size(&self) -> u64;

    /// Fills `buffer` with the bytes at `offset`.
    ///
    /// # Errors
    /// The read failed, or the range reaches beyond the end.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// `length` bytes at `offset`, or `None` when they cannot be had: the question "is there such
    /// a thing at that place?" has the answer no beyond the end.
    fn peek(&self, offset: u64, length: usize) -> Option<Vec<u8>> {
        let mut bytes = vec![0; length];
        self.read_at(&mut bytes, offset).ok()?;
        Some(bytes)
    }
}

impl ReadAt for [u8] {
    fn size(&self) -> u64 {
        self.len() as u64
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let bytes = usize::try_from(offset)
            .ok()
            .and_then(|at| self.get(at..)?.get(..buffer.len()))
            .ok_or(io::ErrorKind::UnexpectedEof)?;
        buffer.copy_from_slice(bytes);
        Ok(())
    }
}

/// Major and minor number of a block device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct DeviceNumber {
    /// The driver.
    pub major: u32,
    /// The device, as the driver counts.
    pub minor: u32,
}

impl DeviceNumber {
    /// The numbers in a `st_rdev`.
    #[must_use]
    pub fn from_raw(device: u64) -> DeviceNumber {
        DeviceNumber { major: rustix::fs::major(device), minor: rustix::fs::minor(device) }
    }

    /// Reads `8:1`, the way sysfs and mountinfo write it.
    #[must_use]
    pub fn parse(text: &str) -> Option<DeviceNumber> {
        let (major, minor) = text.trim().split_once(':')?;
        Some(DeviceNumber { major: major.parse().ok()?, minor: minor.parse().ok()? })
    }
}

impl std::fmt::Display for DeviceNumber {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "{}:{}", self.major, self.minor)
    }
}

/// What a path leads to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Kind {
    /// A whole disk, a partition, or anything else the kernel shows as a block device.
    Block(DeviceNumber),
    /// A regular file: the image of a disk or of a partition.
    File,
}

/// What a command is going to do with a device.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Access {
    /// Read, beside whoever else uses it.
    Read,
    /// Read and write, with nobody else in the kernel or among the loaders using it.
    Exclusive,
}

/// Why a device cannot be opened.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// It is not there.
    #[error(
        "{0} does not exist; name a block device or an existing image file \
             (`truncate -s 1G FILE` makes one)"
    )]
    Missing(PathBuf),
    /// It is there, and neither a block device nor a regular file.
    #[error("{0} is neither a block device nor a regular file")]
    WrongKind(PathBuf),
    /// This user may not.
    #[error("no permission to open {0}; block devices need root, try again with sudo")]
    Permission(PathBuf),
    /// The kernel would not give it exclusively.
    #[error(
        "{0} is in use: mounted, active as swap, part of LVM, device mapper or RAID, or another \
         loader is at work on it; `lsblk {0}` shows who has it"
    )]
    Busy(PathBuf),
    /// Anything else.
    #[error("cannot open {path}: {source}")]
    Io {
        /// What was to be opened.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
}

impl OpenError {
    fn from_io(path: &Path, error: io::Error) -> OpenError {
        let path = path.to_path_buf();
        match error.kind() {
            io::ErrorKind::NotFound => OpenError::Missing(path),
            io::ErrorKind::PermissionDenied => OpenError::Permission(path),
            io::ErrorKind::ResourceBusy => OpenError::Busy(path),
            _ => OpenError::Io { path, source: error },
        }
    }
}

/// Finds out what `path` leads to, without opening it.
///
/// # Errors
/// [`OpenError::Missing`], [`OpenError::WrongKind`] or that it cannot be looked at.
pub fn kind_of(path: &Path) -> Result<Kind, OpenError> {
    let metadata = path.metadata().map_err(|error| OpenError::from_io(path, error))?;
    if metadata.file_type().is_block_device() {
        Ok(Kind::Block(DeviceNumber::from_raw(metadata.rdev())))
    } else if metadata.is_file() {
        Ok(Kind::File)
    } else {
        Err(OpenError::WrongKind(path.to_path_buf()))
    }
}

/// An open device.
#[derive(Debug)]
pub struct Device {
    file: File,
    path: PathBuf,
    kind: Kind,
    size: u64,
    sector_size: Option<u32>,
    /// Of a file that is open for writing.
    hold: Option<Hold>,
}

/// Keeps a file from other loaders, and makes it immutable afterwards if it was that before.
#[derive(Debug)]
struct Hold {
    file: File,
    immutable: bool,
}

impl Hold {
    /// Locks the file at `path`, and only then makes it one that can be written to.
    fn take(path: &Path) -> Result<Hold, OpenError> {
        let failed = |error: io::Error| OpenError::from_io(path, error);
        let file = File::open(path).map_err(failed)?;
        file.try_lock().map_err(|error| match error {
            TryLockError::WouldBlock => OpenError::Busy(path.to_path_buf()),
            TryLockError::Error(error) => failed(error),
        })?;
        // Not all file systems have flags.
        let flags = ioctl_getflags(&file).unwrap_or(IFlags::empty());
        let hold = Hold { file, immutable: flags.contains(IFlags::IMMUTABLE) };
        if hold.immutable {
            set_immutable(&hold.file, false).map_err(failed)?;
        }
        Ok(hold)
    }
}

/// While a file is immutable nobody moves its blocks, but nobody opens it for writing either.
fn set_immutable(file: &File, immutable: bool) -> io::Result<()> {
    let flags = ioctl_getflags(file)?;
    let mut wanted = flags;
    wanted.set(IFlags::IMMUTABLE, immutable);
    if wanted == flags { Ok(()) } else { Ok(ioctl_setflags(file, wanted)?) }
}

impl Drop for Hold {
    fn drop(&mut self) {
        if self.immutable {
            // Without it the marks in the file still tell what is its own.
            let _ = set_immutable(&self.file, true);
        }
    }
}

impl Device {
    /// Opens the device at `path`. With [`Access::Exclusive`] a block device is opened O_EXCL, which
    /// the kernel grants only while nothing is mounted on it, on the disk it is a partition of
    /// or on partitions of it, and which keeps it so; a file is locked, and while it is open not
    /// immutable.
    ///
    /// # Errors
    /// [`OpenError`] says what stands in the way.
    pub fn open(path: &Path, access: Access) -> Result<Device, OpenError> {
        let failed = |error: io::Error| OpenError::from_io(path, error);
        let kind = kind_of(path)?;
        let is_file = access == Access::Exclusive && kind == Kind::File;
        let hold = is_file.then(|| Hold::take(path)).transpose()?;
        let mut options = OpenOptions::new();
        options.read(true).write(access == Access::Exclusive);
        if access == Access::Exclusive && kind != Kind::File {
            options.custom_flags(OFlags::EXCL.bits() as i32);
        }
        let file = options.open(path).map_err(failed)?;
        let (size, sector_size) = match kind {
            Kind::File => (file.metadata().map_err(failed)?.len(), None),
            Kind::Block(_) => block_geometry(&file).map_err(failed)?,
        };
        Ok(Device { file, path: path.to_path_buf(), kind, size, sector_size, hold })
    }

    /// The open file.
    #[must_use]
    pub fn file(&self) -> &File {
        &self.file
    }

    /// Makes the file, open for writing, immutable as soon as it is that no more.
    pub fn keep_immutable(&mut self) {
        if let Some(hold) = &mut self.hold {
            hold.immutable = true;
        }
    }

    /// The path it was opened by.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Whether it is a block device or a file.
    #[must_use]
    pub fn kind(&self) -> Kind {
        self.kind
    }

    /// The logical sector sizes it can have: a block device's own; for an image both.
    #[must_use]
    pub fn sector_sizes(&self) -> Vec<u32> {
        self.sector_size.map_or_else(|| vec![512, 4096], |size| vec![size])
    }

    /// Writes `bytes` at `offset`.
    ///
    /// # Errors
    /// The write failed.
    pub fn write(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.file.write_all_at(bytes, offset)
    }

    /// Writes `bytes` at `offset` and returns when they are on the medium.
    ///
    /// # Errors
    /// The write or the flush failed.
    pub fn write_durably(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        self.write(bytes, offset)?;
        self.file.sync_all()
    }
}

impl ReadAt for Device {
    fn size(&self) -> u64 {
        self.size
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        self.file.read_exact_at(buffer, offset)
    }
}

/// Size in bytes and logical sector size of a block device. Also drops what the kernel has cached of
/// it: a partition and its disk have separate caches, and the disk's may be stale.
fn block_geometry(file: &File) -> io::Result<(u64, Option<u32>)> {
    let size = rustix::fs::seek(file, rustix::fs::SeekFrom::End(0))?;
    let sector_size = rustix::fs::ioctl_blksszget(file)?;
    rustix::fs::fadvise(file, 0, None, Advice::DontNeed)?;
    Ok((size, Some(sector_size)))
}
