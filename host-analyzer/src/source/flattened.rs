//! Flattened dumps: makedumpfile -F writes them into a pipe, QEMU's dump-guest-memory with `-z`, `-l` and
//! `-s` into a file.
//!
//! A header of 4096 bytes, then records: where the following bytes belong, and how many they are (big-endian).
//! A record of -1 and -1 is the last (makedumpfile 1.7.2, makedumpfile.h: struct makedumpfile_header, struct
//! makedumpfile_data_header; QEMU 7.2, include/sysemu/dump.h). The dump inside is any that could be a file.

use rangemap::RangeMap;

use crate::bytes;

const SIGNATURE: &[u8; 16] = b"makedumpfile\0\0\0\0";

/// Size of the header and of a record's.
const HEADER: usize = 4096;
const RECORD: usize = 16;

/// TYPE_FLAT_HEADER and VERSION_FLAT_HEADER.
const KIND: u64 = 1;
const VERSION: u64 = 1;

/// The records of a flattened dump.
pub(super) struct Records {
    /// Where bytes of the dump lie in the file: the distance between both, modulo 2^64. What was
    /// written later counts.
    places: RangeMap<u64, u64>,
    end: u64,
    is_whole: bool,
}

impl Records {
    /// Whether `file` is a flattened one.
    pub fn are_in(file: &[u8]) -> bool {
        file.starts_with(SIGNATURE)
    }

    /// Walks the records of `file`.
    ///
    /// # Errors
    /// A sentence that says what else it is.
    pub fn parse(file: &[u8]) -> Result<Records, String> {
        let word = |at: usize| bytes::array(file, at).map(u64::from_be_bytes);
        if (word(16), word(24)) != (Some(KIND), Some(VERSION)) {
            return Err("a flattened file of a type or version that nobody writes".to_owned());
        }
        let mut records = Records { places: RangeMap::new(), end: 0, is_whole: false };
        let mut at = HEADER;
        while let (Some(start), Some(size)) = (word(at), word(at.saturating_add(8))) {
            if (start, size) == (u64::MAX, u64::MAX) {
                records.is_whole = true;
                break;
            }
            let from = at + RECORD;
            let there = size.min((file.len() - from) as u64);
            let Some(end) = start.checked_add(there).filter(|&end| end <= i64::MAX as u64) else {
                // No file is that long: these are not records any more.
                break;
            };
            if there != 0 {
                records.places.insert(start..end, (from as u64).wrapping_sub(start));
                records.end = records.end.max(end);
            }
            if there < size {
                break;
            }
            at = from + there as usize;
        }
        match records.end {
            0 => Err("a flattened file that ends before the dump in it begins".to_owned()),
            _ => Ok(records),
        }
    }

    /// Where the dump ends, by the records.
    pub fn end(&self) -> u64 {
        self.end
    }

    /// Where in the file the byte of the dump at `at` lies, and how many that follow it lie behind it.
    pub fn find(&self, at: u64) -> Option<(u64, u64)> {
        let (range, distance) = self.places.get_key_value(&at)?;
        Some((at.wrapping_add(*distance), range.end - at))
    }

    /// How far it is from `at` to the next byte that was written, if there is one.
    pub fn until_next(&self, at: u64) -> Option<u64> {
        let next = self.places.overlapping(at..u64::MAX).next()?;
        Some(next.0.start.saturating_sub(at))
    }

    /// Says that the end is missing, when it is.
    pub fn problem(&self) -> Option<String> {
        let why = "the flattened file has no end mark: it is cut off, or still being written";
        (!self.is_whole).then(|| why.to_owned())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::PhysAddr;
    use crate::source::content::Content;
    use crate::source::{Completeness, Dump, Memory};
    use crate::testing::{Segment, elf_core, flattened};

    #[test]
    fn records_in_any_order_are_put_in_order() {
        let file = flattened(&[(4, b"efgh"), (0, b"abcd"), (10, b"kl"), (2, b"C")]);
        let records = Records::parse(&file).unwrap();
        let content = Content::flattened(&file, &records);
        assert_eq!(content.len(), 12);
        assert_eq!(&content.read(0, 12).unwrap()[..], b"abCdefgh\0\0kl");
        assert_eq!(content.run(3, 99), Some(&b"d"[..]), "what follows lies elsewhere");
        assert_eq!(content.run(8, 1), None, "memory is never made of what nobody wrote");
        assert_eq!(content.read(0, 13), None);
        assert_eq!(records.problem(), None);
    }

    #[test]
    fn file_that_ends_early_has_what_it_has_and_says_so() {
        let mut file = flattened(&[(0, b"abcd"), (4, b"efgh")]);
        file.truncate(file.len() - 16 - 1);
        let records = Records::parse(&file).unwrap();
        assert_eq!(&Content::flattened(&file, &records).read_up_to(0, 100)[..], b"abcdefg");
        assert!(records.problem().unwrap().contains("no end mark"));
    }

    #[test]
    fn elf_core_may_be_flattened() {
        let core = elf_core(0, false, &[Segment::note(b""), Segment::load(0x1000, &[7; 4096])]);
        let (head, rest) = core.split_at(1000);
        let file = flattened(&[(1000, rest), (0, &head[..64]), (64, &head[64..])]);
        let dump = Dump::from_bytes(file.clone()).unwrap();
        assert_eq!(dump.completeness(), Completeness::Complete);
        assert_eq!(*dump.run(PhysAddr(0x1000), 9999).unwrap(), [7; 4096]);

        let cut = Dump::from_bytes(file[..file.len() - 16].to_vec()).unwrap();
        let Completeness::Incomplete(why) = cut.completeness() else { panic!("no end mark") };
        assert!(why.contains("no end mark"), "{why}");
    }

    #[test]
    fn other_versions_and_files_without_records_are_refused() {
        let mut file = flattened(&[]);
        assert!(Records::parse(&file).err().unwrap().contains("ends before"));
        file[31] = 2;
        assert!(Records::are_in(&file));
        assert!(Records::parse(&file).err().unwrap().contains("version"));
    }

    proptest! {
        #[test]
        fn later_records_count_where_they_overlap(
            parts in prop::collection::vec((0u64..40, prop::collection::vec(1u8.., 0..20)), 0..12)
        ) {
            let mut expected = Vec::new();
            for (at, part) in parts.iter().filter(|(_, part)| !part.is_empty()) {
                let (start, end) = (*at as usize, *at as usize + part.len());
                expected.resize(expected.len().max(end), 0);
                expected[start..end].copy_from_slice(part);
            }
            let parts: Vec<(u64, &[u8])> = parts.iter().map(|(at, part)| (*at, &part[..])).collect();
            let file = flattened(&parts);
            prop_assume!(!expected.is_empty());
            let records = Records::parse(&file).unwrap();
            let content = Content::flattened(&file, &records);
            prop_assert_eq!(&content.read_up_to(0, u64::MAX)[..], &expected[..]);
        }

        #[test]
        fn foreign_records_never_panic(start: u64, size: u64, at: u64, cut in 0usize..40) {
            let mut file = flattened(&[(start, b"abcd"), (at, b"efgh")]);
            file[4096 + 8..4096 + 16].copy_from_slice(&size.to_be_bytes());
            file.truncate(file.len() - cut);
            if let Ok(records) = Records::parse(&file) {
                let content = Content::flattened(&file, &records);
                let _ = (content.run(at, 9), content.read(at, 9), content.read(start, 1 << 40));
            }
        }
    }
}
