//! The crash card that the payload left in a reserved area, as soon as it began to write: the core before
//! it may be anything. Cores have it in a note.

use std::path::Path;

use format::area::{CARD_BLOCK, Layout};

use crate::Error;

use super::{area, map};

/// What there is of a crash card.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum StoredCard {
    /// The card.
    Text(String),
    /// An area without one: nothing crashed, or a payload that writes none.
    Missing,
    /// A card whose checksum is wrong.
    Damaged,
    /// No reserved area.
    NoArea,
}

impl StoredCard {
    /// Looks for the card of the reserved area on or in `path`.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn open(path: &Path) -> Result<StoredCard, Error> {
        let map = map::map(path)?;
        Ok(StoredCard::in_disk(&map))
    }

    fn in_disk(disk: &[u8]) -> StoredCard {
        let Some(area) = area::find(disk) else { return StoredCard::NoArea };
        let block = || {
            let layout = Layout::new(area.trailer.area_size)?;
            let start = area.core.start.checked_add(usize::try_from(layout.card).ok()?)?;
            disk.get(start..start.checked_add(CARD_BLOCK as usize)?)
        };
        match block().and_then(|block| area.trailer.card(block)) {
            Some(card) => StoredCard::Text(card.to_owned()),
            None if area.trailer.card_size == 0 => StoredCard::Missing,
            None => StoredCard::Damaged,
        }
    }
}

#[cfg(test)]
mod tests {
    use format::area::{State, Trailer};

    use super::*;

    const AREA: usize = 4 << 20;
    const CARD: &[u8] = b"kernel   6.1.0\npanic    why\n";

    /// An area in which the payload wrote nothing but this card.
    fn area(card: &[u8]) -> Vec<u8> {
        let mut disk = vec![0; AREA];
        let layout = Layout::new(AREA as u64).unwrap();
        disk[layout.card as usize..][..card.len()].copy_from_slice(card);
        let (card_size, card_crc) = (card.len() as u32, format::crc32(card));
        let empty = Trailer::empty([7; 16], AREA as u64);
        let trailer = Trailer { state: State::Writing, card_size, card_crc, ..empty };
        disk[layout.trailer as usize..].copy_from_slice(&trailer.to_block());
        disk
    }

    #[test]
    fn card_is_found_although_there_is_no_core() {
        let text = String::from_utf8(CARD.to_vec()).unwrap();
        assert_eq!(StoredCard::in_disk(&area(CARD)), StoredCard::Text(text));
    }

    #[test]
    fn missing_and_damaged_cards_are_told_apart() {
        assert_eq!(StoredCard::in_disk(&area(b"")), StoredCard::Missing);
        let mut damaged = area(CARD);
        damaged[AREA - (64 << 10)] ^= 1;
        assert_eq!(StoredCard::in_disk(&damaged), StoredCard::Damaged);
        assert_eq!(StoredCard::in_disk(b"\x7fELF"), StoredCard::NoArea);
    }
}
