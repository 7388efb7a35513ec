//! A controller made of memory, with disks on its ports, which does what it should or what it should
//! not.

#![allow(unsafe_code)]

use core::cell::{Cell, RefCell};
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::ahci::identify::tests::data;
use crate::clock::Clock;
use crate::dma::DmaPool;
use crate::dma::tests::host_pool;
use crate::mmio::Registers;

/// How the controller and its disks behave.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Temper {
    Good,
    /// Finishes one request in ten milliseconds, the last first.
    Slow,
    /// Answers its first requests and then nothing.
    SilentAfter(usize),
    /// Reports an error for every write.
    Failing,
    /// The same, and the port cannot be used afterwards: the disk does not come back from its reset.
    Dying,
    /// The same, and the port does not stop.
    Stuck,
    /// Reports an error for every flush.
    FailingFlush,
    /// Works on a request that it was never given.
    Lying,
    /// Begins a reset and never ends it.
    NeverReset,
    /// The disk stays busy after its reset.
    NeverReady,
    /// Something is on the port, but the link to it does not come up.
    NoLink,
    /// Is gone: every register reads all ones.
    Gone,
}

/// What is on a port.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum What {
    Nothing,
    Disk,
    CdDrive,
}

/// Bits of the registers, as the specification numbers them.
const START: u32 = 1;
const RECEIVE: u32 = 1 << 4;
const TASK_FILE_ERROR: u32 = 1 << 30;
const QUEUING: u32 = 1 << 30;
const WIDE: u32 = 1 << 31;

/// How long a disk needs for its reset.
const RESET_US: u64 = 30_000;

pub struct Hba {
    pub temper: Temper,
    pub capabilities: u32,
    pub ghc: u32,
    /// Whether firmware owns the controller; it lets go 50 ms after it was asked.
    pub firmware: bool,
    asked_at: Option<u64>,
    pub ports: Vec<Disk>,
    to_pointer: u64,
    now: u64,
}

/// A port with what is on it.
pub struct Disk {
    pub what: What,
    pub block_size: usize,
    pub identify: [u8; 512],
    pub bytes: Vec<u8>,
    pub finished: usize,
    /// Most requests that waited to be finished at once.
    pub most_waiting: usize,
    pub flushes: usize,
    /// How often the disk alone was reset.
    pub resets: usize,
    list: u64,
    received: u64,
    happened: u32,
    pub command: u32,
    status: u32,
    control: u32,
    pub active: u32,
    pub issued: u32,
    /// Requests that were not finished yet.
    waiting: Vec<u16>,
    /// Refuses everything until it is reset.
    is_in_error: bool,
    ready_at: u64,
}

#[derive(Clone)]
pub struct Fake {
    pub hba: Rc<RefCell<Hba>>,
    pub now: Rc<Cell<u64>>,
}

impl Clock for Fake {
    fn now_us(&self) -> u64 {
        self.now.set(self.now.get() + 10_000);
        let mut hba = self.hba.borrow_mut();
        hba.now = self.now.get();
        for port in 0..hba.ports.len() {
            if hba.temper == Temper::Slow {
                hba.work(port);
            }
        }
        self.now.get()
    }
}

/// A controller with these things on its ports: disks of 8 MiB, with or without command queuing.
pub fn fake(temper: Temper, ports: &[What], queuing: bool) -> Fake {
    fake_with_sectors(temper, ports, queuing, 512)
}

pub fn fake_with_sectors(temper: Temper, ports: &[What], queuing: bool, block_size: u32) -> Fake {
    const SIZE: usize = 8 << 20;
    let disk = |&what| Disk {
        what,
        block_size: block_size as usize,
        identify: data(block_size, SIZE as u64 / u64::from(block_size), queuing.then_some(32)),
        bytes: vec![0; if what == What::Disk { SIZE } else { 0 }],
        finished: 0,
        most_waiting: 0,
        flushes: 0,
        resets: 0,
        list: 0,
        received: 0,
        happened: u32::MAX,
        // The dead kernel's commands were under way.
        command: START | RECEIVE,
        status: 0x50,
        control: 0,
        active: 0b10,
        issued: 0b10,
        waiting: Vec::new(),
        is_in_error: false,
        ready_at: 0,
    };
    let hba = Hba {
        temper,
        capabilities: WIDE | 31 << 8 | if queuing { QUEUING } else { 0 },
        ghc: 1 << 31 | 1 << 1,
        firmware: false,
        asked_at: None,
        ports: ports.iter().map(disk).collect(),
        to_pointer: 0,
        now: 0,
    };
    Fake { hba: Rc::new(RefCell::new(hba)), now: Rc::default() }
}

impl Fake {
    /// A pool for the driver.
    pub fn pool(&self, size: usize) -> &'static DmaPool {
        let (pool, to_pointer) = host_pool(size);
        self.hba.borrow_mut().to_pointer = to_pointer;
        pool
    }

    /// What is on a port.
    pub fn disk<T>(&self, port: usize, with: impl FnOnce(&mut Disk) -> T) -> T {
        with(&mut self.hba.borrow_mut().ports[port])
    }
}

impl Hba {
    /// A place in the driver's pool, or in "old memory", whose addresses are pointers.
    fn memory<T>(&self, at: u64) -> *mut T {
        (if at < 1 << 32 { self.to_pointer + at } else { at }) as *mut T
    }

    fn reset(&mut self) {
        self.ghc = if self.temper == Temper::NeverReset { 1 } else { 0 };
        let now = self.now;
        for disk in &mut self.ports {
            disk.stop();
            disk.command = 0;
            disk.come_back(now);
        }
    }

    fn issue(&mut self, port: usize, bits: u32) {
        let disk = &mut self.ports[port];
        assert_ne!(disk.command & START, 0, "a command for a port that does not run");
        for slot in (0..32).filter(|slot| bits & 1 << slot != 0) {
            assert_eq!(disk.issued & 1 << slot, 0, "slot {slot} is in use");
            disk.issued |= 1 << slot;
            disk.waiting.push(slot);
        }
        disk.most_waiting = disk.most_waiting.max(disk.waiting.len());
        while self.temper != Temper::Slow && self.work(port) {}
    }

    /// Does the last request that waits.
    fn work(&mut self, port: usize) -> bool {
        let disk = &mut self.ports[port];
        let Some(slot) = disk.waiting.pop() else { return false };
        if disk.is_in_error {
            return true;
        }
        disk.finished += 1;
        match self.temper {
            Temper::SilentAfter(count) if self.ports[port].finished > count => {}
            Temper::Lying if self.ports[port].finished > 1 => {
                self.ports[port].issued = 1 << (slot + 3);
            }
            _ => self.answer(port, slot),
        }
        true
    }

    fn answer(&mut self, port: usize, slot: u16) {
        let is_queued = self.ports[port].active & 1 << slot != 0;
        let is_done = self.run(port, slot);
        let dying = matches!(self.temper, Temper::Dying);
        let disk = &mut self.ports[port];
        if is_queued {
            disk.issued &= !(1 << slot);
        }
        if is_done {
            disk.issued &= !(1 << slot);
            disk.active &= !(1 << slot);
        } else {
            (disk.is_in_error, disk.status) = (true, 0x41);
            disk.happened |= TASK_FILE_ERROR;
            if dying {
                disk.what = What::Nothing;
            }
        }
    }

    /// Does what a command says. Returns whether it succeeds.
    fn run(&mut self, port: usize, slot: u16) -> bool {
        let disk = &self.ports[port];
        let header = disk.list + 32 * u64::from(slot);
        let is_queued = disk.active & 1 << slot != 0;
        // SAFETY: the driver gave these addresses, which in a test are of its pool, or pointers.
        let (flags, table) =
            unsafe { (*self.memory::<u32>(header), *self.memory::<u64>(header + 8)) };
        // SAFETY: as above.
        let fis = unsafe { *self.memory::<[u8; 20]>(table) };
        assert_eq!((flags & 0x1f, fis[0], fis[1], table % 128), (5, 0x27, 0x80, 0));
        let pair = |low: usize, high: usize| usize::from(fis[low]) | usize::from(fis[high]) << 8;
        let (features, count) = (pair(3, 11), pair(12, 13));
        let at = [fis[4], fis[5], fis[6], fis[8], fis[9], fis[10], 0, 0];
        let at = u64::from_le_bytes(at) as usize * disk.block_size;
        let (sectors, writes) = match fis[2] {
            0x25 | 0x35 => (count, fis[2] == 0x35),
            0x60 | 0x61 => {
                assert_eq!((count, is_queued), (usize::from(slot) << 3, true));
                (features, fis[2] == 0x61)
            }
            0xec => return self.transfer(flags, table, port, None, 512),
            0xea => {
                assert_eq!((flags >> 16, disk.waiting.len()), (0, 0), "a flush is alone");
                self.ports[port].flushes += 1;
                return self.temper != Temper::FailingFlush;
            }
            other => panic!("command {other:#x}"),
        };
        assert_eq!((flags & 1 << 6 != 0, is_queued), (writes, fis[2] >= 0x60));
        assert_eq!(fis[7], 1 << 6, "not the address of a sector");
        let fails = matches!(self.temper, Temper::Failing | Temper::Dying | Temper::Stuck);
        let size = sectors * disk.block_size;
        !(writes && fails) && self.transfer(flags, table, port, Some(at), size)
    }

    /// Moves data between the disk at `at`, or its identity, and memory.
    fn transfer(
        &mut self,
        flags: u32,
        table: u64,
        port: usize,
        at: Option<usize>,
        size: usize,
    ) -> bool {
        assert_eq!(flags >> 16, 1, "regions of memory");
        // SAFETY: as in `run`.
        let (memory, last) = unsafe {
            (*self.memory::<u64>(table + 0x80), *self.memory::<u32>(table + 0x8c) as usize)
        };
        assert_eq!((last + 1, memory % 2), (size, 0));
        let memory = self.memory::<u8>(memory);
        let disk = &mut self.ports[port];
        let bytes = match at {
            Some(at) => &mut disk.bytes[at..at + size],
            None => &mut disk.identify[..],
        };
        // SAFETY: as in `run`.
        unsafe {
            if flags & 1 << 6 != 0 {
                bytes.copy_from_slice(core::slice::from_raw_parts(memory, size));
            } else {
                memory.copy_from(bytes.as_ptr(), size);
            }
        }
        true
    }

    fn port_read(&self, port: usize, register: u64) -> u32 {
        let (disk, temper) = (&self.ports[port], self.temper);
        let is_back = self.now >= disk.ready_at;
        match register {
            0x10 => disk.happened,
            0x18 => {
                let runs = (disk.command & START) << 15 | (disk.command & RECEIVE) << 10;
                disk.command | runs | if temper == Temper::Stuck { 1 << 15 } else { 0 }
            }
            0x20 if !is_back || temper == Temper::NeverReady => 0xd0,
            0x20 => disk.status,
            0x24 => {
                if disk.what == What::CdDrive {
                    0xeb14_0101
                } else {
                    0x0101
                }
            }
            0x28 if disk.what == What::Nothing || disk.control & 0xf == 1 => 0,
            0x28 if !is_back || temper == Temper::NoLink => 0x1,
            0x28 => 0x123,
            0x2c => disk.control,
            0x30 => 0,
            0x34 => disk.active,
            0x38 => disk.issued,
            _ => panic!("{register:#x} of a port cannot be read"),
        }
    }

    fn port_write(&mut self, port: usize, register: u64, value: u32) {
        let now = self.now;
        let disk = &mut self.ports[port];
        let stopped = disk.command & START == 0;
        let half = |old: u64, value: u32, upper: bool| match upper {
            false => old >> 32 << 32 | u64::from(value),
            true => old & 0xffff_ffff | u64::from(value) << 32,
        };
        match register {
            0x00 | 0x04 => {
                assert!(stopped && disk.command & RECEIVE == 0);
                disk.list = half(disk.list, value, register == 4);
                assert_eq!(disk.list % 1024, 0);
            }
            0x08 | 0x0c => {
                assert!(stopped && disk.command & RECEIVE == 0);
                disk.received = half(disk.received, value, register == 12);
                assert_eq!(disk.received % 256, 0);
            }
            0x10 => disk.happened &= !value,
            0x14 => assert_eq!(value, 0, "interrupts"),
            0x18 => {
                assert!(value & START == 0 || value & RECEIVE != 0, "runs but cannot receive");
                assert!(value & START == 0 || now >= disk.ready_at, "the disk is not ready");
                disk.command = value & !(1 << 15 | 1 << 14);
                if value & START == 0 {
                    disk.stop();
                }
            }
            0x2c => {
                assert!(stopped, "the disk of a running port is reset");
                if disk.control & 0xf == 1 && value & 0xf == 0 {
                    disk.resets += 1;
                    disk.come_back(now);
                }
                disk.control = value;
            }
            0x30 => {}
            0x34 => disk.active |= value,
            0x38 => self.issue(port, value),
            _ => panic!("{register:#x} of a port cannot be written"),
        }
    }
}

impl Disk {
    fn stop(&mut self) {
        (self.active, self.issued) = (0, 0);
        self.waiting.clear();
    }

    fn come_back(&mut self, now: u64) {
        (self.is_in_error, self.status) = (false, 0x50);
        self.ready_at = now + RESET_US;
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
        let hba = self.hba.borrow();
        let let_go = hba.asked_at.is_some_and(|at| hba.now > at + 50_000);
        match offset {
            _ if hba.temper == Temper::Gone => u32::MAX,
            0x00 => hba.capabilities,
            0x04 => hba.ghc,
            // The first bit is for the first port, and the second for no port.
            0x0c => (0..hba.ports.len()).fold(0, |bits, port| bits | 1 << (2 * port)),
            0x24 => u32::from(hba.firmware),
            0x28 => u32::from(!let_go) | u32::from(hba.asked_at.is_some()) << 1,
            0x100.. => hba.port_read((offset - 0x100) as usize / 0x100, offset % 0x80),
            _ => panic!("{offset:#x} cannot be read"),
        }
    }
    fn write8(&self, _: u64, _: u8) {
        panic!("access of 8 bits")
    }
    fn write16(&self, _: u64, _: u16) {
        panic!("access of 16 bits")
    }
    fn write32(&self, offset: u64, value: u32) {
        let mut hba = self.hba.borrow_mut();
        match offset {
            0x04 if value & 1 != 0 => hba.reset(),
            0x04 => hba.ghc = value,
            0x28 => hba.asked_at = Some(hba.now),
            0x100.. => hba.port_write((offset - 0x100) as usize / 0x100, offset % 0x80, value),
            _ => panic!("{offset:#x} cannot be written"),
        }
    }
}
