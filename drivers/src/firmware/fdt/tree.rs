//! The format of a flattened device tree: nodes and their properties, in place.
//!
//! A blob that is damaged or cut is read up to where it stops making sense. Every step goes forward
//! in the blob, so nothing here can loop, and nothing is stored but the way down to one node.
//!
//! Why no library: `fdt` 0.1 panics on damaged blobs, and `dtoolkit` 0.4 refuses a whole tree for
//! one name of more than 31 characters, which trees of real boards have (Linux's own has
//! `snps,dis-del-phy-power-chg-quirk`); without its tree the payload has neither memory map nor
//! console.
//!
//! Source: Devicetree Specification 0.4, chapters 2.3 and 5.

use heapless::Vec;

use crate::PhysAddr;
use crate::firmware::Region;

const MAGIC: u32 = 0xd00d_feed;

/// Offsets in the header (section 5.2).
mod header {
    pub const TOTAL_SIZE: usize = 4;
    pub const OFF_STRUCTURE: usize = 8;
    pub const OFF_STRINGS: usize = 12;
    pub const VERSION: usize = 20;
    pub const LAST_COMPATIBLE_VERSION: usize = 24;
    pub const SIZE_STRINGS: usize = 32;
    pub const SIZE_STRUCTURE: usize = 36;
}

/// Tokens (section 5.4.1).
mod token {
    pub const BEGIN_NODE: u32 = 1;
    pub const END_NODE: u32 = 2;
    pub const PROPERTY: u32 = 3;
    pub const NOP: u32 = 4;
}

/// Deepest node that is looked at, the root being at depth 1. Linux stops at 64; what the payload
/// looks for lies at 2 to 5.
pub const MAX_DEPTH: usize = 12;

/// Most properties of a node among which one is looked for, and most entries of a bus's `ranges`:
/// several times what trees of real machines have. Without them a tree made for it could cost minutes.
const MAX_PROPERTIES: usize = 1024;
const MAX_RANGES: usize = 256;

/// A tree in memory.
#[derive(Clone, Copy)]
pub struct Tree<'a> {
    structure: &'a [u8],
    strings: &'a [u8],
}

/// The size in bytes that the header of a tree claims, from its first eight bytes. `None` when
/// they are not those of a tree.
#[must_use]
pub fn claimed_size(header: &[u8; 8]) -> Option<u32> {
    (word(header, 0)? == MAGIC).then(|| word(header, header::TOTAL_SIZE)).flatten()
}

impl<'a> Tree<'a> {
    /// The tree in `blob`. `None` when there is none, or one of a version before 16 or after the
    /// readers of 17 end (all trees of this century are 17).
    pub fn open(blob: &'a [u8]) -> Option<Tree<'a>> {
        let version = word(blob, header::VERSION)?;
        let known = version >= 16 && word(blob, header::LAST_COMPATIBLE_VERSION)? <= 17;
        if word(blob, 0)? != MAGIC || !known {
            return None;
        }
        let block = |offset: usize, size: u32| {
            let rest = blob.get(word(blob, offset)? as usize..)?;
            Some(rest.get(..size as usize).unwrap_or(rest))
        };
        let size = if version > 16 { word(blob, header::SIZE_STRUCTURE)? } else { u32::MAX };
        let structure = block(header::OFF_STRUCTURE, size)?;
        let strings = block(header::OFF_STRINGS, word(blob, header::SIZE_STRINGS)?)?;
        Some(Tree { structure, strings })
    }

    /// A walk over all nodes, parents before children.
    pub fn walk(self) -> Walk<'a> {
        Walk { tree: self, offset: 0, path: Vec::new(), too_deep: 0 }
    }

    /// Walks to the first node that `wanted` is true of, and gives what `found` makes of the way to
    /// it.
    pub fn find<T>(
        self,
        wanted: impl Fn(&[Node<'a>]) -> bool,
        found: impl FnOnce(&[Node<'a>]) -> Option<T>,
    ) -> Option<T> {
        let mut walk = self.walk();
        while let Some(path) = walk.next() {
            if wanted(path) {
                return found(path);
            }
        }
        None
    }
}

/// A walk over the nodes of a tree.
pub struct Walk<'a> {
    tree: Tree<'a>,
    offset: usize,
    path: Vec<Node<'a>, MAX_DEPTH>,
    too_deep: usize,
}

impl<'a> Walk<'a> {
    /// The way from the root to the next node, both included.
    pub fn next(&mut self) -> Option<&[Node<'a>]> {
        loop {
            let token = word(self.tree.structure, self.offset)?;
            match token {
                token::BEGIN_NODE => {
                    if self.enter()? {
                        return Some(&self.path);
                    }
                }
                token::END_NODE => {
                    self.offset += 4;
                    match self.too_deep {
                        0 => drop(self.path.pop()?),
                        _ => self.too_deep -= 1,
                    }
                }
                token::PROPERTY => self.offset = property(self.tree.structure, self.offset)?.end,
                token::NOP => self.offset += 4,
                _ => return None,
            }
        }
    }

    /// Goes into the node that begins here. Whether it is one to look at.
    fn enter(&mut self) -> Option<bool> {
        let rest = self.tree.structure.get(self.offset + 4..)?;
        let length = rest.iter().position(|&byte| byte == 0)?;
        self.offset = (self.offset + 4 + length + 1).next_multiple_of(4);
        let node = Node { tree: self.tree, name: &rest[..length], properties: self.offset };
        if self.too_deep > 0 || self.path.push(node).is_err() {
            self.too_deep += 1;
        }
        Some(self.too_deep == 0)
    }
}

/// Where a property lies in the structure block.
struct Property<'a> {
    name: usize,
    value: &'a [u8],
    end: usize,
}

fn property(structure: &[u8], at: usize) -> Option<Property<'_>> {
    let size = word(structure, at + 4)? as usize;
    let name = word(structure, at + 8)? as usize;
    let value = structure.get(at + 12..)?.get(..size)?;
    Some(Property { name, value, end: (at + 12 + size).next_multiple_of(4) })
}

/// A node of a tree.
#[derive(Clone, Copy)]
pub struct Node<'a> {
    tree: Tree<'a>,
    name: &'a [u8],
    properties: usize,
}

impl<'a> Node<'a> {
    /// Whether this is what `name` means in a path: the whole name, or that without the address.
    pub fn is_named(&self, name: &[u8]) -> bool {
        let bare = self.name.split(|&byte| byte == b'@').next();
        self.name == name || bare == Some(name)
    }

    /// The value of a property.
    pub fn property(&self, name: &str) -> Option<&'a [u8]> {
        let Tree { structure, strings } = self.tree;
        let mut at = self.properties;
        for _ in 0..MAX_PROPERTIES {
            match word(structure, at)? {
                token::NOP => at += 4,
                token::PROPERTY => {
                    let property = property(structure, at)?;
                    let rest = strings.get(property.name..).unwrap_or(&[]);
                    let same = rest.strip_prefix(name.as_bytes());
                    if same.is_some_and(|rest| rest.first() == Some(&0)) {
                        return Some(property.value);
                    }
                    at = property.end;
                }
                _ => return None,
            }
        }
        None
    }

    /// A property of one cell.
    pub fn word(&self, name: &str) -> Option<u32> {
        word(self.property(name)?, 0)
    }

    /// A property of one or two cells.
    pub fn number(&self, name: &str) -> Option<u64> {
        let value = self.property(name)?;
        let cells = (value.len() / 4) as u32;
        (cells != 0).then(|| Cells(value).take(cells)).flatten()
    }

    /// A property that is a text, without the zero at its end.
    pub fn text(&self, name: &str) -> Option<&'a [u8]> {
        self.property(name)?.split(|&byte| byte == 0).next()
    }

    /// Whether the node's `status` says that it may be used.
    pub fn enabled(&self) -> bool {
        self.text("status").is_none_or(|status| status == b"okay" || status == b"ok")
    }

    /// How many cells addresses and sizes of the children have.
    pub fn cells(&self) -> (u32, u32) {
        let address = self.word("#address-cells").unwrap_or(2);
        (address, self.word("#size-cells").unwrap_or(1))
    }
}

/// Address and size in cell format, at entry `index` of `value`.
pub fn region(value: &[u8], index: usize, (address, size): (u32, u32)) -> Option<Region> {
    let bytes = 4 * (address.checked_add(size)?) as usize;
    let mut cells = Cells(value.get(bytes.checked_mul(index)?..)?);
    Some(Region { at: PhysAddr(cells.take(address)?), size: cells.take(size)? })
}

/// The registers at entry 0 of the `reg` of the node that `path` leads to, where the processor sees
/// them. `None` too when the processor does not see them.
pub fn registers(path: &[Node<'_>]) -> Option<Region> {
    let (node, parents) = path.split_last()?;
    let Region { at, size } = region(node.property("reg")?, 0, parents.last()?.cells())?;
    Some(Region { at: translate(parents, at, size)?, size })
}

/// Where the processor sees `size` bytes at `at` on the bus that `path` leads to (section 2.3.8).
pub fn translate(path: &[Node<'_>], at: PhysAddr, size: u64) -> Option<PhysAddr> {
    let mut at = at.0;
    let mut path = path;
    while let [parents @ .., parent, bus] = path {
        let ranges = bus.property("ranges")?;
        let (child_cells, size_cells) = bus.cells();
        let (parent_cells, _) = parent.cells();
        if !ranges.is_empty() {
            at = through(ranges, [child_cells, parent_cells, size_cells], at, size)?;
        }
        path = &path[..=parents.len()];
    }
    at.checked_add(size)?;
    Some(PhysAddr(at))
}

/// The address on the parent bus of `at`, by `ranges` with these numbers of cells for the address
/// on the bus, on its parent, and the size.
fn through(ranges: &[u8], cells: [u32; 3], at: u64, size: u64) -> Option<u64> {
    let [child_cells, parent_cells, size_cells] = cells;
    let mut entries = Cells(ranges);
    for _ in 0..MAX_RANGES {
        let child = entries.take(child_cells)?;
        let parent = entries.take(parent_cells)?;
        let length = entries.take(size_cells)?;
        let Some(offset) = at.checked_sub(child) else { continue };
        if offset.checked_add(size).is_some_and(|end| end <= length) {
            return parent.checked_add(offset);
        }
    }
    None
}

/// Whether the device that `path` leads to, by its own accesses, sees memory where the processor does
/// (`dma-ranges`, section 2.3.9). One that does not would write elsewhere than it is told.
pub fn sees_memory_in_place(path: &[Node<'_>]) -> bool {
    path.windows(2).all(|pair| {
        let [parent, bus] = pair else { return true };
        let Some(ranges) = bus.property("dma-ranges") else { return true };
        let ((child_cells, size_cells), (parent_cells, _)) = (bus.cells(), parent.cells());
        // An address on a PCI bus has one cell more, for its kind.
        let kind_cells = child_cells.saturating_sub(2);
        let mut entries = Cells(ranges);
        let mut in_place = || {
            entries.take(kind_cells)?;
            let child = entries.take(child_cells - kind_cells)?;
            let parent = entries.take(parent_cells)?;
            entries.take(size_cells)?;
            Some(child == parent)
        };
        (0..MAX_RANGES).map_while(|_| in_place()).all(|same| same)
    })
}

/// Cells that are taken from the front.
pub struct Cells<'a>(pub &'a [u8]);

impl Cells<'_> {
    /// A number of `count` cells; `None` when there are not so many, or more than two.
    pub fn take(&mut self, count: u32) -> Option<u64> {
        if count > 2 {
            return None;
        }
        let mut number = 0;
        for _ in 0..count {
            let (cell, rest) = self.0.split_first_chunk()?;
            number = number << 32 | u64::from(u32::from_be_bytes(*cell));
            self.0 = rest;
        }
        Some(number)
    }
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
}
