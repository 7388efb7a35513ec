//! Finds the reserved area: the only blocks of a disk that may be written.
//!
//! No valid mark, no write. A disk is searched as a whole first, then partition by partition; files in
//! file systems are known from the handoff alone.

use core::fmt;

use format::BLOCK;
use format::area::{HEAD, Layout, Reason, State, Trailer, TrailerError};
use format::{gpt, mbr};

use crate::file::{FileDisk, NotMarked};
use crate::{Disk, DiskError};

/// Partitions of a disk about which is told why they are not written to.
const NAMED_PARTITIONS: u32 = 16;

/// A reserved area whose mark was checked.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Area {
    /// Where it begins on the disk, in bytes.
    pub start: u64,
    /// Where things lie in it.
    pub layout: Layout,
    /// Its mark.
    pub trailer: Trailer,
}

/// Why a disk or a partition is not written to.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Unusable {
    /// The disk does not do what it is asked for.
    Disk(DiskError),
    /// Too small for any area, or not made of whole 4 KiB blocks.
    Size(u64),
    /// No mark, or a damaged one.
    Mark(TrailerError),
    /// The mark is for an area of another size: it was moved, resized or copied.
    Resized {
        /// Size in the mark.
        reserved: u64,
        /// Size found.
        found: u64,
    },
    /// The mark has another uuid than the command line asks for.
    Foreign([u8; 16]),
    /// The area begins with neither zeros nor a core: since it was reserved, somebody put something
    /// else there.
    Reused,
    /// The area holds a dump that nobody saved yet.
    Unsaved,
    /// The file's block at this place, in bytes, is not marked as being there.
    Moved(u64),
}

impl fmt::Display for Unusable {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Unusable::Disk(error) => error.fmt(f),
            Unusable::Size(size) => write!(f, "too small for an area ({size} bytes)"),
            Unusable::Mark(error) => error.fmt(f),
            Unusable::Resized { reserved, found } => {
                write!(f, "the mark is for an area of {reserved} bytes, this one has {found}")
            }
            Unusable::Foreign(uuid) => {
                write!(f, "another area than capture.to asks for: uuid {}", Uuid(uuid))
            }
            Unusable::Reused => f.write_str(
                "it was used for something else since it was reserved (anew: loader reserve)",
            ),
            Unusable::Moved(at) => write!(
                f,
                "its block at {at:#x} is not where it was (anew: loader reserve, loader handoff)"
            ),
            Unusable::Unsaved => f.write_str("it holds an unsaved dump (use: loader save)"),
        }
    }
}

/// A uuid in its text form.
pub struct Uuid<'a>(pub &'a [u8; 16]);

impl fmt::Display for Uuid<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for (index, byte) in self.0.iter().enumerate() {
            if matches!(index, 4 | 6 | 8 | 10) {
                f.write_str("-")?;
            }
            write!(f, "{byte:02x}")?;
        }
        Ok(())
    }
}

/// Which area is asked for, and when it may be overwritten.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wanted {
    /// Its uuid; `None` for the first one.
    pub uuid: Option<[u8; 16]>,
    /// For how many minutes after its crash an unsaved dump stays: a complete one for ever and any
    /// other not at all when that is not told.
    pub holdoff_min: Option<u64>,
    /// When this kernel crashed, in seconds since 1970 by its own clock.
    pub crash_time: Option<u64>,
}

impl Wanted {
    /// Whether the dump that `trailer` speaks of is to stay. A clock that went backwards makes no dump
    /// old.
    fn spares(&self, trailer: &Trailer) -> bool {
        let is_complete = trailer.state == State::Complete;
        let has_core = has_core(trailer);
        let Some(minutes) = self.holdoff_min else { return is_complete };
        let crashed = Some(trailer.crash_time).filter(|&time| time > 0);
        let age = self.crash_time.zip(crashed).map(|(now, then)| now.saturating_sub(then));
        // Of unknown age, an incomplete one would stay for good.
        has_core && age.map_or(is_complete, |age| age < minutes.saturating_mul(60))
    }
}

/// Whether the dump that `trailer` speaks of overwrote what the area began with.
fn has_core(trailer: &Trailer) -> bool {
    match trailer.state {
        State::Empty => false,
        State::Writing | State::Complete => true,
        State::Incomplete => trailer.reason != Reason::NoRoom,
    }
}

/// Searches `disk` for the area that is `wanted`. Calls `refused` with each candidate that is
/// not it: the number of the partition, or 0 for a disk without partitions, and why. `scratch` is
/// of at least two blocks.
pub fn find(
    disk: &mut dyn Disk,
    wanted: &Wanted,
    scratch: &mut [u8],
    refused: &mut dyn FnMut(u32, Unusable),
) -> Found {
    let (sector, scratch) = scratch.split_at_mut(BLOCK as usize);
    let mut found = Found::default();
    let size = disk.size();
    let whole = match found.take(check(disk, 0, size, wanted, scratch), wanted) {
        Ok(()) => return found,
        Err(why) => why,
    };
    let mut partitions = Partitions { disk, wanted, scratch, refused, found: &mut found, told: 0 };
    if let Some(header) = partition_table(partitions.disk, sector) {
        let read = |them: &mut Partitions<'_>, at, into: &mut [u8]| them.disk.read(at, into);
        let _ = each_table_piece(&mut partitions, read, &header, sector, |them, offset, bytes| {
            let unit = u64::from(header.sector_size);
            for entry in header.entries(offset, bytes) {
                them.look_at(entry.index + 1, entry.first_lba * unit, entry.sectors() * unit);
            }
        });
        return found;
    }
    let sectors = partitions.disk.size() / u64::from(partitions.disk.sector_size());
    match mbr::each_partition(sectors, &mut partitions) {
        Ok(true) => {}
        Ok(false) => (partitions.refused)(0, whole),
        Err(error) => (partitions.refused)(0, Unusable::Disk(error)),
    }
    found
}

/// The partitions of a disk, one after the other.
struct Partitions<'a> {
    disk: &'a mut dyn Disk,
    wanted: &'a Wanted,
    scratch: &'a mut [u8],
    refused: &'a mut dyn FnMut(u32, Unusable),
    found: &'a mut Found,
    /// Of how many was told why they are not written to.
    told: u32,
}

impl Partitions<'_> {
    /// Looks whether partition `number`, of `size` bytes from `start` on, is the area.
    fn look_at(&mut self, number: u32, start: u64, size: u64) {
        if self.found.area.is_some() {
            return;
        }
        let checked = check(self.disk, start, size, self.wanted, self.scratch);
        match self.found.take(checked, self.wanted) {
            Err(why) if self.told < NAMED_PARTITIONS => {
                self.told += 1;
                (self.refused)(number, why);
            }
            _ => {}
        }
    }
}

impl mbr::Visitor for Partitions<'_> {
    type Error = DiskError;

    fn read(&mut self, lba: u64) -> Result<[u8; 512], DiskError> {
        let size = self.disk.sector_size();
        let sector = self.scratch.get_mut(..size as usize).ok_or(DiskError::Range)?;
        self.disk.read(lba * u64::from(size), sector)?;
        sector.first_chunk().copied().ok_or(DiskError::Range)
    }

    fn partition(&mut self, entry: mbr::Entry) {
        let unit = u64::from(self.disk.sector_size());
        self.look_at(entry.number, entry.first_lba * unit, entry.sectors * unit);
    }
}

/// Looks whether the file that `disk` is made of is the area that is `wanted`. A dump in it stays until it
/// was saved, whatever its age: it lies over the marks without which nothing is written. `block` is
/// of one block.
///
/// Beside what was found, the error says why nothing is written.
pub fn find_in_file(
    disk: &mut FileDisk<'_>,
    wanted: &Wanted,
    block: &mut [u8],
) -> (Found, Result<(), Unusable>) {
    let (mut found, size) = (Found::default(), disk.size());
    let result = check_mark(disk, 0, size, wanted, block).and_then(|area| {
        if area.trailer.uuid != disk.file().uuid {
            return Err(Unusable::Foreign(area.trailer.uuid));
        }
        if has_core(&area.trailer) {
            found.unsaved = Some(area);
            return Err(Unusable::Unsaved);
        }
        disk.check_marks(block).map_err(|error| match error {
            NotMarked::At(position) => Unusable::Moved(position),
            NotMarked::Disk(error) => Unusable::Disk(error),
        })?;
        found.area = Some(area);
        Ok(())
    });
    (found, result)
}

/// What a search came to.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Found {
    /// The area that may be written.
    pub area: Option<Area>,
    /// The first one with a dump that nobody saved yet: a crash card is all that may be left there.
    pub unsaved: Option<Area>,
}

impl Found {
    fn take(&mut self, checked: Result<Area, Unusable>, wanted: &Wanted) -> Result<(), Unusable> {
        let area = checked?;
        if wanted.spares(&area.trailer) {
            self.unsaved.get_or_insert(area);
            return Err(Unusable::Unsaved);
        }
        self.area = Some(area);
        Ok(())
    }
}

/// The disk's GPT, if it has one whose header and table are intact: the primary or the backup.
fn partition_table(disk: &mut dyn Disk, sector: &mut [u8]) -> Option<gpt::Header> {
    let sector_size = u64::from(disk.sector_size());
    let sectors = disk.size() / sector_size;
    [gpt::PRIMARY_LBA, sectors.checked_sub(1)?].into_iter().find_map(|lba| {
        let bytes = sector.get_mut(..sector_size as usize)?;
        disk.read(lba * sector_size, bytes).ok()?;
        let header = gpt::Header::parse(bytes, lba, sectors).ok()?;
        let mut check = header.table_check();
        each_table_piece(disk, Disk::read, &header, sector, |_, _, bytes| check.update(bytes))
            .ok()?;
        check.is_intact().then_some(header)
    })
}

/// Has the entry table of a GPT read piece by piece, and gives each to `each` with its offset in the
/// table.
fn each_table_piece<T: ?Sized>(
    reader: &mut T,
    read: impl Fn(&mut T, u64, &mut [u8]) -> Result<(), DiskError>,
    header: &gpt::Header,
    buffer: &mut [u8],
    mut each: impl FnMut(&mut T, u64, &[u8]),
) -> Result<(), DiskError> {
    let sector_size = u64::from(header.sector_size);
    let size = header.table_sectors() * sector_size;
    let mut offset = 0;
    while offset < size {
        let some = (size - offset).min(buffer.len() as u64) as usize;
        read(reader, header.entries_lba * sector_size + offset, &mut buffer[..some])?;
        each(reader, offset, &buffer[..some]);
        offset += some as u64;
    }
    Ok(())
}

/// Checks the area of `size` bytes at `start`: its mark, and that nothing else was put there.
fn check(
    disk: &mut dyn Disk,
    start: u64,
    size: u64,
    wanted: &Wanted,
    scratch: &mut [u8],
) -> Result<Area, Unusable> {
    let block = &mut scratch[..BLOCK as usize];
    let area = check_mark(disk, start, size, wanted, block)?;
    for offset in (0..HEAD).step_by(BLOCK as usize) {
        disk.read(start + offset, block).map_err(Unusable::Disk)?;
        if offset == 0 && block.starts_with(b"\x7fELF") {
            break;
        }
        if block.iter().any(|&byte| byte != 0) {
            return Err(Unusable::Reused);
        }
    }
    Ok(area)
}

/// Checks the mark of the area of `size` bytes at `start`.
fn check_mark(
    disk: &mut dyn Disk,
    start: u64,
    size: u64,
    wanted: &Wanted,
    block: &mut [u8],
) -> Result<Area, Unusable> {
    // A whole disk may have an odd end that no area can use; a mark never lies there.
    let layout = Layout::new(size).ok_or(Unusable::Size(size))?;
    disk.read(start + layout.trailer, block).map_err(Unusable::Disk)?;
    let trailer = Trailer::parse(block).map_err(Unusable::Mark)?;
    if trailer.area_size != size {
        return Err(Unusable::Resized { reserved: trailer.area_size, found: size });
    }
    if wanted.uuid.is_some_and(|uuid| uuid != trailer.uuid) {
        return Err(Unusable::Foreign(trailer.uuid));
    }
    Ok(Area { start, layout, trailer })
}

#[cfg(test)]
#[path = "area_tests.rs"]
mod tests;
