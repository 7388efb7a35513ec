//! The driver against a controller made of memory.

use std::vec::Vec;

use super::fake::{Fake, Temper, What, fake, fake_with_sectors};
use super::identify::tests::put;
use super::*;
use crate::PhysAddr;
use crate::block::{BlockDevice, BlockError, Lba, REQUEST_US};
use crate::dma::DmaPool;

/// What the payload has.
const POOL: usize = 28 << 10;

/// Controllers with one disk, with and without command queuing.
fn fakes(temper: Temper) -> [Fake; 2] {
    [true, false].map(|queuing| fake(temper, &[What::Disk], queuing))
}

/// The controller, reset, and memory for its disks.
fn reset(fake: &Fake) -> (Controller<Fake>, &'static DmaPool) {
    let pool = fake.pool(POOL);
    (Controller::new(fake.clone(), fake).unwrap(), pool)
}

/// Runs `story` with the disk on the first port.
fn with_disk<T>(fake: &Fake, story: impl FnOnce(&mut AhciDisk<'_, Fake>) -> T) -> T {
    let (controller, pool) = reset(fake);
    let mut disk = AhciDisk::open(&controller, 0, pool, fake).unwrap();
    story(&mut disk)
}

/// Why the disk on the first port cannot be used.
fn refusal(fake: &Fake) -> Option<OpenError> {
    let (controller, pool) = reset(fake);
    let refusal = AhciDisk::open(&controller, 0, pool, fake).err();
    assert_eq!(pool.used(), 0);
    refusal
}

/// Old memory for the controller to fetch: its "physical" address is its pointer.
fn old_memory(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 31 + index / 512) as u8).collect()
}

fn physical(old: &[u8]) -> PhysAddr {
    PhysAddr(old.as_ptr() as u64)
}

#[test]
fn what_was_written_is_on_the_disk_after_the_flush() {
    for fake in fakes(Temper::Good).into_iter().chain(fakes(Temper::Slow)) {
        with_disk(&fake, |disk| {
            let old = old_memory(3 << 20);
            disk.write_physical(Lba(16), physical(&old), old.len() as u64).unwrap();
            for block in 0..64 {
                disk.write(Lba(8192 + block * 8), &[block as u8; 4096]).unwrap();
            }
            disk.flush().unwrap();
            fake.disk(0, |disk| {
                assert_eq!(disk.bytes[16 * 512..][..old.len()], old);
                assert_eq!(disk.bytes[8192 * 512 + 63 * 4096], 63);
                assert_eq!((disk.flushes, disk.resets), (1, 0));
            });
            let mut back = [0; 8192];
            disk.read(Lba(8192), &mut back).unwrap();
            assert_eq!((back[0], back[4096]), (0, 1));
        });
    }
}

#[test]
fn queue_is_kept_full_with_command_queuing_and_one_command_runs_without() {
    for (queuing, expected) in [(true, 8), (false, 1)] {
        let fake = fake(Temper::Slow, &[What::Disk], queuing);
        with_disk(&fake, |disk| {
            let old = old_memory(64 << 10);
            for index in 0..64 {
                disk.write_physical(Lba(128 * index), physical(&old), old.len() as u64).unwrap();
            }
            disk.flush().unwrap();
        });
        // The clock ticks, and the fake works, once for each of our waits.
        let most = fake.disk(0, |disk| disk.most_waiting);
        assert!(most >= expected && (queuing || most == 1), "{most} commands under way");
    }
}

#[test]
fn no_more_is_queued_than_disk_and_controller_take() {
    for (depth, slots) in [(4, 32), (32, 4)] {
        let fake = fake(Temper::Slow, &[What::Disk], true);
        fake.disk(0, |disk| put(&mut disk.identify, 75, depth - 1));
        fake.hba.borrow_mut().capabilities &= !(0x1f << 8);
        fake.hba.borrow_mut().capabilities |= (slots - 1) << 8;
        with_disk(&fake, |disk| {
            let old = old_memory(4096);
            for index in 0..64 {
                disk.write_physical(Lba(8 * index), physical(&old), 4096).unwrap();
            }
        });
        assert_eq!(fake.disk(0, |disk| disk.most_waiting), 4);
    }
}

#[test]
fn disk_that_queues_on_a_controller_that_does_not_gets_one_command_at_a_time() {
    let fake = fake(Temper::Slow, &[What::Disk], true);
    fake.hba.borrow_mut().capabilities &= !capability::NATIVE_COMMAND_QUEUING;
    with_disk(&fake, |disk| {
        disk.write(Lba(0), &[1; 16384]).unwrap();
        disk.flush().unwrap();
    });
    fake.disk(0, |disk| {
        assert_eq!((disk.bytes[16383], disk.bytes[16384], disk.most_waiting), (1, 0, 1));
    });
}

#[test]
fn sectors_of_4096_bytes_are_counted_as_such() {
    for queuing in [true, false] {
        let fake = fake_with_sectors(Temper::Good, &[What::Disk], queuing, 4096);
        with_disk(&fake, |disk| {
            assert_eq!((disk.block_size(), disk.blocks()), (4096, 2048));
            let old = old_memory(2 << 20);
            disk.write_physical(Lba(3), physical(&old), old.len() as u64).unwrap();
            disk.flush().unwrap();
            fake.disk(0, |disk| assert_eq!(disk.bytes[3 * 4096..][..old.len()], old));
            assert_eq!(disk.write(Lba(0), &[0; 512]), Err(BlockError::Range));
        });
    }
}

#[test]
fn only_ports_with_a_disk_are_opened_and_memory_comes_back() {
    let fake = fake(Temper::Good, &[What::Nothing, What::CdDrive, What::Disk], true);
    let (controller, pool) = reset(&fake);
    assert!(controller.ports().eq([0, 2, 4]));
    for _ in 0..2 {
        let opened: Vec<_> = controller
            .ports()
            .map(|port| AhciDisk::open(&controller, port, pool, &fake).map(|disk| disk.blocks()))
            .collect();
        assert_eq!(opened, [Err(OpenError::NoDisk), Err(OpenError::NoDisk), Ok(16384)]);
        assert_eq!(pool.used(), 0);
        assert_eq!(fake.disk(2, |disk| disk.command & 0x11), 0, "the port runs");
    }
}

#[test]
fn empty_ports_cost_no_more_time_than_one_does() {
    let fake = fake(Temper::Good, &[What::Nothing; 16], true);
    let (controller, pool) = reset(&fake);
    let started = fake.now.get();
    for port in controller.ports() {
        assert_eq!(AhciDisk::open(&controller, port, pool, &fake).err(), Some(OpenError::NoDisk));
    }
    assert!(fake.now.get() - started < 3 * PRESENCE_US);
}

#[test]
fn firmware_is_asked_to_let_go_of_the_controller() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    fake.hba.borrow_mut().firmware = true;
    with_disk(&fake, |disk| assert_eq!(disk.blocks(), 16384));
    assert!((50_000..HANDOFF_US).contains(&fake.now.get()));
}

#[test]
fn interrupts_are_off_and_old_commands_forgotten() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    let _controller = reset(&fake);
    assert_eq!(fake.hba.borrow().ghc, control::AHCI_ENABLE);
    assert_eq!(fake.disk(0, |disk| (disk.active, disk.issued)), (0, 0));
}

#[test]
fn controller_that_never_ends_its_reset_times_out() {
    let fake = fake(Temper::NeverReset, &[What::Disk], true);
    assert_eq!(Controller::new(fake.clone(), &fake).err(), Some(OpenError::Reset));
    assert!(fake.now.get() < 2 * RESET_US);
}

#[test]
fn controller_that_is_gone_is_refused_at_once() {
    let fake = fake(Temper::Gone, &[What::Disk], true);
    assert_eq!(Controller::new(fake.clone(), &fake).err(), Some(OpenError::Reset));
    assert!(fake.now.get() < 100_000);
}

#[test]
fn disk_that_does_not_get_ready_is_refused_within_its_time() {
    for (temper, expected, limit) in [
        (Temper::NoLink, OpenError::Link, 2_000_000),
        (Temper::NeverReady, OpenError::Busy, 12_000_000),
        (Temper::SilentAfter(0), OpenError::Identify, 7_000_000),
    ] {
        let fake = fake(temper, &[What::Disk], true);
        assert_eq!(refusal(&fake), Some(expected));
        assert!(fake.now.get() < limit, "{temper:?} took {} us", fake.now.get());
    }
}

#[test]
fn disk_without_48_bit_addresses_is_refused() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    fake.disk(0, |disk| put(&mut disk.identify, 83, 1 << 14));
    assert_eq!(refusal(&fake), Some(OpenError::Unsupported));
}

#[test]
fn controller_with_32_bit_addresses_gets_no_others() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    fake.hba.borrow_mut().capabilities &= !capability::ADDRESSES_OF_64_BITS;
    with_disk(&fake, |disk| {
        let old = old_memory(4096);
        assert!(physical(&old) > PhysAddr(1 << 32), "not above 4 GiB");
        let range = Err(BlockError::Range);
        assert_eq!(disk.write_physical(Lba(0), physical(&old), 4096), range);
        assert_eq!(disk.write_physical(Lba(0), PhysAddr((4 << 30) - 512), 1024), range);
        assert_eq!(disk.write(Lba(0), &[5; 4096]), Ok(()));
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(fake.disk(0, |disk| (disk.bytes[4095], disk.finished)), (5, 3));
    });
}

#[test]
fn memory_at_odd_addresses_is_not_fetched() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    with_disk(&fake, |disk| {
        let odd = PhysAddr(0x10_0001);
        assert_eq!(disk.write_physical(Lba(0), odd, 512), Err(BlockError::Range));
    });
}

#[test]
fn disk_that_falls_silent_times_out_and_stays_failed() {
    for fake in fakes(Temper::SilentAfter(3)) {
        with_disk(&fake, |disk| {
            let old = old_memory(1 << 20);
            let started = fake.now.get();
            let write = |_| disk.write_physical(Lba(0), physical(&old), 1 << 20);
            assert_eq!((0..100).try_for_each(write), Err(BlockError::Timeout));
            assert!(fake.now.get() - started < 2 * REQUEST_US);
            assert_eq!(disk.flush(), Err(BlockError::Timeout));
            assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Timeout));
        });
    }
}

#[test]
fn controller_that_goes_away_times_out_and_keeps_its_memory() {
    for fake in fakes(Temper::Good) {
        let (controller, pool) = reset(&fake);
        let mut disk = AhciDisk::open(&controller, 0, pool, &fake).unwrap();
        disk.write(Lba(0), &[1; 512]).unwrap();
        fake.hba.borrow_mut().temper = Temper::Gone;
        let started = fake.now.get();
        assert_eq!(disk.flush(), Err(BlockError::Timeout));
        assert!(fake.now.get() - started < 2 * REQUEST_US);
        drop(disk);
        assert_ne!(pool.used(), 0, "nobody knows whether the controller is really gone");
    }
}

#[test]
fn disk_that_reported_an_error_takes_further_requests() {
    for fake in fakes(Temper::Failing) {
        with_disk(&fake, |disk| {
            for round in 1..4 {
                assert_eq!(disk.write(Lba(0), &[0; 512]), Ok(()));
                assert_eq!(disk.flush(), Err(BlockError::Device));
                assert_eq!(fake.disk(0, |disk| disk.resets), round);
                assert_eq!(disk.read(Lba(0), &mut [0; 512]), Ok(()));
            }
            fake.hba.borrow_mut().temper = Temper::Good;
            assert_eq!(disk.write(Lba(0), &[7; 512]), Ok(()));
            assert_eq!(disk.flush(), Ok(()));
            assert!(fake.disk(0, |disk| disk.bytes[..512] == [7; 512]));
        });
    }
}

#[test]
fn flush_that_fails_is_told() {
    for fake in fakes(Temper::FailingFlush) {
        with_disk(&fake, |disk| {
            assert_eq!(disk.write(Lba(0), &[0; 512]), Ok(()));
            assert_eq!(disk.flush(), Err(BlockError::Device));
            fake.hba.borrow_mut().temper = Temper::Good;
            assert_eq!(disk.flush(), Ok(()));
        });
    }
}

#[test]
fn error_of_one_queued_command_ends_all_that_are_under_way() {
    let fake = fake(Temper::Slow, &[What::Disk], true);
    with_disk(&fake, |disk| {
        let old = old_memory(4096);
        for index in 0..6 {
            disk.write_physical(Lba(8 * index), physical(&old), 4096).unwrap();
        }
        let before = fake.disk(0, |disk| disk.most_waiting);
        assert!(before > 2, "{before} commands under way");
        fake.hba.borrow_mut().temper = Temper::Failing;
        // Each of these brings the fake to work on what waits.
        assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Device));
        fake.hba.borrow_mut().temper = Temper::Good;
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(disk.write(Lba(0), &[9; 4096]), Ok(()));
        assert_eq!(disk.flush(), Ok(()));
        assert_eq!(fake.disk(0, |disk| (disk.bytes[4095], disk.resets)), (9, 1));
    });
}

#[test]
fn port_that_does_not_stop_is_reset_with_its_controller() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    with_disk(&fake, |disk| {
        fake.hba.borrow_mut().temper = Temper::Stuck;
        assert_eq!(disk.write(Lba(0), &[1; 512]), Ok(()));
        assert_eq!(disk.flush(), Err(BlockError::Device));
        fake.hba.borrow_mut().temper = Temper::Good;
        assert_eq!(disk.write(Lba(0), &[1; 512]), Ok(()));
        assert_eq!(disk.flush(), Ok(()));
    });
    assert_eq!(fake.disk(0, |disk| disk.bytes[511]), 1);
}

#[test]
fn disk_that_does_not_come_back_from_an_error_times_out() {
    for fake in fakes(Temper::Dying) {
        with_disk(&fake, |disk| {
            let started = fake.now.get();
            assert_eq!(disk.write(Lba(0), &[0; 512]), Ok(()));
            assert_eq!(disk.flush(), Err(BlockError::Device));
            assert_eq!(disk.write(Lba(0), &[0; 512]), Ok(()));
            assert_eq!(disk.flush(), Err(BlockError::Timeout));
            assert_eq!(disk.write(Lba(0), &[0; 512]), Err(BlockError::Timeout));
            assert!(fake.now.get() - started < 2 * REQUEST_US);
        });
    }
}

#[test]
fn lies_are_noticed() {
    for fake in fakes(Temper::Lying) {
        with_disk(&fake, |disk| {
            assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Protocol));
            assert_eq!(disk.flush(), Err(BlockError::Protocol));
        });
    }
}

#[test]
fn requests_outside_of_the_disk_never_reach_it() {
    let fake = fake(Temper::Good, &[What::Disk], true);
    with_disk(&fake, |disk| {
        let end = disk.blocks();
        assert_eq!(disk.write(Lba(end), &[0; 512]), Err(BlockError::Range));
        assert_eq!(disk.write_physical(Lba(end - 1), PhysAddr(0), 1024), Err(BlockError::Range));
        assert_eq!(fake.disk(0, |disk| disk.finished), 1, "IDENTIFY DEVICE alone");
        assert_eq!(disk.write(Lba(end - 1), &[7; 512]), Ok(()));
    });
}
