//! The ways in which kernels die: whatever it was, the crash card on the console says what the kernel
//! itself said, and so does `host-analyzer bt`.
//!
//! The two are compared by one rule, on all of the frames, so that a frame too many, one too few or one
//! in the wrong order fails:
//!
//! - After a panic the kernel's trace begins in `dump_stack`, the card's in `__crash_kexec`. From the
//!   caller of `panic` outwards both must be the same to the end, and what the card has before it must
//!   be `panic`, called by nothing but `__crash_kexec`.
//! - An exception in process 1 starts the crash kernel before anything panics (oops_end() of
//!   arch/x86/kernel/dumpstack.c, die() of arch/arm64/kernel/traps.c, 6.1), with the exception's
//!   registers. Then both traces begin where it happened, and must be the same from end to end.
//!
//! The same frame is the same function of the same module and the same offset. Of a trace longer than
//! the card shows, both ends and the number of frames between them must fit.
//!
//! One thing bt knows better: see [`without_callers_from_lr`].
//!
//! The kernel's words are taken from its log in the dump, which drgn reads: what it says in an NMI and
//! after a double fault never reaches the console, because the crash kernel starts before.
//!
//! There is no NMI on aarch64: Debian builds its kernels without CONFIG_ARM64_PSEUDO_NMI.

use std::collections::BTreeMap;
use std::path::PathBuf;

use anyhow::{Context, Result, ensure};
use serde_json::{Value, json};
use tests::card::Card;
use tests::crash::{Crashed, analyzer, bench, directory};
use tests::trace::{self, Frame, from_crash, listing, same_place};
use tests::{module, peers, stories};
use xtask::dump::{DUMP, Workbench};
use xtask::guest::{Scenario, Trigger};
use xtask::qemu::Vm;
use xtask::workspace;

stories! {
    x86_64:
        sysrq,
        null_pointer_in_a_module,
        bug_in_a_module,
        twenty_arguments_of_a_function_in_a_module,
        stack_overflow_in_a_module,
        soft_lockup_in_a_module,
        panic_beside_a_cpu_that_hears_nothing,
        panic_in_an_interrupt,
        panic_in_an_nmi;
    aarch64:
        sysrq,
        null_pointer_in_a_module,
        bug_in_a_module,
        twenty_arguments_of_a_function_in_a_module,
        stack_overflow_in_a_module,
        soft_lockup_in_a_module,
        panic_beside_a_cpu_that_hears_nothing,
        panic_in_an_interrupt,
        panic_in_an_interrupt_of_6_12;
}

fn sysrq(arch: &'static str) -> Result<()> {
    Death {
        name: "sysrq",
        says: "Kernel panic - not syncing: sysrq triggered crash",
        through: &["write_sysrq_trigger"],
        ..Death::usual()
    }
    .is_told(arch)
}

fn null_pointer_in_a_module(arch: &'static str) -> Result<()> {
    Death {
        name: "null",
        trigger: Trigger::Shell("echo 1 > /sys/module/crash/parameters/null"),
        says: match arch {
            "x86_64" => "BUG: kernel NULL pointer dereference, address: 0000000000000008",
            _ => "Unable to handle kernel NULL pointer dereference at virtual address",
        },
        through: &["null_deepest", "null_middle", "set_null"],
        ..Death::usual()
    }
    .is_told(arch)
}

fn bug_in_a_module(arch: &'static str) -> Result<()> {
    Death {
        name: "bug",
        trigger: Trigger::Shell("echo 1 > /sys/module/crash/parameters/bug"),
        says: "kernel BUG at crash_module.s:42!",
        through: &["bug_deepest", "set_bug"],
        ..Death::usual()
    }
    .is_told(arch)
}

/// It faults on its first line: all of its arguments are shown, without a vmlinux, each with where it is from.
fn twenty_arguments_of_a_function_in_a_module(arch: &'static str) -> Result<()> {
    const ARGUMENTS: usize = 20;
    let death = Death {
        name: "many",
        trigger: Trigger::Shell("echo 1 > /sys/module/crash/parameters/many"),
        says: match arch {
            "x86_64" => "BUG: unable to handle page fault for address: 000000aa00000101",
            _ => "Unable to handle kernel paging request at virtual address 000000aa00000101",
        },
        through: &["many_pointers", "set_many"],
        ..Death::usual()
    };
    death.is_told(arch)?;
    let dump = workspace().join("target/boot-tests").join(death.place(arch)).join("dump.elf");
    let mut command = analyzer()?.command(&["whatis"], &dump, None);
    let prototype = xtask::process::output(command.arg("many_pointers"))?;
    ensure!(prototype.starts_with("void many_pointers(void *pointer_1, "), "{prototype}");
    let said = analyzer()?.run(&["bt", "--args", "--json"], &dump, None)?;
    let said: Value = serde_json::from_str(&said)?;
    let frames = said["backtraces"][0]["frames"].as_array().context("no frames")?;
    let frame = frames.iter().find(|it| it["function"] == "many_pointers").context("no frame")?;
    let arguments = frame["arguments"].as_array().context("no arguments")?;
    ensure!(arguments.len() == ARGUMENTS, "{} arguments: {frame:#}", arguments.len());
    let registers: &[&str] = match arch {
        "x86_64" => &["rdi", "rsi", "rdx", "rcx", "r8", "r9"],
        _ => &["x0", "x1", "x2", "x3", "x4", "x5", "x6", "x7"],
    };
    for (index, argument) in arguments.iter().enumerate() {
        let number = index + 1;
        let value = format!("{:#x}", 0xaa_0000_0000_u64 + number as u64 * 0x101);
        let from = argument["from"].as_str().unwrap_or_default();
        let expected = registers.get(index).map_or(from.starts_with("at "), |it| *it == from);
        ensure!(
            argument["name"] == format!("pointer_{number}")
                && argument["type"] == "void *"
                && argument["value"] == value
                && expected,
            "argument {number}: {argument:#}"
        );
    }
    Ok(())
}

fn stack_overflow_in_a_module(arch: &'static str) -> Result<()> {
    Death {
        name: "overflow",
        trigger: Trigger::Shell("echo 1 > /sys/module/crash/parameters/overflow"),
        says: match arch {
            "x86_64" => "BUG: TASK stack guard page was hit",
            _ => "Kernel panic - not syncing: kernel stack overflow",
        },
        through: &["overflow_deeper", "set_overflow"],
        ..Death::usual()
    }
    .is_told(arch)
}

fn soft_lockup_in_a_module(arch: &'static str) -> Result<()> {
    Death {
        name: "lockup",
        // Not before the crash: emulated boots are slow.
        before: "echo 1 > /proc/sys/kernel/watchdog_thresh\n\
                 echo 1 > /proc/sys/kernel/softlockup_panic\n",
        trigger: Trigger::Shell("echo 1 > /sys/module/crash/parameters/lockup"),
        says: "Kernel panic - not syncing: softlockup: hung tasks",
        through: &["hrtimer_interrupt", "lockup_forever", "set_lockup"],
        ..Death::usual()
    }
    .is_told(arch)
}

/// The other CPU has its interrupts off for good. x86_64 stops it by an NMI; on aarch64 it goes on for as long as
/// the payload runs.
fn panic_beside_a_cpu_that_hears_nothing(arch: &'static str) -> Result<()> {
    Death {
        name: "deaf",
        // No sleep: that CPU may be the one that keeps the time.
        before: "taskset -c 1 sh -c 'echo 1 > /sys/module/crash/parameters/spin' &\n\
                 i=0; while [ $i -lt 20000 ]; do i=$((i + 1)); done\n",
        trigger: Trigger::SysrqOnCpu(0),
        says: "Kernel panic - not syncing: sysrq triggered crash",
        through: &["__handle_sysrq"],
        ..Death::usual()
    }
    .is_told(arch)
}

fn panic_in_an_interrupt(arch: &'static str) -> Result<()> {
    IN_INTERRUPT.is_told(arch)
}

fn panic_in_an_interrupt_of_6_12(arch: &'static str) -> Result<()> {
    Death { name: "interrupt-6_12", kernel: Some("6_12"), ..IN_INTERRUPT }.is_told(arch)
}

fn panic_in_an_nmi(arch: &'static str) -> Result<()> {
    Death {
        name: "nmi",
        before: "echo 1 > /proc/sys/kernel/unknown_nmi_panic\n",
        trigger: Trigger::FromOutside,
        outside: |vm| vm.qmp("inject-nmi", json!({})).map(drop),
        says: "Kernel panic - not syncing: NMI: Not continuing",
        through: &["exc_nmi"],
        ..Death::usual()
    }
    .is_told(arch)
}

/// SysRq and `c` over the serial line: the handler of the port's interrupt panics.
const IN_INTERRUPT: Death = Death {
    name: "interrupt",
    trigger: Trigger::FromOutside,
    outside: |vm| {
        vm.monitor("chardev-send-break serial0")?;
        vm.type_in(b"c")
    },
    says: "Kernel panic - not syncing: sysrq triggered crash",
    through: &["__handle_sysrq", "handle_irq_event"],
    ..Death::usual()
};

/// A way to die, and what must be told of it.
#[derive(Clone, Copy)]
struct Death {
    name: &'static str,
    /// The kernel, if not the architecture's usual one.
    kernel: Option<&'static str>,
    /// What the guest runs before.
    before: &'static str,
    trigger: Trigger,
    /// What is done to the machine when the guest waits for it.
    outside: fn(&mut Vm) -> Result<()>,
    /// What the panic line or the line of the cause must contain.
    says: &'static str,
    /// Functions that the trace must have, without the parts that compilers split off: else it was
    /// another death.
    through: &'static [&'static str],
}

impl Death {
    const fn usual() -> Death {
        Death {
            name: "",
            kernel: None,
            before: "",
            trigger: Trigger::Sysrq,
            outside: |_| Ok(()),
            says: "",
            through: &[],
        }
    }

    /// Dies so, and compares what is told of it.
    fn is_told(self, arch: &'static str) -> Result<()> {
        let witnesses = self.witnesses(bench(arch)?)?;
        witnesses.head_is_right(self.says)?;
        witnesses.registers_are_right()?;
        witnesses.trace_is_right(self.through)
    }

    /// Where its files are, below those of all boot tests.
    fn place(&self, arch: &str) -> String {
        format!("crashes/{arch}-{}", self.name)
    }

    fn witnesses(self, bench: &Workbench) -> Result<Witnesses> {
        let mut scenario = Scenario {
            before: self.before.to_owned(),
            trigger: self.trigger,
            memory_mib: 256,
            ..bench.scenario()
        };
        let directory = directory(&self.place(&bench.target.arch))?;
        match self.kernel {
            Some(kernel) => scenario.kernel = kernel.to_owned(),
            None => {
                scenario.modules.push(module::build(bench, &scenario, &directory)?);
            }
        }
        // Before the boot: fetching it may bring a newer kernel too.
        let vmlinux = bench.vmlinux(&scenario)?;
        let disk = bench.reserved_disk(&scenario, &directory, "disk.img")?;
        let mut vm = bench.guest().boot(&scenario, vec![disk.clone()], &directory)?;
        (self.outside)(&mut vm)?;
        let end = vm.wait_for_end(DUMP)?;
        let crashed = Crashed { console: vm.quit()?, end };
        crashed.expect_payload_line("complete after")?;
        let dump = bench.loader.save(&disk.image, &directory)?;
        std::fs::remove_file(&disk.image)?;

        let log = peers::kernel_log(&bench.fixtures, &dump, &vmlinux)?;
        let mut lines = crashed.payload_lines();
        lines.retain(|line| !line.ends_with("(caller in x30)"));
        let card = Card::read(&lines)?;
        let said = analyzer()?.run(&["bt"], &dump, None)?;
        let backtrace = trace::of_analyzer(&without_callers_from_lr(&said))?;
        Ok(Witnesses { log, card, backtrace, vmlinux })
    }
}

/// What there is to compare.
struct Witnesses {
    /// What the kernel said.
    log: String,
    /// What the payload printed.
    card: Card,
    /// What `host-analyzer bt` shows.
    backtrace: Vec<Frame>,
    vmlinux: PathBuf,
}

impl Witnesses {
    fn head_is_right(&self, says: &str) -> Result<()> {
        let head = &self.card.head;
        let line = |name: &str| head.get(name).map(String::as_str).unwrap_or_default();
        ensure!(self.report()?.contains(line("kernel")), "another kernel: {head:#?}");
        match self.panic() {
            // The card has the time in front, as the log does.
            Some(panic) => ensure!(line("panic") == panic, "the panic is {panic:?}: {head:#?}"),
            None => ensure!(line("panic").is_empty(), "there was no panic: {head:#?}"),
        }
        ensure!(
            line("panic").contains(says) || line("cause").contains(says),
            "no {says:?}: {head:#?}"
        );
        let log: Vec<&str> = self.log.lines().map(str::trim_end).collect();
        let card: Vec<&str> = self.card.log.iter().map(String::as_str).collect();
        ensure!(card.len() > 40, "not much of a log: {card:#?}");
        for (card, log) in card.iter().rev().zip(log.iter().rev()) {
            // The card has the time on every line of a record, drgn on its first one; and the card has no
            // control characters.
            let log = log.replace(char::is_control, "?");
            let text = card.split_once("] ").map(|(_, text)| text);
            let same = *card == log || text == Some(&log);
            ensure!(same, "not the log's end: {card:?} where the log has {log:?}");
        }

        // CPU: 0 PID: 1 Comm: init Kdump: loaded Tainted: G           OE      6.1.0-56-cloud-amd64 #1
        let who = self.report()?.lines().next().unwrap_or_default();
        let between = |start: &str, end: &str| {
            let found = who.split_once(start).and_then(|(_, rest)| rest.split_once(end));
            found.map(|(found, _)| found.trim()).with_context(|| format!("no {start:?} in {who:?}"))
        };
        let (cpu, pid) = (between("CPU: ", " ")?, between("PID: ", " ")?);
        let expected =
            format!("CPU {cpu}, PID {pid}, command \"{}\"", between("Comm: ", " Kdump:")?);
        ensure!(line("task").starts_with(&expected), "not {expected:?}: {head:#?}");
        Ok(())
    }

    /// There are all of them; those of an exception are the ones that the kernel printed.
    fn registers_are_right(&self) -> Result<()> {
        let ours = &self.card.registers;
        let count = if ours.contains_key("rip") { 22 } else { 34 };
        ensure!(ours.len() == count, "{} registers and not {count}: {ours:#x?}", ours.len());
        if self.panic().is_some() {
            return Ok(());
        }
        let printed = printed_registers(self.report()?);
        let shared: Vec<&String> = printed.keys().filter(|name| ours.contains_key(*name)).collect();
        ensure!(shared.len() >= 16, "only {shared:?} of {ours:#x?}");
        for name in shared {
            ensure!(ours[name] == printed[name], "{name}: {ours:#x?}\nkernel: {printed:#x?}");
        }
        Ok(())
    }

    /// By the rule above.
    fn trace_is_right(&self, through: &[&str]) -> Result<()> {
        let printed = trace::in_report(self.report()?)?;
        for wanted in through {
            let is_it = |frame: &Frame| frame.function.split('.').next() == Some(wanted);
            ensure!(printed.iter().any(is_it), "not through {wanted}: {:#?}", listing(&printed));
        }
        let Card { first, left_out, last, .. } = &self.card;
        if self.panic().is_none() {
            self.same(first, *left_out, last, &printed).context("the card")?;
            return self.same(&self.backtrace, 0, &[], &printed).context("host-analyzer bt");
        }
        let printed = from_crash(&printed)?;
        self.same(since_panic(first)?, *left_out, last, printed).context("the card")?;
        let backtrace = since_panic(&self.backtrace)?;
        self.same(backtrace, 0, &[], printed).context("host-analyzer bt")
    }

    /// Fails unless `first`, then `left_out` more and `last` are the frames that were printed.
    fn same(
        &self,
        first: &[Frame],
        left_out: usize,
        last: &[Frame],
        printed: &[Frame],
    ) -> Result<()> {
        let mut agree = first.len() + left_out + last.len() == printed.len();
        let outermost = printed.iter().skip(first.len() + left_out);
        let pairs = first.iter().zip(printed).chain(last.iter().zip(outermost));
        for (ours, printed) in pairs {
            agree &= same_place(ours, printed, &self.vmlinux)?;
        }
        let (first, last, printed) = (listing(first), listing(last), listing(printed));
        ensure!(
            agree,
            "it has\n{first:#?}, {left_out} left out,\n{last:#?}\nthe kernel printed\n{printed:#?}"
        );
        Ok(())
    }

    /// The kernel's last report, from the line that says who died.
    fn report(&self) -> Result<&str> {
        let lines = self.log.match_indices(" Comm: ");
        let at = lines.last().context("nobody died")?.0;
        Ok(&self.log[self.log[..at].rfind('\n').map_or(0, |end| end + 1)..])
    }

    /// The panic's line.
    fn panic(&self) -> Option<&str> {
        self.log.lines().find(|line| line.contains("] Kernel panic - not syncing"))
    }
}

/// The frames from the function that called `panic` on, when nothing but `__crash_kexec` was called
/// by `panic`.
fn since_panic(frames: &[Frame]) -> Result<&[Frame]> {
    let inner = frames.iter().take_while(|frame| frame.function != "panic");
    let inner: Vec<&str> = inner.map(|frame| frame.function.as_str()).collect();
    ensure!(inner == ["__crash_kexec"], "panic called {inner:?}");
    from_crash(frames)
}

/// `RSP: 0018:ff72f93040013ba0 EFLAGS: 00000246`, `sp : ffff80000802b920`,
/// `x29: ffff80000802b920 x28: ffff000002cd0000 `: the first ones, which are the exception's.
fn printed_registers(report: &str) -> BTreeMap<String, u64> {
    let mut registers = BTreeMap::new();
    for line in report.lines().filter_map(|line| line.split_once("] ")) {
        let line = line.1.replace(" :", ":");
        let words: Vec<&str> = line.split_whitespace().collect();
        for pair in words.windows(2) {
            let [name, value] = pair else { continue };
            let value = value.rsplit(':').next().unwrap_or_default();
            if let (Some(name), 16, Ok(value)) =
                (name.strip_suffix(':'), value.len(), u64::from_str_radix(value, 16))
            {
                // The bases of the segments stand in the lines of FS and GS.
                let name = name.to_lowercase().replace("r0", "r");
                registers.entry(name).or_insert(value);
            }
        }
    }
    registers
}

/// What `bt` says without the callers that it has from lr alone: where an arm64 function was interrupted
/// before it had a frame, the kernel's own trace lacks its caller. The card has the same ones, in x30.
fn without_callers_from_lr(said: &str) -> String {
    let mut is_from_lr = false;
    let kept = said.lines().filter(|line| {
        let dropped = std::mem::replace(&mut is_from_lr, line.contains("caller from lr"));
        !dropped
    });
    kept.flat_map(|line| [line, "\n"]).collect()
}
