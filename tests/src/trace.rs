//! Backtraces from different mouths, brought into one form.

use std::collections::BTreeMap;
use std::path::Path;

use anyhow::{Context, Result, ensure};

use crate::core_file::Symbols;

/// One function in a backtrace.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Frame {
    /// The function's name.
    pub function: String,
    /// The module that it is in; `None` for the kernel's image, and where the source does not say.
    pub module: Option<String>,
    /// Offset of the return address in it; `None` when the source does not say.
    pub offset: Option<u64>,
    /// The return address; `None` when the source does not say.
    pub address: Option<u64>,
    /// Whether the function has no frame of its own in the machine.
    pub inlined: bool,
}

impl Frame {
    /// A frame of its own at a place as it is printed: `vfs_write+0xc7/0x3f0`, `vfs_write+0xc7`,
    /// `virtblk_probe+0x56/0x98 [virtio_blk]`.
    #[must_use]
    pub fn at(place: &str) -> Option<Frame> {
        let (function, rest) = place.split_once("+0x")?;
        let mut words = rest.split_whitespace();
        let digits = words.next()?.split('/').next()?;
        let offset = u64::from_str_radix(digits, 16).ok()?;
        let module = words.next().and_then(|word| word.strip_prefix('[')?.strip_suffix(']'));
        (!function.contains(char::is_whitespace)).then(|| Frame {
            function: function.to_owned(),
            module: module.map(str::to_owned),
            offset: Some(offset),
            address: None,
            inlined: false,
        })
    }
}

/// The call trace that the kernel printed after its panic message. Entries with a question mark,
/// which it found on the stack and does not trust, are left out.
///
/// # Errors
/// When there is none.
pub fn of_kernel(text: &str) -> Result<Vec<Frame>> {
    let (_, after) = text.split_once("Kernel panic - not syncing").context("no panic message")?;
    in_report(after)
}

/// The call trace in a report of the kernel's, from the place itself on if it is about an exception.
///
/// # Errors
/// When there is none.
pub fn in_report(text: &str) -> Result<Vec<Frame>> {
    let mut frames = Vec::new();
    let mut lines = text.lines().filter_map(|line| Some(line.split_once("] ")?.1.trim()));
    loop {
        let said = lines.next().context("no call trace")?;
        // `Call Trace:` on x86_64, `Call trace:` on aarch64.
        if said.eq_ignore_ascii_case("call trace:") {
            break;
        }
        frames.extend(interrupted(said));
    }
    // x86_64 says which stack a part is on, and ends with </TASK>; registers may come in between.
    let mut has_end = false;
    for said in lines {
        // [    4.631844]  sysrq_handle_crash+0x16/0x20
        match Frame::at(said).or_else(|| interrupted(said)) {
            Some(frame) => frames.push(frame),
            None if said == "</TASK>" => break,
            None if said.starts_with('<') => has_end = true,
            None if said.starts_with('?') || has_end => {}
            None => break,
        }
    }
    ensure!(!frames.is_empty(), "no call trace in:\n{text}");
    Ok(frames)
}

/// Where x86_64 was in the kernel when an exception or an interrupt came: it says so among the
/// registers, and leaves the place out of the trace. (0x10 is the kernel's code segment.)
fn interrupted(said: &str) -> Option<Frame> {
    Frame::at(said.strip_prefix("RIP: 0010:")?)
}

/// The backtrace in the output of `host-analyzer bt`:
///
/// ```text
///     [inlined]          pde_write at ffffffffa55eacb6  fs/proc/inode.c:340
///  #5 [ff7578af80013a50] proc_reg_write+0x56 at ffffffffa55eacb6  fs/proc/inode.c:352
/// ```
///
/// # Errors
/// When there is none, or a line is not of this form.
pub fn of_analyzer(text: &str) -> Result<Vec<Frame>> {
    let mut frames = Vec::new();
    for line in text.lines().map(str::trim) {
        let inlined = line.starts_with("[inlined]");
        if !inlined && !line.starts_with('#') {
            continue;
        }
        // The first bracket closes `[inlined]` or the stack's address.
        let place = line.split_once(']').and_then(|(_, rest)| rest.trim_start().split_once(" at "));
        let (place, rest) = place.with_context(|| format!("not a frame: {line:?}"))?;
        let address = rest.split_whitespace().next().unwrap_or_default();
        let address =
            u64::from_str_radix(address, 16).with_context(|| format!("no address in {line:?}"))?;
        let frame = Frame::at(place).unwrap_or_else(|| Frame {
            function: place.to_owned(),
            module: None,
            offset: None,
            address: None,
            inlined,
        });
        frames.push(Frame { address: Some(address), ..frame });
    }
    ensure!(!frames.is_empty(), "no frames in:\n{text}");
    Ok(frames)
}

/// The backtraces in the output of `host-analyzer bt --all-tasks`, by the task's address.
///
/// # Errors
/// When there is none, or a line is not of the form that [`of_analyzer`] reads.
pub fn of_analyzer_by_task(text: &str) -> Result<BTreeMap<u64, Vec<Frame>>> {
    // PID: 1       TASK: ffff0000c02e8000  CPU: 0  COMMAND: "init"
    let mut tasks = BTreeMap::new();
    for part in text.split("PID: ").skip(1) {
        let address =
            part.split_once("TASK: ").and_then(|(_, rest)| rest.split_whitespace().next());
        let address = address.with_context(|| format!("no task's address in {part:?}"))?;
        let address = u64::from_str_radix(address, 16)?;
        tasks.insert(address, of_analyzer(part).unwrap_or_default());
    }
    ensure!(!tasks.is_empty(), "no tasks in:\n{text}");
    Ok(tasks)
}

/// The frames from the function that called `panic` down to the system call.
///
/// # Errors
/// When `panic` is not there.
pub fn from_crash(frames: &[Frame]) -> Result<&[Frame]> {
    let panic = frames.iter().position(|frame| frame.function == "panic");
    let panic = panic.with_context(|| format!("no panic in {frames:#?}"))?;
    Ok(&frames[panic + 1..])
}

/// Whether two backtraces are of the same places: ours, and the one that the kernel printed.
///
/// # Errors
/// When the kernel's symbols cannot be read.
pub fn agree(ours: &[Frame], printed: &[Frame], vmlinux: &Path) -> Result<bool> {
    let ours: Vec<_> = ours.iter().filter(|frame| !frame.inlined).collect();
    let mut agree = ours.len() == printed.len();
    for (ours, printed) in ours.into_iter().zip(printed) {
        agree = agree && same_place(ours, printed, vmlinux)?;
    }
    Ok(agree)
}

/// `function+0x16 [module]` of every frame that has one of its own, to compare and to show.
#[must_use]
pub fn listing(frames: &[Frame]) -> Vec<String> {
    let own = frames.iter().filter(|frame| !frame.inlined);
    own.map(|frame| {
        let offset = frame.offset.map(|offset| format!("+{offset:#x}")).unwrap_or_default();
        let module = frame.module.as_ref().map(|name| format!(" [{name}]")).unwrap_or_default();
        format!("{}{offset}{module}", frame.function)
    })
    .collect()
}

/// Whether a frame of ours and one that the kernel printed are the same return address. Where a
/// function's last instruction calls something that never returns, the address is already the next
/// function's, and that one is named by the kernel: `sysrq_reset_seq_param_set+0x0` on arm64 6.1.
///
/// # Errors
/// When `vmlinux` cannot be read or lacks a function.
pub fn same_place(ours: &Frame, printed: &Frame, vmlinux: &Path) -> Result<bool> {
    let place = |frame: &Frame| (frame.function.clone(), frame.module.clone(), frame.offset);
    if place(ours) == place(printed) {
        return Ok(true);
    }
    if printed.offset != Some(0) || printed.module.is_some() || ours.module.is_some() {
        return Ok(false);
    }
    let symbols = Symbols::read(vmlinux)?;
    let end = symbols.address(&ours.function)? + ours.offset.context("no offset")?;
    Ok(symbols.address(&printed.function)? == end)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn trace_of_an_arm64_kernel_ends_where_its_functions_do() {
        let text = "[    3.4] Kernel panic - not syncing: sysrq triggered crash\n\
                    [    3.4] CPU: 1 PID: 1 Comm: init\n[    3.4] Call trace:\n\
                    [    3.4]  dump_backtrace+0xe4/0x140\n[    3.4]  el0t_64_sync+0x18c/0x190\n\
                    [    3.4] SMP: stopping secondary CPUs\n[    3.4]  later+0x1/0x2\n";
        let frames = of_kernel(text).unwrap();
        assert_eq!(listing(&frames), ["dump_backtrace+0xe4", "el0t_64_sync+0x18c"]);
    }

    #[test]
    fn tasks_are_told_apart_by_their_addresses() {
        let text = "PID: 1       TASK: ffff0000c02e8000  CPU: 0  COMMAND: \"init\"\n \
                    #0 [ffff80000a7dbc90] __switch_to+0xc8 at ffffb18f4316a0a8\n\n\
                    PID: 2       TASK: ffff0000c02e9000  CPU: 0  COMMAND: \"kthreadd\"\n";
        let tasks = of_analyzer_by_task(text).unwrap();
        assert_eq!(listing(&tasks[&0xffff_0000_c02e_8000]), ["__switch_to+0xc8"]);
        assert!(tasks[&0xffff_0000_c02e_9000].is_empty());
    }

    #[test]
    fn entries_that_the_kernel_does_not_trust_are_left_out() {
        let text = "[    4.6] Kernel panic - not syncing: sysrq triggered crash\n\
                    [    4.6] Call Trace:\n[    4.6]  <TASK>\n[    4.6]  panic+0x118/0x2f4\n\
                    [    4.6]  ? _printk+0x68/0x83\n[    4.6]  sysrq_handle_crash+0x16/0x20\n\
                    [    4.6] RIP: 0033:0x47b7a0\n[    4.6]  </TASK>\n[    4.6]  later+0x1/0x2\n";
        let frames = of_kernel(text).unwrap();
        assert_eq!(listing(&frames), ["panic+0x118", "sysrq_handle_crash+0x16"]);
        assert_eq!(listing(from_crash(&frames).unwrap()), ["sysrq_handle_crash+0x16"]);
    }

    #[test]
    fn place_of_an_exception_comes_first_and_that_of_an_interrupt_where_it_came() {
        let text = "[    3.2] CPU: 0 PID: 1 Comm: init\n\
                    [    3.2] RIP: 0010:inner+0xa/0x20 [crash]\n[    3.2] Call Trace:\n\
                    [    3.2]  <IRQ>\n[    3.2]  asm_exc+0x1/0x2\n[    3.2]  </IRQ>\n\
                    [    3.2]  <TASK>\n[    3.2] RIP: 0010:idle+0xb/0x10\n\
                    [    3.2]  do_idle+0x3/0x4\n[    3.2] RIP: 0033:0x47b7a0\n\
                    [    3.2]  </TASK>\n";
        let frames = in_report(text).unwrap();
        let expected = ["inner+0xa [crash]", "asm_exc+0x1", "idle+0xb", "do_idle+0x3"];
        assert_eq!(listing(&frames), expected);
    }

    #[test]
    fn functions_of_modules_are_named_with_their_module() {
        let text = " #8 [ff4ccea640013a38] lockup+0xa [crash] at ffffffffc03040ea\n\
                     --- <IRQ stack> ---\n #10 [ff4ccea640013a90] set+0x94 at ffffffff95ebd7d4\n";
        assert_eq!(listing(&of_analyzer(text).unwrap()), ["lockup+0xa [crash]", "set+0x94"]);
    }

    #[test]
    fn inlined_frames_are_told_from_real_ones() {
        let text = "PID: 1\n    [inlined]          pde_write at ffffffffb65eacb6  inode.c:340\n \
                    #5 [ff5aeb20c0013dd0] proc_reg_write+0x56 at ffffffffb65eacb6  inode.c:352\n";
        let frames = of_analyzer(text).unwrap();
        assert_eq!(listing(&frames), ["proc_reg_write+0x56"]);
        assert_eq!(frames[1].address, Some(0xffff_ffff_b65e_acb6));
        assert!(frames[0].inlined);
    }
}
