//! Frames of the serial stream: the dump, in pieces that share a line with console text.
//!
//! On the wire a frame is a zero byte, its bytes stuffed by COBS so that none of them is zero, and a
//! zero byte. What lies between two zeros and is no frame is text. The stuffed bytes are a
//! [`Header`], content, and the CRC32 of both.
//!
//! The stream is the ELF core as it would lie on a disk, cut into blocks of [`BLOCK`] bytes that are
//! sent in any order, the most useful first. No frame needs another one to be understood.
//!
//! COBS: S. Cheshire and M. Baker, "Consistent Overhead Byte Stuffing", SIGCOMM 1997.

use zerocopy::{FromBytes, Immutable, IntoBytes, KnownLayout, LE, U16, U32, U64};

use crate::{BLOCK, crc32};

/// What ends a frame, and begins one.
pub const DELIMITER: u8 = 0;

/// How the bytes of every frame begin. Neither byte can be in UTF-8, and neither is zero, so that
/// they are the second and third byte after the delimiter on the wire as well.
pub const MAGIC: [u8; 2] = [0xf5, 0xf8];

/// Version of the stream.
pub const VERSION: u16 = 1;

/// Most bytes of content in a frame, as it is sent and as it was before.
pub const MAX_CONTENT: usize = 16 << 10;

/// Most blocks whose bytes are in one frame.
pub const MAX_BLOCKS: usize = MAX_CONTENT / BLOCK as usize;

const CRC: usize = 4;

/// Most bytes of a frame before it is stuffed.
pub const MAX_FRAME: usize = size_of::<Header>() + MAX_CONTENT + CRC;

/// Most bytes of a frame on the wire, both delimiters included.
pub const MAX_WIRE: usize = cobs::max_encoding_length(MAX_FRAME) + 2;

/// What a frame is about.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Kind {
    /// What stream this is: [`Begin`]. Sent first, and again before each plan.
    Begin = 1,
    /// Which blocks are sent next: a [`Plan`], then [`Run`]s. `offset` is the number of the plan,
    /// counted from 0.
    Plan = 2,
    /// Blocks of the core. `offset` is that of the first one in the core, `count` how many.
    Blocks = 3,
    /// The end: [`End`]. Sent more than once where nobody answers.
    End = 4,
    /// From the receiver: it listens. `stream` is 0 when it does not know the stream yet.
    Hello = 16,
    /// From the receiver: blocks that it lacks, as [`Run`]s.
    Want = 17,
    /// From the receiver: it lacks plans. They are all to be sent again.
    WantPlans = 18,
    /// From the receiver: it has everything.
    Done = 19,
}

impl Kind {
    fn from_byte(byte: u8) -> Option<Kind> {
        use Kind::*;
        [Begin, Plan, Blocks, End, Hello, Want, WantPlans, Done]
            .into_iter()
            .find(|&kind| kind as u8 == byte)
    }
}

/// How content is encoded.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
#[repr(u8)]
pub enum Encoding {
    /// As it is.
    Plain = 0,
    /// Compressed: one DEFLATE stream (RFC 1951) without header and trailer.
    Deflate = 1,
    /// Blocks of zeros; there is no content.
    Zeros = 2,
    /// Blocks that could not be read, zeros in the core; there is no content.
    Unreadable = 3,
}

impl Encoding {
    fn from_byte(byte: u8) -> Option<Encoding> {
        use Encoding::*;
        [Plain, Deflate, Zeros, Unreadable].into_iter().find(|&it| it as u8 == byte)
    }
}

/// How a frame begins, as it lies there.
#[derive(Clone, Copy, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
struct RawHeader {
    magic: [u8; 2],
    kind: u8,
    encoding: u8,
    stream: U32<LE>,
    sequence: U32<LE>,
    count: U32<LE>,
    offset: U64<LE>,
}

/// What stands at the beginning of every frame.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Header {
    /// What it is about.
    pub kind: Kind,
    /// How its content is encoded.
    pub encoding: Encoding,
    /// Number of the stream: another one for each crash.
    pub stream: u32,
    /// Number of the frame, counted from 0 by each side: a gap is a frame that was lost.
    pub sequence: u32,
    /// Blocks for [`Kind::Blocks`], otherwise bytes of the content before it was encoded.
    pub count: u32,
    /// What it means depends on the kind.
    pub offset: u64,
}

const _: () = assert!(size_of::<Header>() == size_of::<RawHeader>());

impl Header {
    /// Bytes that the content has once it is decoded; `None` when the header contradicts itself.
    #[must_use]
    pub fn decoded_size(&self) -> Option<usize> {
        let has_bytes = matches!(self.encoding, Encoding::Plain | Encoding::Deflate);
        let size = match self.kind {
            Kind::Blocks => {
                let bytes = u64::from(self.count) * BLOCK;
                let aligned = self.offset.is_multiple_of(BLOCK) && self.count != 0;
                self.offset.checked_add(bytes).filter(|_| aligned)?;
                if has_bytes { bytes } else { 0 }
            }
            _ if has_bytes => self.count.into(),
            _ => return None,
        };
        usize::try_from(size).ok().filter(|&size| size <= MAX_CONTENT)
    }
}

/// Content of [`Kind::Begin`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Begin {
    /// [`VERSION`].
    pub version: U16<LE>,
    /// ELF machine of the dead kernel.
    pub machine: U16<LE>,
    /// What is to be sent: a [`Extent`].
    pub extent: u8,
    /// Zeros.
    pub reserved: [u8; 3],
    /// Bytes of the core before the first block of memory.
    pub head_size: U64<LE>,
    /// Bytes of the whole core, were all of it sent.
    pub core_size: U64<LE>,
    /// Blocks that are to be sent in all, as far as that can be told yet.
    pub expected_blocks: U64<LE>,
    /// Name, version and git revision of the payload: UTF-8, padded with zeros.
    pub payload: [u8; 64],
}

/// How much of the memory is sent.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Extent {
    /// Stacks, tasks and the log.
    Minimal = 0,
    /// Everything of the kernel's own that is needed without a vmlinux.
    #[default]
    Kernel = 1,
    /// All memory.
    Full = 2,
}

impl Extent {
    /// The extent that [`Begin::extent`] names.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Extent> {
        [Extent::Minimal, Extent::Kernel, Extent::Full].into_iter().find(|&it| it as u8 == byte)
    }
}

/// What the blocks of a plan are.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
#[repr(u8)]
pub enum Stage {
    /// The core's head: ELF headers, registers, VMCOREINFO, the crash card.
    Head = 0,
    /// Stacks and tasks of the CPUs that ran.
    Running = 1,
    /// Stacks and structures of all tasks.
    Tasks = 2,
    /// The log.
    Log = 3,
    /// Page tables.
    PageTables = 4,
    /// Per-CPU variables.
    PerCpu = 5,
    /// The kernel's and its modules' data.
    Data = 6,
    /// The kernel's text and constants.
    Text = 7,
    /// All other memory.
    Rest = 8,
}

impl Stage {
    /// All of them, in their order.
    pub const ALL: [Stage; 9] = {
        use Stage::*;
        [Head, Running, Tasks, Log, PageTables, PerCpu, Data, Text, Rest]
    };

    /// The stage that [`Plan::stage`] names.
    #[must_use]
    pub fn from_byte(byte: u8) -> Option<Stage> {
        Stage::ALL.into_iter().find(|&it| it as u8 == byte)
    }

    /// The least extent that includes it.
    #[must_use]
    pub fn extent(self) -> Extent {
        match self {
            Stage::Head | Stage::Running | Stage::Tasks | Stage::Log => Extent::Minimal,
            Stage::PageTables | Stage::PerCpu | Stage::Data | Stage::Text => Extent::Kernel,
            Stage::Rest => Extent::Full,
        }
    }
}

/// How the content of [`Kind::Plan`] begins; [`Run`]s follow to its end.
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct Plan {
    /// A [`Stage`].
    pub stage: u8,
    /// 1 when no further plan of this stage follows.
    pub is_last_of_stage: u8,
    /// Zeros.
    pub reserved: [u8; 6],
}

/// Blocks of the core that follow each other: the number of the first one, shifted left by 16 bits,
/// and how many there are (1 to 65535).
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(transparent)]
pub struct Run(U64<LE>);

/// Most runs in a frame.
pub const MAX_RUNS: usize = (MAX_CONTENT - size_of::<Plan>()) / size_of::<Run>();

impl Run {
    /// Most blocks of a run.
    pub const MAX_COUNT: u64 = u16::MAX as u64;

    /// `count` blocks from number `first` on. Both must be in range: a first one below 2^48, and 1 to
    /// [`Run::MAX_COUNT`] blocks.
    #[must_use]
    pub fn new(first: u64, count: u64) -> Run {
        debug_assert!((1..=Run::MAX_COUNT).contains(&count) && first < 1 << 48);
        Run((first << 16 | count & Run::MAX_COUNT).into())
    }

    /// Number of the first block.
    #[must_use]
    pub fn first(&self) -> u64 {
        self.0.get() >> 16
    }

    /// Number of blocks.
    #[must_use]
    pub fn count(&self) -> u64 {
        self.0.get() & Run::MAX_COUNT
    }
}

/// Content of [`Kind::End`].
#[derive(Clone, Copy, Debug, PartialEq, Eq, FromBytes, IntoBytes, Immutable, KnownLayout)]
#[repr(C)]
pub struct End {
    /// 1 when everything of the extent was sent, 0 when the payload gave up.
    pub complete: U32<LE>,
    /// How many plans there were.
    pub plans: U32<LE>,
    /// CRC32 of the core's head: the last that was sent of it counts.
    pub head_crc: U32<LE>,
    /// Zeros.
    pub reserved: U32<LE>,
    /// Pages of old memory that were sent, and that could not be read.
    pub pages_read: U64<LE>,
    /// Pages that could not be read.
    pub pages_unreadable: U64<LE>,
}

/// Lays a frame out as it goes over the wire, both delimiters included. Returns how many bytes of
/// `wire` ([`MAX_WIRE`] are enough) it takes; `None` when it has no room.
#[must_use]
pub fn encode(header: &Header, content: &[u8], wire: &mut [u8]) -> Option<usize> {
    let raw = RawHeader {
        magic: MAGIC,
        kind: header.kind as u8,
        encoding: header.encoding as u8,
        stream: header.stream.into(),
        sequence: header.sequence.into(),
        count: header.count.into(),
        offset: header.offset.into(),
    };
    let mut crc = crc32fast::Hasher::new();
    crc.update(raw.as_bytes());
    crc.update(content);
    let crc = crc.finalize().to_le_bytes();
    *wire.first_mut()? = DELIMITER;
    let mut encoder = cobs::CobsEncoder::new(wire.get_mut(1..)?);
    for part in [raw.as_bytes(), content, &crc] {
        encoder.push(part).ok()?;
    }
    let end = encoder.finalize() + 1;
    *wire.get_mut(end)? = DELIMITER;
    Some(end + 1)
}

/// What came over the wire.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Event<'a> {
    /// Bytes that belong to no frame: console text, if the line is clean.
    Text(&'a [u8]),
    /// A frame that is as it was sent, and its content as it was encoded.
    Frame(Header, &'a [u8]),
    /// So many bytes of a frame that is not.
    Damaged(usize),
}

/// Where the decoder stands.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum State {
    /// In text.
    Text,
    /// Behind a delimiter: so many bytes of what is a frame or not.
    Frame(usize),
    /// In a frame that is too long: so many bytes of it.
    TooLong(usize),
}

/// Separates frames and text, byte by byte. `SIZE` is that of the longest frame that it takes, stuffed
/// and without delimiters; longer ones are damaged.
pub struct Decoder<const SIZE: usize> {
    buffer: [u8; SIZE],
    state: State,
}

impl<const SIZE: usize> Default for Decoder<SIZE> {
    fn default() -> Self {
        Decoder::new()
    }
}

impl<const SIZE: usize> Decoder<SIZE> {
    /// A decoder for a line on which text comes first.
    #[must_use]
    pub const fn new() -> Self {
        Decoder { buffer: [0; SIZE], state: State::Text }
    }

    /// Takes the next byte.
    pub fn push(&mut self, byte: u8) -> Option<Event<'_>> {
        if byte == DELIMITER {
            return self.delimiter();
        }
        match self.state {
            State::Text => {
                *self.buffer.first_mut()? = byte;
                self.buffer.get(..1).map(Event::Text)
            }
            State::Frame(size) => {
                let Some(slot) = self.buffer.get_mut(size) else {
                    self.state = State::TooLong(size + 1);
                    return None;
                };
                *slot = byte;
                let size = size + 1;
                self.state = State::Frame(size);
                if size == 1 + MAGIC.len() && !self.buffer.get(1..size)?.eq(&MAGIC) {
                    self.state = State::Text;
                    return self.buffer.get(..size).map(Event::Text);
                }
                None
            }
            State::TooLong(size) => {
                self.state = State::TooLong(size + 1);
                None
            }
        }
    }

    fn delimiter(&mut self) -> Option<Event<'_>> {
        match core::mem::replace(&mut self.state, State::Frame(0)) {
            State::Text | State::Frame(0) => None,
            State::Frame(size) if size <= MAGIC.len() => self.buffer.get(..size).map(Event::Text),
            State::Frame(size) => Some(match self.buffer.get_mut(..size).and_then(parse) {
                Some((header, content)) => Event::Frame(header, content),
                None => Event::Damaged(size),
            }),
            State::TooLong(size) => Some(Event::Damaged(size)),
        }
    }
}

/// The frame in stuffed bytes, which are unstuffed in place.
fn parse(bytes: &mut [u8]) -> Option<(Header, &[u8])> {
    let size = cobs::decode_in_place(bytes).ok()?;
    let (checked, crc) = bytes.get(..size)?.split_last_chunk::<CRC>()?;
    if crc32(checked) != u32::from_le_bytes(*crc) {
        return None;
    }
    let (raw, content) = RawHeader::ref_from_prefix(checked).ok()?;
    let header = Header {
        kind: Kind::from_byte(raw.kind)?,
        encoding: Encoding::from_byte(raw.encoding)?,
        stream: raw.stream.get(),
        sequence: raw.sequence.get(),
        count: raw.count.get(),
        offset: raw.offset.get(),
    };
    let decoded = header.decoded_size()?;
    let fits = match header.encoding {
        Encoding::Deflate => content.len() <= MAX_CONTENT,
        _ => content.len() == decoded,
    };
    (raw.magic == MAGIC && fits).then_some((header, content))
}

#[cfg(test)]
#[path = "frame_tests.rs"]
mod tests;
