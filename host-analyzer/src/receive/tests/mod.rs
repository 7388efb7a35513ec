//! Whole dumps over lines that lose, damage, repeat and cut.

mod simulator;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

use format::BLOCK;
use format::frame::{Decoder, Extent, Kind, MAX_WIRE};
use proptest::prelude::*;

use simulator::{BLOCKS, CARD, FIRST_AT, HEAD, Payload, SECOND_AT, STREAM, core, sent};

use super::*;
use crate::PhysAddr;
use crate::source::{Completeness, Dump, Memory};

/// A directory, and the dump to be written into it.
struct Desk {
    _directory: tempfile::TempDir,
    dump: PathBuf,
}

impl Desk {
    fn new() -> Desk {
        let directory = tempfile::tempdir().unwrap();
        let dump = directory.path().join("dump.elf");
        Desk { _directory: directory, dump }
    }

    fn line(&self) -> PathBuf {
        self.dump.with_file_name("dump.elf.line")
    }

    fn open(&self) -> Session {
        Session::open(&self.dump).unwrap()
    }

    /// Receives the bytes, and nothing after them.
    fn receive(&self, bytes: &[u8]) -> Vec<Outcome> {
        let mut session = self.open();
        session.take(bytes, &mut |_| {}).unwrap();
        session.finish().unwrap()
    }
}

/// Whether the core has the physical memory of a block, and it is right.
fn has_block(dump: &Dump, whole: &[u8], block: u64) -> bool {
    let second = HEAD + 200;
    let phys = if block < second {
        FIRST_AT + (block - HEAD) * BLOCK
    } else {
        SECOND_AT + (block - second) * BLOCK
    };
    let mut at = 0;
    while at < BLOCK {
        match dump.run(PhysAddr(phys + at), (BLOCK - at) as usize) {
            Ok(bytes) => {
                let right = &whole[(block * BLOCK + at) as usize..][..bytes.len()];
                assert!(*bytes == *right, "block {block} is another one");
                at += bytes.len() as u64;
            }
            Err(_) => {
                assert_eq!(at, 0, "half of block {block}");
                return false;
            }
        }
    }
    true
}

/// The blocks of memory in a core, all of which are right.
fn blocks_in(path: &Path) -> BTreeSet<u64> {
    let (dump, whole) = (Dump::open(path).unwrap(), core(true));
    (HEAD..BLOCKS).filter(|&block| has_block(&dump, &whole, block)).collect()
}

fn memory_of(extent: Extent) -> BTreeSet<u64> {
    sent(extent).into_iter().filter(|&block| block >= HEAD).collect()
}

#[test]
fn full_dump_is_the_core_byte_for_byte() {
    let desk = Desk::new();
    let outcomes = desk.receive(&Payload::one_way(Extent::Full, STREAM).concat());
    assert!(outcomes[0].is_complete, "{}", outcomes[0]);
    assert_eq!(outcomes[0].shape, Shape::Exact);
    assert!(std::fs::read(&desk.dump).unwrap() == core(true));
    assert!(!desk.line().exists(), "nothing is left to go on with");
    assert_eq!(std::fs::read_dir(desk.dump.parent().unwrap()).unwrap().count(), 1);
}

#[test]
fn minimal_dump_has_what_was_sent_and_is_complete() {
    let desk = Desk::new();
    let outcomes = desk.receive(&Payload::one_way(Extent::Minimal, STREAM).concat());
    assert!(outcomes[0].is_complete, "{}", outcomes[0]);
    assert_eq!(outcomes[0].shape, Shape::Runs);
    assert_eq!(blocks_in(&desk.dump), memory_of(Extent::Minimal));
    let dump = Dump::open(&desk.dump).unwrap();
    assert_eq!(dump.completeness(), Completeness::Complete);
    let image = crate::VirtAddr(0xffff_ffff_8100_0000 + BLOCK);
    assert_eq!(dump.linear(image), Some(PhysAddr(FIRST_AT + 51 * BLOCK)), "block 54, a task's");
    let size = std::fs::metadata(&desk.dump).unwrap().len();
    assert!(size < (memory_of(Extent::Minimal).len() as u64 + 4) * BLOCK, "{size} bytes");
}

#[test]
fn dump_can_be_read_after_every_frame_from_the_head_on() {
    let desk = Desk::new();
    let mut session = desk.open();
    let mut was_core = false;
    let mut before = BTreeSet::new();
    for (index, frame) in Payload::one_way(Extent::Full, STREAM).iter().enumerate() {
        session.take(frame, &mut |_| {}).unwrap();
        let is_core = session.update().unwrap();
        assert!(is_core || !was_core);
        was_core = is_core;
        if is_core && index > 6 && index % 7 == 0 {
            let now = blocks_in(&desk.dump);
            assert!(before.is_subset(&now));
            let dump = Dump::open(&desk.dump).unwrap();
            assert!(matches!(dump.completeness(), Completeness::Incomplete(_)));
            before = now;
        }
    }
    assert!(was_core);
}

#[test]
fn finished_dump_is_not_overwritten() {
    let desk = Desk::new();
    desk.receive(&Payload::one_way(Extent::Full, STREAM).concat());
    let error = Session::open(&desk.dump).err().unwrap().to_string();
    assert!(error.contains("never overwritten"), "{error}");
}

#[test]
fn two_receivers_do_not_write_one_dump() {
    let desk = Desk::new();
    let _first = desk.open();
    assert!(matches!(Session::open(&desk.dump), Err(ReceiveError::Busy(_))));
}

#[test]
fn second_crash_goes_to_a_second_dump() {
    let desk = Desk::new();
    let first = Payload::one_way(Extent::Full, STREAM);
    let second = Payload::one_way(Extent::Full, STREAM + 1);
    let mut log = first[..first.len() / 3].concat();
    log.extend(second.concat());
    let outcomes = desk.receive(&log);
    assert_eq!(outcomes.iter().map(|it| it.is_complete).collect::<Vec<_>>(), [false, true]);
    assert!(std::fs::read(desk.dump.with_file_name("dump-2.elf")).unwrap() == core(true));
    // Text before the second stream's first frame cannot be told from the first one's.
    let kept = [first[..first.len() / 3].concat(), second[0].clone()].concat();
    assert!(std::fs::read(desk.line()).unwrap() == kept);

    // The first one can still be gone on with.
    let outcomes = desk.receive(&first[first.len() / 3..].concat());
    assert!(outcomes[0].is_complete, "{}", outcomes[0]);
    assert!(std::fs::read(&desk.dump).unwrap() == core(true));
}

#[test]
fn stream_without_its_head_is_no_dump_and_is_kept() {
    let desk = Desk::new();
    let frames = Payload::one_way(Extent::Full, STREAM);
    let outcomes = desk.receive(&frames[10..40].concat());
    assert_eq!(outcomes[0].shape, Shape::None);
    assert!(outcomes[0].to_string().contains("not the head"), "{}", outcomes[0]);
    assert!(!desk.dump.exists() && desk.line().exists());
}

#[test]
fn card_is_in_a_log_of_the_line() {
    let log = Payload::one_way(Extent::Minimal, STREAM).concat();
    assert_eq!(card_of_log(&log).as_deref(), Some(CARD));
}

#[test]
fn nothing_is_said_to_a_machine_that_lives() {
    let desk = Desk::new();
    let mut session = desk.open();
    session.take(b"login: ", &mut |_| {}).unwrap();
    assert_eq!(session.speak(10_000), None);
    session.take(&Payload::one_way(Extent::Full, STREAM)[1], &mut |_| {}).unwrap();
    assert!(session.speak(10_100).is_some());
}

#[test]
fn socket_that_answers_ends_exact() {
    use std::io::{ErrorKind, Read, Write};
    let desk = Desk::new();
    let socket = desk.dump.with_file_name("line");
    let listener = std::os::unix::net::UnixListener::bind(&socket).unwrap();
    let payload = std::thread::spawn(move || {
        let (mut line, _) = listener.accept().unwrap();
        line.set_read_timeout(Some(std::time::Duration::from_millis(50))).unwrap();
        let mut payload = Payload::new(Extent::Full, STREAM);
        payload.send();
        let (mut sent, mut bytes) = (0, [0; 2048]);
        while !payload.is_done {
            for frame in std::mem::take(&mut payload.wire) {
                sent += 1;
                if sent % 5 != 0 {
                    line.write_all(&frame).unwrap();
                }
            }
            match line.read(&mut bytes) {
                Ok(0) => break,
                Ok(size) => payload.hear(&bytes[..size]),
                Err(error) if error.kind() == ErrorKind::WouldBlock => payload.end(),
                Err(error) => panic!("{error}"),
            }
        }
        payload.is_done
    });
    let options = crate::commands::receive::Options {
        source: format!("unix:{}", socket.display()).parse().unwrap(),
        output: desk.dump.clone(),
        baud: 115_200,
        listen: false,
    };
    let mut console = Vec::new();
    assert!(crate::commands::receive::run(&options, &mut console).unwrap());
    assert!(payload.join().unwrap(), "the payload was told that everything is there");
    assert!(std::fs::read(&desk.dump).unwrap() == core(true));
    assert!(String::from_utf8(console).unwrap().contains("tinykdump: a stage more\n"));
}

/// Blocks that a stream claims to have, far apart and many, cost no memory and no disk.
#[test]
fn hostile_sizes_are_not_believed() {
    use format::frame::{Begin, Encoding, Header, Kind, MAX_WIRE};
    use zerocopy::IntoBytes;
    let begin = |core_size: u64| Begin {
        version: 1.into(),
        machine: 62.into(),
        extent: 2,
        reserved: [0; 3],
        head_size: BLOCK.into(),
        core_size: core_size.into(),
        expected_blocks: u64::MAX.into(),
        payload: [0; 64],
    };
    let frame = |kind, encoding, count, offset, content: &[u8]| {
        let header = Header { kind, encoding, stream: 7, sequence: 0, count, offset };
        let mut wire = vec![0; MAX_WIRE];
        let size = format::frame::encode(&header, content, &mut wire).unwrap();
        wire[..size].to_vec()
    };
    let desk = Desk::new();
    let mut session = desk.open();
    for size in [!4095, 1 << 48, 1 << 47] {
        let bytes = frame(Kind::Begin, Encoding::Plain, 96, 0, begin(size).as_bytes());
        session.take(&bytes, &mut |_| {}).unwrap();
    }
    let outline = session.receiver().outline().unwrap();
    assert_eq!(outline.core_blocks, 1 << 35);
    for offset in [BLOCK, 1 << 46, (1 << 47) - BLOCK, 1 << 60] {
        let bytes = frame(Kind::Blocks, Encoding::Zeros, u32::MAX, offset, &[]);
        session.take(&bytes, &mut |_| {}).unwrap();
    }
    assert_eq!(session.receiver().present().count(), 2 * u64::from(u32::MAX));
    assert!(!session.update().unwrap());
    session.finish().unwrap();
}

/// What a line does to a frame.
#[derive(Clone, Debug)]
enum Fate {
    Arrives,
    Lost,
    Twice,
    Flipped(prop::sample::Index, u8),
    Cut(prop::sample::Index),
    Text(Vec<u8>),
}

fn fate() -> impl Strategy<Value = Fate> {
    // Text that ends with a newline, as the console's does: without a zero it is no frame.
    let text = prop::collection::vec(1u8.., 0..40);
    prop_oneof![
        6 => Just(Fate::Arrives),
        1 => Just(Fate::Lost),
        1 => Just(Fate::Twice),
        1 => (any::<prop::sample::Index>(), 0u8..8).prop_map(|(at, bit)| Fate::Flipped(at, bit)),
        1 => any::<prop::sample::Index>().prop_map(Fate::Cut),
        1 => text.prop_map(Fate::Text),
    ]
}

/// The bytes that arrive of a frame.
fn suffer(frame: &[u8], fate: &Fate) -> Vec<u8> {
    let mut bytes = frame.to_vec();
    match fate {
        Fate::Arrives => {}
        Fate::Lost => bytes.clear(),
        Fate::Twice => bytes.extend_from_slice(frame),
        Fate::Flipped(at, bit) => {
            let at = at.index(bytes.len());
            bytes[at] ^= 1 << bit;
        }
        Fate::Cut(at) => bytes.truncate(at.index(bytes.len())),
        Fate::Text(text) => {
            bytes.splice(0..0, text.iter().copied());
        }
    }
    bytes
}

#[test]
fn outline_that_was_lost_with_every_plan_is_asked_for() {
    let desk = Desk::new();
    let mut session = desk.open();
    let mut payload = Payload::new(Extent::Minimal, STREAM);
    payload.send();
    let is_begin = |frame: &[u8]| {
        let mut decoder = Box::<Decoder<MAX_WIRE>>::default();
        frame.iter().any(|&byte| match decoder.push(byte) {
            Some(format::frame::Event::Frame(header, _)) => header.kind == Kind::Begin,
            _ => false,
        })
    };
    let wire = std::mem::take(&mut payload.wire);
    for frame in wire.iter().filter(|frame| !is_begin(frame)) {
        session.take(frame, &mut |_| {}).unwrap();
    }
    let mut now = 0;
    while !payload.is_done {
        now += 500;
        assert!(now < 60_000, "{} requests", payload.requests);
        if let Some(said) = session.speak(now) {
            payload.hear(&said);
        }
        for frame in std::mem::take(&mut payload.wire) {
            session.take(&frame, &mut |_| {}).unwrap();
        }
    }
    assert!(session.finish().unwrap()[0].is_complete);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]

    #[test]
    fn line_that_answers_ends_exact(
        fates in prop::collection::vec(fate(), 50..200),
        deaf in prop::collection::vec(any::<bool>(), 8..20),
        full in any::<bool>(),
    ) {
        let extent = if full { Extent::Full } else { Extent::Minimal };
        let desk = Desk::new();
        let mut session = desk.open();
        let mut payload = Payload::new(extent, STREAM);
        payload.send();
        let mut fates = fates.iter().cycle();
        let (mut now, mut steps, mut told, mut said) = (0, 0, 0, 0);
        while !payload.is_done {
            steps += 1;
            prop_assert!(steps < 20_000, "{} requests", payload.requests);
            if payload.wire.is_empty() && now >= told + 1000 {
                payload.end();
                told = now;
            }
            if !payload.wire.is_empty() {
                let frame = payload.wire.remove(0);
                session.take(&suffer(&frame, fates.next().unwrap()), &mut |_| {}).unwrap();
            }
            now += 50;
            if let Some(bytes) = session.speak(now) {
                said += 1;
                // Of what the receiver says, some is lost as well.
                if !deaf[said % deaf.len()] || said % 3 == 0 {
                    payload.hear(&bytes);
                }
            }
        }
        let outcomes = session.finish().unwrap();
        prop_assert!(outcomes[0].is_complete, "{}", outcomes[0]);
        if full {
            prop_assert!(std::fs::read(&desk.dump).unwrap() == core(true));
        } else {
            prop_assert_eq!(blocks_in(&desk.dump), memory_of(extent));
        }
    }

    #[test]
    fn line_that_does_not_answer_lacks_exactly_what_was_lost(
        fates in prop::collection::vec(fate(), 50..200),
    ) {
        let desk = Desk::new();
        let frames = Payload::one_way(Extent::Full, STREAM);
        // The frames up to the first blocks of memory arrive, so that there is a core.
        let (clean, rest) = frames.split_at(5);
        let mut bytes = clean.concat();
        for (frame, fate) in rest.iter().zip(fates.iter().cycle()) {
            bytes.extend(suffer(frame, fate));
        }
        // What arrived, by a decoder alone.
        let mut arrived: BTreeSet<u64> = BTreeSet::new();
        let mut decoder = Box::new(format::frame::Decoder::<{ format::frame::MAX_WIRE }>::new());
        let mut ended = false;
        for &byte in &bytes {
            if let Some(format::frame::Event::Frame(header, _)) = decoder.push(byte) {
                match header.kind {
                    format::frame::Kind::Blocks => {
                        let first = header.offset / BLOCK;
                        arrived.extend(first..first + u64::from(header.count));
                    }
                    format::frame::Kind::End => ended = true,
                    _ => {}
                }
            }
        }
        let outcome = desk.receive(&bytes).remove(0);
        let memory: BTreeSet<u64> = arrived.iter().copied().filter(|&it| it >= HEAD).collect();
        prop_assert_eq!(blocks_in(&desk.dump), memory);
        prop_assert_eq!(outcome.blocks, arrived.len() as u64);
        prop_assert_eq!(outcome.ended.is_some(), ended);
        let lost = BLOCKS - arrived.len() as u64;
        if lost > 0 {
            prop_assert!(!outcome.is_complete);
            prop_assert!(!outcome.ranges.is_empty());
        }
        let completeness = Dump::open(&desk.dump).unwrap().completeness();
        prop_assert_eq!(completeness == Completeness::Complete, outcome.is_complete);
        prop_assert_eq!(desk.line().exists(), !outcome.is_complete);
    }

    #[test]
    fn receiver_that_is_killed_goes_on_where_it_was(
        at in any::<prop::sample::Index>(), cut in any::<prop::sample::Index>(),
    ) {
        let desk = Desk::new();
        let bytes = Payload::one_way(Extent::Full, STREAM).concat();
        let (first, second) = bytes.split_at(at.index(bytes.len()));
        let mut session = desk.open();
        let updated = cut.index(first.len() + 1);
        session.take(&first[..updated], &mut |_| {}).unwrap();
        session.update().unwrap();
        session.take(&first[updated..], &mut |_| {}).unwrap();
        // Killed: nothing is finished.
        drop(session);
        let outcome = desk.receive(second).remove(0);
        // A frame that was cut in two is whole again: the decoder saw all of its bytes.
        prop_assert!(outcome.is_complete, "{}", outcome);
        prop_assert!(std::fs::read(&desk.dump).unwrap() == core(true));
    }

    #[test]
    fn foreign_bytes_are_survived(bytes in prop::collection::vec(any::<u8>(), 0..4000)) {
        let desk = Desk::new();
        let outcomes = desk.receive(&bytes);
        prop_assert_eq!(outcomes[0].shape, Shape::None);
        let _ = card_of_log(&bytes);
    }
}
