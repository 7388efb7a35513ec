//! A virtio device made of memory, a disk, a SCSI host or a console, which does what it should or what it should
//! not, behind every kind of bus.

#![allow(unsafe_code)]

use core::cell::{Cell, RefCell};
use std::collections::BTreeMap;
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use crate::PhysAddr;
use crate::clock::Clock;
use crate::dma::DmaPool;
use crate::dma::tests::host_pool;
use crate::mmio::Registers;
use crate::virtio::fake_scsi::{Command, Host};
use crate::virtio::mmio::MmioTransport;
use crate::virtio::{FEATURE_VERSION_1, OpenError, QueueAddresses, Transport, status};

/// How the device behaves.
#[derive(Clone, Copy, PartialEq)]
pub enum Temper {
    Good,
    /// Finishes one request in ten milliseconds, a disk the last first.
    Slow,
    /// Answers its first requests and then nothing.
    SilentAfter(usize),
    /// Reports an error for every write.
    Failing,
    /// Gives back a request that it was never given.
    Lying,
    /// Finishes without writing a status.
    Mute,
    /// Is gone: every register reads all ones.
    Gone,
}

/// How the driver reaches it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub enum Bus {
    /// Through nothing: the transport is faked.
    Direct,
    /// Through registers of version 2.
    Mmio,
    /// Through registers of version 1.
    Legacy,
}

/// All of them.
pub const BUSES: [Bus; 3] = [Bus::Direct, Bus::Mmio, Bus::Legacy];

pub struct Device {
    pub temper: Temper,
    pub features: u64,
    pub status: u8,
    pub queues: [Queue; 3],
    pub finished: usize,
    /// Most requests that waited to be finished at once; a console's that are for sending.
    pub most_waiting: usize,
    pub flushes: usize,
    /// What is on the disk; a console has none.
    pub disk: Vec<u8>,
    /// What is attached to a SCSI host; nothing else is one.
    pub scsi: Option<Host>,
    /// What was sent through the console.
    pub sent: Vec<u8>,
    /// What makes a pointer of a physical address in the driver's pool.
    to_pointer: u64,
}

/// A queue as the device knows it.
#[derive(Default)]
pub struct Queue {
    addresses: Option<QueueAddresses>,
    size: u16,
    seen: u16,
    used: u16,
    /// Requests that were not finished yet.
    waiting: Vec<u16>,
}

/// A part of a request.
struct Part {
    at: *mut u8,
    size: usize,
    device_writes: bool,
    next: Option<u16>,
}

impl Part {
    /// What the driver wrote there.
    fn bytes(&self) -> &[u8] {
        // SAFETY: memory of the driver's pool or of the test, which lives longer than the request.
        unsafe { core::slice::from_raw_parts(self.at, self.size) }
    }

    /// What the driver will read there.
    fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: likewise, and nobody else has a reference to memory that the device writes.
        unsafe { core::slice::from_raw_parts_mut(self.at, self.size) }
    }
}

/// The device with its time: a slow one works while the clock is looked at.
#[derive(Clone)]
pub struct Fake {
    pub device: Rc<RefCell<Device>>,
    pub now: Rc<Cell<u64>>,
    bus: Bus,
    /// What was written to registers that have no other effect, or is pretended.
    registers: Rc<RefCell<BTreeMap<u64, u32>>>,
}

impl Clock for Fake {
    fn now_us(&self) -> u64 {
        self.now.set(self.now.get() + 10_000);
        let mut device = self.device.borrow_mut();
        if device.temper == Temper::Slow {
            device.work();
        }
        self.now.get()
    }
}

/// A place in the driver's pool, or in "old memory", whose addresses are pointers.
fn memory<T: Copy>(to_pointer: u64, PhysAddr(at): PhysAddr, offset: u64) -> *mut T {
    let base = if at < 1 << 32 { to_pointer } else { 0 };
    (base + at + offset) as *mut T
}

impl Device {
    /// The queue whose requests are finished by themselves: the last one that there is.
    fn served(&self) -> usize {
        match (&self.scsi, self.disk.is_empty()) {
            (Some(_), _) => 2,
            (None, true) => 1,
            (None, false) => 0,
        }
    }

    fn set_status(&mut self, status: u8) {
        self.status = status;
        if status == 0 {
            self.queues = Default::default();
        }
    }

    fn max_queue_size(&self, index: usize) -> u16 {
        if index <= self.served() { 256 } else { 0 }
    }

    fn enable_queue(&mut self, index: usize, size: u16, addresses: QueueAddresses) {
        assert_eq!(self.status & status::DRIVER_OK, 0);
        assert!(size <= self.max_queue_size(index));
        self.queues[index] = Queue { addresses: Some(addresses), size, ..Queue::default() };
    }

    fn config32(&self, offset: u64) -> u32 {
        if let Some(host) = &self.scsi {
            return host.config32(offset);
        }
        match offset {
            0 => (self.disk.len() / 512) as u32,
            20 => 512,
            _ => 0,
        }
    }

    fn config16(&self, offset: u64) -> u16 {
        (self.config32(offset & !3) >> (8 * (offset & 2))) as u16
    }

    fn set_config32(&mut self, offset: u64, value: u32) {
        self.scsi.as_mut().expect("nothing can be written there").set_config32(offset, value);
    }

    fn notified(&mut self, index: usize) {
        assert_ne!(self.status & status::DRIVER_OK, 0);
        let (queue, base) = (&mut self.queues[index], self.to_pointer);
        let Some(addresses) = queue.addresses else { return };
        // SAFETY: the driver gave these addresses, which in a test are of its pool.
        unsafe {
            let index = memory::<u16>(base, addresses.available, 2).read();
            while queue.seen != index {
                let entry = u64::from(queue.seen % queue.size);
                queue.waiting.push(memory::<u16>(base, addresses.available, 4 + 2 * entry).read());
                queue.seen = queue.seen.wrapping_add(1);
            }
        }
        let waiting = queue.waiting.len();
        if index == self.served() {
            self.most_waiting = self.most_waiting.max(waiting);
        }
        while self.temper != Temper::Slow && self.work() {}
    }

    /// Finishes a request that waits; a console's that is for sending.
    fn work(&mut self) -> bool {
        let index = self.served();
        let waiting = &mut self.queues[index].waiting;
        if waiting.is_empty() {
            return false;
        }
        let head = if index == 1 { waiting.remove(0) } else { waiting.pop().unwrap() };
        self.finished += 1;
        if !matches!(self.temper, Temper::SilentAfter(count) if self.finished > count) {
            match index {
                0 => self.access_disk(head),
                1 => self.take_output(head),
                _ => self.carry_out(head),
            }
        }
        true
    }

    /// The part of a request that descriptor `index` describes.
    fn part(&self, queue: usize, index: u16) -> Part {
        let (addresses, base) = (self.queues[queue].addresses.unwrap(), self.to_pointer);
        let at = u64::from(index) * 16;
        // SAFETY: as above; descriptors hold such addresses as well, or pointers.
        unsafe {
            let address = memory::<u64>(base, addresses.descriptors, at).read();
            let size = memory::<u32>(base, addresses.descriptors, at + 8).read();
            let flags = memory::<u16>(base, addresses.descriptors, at + 12).read();
            let next = memory::<u16>(base, addresses.descriptors, at + 14).read();
            Part {
                at: memory::<u8>(base, PhysAddr(address), 0),
                size: size as usize,
                device_writes: flags & 2 != 0,
                next: (flags & 1 != 0).then_some(next),
            }
        }
    }

    fn access_disk(&mut self, head: u16) {
        let header = self.part(0, head);
        let mut part = self.part(0, header.next.unwrap());
        // SAFETY: as above.
        unsafe {
            let kind = header.at.cast::<u32>().read();
            let at = header.at.add(8).cast::<u64>().read() as usize * 512;
            if let Some(next) = part.next {
                match kind {
                    0 => part.at.copy_from(self.disk[at..at + part.size].as_ptr(), part.size),
                    1 => self.disk[at..at + part.size]
                        .copy_from_slice(core::slice::from_raw_parts(part.at, part.size)),
                    _ => panic!("data in request {kind}"),
                }
                part = self.part(0, next);
            } else {
                assert_eq!(kind, 4);
                self.flushes += 1;
            }
            if self.temper != Temper::Mute {
                part.at.write(u8::from(self.temper == Temper::Failing && kind == 1));
            }
        }
        self.give_back(0, head, 1);
    }

    fn carry_out(&mut self, head: u16) {
        let mut parts = vec![self.part(2, head)];
        while let Some(next) = parts.last().unwrap().next {
            parts.push(self.part(2, next));
        }
        assert!(parts.is_sorted_by_key(|part| part.device_writes));
        let (mut written, read): (Vec<Part>, Vec<Part>) =
            parts.into_iter().partition(|part| part.device_writes);
        let mut read = read.iter().map(Part::bytes);
        let mut written = written.iter_mut().map(Part::bytes_mut);
        let (header, from) = (read.next().unwrap(), read.next().unwrap_or_default());
        let (response, into) = (written.next().unwrap(), written.next().unwrap_or_default());
        let command = Command { header, from, into, response };
        self.scsi.as_mut().unwrap().carry_out(self.temper, command);
        self.give_back(2, head, 0);
    }

    fn take_output(&mut self, head: u16) {
        let part = self.part(1, head);
        assert!(part.next.is_none());
        // SAFETY: as above.
        self.sent.extend_from_slice(unsafe { core::slice::from_raw_parts(part.at, part.size) });
        self.give_back(1, head, 0);
    }

    /// Puts `bytes` into the next of a console's buffers, as many as it takes, and says that
    /// `written` of them are there. Returns how many there are.
    pub fn bring(&mut self, bytes: &[u8], written: Option<u32>) -> usize {
        if self.queues[0].waiting.is_empty() {
            return 0;
        }
        let head = self.queues[0].waiting.remove(0);
        let part = self.part(0, head);
        let size = bytes.len().min(part.size);
        // SAFETY: as above.
        unsafe { part.at.copy_from(bytes.as_ptr(), size) };
        self.give_back(0, head, written.unwrap_or(size as u32));
        size
    }

    fn give_back(&mut self, index: usize, head: u16, written: u32) {
        let base = self.to_pointer;
        let queue = &mut self.queues[index];
        let addresses = queue.addresses.unwrap();
        let given_back = if self.temper == Temper::Lying { head + 3 } else { head };
        let entry = u64::from(queue.used % queue.size);
        queue.used = queue.used.wrapping_add(1);
        // SAFETY: as above.
        unsafe {
            memory::<u32>(base, addresses.used, 4 + 8 * entry).write(given_back.into());
            memory::<u32>(base, addresses.used, 8 + 8 * entry).write(written);
            memory::<u16>(base, addresses.used, 2).write(queue.used);
        }
    }
}

impl Transport for Fake {
    fn status(&self) -> u8 {
        let device = self.device.borrow();
        if device.temper == Temper::Gone { 0xff } else { device.status }
    }
    fn set_status(&self, status: u8) {
        self.device.borrow_mut().set_status(status);
    }
    fn device_features(&self) -> u64 {
        self.device.borrow().features
    }
    fn set_driver_features(&self, features: u64) {
        assert_eq!(features & !self.device.borrow().features, 0);
    }
    fn max_queue_size(&self, index: u16) -> u16 {
        self.device.borrow().max_queue_size(index.into())
    }
    fn enable_queue(&self, index: u16, size: u16, at: QueueAddresses) -> Result<(), OpenError> {
        self.device.borrow_mut().enable_queue(index.into(), size, at);
        Ok(())
    }
    fn notify(&self, index: u16) {
        self.device.borrow_mut().notified(index.into());
    }
    fn config16(&self, offset: u64) -> u16 {
        self.device.borrow().config16(offset)
    }
    fn config32(&self, offset: u64) -> u32 {
        self.device.borrow().config32(offset)
    }
    fn set_config32(&self, offset: u64, value: u32) {
        self.device.borrow_mut().set_config32(offset, value);
    }
}

impl Fake {
    /// A pool for the driver.
    pub fn pool(&self, size: usize) -> &'static DmaPool {
        let (pool, to_pointer) = host_pool(size);
        self.device.borrow_mut().to_pointer = to_pointer;
        pool
    }

    /// The transport that the driver shall use. A device that is gone went after it was found.
    pub fn transport(&self) -> AnyTransport {
        if self.bus == Bus::Direct {
            return AnyTransport::Direct(self.clone());
        }
        let temper = core::mem::replace(&mut self.device.borrow_mut().temper, Temper::Good);
        let transport = MmioTransport::open(self.clone()).unwrap();
        self.device.borrow_mut().temper = temper;
        AnyTransport::Mmio(transport)
    }

    /// Makes a register read as `value`.
    pub fn pretend(&self, register: u64, value: u32) {
        self.registers.borrow_mut().insert(register, value);
    }

    fn register(&self, register: u64) -> u32 {
        self.registers.borrow().get(&register).copied().unwrap_or(0)
    }

    fn address(&self, register: u64) -> PhysAddr {
        let high = self.register(register + 4);
        PhysAddr(u64::from(high) << 32 | u64::from(self.register(register)))
    }

    /// Where a legacy device looks for its rings (section 2.7.2), by the page it is told.
    fn legacy_addresses(&self, page: u32, size: u64) -> QueueAddresses {
        let descriptors = u64::from(page) * u64::from(self.register(0x28));
        let available = descriptors + 16 * size;
        let used = (available + 4 + 2 * size).next_multiple_of(self.register(0x3c).into());
        QueueAddresses {
            descriptors: PhysAddr(descriptors),
            available: PhysAddr(available),
            used: PhysAddr(used),
        }
    }
}

/// The registers of virtio-mmio, with their offsets as the specification numbers them.
impl Registers for Fake {
    fn read8(&self, _: u64) -> u8 {
        panic!("access of 8 bits")
    }
    fn read16(&self, offset: u64) -> u16 {
        let device = self.device.borrow();
        match offset {
            _ if device.temper == Temper::Gone => u16::MAX,
            0x100.. => device.config16(offset - 0x100),
            _ => panic!("access of 16 bits"),
        }
    }
    fn read32(&self, offset: u64) -> u32 {
        let device = self.device.borrow();
        let legacy = self.bus == Bus::Legacy;
        let queue = self.register(0x30) as usize;
        match offset {
            _ if device.temper == Temper::Gone => u32::MAX,
            0x10 if self.register(0x14) == 1 => {
                assert!(!legacy);
                (device.features >> 32) as u32
            }
            0x10 => device.features as u32,
            0x34 => device.max_queue_size(queue).into(),
            0x40 if legacy => u32::from(device.queues[queue].addresses.is_some()),
            0x44 if !legacy => u32::from(device.queues[queue].addresses.is_some()),
            0x70 => device.status.into(),
            0x100.. => device.config32(offset - 0x100),
            0x00 | 0x04 | 0x08 => self.register(offset),
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
        let legacy = self.bus == Bus::Legacy;
        self.registers.borrow_mut().insert(offset, value);
        let mut device = self.device.borrow_mut();
        let (queue, size) = (self.register(0x30) as usize, self.register(0x38) as u16);
        match offset {
            0x20 => {
                let shift = 32 * self.register(0x24);
                assert_eq!(u64::from(value) << shift & !device.features, 0);
            }
            0x70 => {
                assert!(!legacy || value as u8 & status::FEATURES_OK == 0);
                device.set_status(value as u8);
            }
            0x40 if legacy => {
                let at = self.legacy_addresses(value, size.into());
                device.enable_queue(queue, size, at);
            }
            0x44 if !legacy => device.enable_queue(
                queue,
                size,
                QueueAddresses {
                    descriptors: self.address(0x80),
                    available: self.address(0x90),
                    used: self.address(0xa0),
                },
            ),
            0x50 => device.notified(value as usize),
            0x100.. => device.set_config32(offset - 0x100, value),
            0x14 | 0x24 | 0x30 | 0x38 => {}
            0x28 | 0x3c => assert!(legacy),
            0x80..=0xa4 => assert!(!legacy),
            _ => panic!("{offset:#x} cannot be written"),
        }
    }
}

/// The transport of a fake.
pub enum AnyTransport {
    Direct(Fake),
    Mmio(MmioTransport<Fake>),
}

impl AnyTransport {
    fn inner(&self) -> &dyn Transport {
        match self {
            AnyTransport::Direct(transport) => transport,
            AnyTransport::Mmio(transport) => transport,
        }
    }
}

impl Transport for AnyTransport {
    fn is_legacy(&self) -> bool {
        self.inner().is_legacy()
    }
    fn status(&self) -> u8 {
        self.inner().status()
    }
    fn set_status(&self, status: u8) {
        self.inner().set_status(status);
    }
    fn device_features(&self) -> u64 {
        self.inner().device_features()
    }
    fn set_driver_features(&self, features: u64) {
        self.inner().set_driver_features(features);
    }
    fn max_queue_size(&self, index: u16) -> u16 {
        self.inner().max_queue_size(index)
    }
    fn enable_queue(&self, index: u16, size: u16, at: QueueAddresses) -> Result<(), OpenError> {
        self.inner().enable_queue(index, size, at)
    }
    fn notify(&self, index: u16) {
        self.inner().notify(index);
    }
    fn config16(&self, offset: u64) -> u16 {
        self.inner().config16(offset)
    }
    fn config32(&self, offset: u64) -> u32 {
        self.inner().config32(offset)
    }
    fn set_config32(&self, offset: u64, value: u32) {
        self.inner().set_config32(offset, value);
    }
}

/// A disk of 8 MiB whose block size is told and which can flush.
pub fn fake(bus: Bus, temper: Temper) -> Fake {
    const FLUSH_AND_BLOCK_SIZE: u64 = 1 << 9 | 1 << 6;
    device(bus, temper, 2, FLUSH_AND_BLOCK_SIZE, vec![0; 8 << 20])
}

/// A console that has a size, many ports and a register for emergencies.
pub fn fake_console(bus: Bus, temper: Temper) -> Fake {
    device(bus, temper, 3, 0b111, Vec::new())
}

/// A SCSI host that can do more than is asked of it.
pub fn fake_scsi(bus: Bus, temper: Temper, host: Host) -> Fake {
    let fake = device(bus, temper, 8, 0b1111, Vec::new());
    fake.device.borrow_mut().scsi = Some(host);
    fake
}

fn device(bus: Bus, temper: Temper, kind: u32, features: u64, disk: Vec<u8>) -> Fake {
    let version = if bus == Bus::Legacy { 0 } else { FEATURE_VERSION_1 };
    let device = Device {
        temper,
        features: version | features,
        status: 0xf,
        queues: Default::default(),
        to_pointer: 0,
        finished: 0,
        most_waiting: 0,
        flushes: 0,
        disk,
        scsi: None,
        sent: Vec::new(),
    };
    let fake = Fake {
        device: Rc::new(RefCell::new(device)),
        now: Rc::default(),
        bus,
        registers: Rc::default(),
    };
    fake.pretend(0x00, u32::from_le_bytes(*b"virt"));
    fake.pretend(0x04, if bus == Bus::Legacy { 1 } else { 2 });
    fake.pretend(0x08, kind);
    fake
}
