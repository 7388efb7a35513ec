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
