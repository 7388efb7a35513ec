//! Where bytes come from: the dead machine's physical memory and its notes.
//!
//! Everything above works on [`Memory`]; a further kind of dump is a further implementation.

mod area;
mod card;
mod elf;
mod map;
mod notes;

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

use memmap2::Mmap;

pub use area::AreaInfo;
pub use card::StoredCard;
pub(crate) use elf::ELF64;
pub use elf::ElfCore;
pub use map::map;
pub use notes::{NoteBook, Prstatus};

use crate::{Error, PhysAddr, ReadError, VirtAddr};

/// The physical memory of the dead machine.
pub trait Memory {
    /// The bytes from `at` on, as far as they lie together in the dump, at most `max` of them and
    /// at least one.
    ///
    /// # Errors
    /// [`ReadError::NotInDump`] when not even the first one is there.
    fn run(&self, at: PhysAddr, max: usize) -> Result<Cow<'_, [u8]>, ReadError>;

    /// The ranges of physical memory that the dump holds, sorted, not overlapping.
    fn ranges(&self) -> &[Range<u64>];

    /// The physical address that the dump itself (not the page tables) gives for a virtual one: a
    /// last resort when page tables are missing.
    fn linear(&self, at: VirtAddr) -> Option<PhysAddr>;
}

/// Whether all of a dump is there.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum Completeness {
    /// As far as can be told.
    Complete,
    /// It is not; the text says what is missing and how that is known.
    Incomplete(String),
}

/// An opened dump.
pub struct Dump {
    path: PathBuf,
    map: Mmap,
    core: ElfCore,
    area: Option<AreaInfo>,
}

impl Dump {
    /// Opens the ELF core in `path`, or in the reserved area on or in `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotADump`] with what it was found to be, [`Error::EmptyArea`].
    pub fn open(path: &Path) -> Result<Dump, Error> {
        let map = map::map(path)?;
        let area = area::find(&map);
        if area.as_ref().is_some_and(AreaInfo::is_empty) {
            return Err(Error::EmptyArea { path: path.to_owned() });
        }
        let bytes = match &area {
            Some(area) => &map[area.core.clone()],
            None => &map[..],
        };
        let not_a_dump = |reason| Error::NotADump { path: path.to_owned(), reason };
        let mut core = ElfCore::parse(bytes).map_err(not_a_dump)?;
        if let Some(record) = NoteBook::parse(core.notes(bytes)).record {
            core.leave_out(record.unreadable());
        }
        Ok(Dump { path: path.to_owned(), map, core, area })
    }

    /// The file that was opened.
    #[must_use]
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The reserved area that the core lies in, when it does.
    #[must_use]
    pub fn area(&self) -> Option<&AreaInfo> {
        self.area.as_ref()
    }

    /// ELF machine of the dead kernel (62 is x86_64, 183 aarch64).
    #[must_use]
    pub fn machine(&self) -> u16 {
        self.core.machine()
    }

    /// The notes of the core.
    #[must_use]
    pub fn notes(&self) -> NoteBook<'_> {
        NoteBook::parse(self.core.notes(self.core_bytes()))
    }

    /// Whether all of the dump is there, by its own flags and by the length of the file.
    #[must_use]
    pub fn completeness(&self) -> Completeness {
        let area = self.area.as_ref().and_then(AreaInfo::problem);
        let core = self.core.problem(self.core_bytes().len());
        let record = self.notes().record.filter(|record| record.complete.get() != 1);
        let note = record.map(|_| "the payload's own note says that it did not finish".to_owned());
        let reasons: Vec<String> = area.into_iter().chain(core).chain(note).collect();
        if reasons.is_empty() {
            Completeness::Complete
        } else {
            Completeness::Incomplete(reasons.join("; "))
        }
    }

    fn core_bytes(&self) -> &[u8] {
        match &self.area {
            Some(area) => &self.map[area.core.clone()],
            None => &self.map[..],
        }
    }
}

impl Memory for Dump {
    fn run(&self, at: PhysAddr, max: usize) -> Result<Cow<'_, [u8]>, ReadError> {
        self.core.run(self.core_bytes(), at, max).map(Cow::Borrowed)
    }

    fn ranges(&self) -> &[Range<u64>] {
        self.core.ranges()
    }

    fn linear(&self, at: VirtAddr) -> Option<PhysAddr> {
        self.core.linear(at)
    }
}
