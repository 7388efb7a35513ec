//! The two tables that VMCOREINFO does not name: they are found by where others lie (scripts/kallsyms.c,
//! 6.0 to 7.0), and believed by their content.

use super::{Kallsyms, KernelMemory, NAME, STRIDE};

impl Kallsyms {
    /// `kallsyms_markers` lies before the tokens, or before the order of the names if that one does
    /// (6.2 and 6.3). All tables begin at multiples of 8.
    pub(super) fn find_markers(&self, memory: &mut KernelMemory<'_>) -> Option<u64> {
        let size = (u64::from(self.count.div_ceil(STRIDE)) * 4).next_multiple_of(8);
        let near = self.tokens.checked_sub(size)?;
        let far = near.checked_sub(self.order_size());
        [Some(near), far].into_iter().flatten().find(|&at| self.are_markers(memory, at))
    }

    /// Whether there are markers at `at`: a zero, then offsets each some 256 names further on.
    fn are_markers(&self, memory: &mut KernelMemory<'_>, at: u64) -> bool {
        const CHECKED: u32 = 64;
        let mut last = 0;
        for index in 0..self.count.div_ceil(STRIDE).min(CHECKED) {
            let place = at.checked_add(u64::from(index) * 4);
            let Some(marker) = place.and_then(|at| memory.u32(at)) else { return false };
            let step = marker.wrapping_sub(last);
            let plausible = if index == 0 {
                marker == 0
            } else {
                (STRIDE..STRIDE * NAME as u32).contains(&step)
            };
            if !plausible {
                return false;
            }
            last = marker;
        }
        true
    }

    fn order_size(&self) -> u64 {
        (u64::from(self.count) * 3).next_multiple_of(8)
    }

    /// `kallsyms_seqs_of_names` lies behind the base of the addresses (6.4 to 6.14), behind the
    /// addresses themselves (7.0 on), or before the tokens. The right place leads to names.
    pub(super) fn find_order(
        &self,
        memory: &mut KernelMemory<'_>,
        base_at: Option<u64>,
    ) -> Option<u64> {
        const CHECKED: u32 = 4;
        self.markers?;
        let behind_addresses = (u64::from(self.count) * 4).next_multiple_of(8);
        let places = [
            base_at.and_then(|at| at.checked_add(8)),
            self.addresses.checked_add(behind_addresses),
            self.tokens.checked_sub(self.order_size()),
        ];
        let mut leads = |at: u64| {
            (1..=CHECKED).all(|part| {
                let name = self.name(memory, self.count / (CHECKED + 1) * part);
                name.is_some_and(|(_, name)| self.find_in_order(memory, at, &name).is_some())
            })
        };
        places.into_iter().flatten().find(|&at| leads(at))
    }
}
