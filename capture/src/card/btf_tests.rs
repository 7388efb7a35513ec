//! Types in a few hundred bytes.

use super::super::testing::{BASE, World, at};
use super::*;

#[test]
fn members_are_found_by_name_in_one_pass() {
    let mut world = World::x86_64();
    let end = world.put_types(&[
        ("other", &[("pid", 4)]),
        ("task_struct", &[("state", 0), ("pid", 1234), ("comm", 2000)]),
        ("rq", &[("nr", 0)]),
    ]);
    let wanted = [("task_struct", "comm"), ("rq", "curr"), ("task_struct", "pid"), ("none", "pid")];
    let found = world
        .memory(|memory, _| offsets(memory, (BASE + at::TYPES, BASE + end), &wanted, &|_| false));
    assert_eq!(found, [Some(2000), None, Some(1234), None]);
}

#[test]
fn search_ends_when_enough_is_known() {
    let mut world = World::x86_64();
    let end = world.put_types(&[("rq", &[("curr", 8)]), ("task_struct", &[("pid", 16)])]);
    let (section, wanted) =
        ((BASE + at::TYPES, BASE + end), [("rq", "curr"), ("task_struct", "pid")]);
    let found =
        world.memory(|memory, _| offsets(memory, section, &wanted, &|found| found[0].is_some()));
    assert_eq!(found, [Some(8), None]);
}

#[test]
fn member_of_an_anonymous_union_is_found_in_the_second_pass() {
    let mut world = World::x86_64();
    // struct rq { nr; union { donor; curr; } at 24; }: the union is type 2.
    let end =
        world.put_types(&[("rq", &[("nr", 0), ("", 24)]), ("", &[("donor", 0), ("curr", 8)])]);
    let member = at::TYPES + 24 + 12 + 12;
    world.put_u32(member, 0);
    world.put_u32(member + 4, 2);
    let union = at::TYPES + 24 + 12 + 24;
    world.put_u32(union + 4, 5 << 24 | 2);
    let section = (BASE + at::TYPES, BASE + end);
    let found = world.memory(|memory, _| offsets(memory, section, &[("rq", "curr")], &|_| false));
    assert_eq!(found, [Some(32)]);
}

#[test]
fn what_is_no_btf_has_no_members() {
    let world = World::x86_64();
    let section = (BASE + at::TYPES, BASE + at::TYPES + 100);
    let found = world.memory(|memory, _| offsets(memory, section, &[("rq", "curr")], &|_| false));
    assert_eq!(found, [None]);
}
