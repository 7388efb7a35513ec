//! Files and block devices as one slice of bytes.
//!
//! The only unsafe code of this crate.

use std::fs::File;
use std::io::{Seek, SeekFrom};
use std::path::Path;

use memmap2::{Mmap, MmapOptions};

use crate::Error;

/// Maps a file or a block device for reading.
///
/// # Errors
/// [`Error::Io`] when it cannot be opened or mapped; an empty file gives an empty map.
#[allow(unsafe_code)]
pub fn map(path: &Path) -> Result<Mmap, Error> {
    let io = |error| Error::Io { path: path.to_owned(), error };
    let mut file = File::open(path).map_err(io)?;
    if file.metadata().map_err(io)?.is_dir() {
        return Err(io(std::io::ErrorKind::IsADirectory.into()));
    }
    // The size of a block device is where its end is; its metadata says 0.
    let size = file.seek(SeekFrom::End(0)).map_err(io)?;
    let size = usize::try_from(size).map_err(|_| io(std::io::ErrorKind::FileTooLarge.into()))?;
    // memmap2 asks that no other process changes it meanwhile: a dump is not written to while it
    // is being read. Where that is broken, reads give other bytes (every one of them is distrusted
    // and bounds-checked anyway), or the process ends by SIGBUS when the file is cut short.
    // SAFETY: the map is private and read-only, and nothing in this program writes to the file.
    unsafe { MmapOptions::new().len(size).map(&file) }.map_err(io)
}
