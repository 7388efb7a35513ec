//! Pages that were unpacked, kept for a while.

use std::cell::RefCell;
use std::rc::Rc;

/// How much is kept, in bytes: more than the tables of a kernel that `bt` reads more than once.
const ROOM: u64 = 32 << 20;

/// The last pages that were unpacked. Each has one place by its number, so that those of a kernel's
/// image, which lie together, do not displace each other.
pub(super) struct Cache {
    slots: RefCell<Vec<Option<Slot>>>,
}

type Slot = (u64, Rc<[u8]>);

impl Cache {
    /// An empty one for pages of this size.
    pub fn new(page_size: u64) -> Cache {
        Cache { slots: RefCell::new(vec![None; (ROOM / page_size).max(1) as usize]) }
    }

    /// The page with this number, or what `unpack` makes of it.
    pub fn get<E>(
        &self,
        page: u64,
        unpack: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Rc<[u8]>, E> {
        let place = page as usize % self.slots.borrow().len();
        if let Some((number, bytes)) = &self.slots.borrow()[place]
            && *number == page
        {
            return Ok(Rc::clone(bytes));
        }
        let bytes: Rc<[u8]> = unpack()?.into();
        self.slots.borrow_mut()[place] = Some((page, Rc::clone(&bytes)));
        Ok(bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_are_unpacked_once_and_room_is_bounded() {
        let cache = Cache::new(ROOM / 4);
        let get = |page: u64, now: u8| cache.get(page, || Ok::<_, ()>(vec![now])).unwrap()[0];
        assert_eq!((get(1, 10), get(2, 20), get(1, 11)), (10, 20, 10));
        assert_eq!((get(5, 50), get(1, 12), get(2, 21)), (50, 12, 20));
        assert_eq!(cache.get(3, || Err(7)), Err(7));
        assert_eq!(get(3, 30), 30);
    }
}
