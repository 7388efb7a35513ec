//! Stories about `docs/format.md`: what it says is what the code writes.

use std::collections::BTreeMap;
use std::fs;

use format::area::{Layout, Reason, State, Trailer};
use format::crc32;
use format::handoff::{self, Extent, ExtentMark};
use format::record::{LISTED, Range, Record};
use zerocopy::IntoBytes;

/// The rows of the table after the comment `<!-- table: NAME -->`: offset, size, field.
fn table(name: &str) -> Vec<(usize, usize, String)> {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/format.md");
    let document = fs::read_to_string(path).unwrap();
    let comment = format!("<!-- table: {name} -->");
    let (_, after) = document.split_once(&comment).expect("the table is in the document");
    let rows = after.trim_start().lines().take_while(|line| line.starts_with('|')).skip(2);
    rows.map(|row| {
        let cells: Vec<_> = row.split('|').map(str::trim).collect();
        (cells[1].parse().unwrap(), cells[2].parse().unwrap(), cells[3].to_string())
    })
    .collect()
}

/// Compares `bytes` with the table `name`: each of `fields` where it says, nothing left out.
fn assert_lies_as_documented(name: &str, bytes: &[u8], mut fields: BTreeMap<&str, Vec<u8>>) {
    let mut end = 0;
    for (offset, size, field) in table(name) {
        assert_eq!(offset, end, "{name}: a gap or an overlap before {field}");
        let expected = fields.remove(&*field).unwrap_or_else(|| panic!("{field} is unknown"));
        assert_eq!(bytes[offset..offset + size], expected, "{name}: {field}");
        end = offset + size;
    }
    assert_eq!(end, bytes.len(), "{name}: the table ends early");
    assert!(fields.is_empty(), "{name}: not in the table: {fields:?}");
}

fn word(value: u32) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

fn long(value: u64) -> Vec<u8> {
    value.to_le_bytes().to_vec()
}

#[test]
fn trailer_lies_as_the_table_says() {
    let size = 64 << 20;
    let trailer = Trailer {
        state: State::Incomplete,
        reason: Reason::DiskTimeout,
        in_file: true,
        uuid: *b"0123456789abcdef",
        area_size: size,
        sequence: 3,
        core_size: (5 << 20) + 1,
        crc_count: 6,
        crc_table_crc: 0x1111_1111,
        card_size: 7,
        card_crc: 0x2222_2222,
        later_cards: 4,
        crash_time: 1_700_000_000,
        written: 4096,
    };
    let block = trailer.to_block();
    let fields = BTreeMap::from([
        ("magic", b"TKDTRAIL".to_vec()),
        ("version", word(1)),
        ("state", word(3)),
        ("reason", word(2)),
        ("in a file", word(1)),
        ("uuid", b"0123456789abcdef".to_vec()),
        ("area size", long(size)),
        ("sequence", long(3)),
        ("core size", long((5 << 20) + 1)),
        ("table offset", long(0x3fe_f000)),
        ("table words", long(6)),
        ("table crc", word(0x1111_1111)),
        ("card size", word(7)),
        ("card crc", word(0x2222_2222)),
        ("later cards", word(4)),
        ("crash time", long(1_700_000_000)),
        ("written", long(4096)),
        ("zero", vec![0; 396]),
        ("crc", word(crc32(&block[..508]))),
        ("rest", vec![0; 3584]),
    ]);
    assert_lies_as_documented("trailer", &block, fields);
}

#[test]
fn handoff_and_marks_lie_as_the_tables_say() {
    let uuid = *b"0123456789abcdef";
    let extent = Extent { start: 0x10_0200, size: 4 << 20 };
    let file = handoff::File::new(uuid, 1 << 30, 4 << 20, 1);
    let content = [&file.to_bytes()[..], &extent.to_bytes()].concat();
    let header = handoff::header(1, &content);
    let fields = BTreeMap::from([
        ("magic", b"TKDHANDF".to_vec()),
        ("version", word(1)),
        ("files", word(1)),
        ("size", long(32 + 40 + 16)),
        ("content crc", word(crc32(&content))),
        ("crc", word(crc32(&header[..28]))),
    ]);
    assert_lies_as_documented("handoff header", &header, fields);
    let fields = BTreeMap::from([
        ("uuid", uuid.to_vec()),
        ("disk size", long(1 << 30)),
        ("area size", long(4 << 20)),
        ("extents", word(1)),
        ("reserved", word(0)),
    ]);
    assert_lies_as_documented("handoff file", &file.to_bytes(), fields);
    let fields = BTreeMap::from([("start", long(0x10_0200)), ("size", long(4 << 20))]);
    assert_lies_as_documented("handoff extent", &extent.to_bytes(), fields);

    let mark = ExtentMark { uuid, position: 4096, at: 0x10_1200 }.to_block();
    let fields = BTreeMap::from([
        ("magic", b"TKDBLOCK".to_vec()),
        ("version", word(1)),
        ("reserved", word(0)),
        ("uuid", uuid.to_vec()),
        ("position", long(4096)),
        ("place", long(0x10_1200)),
        ("crc", word(crc32(&mark[..48]))),
        ("rest", vec![0; 4044]),
    ]);
    assert_lies_as_documented("extent mark", &mark, fields);
}

#[test]
fn record_lies_as_the_table_says() {
    let record = Record {
        version: 2.into(),
        complete: 1.into(),
        payload: [b'p'; 64],
        first_block_us: 2.into(),
        last_block_us: 3.into(),
        pages_read: 4.into(),
        pages_unreadable: 5.into(),
        headers_dropped: 6.into(),
        memory_used: 7.into(),
        unreadable: [Range { start: 8.into(), size: 9.into() }; LISTED],
    };
    let fields = BTreeMap::from([
        ("version", word(2)),
        ("complete", word(1)),
        ("payload", vec![b'p'; 64]),
        ("first block", long(2)),
        ("last block", long(3)),
        ("pages read", long(4)),
        ("pages unreadable", long(5)),
        ("headers dropped", long(6)),
        ("memory used", long(7)),
        ("unreadable", [long(8), long(9)].concat().repeat(32)),
    ]);
    assert_lies_as_documented("record", record.as_bytes(), fields);
}

#[test]
fn layout_follows_the_formula() {
    for size in [4u64 << 20, (1 << 30) + 4096, 12 << 40] {
        let card = size - 65536;
        let table = (card.div_ceil(1 << 20) * 4).next_multiple_of(4096);
        let layout = Layout::new(size).unwrap();
        assert_eq!((layout.card, layout.crc_table), (card, card - table));
        assert_eq!((layout.area_size, layout.trailer), (size, size - 4096));
    }
}

#[test]
fn every_reason_is_in_the_list_of_reasons() {
    let path = concat!(env!("CARGO_MANIFEST_DIR"), "/../docs/reasons.md");
    let document = fs::read_to_string(path).unwrap();
    let rows = document.lines().filter_map(|line| {
        let mut cells = line.strip_prefix("| ")?.split(" | ");
        Some((cells.next()?.trim().parse::<u32>().ok()?, cells.next()?.trim()))
    });
    let listed: BTreeMap<_, _> = rows.collect();
    let known = Reason::ALL.into_iter().map(|reason| (reason as u32, reason.text()));
    assert_eq!(listed, known.collect());
}
