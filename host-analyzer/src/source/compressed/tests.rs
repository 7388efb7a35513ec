//! Small kdump-compressed files, and what is read from them.

use proptest::prelude::*;

use crate::source::{Completeness, Dump, Memory};
use crate::testing::{flattened, note};
use crate::{Error, PhysAddr, ReadError};

use super::codec::tests::{ALL, pack};

const PAGE: usize = 4096;

/// A file of a machine with 64 pages of memory, all but the first of them known.
struct Made {
    version: u32,
    level: u32,
    status: u32,
    /// The pages that are dumped, and how they are packed.
    pages: Vec<(u64, u32)>,
    /// Of several files, the pages that this one has.
    part: Option<(u64, u64)>,
    registers: usize,
}

impl Default for Made {
    fn default() -> Made {
        let pages = vec![(1, 0), (2, 1), (3, 2), (9, 4), (10, 0x20), (63, 0)];
        Made { version: 6, level: 31, status: 0, pages, part: None, registers: 27 }
    }
}

/// What a page holds: its number, often.
fn page(number: u64) -> Vec<u8> {
    (0..PAGE).map(|at| number as u8 ^ (at >> 8) as u8).collect()
}

fn put(file: &mut Vec<u8>, at: usize, bytes: &[u8]) {
    file.resize(file.len().max(at + bytes.len()), 0);
    file[at..at + bytes.len()].copy_from_slice(bytes);
}

impl Made {
    /// Blocks: header, sub header, notes, two of bitmaps, descriptors, pages.
    fn bytes(&self) -> Vec<u8> {
        let mut file = b"KDUMP   ".to_vec();
        let words = [(8, self.version), (424, self.status), (428, PAGE as u32), (432, 2), (436, 2)];
        words.iter().for_each(|(at, word)| put(&mut file, *at, &word.to_le_bytes()));
        put(&mut file, 440, &64u32.to_le_bytes());
        put(&mut file, 12 + 4 * 65, b"x86_64");
        self.put_sub_header(&mut file);
        put(&mut file, 3 * PAGE, &[0xfe, 255, 255, 255, 255, 255, 255, 255]);
        let mut bits = [0u8; 8];
        self.pages.iter().for_each(|(number, _)| bits[*number as usize / 8] |= 1 << (number % 8));
        put(&mut file, 4 * PAGE, &bits);
        let is_here =
            |number: u64| self.part.is_none_or(|(start, end)| (start..end).contains(&number));
        let here: Vec<_> = self.pages.iter().filter(|(number, _)| is_here(*number)).collect();
        put(&mut file, 6 * PAGE, &[]);
        for (index, (number, flags)) in here.into_iter().enumerate() {
            let (packed, at) = (pack(*flags, &page(*number)), file.len().max(6 * PAGE));
            let descriptor = 5 * PAGE + 24 * index;
            put(&mut file, descriptor, &(at as u64).to_le_bytes());
            put(&mut file, descriptor + 8, &(packed.len() as u32).to_le_bytes());
            put(&mut file, descriptor + 12, &flags.to_le_bytes());
            put(&mut file, at, &packed);
        }
        file
    }

    fn put_sub_header(&self, file: &mut Vec<u8>) {
        let info = note(b"VMCOREINFO", 0, b"OSRELEASE=6.1\n");
        let notes = [note(b"CORE", 1, &vec![0; 112 + 8 * (self.registers + 1)]), info].concat();
        put(file, 2 * PAGE, &notes);
        let text = 2 * PAGE + notes.len() - 16;
        let split = u64::from(self.part.is_some()) << 32;
        let (start, end) = self.part.unwrap_or_default();
        let words = [
            (8, u64::from(self.level) | split),
            (32, text as u64),
            (40, 14),
            (48, 2 * PAGE as u64),
            (56, notes.len() as u64),
            (80, start),
            (88, end),
            (96, 64),
        ];
        words.iter().for_each(|(at, word)| put(file, PAGE + at, &word.to_le_bytes()));
    }

    fn dump(&self) -> Dump {
        Dump::from_bytes(self.bytes()).unwrap()
    }
}

fn read(dump: &Dump, at: u64, max: usize) -> Result<Vec<u8>, ReadError> {
    dump.run(PhysAddr(at), max).map(std::borrow::Cow::into_owned)
}

fn whole(dump: &Dump, number: u64) -> Result<Vec<u8>, ReadError> {
    read(dump, number * PAGE as u64, PAGE)
}

fn reason(dump: &Dump) -> String {
    match dump.completeness() {
        Completeness::Incomplete(why) => why,
        Completeness::Complete => String::new(),
    }
}

#[test]
fn pages_are_found_by_their_bits_and_unpacked_by_their_flags() {
    let dump = Made::default().dump();
    for (number, _) in Made::default().pages {
        assert_eq!(whole(&dump, number).unwrap(), page(number), "page {number}");
    }
    let across = [vec![1 ^ 15; 2], vec![2; 98]].concat();
    assert_eq!(read(&dump, 0x1ffe, 100), Ok(across), "memory that is together is read together");
    assert_eq!(read(&dump, 0x3ffe, 100), Ok(vec![3 ^ 15; 2]));
    assert_eq!(dump.ranges(), [0x1000..0x4000, 0x9000..0xb000, 0x3f000..0x40000]);
    assert_eq!(reason(&dump), "");
    assert_eq!(dump.machine(), 62);
    assert_eq!(dump.notes().prstatus.len(), 1);
    assert_eq!(dump.notes().vmcoreinfo, Some(&b"OSRELEASE=6.1\n"[..]));
}

#[test]
fn memory_that_was_left_out_is_told_from_memory_that_never_was() {
    let dump = Made::default().dump();
    assert_eq!(whole(&dump, 4), Err(ReadError::LeftOut(PhysAddr(0x4000))));
    assert_eq!(whole(&dump, 0), Err(ReadError::NotInDump(PhysAddr(0))));
    assert_eq!(whole(&dump, 64), Err(ReadError::NotInDump(PhysAddr(0x40000))));
    assert_eq!(whole(&dump, u64::MAX >> 12), Err(ReadError::NotInDump(PhysAddr(!0xfff))));
}

#[test]
fn where_only_zeros_were_left_out_what_was_left_out_is_zeros() {
    let dump = Made { level: 1, ..Made::default() }.dump();
    assert_eq!(whole(&dump, 4), Ok(vec![0; PAGE]));
    assert!(whole(&dump, 0).is_err(), "there was no such memory");
    let part = Made { level: 1, part: Some((3, 20)), ..Made::default() }.dump();
    assert_eq!(whole(&part, 2), Err(ReadError::NotInDump(PhysAddr(0x2000))), "in another file");
    let unfinished = Made { level: 1, status: 8, ..Made::default() }.dump();
    assert_eq!(whole(&unfinished, 4), Err(ReadError::LeftOut(PhysAddr(0x4000))));
    // The bitmap's last bytes were never written.
    let file = Made { level: 1, ..Made::default() }.bytes();
    let (head, rest) = (&file[..4 * PAGE + 5], &file[5 * PAGE..]);
    let cut = Dump::from_bytes(flattened(&[(0, head), (5 * PAGE as u64, rest)])).unwrap();
    assert_eq!(whole(&cut, 39), Ok(vec![0; PAGE]));
    assert_eq!(whole(&cut, 40), Err(ReadError::NotInDump(PhysAddr(0x28000))));
}

#[test]
fn machine_is_told_by_the_registers_because_qemu_calls_every_machine_x86_64() {
    assert_eq!(Made { registers: 34, ..Made::default() }.dump().machine(), 183);
    assert_eq!(Made { registers: 3, ..Made::default() }.dump().machine(), 62);
    let mut other = Made { registers: 3, ..Made::default() }.bytes();
    put(&mut other, 12 + 4 * 65, b"ppc64\0");
    assert!(matches!(Dump::from_bytes(other), Err(Error::NotADump { .. })));
}

#[test]
fn fields_that_a_version_does_not_have_are_not_read() {
    let third = Made { version: 3, ..Made::default() }.dump();
    assert!(third.notes().prstatus.is_empty(), "notes came with version 4");
    assert_eq!(third.notes().vmcoreinfo, Some(&b"OSRELEASE=6.1\n"[..]));
    let first = Made { version: 1, ..Made::default() }.dump();
    assert_eq!(first.notes().vmcoreinfo, None);
    assert_eq!(whole(&first, 63).unwrap(), page(63));
    assert!(Dump::from_bytes(Made { version: 6 << 24, ..Made::default() }.bytes()).is_err());
}

#[test]
fn file_cut_short_gives_the_pages_before_the_cut_and_counts_the_others() {
    let mut file = Made::default().bytes();
    file.truncate(file.len() - 1);
    let dump = Dump::from_bytes(file.clone()).unwrap();
    assert_eq!(reason(&dump), "1 of 6 pages are cut off or were never written");
    assert_eq!(whole(&dump, 10).unwrap(), page(10));
    assert_eq!(whole(&dump, 63), Err(ReadError::NotInDump(PhysAddr(0x3f000))));
    assert_eq!(dump.ranges(), [0x1000..0x4000, 0x9000..0xb000]);
    file.truncate(5 * PAGE + 24);
    let dump = Dump::from_bytes(file).unwrap();
    assert_eq!(reason(&dump), "6 of 6 pages are cut off or were never written");
    assert!(dump.ranges().is_empty());
}

#[test]
fn incomplete_dump_says_so_and_its_unwritten_pages_are_missing() {
    let mut file = Made { status: 8, ..Made::default() }.bytes();
    file[5 * PAGE + 24 * 4..5 * PAGE + 24 * 6].fill(0);
    let dump = Dump::from_bytes(file).unwrap();
    assert_eq!(
        reason(&dump),
        "whoever wrote it marked it so (status in the header), 2 of 6 pages are cut off or were never \
         written"
    );
    assert!(whole(&dump, 63).is_err() && whole(&dump, 10).is_err());
    assert_eq!(whole(&dump, 9).unwrap(), page(9));
}

#[test]
fn one_of_several_files_has_its_own_pages_and_says_so() {
    let dump = Made { part: Some((3, 20)), ..Made::default() }.dump();
    assert!(reason(&dump).ends_with("3 pages are in the others"), "{}", reason(&dump));
    for number in [3, 9, 10] {
        assert_eq!(whole(&dump, number).unwrap(), page(number));
    }
    assert!(whole(&dump, 2).is_err() && whole(&dump, 63).is_err());
    assert_eq!(dump.ranges(), [0x3000..0x4000, 0x9000..0xb000]);
    // Of a small machine makedumpfile puts all into one of them.
    assert_eq!(reason(&Made { part: Some((0, 64)), ..Made::default() }.dump()), "");
    assert!(Dump::from_bytes(Made { part: Some((64, 64)), ..Made::default() }.bytes()).is_err());
}

#[test]
fn page_that_cannot_be_unpacked_is_damaged_and_not_zeros() {
    let mut file = Made { pages: vec![(1, 1), (2, 1)], ..Made::default() }.bytes();
    file[6 * PAGE + 20] ^= 0xff;
    let dump = Dump::from_bytes(file).unwrap();
    assert_eq!(whole(&dump, 1), Err(ReadError::Damaged(PhysAddr(0x1000))));
    assert_eq!(whole(&dump, 2).unwrap(), page(2));
}

#[test]
fn pages_of_zeros_may_share_their_bytes() {
    // QEMU and makedumpfile write the first of them only; here the last two pages are as the first.
    let mut file = Made::default().bytes();
    let first = file[5 * PAGE..5 * PAGE + 24].to_vec();
    put(&mut file, 5 * PAGE + 24 * 4, &first);
    put(&mut file, 5 * PAGE + 24 * 5, &first);
    let dump = Dump::from_bytes(file.clone()).unwrap();
    assert_eq!((reason(&dump), whole(&dump, 63)), (String::new(), Ok(page(1))));
    file.truncate(6 * PAGE + PAGE + 10);
    assert!(reason(&Dump::from_bytes(file).unwrap()).starts_with("3 of 6 pages"));
}

#[test]
fn flattened_file_is_read_like_the_file_it_becomes() {
    let file = Made::default().bytes();
    // Pages before the headers, as nobody writes them, and headers twice.
    let (head, rest) = file.split_at(6 * PAGE + 100);
    let parts = [(6 * PAGE as u64 + 100, rest), (0, &[1; 500][..]), (0, head)];
    let dump = Dump::from_bytes(flattened(&parts)).unwrap();
    for (number, _) in Made::default().pages {
        assert_eq!(whole(&dump, number).unwrap(), page(number), "page {number}");
    }
    assert_eq!(reason(&dump), "");
    let mut cut = flattened(&[(0, &file)]);
    cut.truncate(cut.len() - 17);
    let dump = Dump::from_bytes(cut).unwrap();
    assert!(reason(&dump).contains("no end mark"), "{}", reason(&dump));
    assert!(reason(&dump).contains("1 of 6 pages"), "{}", reason(&dump));
}

#[test]
fn thousands_of_pages_are_found_each() {
    // More than one counter of the index stands for.
    let mut file = Made { pages: vec![(1, 0)], ..Made::default() }.bytes();
    let count = 20_000u64;
    put(&mut file, 440, &(count as u32).to_le_bytes());
    put(&mut file, PAGE + 96, &count.to_le_bytes());
    let (bits, descriptors) = (4 * PAGE, 5 * PAGE);
    let set: Vec<u64> = (0..count).filter(|it| it % 3 != 0 && it % 5000 < 4096).collect();
    file.truncate(descriptors);
    file[bits..].fill(0);
    set.iter().for_each(|it| file[bits + *it as usize / 8] |= 1 << (it % 8));
    for (index, number) in set.iter().enumerate() {
        let at = descriptors + 24 * set.len() + PAGE * index;
        put(&mut file, descriptors + 24 * index, &(at as u64).to_le_bytes());
        put(&mut file, descriptors + 24 * index + 8, &(PAGE as u32).to_le_bytes());
        put(&mut file, at, &number.to_le_bytes());
    }
    put(&mut file, descriptors + (24 + PAGE) * set.len() - 1, &[0]);
    let dump = Dump::from_bytes(file).unwrap();
    for number in 0..count {
        let found = read(&dump, number * PAGE as u64, 8).ok();
        let expected = set.binary_search(&number).ok().map(|_| number.to_le_bytes().to_vec());
        assert_eq!(found, expected, "page {number}");
    }
    let pages: u64 = dump.ranges().iter().map(|range| range.end - range.start).sum();
    assert_eq!(pages, (set.len() * PAGE) as u64);
}

proptest! {
    #[test]
    fn damaged_files_never_panic(
        changes in prop::collection::vec((0usize..6 * 4096, any::<u8>()), 0..4),
        header in prop::collection::vec((0usize..130, any::<u64>()), 0..2),
        cut in 0usize..9000,
        at: u64,
        flat: bool,
    ) {
        let mut file = Made::default().bytes();
        changes.iter().for_each(|(at, value)| file[*at] = *value);
        for (at, value) in header {
            let at = if at < 26 { 408 + 2 * at } else { PAGE + at - 26 };
            put(&mut file, at, &value.to_le_bytes());
        }
        file.truncate(file.len() - cut);
        if flat {
            file = flattened(&[(0, &file)]);
        }
        if let Ok(dump) = Dump::from_bytes(file) {
            let _ = (read(&dump, at, 64), read(&dump, at % 0x40000, 64), dump.ranges().len());
            let _ = (reason(&dump), dump.notes().prstatus.len());
        }
    }

    #[test]
    fn every_codec_may_stand_for_every_page(flags in prop::collection::vec(0usize..5, 1..60)) {
        let pages = flags.iter().zip(1..).map(|(flags, number)| (number, ALL[*flags])).collect();
        let made = Made { pages, ..Made::default() };
        let dump = made.dump();
        for (number, _) in &made.pages {
            prop_assert_eq!(whole(&dump, *number).unwrap(), page(*number));
        }
    }
}
