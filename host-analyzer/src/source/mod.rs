//! Where bytes come from: the dead machine's physical memory and its notes.
//!
//! Everything above works on [`Memory`]; a further kind of dump is a further implementation.

mod area;
mod card;
mod compressed;
mod content;
mod elf;
mod flattened;
mod map;
mod notes;
mod ranges;

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};

pub use area::AreaInfo;
pub use card::StoredCard;
use compressed::Compressed;
use content::Content;
pub(crate) use elf::ELF64;
use elf::ElfCore;
use flattened::Records;
pub use map::map;
pub use notes::{NoteBook, Prstatus};

use crate::{Error, PhysAddr, ReadError, VirtAddr};

/// The physical memory of the dead machine.
pub trait Memory {
    /// The bytes from `at` on, as far as the dump has them without a gap, at most `max` of them and at least
    /// one. Of very many it may give fewer.
    ///
    /// # Errors
    /// [`ReadError::NotInDump`], [`ReadError::LeftOut`] or [`ReadError::Damaged`] when not even the first
    /// one is there.
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

/// How much is put together that is not together in the file, in bytes: as much as a kernel's image, which
/// is searched for what may lie anywhere in it.
const TOGETHER: usize = 64 << 20;

/// How a file holds a dump. `content` is that which the form was read from.
trait Form {
    /// ELF machine of the dead kernel.
    fn machine(&self) -> u16;

    /// The segments of notes.
    fn notes(&self) -> Vec<&[u8]>;

    /// VMCOREINFO, where it is beside the notes too.
    fn vmcoreinfo(&self) -> Option<&[u8]> {
        None
    }

    /// Takes `gaps` out: memory that is zeros in the dump because nobody could read it. They are few.
    fn leave_out(&mut self, gaps: &[Range<u64>]);

    /// See [`Memory::run`], but it may end where the file has what follows elsewhere.
    fn run<'a>(
        &'a self,
        content: Content<'a>,
        at: PhysAddr,
        max: usize,
    ) -> Result<Cow<'a, [u8]>, ReadError>;

    /// See [`Memory::ranges`].
    fn ranges(&self, content: Content<'_>) -> &[Range<u64>];

    /// See [`Memory::linear`].
    fn linear(&self, at: VirtAddr) -> Option<PhysAddr>;

    /// Says what is missing, when something is.
    fn problem(&self, content: Content<'_>) -> Option<String>;
}

/// The form of the dump in `content`, which its first bytes tell.
fn form_of(content: Content<'_>) -> Result<Box<dyn Form>, String> {
    Ok(match Compressed::is_in(content) {
        true => Box::new(Compressed::parse(content)?),
        false => Box::new(ElfCore::parse(content)?),
    })
}

/// An opened dump.
pub struct Dump {
    path: PathBuf,
    file: Box<dyn AsRef<[u8]>>,
    area: Option<AreaInfo>,
    records: Option<Records>,
    form: Box<dyn Form>,
}

impl Dump {
    /// Opens the dump in `path`, or in the reserved area on or in `path`.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::NotADump`] with what it was found to be, [`Error::EmptyArea`].
    pub fn open(path: &Path) -> Result<Dump, Error> {
        Dump::of(path, Box::new(map::map(path)?))
    }

    /// Whether `file` begins as one of the forms of a dump does, and so is meant to be one.
    #[must_use]
    pub fn begins_in(file: &[u8]) -> bool {
        let content = Content::plain(file);
        ElfCore::is_in(content) || Compressed::is_in(content) || Records::are_in(file)
    }

    /// Opens the dump whose file would hold `bytes`.
    ///
    /// # Errors
    /// [`Error::NotADump`], [`Error::EmptyArea`].
    pub fn from_bytes(bytes: Vec<u8>) -> Result<Dump, Error> {
        Dump::of(Path::new("(in memory)"), Box::new(bytes))
    }

    fn of(path: &Path, file: Box<dyn AsRef<[u8]>>) -> Result<Dump, Error> {
        let area = area::find((*file).as_ref());
        if area.as_ref().is_some_and(AreaInfo::is_empty) {
            return Err(Error::EmptyArea { path: path.to_owned() });
        }
        let not_a_dump = |reason| Error::NotADump { path: path.to_owned(), reason };
        let bytes = part((*file).as_ref(), area.as_ref());
        let records = Records::are_in(bytes).then(|| Records::parse(bytes)).transpose();
        let records = records.map_err(not_a_dump)?;
        let form = form_of(content(bytes, records.as_ref())).map_err(not_a_dump)?;
        let mut dump = Dump { path: path.to_owned(), file, area, records, form };
        if let Some(record) = dump.notes().record {
            dump.form.leave_out(&record.unreadable().collect::<Vec<_>>());
        }
        Ok(dump)
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
        self.form.machine()
    }

    /// The notes of the dump.
    #[must_use]
    pub fn notes(&self) -> NoteBook<'_> {
        let mut book = NoteBook::parse(self.form.notes().into_iter());
        book.vmcoreinfo = book.vmcoreinfo.or(self.form.vmcoreinfo());
        book
    }

    /// Whether all of the dump is there, by its own flags and by the length of the file.
    #[must_use]
    pub fn completeness(&self) -> Completeness {
        let area = self.area.as_ref().and_then(AreaInfo::problem);
        let records = self.records.as_ref().and_then(Records::problem);
        let form = self.form.problem(self.content());
        let record = self.notes().record.filter(|record| record.complete.get() != 1);
        let note = record.map(|_| "the payload's own note says that it did not finish".to_owned());
        let reasons: Vec<String> =
            area.into_iter().chain(records).chain(form).chain(note).collect();
        if reasons.is_empty() {
            Completeness::Complete
        } else {
            Completeness::Incomplete(reasons.join("; "))
        }
    }

    fn content(&self) -> Content<'_> {
        content(part((*self.file).as_ref(), self.area.as_ref()), self.records.as_ref())
    }
}

/// What of a file is the dump.
fn part<'a>(file: &'a [u8], area: Option<&AreaInfo>) -> &'a [u8] {
    area.map_or(file, |area| file.get(area.core.clone()).unwrap_or_default())
}

fn content<'a>(bytes: &'a [u8], records: Option<&'a Records>) -> Content<'a> {
    records.map_or(Content::plain(bytes), |records| Content::flattened(bytes, records))
}

impl Memory for Dump {
    fn run(&self, at: PhysAddr, max: usize) -> Result<Cow<'_, [u8]>, ReadError> {
        let run = |at, max| self.form.run(self.content(), at, max);
        let first = run(at, max)?;
        let max = max.min(TOGETHER);
        let following = |got: usize| {
            let here = at.0.checked_add(got as u64).filter(|_| got < max)?;
            run(PhysAddr(here), max - got).ok()
        };
        let Some(second) = following(first.len()) else { return Ok(first) };
        let mut all = [first, second].concat();
        while let Some(next) = following(all.len()) {
            all.extend_from_slice(&next);
        }
        Ok(Cow::Owned(all))
    }

    fn ranges(&self) -> &[Range<u64>] {
        self.form.ranges(self.content())
    }

    fn linear(&self, at: VirtAddr) -> Option<PhysAddr> {
        self.form.linear(at)
    }
}
