//! Stacks of arm64, as the card shows them.

use std::vec::Vec;

use super::testing::{BASE, World, at};

#[test]
fn arm64_leaf_is_shown_with_the_caller_that_only_x30_knows() {
    let mut world = World::aarch64();
    let text = at::TEXT;
    world.put_symbols(&[
        (text, "T_stext"),
        (text + 0x100, "Tleaf"),
        (text + 0x200, "Tmiddle"),
        (text + 0x300, "Touter"),
        (text + 0x400, "T_etext"),
    ]);
    world.put_u32(text + 0x210 - 4, 0x9400_0000);
    // x29 leads to the record of `middle`, which was called by `outer`; its return address is signed.
    let stack = at::STACK;
    world.put_u64(stack, BASE + stack + 0x400);
    world.put_u64(stack + 8, (BASE + text + 0x310) & !0x007f_0000_0000_0000);
    let registers =
        [(29, BASE + stack), (30, BASE + text + 0x210), (32, BASE + text + 0x108), (33, 0x3c5)];
    world.cpu(1, &registers);
    let card = world.card();
    let trace = "call trace of CPU 0\n  leaf+0x8/0x100\n  middle+0x10/0x100  (caller in x30)\n  \
                 outer+0x10/0x100\nregisters of CPU 0\n";
    assert!(card.contains(trace), "{card}");
}

#[test]
fn arm64_exception_is_crossed_by_the_registers_that_it_saved() {
    let mut world = World::aarch64();
    let text = at::TEXT;
    let names = ["T_stext", "Thandler", "Tvector", "Tvictim", "Tcaller", "T_etext"];
    let symbols: Vec<_> = names
        .into_iter()
        .enumerate()
        .map(|(index, name)| (text + index as u64 * 0x100, name))
        .collect();
    world.put_symbols(&symbols);
    let (record, regs) = (at::STACK, at::STACK + 0x100);
    let made = regs + 304;
    world.put_u64(record, BASE + made);
    world.put_u64(record + 8, BASE + text + 0x210);
    let victims = BASE + made + 0x80;
    for (offset, value) in [
        (regs + 29 * 8, victims),
        (regs + 30 * 8, BASE + text + 0x330),
        (regs + 32 * 8, BASE + text + 0x304),
        (regs + 33 * 8, 0x5),
        (made, victims),
        (made + 8, BASE + text + 0x304),
        (made + 0x80, BASE + made + 0x200),
        (made + 0x88, BASE + text + 0x420),
    ] {
        world.put_u64(offset, value);
    }
    world.cpu(1, &[(29, BASE + record), (32, BASE + text + 0x180), (33, 0x3c5)]);
    let card = world.card();
    let trace = "  handler+0x80/0x100\n  vector+0x10/0x100\n  victim+0x4/0x100  (interrupted)\n  \
                 caller+0x20/0x100\nregisters";
    assert!(card.contains(trace), "{card}");
}
