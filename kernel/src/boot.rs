//! What every architecture tells the rest of the payload about how it was started.

use capture::OldPhys;
use capture::options::MAX_COMMAND_LINE;
use drivers::PhysAddr;
use drivers::firmware::Firmware;
use heapless::String;
use spin::Once;

use crate::memory::PhysicalMemory;

/// How the payload was started, in terms that no architecture owns.
pub struct BootInfo {
    /// The command line.
    pub command_line: CommandLine,
    /// Where `elfcorehdr` lies, if that is told beside the command line.
    pub elfcorehdr: Option<OldPhys>,
    /// The handoff, which travels as the initrd: where it is, and its size in bytes.
    pub handoff: Option<(PhysAddr, u64)>,
    /// What the boot protocol itself told about the machine.
    pub firmware: Firmware,
    /// Root pointer of the ACPI tables, if the machine has them.
    pub acpi_root: Option<PhysAddr>,
    /// Physical memory, of which nothing but the payload's own is known yet.
    pub memory: PhysicalMemory<'static>,
    /// Bytes of memory that the payload uses: image, stacks, tables and buffers.
    pub image_size: u64,
}

/// What was told at the start, for as long as the payload runs: too much for its stack.
static BOOT: Once<BootInfo> = Once::new();

impl BootInfo {
    /// Keeps what `told` gives. To be called once.
    #[inline(never)]
    pub fn keep(told: impl FnOnce() -> BootInfo) -> &'static BootInfo {
        BOOT.call_once(told)
    }

    /// What was kept.
    pub fn kept() -> Option<&'static BootInfo> {
        BOOT.get()
    }
}

/// The command line; a byte that is not ASCII stands as `?`, so that the word which it spoils is
/// refused and the others are understood.
#[derive(Default)]
pub struct CommandLine(pub String<MAX_COMMAND_LINE>);

impl CommandLine {
    /// Takes over the bytes before the first zero, as many as there is room for.
    pub fn until_zero(bytes: impl Iterator<Item = u8>) -> CommandLine {
        let mut line = String::new();
        for byte in bytes.take_while(|&byte| byte != 0) {
            let character = if byte.is_ascii() { char::from(byte) } else { '?' };
            if line.push(character).is_err() {
                break;
            }
        }
        CommandLine(line)
    }
}
