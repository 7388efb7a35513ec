//! The driver against a host made of memory, behind every kind of bus.

use std::vec;
use std::vec::Vec;

use super::*;
use crate::PhysAddr;
use crate::block::{BlockDevice, Lba, REQUEST_US};
use crate::virtio::fake::{AnyTransport, BUSES, Bus, Fake, Temper, fake_scsi};
use crate::virtio::fake_scsi::{Host as FakeHost, LogicalUnit};

const FIRST: Unit = Unit { target: 0, lun: 0 };

/// Fakes with these units behind every kind of bus.
fn fakes(temper: Temper, units: &[LogicalUnit]) -> impl Iterator<Item = Fake> {
    BUSES.into_iter().map(move |bus| fake_scsi(bus, temper, FakeHost::new(units.to_vec())))
}

/// Fakes with one disk, changed by `change`.
fn disks(temper: Temper, change: impl Fn(&mut LogicalUnit)) -> impl Iterator<Item = Fake> {
    let mut unit = LogicalUnit::new(0, 0);
    change(&mut unit);
    fakes(temper, &[unit]).collect::<Vec<_>>().into_iter()
}

fn good() -> impl Iterator<Item = Fake> {
    disks(Temper::Good, |_| ())
}

fn open(fake: &Fake) -> Result<VirtioScsi<'_, AnyTransport>, ScsiError> {
    VirtioScsi::open(fake.transport(), fake.pool(1 << 20), fake, FIRST)
}

fn found(fake: &Fake) -> Vec<(u8, u16)> {
    let units = scan(fake.transport(), fake.pool(1 << 20), fake).unwrap();
    assert!(!units.more);
    units.found.iter().map(|unit| (unit.target, unit.lun)).collect()
}

/// Does something with the fake's first unit.
fn with_unit<T>(fake: &Fake, with: impl FnOnce(&mut LogicalUnit) -> T) -> T {
    with(&mut fake.device.borrow_mut().scsi.as_mut().unwrap().units[0])
}

fn commands(fake: &Fake) -> Vec<u8> {
    fake.device.borrow().scsi.as_ref().unwrap().commands.clone()
}

fn set_temper(fake: &Fake, temper: Temper) {
    fake.device.borrow_mut().temper = temper;
}

/// Old memory for the device to fetch: its "physical" address is its pointer.
fn old_memory(size: usize) -> Vec<u8> {
    (0..size).map(|index| (index * 31 + index / 512) as u8).collect()
}

#[test]
fn what_was_written_is_on_the_disk_after_the_flush() {
    for temper in [Temper::Good, Temper::Slow] {
        for block_size in [512, 4096] {
            for fake in disks(temper, |unit| unit.block_size = block_size) {
                let mut disk = open(&fake).unwrap();
                assert_eq!(
                    (disk.block_size(), disk.blocks()),
                    (block_size, (4 << 20) / u64::from(block_size))
                );
                let lba = |offset: usize| Lba(offset as u64 / u64::from(block_size));
                let old = old_memory(2 << 20);
                let at = PhysAddr(old.as_ptr() as u64);
                disk.write_physical(lba(8192), at, old.len() as u64).unwrap();
                for page in 0..64 {
                    let offset = (3 << 20) + page * 4096;
                    disk.write(lba(offset), &[page as u8; 4096]).unwrap();
                }
                disk.flush().unwrap();
                with_unit(&fake, |unit| {
                    assert!(unit.disk[8192..][..old.len()] == old);
                    assert_eq!(unit.disk[(3 << 20) + 63 * 4096], 63);
                    assert_eq!((unit.flushes, unit.most), (1, 1 << 20));
                });
                let most = fake.device.borrow().most_waiting;
                assert!(temper == Temper::Good || most > 4, "{most} requests under way");
                let mut back = [0; 8192];
                disk.read(lba(3 << 20), &mut back).unwrap();
                assert_eq!((back[0], back[4096]), (0, 1));
            }
        }
    }
}

#[test]
fn slow_disk_has_as_many_commands_under_way_as_it_takes() {
    for (per_unit, expected) in [(0, 1), (3, 3), (128, SLOTS)] {
        for fake in disks(Temper::Slow, |_| ()) {
            fake.device.borrow_mut().scsi.as_mut().unwrap().config[3] = per_unit;
            let mut disk = open(&fake).unwrap();
            let old = old_memory(4096);
            for page in 0..64 {
                let at = PhysAddr(old.as_ptr() as u64);
                disk.write_physical(Lba(page * 8), at, 4096).unwrap();
            }
            disk.flush().unwrap();
            assert_eq!(fake.device.borrow().most_waiting, expected);
        }
    }
}

#[test]
fn units_of_all_targets_are_found() {
    let units =
        [(0, 0), (0, 1), (3, 7), (255, 300)].map(|(target, lun)| LogicalUnit::new(target, lun));
    for temper in [Temper::Good, Temper::Slow] {
        for fake in fakes(temper, &units) {
            assert_eq!(found(&fake), [(0, 0), (0, 1), (3, 7), (255, 300)]);
            let unit = Unit { target: 255, lun: 300 };
            let mut disk =
                VirtioScsi::open(fake.transport(), fake.pool(1 << 20), &fake, unit).unwrap();
            disk.write(Lba(0), &[9; 512]).unwrap();
            disk.flush().unwrap();
            drop(disk);
            let device = fake.device.borrow();
            assert_eq!(device.scsi.as_ref().unwrap().units[3].disk[..512], [9; 512]);
        }
    }
}

#[test]
fn host_without_units_has_none_and_one_with_too_many_says_so() {
    for fake in fakes(Temper::Good, &[]) {
        assert_eq!(found(&fake), []);
    }
    let units: Vec<_> =
        (0..70).map(|lun| LogicalUnit { disk: vec![], ..LogicalUnit::new(1, lun) }).collect();
    for fake in fakes(Temper::Good, &units) {
        let units = scan(fake.transport(), fake.pool(1 << 20), &fake).unwrap();
        assert_eq!((units.found.len(), units.more), (MAX_UNITS, true));
    }
}

#[test]
fn units_of_many_targets_are_too_many_together() {
    let units = (0..80)
        .map(|number| LogicalUnit { disk: vec![], ..LogicalUnit::new(number % 2, number.into()) });
    let units: Vec<_> = units.collect();
    for fake in fakes(Temper::Good, &units) {
        let units = scan(fake.transport(), fake.pool(1 << 20), &fake).unwrap();
        assert_eq!((units.found.len(), units.more), (MAX_UNITS, true));
    }
}

#[test]
fn targets_that_cannot_list_their_units_have_the_first_one() {
    let units = [LogicalUnit::new(0, 0), LogicalUnit::new(0, 1), LogicalUnit::new(9, 0)];
    for fake in fakes(Temper::Good, &units) {
        fake.device.borrow_mut().scsi.as_mut().unwrap().knows_report_luns = false;
        assert_eq!(found(&fake), [(0, 0), (9, 0)]);
    }
}

/// A clock that runs a hundred times as fast.
struct Fast<'a>(&'a Fake);

impl Clock for Fast<'_> {
    fn now_us(&self) -> u64 {
        100 * self.0.now_us()
    }
}

#[test]
fn host_whose_every_answer_takes_seconds_is_not_asked_for_ever() {
    for fake in fakes(Temper::Slow, &[LogicalUnit::new(1, 0), LogicalUnit::new(255, 0)]) {
        let clock = Fast(&fake);
        let units = scan(fake.transport(), fake.pool(1 << 20), &clock).unwrap();
        assert_eq!((units.found.as_slice(), units.more), (&[Unit { target: 1, lun: 0 }][..], true));
        assert!(clock.now_us() < SCAN_US + REQUEST_US);
    }
}

#[test]
fn targets_and_units_beyond_those_that_the_host_has_are_not_asked() {
    for fake in fakes(
        Temper::Good,
        &[LogicalUnit::new(0, 5), LogicalUnit::new(0, 6), LogicalUnit::new(2, 0)],
    ) {
        fake.device.borrow_mut().scsi.as_mut().unwrap().config[7..].copy_from_slice(&[1 << 16, 5]);
        assert_eq!(found(&fake), [(0, 5)]);
        assert_eq!(commands(&fake).len(), 2);
    }
}

#[test]
fn cd_rom_is_refused_and_the_disk_of_the_second_target_taken() {
    let units = [LogicalUnit { kind: 5, ..LogicalUnit::new(0, 0) }, LogicalUnit::new(1, 0)];
    for fake in fakes(Temper::Good, &units) {
        assert_eq!(found(&fake), [(0, 0), (1, 0)]);
        // Both through one transport, one after the other, as the payload does it.
        let (transport, pool) = (fake.transport(), fake.pool(28 << 10));
        let refused = VirtioScsi::open(&transport, pool, &fake, FIRST).err();
        assert_eq!(refused, Some(ScsiError::Unit(Unusable::NotADisk(5))));
        let second = Unit { target: 1, lun: 0 };
        let mut disk = VirtioScsi::open(&transport, pool, &fake, second).unwrap();
        disk.write(Lba(1), &[1; 512]).unwrap();
        disk.flush().unwrap();
        let device = fake.device.borrow();
        assert_eq!(device.scsi.as_ref().unwrap().units[1].disk[512..1024], [1; 512]);
    }
}

#[test]
fn unit_that_is_not_there_is_no_disk() {
    for fake in fakes(Temper::Good, &[LogicalUnit::new(0, 1)]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotADisk(0x7f))));
    }
    for fake in fakes(Temper::Good, &[]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotADisk(0x7f))));
    }
}

#[test]
fn disk_that_is_known_but_not_there_is_no_disk() {
    const NOT_CONNECTED: u8 = 1 << 5;
    for fake in disks(Temper::Good, |unit| unit.kind = NOT_CONNECTED) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotADisk(NOT_CONNECTED))));
    }
}

#[test]
fn disk_that_answers_with_nothing_is_taken_for_the_worst() {
    for fake in disks(Temper::Good, |unit| unit.conditions = vec![[0; 4]; 100]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::ReadOnly)));
    }
}

#[test]
fn transfer_that_was_not_whole_or_not_understood_has_failed() {
    for condition in [[0; 4], [2, 5, 0x20, 0]] {
        for fake in good() {
            let mut disk = open(&fake).unwrap();
            with_unit(&fake, |unit| unit.conditions = vec![condition]);
            disk.write(Lba(0), &[1; 512]).unwrap();
            assert_eq!(disk.flush(), Err(BlockError::Device));
        }
    }
}

#[test]
fn limits_are_taken_from_their_own_page_only() {
    for fake in disks(Temper::Good, |unit| unit.ignores_pages = true) {
        let mut disk = open(&fake).unwrap();
        let old = old_memory(1 << 20);
        disk.write_physical(Lba(0), PhysAddr(old.as_ptr() as u64), 1 << 20).unwrap();
        disk.flush().unwrap();
        with_unit(&fake, |unit| assert_eq!(unit.most, 1 << 20));
    }
}

/// Power on, bus reset and changed parameters; told while the unit is looked at.
const ATTENTIONS: [[u8; 4]; 3] = [[2, 6, 0x29, 0], [2, 6, 0x29, 2], [2, 6, 0x2a, 1]];

#[test]
fn unit_attentions_come_first_and_are_passed_over() {
    for fake in disks(Temper::Good, |unit| unit.conditions = ATTENTIONS.to_vec()) {
        open(&fake).unwrap();
        assert_eq!(commands(&fake).iter().filter(|&&operation| operation == 0).count(), 4);
    }
}

#[test]
fn unit_that_has_attentions_for_ever_is_not_ready() {
    for fake in disks(Temper::Good, |unit| unit.conditions = vec![ATTENTIONS[0]; 1000]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotReady)));
    }
}

#[test]
fn disk_that_spins_up_is_waited_for_but_not_for_ever() {
    const BECOMING_READY: [u8; 4] = [2, 2, 4, 1];
    for fake in disks(Temper::Good, |unit| unit.conditions = vec![BECOMING_READY; 100]) {
        open(&fake).unwrap();
    }
    for fake in disks(Temper::Good, |unit| unit.conditions = vec![BECOMING_READY; 100_000]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotReady)));
        assert!(fake.now.get() < 30_000_000);
    }
}

#[test]
fn drive_without_a_medium_is_not_ready() {
    for fake in disks(Temper::Good, |unit| unit.conditions = vec![[2, 2, 0x3a, 0]; 1000]) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::NotReady)));
    }
}

#[test]
fn command_that_a_reset_interrupted_is_given_again() {
    // Unit attention, task aborted, and the host's own words for a reset.
    for condition in [ATTENTIONS[1], [0x40, 0, 0, 0], [0xff, 4, 0, 0]] {
        for fake in good() {
            let mut disk = open(&fake).unwrap();
            with_unit(&fake, |unit| unit.conditions = vec![condition]);
            disk.write(Lba(3), &[3; 512]).unwrap();
            disk.flush().unwrap();
            with_unit(&fake, |unit| assert_eq!(unit.disk[3 * 512..][..512], [3; 512]));
            with_unit(&fake, |unit| unit.conditions = vec![condition]);
            let mut back = [0; 512];
            disk.read(Lba(3), &mut back).unwrap();
            assert_eq!(back, [3; 512]);
            with_unit(&fake, |unit| unit.conditions = vec![condition]);
            disk.flush().unwrap();
            with_unit(&fake, |unit| assert_eq!(unit.flushes, 2));
        }
    }
}

#[test]
fn command_that_is_interrupted_twice_has_failed() {
    for fake in good() {
        let mut disk = open(&fake).unwrap();
        with_unit(&fake, |unit| unit.conditions = vec![ATTENTIONS[1]; 2]);
        assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Device));
        assert_eq!(disk.read(Lba(0), &mut [0; 512]), Ok(()));
    }
}

#[test]
fn busy_disk_is_asked_again_until_the_deadline() {
    // Busy, queue full, and the host's own word.
    for condition in [[8, 0, 0, 0], [0x28, 0, 0, 0], [0xff, 5, 0, 0]] {
        for fake in good() {
            let mut disk = open(&fake).unwrap();
            with_unit(&fake, |unit| unit.conditions = vec![condition; 50]);
            disk.write(Lba(0), &[1; 512]).unwrap();
            disk.flush().unwrap();
            with_unit(&fake, |unit| assert_eq!(unit.disk[..512], [1; 512]));
            with_unit(&fake, |unit| unit.conditions = vec![condition; 100_000]);
            let started = fake.now.get();
            assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Timeout));
            assert!(fake.now.get() - started < 2 * REQUEST_US);
        }
    }
}

#[test]
fn nothing_is_written_any_more_when_the_medium_may_be_another_or_the_disk_is_gone() {
    for condition in [[2, 6, 0x28, 0], [0xff, 3, 0, 0]] {
        for fake in good() {
            let mut disk = open(&fake).unwrap();
            with_unit(&fake, |unit| unit.conditions = vec![condition]);
            disk.write(Lba(0), &[1; 512]).unwrap();
            assert_eq!(disk.flush(), Err(BlockError::Protocol));
            assert_eq!(disk.write(Lba(0), &[1; 512]), Err(BlockError::Protocol));
            with_unit(&fake, |unit| assert_eq!(unit.disk[..512], [0; 512]));
        }
    }
}

#[test]
fn disk_without_a_cache_has_nothing_to_flush() {
    for fake in disks(Temper::Good, |unit| unit.has_cache = false) {
        let mut disk = open(&fake).unwrap();
        disk.write(Lba(0), &[1; 512]).unwrap();
        assert_eq!(disk.flush(), Ok(()));
    }
}

#[test]
fn flush_that_fails_is_told() {
    for fake in good() {
        let mut disk = open(&fake).unwrap();
        with_unit(&fake, |unit| unit.conditions = vec![[2, 3, 0x0c, 0]]);
        assert_eq!(disk.flush(), Err(BlockError::Device));
    }
}

#[test]
fn write_protected_disks_are_refused() {
    for fake in disks(Temper::Good, |unit| unit.is_write_protected = true) {
        assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::ReadOnly)));
    }
}

#[test]
fn impossible_sizes_are_refused() {
    for (block_size, size) in [(520, 520), (256, 4096), (8192, 8192), (0x8000_0000, 0), (512, 0)] {
        let change =
            |unit: &mut LogicalUnit| (unit.block_size, unit.disk) = (block_size, vec![0; size]);
        for fake in disks(Temper::Good, change) {
            assert_eq!(open(&fake).err(), Some(ScsiError::Unit(Unusable::Capacity)));
        }
    }
}

#[test]
fn requests_are_no_longer_than_host_and_disk_allow() {
    for (sectors, blocks, expected) in
        [(0, 0, 1 << 20), (65535, 0, 1 << 20), (15, 0, 4096), (256, 0, 128 << 10), (0, 100, 49152)]
    {
        for fake in disks(Temper::Good, |unit| unit.max_blocks = blocks) {
            fake.device.borrow_mut().scsi.as_mut().unwrap().config[2] = sectors;
            let mut disk = open(&fake).unwrap();
            let old = old_memory(2 << 20);
            disk.write_physical(Lba(0), PhysAddr(old.as_ptr() as u64), 2 << 20).unwrap();
            disk.flush().unwrap();
            with_unit(&fake, |unit| {
                assert_eq!(unit.most, expected);
                assert!(unit.disk[..2 << 20] == old);
            });
        }
    }
    for (sectors, blocks) in [(7, 0), (0, 7)] {
        for fake in disks(Temper::Good, |unit| unit.max_blocks = blocks) {
            fake.device.borrow_mut().scsi.as_mut().unwrap().config[2] = sectors;
            assert_eq!(open(&fake).err(), Some(OpenError::Config.into()));
        }
    }
}

#[test]
fn sizes_that_somebody_changed_are_set_back() {
    for is_adjustable in [true, false] {
        for fake in good() {
            {
                let mut device = fake.device.borrow_mut();
                let host = device.scsi.as_mut().unwrap();
                host.config[5..7].copy_from_slice(&[18, 16]);
                host.is_adjustable = is_adjustable;
            }
            assert_eq!(open(&fake).err(), (!is_adjustable).then_some(OpenError::Config.into()));
        }
    }
}

#[test]
fn device_memory_comes_back_when_the_driver_is_dropped() {
    for fake in good() {
        // What the payload has.
        let pool = fake.pool(28 << 10);
        for _ in 0..2 {
            scan(fake.transport(), pool, &fake).unwrap();
            assert_eq!(pool.used(), 0);
            drop(VirtioScsi::open(fake.transport(), pool, &fake, FIRST).unwrap());
            assert_eq!((pool.used(), fake.device.borrow().status), (0, 0));
        }
    }
}

#[test]
fn device_that_falls_silent_times_out_and_stays_failed() {
    for fake in disks(Temper::SilentAfter(10), |_| ()) {
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
}

#[test]
fn device_that_falls_silent_while_it_is_looked_at_times_out() {
    for silent_after in 0..5 {
        for fake in disks(Temper::SilentAfter(silent_after), |_| ()) {
            assert_eq!(open(&fake).err(), Some(Unusable::Broken(BlockError::Timeout).into()));
            assert!(fake.now.get() < 2 * REQUEST_US);
        }
    }
}

#[test]
fn units_found_before_the_device_fell_silent_are_kept() {
    for (silent_after, expected) in [(0, None), (1, Some(1)), (100, Some(1))] {
        for fake in disks(Temper::SilentAfter(silent_after), |_| ()) {
            let units = scan(fake.transport(), fake.pool(1 << 20), &fake);
            assert_eq!(units.as_ref().ok().map(|units| units.found.len()), expected);
            assert!(units.is_ok_and(|units| units.more) || silent_after == 0);
            assert!(fake.now.get() < 2 * REQUEST_US);
        }
    }
}

#[test]
fn disk_that_reported_an_error_takes_further_requests() {
    for fake in disks(Temper::Failing, |_| ()) {
        let mut disk = open(&fake).unwrap();
        disk.write(Lba(0), &[0; 512]).unwrap();
        assert_eq!(disk.flush(), Err(BlockError::Device));
        set_temper(&fake, Temper::Good);
        disk.write(Lba(0), &[7; 512]).unwrap();
        assert_eq!(disk.flush(), Ok(()));
        with_unit(&fake, |unit| assert_eq!(unit.disk[..512], [7; 512]));
    }
}

#[test]
fn lies_are_noticed() {
    for temper in [Temper::Lying, Temper::Mute] {
        for fake in disks(temper, |_| ()) {
            assert_eq!(open(&fake).err(), Some(Unusable::Broken(BlockError::Protocol).into()));
            set_temper(&fake, Temper::Good);
            let mut disk = open(&fake).unwrap();
            set_temper(&fake, temper);
            assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Protocol));
        }
    }
}

#[test]
fn device_that_is_gone_does_not_reset() {
    for fake in disks(Temper::Gone, |_| ()) {
        assert_eq!(open(&fake).err(), Some(OpenError::Reset.into()));
        assert_eq!(
            scan(fake.transport(), fake.pool(1 << 20), &fake).err(),
            Some(OpenError::Reset.into())
        );
        assert!(fake.now.get() < 4_000_000);
    }
}

#[test]
fn device_that_goes_away_times_out() {
    for fake in good() {
        let mut disk = open(&fake).unwrap();
        disk.write(Lba(0), &[1; 512]).unwrap();
        set_temper(&fake, Temper::Gone);
        fake.device.borrow_mut().queues = Default::default();
        let started = fake.now.get();
        assert_eq!(disk.read(Lba(0), &mut [0; 512]), Err(BlockError::Timeout));
        assert!(fake.now.get() - started < 2 * REQUEST_US);
    }
}

#[test]
fn requests_outside_of_the_disk_never_reach_it() {
    for fake in good() {
        let mut disk = open(&fake).unwrap();
        let (end, before) = (disk.blocks(), commands(&fake).len());
        assert_eq!(disk.write(Lba(end), &[0; 512]), Err(BlockError::Range));
        assert_eq!(disk.write(Lba(u64::MAX), &[0; 512]), Err(BlockError::Range));
        assert_eq!(commands(&fake).len(), before);
        assert_eq!(disk.write(Lba(end - 1), &[7; 512]), Ok(()));
    }
}

#[test]
fn host_without_a_request_queue_is_refused() {
    let fake = fake_scsi(Bus::Direct, Temper::Good, FakeHost::new(Vec::new()));
    fake.device.borrow_mut().scsi = None;
    assert_eq!(Queue::new(fake.pool(1 << 20), &fake, REQUESTS).err(), Some(OpenError::Queue));
}
