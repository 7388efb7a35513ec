//! Commands (4.2), 64 bytes each.

use crate::PhysAddr;
use crate::block::Request;
use crate::dma::DmaBuffer;

/// Size of a command in bytes.
pub const COMMAND: usize = 64;

/// Most bytes in one request for reading or writing, and what the list of its pages takes: all but the
/// first, of 8 bytes each, when it begins in the middle of a page.
pub const MAX_REQUEST: u64 = 256 << 10;
pub const PRP_LIST: usize = (MAX_REQUEST / PAGE * 8) as usize;

const PAGE: u64 = 4096;

/// What is to be identified (5.15.1, CNS).
pub const NAMESPACE: u32 = 0;
pub const CONTROLLER: u32 = 1;
pub const ACTIVE_NAMESPACES: u32 = 2;

/// Operation codes (5, 6).
mod opcode {
    pub const CREATE_SUBMISSION_QUEUE: u32 = 0x01;
    pub const CREATE_COMPLETION_QUEUE: u32 = 0x05;
    pub const IDENTIFY: u32 = 0x06;
    pub const SET_FEATURES: u32 = 0x09;
    pub const FLUSH: u32 = 0x00;
    pub const WRITE: u32 = 0x01;
    pub const READ: u32 = 0x02;
}

/// Words of a command (4.2).
mod word {
    pub const OPCODE_AND_ID: usize = 0;
    pub const NAMESPACE: usize = 1;
    pub const PRP1: usize = 6;
    pub const PRP2: usize = 8;
    pub const CDW10: usize = 10;
    pub const CDW11: usize = 11;
    pub const CDW12: usize = 12;
}

/// The feature "number of queues" (5.21.1.7).
const QUEUE_COUNT: u32 = 7;

/// The number of the queues for reading and writing, and that a queue is in one piece (5.3, 5.4).
const IO_QUEUE: u32 = 1;
const CONTIGUOUS: u32 = 1;

/// A command.
#[derive(Clone, Copy)]
pub struct Command([u32; COMMAND / 4]);

impl Command {
    fn new(opcode: u32, words: &[(usize, u32)]) -> Command {
        let mut command = Command([0; COMMAND / 4]);
        command.0[word::OPCODE_AND_ID] = opcode;
        for &(index, value) in words {
            command.0[index] = value;
        }
        command
    }

    /// Tells what the controller or a namespace is.
    pub fn identify(what: u32, namespace: u32) -> Command {
        Command::new(opcode::IDENTIFY, &[(word::NAMESPACE, namespace), (word::CDW10, what)])
    }

    /// Asks for one queue of each kind.
    pub fn set_queue_count() -> Command {
        Command::new(opcode::SET_FEATURES, &[(word::CDW10, QUEUE_COUNT)])
    }

    /// Makes the queue of completions at `at`, without interrupts.
    pub fn create_completion_queue(at: PhysAddr, entries: u16) -> Command {
        let size = u32::from(entries - 1) << 16 | IO_QUEUE;
        let words = [(word::CDW10, size), (word::CDW11, CONTIGUOUS)];
        Command::new(opcode::CREATE_COMPLETION_QUEUE, &words).with(word::PRP1, at.0)
    }

    /// Makes the queue of submissions at `at`.
    pub fn create_submission_queue(at: PhysAddr, entries: u16) -> Command {
        let size = u32::from(entries - 1) << 16 | IO_QUEUE;
        let words = [(word::CDW10, size), (word::CDW11, IO_QUEUE << 16 | CONTIGUOUS)];
        Command::new(opcode::CREATE_SUBMISSION_QUEUE, &words).with(word::PRP1, at.0)
    }

    /// What a disk is to do, in `namespace` with blocks of `block_size` bytes. The list of pages goes to the
    /// place in the buffer.
    pub fn of(
        request: Request,
        (namespace, block_size): (u32, u32),
        list: (&DmaBuffer<'_>, usize),
    ) -> Command {
        let (opcode, at, memory, size) = match request {
            Request::Read { at, memory, size } => (opcode::READ, at, memory, size),
            Request::Write { at, memory, size } => (opcode::WRITE, at, memory, size),
            Request::Flush => return Command::new(opcode::FLUSH, &[(word::NAMESPACE, namespace)]),
        };
        // The number of blocks is counted from 0.
        let blocks = (size / block_size).saturating_sub(1);
        let words = [(word::NAMESPACE, namespace), (word::CDW12, blocks)];
        Command::new(opcode, &words).with(word::CDW10, at.0).with_pages(memory, size.into(), list)
    }

    /// Its data is in the page at `page`, unless it says already where.
    pub fn with_page(self, page: PhysAddr) -> Command {
        if self.0[word::PRP1] | self.0[word::PRP1 + 1] == 0 {
            self.with(word::PRP1, page.0)
        } else {
            self
        }
    }

    /// Its number is `id`.
    pub fn with_id(mut self, id: u16) -> Command {
        self.0[word::OPCODE_AND_ID] = self.0[word::OPCODE_AND_ID] & 0xffff | u32::from(id) << 16;
        self
    }

    /// As it lies in the queue.
    pub fn words(&self) -> &[u32; COMMAND / 4] {
        &self.0
    }

    fn with(mut self, index: usize, value: u64) -> Command {
        self.0[index] = value as u32;
        self.0[index + 1] = (value >> 32) as u32;
        self
    }

    /// Names the pages of its data (4.3): the first, which alone may begin in its middle, and the second, or
    /// the list of all others.
    fn with_pages(self, memory: PhysAddr, size: u64, list: (&DmaBuffer<'_>, usize)) -> Command {
        let first = self.with(word::PRP1, memory.0);
        let second = (memory.0 / PAGE * PAGE).wrapping_add(PAGE);
        let others = (memory.0 % PAGE + size).div_ceil(PAGE).saturating_sub(1);
        match others {
            0 => first,
            1 => first.with(word::PRP2, second),
            _ => {
                let (buffer, place) = list;
                for index in 0..others {
                    let page = second.wrapping_add(index * PAGE);
                    buffer.write(place + index as usize * 8, page);
                }
                first.with(word::PRP2, buffer.phys(place).0)
            }
        }
    }
}
