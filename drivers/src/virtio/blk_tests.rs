//! The driver against a device made of memory, behind every kind of bus.

use std::vec::Vec;

use super::*;
use crate::PhysAddr;
use crate::block::{BlockDevice, BlockError, REQUEST_US};
use crate::virtio::fake::{AnyTransport, BUSES, Bus, Fake, Temper, fake};

/// Fakes behind every kind of bus.
fn fakes(temper: Temper) -> impl Iterator<Item = Fake> {
    BUSES.into_iter().map(move |bus| fake(bus, temper))
}

fn open(fake: &Fake) -> Result<VirtioBlk<'_, AnyTransport>, OpenError> {
    VirtioBlk::open(fake.transport(), fake.pool(1 << 20), fake)
}

/// Old memory for the device to fetch: its "physical" address is its pointer.
fn old_memory(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 31 + index / 512) as u8).collect()
}

#[test]
fn what_was_written_is_on_the_disk_after_the_flush() {
    for fake in fakes(Temper::Good).chain(fakes(Temper::Slow)) {
        let mut blk = open(&fake).unwrap();
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
            if device.temper == Temper::Slow {
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
    for fake in fakes(Temper::Good) {
        // What the payload has: legacy queues need a page more.
        let pool = fake.pool(28 << 10);
        for _ in 0..2 {
            drop(VirtioBlk::open(fake.transport(), pool, &fake).unwrap());
            assert_eq!(pool.used(), 0);
            assert_eq!(fake.device.borrow().status, 0);
        }
    }
}

#[test]
fn device_that_falls_silent_times_out_and_stays_failed() {
    for fake in fakes(Temper::SilentAfter(3)) {
        let mut blk = open(&fake).unwrap();
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
}

#[test]
fn device_that_goes_away_times_out() {
    for fake in fakes(Temper::Good) {
        let mut blk = open(&fake).unwrap();
        blk.write(Lba(0), &[1; 512]).unwrap();
        fake.device.borrow_mut().temper = Temper::Gone;
        fake.device.borrow_mut().queues = Default::default();
        let started = fake.now.get();
        assert_eq!(blk.read(Lba(0), &mut [0; 512]), Err(BlockError::Timeout));
        assert!(fake.now.get() - started < 2 * REQUEST_US);
    }
}

#[test]
fn errors_of_posted_writes_are_told_by_the_flush() {
    for fake in fakes(Temper::Failing) {
        let mut blk = open(&fake).unwrap();
        blk.write(Lba(0), &[0; 512]).unwrap();
        assert_eq!(blk.flush(), Err(BlockError::Device));
    }
}

#[test]
fn disk_that_reported_an_error_takes_further_requests() {
    for fake in fakes(Temper::Failing) {
        let mut blk = open(&fake).unwrap();
        assert_eq!(blk.write(Lba(0), &[0; 512]), Ok(()));
        assert_eq!(blk.flush(), Err(BlockError::Device));
        fake.device.borrow_mut().temper = Temper::Good;
        assert_eq!(blk.write(Lba(0), &[7; 512]), Ok(()));
        assert_eq!(blk.flush(), Ok(()));
        assert_eq!(fake.device.borrow().disk[..512], [7; 512]);
    }
}

#[test]
fn lies_are_noticed() {
    for fake in fakes(Temper::Lying).chain(fakes(Temper::Mute)) {
        let mut blk = open(&fake).unwrap();
        assert_eq!(blk.read(Lba(0), &mut [0; 512]), Err(BlockError::Protocol));
    }
}

#[test]
fn device_that_is_gone_does_not_reset() {
    for fake in fakes(Temper::Gone) {
        let result = open(&fake);
        assert_eq!(result.err(), Some(OpenError::Reset));
        assert!(fake.now.get() < 2_000_000);
    }
}

#[test]
fn devices_before_version_1_are_refused_but_behind_legacy_registers() {
    for (bus, expected) in
        [(Bus::Direct, Some(OpenError::Features)), (Bus::Mmio, Some(OpenError::Features))]
            .into_iter()
            .chain([(Bus::Legacy, None)])
    {
        let fake = fake(bus, Temper::Good);
        fake.device.borrow_mut().features = feature::FLUSH;
        assert_eq!(open(&fake).err(), expected);
    }
}

#[test]
fn read_only_devices_are_refused() {
    for fake in fakes(Temper::Good) {
        fake.device.borrow_mut().features |= feature::READ_ONLY;
        assert_eq!(open(&fake).err(), Some(OpenError::ReadOnly));
    }
}

#[test]
fn requests_outside_of_the_disk_never_reach_it() {
    for fake in fakes(Temper::Good) {
        let mut blk = open(&fake).unwrap();
        let end = blk.blocks();
        assert_eq!(blk.write(Lba(end), &[0; 512]), Err(BlockError::Range));
        assert_eq!(blk.write(Lba(u64::MAX), &[0; 512]), Err(BlockError::Range));
        assert_eq!(blk.write(Lba(0), &[0; 100]), Err(BlockError::Range));
        assert_eq!(blk.write_physical(Lba(end - 1), PhysAddr(0), 1024), Err(BlockError::Range));
        assert_eq!(fake.device.borrow().finished, 0);
        assert_eq!(blk.write(Lba(end - 1), &[7; 512]), Ok(()));
    }
}
