//! Doubly linked lists (struct list_head), walked with distrust.

use std::collections::HashSet;

use crate::VirtAddr;
use crate::kernel::virt::VirtualMemory;

/// More elements than any list of tasks or modules has.
const MAX_ELEMENTS: usize = 1 << 20;

/// What a walk found.
#[derive(Debug, Default)]
pub struct Walk {
    /// The elements: addresses of their list_head.
    pub nodes: Vec<VirtAddr>,
    /// Why the walk did not come back to the head, if it did not.
    pub broken: Option<String>,
}

/// Walks the list at `head`. Where the forward pointers are broken, what can be reached backwards
/// is added after what was reached forwards.
#[must_use]
pub fn walk(memory: &VirtualMemory<'_>, head: VirtAddr) -> Walk {
    let mut walk = Walk::default();
    let mut seen = HashSet::from([head]);
    walk.broken = follow(memory, head, 0, &mut walk.nodes, &mut seen);
    if walk.broken.is_some() {
        let mut behind = Vec::new();
        follow(memory, head, 8, &mut behind, &mut seen);
        walk.nodes.extend(behind.into_iter().rev());
    }
    walk
}

/// Follows the pointers that lie `offset` bytes behind each element, from `start` on, which counts, to
/// a null pointer or back to `start`.
#[must_use]
pub fn chain(memory: &VirtualMemory<'_>, start: VirtAddr, offset: u64) -> Walk {
    let mut walk = Walk::default();
    let mut seen = HashSet::new();
    let mut node = start;
    while !node.is_null() && (walk.nodes.is_empty() || node != start) {
        if !seen.insert(node) || walk.nodes.len() >= MAX_ELEMENTS {
            walk.broken = Some(format!("the list runs in a circle at {node:#x}"));
            break;
        }
        walk.nodes.push(node);
        node = match memory.pointer(node.offset(offset)) {
            Ok(next) => next,
            Err(error) => {
                walk.broken = Some(format!("the list breaks off at {node:#x}: {error}"));
                break;
            }
        };
    }
    walk
}

/// Follows the pointer at `member` of each node (0 is `next`, 8 is `prev`).
fn follow(
    memory: &VirtualMemory<'_>,
    head: VirtAddr,
    member: u64,
    nodes: &mut Vec<VirtAddr>,
    seen: &mut HashSet<VirtAddr>,
) -> Option<String> {
    let mut node = head;
    for _ in 0..MAX_ELEMENTS {
        let next = match memory.pointer(node.offset(member)) {
            Ok(next) => next,
            Err(error) => return Some(format!("the list breaks off at {node:#x}: {error}")),
        };
        if next == head {
            return None;
        }
        if !seen.insert(next) {
            return Some(format!("the list runs in a circle at {node:#x}"));
        }
        if let Err(error) = memory.pointer(next) {
            return Some(format!("the list breaks off at {node:#x}: {error}"));
        }
        nodes.push(next);
        node = next;
    }
    Some("the list does not end".to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::FakeMemory;

    const VIRT: u64 = 0xffff_8880_0000_0000;

    /// A list of four nodes at 0x8000, 0x8100, 0x8200 and 0x8300; the first is the head.
    fn linked() -> FakeMemory {
        let mut memory = FakeMemory::new(0x10000);
        for node in 0..4u64 {
            let at = 0x8000 + node * 0x100;
            memory.put_u64(at, VIRT + 0x8000 + (node + 1) % 4 * 0x100);
            memory.put_u64(at + 8, VIRT + 0x8000 + (node + 3) % 4 * 0x100);
        }
        memory
    }

    fn walked(mut memory: FakeMemory) -> (Vec<u64>, bool) {
        let tables = memory.mapped(VIRT, 0x1000);
        let walk = walk(&memory.space(tables), VirtAddr(VIRT + 0x8000));
        (walk.nodes.iter().map(|node| node.0 - VIRT).collect(), walk.broken.is_some())
    }

    #[test]
    fn whole_list_is_walked_once() {
        assert_eq!(walked(linked()), (vec![0x8100, 0x8200, 0x8300], false));
    }

    #[test]
    fn what_lies_behind_a_break_is_reached_from_the_other_end() {
        let mut memory = linked();
        memory.put_u64(0x8100, 0xdead_0000_0000_0100);
        assert_eq!(walked(memory), (vec![0x8100, 0x8200, 0x8300], true));
    }

    #[test]
    fn circle_that_leaves_out_the_head_ends() {
        let mut memory = linked();
        memory.put_u64(0x8300, VIRT + 0x8200);
        assert_eq!(walked(memory), (vec![0x8100, 0x8200, 0x8300], true));
    }
}
