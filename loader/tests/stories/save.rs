//! Stories about `loader save`.

use std::fs::{self, File};
use std::os::unix::fs::MetadataExt;
use std::path::Path;

use crate::images::{
    AREA, area, area_image, core, gpt_image, loader, loader_after, patch, trailer,
};
use format::area::{HEAD, Layout, Reason, State, Trailer};
use format::crc32;
use tempfile::TempDir;

/// Names in the directory `out`; none when it was not made.
fn names(directory: &TempDir) -> Vec<String> {
    let Ok(entries) = fs::read_dir(directory.path().join("out")) else { return vec![] };
    let mut names: Vec<_> =
        entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    names.sort();
    names
}

fn saved(directory: &TempDir, name: &str) -> Vec<u8> {
    fs::read(directory.path().join("out").join(name)).unwrap()
}

/// Runs the loader, expects it to fail, to save nothing and to leave the area as it is. Returns
/// what it said.
fn fails_and_changes_nothing(directory: &TempDir, area: &Path, arguments: &[&str]) -> String {
    let before = fs::read(area).unwrap();
    let outcome = loader(directory, arguments);
    assert!(!outcome.success, "{}", outcome.stdout);
    assert_eq!(names(directory), [""; 0]);
    assert!(fs::read(area).unwrap() == before, "the area was changed");
    outcome.stderr
}

#[test]
fn dump_is_saved_sparsely_and_the_area_is_empty_afterwards() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    let outcome = loader(&directory, &["save", "area", "out"]);
    assert_eq!(outcome.stderr, "");
    assert_eq!(
        outcome.stdout,
        "Saved the dump in area as out/dump.elf: 3.0 MiB (3149824 bytes).\n\
         Every checksum was right.\n\
         The area is empty and ready for the next crash.\n\
         Look at the dump with `host-analyzer bt out/dump.elf`.\n"
    );
    assert_eq!(names(&directory), ["dump.elf"]);
    assert!(saved(&directory, "dump.elf") == core());
    let metadata = fs::metadata(directory.path().join("out/dump.elf")).unwrap();
    assert!(metadata.blocks() * 512 <= metadata.len() - (1 << 20), "the zeros take space");
    let expected = Trailer { sequence: 3, ..Trailer::empty(crate::images::UUID, AREA) };
    assert_eq!(trailer(&path), expected);

    let again = loader(&directory, &["save", "area", "out2"]);
    assert!(!again.success);
    assert!(again.stderr.contains("area is empty"), "{}", again.stderr);
}

#[test]
fn dump_in_a_partition_is_saved_from_the_disk() {
    let (directory, path) = gpt_image();
    patch(&path, 16 << 20, &area(State::Complete, Reason::None));
    let before = fs::read(&path).unwrap();
    let outcome = loader(&directory, &["save", "disk", "out"]);
    assert!(outcome.success, "{}", outcome.stderr);
    assert!(saved(&directory, "dump.elf") == core());
    let after = fs::read(&path).unwrap();
    let trailer_at = (16 << 20) + AREA as usize - 4096;
    let block = trailer_at..trailer_at + 4096;
    assert_eq!(Trailer::parse(&after[block.clone()]).unwrap().state, State::Empty);
    let head = (16 << 20)..(16 << 20) + HEAD as usize;
    assert!(after[head.clone()].iter().all(|&byte| byte == 0));
    assert!(before[..head.start] == after[..head.start]);
    assert!(before[head.end..block.start] == after[head.end..block.start]);
    assert!(before[block.end..] == after[block.end..]);
}

#[test]
fn file_that_exists_is_never_overwritten() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    fs::create_dir(directory.path().join("out")).unwrap();
    fs::write(directory.path().join("out/dump.elf"), "yesterday's").unwrap();
    let outcome = loader(&directory, &["save", "area", "out"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("out/dump.elf exists"), "{}", outcome.stderr);
    assert_eq!(saved(&directory, "dump.elf"), b"yesterday's");
    assert_eq!(names(&directory), ["dump.elf"]);
    assert_eq!(trailer(&path).state, State::Complete);
}

#[test]
fn damaged_dump_is_refused_with_the_places() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    for offset in [100_000, (1 << 20) + 5, 3 << 20] {
        patch(&path, offset, &[0xee]);
    }
    let message = fails_and_changes_nothing(&directory, &path, &["save", "area", "out"]);
    let expected = "  - MiB 0 to 1: wrong checksum\n  - MiB 3: wrong checksum\n";
    assert!(message.contains(expected), "{message}");
    assert!(message.contains("--keep-damaged"), "{message}");
}

#[test]
fn damaged_dump_is_kept_on_request_and_stays_in_the_area() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    patch(&path, 100_000, &[0xee]);
    let before = fs::read(&path).unwrap();
    let outcome = loader(&directory, &["save", "--keep-damaged", "area", "out"]);
    assert!(outcome.success, "{}", outcome.stderr);
    assert!(outcome.stdout.contains("  - MiB 0: wrong checksum\n"), "{}", outcome.stdout);
    assert_eq!(names(&directory), ["dump.damaged.elf"]);
    let mut expected = core();
    expected[100_000] = 0xee;
    assert!(saved(&directory, "dump.damaged.elf") == expected);
    assert!(fs::read(&path).unwrap() == before);
}

#[test]
fn good_dump_saved_with_keep_damaged_is_a_good_dump() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    assert!(loader(&directory, &["save", "--keep-damaged", "area", "out"]).success);
    assert_eq!(names(&directory), ["dump.elf"]);
    assert_eq!(trailer(&path).state, State::Empty);
}

#[test]
fn damaged_table_of_checksums_verifies_nothing() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    patch(&path, Layout::new(AREA).unwrap().crc_table, &[1, 2, 3]);
    let message = fails_and_changes_nothing(&directory, &path, &["save", "area", "out"]);
    assert!(message.contains("table of checksums is damaged"), "{message}");
    assert!(loader(&directory, &["save", "--keep-damaged", "area", "out"]).success);
    assert!(saved(&directory, "dump.damaged.elf") == core());
    assert_eq!(trailer(&path).state, State::Complete);
}

#[test]
fn dump_that_ended_early_is_saved_only_on_request_and_says_so_in_its_header() {
    for state in [State::Incomplete, State::Writing] {
        let (directory, path) = area_image(state, Reason::DiskError);
        let message = fails_and_changes_nothing(&directory, &path, &["save", "area", "out"]);
        assert!(message.contains("`loader save --incomplete`"), "{message}");

        let outcome = loader(&directory, &["save", "--incomplete", "area", "out"]);
        assert!(outcome.success, "{}", outcome.stderr);
        assert_eq!(names(&directory), ["dump.incomplete.elf"]);
        let mut expected = core();
        expected[48] |= 1;
        assert!(saved(&directory, "dump.incomplete.elf") == expected);
        assert_eq!(trailer(&path).state, State::Empty);
    }
}

#[test]
fn dump_that_claims_to_be_complete_without_a_size_is_not_believed() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    let lie = Trailer { core_size: 0, crc_count: 0, ..trailer(&path) };
    patch(&path, AREA - 4096, &lie.to_block());
    let message = fails_and_changes_nothing(&directory, &path, &["save", "area", "out"]);
    assert!(message.contains("not complete (its size is missing)"), "{message}");
}

#[test]
fn incomplete_dump_with_wrong_checksums_needs_both_options() {
    let (directory, path) = area_image(State::Incomplete, Reason::DiskError);
    patch(&path, 2 << 20, &[0xee]);
    let arguments = ["save", "--incomplete", "area", "out"];
    let message = fails_and_changes_nothing(&directory, &path, &arguments);
    assert!(message.contains("MiB 2: wrong checksum"), "{message}");
    let arguments = ["save", "--incomplete", "--keep-damaged", "area", "out"];
    assert!(loader(&directory, &arguments).success);
    assert_eq!(names(&directory), ["dump.damaged.elf"]);
}

#[test]
fn unfinished_dump_whose_headers_lie_is_refused() {
    for (offset, bytes) in [(0, &[0; 4][..]), (64 + 56 + 32, &[0xff; 8]), (32, &[0xff; 8])] {
        let (directory, path) = area_image(State::Writing, Reason::None);
        patch(&path, offset, bytes);
        let arguments = ["save", "--incomplete", "area", "out"];
        let message = fails_and_changes_nothing(&directory, &path, &arguments);
        assert!(message.contains("nothing in area can be saved"), "{message}");
    }
}

#[test]
fn full_disk_leaves_the_area_as_it_was_and_nothing_behind() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    let before = fs::read(&path).unwrap();
    // A limit of 2 MiB a file; without the trap the signal would end the process.
    let full = "trap '' XFSZ; ulimit -f 4096";
    let outcome = loader_after(&directory, full, &["save", "area", "out"]);
    assert!(!outcome.success);
    assert_eq!(
        outcome.stderr,
        "loader: cannot write out/.dump.elf.partial: File too large (os error 27)\n\
         Nothing was saved and the area is as it was. Try again where there is enough free space, in \
         a directory that you may write to.\n"
    );
    assert_eq!(names(&directory), [""; 0]);
    assert!(fs::read(&path).unwrap() == before);

    assert!(loader(&directory, &["save", "area", "out"]).success);
}

#[test]
fn area_that_cannot_be_marked_empty_is_an_error_but_the_dump_is_safe() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    // Enough for the file of 3 MiB, not for the trailer at 8 MiB.
    let limit = "trap '' XFSZ; ulimit -f 8192";
    let outcome = loader_after(&directory, limit, &["save", "area", "out"]);
    assert!(!outcome.success);
    assert!(outcome.stderr.contains("the dump is safe in out/dump.elf"), "{}", outcome.stderr);
    assert!(saved(&directory, "dump.elf") == core());
    assert_eq!(trailer(&path).state, State::Complete);
}

#[test]
fn remains_of_an_interrupted_save_do_not_get_into_the_dump() {
    let (directory, _) = area_image(State::Complete, Reason::None);
    fs::create_dir(directory.path().join("out")).unwrap();
    fs::write(directory.path().join("out/.dump.elf.partial"), vec![7; 4 << 20]).unwrap();
    assert!(loader(&directory, &["save", "area", "out"]).success);
    assert_eq!(names(&directory), ["dump.elf"]);
    assert!(saved(&directory, "dump.elf") == core());
}

#[test]
fn two_loaders_do_not_save_into_one_directory() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    fs::create_dir(directory.path().join("out")).unwrap();
    let other = File::open(directory.path().join("out")).unwrap();
    other.lock().unwrap();
    let message = fails_and_changes_nothing(&directory, &path, &["save", "area", "out"]);
    assert!(message.contains("another loader is saving"), "{message}");
}

#[test]
fn of_an_unfinished_dump_only_that_is_saved_which_is_there_for_certain() {
    let (directory, path) = area_image(State::Incomplete, Reason::OutOfTime);
    let before = trailer(&path);
    let cut = Trailer { core_size: 0, crc_count: 0, written: 2 << 20, ..before };
    patch(&path, AREA - 4096, &cut.to_block());
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("  written       2.0 MiB (2097152 bytes)\n"), "{text}");
    let outcome = loader(&directory, &["save", "--incomplete", "area", "out"]);
    assert!(outcome.success, "{}", outcome.stderr);
    assert!(!outcome.stdout.contains("bytes that were there before"), "{}", outcome.stdout);
    let mut expected = core();
    expected.truncate(2 << 20);
    expected[48] |= 1;
    assert!(saved(&directory, "dump.incomplete.elf") == expected);
}

#[test]
fn core_of_an_earlier_crash_is_not_saved_where_the_last_one_had_no_room() {
    let (directory, path) = area_image(State::Incomplete, Reason::NoRoom);
    let arguments = ["save", "--incomplete", "area", "out"];
    let message = fails_and_changes_nothing(&directory, &path, &arguments);
    assert!(message.contains("only the crash card"), "{message}");
}

#[test]
fn card_of_a_later_crash_is_saved_beside_the_dump() {
    let (directory, path) = area_image(State::Complete, Reason::None);
    let (layout, card) = (Layout::new(AREA).unwrap(), b"kernel   6.1.0\npanic    again\n");
    patch(&path, layout.card, card);
    let (card_size, card_crc) = (card.len() as u32, crc32(card));
    let later = Trailer { later_cards: 2, card_size, card_crc, ..trailer(&path) };
    patch(&path, layout.trailer, &later.to_block());
    let text = loader(&directory, &["show", "area"]).stdout;
    assert!(text.contains("  since then    2 crashes, the card is the last one's\n"), "{text}");

    fs::create_dir(directory.path().join("out")).unwrap();
    fs::write(directory.path().join("out/later-card.txt"), "another").unwrap();
    let refused = loader(&directory, &["save", "area", "out"]);
    assert!(!refused.success);
    assert!(refused.stderr.contains("the dump is safe in out/dump.elf"), "{}", refused.stderr);
    assert_eq!(trailer(&path), later);

    let outcome = loader(&directory, &["save", "area", "other"]);
    assert!(outcome.stdout.contains("the crash card alone: other/later-card.txt"));
    assert_eq!(fs::read(directory.path().join("other/later-card.txt")).unwrap(), card);
    assert_eq!(trailer(&path).state, State::Empty);
}
