//! The GUID partition table, as far as finding partitions needs it: where they are and who they are.
//!
//! Nothing here reads a device or keeps a table. The caller reads sectors and hands the bytes in:
//!
//! 1. the header, from LBA 1 or, when that one is broken, from the last LBA: [`Header::parse`];
//! 2. [`Header::table_sectors`] sectors from [`Header::entries_lba`], each piece to
//!    [`TableCheck::update`]: entries of a table that is not [`TableCheck::is_intact`] mean nothing;
//! 3. the same bytes to [`Header::entries`].
//!
//! Every value is checked before it gets out: an [`Entry`] lies on the disk, between the first and
//! the last usable LBA that the header names, and the table has at most [`MAX_TABLE`] bytes.
//!
//! Source: UEFI Specification 2.10, section 5.3 "GUID Partition Table (GPT) Disk Layout".

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32, U64};

/// First eight bytes of a header.
pub const MAGIC: [u8; 8] = *b"EFI PART";

/// LBA of the primary header. The backup is in the disk's last LBA.
pub const PRIMARY_LBA: u64 = 1;

/// Largest entry table that is read, in bytes; the usual one has 128 entries of 128 bytes, 16 KiB.
pub const MAX_TABLE: u64 = 1 << 20;

/// Smallest size of a header and of an entry, in bytes.
const HEADER_SIZE: usize = size_of::<RawHeader>();
const ENTRY_SIZE: usize = size_of::<RawEntry>();

/// Where a header keeps its own checksum, which counts as zero in it.
const CRC_FIELD: core::ops::Range<usize> = 16..20;

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 8],
    revision: U32<LE>,
    header_size: U32<LE>,
    header_crc: U32<LE>,
    reserved: U32<LE>,
    my_lba: U64<LE>,
    alternate_lba: U64<LE>,
    first_usable_lba: U64<LE>,
    last_usable_lba: U64<LE>,
    disk_guid: [u8; 16],
    entries_lba: U64<LE>,
    entry_count: U32<LE>,
    entry_size: U32<LE>,
    entries_crc: U32<LE>,
}

const _: () = assert!(HEADER_SIZE == 92);

#[derive(FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawEntry {
    type_guid: [u8; 16],
    unique_guid: [u8; 16],
    first_lba: U64<LE>,
    last_lba: U64<LE>,
    attributes: U64<LE>,
    name: [u8; 72],
}

const _: () = assert!(ENTRY_SIZE == 128);

/// Why a sector is not a usable header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum GptError {
    /// The sector is neither 512 nor 4096 bytes long.
    SectorSize,
    /// It does not begin with [`MAGIC`]: there is no GPT here.
    Magic,
    /// The header's checksum is wrong.
    Checksum,
    /// The header says that it belongs to another LBA: a stale copy.
    WrongLba,
    /// A size or an LBA in it is impossible on this disk.
    Field,
}

impl core::fmt::Display for GptError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        f.write_str(match self {
            GptError::SectorSize => "the sector size is neither 512 nor 4096",
            GptError::Magic => "no GPT",
            GptError::Checksum => "the GPT header is damaged (checksum)",
            GptError::WrongLba => "the GPT header belongs to another place on the disk",
            GptError::Field => "the GPT header holds impossible values",
        })
    }
}

impl core::error::Error for GptError {}

/// A checked GPT header.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// Bytes in a sector: 512 or 4096. All LBAs count sectors of this size.
    pub sector_size: u32,
    /// First LBA of the entry table.
    pub entries_lba: u64,
    /// Entries in the table, used or not.
    pub entry_count: u32,
    /// Bytes in an entry: a power of two from 128 to `sector_size`, so none straddles a sector.
    pub entry_size: u32,
    /// CRC32 of the table.
    pub entries_crc: u32,
    /// First LBA that a partition may use.
    pub first_usable_lba: u64,
    /// Last LBA that a partition may use; it lies on the disk.
    pub last_usable_lba: u64,
}

impl Header {
    /// Checks the header in `sector`, which was read from `lba` of a disk of `disk_sectors` sectors.
    /// The length of `sector` is the disk's logical sector size.
    ///
    /// # Errors
    /// [`GptError`] names the first check that failed. [`GptError::Magic`] means no GPT at all;
    /// after any other error the copy at the other end of the disk may still be good.
    pub fn parse(sector: &[u8], lba: u64, disk_sectors: u64) -> Result<Header, GptError> {
        let sector_size = match sector.len() {
            512 => 512,
            4096 => 4096,
            _ => return Err(GptError::SectorSize),
        };
        let (raw, _) = RawHeader::ref_from_prefix(sector).map_err(|_| GptError::SectorSize)?;
        if raw.magic != MAGIC {
            return Err(GptError::Magic);
        }
        let header_size = raw.header_size.get() as usize;
        if header_size < HEADER_SIZE {
            return Err(GptError::Field);
        }
        let header = sector.get(..header_size).ok_or(GptError::Field)?;
        if header_crc(header) != raw.header_crc.get() {
            return Err(GptError::Checksum);
        }
        if raw.my_lba.get() != lba {
            return Err(GptError::WrongLba);
        }
        let header = Header {
            sector_size,
            entries_lba: raw.entries_lba.get(),
            entry_count: raw.entry_count.get(),
            entry_size: raw.entry_size.get(),
            entries_crc: raw.entries_crc.get(),
            first_usable_lba: raw.first_usable_lba.get(),
            last_usable_lba: raw.last_usable_lba.get(),
        };
        if header.is_possible(disk_sectors) { Ok(header) } else { Err(GptError::Field) }
    }

    fn is_possible(&self, disk_sectors: u64) -> bool {
        let entry_size = self.entry_size as usize;
        entry_size.is_power_of_two()
            && (ENTRY_SIZE..=self.sector_size as usize).contains(&entry_size)
            && self.table_size() <= MAX_TABLE
            && self.entries_lba > PRIMARY_LBA
            && self
                .entries_lba
                .checked_add(self.table_sectors())
                .is_some_and(|end| end <= disk_sectors)
            && self.first_usable_lba > PRIMARY_LBA
            && self.first_usable_lba <= self.last_usable_lba
            && self.last_usable_lba < disk_sectors
            && disk_sectors.checked_mul(u64::from(self.sector_size)).is_some()
    }

    /// Size of the entry table in bytes, at most [`MAX_TABLE`].
    #[must_use]
    pub const fn table_size(&self) -> u64 {
        self.entry_count as u64 * self.entry_size as u64
    }

    /// Sectors to read for the whole entry table. The last one may be filled only in part.
    #[must_use]
    pub const fn table_sectors(&self) -> u64 {
        self.table_size().div_ceil(self.sector_size as u64)
    }

    /// A check for the table's bytes as they are read.
    #[must_use]
    pub fn table_check(&self) -> TableCheck {
        TableCheck {
            hasher: crc32fast::Hasher::new(),
            left: self.table_size(),
            expected: self.entries_crc,
        }
    }

    /// The used entries in `bytes`, which begin `offset` bytes into the table: both multiples of
    /// the sector size. What lies beyond the table's end is passed over, and so are entries that
    /// reach outside the usable LBAs.
    pub fn entries<'a>(&self, offset: u64, bytes: &'a [u8]) -> impl Iterator<Item = Entry> + 'a {
        let header = *self;
        let before = offset / u64::from(self.entry_size);
        let left = u64::from(self.entry_count).saturating_sub(before);
        bytes
            .chunks_exact(self.entry_size as usize)
            .take(left as usize)
            .enumerate()
            .filter_map(move |(index, bytes)| header.entry(before as u32 + index as u32, bytes))
    }

    fn entry(&self, index: u32, bytes: &[u8]) -> Option<Entry> {
        let (raw, _) = RawEntry::ref_from_prefix(bytes).ok()?;
        let entry = Entry {
            index,
            type_guid: raw.type_guid,
            unique_guid: raw.unique_guid,
            first_lba: raw.first_lba.get(),
            last_lba: raw.last_lba.get(),
        };
        let valid = entry.type_guid != [0; 16]
            && entry.first_lba >= self.first_usable_lba
            && entry.first_lba <= entry.last_lba
            && entry.last_lba <= self.last_usable_lba;
        valid.then_some(entry)
    }
}

/// CRC32 of a header with its own checksum taken as zero.
fn header_crc(header: &[u8]) -> u32 {
    let mut hasher = crc32fast::Hasher::new();
    hasher.update(&header[..CRC_FIELD.start]);
    hasher.update(&[0; CRC_FIELD.end - CRC_FIELD.start]);
    hasher.update(&header[CRC_FIELD.end..]);
    hasher.finalize()
}

/// Tells whether an entry table is the one that its header's checksum was made from.
#[derive(Clone, Debug)]
pub struct TableCheck {
    hasher: crc32fast::Hasher,
    left: u64,
    expected: u32,
}

impl TableCheck {
    /// Takes the next bytes of the table. Bytes beyond its end are ignored, so whole sectors can
    /// be given.
    pub fn update(&mut self, bytes: &[u8]) {
        let counted = self.left.min(bytes.len() as u64);
        self.hasher.update(&bytes[..counted as usize]);
        self.left -= counted;
    }

    /// Whether the whole table was given and its checksum is right.
    #[must_use]
    pub fn is_intact(self) -> bool {
        self.left == 0 && self.hasher.finalize() == self.expected
    }
}

/// A partition.
///
/// GUIDs are given as they lie on disk: the first three of their five groups little-endian.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Entry {
    /// Place in the table, from 0; Linux numbers the partition one higher.
    pub index: u32,
    /// What the partition is for.
    pub type_guid: [u8; 16],
    /// Identity of the partition (Linux: PARTUUID).
    pub unique_guid: [u8; 16],
    /// First LBA.
    pub first_lba: u64,
    /// Last LBA, which still belongs to the partition.
    pub last_lba: u64,
}

impl Entry {
    /// Number of sectors.
    #[must_use]
    pub const fn sectors(&self) -> u64 {
        self.last_lba - self.first_lba + 1
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::vec;
    use std::vec::Vec;

    const DISK_SECTORS: u64 = 20_480;

    /// A table of two partitions, one of them with index 5, and its header for LBA `lba`.
    fn disk(sector_size: usize, lba: u64) -> (Vec<u8>, Vec<u8>) {
        let mut table = vec![0; 128 * 128];
        for (index, first, last) in [(0usize, 2048u64, 4095u64), (5, 4096, 20_000)] {
            let entry = &mut table[index * 128..][..128];
            entry[..16].fill(0xaa);
            entry[16..32].fill(index as u8 + 1);
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
        }
        let mut header = vec![0; sector_size];
        header[..8].copy_from_slice(b"EFI PART");
        header[8..12].copy_from_slice(&0x1_0000u32.to_le_bytes());
        header[12..16].copy_from_slice(&92u32.to_le_bytes());
        header[24..32].copy_from_slice(&lba.to_le_bytes());
        header[40..48].copy_from_slice(&34u64.to_le_bytes());
        header[48..56].copy_from_slice(&(DISK_SECTORS - 34).to_le_bytes());
        header[72..80].copy_from_slice(&2u64.to_le_bytes());
        header[80..84].copy_from_slice(&128u32.to_le_bytes());
        header[84..88].copy_from_slice(&128u32.to_le_bytes());
        header[88..92].copy_from_slice(&crate::crc32(&table).to_le_bytes());
        seal(&mut header);
        (header, table)
    }

    fn seal(header: &mut [u8]) {
        header[16..20].fill(0);
        let crc = crate::crc32(&header[..92]);
        header[16..20].copy_from_slice(&crc.to_le_bytes());
    }

    fn parse(header: &[u8]) -> Result<Header, GptError> {
        Header::parse(header, PRIMARY_LBA, DISK_SECTORS)
    }

    #[test]
    fn partitions_are_found_with_either_sector_size() {
        for sector_size in [512, 4096] {
            let (sector, table) = disk(sector_size, PRIMARY_LBA);
            let header = parse(&sector).unwrap();
            assert_eq!(header.table_sectors(), 16_384 / sector_size as u64);
            let mut check = header.table_check();
            let mut found = Vec::new();
            for (index, piece) in table.chunks(sector_size).enumerate() {
                check.update(piece);
                found.extend(header.entries((index * sector_size) as u64, piece));
            }
            assert!(check.is_intact());
            assert_eq!(found.len(), 2);
            assert_eq!((found[0].first_lba, found[0].sectors()), (2048, 2048));
            assert_eq!((found[1].unique_guid, found[1].last_lba), ([6; 16], 20_000));
            assert_eq!((found[0].index, found[1].index), (0, 5));
        }
    }

    #[test]
    fn table_that_is_damaged_or_cut_short_is_not_intact() {
        let (sector, mut table) = disk(512, PRIMARY_LBA);
        let header = parse(&sector).unwrap();
        let mut check = header.table_check();
        check.update(&table[..512]);
        assert!(!check.is_intact());
        table[40] ^= 1;
        let mut check = header.table_check();
        check.update(&table);
        assert!(!check.is_intact());
    }

    #[test]
    fn bytes_beyond_the_table_do_not_count() {
        let (mut sector, mut table) = disk(512, PRIMARY_LBA);
        sector[80..84].copy_from_slice(&5u32.to_le_bytes());
        sector[88..92].copy_from_slice(&crate::crc32(&table[..5 * 128]).to_le_bytes());
        seal(&mut sector);
        table[7 * 128..].fill(0xff);
        let header = parse(&sector).unwrap();
        assert_eq!(header.table_sectors(), 2);
        let mut check = header.table_check();
        check.update(&table[..1024]);
        assert!(check.is_intact());
        assert_eq!(header.entries(0, &table[..1024]).count(), 1);
        assert_eq!(header.entries(512, &table[512..1024]).count(), 0);
    }

    #[test]
    fn headers_that_lie_are_refused() {
        let (good, _) = disk(512, PRIMARY_LBA);
        assert!(parse(&good).is_ok());
        assert_eq!(Header::parse(&good, DISK_SECTORS - 1, DISK_SECTORS), Err(GptError::WrongLba));
        assert_eq!(Header::parse(&good, PRIMARY_LBA, 100), Err(GptError::Field));
        assert_eq!(parse(&good[..511]), Err(GptError::SectorSize));
        assert_eq!(parse(&[0; 512]), Err(GptError::Magic));

        let mut flipped = good.clone();
        flipped[60] ^= 1;
        assert_eq!(parse(&flipped), Err(GptError::Checksum));

        let lies: [(usize, &[u8]); 10] = [
            (12, &91u32.to_le_bytes()),
            (12, &513u32.to_le_bytes()),
            (12, &u32::MAX.to_le_bytes()),
            (40, &u64::MAX.to_le_bytes()),
            (48, &DISK_SECTORS.to_le_bytes()),
            (72, &u64::MAX.to_le_bytes()),
            (80, &u32::MAX.to_le_bytes()),
            (84, &0u32.to_le_bytes()),
            (84, &136u32.to_le_bytes()),
            (84, &1024u32.to_le_bytes()),
        ];
        for (offset, value) in lies {
            let mut lie = good.clone();
            lie[offset..offset + value.len()].copy_from_slice(value);
            seal(&mut lie);
            assert_eq!(parse(&lie), Err(GptError::Field), "offset {offset} value {value:x?}");
        }
    }

    #[test]
    fn entries_outside_the_usable_range_are_passed_over() {
        let (sector, _) = disk(512, PRIMARY_LBA);
        let header = parse(&sector).unwrap();
        for (first, last) in [(33u64, 100u64), (100, 99), (100, DISK_SECTORS - 33), (0, u64::MAX)] {
            let mut entry = [0xaa; 128];
            entry[32..40].copy_from_slice(&first.to_le_bytes());
            entry[40..48].copy_from_slice(&last.to_le_bytes());
            assert_eq!(header.entries(0, &entry).count(), 0, "{first}..={last}");
        }
    }
}
