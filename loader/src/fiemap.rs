//! Where a file system keeps the bytes of a file: the FS_IOC_FIEMAP ioctl.
//!
//! Source: Documentation/filesystems/fiemap.rst and include/uapi/linux/fiemap.h, kernel 6.12.

#![allow(unsafe_code)]

use std::fs::File;
use std::io;

use rustix::ioctl::{Opcode, Updater, ioctl, opcode};

/// Extents asked for at a time.
const BATCH: usize = 128;

/// FIEMAP_FLAG_SYNC: the file is written back first.
const SYNC: u32 = 1;

/// FIEMAP_EXTENT_LAST.
const LAST: u32 = 0x1;
/// FIEMAP_EXTENT_MERGED: nothing that matters to us.
const MERGED: u32 = 0x1000;

/// What the other flags mean: blocks that are not plainly the file's, where they are said to be.
const PROBLEMS: [(u32, &str); 9] = [
    (0x2, "at an unknown place"),
    (0x4, "not allocated yet"),
    (0x8, "compressed or otherwise encoded"),
    (0x80, "encrypted"),
    (0x100, "not aligned to blocks"),
    (0x200, "inside metadata"),
    (0x400, "packed with other files' data"),
    (0x800, "allocated, but never written"),
    (0x2000, "shared with another file"),
];

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct Header {
    start: u64,
    length: u64,
    flags: u32,
    mapped: u32,
    count: u32,
    reserved: u32,
}

#[derive(Clone, Copy, Default)]
#[repr(C)]
struct RawExtent {
    logical: u64,
    physical: u64,
    length: u64,
    reserved64: [u64; 2],
    flags: u32,
    reserved: [u32; 3],
}

const _: () = assert!(size_of::<Header>() == 32 && size_of::<RawExtent>() == 56);

#[repr(C)]
struct Request {
    header: Header,
    extents: [RawExtent; BATCH],
}

const FS_IOC_FIEMAP: Opcode = opcode::read_write::<Header>(b'f', 11);

/// A piece of a file. All values are in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FileExtent {
    /// Where it begins in the file.
    pub logical: u64,
    /// Where it begins on the block device that holds the file system.
    pub physical: u64,
    /// Its size.
    pub length: u64,
    /// Why its blocks must not be written to behind the file system's back.
    pub problem: Option<&'static str>,
}

/// The extents of `file`, in the order of the file, after it was written back. Holes have none.
///
/// # Errors
/// The file system cannot tell.
pub fn extents(file: &File) -> io::Result<Vec<FileExtent>> {
    let mut found = Vec::new();
    let mut start = 0;
    loop {
        let (batch, last) = batch(file, start)?;
        let Some(end) = batch.last().map(|extent| extent.logical + extent.length) else {
            return Ok(found);
        };
        found.extend(batch);
        if last || end <= start {
            return Ok(found);
        }
        start = end;
    }
}

/// The first extents from `start` on, and whether they are the last ones.
fn batch(file: &File, start: u64) -> io::Result<(Vec<FileExtent>, bool)> {
    let length = u64::MAX - start;
    let header = Header { start, length, flags: SYNC, count: BATCH as u32, ..Header::default() };
    let mut request = Request { header, extents: [RawExtent::default(); BATCH] };
    // SAFETY: the kernel reads the header, which promises room for `count` extents behind it, and writes
    // no more than both.
    unsafe { ioctl(file, Updater::<FS_IOC_FIEMAP, Request>::new(&mut request))? };
    let mapped = &request.extents[..BATCH.min(request.header.mapped as usize)];
    let is_last = mapped.last().is_none_or(|extent| extent.flags & LAST != 0);
    Ok((mapped.iter().map(FileExtent::from_raw).collect(), is_last))
}

impl FileExtent {
    fn from_raw(raw: &RawExtent) -> FileExtent {
        let known = PROBLEMS.iter().find(|(flag, _)| raw.flags & flag != 0);
        let unknown = (raw.flags & !(LAST | MERGED) != 0).then_some("of an unknown kind");
        let problem = known.map(|(_, text)| *text).or(unknown);
        FileExtent { logical: raw.logical, physical: raw.physical, length: raw.length, problem }
    }
}
