//! The headers of a kdump-compressed file.
//!
//! Offsets are those of struct disk_dump_header (x86_64 and aarch64 lay it out alike) and of struct
//! kdump_sub_header (makedumpfile 1.7.2: diskdump_mod.h, IMPLEMENTATION; QEMU 7.2: include/sysemu/dump.h).
//! The sub header grew with the versions, so what lies behind its size in a version is not read.

use std::ops::Range;

use crate::bytes;
use crate::source::content::Content;
use crate::source::notes::NoteBook;

const SIGNATURE: &[u8; 8] = b"KDUMP   ";

/// The versions of the header that are known. A newer one is read as the last of them, as only fields
/// behind the known ones were ever added.
const VERSIONS: Range<u32> = 1..100;

/// Sizes of a page that kernels have.
const PAGE_SIZES: Range<u64> = 4096..65537;

/// Size of what is read of each header.
const HEADER: usize = 464;
const SUB_HEADER: usize = 104;

/// Notes of 8192 CPUs are a few MiB.
const MAX_NOTES: u64 = 64 << 20;

/// Bit of the status that marks an incomplete dump (DUMP_DH_COMPRESSED_INCOMPLETE).
const INCOMPLETE: u32 = 8;

/// Bit of the dump level by which pages of zeros are left out (DL_EXCLUDE_ZERO).
const ZEROS: u32 = 1;

/// What the headers say.
#[derive(Clone, Debug)]
pub(super) struct Header {
    /// Size of a page, and of the blocks that offsets are counted in.
    pub page_size: u64,
    /// How many pages the memory has, holes counted: none has this number.
    pub pages: u64,
    /// Where the bitmap of the dumped pages lies; that of all pages is before it, as long as it.
    pub bitmap: u64,
    /// How many bytes each of them has.
    pub bitmap_size: u64,
    /// Where the descriptors of the pages lie.
    pub descriptors: u64,
    /// Which kinds of pages were left out (makedumpfile -d).
    level: u32,
    /// Whether whoever wrote it did not finish.
    pub is_incomplete: bool,
    /// The pages that this file of several has, when there are several.
    pub part: Option<Range<u64>>,
    /// ELF machine.
    pub machine: u16,
    /// The notes, as in an ELF core.
    pub notes: Vec<u8>,
    /// VMCOREINFO, which older versions have beside the notes.
    pub vmcoreinfo: Vec<u8>,
}

/// Whether `content` begins as a kdump-compressed file.
pub(super) fn is_kdump(content: Content<'_>) -> bool {
    content.read(0, SIGNATURE.len()).is_some_and(|begin| *begin == *SIGNATURE)
}

impl Header {
    /// Reads both headers, and the notes.
    ///
    /// # Errors
    /// A sentence that says what is wrong with them.
    pub fn parse(content: Content<'_>) -> Result<Header, String> {
        let main = content.read(0, HEADER).ok_or("its header is cut short")?;
        let word = |at| bytes::u32_at(&main, at).unwrap_or_default();
        let version = word(8);
        if !VERSIONS.contains(&version) {
            return Err(format!("a kdump-compressed file of version {version} (or big-endian)"));
        }
        let page_size = u64::from(word(428));
        if !page_size.is_power_of_two() || !PAGE_SIZES.contains(&page_size) {
            return Err(format!("a kdump-compressed file with pages of {page_size} bytes"));
        }
        let bitmap_blocks = u64::from(word(436));
        let bitmaps = (1 + u64::from(word(432))) * page_size;
        let sub = Sub { version, bytes: content.read_up_to(page_size, SUB_HEADER as u64).to_vec() };
        let bitmap_size = bitmap_blocks * page_size / 2;
        let pages = sub.word(6, 96).filter(|&pages| pages != 0).unwrap_or(u64::from(word(440)));
        let notes = sub.place(4, 48, content);
        Ok(Header {
            page_size,
            pages: pages.min(bitmap_size * 8),
            bitmap: bitmaps + bitmap_size,
            bitmap_size,
            descriptors: bitmaps + bitmap_blocks * page_size,
            level: sub.word(1, 8).unwrap_or_default() as u32,
            is_incomplete: word(424) & INCOMPLETE != 0,
            part: sub.part(),
            machine: machine(&main, &notes)?,
            notes,
            vmcoreinfo: sub.place(3, 32, content),
        })
    }

    /// Whether a page that was left out was one of zeros for certain: when no others were, and whoever wrote
    /// it came to its end.
    pub fn leaves_out_only_zeros(&self) -> bool {
        self.level == ZEROS && !self.is_incomplete
    }
}

/// The sub header.
struct Sub {
    version: u32,
    bytes: Vec<u8>,
}

impl Sub {
    /// The word at `at`, which is there since version `since`.
    fn word(&self, since: u32, at: usize) -> Option<u64> {
        bytes::u64_at(&self.bytes, at).filter(|_| self.version >= since)
    }

    /// What lies where the words from `at` on say: offset and size.
    fn place(&self, since: u32, at: usize, content: Content<'_>) -> Vec<u8> {
        match (self.word(since, at), self.word(since, at + 8)) {
            (Some(offset @ 1..), Some(size)) => {
                content.read_up_to(offset, size.min(MAX_NOTES)).to_vec()
            }
            _ => Vec::new(),
        }
    }

    fn part(&self) -> Option<Range<u64>> {
        let is_split = self.word(2, 8)? >> 32 != 0;
        let places = if self.version >= 6 { [80, 88] } else { [16, 24] };
        let [start, end] = places.map(|at| self.word(2, at).unwrap_or_default());
        is_split.then_some(start..end.max(start))
    }
}

/// The ELF machine. QEMU calls every 64-bit machine x86_64 in utsname, but the registers of a CPU are as
/// many as the architecture has.
fn machine(header: &[u8], notes: &[u8]) -> Result<u16, String> {
    const NAMES: [(&str, u16, usize); 2] = [("x86_64", 62, 27), ("aarch64", 183, 34)];
    const WORD: usize = 8;
    // struct elf_prstatus: pr_reg at 112, pr_fpvalid and padding behind it; `registers` begins at it.
    let book = NoteBook::parse(std::iter::once(notes));
    let registers = book.prstatus.first().map(|status| status.registers.len() / WORD);
    let by_registers = registers.and_then(|count| NAMES.iter().find(|it| it.2 + 1 == count));
    // struct new_utsname, six names of 65 bytes, the fifth of which is the machine's.
    let name = bytes::c_string(header.get(12 + 4 * 65..12 + 5 * 65).unwrap_or_default());
    let by_name = NAMES.iter().find(|it| it.0 == name);
    let found = by_registers.or(by_name).map(|it| it.1);
    found.ok_or_else(|| format!("a kdump-compressed file of a machine {name:?}, not yet supported"))
}
