//! Stories about `loader show`.

use crate::images::{AREA, UUID_TEXT, area, area_image, gpt_image, image, loader, patch, trailer};
use format::area::{Layout, Reason, State, Trailer};
use format::crc32;

const COMPLETE: &str = "\
area
  state         complete
  uuid          c0ffee00-0000-4000-8000-000000000001
  size          8.0 MiB (8388608 bytes)
  largest core  7.9 MiB (8318976 bytes)
  captures      3
  core          3.0 MiB (3149824 bytes)
dump
  kernel        6.1.0-42-amd64
  crash time    2025-12-31 23:59:59 UTC
  payload       tinykdump 0.1.0
  first block   after 12.3 ms
  last block    after 1.840 s
  pages         767 read, 1 unreadable
  left out      2 impossible memory ranges
  memory used   576.0 KiB (589824 bytes)
Save the dump with `loader save area DIR`.
";

const COMPLETE_JSON: &str = r#"{
  "path": "area",
  "partition": null,
  "state": "complete",
  "reason": null,
  "uuid": "c0ffee00-0000-4000-8000-000000000001",
  "size": 8388608,
  "largest_core": 8318976,
  "sequence": 3,
  "core_size": 3149824,
  "card_size": 0,
  "later_cards": 0,
  "written": null,
  "card": null,
  "card_error": null,
  "dump": {
    "kernel_release": "6.1.0-42-amd64",
    "crash_time": 1767225599,
    "record": {
      "payload": "tinykdump 0.1.0",
      "complete": true,
      "first_block_us": 12345,
      "last_block_us": 1840000,
      "pages_read": 767,
      "pages_unreadable": 1,
      "headers_dropped": 2,
      "memory_used": 589824
    }
  },
  "dump_error": null
}
"#;

#[test]
fn complete_dump_is_described_with_kernel_time_and_record() {
    let (directory, _) = area_image(State::Complete, Reason::None);
    let outcome = loader(&directory, &["show", "area"]);
    assert_eq!(outcome.stdout, COMPLETE);
    assert!(outcome.success && outcome.stderr.is_empty());
}

#[test]
fn json_says_the_same() {
    let (directory, _) = area_image(State::Complete, Reason::None);
    assert_eq!(loader(&directory, &["show", "--json", "area"]).stdout, COMPLETE_JSON);
}

#[test]
fn empty_area_names_the_option_that_picks_it() {
    let (directory, _) = area_image(State::Empty, Reason::None);
    let expected = format!(
        "area\n  state         empty\n  uuid          {UUID_TEXT}\n  size          8.0 MiB (8388608 \
         bytes)\n  largest core  7.9 MiB (8318976 bytes)\n  captures      3\nReady for a crash \
         (capture.to=disk:uuid={UUID_TEXT}).\n"
    );
    assert_eq!(loader(&directory, &["show", "area"]).stdout, expected);
}

#[test]
fn incomplete_dump_says_why_and_how_to_save_it() {
    let (directory, _) = area_image(State::Incomplete, Reason::DiskTimeout);
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("  ended early   the disk did not answer in time\n"), "{text}");
    assert!(text.contains("`loader save --incomplete area DIR`"), "{text}");
}

/// Writes a crash card into an area in the state `writing`, as a payload does that dies soon after.
fn with_card(path: &std::path::Path, card: &[u8]) {
    let layout = Layout::new(AREA).unwrap();
    patch(path, layout.card, card);
    let (card_size, card_crc) = (card.len() as u32, crc32(card));
    let trailer = Trailer { state: State::Writing, card_size, card_crc, ..trailer(path) };
    let written = Trailer { core_size: 0, crc_count: 0, crc_table_crc: 0, ..trailer };
    patch(path, layout.trailer, &written.to_block());
}

#[test]
fn crash_card_is_shown_even_when_nothing_else_was_written() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    patch(&path, 0, &[0; 64]);
    with_card(&path, b"kernel   6.1.0\npanic    \x1b[2Jwhy\n");
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("  crash card    32 bytes\n"), "{text}");
    let shown = text.split_once("crash card\n  kernel   6.1.0\n  panic    ").expect(&text).1;
    assert!(shown.lines().next().unwrap().ends_with("[2Jwhy") && !shown.contains('\x1b'), "{text}");
    let json = loader(&directory, &["show", "--json", "area"]).stdout;
    assert!(json.contains(r#""card": "kernel   6.1.0\npanic "#), "{json}");
}

#[test]
fn damaged_crash_card_is_not_shown() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    with_card(&path, b"kernel   6.1.0\n");
    patch(&path, Layout::new(AREA).unwrap().card, b"x");
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("crash card\n  not readable  it is damaged (checksum)\n"), "{text}");
}

#[test]
fn core_of_an_earlier_crash_is_not_shown_where_the_last_one_had_no_room() {
    let (directory, path) = area_image(State::Incomplete, Reason::NoRoom);
    with_card(&path, b"kernel   6.12.0\n");
    let trailer = trailer(&path);
    let (state, reason) = (State::Incomplete, Reason::NoRoom);
    let layout = Layout::new(AREA).unwrap();
    patch(&path, layout.trailer, &Trailer { state, reason, ..trailer }.to_block());
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("crash card\n  kernel   6.12.0\n"), "{text}");
    assert!(!text.contains("6.1.0-42-amd64") && !text.contains("not readable"), "{text}");
    assert!(text.contains("the area must be larger"), "{text}");
}

#[test]
fn dump_without_readable_headers_is_still_shown() {
    let (directory, path) = area_image(State::Writing, Reason::None);
    patch(&path, 0, &[0; 64]);
    let outcome = loader(&directory, &["show", "area"]);
    assert!(outcome.success);
    let expected = "  not readable  there is no ELF core at the start of the area\n";
    assert!(outcome.stdout.contains(expected), "{}", outcome.stdout);
    assert!(outcome.stdout.contains("  state         writing\n"), "{}", outcome.stdout);
}

#[test]
fn area_in_a_partition_is_found_from_the_disk() {
    let (directory, path) = gpt_image();
    patch(&path, 16 << 20, &area(State::Complete, Reason::None));
    let outcome = loader(&directory, &["show", "disk"]);
    let partition = "disk\n  partition     2, PARTUUID 12121212-1212-1212-1212-121212121212, at byte 16777216\n";
    let expected = COMPLETE.replacen("area\n", partition, 1).replace("save area", "save disk");
    assert_eq!(outcome.stdout, expected);
}

#[test]
fn area_in_a_logical_partition_of_an_mbr_is_found_from_the_disk() {
    let (directory, path) = image("disk", 32 << 20);
    let entry = |kind: u32, first: u32, sectors: u32| {
        [0, kind, first, sectors].map(u32::to_le_bytes).concat()
    };
    for (table, entry) in
        [(0, entry(0x05, 16_384, 40_000)), (16_384 * 512, entry(0x83, 16_384, (AREA / 512) as u32))]
    {
        patch(&path, table + 446, &entry);
        patch(&path, table + 510, &[0x55, 0xaa]);
    }
    patch(&path, 16 << 20, &area(State::Complete, Reason::None));
    let outcome = loader(&directory, &["show", "disk"]);
    let partition = "disk\n  partition     5, at byte 16777216\n";
    let expected = COMPLETE.replacen("area\n", partition, 1).replace("save area", "save disk");
    assert_eq!(outcome.stdout, expected);
}

#[test]
fn backup_partition_table_serves_when_the_primary_is_broken() {
    for (offset, bytes) in [(512 + 60, &[0xff][..]), (512, &[0; 512]), (1024 + 40, &[0xff])] {
        let (directory, path) = gpt_image();
        patch(&path, 16 << 20, &area(State::Complete, Reason::None));
        patch(&path, offset, bytes);
        let outcome = loader(&directory, &["show", "disk"]);
        assert!(outcome.stdout.contains("  partition     2,"), "{}", outcome.stderr);
    }
}

#[test]
fn two_areas_on_a_disk_are_named_and_none_is_picked() {
    let (directory, path) = gpt_image();
    patch(&path, 1 << 20, &area(State::Complete, Reason::None));
    patch(&path, 16 << 20, &area(State::Empty, Reason::None));
    let outcome = loader(&directory, &["show", "disk"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("partitions 1, 2 of disk"), "{}", outcome.stderr);
}

#[test]
fn disk_without_a_mark_says_how_to_make_one() {
    let (directory, path) = image("disk", AREA);
    let outcome = loader(&directory, &["show", "disk"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("`loader reserve` makes one"), "{}", outcome.stderr);

    patch(&path, AREA - 4096, &area(State::Empty, Reason::None)[AREA as usize - 4096..]);
    patch(&path, AREA - 2000, &[1]);
    let outcome = loader(&directory, &["show", "disk"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("damaged (checksum)"), "{}", outcome.stderr);
}
