//! Puts frames on the line, and hears what the other side says.

use format::BLOCK;
use format::frame::{
    self, Begin, Decoder, Encoding, Event, Header, Kind, MAX_BLOCKS, MAX_CONTENT, MAX_WIRE, Run,
};
use heapless::Vec;
use zerocopy::{FromBytes, IntoBytes};

use crate::Machine;
use crate::dump::Error;
use crate::line::Line;

use super::compress::Compressor;

/// Most runs that a receiver asks for at once, and the longest frame of its that is read.
const MAX_WANTED: usize = 128;
const MAX_HEARD: usize = 2048;

/// Buffers of the sender, outside of the stack.
pub struct Frames {
    /// What is to be sent, as it is.
    pub content: [u8; MAX_CONTENT],
    packed: [u8; MAX_CONTENT],
    wire: [u8; MAX_WIRE],
    heard: Decoder<MAX_HEARD>,
    /// Blocks that the receiver asked for last.
    pub wanted: Vec<Run, MAX_WANTED>,
}

impl Default for Frames {
    fn default() -> Frames {
        Frames::new()
    }
}

impl Frames {
    /// Empty buffers.
    #[must_use]
    pub const fn new() -> Frames {
        Frames {
            content: [0; MAX_CONTENT],
            packed: [0; MAX_CONTENT],
            wire: [0; MAX_WIRE],
            heard: Decoder::new(),
            wanted: Vec::new(),
        }
    }
}

/// What a receiver asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Request {
    /// The blocks in [`Frames::wanted`].
    Blocks,
    /// All plans.
    Plans,
    /// Nothing: it has everything.
    Done,
}

/// The sender's side of the stream.
pub struct Sender<'a> {
    line: &'a mut dyn Line,
    /// Its buffers.
    pub frames: &'a mut Frames,
    compressor: Compressor,
    stream: u32,
    sequence: u32,
    baud: Option<u32>,
    /// What the receiver asked for last.
    pub request: Option<Request>,
    /// When the receiver was heard last.
    pub heard_us: Option<u64>,
    /// Bytes put on the line.
    pub wire_bytes: u64,
}

impl<'a> Sender<'a> {
    /// Begins the stream with the number `stream` on a line of `baud` bits per second, if that is
    /// known.
    pub fn new(
        line: &'a mut dyn Line,
        frames: &'a mut Frames,
        stream: u32,
        baud: Option<u32>,
    ) -> Sender<'a> {
        Sender {
            line,
            frames,
            compressor: Compressor::new(),
            stream,
            sequence: 0,
            baud,
            request: None,
            heard_us: None,
            wire_bytes: 0,
        }
    }

    /// Sends what stream this is.
    ///
    /// # Errors
    /// [`Error`]
    pub fn begin(&mut self, machine: &dyn Machine, begin: &Begin) -> Result<(), Error> {
        self.small(machine, Kind::Begin, 0, begin.as_bytes())
    }

    /// Sends a frame of a few bytes of content.
    ///
    /// # Errors
    /// [`Error`]
    pub fn small(
        &mut self,
        machine: &dyn Machine,
        kind: Kind,
        offset: u64,
        content: &[u8],
    ) -> Result<(), Error> {
        let size = content.len().min(MAX_CONTENT);
        self.frames.content[..size].copy_from_slice(&content[..size]);
        self.prepared(machine, kind, offset, size)
    }

    /// Sends a frame with the first `size` bytes of [`Frames::content`].
    ///
    /// # Errors
    /// [`Error`]
    pub fn prepared(
        &mut self,
        machine: &dyn Machine,
        kind: Kind,
        offset: u64,
        size: usize,
    ) -> Result<(), Error> {
        self.content(machine, kind, size as u32, offset, size)
    }

    /// Sends the first `blocks` blocks of [`Frames::content`], which lie at `offset` in the core.
    ///
    /// # Errors
    /// [`Error`]
    pub fn blocks(
        &mut self,
        machine: &dyn Machine,
        offset: u64,
        blocks: usize,
    ) -> Result<(), Error> {
        let blocks = blocks.min(MAX_BLOCKS);
        let size = blocks * BLOCK as usize;
        self.content(machine, Kind::Blocks, blocks as u32, offset, size)
    }

    /// Sends that `blocks` blocks at `offset` in the core are zeros, or cannot be read.
    ///
    /// # Errors
    /// [`Error`]
    pub fn empty_blocks(
        &mut self,
        machine: &dyn Machine,
        encoding: Encoding,
        offset: u64,
        blocks: u64,
    ) -> Result<(), Error> {
        // A run of a plan has fewer.
        let count = u32::try_from(blocks).unwrap_or(u32::MAX);
        let header = self.header(Kind::Blocks, encoding, count, offset);
        self.put(machine, &header, 0)
    }

    /// Sends the first `size` bytes of [`Frames::content`], packed if that makes them shorter.
    fn content(
        &mut self,
        machine: &dyn Machine,
        kind: Kind,
        count: u32,
        offset: u64,
        size: usize,
    ) -> Result<(), Error> {
        let begun = machine.now_us();
        let Frames { content, packed, .. } = &mut *self.frames;
        let shorter = self.compressor.pack(&content[..size], packed);
        let packing = machine.now_us().saturating_sub(begun);
        let (encoding, sent) = match shorter {
            Some(shorter) => (Encoding::Deflate, shorter),
            None => {
                packed[..size].copy_from_slice(&content[..size]);
                (Encoding::Plain, size)
            }
        };
        let begun = machine.now_us();
        let header = self.header(kind, encoding, count, offset);
        self.put(machine, &header, sent)?;
        let sending = machine.now_us().saturating_sub(begun);
        let less = (size - sent) as u64;
        match self.baud {
            // A short one is not worth much either way.
            _ if size < BLOCK as usize => {}
            // A byte takes ten bits.
            Some(baud) => {
                self.compressor.adapt(packing, less * 10_000_000 / u64::from(baud.max(1)))
            }
            // Few bytes say little about the line: they fit into FIFOs.
            None if sent < MAX_CONTENT / 8 => {}
            None => self.compressor.adapt(packing, sending * less / sent as u64),
        }
        Ok(())
    }

    fn header(&mut self, kind: Kind, encoding: Encoding, count: u32, offset: u64) -> Header {
        let sequence = self.sequence;
        self.sequence = sequence.wrapping_add(1);
        Header { kind, encoding, stream: self.stream, sequence, count, offset }
    }

    /// Puts a frame with the first `size` bytes of what is packed on the line.
    fn put(&mut self, machine: &dyn Machine, header: &Header, size: usize) -> Result<(), Error> {
        let Frames { packed, wire, .. } = &mut *self.frames;
        // There is room for the longest frame.
        let size = frame::encode(header, &packed[..size], wire).ok_or(Error::Line)?;
        let sent = self.line.send(&self.frames.wire[..size]);
        self.wire_bytes += size as u64;
        self.listen(machine);
        if sent { Ok(()) } else { Err(Error::Line) }
    }

    /// Takes what has arrived. A later request stands for an earlier one that was not answered yet.
    pub fn listen(&mut self, machine: &dyn Machine) {
        // As much as may have piled up, so that a line that babbles does not hold up the dump.
        for _ in 0..2 * MAX_HEARD {
            let Some(byte) = self.line.receive() else { return };
            let Some(Event::Frame(header, content)) = self.frames.heard.push(byte) else {
                continue;
            };
            let is_ours = header.stream == self.stream && header.encoding == Encoding::Plain;
            let request = match header.kind {
                Kind::Hello if is_ours || header.stream == 0 => None,
                Kind::Want if is_ours => {
                    let runs = <[Run]>::ref_from_bytes(content).unwrap_or_default();
                    let runs = runs.iter().filter(|run| run.count() > 0).copied();
                    self.frames.wanted = runs.take(MAX_WANTED).collect();
                    Some(Request::Blocks)
                }
                Kind::WantPlans if is_ours => Some(Request::Plans),
                Kind::Done if is_ours => Some(Request::Done),
                _ => continue,
            };
            self.heard_us = Some(machine.now_us());
            self.request = request.or(self.request);
        }
    }
}
