//! The driver against a device made of memory, behind every kind of bus.

use std::vec::Vec;

use super::*;
use crate::serial::SerialPort;
use crate::virtio::fake::{AnyTransport, BUSES, Fake, Temper, fake_console};

/// What the payload has.
const POOL: usize = 28 << 10;

fn fakes(temper: Temper) -> impl Iterator<Item = Fake> {
    BUSES.into_iter().map(move |bus| fake_console(bus, temper))
}

fn open(fake: &Fake) -> SerialPort<VirtioConsole<'_, AnyTransport>> {
    let console = VirtioConsole::open(fake.transport(), fake.pool(POOL), fake).unwrap();
    SerialPort::open(fake, console, Some(115_200))
}

fn heard(port: &mut SerialPort<VirtioConsole<'_, AnyTransport>>) -> Vec<u8> {
    core::iter::from_fn(|| port.receive()).collect()
}

/// More than all buffers hold, and not a multiple of one.
fn long_text() -> Vec<u8> {
    (0..70_001).map(|index| (index * 31 + index / 512) as u8).collect()
}

#[test]
fn everything_is_sent_in_order_and_more_than_one_buffer_is_under_way() {
    for fake in fakes(Temper::Good).chain(fakes(Temper::Slow)) {
        let mut port = open(&fake);
        let text = long_text();
        assert!(port.send(&fake, b"tinykdump: the first line\r\n"));
        assert!(port.send(&fake, &text));
        port.drain(&fake);
        let device = fake.device.borrow();
        assert_eq!(device.sent[..27], *b"tinykdump: the first line\r\n");
        assert_eq!(device.sent[27..], text);
        if device.temper == Temper::Slow {
            assert_eq!(device.most_waiting, OUTPUTS);
        }
    }
}

#[test]
fn everything_that_arrives_is_heard_and_buffers_are_used_again() {
    for fake in fakes(Temper::Good) {
        let mut port = open(&fake);
        let text = long_text();
        let (mut rest, mut all) = (&text[..], Vec::new());
        while !rest.is_empty() {
            let brought = fake.device.borrow_mut().bring(rest, None);
            assert!(brought > 0, "no buffer for what arrives");
            rest = &rest[brought..];
            all.extend(heard(&mut port));
        }
        assert_eq!(all, text);
    }
}

#[test]
fn what_arrives_while_something_is_sent_is_kept() {
    for fake in fakes(Temper::Slow) {
        let mut port = open(&fake);
        fake.device.borrow_mut().bring(b"ans", None);
        fake.device.borrow_mut().bring(b"", None);
        fake.device.borrow_mut().bring(b"wer", None);
        assert!(port.send(&fake, &long_text()));
        assert_eq!(heard(&mut port), b"answer");
    }
}

#[test]
fn device_that_stops_taking_buffers_costs_its_deadline_once() {
    for fake in fakes(Temper::SilentAfter(3)) {
        let mut port = open(&fake);
        let started = fake.now.get();
        assert!(!port.send(&fake, &long_text()));
        let first = fake.now.get() - started;
        assert!((TAKE_US..2 * TAKE_US).contains(&first), "{first}");
        assert!(!port.send(&fake, b"nobody"));
        port.drain(&fake);
        assert!(fake.now.get() - started < first + 100_000);
    }
}

#[test]
fn lies_are_noticed_and_not_waited_for() {
    for fake in fakes(Temper::Lying) {
        let mut port = open(&fake);
        let started = fake.now.get();
        assert!(!port.send(&fake, &long_text()));
        assert!(fake.now.get() - started < 1_000_000);
    }
}

#[test]
fn more_bytes_than_the_buffer_holds_are_not_believed() {
    for written in [257, 4096, u32::MAX] {
        for fake in fakes(Temper::Good) {
            let mut port = open(&fake);
            fake.device.borrow_mut().bring(b"much", Some(written));
            assert_eq!(heard(&mut port), b"");
            assert!(!port.send(&fake, b"nobody"));
        }
    }
}

#[test]
fn device_memory_comes_back_when_the_driver_is_dropped() {
    for fake in fakes(Temper::Good) {
        let pool = fake.pool(POOL);
        for _ in 0..2 {
            drop(VirtioConsole::open(fake.transport(), pool, &fake).unwrap());
            assert_eq!(pool.used(), 0);
            assert_eq!(fake.device.borrow().status, 0);
        }
    }
}

#[test]
fn device_that_is_gone_does_not_reset() {
    for fake in fakes(Temper::Gone) {
        let result = VirtioConsole::open(fake.transport(), fake.pool(POOL), &fake);
        assert_eq!(result.err(), Some(OpenError::Reset));
        assert!(fake.now.get() < 2_000_000);
    }
}

#[test]
fn device_with_a_single_queue_is_refused() {
    for bus in BUSES {
        let fake = crate::virtio::fake::fake(bus, Temper::Good);
        let result = VirtioConsole::open(fake.transport(), fake.pool(POOL), &fake);
        assert_eq!(result.err(), Some(OpenError::Queue));
    }
}
