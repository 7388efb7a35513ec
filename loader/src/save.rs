//! `loader save`: copies a dump out of its area into a directory.
//!
//! The order is the promise: copy and verify, flush the file, give it its name, flush the directory,
//! and only then call the area empty. Whatever goes wrong before that, the area is as it was and
//! there is no file under the final name.

use std::fmt;
use std::fs::{self, File, OpenOptions, TryLockError};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use format::area::{Reason, State, Trailer};
use format::crc32;
use indicatif::{ProgressBar, ProgressStyle};
use rustix::fs::{CWD, RenameFlags};
use rustix::io::Errno;

use crate::area::{Area, EmptyError, FindError};
use crate::copy::{Damage, Plan, copy};
use crate::core_file::{CoreError, Headers};
use crate::device::{Access, Device, OpenError, ReadAt};
use crate::text::exact_size;

/// Name of the file while it is being written.
const PARTIAL: &str = ".dump.elf.partial";

/// Name of the file with the card of a crash that left no more, because the dump was not saved yet.
const LATER_CARD: &str = "later-card.txt";

/// What the user allows.
#[derive(Clone, Copy, Debug, Default)]
pub struct Options {
    /// Save a dump that was not finished.
    pub incomplete: bool,
    /// Save a dump with wrong checksums.
    pub keep_damaged: bool,
}

/// Why a dump was not saved. The area is as it was.
#[derive(Debug, thiserror::Error)]
pub enum SaveError {
    /// The area cannot be opened.
    #[error(transparent)]
    Open(#[from] OpenError),
    /// There is no area.
    #[error(transparent)]
    Find(#[from] FindError),
    /// There is no dump.
    #[error("{0} is empty: no dump was written since it was reserved or last saved")]
    Empty(String),
    /// The dump is not complete, and the user did not say that this is all right.
    #[error(
        "the dump in {area} is not complete ({why}); to save what there is as dump.incomplete.elf, \
         say `loader save --incomplete`"
    )]
    Incomplete {
        /// The area.
        area: String,
        /// What happened to it.
        why: &'static str,
    },
    /// There was no room for more than the crash card.
    #[error(
        "there is no dump in {0}, for want of room: only the crash card (`loader show`); reserve a \
         larger area"
    )]
    CardOnly(String),
    /// There is no telling where the dump ends.
    #[error(
        "nothing in {area} can be saved as a dump: {source}; the raw bytes can be copied with dd, \
         and `loader reserve --force` makes the area ready again"
    )]
    NoCore {
        /// The area.
        area: String,
        /// What is wrong.
        source: CoreError,
    },
    /// The dump is damaged, and the user did not say that this is all right.
    #[error(
        "the dump in {area} is damaged, nothing was saved and the area is as it was:\n{report}\
         To save it nevertheless as dump.damaged.elf, say `loader save --keep-damaged`."
    )]
    Damaged {
        /// The area.
        area: String,
        /// What is damaged.
        report: DamageReport,
    },
    /// There is a file of that name.
    #[error(
        "{0} exists and will not be overwritten; name another directory, or move the file away"
    )]
    Exists(PathBuf),
    /// Somebody else is at it.
    #[error("another loader is saving a dump into {0}; wait for it, or name another directory")]
    DirectoryBusy(PathBuf),
    /// The directory or the file could not be written.
    #[error(
        "cannot {action} {path}: {source}\nNothing was saved and the area is as it was. Try again \
         where there is enough free space, in a directory that you may write to."
    )]
    Write {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// What the kernel said.
        source: io::Error,
    },
    /// The file is good, but the card of a later crash was not saved.
    #[error(
        "the dump is safe in {path}, but the card of a later crash, which `loader show` prints, cannot \
         be written to {card}: {source}; the area is as it was"
    )]
    LaterCard {
        /// The saved file.
        path: PathBuf,
        /// Where the card was to go.
        card: PathBuf,
        /// What the kernel said, or what is wrong with the card.
        source: io::Error,
    },
    /// The file is good, the area was not marked.
    #[error(
        "the dump is safe in {path}, but {area} could not be marked empty: {source}; \
         `loader reserve --force` makes it ready for the next crash"
    )]
    NotEmptied {
        /// The saved file.
        path: PathBuf,
        /// The area.
        area: String,
        /// What went wrong.
        source: EmptyError,
    },
}

/// What is wrong with a dump, printed one a line.
#[derive(Clone, Debug, Default)]
pub struct DamageReport {
    /// The CRC table itself is damaged, so nothing could be verified.
    pub table: bool,
    /// The damaged pieces.
    pub pieces: Vec<Damage>,
}

impl DamageReport {
    fn is_empty(&self) -> bool {
        !self.table && self.pieces.is_empty()
    }
}

impl fmt::Display for DamageReport {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        const SHOWN: usize = 20;
        if self.table {
            writeln!(f, "  - the table of checksums is damaged, so nothing can be verified")?;
        }
        for damage in self.pieces.iter().take(SHOWN) {
            writeln!(f, "  - {damage}")?;
        }
        match self.pieces.len().checked_sub(SHOWN) {
            Some(more) if more > 0 => writeln!(f, "  - and {more} more ranges"),
            _ => Ok(()),
        }
    }
}

/// A dump that was saved.
#[derive(Debug)]
pub struct Saved {
    /// The file.
    pub path: PathBuf,
    /// The area it came from.
    pub area: String,
    /// Size of the core in bytes.
    pub size: u64,
    /// Whether every MiB was verified.
    pub verified: bool,
    /// What is wrong with it.
    pub damage: DamageReport,
    /// Whether nobody wrote down how much of it there is.
    pub end_unknown: bool,
    /// The card of a later crash, if there was one.
    pub later_card: Option<PathBuf>,
}

/// Saves the dump in the area at `area_path` into `directory`.
///
/// # Errors
/// [`SaveError`]. In all cases but [`SaveError::NotEmptied`] nothing was saved.
pub fn save(area_path: &Path, directory: &Path, options: Options) -> Result<Saved, SaveError> {
    let device = Device::open(area_path, Access::Exclusive)?;
    let area = Area::find(&device)?;
    let (plan, table_damaged) = plan(&area, options)?;
    let target = Target::open(directory)?;
    let name = if plan.flag_incomplete { "dump.incomplete.elf" } else { "dump.elf" };
    target.refuse_existing(name)?;

    let partial = Partial::create(&target)?;
    let bar = progress_bar(plan.size);
    let pieces = copy(&area, &plan, &partial.file, |bytes| bar.set_position(bytes))
        .map_err(write_error("write", &partial.path))?;
    bar.finish_and_clear();
    let damage = DamageReport { table: table_damaged, pieces };
    if !damage.is_empty() && !options.keep_damaged {
        return Err(SaveError::Damaged { area: area.name(), report: damage });
    }
    let name = if damage.is_empty() { name } else { "dump.damaged.elf" };
    let path = partial.finish(&target, name)?;

    let later_card = save_later_card(&area, &target, &path)?;
    let saved = Saved {
        path,
        area: area.name(),
        size: plan.size,
        verified: plan.checksums.is_some(),
        damage,
        end_unknown: plan.checksums.is_none() && area.trailer.written == 0,
        later_card,
    };
    if saved.damage.is_empty() {
        mark_empty(&area, &saved.path)?;
    }
    Ok(saved)
}

/// What to copy, and whether the CRC table is damaged.
fn plan(area: &Area<'_>, options: Options) -> Result<(Plan, bool), SaveError> {
    let trailer = area.trailer;
    if trailer.state == State::Empty {
        return Err(SaveError::Empty(area.name()));
    }
    if trailer.state == State::Incomplete && trailer.reason == Reason::NoRoom {
        return Err(SaveError::CardOnly(area.name()));
    }
    let unfinished = trailer.state != State::Complete || trailer.core_size == 0;
    if unfinished && !options.incomplete {
        return Err(SaveError::Incomplete { area: area.name(), why: why_unfinished(&trailer) });
    }
    let no_core = |source| SaveError::NoCore { area: area.name(), source };
    if trailer.state == State::Writing || trailer.core_size == 0 {
        let limit = area.layout.crc_table;
        let size = Headers::read(area, limit).and_then(|headers| headers.end(area));
        let size = match (size.map_err(no_core)?, trailer.written) {
            (size, 0) => size,
            // What lies behind may be of an earlier dump.
            (size, written) => size.min(written),
        };
        return Ok((Plan { size, checksums: None, flag_incomplete: unfinished }, false));
    }
    let checksums = read_checksums(area).map_err(|error| no_core(error.into()))?;
    let table_damaged = checksums.is_none();
    Ok((Plan { size: trailer.core_size, checksums, flag_incomplete: unfinished }, table_damaged))
}

fn why_unfinished(trailer: &Trailer) -> &'static str {
    match (trailer.state, trailer.reason) {
        (State::Complete, _) => "its size is missing",
        (State::Writing, _) => "the payload did not come to its end",
        (_, Reason::None) => "it ended early, no reason given",
        (_, reason) => reason.text(),
    }
}

/// The CRC table; `None` when its own checksum is wrong.
fn read_checksums(area: &Area<'_>) -> io::Result<Option<Vec<u32>>> {
    let mut bytes = vec![0; area.trailer.crc_count as usize * 4];
    area.read_at(&mut bytes, area.layout.crc_table)?;
    if crc32(&bytes) != area.trailer.crc_table_crc {
        return Ok(None);
    }
    let words =
        bytes.chunks_exact(4).map(|word| u32::from_le_bytes([word[0], word[1], word[2], word[3]]));
    Ok(Some(words.collect()))
}

/// Saves the card of the last crash that left nothing else, under a name of its own beside the dump at
/// `dump`. A damaged one is gone.
fn save_later_card(
    area: &Area<'_>,
    target: &Target,
    dump: &Path,
) -> Result<Option<PathBuf>, SaveError> {
    if area.trailer.later_cards == 0 {
        return Ok(None);
    }
    let path = target.path.join(LATER_CARD);
    let write = || {
        let Some(card) = area.card()? else { return Ok(None) };
        let mut file = OpenOptions::new().write(true).create_new(true).open(&path)?;
        file.write_all(card.as_bytes())?;
        file.sync_all()?;
        target.sync()?;
        Ok(Some(path.clone()))
    };
    write().map_err(|source| SaveError::LaterCard { path: dump.into(), card: path.clone(), source })
}

/// Calls the area empty; it keeps its uuid and its count of captures.
fn mark_empty(area: &Area<'_>, saved: &Path) -> Result<(), SaveError> {
    area.empty().map_err(|source| SaveError::NotEmptied {
        path: saved.to_path_buf(),
        area: area.name(),
        source,
    })
}

fn write_error(action: &'static str, path: &Path) -> impl Fn(io::Error) -> SaveError + use<> {
    let path = path.to_path_buf();
    move |source| SaveError::Write { action, path: path.clone(), source }
}

/// The directory that the dump goes to, locked against other loaders.
struct Target {
    path: PathBuf,
    handle: File,
    created: bool,
}

impl Target {
    fn open(path: &Path) -> Result<Target, SaveError> {
        let created = !path.exists();
        fs::create_dir_all(path).map_err(write_error("create", path))?;
        let handle = File::open(path).map_err(write_error("open", path))?;
        match handle.try_lock() {
            Err(TryLockError::WouldBlock) => Err(SaveError::DirectoryBusy(path.to_path_buf())),
            // Some file systems have no locks; then there is only the user's care.
            Ok(()) | Err(TryLockError::Error(_)) => {
                Ok(Target { path: path.to_path_buf(), handle, created })
            }
        }
    }

    fn refuse_existing(&self, name: &str) -> Result<(), SaveError> {
        let path = self.path.join(name);
        match path.symlink_metadata() {
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(()),
            Err(error) => Err(write_error("look at", &path)(error)),
            Ok(_) => Err(SaveError::Exists(path)),
        }
    }

    /// Makes names durable: the file's in the directory and, where that is new, its own.
    fn sync(&self) -> io::Result<()> {
        let result = if self.created {
            rustix::fs::syncfs(&self.handle).map_err(io::Error::from)
        } else {
            self.handle.sync_all()
        };
        match result {
            // A file system that cannot flush directories says so with EINVAL.
            Err(error) if error.kind() == io::ErrorKind::InvalidInput => Ok(()),
            other => other,
        }
    }
}

/// The file while it is being written. Dropped unfinished, it is removed.
struct Partial {
    file: File,
    path: PathBuf,
    finished: bool,
}

impl Partial {
    fn create(target: &Target) -> Result<Partial, SaveError> {
        let path = target.path.join(PARTIAL);
        match fs::remove_file(&path) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => {
                return Err(write_error("remove the remains of an earlier save,", &path)(error));
            }
            _ => {}
        }
        let file = OpenOptions::new()
            .write(true)
            .create_new(true)
            .open(&path)
            .map_err(write_error("create", &path))?;
        Ok(Partial { file, path, finished: false })
    }

    /// Flushes the file, gives it its name, and flushes that.
    fn finish(mut self, target: &Target, name: &str) -> Result<PathBuf, SaveError> {
        let path = target.path.join(name);
        self.file.sync_all().map_err(write_error("flush", &self.path))?;
        rename_to_new(&self.path, &path).map_err(|error| match error.kind() {
            io::ErrorKind::AlreadyExists => SaveError::Exists(path.clone()),
            _ => write_error("create", &path)(error),
        })?;
        self.finished = true;
        if let Err(error) = target.sync() {
            // The name may not survive a power cut, so it must not stand for a saved dump.
            let _ = fs::remove_file(&path);
            return Err(write_error("flush the directory of", &path)(error));
        }
        Ok(path)
    }
}

impl Drop for Partial {
    fn drop(&mut self) {
        if !self.finished {
            // What is left here is removed by the next save.
            let _ = fs::remove_file(&self.path);
        }
    }
}

/// Renames, and fails when there is a file of the new name.
fn rename_to_new(from: &Path, to: &Path) -> io::Result<()> {
    match rustix::fs::renameat_with(CWD, from, CWD, to, RenameFlags::NOREPLACE) {
        // The file system knows no flags; the directory is locked, so looking first is enough.
        Err(Errno::INVAL | Errno::NOSYS) => {
            if to.symlink_metadata().is_ok() {
                return Err(io::ErrorKind::AlreadyExists.into());
            }
            fs::rename(from, to)
        }
        other => Ok(other?),
    }
}

/// A bar on stderr; nothing when that is not a terminal.
fn progress_bar(size: u64) -> ProgressBar {
    let bar = ProgressBar::new(size);
    let style =
        "{wide_bar} {binary_bytes} of {binary_total_bytes}, {binary_bytes_per_sec}, {eta} left";
    if let Ok(style) = ProgressStyle::with_template(style) {
        bar.set_style(style);
    }
    bar
}

impl fmt::Display for Saved {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let (path, area) = (self.path.display(), &self.area);
        writeln!(f, "Saved the dump in {area} as {path}: {}.", exact_size(self.size))?;
        if !self.damage.is_empty() {
            write!(f, "It is damaged:\n{}", self.damage)?;
            return writeln!(
                f,
                "The area is as it was; when the file will do, `loader reserve --force` makes it \
                 ready for the next crash."
            );
        }
        if let Some(card) = &self.later_card {
            let card = card.display();
            writeln!(f, "Of a later crash there is the crash card alone: {card}.")?;
        }
        if self.verified {
            writeln!(f, "Every checksum was right.")?;
        } else {
            writeln!(f, "It has no checksums to verify.")?;
            if self.end_unknown {
                writeln!(f, "It may end in bytes that were there before.")?;
            }
        }
        writeln!(f, "The area is empty and ready for the next crash.")?;
        writeln!(f, "Look at the dump with `host-analyzer bt {path}`.")
    }
}
