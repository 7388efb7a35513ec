//! An NVMe controller made of memory, which does what it should or what it should not.

#![allow(unsafe_code)]

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::vec;
use std::vec::Vec;

use crate::clock::Clock;
use crate::dma::DmaPool;
use crate::dma::tests::host_pool;
use crate::mmio::Registers;

/// When a controller that was just started is ready.
const STARTED_US: u64 = 500_000;

/// How the controller behaves.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Temper {
    Good,
    /// Finishes one request in ten milliseconds, the last first.
    Slow,
    /// Answers its first commands and then nothing.
    SilentAfter(usize),
    /// Reports an error for every write.
    Failing,
    /// Gives back a command that it was never given.
    Lying,
    /// Says that the command came through another queue.
    Confused,
    /// Is gone: every register reads all ones.
    Gone,
    /// Never gets ready.
    NeverReady,
    /// Gets a fatal error instead.
    Fatal,
    /// Does not stop.
    Unstoppable,
    /// Was started just before the kernel died, and needs half a second more.
    Starting,
    /// Is of version 1.0, and takes a list of active namespaces for something else.
    Old,
    /// Says that it is newer than that, and refuses the list all the same.
    Listless,
}

/// A namespace.
pub struct Disk {
    pub bytes: Vec<u8>,
    pub shift: u8,
    pub metadata: u16,
    pub attributes: u8,
}

impl Disk {
    pub fn new(size: usize, shift: u8) -> Disk {
        Disk { bytes: vec![0; size], shift, metadata: 0, attributes: 0 }
    }
}

#[derive(Default)]
struct Queue {
    submissions: u64,
    completions: u64,
    entries: u16,
    head: u16,
    tail: u16,
    /// Rounds of the completion queue.
    rounds: usize,
    waiting: Vec<[u32; 16]>,
}

pub struct Device {
    pub temper: Temper,
    /// By number: 1 is the first.
    pub disks: BTreeMap<u32, Disk>,
    /// Largest transfer, as a power of two of pages.
    pub transfer: u8,
    pub stride: u32,
    pub flushes: usize,
    pub finished: usize,
    pub most_waiting: usize,
    /// The largest request, in bytes.
    pub largest: usize,
    pub ready: bool,
    registers: BTreeMap<u64, u32>,
    queues: [Queue; 2],
    to_pointer: u64,
}

pub struct Fake {
    pub device: RefCell<Device>,
    pub now: Cell<u64>,
    /// Whether it may reach memory.
    pub is_master: Cell<bool>,
}

impl Fake {
    /// A controller with namespaces of these.
    pub fn new(temper: Temper, disks: Vec<Disk>) -> Fake {
        let device = Device {
            temper,
            disks: (1..).zip(disks).collect(),
            transfer: 0,
            stride: 0,
            flushes: 0,
            finished: 0,
            most_waiting: 0,
            largest: 0,
            // The dead kernel left it running.
            ready: temper != Temper::Starting,
            registers: BTreeMap::from([(0x14, 0x0046_0001)]),
            queues: Default::default(),
            to_pointer: 0,
        };
        Fake { device: RefCell::new(device), now: Cell::new(0), is_master: Cell::new(false) }
    }

    /// A pool for the driver.
    pub fn pool(&self, size: usize) -> &'static DmaPool {
        let (pool, to_pointer) = host_pool(size);
        self.device.borrow_mut().to_pointer = to_pointer;
        pool
    }
}

impl Clock for Fake {
    fn now_us(&self) -> u64 {
        self.now.set(self.now.get() + 10_000);
        let mut device = self.device.borrow_mut();
        if device.temper == Temper::Slow {
            device.work(1);
        }
        if device.temper == Temper::Starting && self.now.get() > STARTED_US {
            device.temper = Temper::Good;
            device.ready = true;
        }
        self.now.get()
    }
}

impl Device {
    fn register(&self, at: u64) -> u32 {
        self.registers.get(&at).copied().unwrap_or(0)
    }

    /// A place in the driver's pool, or in "old memory", whose addresses are pointers.
    fn memory<T>(&self, at: u64) -> *mut T {
        (if at < 1 << 32 { self.to_pointer + at } else { at }) as *mut T
    }

    fn configure(&mut self, value: u32) {
        if value & 1 == 0 {
            assert_ne!(self.temper, Temper::Starting, "stopped before it is ready");
            self.ready = self.temper == Temper::Unstoppable;
            self.queues = Default::default();
            return;
        }
        assert_eq!(value, 0x0046_0001, "entries of 64 and 16 bytes, pages of 4 KiB");
        assert!(!self.ready);
        self.ready = !matches!(self.temper, Temper::NeverReady | Temper::Fatal);
        let address = |at| u64::from(self.register(at + 4)) << 32 | u64::from(self.register(at));
        let (submissions, completions) = (address(0x28), address(0x30));
        assert_eq!((submissions | completions) % 4096, 0);
        let sizes = self.register(0x24);
        assert_eq!(sizes >> 16, sizes & 0xffff);
        let entries = sizes as u16 + 1;
        self.queues[0] = Queue { submissions, completions, entries, ..Queue::default() };
    }

    fn rung(&mut self, index: usize, tail: u16) {
        assert!(self.ready);
        let mut queue = core::mem::take(&mut self.queues[index]);
        assert!(tail < queue.entries);
        while queue.head != tail {
            let at = queue.submissions + u64::from(queue.head) * 64;
            // SAFETY: the driver gave this address of its pool.
            queue.waiting.push(unsafe { self.memory::<[u32; 16]>(at).read() });
            queue.head = (queue.head + 1) % queue.entries;
        }
        assert!(queue.waiting.len() < usize::from(queue.entries));
        if index == 1 {
            self.most_waiting = self.most_waiting.max(queue.waiting.len());
        }
        self.queues[index] = queue;
        while (index == 0 || self.temper != Temper::Slow) && self.work(index) {}
    }

    fn work(&mut self, index: usize) -> bool {
        let Some(command) = self.queues[index].waiting.pop() else { return false };
        self.finished += 1;
        if matches!(self.temper, Temper::SilentAfter(count) if self.finished > count) {
            return true;
        }
        let status = if index == 0 { self.administer(&command) } else { self.access(&command) };
        self.complete(index, (command[0] >> 16) as u16, status);
        true
    }

    fn complete(&mut self, index: usize, id: u16, status: u16) {
        let queue = &mut self.queues[index];
        let at = queue.completions + u64::from(queue.tail) * 16;
        let phase = u32::from(queue.rounds.is_multiple_of(2));
        queue.tail += 1;
        if queue.tail == queue.entries {
            (queue.tail, queue.rounds) = (0, queue.rounds + 1);
        }
        let is_wrong = |temper| self.temper == temper && index == 1;
        let id = if is_wrong(Temper::Lying) { id + 5 } else { id };
        let queue = if is_wrong(Temper::Confused) { 7 } else { index as u32 };
        let words = [0, 0, queue << 16, u32::from(status) << 17 | phase << 16 | u32::from(id)];
        // SAFETY: as above.
        unsafe { self.memory::<[u32; 4]>(at).write(words) };
    }

    fn administer(&mut self, command: &[u32; 16]) -> u16 {
        let prp = u64::from(command[7]) << 32 | u64::from(command[6]);
        let mut page = [0u8; 4096];
        match (command[0] & 0xff, command[10]) {
            (6, 1) => {
                page[77] = self.transfer;
                page[525] = 1;
                page[516..520].copy_from_slice(&(self.disks.len() as u32).to_le_bytes());
            }
            (6, 2) if self.temper == Temper::Old => page.fill(7),
            (6, 2) if self.temper == Temper::Listless => return 2,
            (6, 2) => {
                for (slot, id) in page.chunks_mut(4).zip(self.disks.keys()) {
                    slot.copy_from_slice(&id.to_le_bytes());
                }
            }
            (6, 0) => {
                let Some(disk) = self.disks.get(&command[1]) else { return 0xb };
                let blocks = (disk.bytes.len() >> disk.shift) as u64;
                page[..8].copy_from_slice(&blocks.to_le_bytes());
                // The format is the second one.
                (page[26], page[99]) = (1, disk.attributes);
                page[132..134].copy_from_slice(&disk.metadata.to_le_bytes());
                page[134] = disk.shift;
            }
            (9, 7) => return 0,
            (opcode @ (1 | 5), size) => {
                assert_eq!((size as u16, command[11] & 1, prp % 4096), (1, 1, 0));
                let queue = &mut self.queues[1];
                queue.entries = (size >> 16) as u16 + 1;
                if opcode == 5 {
                    assert_eq!(command[11] & 2, 0, "interrupts");
                    queue.completions = prp;
                } else {
                    assert_eq!(command[11] >> 16, 1);
                    assert_ne!(queue.completions, 0, "completions first");
                    queue.submissions = prp;
                }
                return 0;
            }
            other => panic!("{other:?}"),
        }
        // SAFETY: as above.
        unsafe { self.memory::<[u8; 4096]>(prp).write(page) };
        0
    }

    fn access(&mut self, command: &[u32; 16]) -> u16 {
        let (opcode, id) = (command[0] & 0xff, command[1]);
        if opcode == 0 {
            self.flushes += 1;
            return 0;
        }
        let disk = self.disks.get(&id).unwrap();
        let at = (u64::from(command[11]) << 32 | u64::from(command[10])) << disk.shift;
        let size = (command[12] as usize + 1) << disk.shift;
        self.largest = self.largest.max(size);
        if self.temper == Temper::Failing && opcode == 1 {
            return 0x280;
        }
        let mut at = at as usize;
        for (memory, size) in self.pages(command, size) {
            let memory = self.memory::<u8>(memory);
            let disk = self.disks.get_mut(&id).unwrap();
            let bytes = &mut disk.bytes[at..at + size];
            // SAFETY: as above, or a pointer.
            unsafe {
                match opcode {
                    1 => bytes.copy_from_slice(core::slice::from_raw_parts(memory, size)),
                    2 => memory.copy_from(bytes.as_ptr(), size),
                    other => panic!("{other}"),
                }
            }
            at += size;
        }
        0
    }

    /// The pieces of memory that the command names.
    fn pages(&self, command: &[u32; 16], size: usize) -> Vec<(u64, usize)> {
        let [first, second] =
            [6, 8].map(|at| u64::from(command[at + 1]) << 32 | u64::from(command[at]));
        let some = size.min(4096 - (first % 4096) as usize);
        let mut pages = vec![(first, some)];
        let mut left = size - some;
        let is_list = left > 4096;
        for index in 0.. {
            if left == 0 {
                break;
            }
            // SAFETY: as above.
            let listed = || unsafe { self.memory::<u64>(second).add(index).read() };
            let page = if is_list { listed() } else { second };
            assert_eq!(page % 4096, 0);
            let some = left.min(4096);
            pages.push((page, some));
            left -= some;
        }
        pages
    }
}

impl Registers for Fake {
    fn read8(&self, _: u64) -> u8 {
        panic!("access of 8 bits")
    }
    fn read16(&self, _: u64) -> u16 {
        panic!("access of 16 bits")
    }
    fn read32(&self, offset: u64) -> u32 {
        let device = self.device.borrow();
        match offset {
            _ if device.temper == Temper::Gone => u32::MAX,
            // 64 entries, a wait of a second at most; the NVM command set, pages of 4 KiB.
            0x00 => 1 << 24 | 63,
            0x04 => 1 << 5 | device.stride,
            0x08 => {
                if device.temper == Temper::Old {
                    0x1_0000
                } else {
                    0x1_0400
                }
            }
            0x1c => u32::from(device.ready) | u32::from(device.temper == Temper::Fatal) << 1,
            _ => device.register(offset),
        }
    }
    fn write8(&self, _: u64, _: u8) {
        panic!("access of 8 bits")
    }
    fn write16(&self, _: u64, _: u16) {
        panic!("access of 16 bits")
    }
    fn write32(&self, offset: u64, value: u32) {
        let mut device = self.device.borrow_mut();
        if device.temper == Temper::Gone {
            return;
        }
        device.registers.insert(offset, value);
        match offset {
            0x14 => device.configure(value),
            0x1000.. => {
                assert!(self.is_master.get(), "it does not reach memory");
                let step = 4 << device.stride;
                let doorbell = (offset - 0x1000) / step;
                assert_eq!((offset - 0x1000) % step, 0);
                match doorbell {
                    0 | 2 => device.rung(doorbell as usize / 2, value as u16),
                    1 | 3 => {}
                    other => panic!("doorbell {other}"),
                }
            }
            _ => {}
        }
    }
}
