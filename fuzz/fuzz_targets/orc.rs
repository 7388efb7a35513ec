//! ORC tables of every version.

#![no_main]

use host_analyzer::VirtAddr;
use host_analyzer::kernel::sparse::Sparse;
use host_analyzer::unwind::orc::{ENTRY, Table, Version};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let Some((&at, bytes)) = bytes.split_first() else { return };
    let (ips, entries) = bytes.split_at(bytes.len().min(usize::from(at)));
    let versions = [Version::V1, Version::V2, Version::V3, Version::V4];
    let told = Version::detect(None, &Sparse::whole(entries));
    for version in versions.into_iter().chain(told) {
        for raw in entries.chunks(ENTRY) {
            let _ = version.decode(raw);
        }
        let place = VirtAddr(0xffff_ffff_8100_0000);
        let (ips, entries) = (Sparse::whole(ips), Sparse::whole(entries));
        let table = Table { place, ips, entries, version };
        for pc in [0, place.0 - 1, place.0, place.0 + 0x1000, u64::MAX] {
            let _ = table.find(VirtAddr(pc));
        }
    }
});
