//! A crash in an interrupt that came while a function without a frame of its own ran: its caller is
//! in a register only.

use std::ops::Range;
use std::thread::sleep;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use tests::crash::{analyzer, bench, directory};
use tests::peers;
use tests::trace::{Frame, of_analyzer};
use xtask::dump::DUMP;
use xtask::guest::{Scenario, Trigger};
use xtask::qemu::Vm;

/// Reading /dev/zero is nearly all spent in this function, which calls none and keeps no frame.
const LEAF: &str = "__arch_clear_user";

/// What calls it.
const CALLER: &str = "read_zero";

/// The flag register of the `virt` machine's PL011, and its bit for "nothing received" (PrimeCell
/// UART PL011 Technical Reference Manual, 3.3.3).
const UART_FLAGS: &str = "xp /1wx 0x9000018";
const RECEIVER_EMPTY: u64 = 0x10;

/// How long the guest runs between two looks at its program counter.
const INTERVAL: Duration = Duration::from_millis(10);

/// SysRq and `c` come over the serial line. The `c` is sent while CPU 0, which takes the serial
/// port's interrupts, stands still inside the function: its interrupt is the first thing that
/// happens when it goes on.
#[test]
fn caller_of_an_interrupted_leaf_is_shown() -> Result<()> {
    let bench = bench("aarch64")?;
    let scenario = Scenario {
        before: format!(
            "grep -A 9 ' {LEAF}$' /proc/kallsyms | while read -r line; do say \"symbol $line\"; done\n\
             for cpu in 0 1; do\n\
             taskset -c $cpu dd if=/dev/zero of=/dev/null bs=1M &\n\
             done"
        ),
        trigger: Trigger::FromOutside,
        ..bench.scenario()
    };
    let vmlinux = bench.vmlinux(&scenario)?;
    let directory = directory("interrupted/leaf")?;
    let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
    let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
    let leaf = leaf_in(&vm.console.text())?;
    sysrq_crash_inside(&mut vm, &leaf)?;
    let end = vm.wait_for_end(DUMP)?;
    let text: String = vm.quit()?.into_iter().map(|line| line.text + "\n").collect();
    ensure!(end == "guest-reset" && text.contains("tinykdump: complete\n"), "{end}:\n{text}");

    let dump = bench.loader.save(&disk.image, &directory)?;
    std::fs::remove_file(&disk.image)?;
    let ours = functions(&of_analyzer(&analyzer()?.run(&["bt"], &dump, None)?)?);
    let at = ours.iter().position(|function| function == LEAF);
    let at = at.with_context(|| format!("no {LEAF} in {ours:#?}"))?;
    ensure!(ours.get(at + 1).is_some_and(|function| function == CALLER), "{ours:#?}");
    ensure!(ours[..at].iter().any(|function| function == "el1h_64_irq"), "{ours:#?}");

    // drgn's stack is the same, but for that caller, which drgn 0.3.0 does not see.
    let theirs = functions(&peers::drgn(&bench.fixtures, &dump, &vmlinux)?);
    let mut without_caller = ours.clone();
    without_caller.remove(at + 1);
    let same = |ours: &[String]| {
        ours.len() == theirs.len() && ours.iter().zip(&theirs).all(|(a, b)| a.starts_with(b))
    };
    ensure!(same(&ours) || same(&without_caller), "ours\n{ours:#?}\ndrgn\n{theirs:#?}");
    Ok(())
}

/// Names of the functions that have a frame of their own.
fn functions(frames: &[Frame]) -> Vec<String> {
    let own = frames.iter().filter(|frame| !frame.inlined);
    own.map(|frame| frame.function.clone()).collect()
}

/// The addresses of [`LEAF`], from the symbols that the guest printed.
fn leaf_in(console: &str) -> Result<Range<u64>> {
    // [    2.1] guest: symbol ffffb18f42f9c000 T __arch_clear_user
    let symbols = console.lines().filter_map(|line| line.split_once("guest: symbol "));
    let addresses: Vec<u64> = symbols
        .filter_map(|(_, symbol)| u64::from_str_radix(symbol.split_whitespace().next()?, 16).ok())
        .collect();
    let start = *addresses.first().with_context(|| format!("no {LEAF} in:\n{console}"))?;
    let end = addresses.iter().find(|&&address| address > start);
    Ok(start..*end.context("no symbol behind it")?)
}

/// Sends SysRq, stops CPU 0 inside `leaf`, sends `c` and lets it go on.
fn sysrq_crash_inside(vm: &mut Vm, leaf: &Range<u64>) -> Result<()> {
    vm.monitor("chardev-send-break serial0")?;
    // The kernel has seen the break when it has taken it out of the receiver.
    wait_for_receiver(vm, true)?;
    let give_up = Instant::now() + DUMP;
    loop {
        vm.pause()?;
        if leaf.contains(&program_counter(vm)?) {
            break;
        }
        ensure!(Instant::now() < give_up, "CPU 0 was never seen in {leaf:#x?}");
        vm.resume()?;
        sleep(INTERVAL);
    }
    vm.type_in(b"c")?;
    wait_for_receiver(vm, false)?;
    vm.resume()
}

fn wait_for_receiver(vm: &mut Vm, empty: bool) -> Result<()> {
    let give_up = Instant::now() + DUMP;
    loop {
        // 0000000009000018: 0x00000090
        let said = vm.monitor(UART_FLAGS)?;
        let flags = said.trim().rsplit("0x").next().unwrap_or_default();
        let flags = u64::from_str_radix(flags, 16).with_context(|| format!("flags in {said:?}"))?;
        if (flags & RECEIVER_EMPTY != 0) == empty {
            return Ok(());
        }
        ensure!(Instant::now() < give_up, "the serial port's flags stay {flags:#x}");
        sleep(INTERVAL);
    }
}

/// Where CPU 0 is.
fn program_counter(vm: &mut Vm) -> Result<u64> {
    let said = vm.monitor("info registers")?;
    let (_, after) = said.split_once("PC=").with_context(|| format!("no PC in {said}"))?;
    let digits = after.split_whitespace().next().unwrap_or_default();
    Ok(u64::from_str_radix(digits, 16)?)
}
