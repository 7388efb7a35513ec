//! The driver against a device made of memory, which does what it should or what it should not.

#![allow(unsafe_code)]

use core::cell::{Cell, RefCell};
use std::rc::Rc;
use std::vec;
use std::vec::Vec;

use super::*;
use crate::dma::tests::host_pool;
use crate::virtio::QueueAddresses;

/// How the device behaves.
#[derive(Clone, Copy, PartialEq)]
enum Temper {
    Good,
    /// Finishes one request in ten milliseconds, the last first.
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

struct Device {
    temper: Temper,
    features: u64,
    status: u8,
    addresses: Option<QueueAddresses>,
    size: u16,
    seen: u16,
    used: u16,
    waiting: Vec<u16>,
    finished: usize,
    most_waiting: usize,
    flushes: usize,
    disk: Vec<u8>,
}

/// The device with its time: a slow one works while the clock is looked at.
#[derive(Clone)]
struct Fake {
    device: Rc<RefCell<Device>>,
    now: Rc<Cell<u64>>,
}

impl Clock for Fake {
    fn now_us(&self) -> u64 {
        self.now.set(self.now.get() + 10_000);
        let mut device = self.device.borrow_mut();
        if device.temper == Temper::Slow
            && let Some(head) = device.waiting.pop()
        {
            device.finish(head);
        }
        self.now.get()
    }
}

fn memory<T: Copy>(at: PhysAddr, offset: u64) -> *mut T {
    (at.0 + offset) as *mut T
}

impl Device {
    fn notified(&mut self) {
        let Some(addresses) = self.addresses else { return };
        // SAFETY: the driver gave these addresses, which in this test are pointers into its pool.
        unsafe {
            let index = memory::<u16>(addresses.available, 2).read();
            while self.seen != index {
                let entry = u64::from(self.seen % self.size);
                self.waiting.push(memory::<u16>(addresses.available, 4 + 2 * entry).read());
                self.seen = self.seen.wrapping_add(1);
            }
        }
        self.most_waiting = self.most_waiting.max(self.waiting.len());
        if self.temper != Temper::Slow {
            for head in core::mem::take(&mut self.waiting) {
                self.finish(head);
            }
        }
    }

    fn finish(&mut self, head: u16) {
        self.finished += 1;
        if matches!(self.temper, Temper::SilentAfter(count) if self.finished > count) {
            return;
        }
        let Some(addresses) = self.addresses else { return };
        // SAFETY: as above; descriptors hold addresses that are pointers as well.
        unsafe {
            let descriptor = |index: u16| {
                let at = u64::from(index) * 16;
                let address = memory::<u64>(addresses.descriptors, at).read();
                let size = memory::<u32>(addresses.descriptors, at + 8).read();
                let flags = memory::<u16>(addresses.descriptors, at + 12).read();
                let next = memory::<u16>(addresses.descriptors, at + 14).read();
                (address as *mut u8, size as usize, flags, next)
            };
            let (header, _, _, next) = descriptor(head);
            let kind = header.cast::<u32>().read();
            let at = header.add(8).cast::<u64>().read() as usize * 512;
            let (mut buffer, size, flags, next) = descriptor(next);
            if flags & 1 != 0 {
                match kind {
                    0 => buffer.copy_from(self.disk[at..at + size].as_ptr(), size),
                    1 => self.disk[at..at + size]
                        .copy_from_slice(core::slice::from_raw_parts(buffer, size)),
                    _ => panic!("data in request {kind}"),
                }
                buffer = descriptor(next).0;
            } else {
                assert_eq!(kind, 4);
                self.flushes += 1;
            }
            if self.temper != Temper::Mute {
                buffer.write(u8::from(self.temper == Temper::Failing && kind == 1));
            }
            let given_back = if self.temper == Temper::Lying { head + 3 } else { head };
            let entry = u64::from(self.used % self.size);
            memory::<u32>(addresses.used, 4 + 8 * entry).write(given_back.into());
            self.used = self.used.wrapping_add(1);
            memory::<u16>(addresses.used, 2).write(self.used);
        }
    }
}

impl Transport for Fake {
    fn status(&self) -> u8 {
        let device = self.device.borrow();
        if device.temper == Temper::Gone { 0xff } else { device.status }
    }
    fn set_status(&self, status: u8) {
        let mut device = self.device.borrow_mut();
        device.status = status;
        if status == 0 {
            device.addresses = None;
        }
    }
    fn device_features(&self) -> u64 {
        self.device.borrow().features
    }
    fn set_driver_features(&self, features: u64) {
        assert_eq!(features & !self.device.borrow().features, 0);
    }
    fn max_queue_size(&self, _: u16) -> u16 {
        256
    }
    fn enable_queue(&self, index: u16, size: u16, addresses: QueueAddresses) {
        assert_eq!(index, 0);
        let mut device = self.device.borrow_mut();
        (device.size, device.addresses) = (size, Some(addresses));
        (device.seen, device.used) = (0, 0);
    }
    fn notify(&self, _: u16) {
        self.device.borrow_mut().notified();
    }
    fn config32(&self, offset: u64) -> u32 {
        match offset {
            0 => (self.device.borrow().disk.len() / 512) as u32,
            20 => 512,
            _ => 0,
        }
    }
}

const FEATURES: u64 = FEATURE_VERSION_1 | feature::FLUSH | feature::BLK_SIZE;

fn fake(temper: Temper) -> Fake {
    let device = Device {
        temper,
        features: FEATURES,
        status: 0xf,
        addresses: None,
        size: 0,
        seen: 0,
        used: 0,
        waiting: Vec::new(),
        finished: 0,
        most_waiting: 0,
        flushes: 0,
        disk: vec![0; 8 << 20],
    };
    Fake { device: Rc::new(RefCell::new(device)), now: Rc::default() }
}

/// Old memory for the device to fetch: its "physical" address is its pointer.
fn old_memory(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 31 + index / 512) as u8).collect()
}

#[test]
fn what_was_written_is_on_the_disk_after_the_flush() {
    for temper in [Temper::Good, Temper::Slow] {
        let fake = fake(temper);
        let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
        let old = old_memory(3 << 20);
        blk.write_physical(Lba(16), PhysAddr(old.as_ptr() as u64), old.len() as u64).unwrap();
        for block in 0..64 {
            blk.write(Lba(8192 + block * 8), &[block as u8; 4096]).unwrap();
        }
        blk.flush().unwrap();
        {
            let device = fake.device.borrow();
            assert_eq!(device.disk[16 * 512..][..old.len()], old);
            assert_eq!(device.disk[8192 * 512 + 63 * 4096], 63);
            assert_eq!(device.flushes, 1);
            if temper == Temper::Slow {
                assert!(device.most_waiting > 4, "{} requests under way", device.most_waiting);
            }
        }
        let mut back = [0; 8192];
        blk.read(Lba(8192), &mut back).unwrap();
        assert_eq!((back[0], back[4096]), (0, 1));
    }
}

#[test]
fn device_memory_comes_back_when_the_driver_is_dropped() {
    let (fake, pool) = (fake(Temper::Good), host_pool(1 << 20));
    drop(VirtioBlk::open(fake.clone(), pool, &fake).unwrap());
    assert_eq!(pool.used(), 0);
    assert_eq!(fake.device.borrow().status, 0);
}

#[test]
fn device_that_falls_silent_times_out_and_stays_failed() {
    let fake = fake(Temper::SilentAfter(3));
    let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
    let old = old_memory(1 << 20);
    let started = fake.now.get();
    let mut result = Ok(());
    for _ in 0..100 {
        result = blk.write_physical(Lba(0), PhysAddr(old.as_ptr() as u64), 1 << 20);
        if result.is_err() {
            break;
        }
    }
    assert_eq!(result, Err(BlockError::Timeout));
    assert!(fake.now.get() - started < 2 * REQUEST_US);
    assert_eq!(blk.flush(), Err(BlockError::Timeout));
    assert_eq!(blk.read(Lba(0), &mut [0; 512]), Err(BlockError::Timeout));
}

#[test]
fn errors_of_posted_writes_are_told_by_the_flush() {
    let fake = fake(Temper::Failing);
    let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
    blk.write(Lba(0), &[0; 512]).unwrap();
    assert_eq!(blk.flush(), Err(BlockError::Device));
}

#[test]
fn disk_that_reported_an_error_takes_further_requests() {
    let fake = fake(Temper::Failing);
    let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
    assert_eq!(blk.write(Lba(0), &[0; 512]), Ok(()));
    assert_eq!(blk.flush(), Err(BlockError::Device));
    fake.device.borrow_mut().temper = Temper::Good;
    assert_eq!(blk.write(Lba(0), &[7; 512]), Ok(()));
    assert_eq!(blk.flush(), Ok(()));
    assert_eq!(fake.device.borrow().disk[..512], [7; 512]);
}

#[test]
fn lies_are_noticed() {
    for temper in [Temper::Lying, Temper::Mute] {
        let fake = fake(temper);
        let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
        assert_eq!(blk.read(Lba(0), &mut [0; 512]), Err(BlockError::Protocol));
    }
}

#[test]
fn device_that_is_gone_does_not_reset() {
    let fake = fake(Temper::Gone);
    let result = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake);
    assert_eq!(result.err(), Some(OpenError::Reset));
    assert!(fake.now.get() < 2_000_000);
}

#[test]
fn legacy_and_read_only_devices_are_refused() {
    for (features, expected) in [
        (feature::FLUSH, OpenError::Features),
        (FEATURES | feature::READ_ONLY, OpenError::ReadOnly),
    ] {
        let fake = fake(Temper::Good);
        fake.device.borrow_mut().features = features;
        let result = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake);
        assert_eq!(result.err(), Some(expected));
    }
}

#[test]
fn requests_outside_of_the_disk_never_reach_it() {
    let fake = fake(Temper::Good);
    let mut blk = VirtioBlk::open(fake.clone(), host_pool(1 << 20), &fake).unwrap();
    let end = blk.blocks();
    assert_eq!(blk.write(Lba(end), &[0; 512]), Err(BlockError::Range));
    assert_eq!(blk.write(Lba(u64::MAX), &[0; 512]), Err(BlockError::Range));
    assert_eq!(blk.write(Lba(0), &[0; 100]), Err(BlockError::Range));
    assert_eq!(blk.write_physical(Lba(end - 1), PhysAddr(0), 1024), Err(BlockError::Range));
    assert_eq!(fake.device.borrow().finished, 0);
    assert_eq!(blk.write(Lba(end - 1), &[7; 512]), Ok(()));
}
