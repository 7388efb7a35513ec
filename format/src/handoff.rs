//! The handoff: what the payload is told of dump areas that are files in a file system.
//!
//! ```text
//! 0      header: magic, version, number of files, size, checksums
//! 32     for each file: its entry, and then its extents in the order of the file
//! ```
//!
//! `loader handoff` makes it and `kexec -p --initrd=` loads it beside the payload, which knows no file system.
//! Between then and the crash a file system may have moved the file: so nothing is written to an extent
//! unless the [`ExtentMark`]s in it, on the disk, say that it is still the file's.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32, U64};

use crate::area::{Layout, TAIL};
use crate::{BLOCK, crc32};

/// First eight bytes of a handoff.
pub const MAGIC: [u8; 8] = *b"TKDHANDF";

/// First eight bytes of the mark of an extent.
pub const MARK_MAGIC: [u8; 8] = *b"TKDBLOCK";

/// Version of both layouts that this crate describes.
pub const VERSION: u32 = 1;

/// Most bytes of a handoff: files in a million extents are no areas.
pub const MAX_SIZE: u64 = 16 << 20;

/// Distance of marks in an extent, in bytes; the last block of an extent has one, too.
pub const MARK_DISTANCE: u64 = 64 << 20;

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    version: U32<LE>,
    files: U32<LE>,
    size: U64<LE>,
    content_crc: U32<LE>,
    crc: U32<LE>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawFile {
    uuid: [u8; 16],
    disk_size: U64<LE>,
    area_size: U64<LE>,
    extents: U32<LE>,
    reserved: U32<LE>,
}

#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawExtent {
    start: U64<LE>,
    size: U64<LE>,
}

const HEADER: u64 = size_of::<RawHeader>() as u64;
const FILE: u64 = size_of::<RawFile>() as u64;
const EXTENT: u64 = size_of::<RawExtent>() as u64;

const _: () = assert!(HEADER == 32 && FILE == 40 && EXTENT == 16);

/// A piece of a file that lies in one piece on its disk.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Extent {
    /// Where it begins on the whole disk, in bytes: a multiple of 512.
    pub start: u64,
    /// Size in bytes: a multiple of [`BLOCK`].
    pub size: u64,
}

impl Extent {
    /// Where in the extent its marks are: byte offsets from its start.
    pub fn marks(self) -> impl Iterator<Item = u64> {
        let last = self.size - BLOCK;
        (0..last).step_by(MARK_DISTANCE as usize).chain([last])
    }

    /// The extent as it lies in a handoff.
    #[must_use]
    pub fn to_bytes(self) -> [u8; EXTENT as usize] {
        zerocopy::transmute!(RawExtent { start: self.start.into(), size: self.size.into() })
    }
}

/// A file that is an area.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct File {
    /// Identity of the reservation.
    pub uuid: [u8; 16],
    /// Size of the whole disk that the file is on, in bytes.
    pub disk_size: u64,
    /// Size of the file in bytes.
    pub area_size: u64,
    /// Number of its extents.
    pub extents: u32,
    /// Where their list begins in the handoff.
    at: u64,
}

impl File {
    /// A file, for whoever makes a handoff.
    #[must_use]
    pub fn new(uuid: [u8; 16], disk_size: u64, area_size: u64, extents: u32) -> File {
        File { uuid, disk_size, area_size, extents, at: 0 }
    }

    /// Its entry as it lies in a handoff; its extents follow.
    #[must_use]
    pub fn to_bytes(&self) -> [u8; FILE as usize] {
        zerocopy::transmute!(RawFile {
            uuid: self.uuid,
            disk_size: self.disk_size.into(),
            area_size: self.area_size.into(),
            extents: self.extents.into(),
            reserved: 0.into(),
        })
    }

    fn end(&self) -> u64 {
        self.at + u64::from(self.extents) * EXTENT
    }
}

/// The header of a handoff with so many `files`, whose entries and extents are `content`.
#[must_use]
pub fn header(files: u32, content: &[u8]) -> [u8; HEADER as usize] {
    let mut raw = RawHeader {
        magic: MAGIC,
        version: VERSION.into(),
        files: files.into(),
        size: (HEADER + content.len() as u64).into(),
        content_crc: crc32(content).into(),
        crc: 0.into(),
    };
    raw.crc = crc32(&raw.as_bytes()[..HEADER as usize - 4]).into();
    zerocopy::transmute!(raw)
}

/// Why bytes are not a usable handoff.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum HandoffError {
    /// It cannot be read.
    Unreadable,
    /// It does not begin with [`MAGIC`].
    Magic,
    /// A checksum is wrong.
    Checksum,
    /// It has a version that this program does not know.
    Version(u32),
    /// It is cut short, or too large.
    Size(u64),
    /// A field holds an impossible value in spite of the right checksum.
    Field,
}

impl core::fmt::Display for HandoffError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            HandoffError::Unreadable => f.write_str("cannot be read"),
            HandoffError::Magic => f.write_str("was not made by loader handoff"),
            HandoffError::Checksum => f.write_str("damaged (checksum)"),
            HandoffError::Version(version) => {
                write!(f, "version {version}, this program knows {VERSION}")
            }
            HandoffError::Size(size) => write!(f, "{size} bytes, which is not its size"),
            HandoffError::Field => f.write_str("impossible values"),
        }
    }
}

impl core::error::Error for HandoffError {}

/// Reads the bytes of a handoff at an offset; returns whether it could.
pub type Read<'a> = &'a dyn Fn(u64, &mut [u8]) -> bool;

/// A handoff that was checked. It stays where it is, and is read piece by piece.
#[derive(Clone, Copy)]
pub struct Handoff<'a> {
    read: Read<'a>,
    files: u32,
    size: u64,
}

impl<'a> Handoff<'a> {
    /// Checks the handoff of `size` bytes; there may be more behind its end.
    ///
    /// # Errors
    /// [`HandoffError`] names the first check that failed.
    pub fn open(size: u64, read: Read<'a>) -> Result<Handoff<'a>, HandoffError> {
        let header: RawHeader = get(read, 0).ok_or(HandoffError::Unreadable)?;
        if header.magic != MAGIC {
            return Err(HandoffError::Magic);
        }
        if crc32(&header.as_bytes()[..HEADER as usize - 4]) != header.crc.get() {
            return Err(HandoffError::Checksum);
        }
        if header.version.get() != VERSION {
            return Err(HandoffError::Version(header.version.get()));
        }
        let claimed = header.size.get();
        if claimed > size || !(HEADER..=MAX_SIZE).contains(&claimed) {
            return Err(HandoffError::Size(size));
        }
        let handoff = Handoff { read, files: header.files.get(), size: claimed };
        if handoff.content_crc().ok_or(HandoffError::Unreadable)? != header.content_crc.get() {
            return Err(HandoffError::Checksum);
        }
        let is_good = |file: File| handoff.is_possible(&file);
        if handoff.files().filter(|&file| is_good(file)).count() as u64 != handoff.files.into() {
            return Err(HandoffError::Field);
        }
        Ok(handoff)
    }

    fn content_crc(&self) -> Option<u32> {
        let mut hasher = crc32fast::Hasher::new();
        let mut buffer = [0; 512];
        for at in (HEADER..self.size).step_by(buffer.len()) {
            let some = (self.size - at).min(buffer.len() as u64) as usize;
            (self.read)(at, &mut buffer[..some]).then(|| hasher.update(&buffer[..some]))?;
        }
        Some(hasher.finalize())
    }

    /// Whether the file's extents are on its disk and make up the area.
    fn is_possible(&self, file: &File) -> bool {
        let mut size = 0u64;
        let mut last = 0;
        for index in 0..file.extents {
            let Some(extent) = self.extent(file, index) else { return false };
            let on_disk = extent.start.checked_add(extent.size);
            let is_good = on_disk.is_some_and(|end| end <= file.disk_size)
                && extent.size > 0
                && extent.size.is_multiple_of(BLOCK)
                && extent.start.is_multiple_of(512);
            let Some(sum) = size.checked_add(extent.size).filter(|_| is_good) else { return false };
            (size, last) = (sum, extent.size);
        }
        size == file.area_size && last >= TAIL && Layout::new(size).is_some()
    }

    /// The files.
    pub fn files(&self) -> impl Iterator<Item = File> + use<'a> {
        let Handoff { read, files, size } = *self;
        let mut at = HEADER;
        (0..files).map_while(move |_| {
            let raw: RawFile = get(read, at)?;
            let file = File {
                uuid: raw.uuid,
                disk_size: raw.disk_size.get(),
                area_size: raw.area_size.get(),
                extents: raw.extents.get(),
                at: at + FILE,
            };
            at = file.end();
            (at <= size).then_some(file)
        })
    }

    /// Extent `index` of `file`.
    #[must_use]
    pub fn extent(&self, file: &File, index: u32) -> Option<Extent> {
        if index >= file.extents {
            return None;
        }
        let raw: RawExtent = get(self.read, file.at + u64::from(index) * EXTENT)?;
        Some(Extent { start: raw.start.get(), size: raw.size.get() })
    }
}

fn get<T: FromBytes + IntoBytes>(read: Read<'_>, at: u64) -> Option<T> {
    let mut value = T::new_zeroed();
    read(at, value.as_mut_bytes()).then_some(value)
}

/// The block that says of itself which area's it is, and which one of it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ExtentMark {
    /// Identity of the reservation.
    pub uuid: [u8; 16],
    /// Where the block lies in the area, in bytes.
    pub position: u64,
    /// Where it lies on the whole disk, in bytes: of a block that was moved, the copy is no mark.
    pub at: u64,
}

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawMark {
    magic: [u8; 8],
    version: U32<LE>,
    reserved: U32<LE>,
    uuid: [u8; 16],
    position: U64<LE>,
    at: U64<LE>,
    crc: U32<LE>,
    rest: [u8; BLOCK as usize - 52],
}

const MARK_CRC: usize = 48;

impl ExtentMark {
    /// The block.
    #[must_use]
    pub fn to_block(&self) -> [u8; BLOCK as usize] {
        let mut raw = RawMark {
            magic: MARK_MAGIC,
            version: VERSION.into(),
            reserved: 0.into(),
            uuid: self.uuid,
            position: self.position.into(),
            at: self.at.into(),
            crc: 0.into(),
            rest: [0; BLOCK as usize - 52],
        };
        raw.crc = crc32(&raw.as_bytes()[..MARK_CRC]).into();
        zerocopy::transmute!(raw)
    }

    /// Whether `block` is this mark and nothing else.
    #[must_use]
    pub fn is_in(&self, block: &[u8]) -> bool {
        block == self.to_block()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const UUID: [u8; 16] = *b"0123456789abcdef";
    const DISK: u64 = 1 << 30;
    const EXTENTS: [Extent; 2] =
        [Extent { start: 0x10_0200, size: 3 << 20 }, Extent { start: 0x80_0000, size: 1 << 20 }];

    fn blob(file: File, extents: &[Extent]) -> Vec<u8> {
        let mut content = file.to_bytes().to_vec();
        extents.iter().for_each(|extent| content.extend(extent.to_bytes()));
        let mut blob = header(1, &content).to_vec();
        blob.extend(content);
        blob
    }

    fn good() -> Vec<u8> {
        blob(File::new(UUID, DISK, 4 << 20, 2), &EXTENTS)
    }

    fn check(blob: &[u8]) -> Result<Vec<(File, Vec<Extent>)>, HandoffError> {
        let read = |at: u64, into: &mut [u8]| {
            let from = blob.get(at as usize..).and_then(|bytes| bytes.get(..into.len()));
            from.map(|from| into.copy_from_slice(from)).is_some()
        };
        let handoff = Handoff::open(blob.len() as u64, &read)?;
        let extents = |file: &File| {
            (0..file.extents).filter_map(|index| handoff.extent(file, index)).collect()
        };
        Ok(handoff.files().map(|file| (file, extents(&file))).collect())
    }

    #[test]
    fn handoff_lies_as_docs_format_md_says() {
        let blob = good();
        assert_eq!(blob.len(), 32 + 40 + 2 * 16);
        assert_eq!(&blob[..8], b"TKDHANDF");
        assert_eq!(blob[8..24], [1, 0, 0, 0, 1, 0, 0, 0, 104, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(blob[24..28], crc32(&blob[32..]).to_le_bytes());
        assert_eq!(blob[28..32], crc32(&blob[..28]).to_le_bytes());
        assert_eq!(&blob[32..48], b"0123456789abcdef");
        assert_eq!(blob[48..56], DISK.to_le_bytes());
        assert_eq!(blob[56..64], (4u64 << 20).to_le_bytes());
        assert_eq!(blob[64..72], [2, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(blob[72..80], 0x10_0200u64.to_le_bytes());
        assert_eq!(blob[80..88], (3u64 << 20).to_le_bytes());

        let mark = ExtentMark { uuid: UUID, position: 0x30_0000, at: 0x80_0000 }.to_block();
        assert_eq!(&mark[..8], b"TKDBLOCK");
        assert_eq!(mark[8..16], [1, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(&mark[16..32], b"0123456789abcdef");
        assert_eq!(mark[32..40], 0x30_0000u64.to_le_bytes());
        assert_eq!(mark[40..48], 0x80_0000u64.to_le_bytes());
        assert_eq!(mark[48..52], crc32(&mark[..48]).to_le_bytes());
        assert!(mark[52..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn files_and_extents_come_back() {
        let files = check(&good()).unwrap();
        assert_eq!(files.len(), 1);
        let (file, extents) = &files[0];
        assert_eq!((file.uuid, file.disk_size, file.area_size), (UUID, DISK, 4 << 20));
        assert_eq!(extents[..], EXTENTS);
        // Behind it, to the end of its memory, is nothing.
        let mut longer = good();
        longer.resize(4096, 0);
        assert_eq!(check(&longer).unwrap(), files);
    }

    #[test]
    fn handoffs_that_are_damaged_or_lie_are_refused() {
        let good = good();
        assert_eq!(check(&[0; 104]), Err(HandoffError::Magic));
        assert_eq!(check(&good[..103]), Err(HandoffError::Size(103)));
        assert_eq!(check(&good[..20]), Err(HandoffError::Unreadable));
        for at in 8..good.len() {
            let mut damaged = good.clone();
            damaged[at] ^= 0x10;
            assert_eq!(check(&damaged), Err(HandoffError::Checksum), "byte {at}");
        }
        let extent = |start, size| Extent { start, size };
        let file = |size, extents| File::new(UUID, DISK, size, extents);
        let lies = [
            (file(4 << 20, 3), vec![EXTENTS[0], EXTENTS[1]]),
            (file(4 << 20, u32::MAX), vec![EXTENTS[0], EXTENTS[1]]),
            (file(5 << 20, 2), vec![EXTENTS[0], EXTENTS[1]]),
            (file(4 << 20, 1), vec![extent(DISK - (2 << 20), 4 << 20)]),
            (file(4 << 20, 1), vec![extent(u64::MAX - 511, 4 << 20)]),
            (file(4 << 20, 1), vec![extent(100, 4 << 20)]),
            (file(4 << 20, 2), vec![extent(512, (4 << 20) - 512), extent(8 << 20, 512)]),
            // The tail must be in one piece.
            (file(4 << 20, 2), vec![extent(0, (4 << 20) - 4096), extent(8 << 20, 4096)]),
            (file(4096, 1), vec![extent(0, 4096)]),
            (file(0, 0), vec![]),
        ];
        for (file, extents) in lies {
            assert_eq!(check(&blob(file, &extents)), Err(HandoffError::Field), "{extents:?}");
        }
    }

    #[test]
    fn extents_have_marks_at_both_ends_and_between() {
        let marks = |size| Extent { start: 0, size }.marks().collect::<Vec<_>>();
        assert_eq!(marks(4096), [0]);
        assert_eq!(marks(8192), [0, 4096]);
        assert_eq!(marks(MARK_DISTANCE), [0, MARK_DISTANCE - 4096]);
        assert_eq!(marks(MARK_DISTANCE + 4096), [0, MARK_DISTANCE]);
        assert_eq!(marks(MARK_DISTANCE + 8192), [0, MARK_DISTANCE, MARK_DISTANCE + 4096]);
    }
}
