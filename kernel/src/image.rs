//! The payload's own image in memory, as the linker script lays it out.

use core::ops::Range;

use crate::stack::Stack;
use crate::windows::PAGE;

/// Size of the payload's stack in bytes.
const STACK_SIZE: usize = 40 * 1024;

/// The stack of everything but exceptions.
pub static STACK: Stack<STACK_SIZE> = Stack::new();

unsafe extern "C" {
    pub static __image_start: u8;
    static __rodata_start: u8;
    static __data_start: u8;
    static __image_end: u8;
    pub static __bss_start: u8;
    pub static __bss_end: u8;
    pub static __rela_start: u8;
    pub static __rela_end: u8;
}

/// What a page of the image is for.
#[derive(Clone, Copy)]
pub enum Content {
    /// Code: executable.
    Code,
    /// Constants: neither executable nor writable.
    Constants,
    /// Data, stacks, tables and buffers: writable.
    Data,
}

/// The addresses of the image, physical and virtual.
pub fn range() -> Range<u64> {
    (&raw const __image_start as u64)..(&raw const __image_end as u64)
}

/// The pages of the image with what they are for, but for those below stacks: `is_trap_guard` tells
/// those that the architecture has for exceptions.
pub fn pages(is_trap_guard: impl Fn(u64) -> bool) -> impl Iterator<Item = (u64, Content)> {
    let constants = &raw const __rodata_start as u64;
    let data = &raw const __data_start as u64;
    let is_guard = move |page| page == STACK.guard() || is_trap_guard(page);
    range().step_by(PAGE as usize).filter(move |&page| !is_guard(page)).map(move |page| {
        let content = match page {
            _ if page < constants => Content::Code,
            _ if page < data => Content::Constants,
            _ => Content::Data,
        };
        (page, content)
    })
}
