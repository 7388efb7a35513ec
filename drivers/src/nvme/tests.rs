//! The driver against a controller made of memory.

use std::vec;
use std::vec::Vec;

use super::fake::{Disk, Fake, Temper};
use super::*;
use crate::PhysAddr;
use crate::block::{BlockDevice, BlockError, Lba, REQUEST_US};

const DISK: usize = 8 << 20;

fn fake(temper: Temper) -> Fake {
    Fake::new(temper, vec![Disk::new(DISK, 9)])
}

fn open(fake: &Fake) -> Result<Nvme<'_, '_>, OpenError> {
    open_namespace(fake, 1)
}

fn open_namespace(fake: &Fake, id: u32) -> Result<Nvme<'_, '_>, OpenError> {
    fake.is_master.set(false);
    Nvme::open(fake, fake.pool(64 << 10), fake, &|| fake.is_master.set(true), id)
}

fn namespaces(fake: &Fake) -> Result<Vec<u32>, OpenError> {
    let found = scan(fake, fake.pool(64 << 10), fake, &|| fake.is_master.set(true))?;
    Ok(found.iter().copied().collect())
}

/// Old memory for the device to fetch: its "physical" address is its pointer.
fn old_memory(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 31 + index / 512) as u8).collect()
}

#[test]
fn what_was_written_is_on_the_disk_after_the_flush() {
    for (temper, shift) in [(Temper::Good, 9), (Temper::Slow, 9), (Temper::Good, 12)] {
        let fake = Fake::new(temper, vec![Disk::new(DISK, shift)]);
        let mut disk = open(&fake).unwrap();
        assert_eq!((disk.block_size(), disk.blocks()), (1 << shift, (DISK >> shift) as u64));
        let old = old_memory(3 << 20);
        let at = |byte: u64| Lba(byte >> shift);
        disk.write_physical(at(8192), PhysAddr(old.as_ptr() as u64), old.len() as u64).unwrap();
        for block in 0..64 {
            disk.write(at((4 << 20) + block * 4096), &[block as u8; 4096]).unwrap();
        }
        disk.flush().unwrap();
        {
            let device = fake.device.borrow();
            assert!(device.disks[&1].bytes[8192..][..old.len()] == old);
            assert_eq!(device.disks[&1].bytes[(4 << 20) + 63 * 4096], 63);
            assert_eq!((device.flushes, device.largest), (1, MAX_REQUEST as usize));
            if temper == Temper::Slow {
                assert_eq!(device.most_waiting, usize::from(MAX_SLOTS));
            }
        }
        let mut back = [0; 8192];
        disk.read(at(4 << 20), &mut back).unwrap();
        assert_eq!((back[0], back[4096]), (0, 1));
    }
}

#[test]
fn memory_that_begins_anywhere_in_a_page_is_written() {
    let old = old_memory(1 << 20);
    let page = old.as_ptr().align_offset(4096);
    for (skip, size) in [(0, 4096), (512, 4096), (512, 3584), (3584, 8192), (1024, 262_144)] {
        let fake = fake(Temper::Good);
        let mut disk = open(&fake).unwrap();
        let bytes = &old[page + skip..][..size];
        disk.write_physical(Lba(7), PhysAddr(bytes.as_ptr() as u64), size as u64).unwrap();
        disk.flush().unwrap();
        assert!(fake.device.borrow().disks[&1].bytes[7 * 512..][..size] == *bytes, "{skip} {size}");
    }
}

#[test]
fn requests_are_no_larger_than_the_controller_takes() {
    let fake = fake(Temper::Good);
    fake.device.borrow_mut().transfer = 2;
    let mut disk = open(&fake).unwrap();
    let old = old_memory(1 << 20);
    disk.write_physical(Lba(0), PhysAddr(old.as_ptr() as u64), 1 << 20).unwrap();
    disk.flush().unwrap();
    assert_eq!(fake.device.borrow().largest, 16 << 10);
    assert!(fake.device.borrow().disks[&1].bytes[..1 << 20] == old);
}

#[test]
fn no_claim_about_the_largest_transfer_leads_to_requests_of_nothing() {
    for transfer in 0..=u8::MAX {
        let most = largest_request(transfer);
        assert!((4096..=MAX_REQUEST).contains(&most), "{transfer}: {most}");
        assert!(most.is_multiple_of(4096), "{transfer}: {most}");
    }
    assert_eq!(
        [0, 1, 6, 7, 51, 52, 64].map(largest_request).map(|most| most >> 10),
        [256, 8, 256, 256, 256, 256, 256]
    );
}

#[test]
fn doorbells_are_as_far_apart_as_the_controller_says() {
    let fake = fake(Temper::Good);
    fake.device.borrow_mut().stride = 3;
    assert_eq!(registers_size(&fake), Some(0x1000 + 4 * 32));
    let mut disk = open(&fake).unwrap();
    disk.write(Lba(0), &[7; 512]).unwrap();
    assert_eq!(disk.flush(), Ok(()));
    fake.device.borrow_mut().stride = 15;
    assert_eq!(registers_size(&fake), None);
}

#[test]
fn memory_comes_back_when_the_driver_is_dropped() {
    let fake = fake(Temper::Good);
    let pool = fake.pool(44 << 10);
    for _ in 0..2 {
        fake.is_master.set(false);
        drop(Nvme::open(&fake, pool, &fake, &|| fake.is_master.set(true), 1).unwrap());
        assert_eq!(pool.used(), 0);
        assert!(!fake.device.borrow().ready);
    }
}

#[test]
fn every_namespace_is_found_and_written_alone() {
    for temper in [Temper::Good, Temper::Old, Temper::Listless] {
        let fake = Fake::new(temper, vec![Disk::new(1 << 20, 9), Disk::new(2 << 20, 12)]);
        assert_eq!(namespaces(&fake), Ok(vec![1, 2]));
        for id in [2, 1] {
            let mut disk = open_namespace(&fake, id).unwrap();
            disk.write(Lba(1), &[id as u8; 4096]).unwrap();
            disk.flush().unwrap();
        }
        let device = fake.device.borrow();
        let [first, second] = [&device.disks[&1].bytes, &device.disks[&2].bytes];
        assert_eq!((first[512], first[511], second[4096], second[4095]), (1, 0, 2, 0));
    }
}

#[test]
fn number_that_means_all_namespaces_is_none() {
    let fake = fake(Temper::Good);
    fake.device.borrow_mut().disks.insert(u32::MAX, Disk::new(1 << 20, 9));
    assert_eq!(namespaces(&fake), Ok(vec![1]));
}

#[test]
fn controller_that_is_just_starting_is_stopped_when_it_is_ready() {
    let fake = fake(Temper::Starting);
    let mut disk = open(&fake).unwrap();
    disk.write(Lba(0), &[7; 512]).unwrap();
    assert_eq!(disk.flush(), Ok(()));
}

#[test]
fn namespaces_that_cannot_be_written_are_refused() {
    let disk = || Disk::new(1 << 20, 9);
    for (spoilt, error) in [
        (Disk { metadata: 8, ..disk() }, OpenError::Format),
        (Disk { shift: 16, ..disk() }, OpenError::Format),
        (Disk { attributes: 1, ..disk() }, OpenError::ReadOnly),
    ] {
        let fake = Fake::new(Temper::Good, vec![spoilt]);
        assert_eq!(open(&fake).err(), Some(error));
    }
    assert_eq!(open_namespace(&fake(Temper::Good), 9).err(), Some(OpenError::Refused(0xb)));
}

#[test]
fn controller_that_is_not_to_be_had_costs_its_deadline() {
    for temper in [Temper::Gone, Temper::NeverReady, Temper::Fatal, Temper::Unstoppable] {
        let fake = fake(temper);
        assert_eq!(open(&fake).err(), Some(OpenError::Reset), "{temper:?}");
        // Up to a second to stop, to get ready, and to stop again.
        assert!(fake.now.get() < 3_500_000, "{temper:?} {}", fake.now.get());
        let never_stopped = matches!(temper, Temper::Gone | Temper::Unstoppable);
        assert_eq!(fake.is_master.get(), !never_stopped, "{temper:?}");
    }
    let silent = fake(Temper::SilentAfter(0));
    assert_eq!(open(&silent).err(), Some(OpenError::Timeout));
    assert!(silent.now.get() < ADMIN_US + 1_000_000);
}

#[test]
fn namespace_that_falls_silent_times_out_and_stays_failed() {
    let fake = fake(Temper::SilentAfter(8));
    let mut disk = open(&fake).unwrap();
    let old = old_memory(1 << 20);
    let started = fake.now.get();
    let mut result = Ok(());
    for _ in 0..100 {
        result = disk.write_physical(Lba(0), PhysAddr(old.as_ptr() as u64), 1 << 20);
        if result.is_err() {
            break;
        }
    }
    assert_eq!(result, Err(BlockError::Timeout));
    assert!(fake.now.get() - started < 2 * REQUEST_US);
    assert_eq!(disk.flush(), Err(BlockError::Timeout));
}

#[test]
fn errors_of_posted_writes_are_told_once_and_further_requests_are_taken() {
    let fake = fake(Temper::Failing);
    let mut disk = open(&fake).unwrap();
    disk.write(Lba(0), &[0; 512]).unwrap();
    assert_eq!(disk.flush(), Err(BlockError::Device));
    fake.device.borrow_mut().temper = Temper::Good;
    assert_eq!(disk.write(Lba(0), &[7; 512]), Ok(()));
    assert_eq!(disk.flush(), Ok(()));
    assert_eq!(fake.device.borrow().disks[&1].bytes[..512], [7; 512]);
}

#[test]
fn lies_are_noticed() {
    for temper in [Temper::Lying, Temper::Confused] {
        let fake = fake(temper);
        let mut disk = open(&fake).unwrap();
        assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Protocol), "{temper:?}");
    }
}

#[test]
fn requests_outside_of_the_namespace_never_reach_it() {
    let fake = fake(Temper::Good);
    let mut disk = open(&fake).unwrap();
    let before = fake.device.borrow().finished;
    let end = disk.blocks();
    assert_eq!(disk.write(Lba(end), &[0; 512]), Err(BlockError::Range));
    assert_eq!(disk.write(Lba(u64::MAX), &[0; 512]), Err(BlockError::Range));
    assert_eq!(disk.write(Lba(0), &[0; 100]), Err(BlockError::Range));
    assert_eq!(fake.device.borrow().finished, before);
    assert_eq!(disk.write(Lba(end - 1), &[7; 512]), Ok(()));
}
