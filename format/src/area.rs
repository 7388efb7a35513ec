//! The reserved area: the part of a disk that the payload may write, and how it is laid out.
//!
//! ```text
//! 0                       ELF core (so `crash vmlinux /dev/vdb1` and `dd` just work)
//! size - 64 KiB - table   CRC32 table: one word per MiB of the core
//! size - 64 KiB           crash card block, 60 KiB
//! size - 4 KiB            trailer block: the mark, and the state of the dump
//! ```
//!
//! `loader reserve` writes the trailer once; it is the mark without which the payload writes
//! nothing. It also clears the first [`HEAD`] bytes: an area that begins with anything but such zeros
//! or a core was put to another use since, and its mark is stale. The payload sets its state to [`State::Writing`] before the first data block and to
//! [`State::Complete`] after the last.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U32, U64};

use crate::{BLOCK, CRC_CHUNK, crc32};

/// Bytes at the end of the area that hold the card block and the trailer.
pub const TAIL: u64 = 64 * 1024;

/// Bytes at the beginning that are zero while the area is empty: enough to show the superblock of
/// any file system or container that is put over the area but leaves its last block alone.
pub const HEAD: u64 = 128 * 1024;

/// Size of the crash card block in bytes: the longest crash card.
pub const CARD_BLOCK: u64 = TAIL - BLOCK;

/// The smallest area that `loader reserve` makes and the payload accepts, in bytes.
pub const MIN_AREA: u64 = 4 << 20;

/// First eight bytes of the trailer block.
pub const MAGIC: [u8; 8] = *b"TKDTRAIL";

/// Version of the area's layout that this crate describes.
pub const VERSION: u32 = 1;

/// Where things lie in an area of a given size. All values are byte offsets from its start.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// Size of the whole area: a multiple of [`BLOCK`].
    pub area_size: u64,
    /// Start of the CRC32 table, which is also the largest size the core can have.
    pub crc_table: u64,
    /// Start of the crash card block.
    pub card: u64,
    /// Start of the trailer block.
    pub trailer: u64,
}

impl Layout {
    /// Lays out an area of `area_size` bytes. `None` when it is smaller than [`MIN_AREA`] or not a
    /// multiple of [`BLOCK`].
    #[must_use]
    pub const fn new(area_size: u64) -> Option<Layout> {
        if area_size < MIN_AREA || !area_size.is_multiple_of(BLOCK) {
            return None;
        }
        let card = area_size - TAIL;
        let table_bytes = (card.div_ceil(CRC_CHUNK) * 4).next_multiple_of(BLOCK);
        Some(Layout { area_size, crc_table: card - table_bytes, card, trailer: area_size - BLOCK })
    }
}

/// What the area holds.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum State {
    /// Reserved, or saved since: nothing of value in it.
    Empty = 0,
    /// A dump was begun and its end never written: what is there may be partial.
    Writing = 1,
    /// A finished dump, flushed to the medium, not saved yet.
    Complete = 2,
    /// A dump that ended early; [`Trailer::reason`] says why.
    Incomplete = 3,
}

impl State {
    fn from_u32(value: u32) -> Option<State> {
        Some(match value {
            0 => State::Empty,
            1 => State::Writing,
            2 => State::Complete,
            3 => State::Incomplete,
            _ => return None,
        })
    }

    /// The state's name as every program of ours prints it.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            State::Empty => "empty",
            State::Writing => "writing",
            State::Complete => "complete",
            State::Incomplete => "incomplete",
        }
    }
}

/// Why there is no complete dump. Numbers from 16 on never stand in a trailer: they end up on the
/// console alone. docs/reasons.md says what to do about each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u32)]
pub enum Reason {
    /// Nothing went wrong.
    None = 0,
    /// The disk refused or lost a request.
    DiskError = 1,
    /// The disk did not answer before its deadline.
    DiskTimeout = 2,
    /// There were more ranges of memory than the payload keeps; those that it kept are all there.
    TooManyRanges = 3,
    /// The dump did not fit into the area: there is the crash card, and nothing of the core.
    NoRoom = 4,
    /// The time that `capture.timeout=` gives was over.
    OutOfTime = 5,
    /// The payload itself failed.
    PayloadFailed = 6,
    /// `elfcorehdr` is missing, or cannot be used.
    NoHeaders = 16,
    /// `capture.to=` was not understood.
    Refused = 17,
    /// There is no disk that the payload can drive.
    NoDisk = 18,
    /// No disk has a reserved area that may be written.
    NoArea = 19,
    /// The only areas hold dumps that nobody saved yet: they got the crash card.
    Unsaved = 20,
    /// The serial port that was named is not there.
    NoPort = 21,
    /// The serial port takes no more bytes.
    LineBroken = 22,
    /// A reason that this version of the crate does not know.
    Unknown = u32::MAX,
}

impl Reason {
    /// All of them, but for [`Reason::Unknown`].
    pub const ALL: [Reason; 14] = [
        Reason::None,
        Reason::DiskError,
        Reason::DiskTimeout,
        Reason::TooManyRanges,
        Reason::NoRoom,
        Reason::OutOfTime,
        Reason::PayloadFailed,
        Reason::NoHeaders,
        Reason::Refused,
        Reason::NoDisk,
        Reason::NoArea,
        Reason::Unsaved,
        Reason::NoPort,
        Reason::LineBroken,
    ];

    /// The reason with number `value`; [`Reason::Unknown`] for numbers of later versions.
    #[must_use]
    pub fn from_u32(value: u32) -> Reason {
        let known = Reason::ALL.into_iter().find(|&reason| reason as u32 == value);
        known.unwrap_or(Reason::Unknown)
    }

    /// The reason in words.
    #[must_use]
    pub const fn text(self) -> &'static str {
        match self {
            Reason::None => "none",
            Reason::DiskError => "the disk reported an error",
            Reason::DiskTimeout => "the disk did not answer in time",
            Reason::NoRoom => "the dump does not fit into the area",
            Reason::TooManyRanges => "more ranges of memory than the payload keeps",
            Reason::OutOfTime => "the time that capture.timeout= gives was over",
            Reason::PayloadFailed => "the payload itself failed",
            Reason::NoHeaders => "elfcorehdr is missing or cannot be used",
            Reason::Refused => "capture.to= was not understood",
            Reason::NoDisk => "no disk that this payload can drive was found",
            Reason::NoArea => "no disk has a reserved area to write to (make one: loader reserve)",
            Reason::Unsaved => "an unsaved dump is in the way (use: loader save)",
            Reason::NoPort => "the serial port that capture.to= names is not there",
            Reason::LineBroken => "the serial port takes no more bytes",
            Reason::Unknown => "unknown (written by a later version)",
        }
    }
}

/// The trailer block as it lies on disk.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawTrailer {
    magic: [u8; 8],
    version: U32<LE>,
    state: U32<LE>,
    reason: U32<LE>,
    kind: U32<LE>,
    uuid: [u8; 16],
    area_size: U64<LE>,
    sequence: U64<LE>,
    core_size: U64<LE>,
    crc_table: U64<LE>,
    crc_count: U64<LE>,
    crc_table_crc: U32<LE>,
    card_size: U32<LE>,
    card_crc: U32<LE>,
    later_cards: U32<LE>,
    crash_time: U64<LE>,
    written: U64<LE>,
    zero: [u8; SECTOR - 116],
    crc: U32<LE>,
    rest: [u8; BLOCK as usize - SECTOR],
}

/// Everything but zeros lies in the trailer's first 512 bytes, checksum included: disks write
/// sectors of that size whole or not at all, so a trailer is never half old and half new.
const SECTOR: usize = 512;

const _: () = assert!(size_of::<RawTrailer>() == BLOCK as usize);

/// The trailer of a reserved area: its mark, and the state of the dump in it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Trailer {
    /// What the area holds.
    pub state: State,
    /// Why the dump ended as it did; [`Reason::None`] unless `state` is [`State::Incomplete`].
    pub reason: Reason,
    /// Whether the area is a file in a file system: then it begins with an
    /// [`ExtentMark`](crate::handoff::ExtentMark), not with zeros, while it is empty.
    pub in_file: bool,
    /// Identity of the reservation, chosen at random by `loader reserve`.
    pub uuid: [u8; 16],
    /// Size of the area in bytes, as reserved. An area whose real size differs is not ours.
    pub area_size: u64,
    /// Number of captures begun into this area.
    pub sequence: u64,
    /// Size of the core in bytes; 0 before one is finished.
    pub core_size: u64,
    /// Number of words in the CRC32 table.
    pub crc_count: u64,
    /// CRC32 of the table's bytes.
    pub crc_table_crc: u32,
    /// Bytes of the card block in use.
    pub card_size: u32,
    /// CRC32 of those bytes.
    pub card_crc: u32,
    /// Crashes since that of the core which left nothing but their card, because the dump was not
    /// saved yet; the card block holds the last one's. 0 when it holds that of the core.
    pub later_cards: u32,
    /// When the core's kernel crashed, in seconds since 1970 by its own clock; 0 when not known.
    pub crash_time: u64,
    /// Of a dump that is not finished: bytes of the core, from its start, that are on the medium for
    /// certain. What lies behind them may be of an earlier dump. 0 when that is not known.
    pub written: u64,
}

/// Why a block is not a valid trailer.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum TrailerError {
    /// The block is not [`BLOCK`] bytes long.
    Length,
    /// It does not begin with [`MAGIC`]: nothing was ever reserved here.
    Magic,
    /// Its checksum is wrong: it was damaged, or half written.
    Checksum,
    /// It was written by a version of the layout that this program does not know.
    Version(u32),
    /// A field holds an impossible value in spite of the right checksum.
    Field,
}

impl core::fmt::Display for TrailerError {
    fn fmt(&self, f: &mut core::fmt::Formatter<'_>) -> core::fmt::Result {
        match self {
            TrailerError::Length => write!(f, "the trailer block is cut short"),
            TrailerError::Magic => write!(f, "no reservation mark"),
            TrailerError::Checksum => write!(f, "the reservation mark is damaged (checksum)"),
            TrailerError::Version(version) => {
                write!(f, "the area has layout version {version}, this program knows {VERSION}")
            }
            TrailerError::Field => write!(f, "the reservation mark holds impossible values"),
        }
    }
}

impl core::error::Error for TrailerError {}

impl Trailer {
    /// The trailer of a fresh, empty area.
    #[must_use]
    pub const fn empty(uuid: [u8; 16], area_size: u64) -> Trailer {
        Trailer {
            state: State::Empty,
            reason: Reason::None,
            in_file: false,
            uuid,
            area_size,
            sequence: 0,
            core_size: 0,
            crc_count: 0,
            crc_table_crc: 0,
            card_size: 0,
            card_crc: 0,
            later_cards: 0,
            crash_time: 0,
            written: 0,
        }
    }

    /// The trailer of the same area without what it holds: it stays the reservation that it was, and its
    /// captures stay counted.
    #[must_use]
    pub const fn emptied(&self) -> Trailer {
        let empty = Trailer::empty(self.uuid, self.area_size);
        Trailer { in_file: self.in_file, sequence: self.sequence, ..empty }
    }

    /// The crash card in the area's card block, which begins at [`Layout::card`]; `None` when there is
    /// none, or when it is damaged.
    #[must_use]
    pub fn card<'b>(&self, block: &'b [u8]) -> Option<&'b str> {
        let card = block.get(..usize::try_from(self.card_size).ok()?)?;
        let is_whole = !card.is_empty() && crc32(card) == self.card_crc;
        core::str::from_utf8(card).ok().filter(|_| is_whole)
    }

    /// Reads and checks a trailer block.
    ///
    /// # Errors
    /// [`TrailerError`] names the first check that failed.
    pub fn parse(block: &[u8]) -> Result<Trailer, TrailerError> {
        let raw = RawTrailer::ref_from_bytes(block).map_err(|_| TrailerError::Length)?;
        if raw.magic != MAGIC {
            return Err(TrailerError::Magic);
        }
        let rest_is_zero = raw.rest.iter().all(|&byte| byte == 0);
        if crc32(&block[..SECTOR - 4]) != raw.crc.get() || !rest_is_zero {
            return Err(TrailerError::Checksum);
        }
        if raw.version.get() != VERSION {
            return Err(TrailerError::Version(raw.version.get()));
        }
        let state = State::from_u32(raw.state.get()).ok_or(TrailerError::Field)?;
        let area_size = raw.area_size.get();
        let layout = Layout::new(area_size).ok_or(TrailerError::Field)?;
        let core_size = raw.core_size.get();
        let fits = raw.crc_table.get() == layout.crc_table
            && core_size <= layout.crc_table
            && raw.crc_count.get() == core_size.div_ceil(CRC_CHUNK)
            && u64::from(raw.card_size.get()) <= CARD_BLOCK
            && raw.written.get() <= layout.crc_table
            && raw.kind.get() <= 1;
        if !fits {
            return Err(TrailerError::Field);
        }
        Ok(Trailer {
            state,
            reason: Reason::from_u32(raw.reason.get()),
            in_file: raw.kind.get() == 1,
            uuid: raw.uuid,
            area_size,
            sequence: raw.sequence.get(),
            core_size,
            crc_count: raw.crc_count.get(),
            crc_table_crc: raw.crc_table_crc.get(),
            card_size: raw.card_size.get(),
            card_crc: raw.card_crc.get(),
            later_cards: raw.later_cards.get(),
            crash_time: raw.crash_time.get(),
            written: raw.written.get(),
        })
    }

    /// The block to write at [`Layout::trailer`].
    ///
    /// `area_size` must be one that [`Layout::new`] accepts; otherwise the block says so to
    /// whoever parses it ([`TrailerError::Field`]).
    #[must_use]
    pub fn to_block(&self) -> [u8; BLOCK as usize] {
        let mut raw = RawTrailer {
            magic: MAGIC,
            version: VERSION.into(),
            state: (self.state as u32).into(),
            reason: (self.reason as u32).into(),
            kind: u32::from(self.in_file).into(),
            uuid: self.uuid,
            area_size: self.area_size.into(),
            sequence: self.sequence.into(),
            core_size: self.core_size.into(),
            crc_table: Layout::new(self.area_size).map_or(0, |layout| layout.crc_table).into(),
            crc_count: self.crc_count.into(),
            crc_table_crc: self.crc_table_crc.into(),
            card_size: self.card_size.into(),
            card_crc: self.card_crc.into(),
            later_cards: self.later_cards.into(),
            crash_time: self.crash_time.into(),
            written: self.written.into(),
            zero: [0; SECTOR - 116],
            crc: 0.into(),
            rest: [0; BLOCK as usize - SECTOR],
        };
        raw.crc = crc32(&raw.as_bytes()[..SECTOR - 4]).into();
        zerocopy::transmute!(raw)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const UUID: [u8; 16] = *b"0123456789abcdef";

    fn complete() -> Trailer {
        Trailer {
            state: State::Complete,
            in_file: true,
            sequence: 3,
            core_size: (5 << 20) + 4096,
            crc_count: 6,
            crc_table_crc: 0x1122_3344,
            card_size: 0xabc,
            card_crc: 0x5566_7788,
            later_cards: 2,
            crash_time: 0x6542_3211,
            written: 0x30_0000,
            ..Trailer::empty(UUID, 64 << 20)
        }
    }

    #[test]
    fn trailer_lies_as_docs_format_md_says() {
        let block = complete().to_block();
        assert_eq!(&block[0..8], b"TKDTRAIL");
        assert_eq!(&block[8..24], [1, 0, 0, 0, 2, 0, 0, 0, 0, 0, 0, 0, 1, 0, 0, 0]);
        assert_eq!(&block[24..40], UUID);
        assert_eq!(&block[40..48], (64u64 << 20).to_le_bytes());
        assert_eq!(&block[48..56], 3u64.to_le_bytes());
        assert_eq!(&block[56..64], 0x50_1000u64.to_le_bytes());
        assert_eq!(&block[64..72], 0x3fe_f000u64.to_le_bytes());
        assert_eq!(&block[72..80], 6u64.to_le_bytes());
        assert_eq!(&block[80..84], 0x1122_3344u32.to_le_bytes());
        assert_eq!(&block[84..88], 0xabcu32.to_le_bytes());
        assert_eq!(&block[88..92], 0x5566_7788u32.to_le_bytes());
        assert_eq!(&block[92..96], 2u32.to_le_bytes());
        assert_eq!(&block[96..104], 0x6542_3211u64.to_le_bytes());
        assert_eq!(&block[104..112], 0x30_0000u64.to_le_bytes());
        assert!(block[112..508].iter().all(|&byte| byte == 0));
        assert_eq!(&block[508..512], crc32(&block[..508]).to_le_bytes());
        assert!(block[512..].iter().all(|&byte| byte == 0));
    }

    #[test]
    fn trailer_survives_the_round_trip() {
        assert_eq!(Trailer::parse(&complete().to_block()), Ok(complete()));
    }

    #[test]
    fn card_lies_at_the_start_of_its_block_as_docs_format_md_says() {
        let mut block = [0; CARD_BLOCK as usize];
        let text = b"kernel   6.1.0\npanic    why\n";
        block[..text.len()].copy_from_slice(text);
        let none = Trailer::empty(UUID, 64 << 20);
        let with = Trailer { card_size: text.len() as u32, card_crc: crc32(text), ..none };
        assert_eq!(with.card(&block), Some("kernel   6.1.0\npanic    why\n"));
        assert_eq!(none.card(&block), None);
        assert_eq!(with.card(&block[..10]), None);
        block[3] ^= 1;
        assert_eq!(with.card(&block), None, "damaged");
    }

    #[test]
    fn every_single_flipped_bit_is_noticed() {
        let good = complete().to_block();
        for bit in 0..good.len() * 8 {
            let mut bad = good;
            bad[bit / 8] ^= 1 << (bit % 8);
            assert!(Trailer::parse(&bad).is_err(), "bit {bit} flipped and not noticed");
        }
    }

    #[test]
    fn core_larger_than_its_area_is_refused() {
        let mut lie = complete();
        lie.core_size = 64 << 20;
        lie.crc_count = 64;
        assert_eq!(Trailer::parse(&lie.to_block()), Err(TrailerError::Field));
        let lie = Trailer { written: 64 << 20, ..complete() };
        assert_eq!(Trailer::parse(&lie.to_block()), Err(TrailerError::Field));
    }

    #[test]
    fn reasons_have_the_numbers_that_they_are_found_by() {
        for reason in Reason::ALL {
            assert_eq!(Reason::from_u32(reason as u32), reason);
        }
        assert_eq!(Reason::from_u32(1000), Reason::Unknown);
    }

    #[test]
    fn layout_leaves_room_for_a_word_per_mib() {
        for size in [MIN_AREA, 5 << 20, (1 << 30) + 4096, 12 << 40] {
            let layout = Layout::new(size).unwrap();
            assert!(layout.crc_table + layout.crc_table.div_ceil(CRC_CHUNK) * 4 <= layout.card);
            assert_eq!(layout.crc_table % BLOCK, 0);
            assert_eq!(layout.card + CARD_BLOCK, layout.trailer);
        }
        assert_eq!(Layout::new(MIN_AREA - BLOCK), None);
        assert_eq!(Layout::new(MIN_AREA + 1), None);
    }
}
