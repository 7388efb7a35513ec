//! What the commands say of the kernel's objects, without vmlinux, against drgn with it.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use serde_json::Value;
use tests::crash::{Dumped, analyzer, bench, once};
use tests::objects::{self, Objects, difference};
use tests::{stories, variables};
use xtask::guest::Scenario;

stories! {
    x86_64:
        structures_have_the_values_that_drgn_reads,
        files_and_memory_areas_are_those_that_drgn_sees,
        addresses_lead_where_drgn_says,
        times_of_tasks_are_those_that_drgn_reads,
        arguments_and_locals_are_those_that_drgn_reads,
        objects_on_stacks_are_in_the_caches_that_drgn_finds,
        options_of_bt_show_the_stack_that_the_frames_are_on,
        structures_of_modules_have_their_values;
    aarch64:
        structures_have_the_values_that_drgn_reads,
        files_and_memory_areas_are_those_that_drgn_sees,
        addresses_lead_where_drgn_says,
        times_of_tasks_are_those_that_drgn_reads,
        arguments_and_locals_are_those_that_drgn_reads,
        objects_on_stacks_are_in_the_caches_that_drgn_finds,
        options_of_bt_show_the_stack_that_the_frames_are_on;
}

/// A crash, and what drgn reads of it.
struct Witnessed {
    dumped: Dumped,
    objects: Objects,
}

/// The crashes of an architecture: aarch64 has an older and a newer kernel.
fn on(arch: &'static str) -> Result<Vec<&'static Witnessed>> {
    static X86_64: OnceLock<Result<Witnessed, String>> = OnceLock::new();
    static AARCH64: OnceLock<Result<Witnessed, String>> = OnceLock::new();
    static NEWER: OnceLock<Result<Witnessed, String>> = OnceLock::new();
    let make = |name: &str, scenario: Scenario| {
        let bench = bench(arch)?;
        let dumped = Dumped::new(bench, &format!("commands/{name}"), scenario)?;
        let objects = objects::of_drgn(&bench.fixtures, &dumped.dump, dumped.vmlinux()?)?;
        Ok(Witnessed { dumped, objects })
    };
    let scenario = bench(arch)?.scenario();
    if arch == "x86_64" {
        return Ok(vec![once(&X86_64, || make("x86_64", scenario))?]);
    }
    let (kernel, machine) = ("6_12".into(), "max-el2-gic3-mmio1".into());
    let newer = Scenario { kernel, machine, ..scenario.clone() };
    let older = once(&AARCH64, || make("aarch64", scenario))?;
    Ok(vec![older, once(&NEWER, || make("aarch64-6_12", newer))?])
}

impl Witnessed {
    /// What a command says as JSON.
    fn says(&self, command: &[&str], words: &[&str]) -> Result<Value> {
        let mut run = analyzer()?.command(command, &self.dumped.dump, None);
        let text = xtask::process::output(run.arg("--json").args(words))?;
        serde_json::from_str(&text).with_context(|| format!("{command:?} {words:?} said {text}"))
    }
}

/// Every member of large structures: bit fields, enumerations, unions, arrays.
fn structures_have_the_values_that_drgn_reads(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        ensure!(crash.objects.structures.len() > 10, "drgn read few: {:?}", crash.objects.sizes);
        for (name, address, theirs) in &crash.objects.structures {
            let said = crash.says(&["struct"], &[name, &format!("{address:#x}")])?;
            if let Some(difference) = difference(&said[0]["value"], theirs) {
                anyhow::bail!("{name} at {address:#x}, ours and drgn's: {difference}");
            }
        }
        for (name, size) in &crash.objects.sizes {
            let said = crash.says(&["struct"], &[name])?;
            ensure!(said["size"] == *size, "{name} has {size} bytes, not {}", said["size"]);
        }
    }
    Ok(())
}

fn files_and_memory_areas_are_those_that_drgn_sees(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let said = crash.says(&["files"], &["1"])?;
        let files = said[0]["files"].as_array().context("no files")?;
        let ours: Vec<_> = files
            .iter()
            .map(|it| {
                Some((u32::try_from(it["fd"].as_u64()?).ok()?, it["path"].as_str()?.to_owned()))
            })
            .collect::<Option<_>>()
            .with_context(|| said.to_string())?;
        ensure!(
            !ours.is_empty() && ours == crash.objects.files,
            "{ours:?}, {:?}",
            crash.objects.files
        );

        let said = crash.says(&["vm"], &["1"])?;
        let areas = said[0]["areas"].as_array().context("no areas")?;
        let area = |it: &Value| {
            let file = it["file"].as_str().map(str::to_owned);
            Some((hexadecimal(&it["start"])?, hexadecimal(&it["end"])?, file))
        };
        let ours: Vec<_> = areas.iter().map(area).collect::<Option<_>>().context("no addresses")?;
        ensure!(
            ours.len() > 5 && ours == crash.objects.areas,
            "{ours:x?}, {:x?}",
            crash.objects.areas
        );
    }
    Ok(())
}

fn addresses_lead_where_drgn_says(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let mut ours = BTreeMap::new();
        for (name, &at) in &crash.objects.symbols {
            let said = crash.says(&["vtop"], &[&format!("{at:#x}")])?;
            ours.insert(name.clone(), hexadecimal(&said[0]["physical"]).context("no address")?);
            // Functions are in every kernel's table; variables are not.
            if ["schedule", "panic"].contains(&name.as_str()) {
                let said = crash.says(&["sym"], &[name])?;
                ensure!(said[0]["address"] == format!("{at:016x}"), "{name} is at {at:x}: {said}");
                let said = crash.says(&["sym"], &[&format!("{:x}", at + 4)])?;
                ensure!(said[0]["name"] == *name && said[0]["offset"] == 4, "{said}");
            }
        }
        ensure!(ours == crash.objects.physical, "{ours:x?}, {:x?}", crash.objects.physical);
        ensure!(!crash.objects.of_process.is_empty(), "drgn sees nothing mapped");
        for (at, theirs) in &crash.objects.of_process {
            let said = crash.says(&["vtop", "--task", "1"], &[&format!("{at:#x}")])?;
            let ours = hexadecimal(&said[0]["physical"]);
            ensure!(ours == Some(*theirs), "{at:#x} leads to {theirs:#x}, we say {said}");
        }
    }
    Ok(())
}

fn times_of_tasks_are_those_that_drgn_reads(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let said = crash.says(&["ps", "-l"], &[])?;
        let tasks = said["tasks"].as_array().context("no tasks")?;
        let fields = ["start_time", "utime", "stime", "last_run"];
        let times = |task: &Value| {
            let numbers = fields.map(|field| task[field].as_u64());
            let numbers: Option<Vec<u64>> = numbers.into_iter().collect();
            Some((hexadecimal(&task["task"])?, <[u64; 4]>::try_from(numbers?).ok()?))
        };
        let ours: Option<Vec<_>> = tasks.iter().map(times).collect();
        let ours = ours.with_context(|| format!("a time is missing: {said:#}"))?;
        let last_runs = ours.iter().map(|(_, times)| times[3]);
        ensure!(last_runs.is_sorted_by(|earlier, later| earlier >= later), "{ours:x?}");
        let idle =
            |at: u64| tasks.iter().any(|it| hexadecimal(&it["task"]) == Some(at) && it["pid"] == 0);
        let ours: BTreeMap<_, _> = ours.into_iter().filter(|(at, _)| !idle(*at)).collect();
        ensure!(
            !ours.is_empty() && ours == crash.objects.times,
            "{ours:x?}, {:x?}",
            crash.objects.times
        );
    }
    Ok(())
}

/// Of all tasks, with vmlinux; and what only callers know.
fn arguments_and_locals_are_those_that_drgn_reads(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let (dump, vmlinux) = (&crash.dumped.dump, crash.dumped.vmlinux()?);
        let said = |options: &[&str]| {
            let mut run = analyzer()?.command(&["bt", "--json", "--args"], dump, Some(vmlinux));
            let text = xtask::process::output(run.args(options))?;
            serde_json::from_str::<Value>(&text).with_context(|| text)
        };
        let all = said(&["--locals", "--all-tasks"])?;
        let fixtures = &crash.dumped.bench.fixtures;
        let compared = variables::compare(fixtures, dump, vmlinux, &all)?;
        ensure!(compared.equal > 500, "few of them: {compared:?}");
        ensure!(compared.passed > 5, "little from callers: {compared:?}");

        // SysRq's key, which its handler never looks at; and the file that was written to: every function
        // on the way is given the same one.
        let crashed = said(&[])?;
        let frames = crashed["backtraces"][0]["frames"].as_array().context("no frames")?;
        let argument = |function: &str, name: &str| {
            let frame = frames.iter().find(|it| it["function"] == function);
            let arguments = frame.and_then(|frame| frame["arguments"].as_array());
            let found = arguments.into_iter().flatten().find(|it| it["name"] == name);
            found.map(|it| it["value"].clone()).with_context(|| format!("{crashed:#}"))
        };
        ensure!(argument("sysrq_handle_crash", "key")? == u32::from(b'c'), "{crashed:#}");
        let written = argument("vfs_write", "file")?;
        ensure!(written.is_string(), "{crashed:#}");
        ensure!(argument("write_sysrq_trigger", "file")? == written, "{crashed:#}");
    }
    Ok(())
}

/// `bt -FF` names no others, and all of the words that drgn finds in a slab.
fn objects_on_stacks_are_in_the_caches_that_drgn_finds(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let dump = &crash.dumped.dump;
        let said = |options: &[&str]| {
            analyzer()?.run(&[&["bt", "--all-tasks"], options].concat(), dump, None)
        };
        let named: BTreeMap<u64, String> = said(&["-FF"])?
            .split_whitespace()
            .filter_map(|word| word.strip_prefix('[')?.strip_suffix(']')?.split_once(':'))
            .filter_map(|(at, cache)| Some((u64::from_str_radix(at, 16).ok()?, cache.to_owned())))
            .collect();
        // The words of the same stacks, without those that show a frame.
        let raw = said(&["-f"])?;
        let words = raw.lines().filter_map(|line| line.trim_start().split_once(": "));
        let words = words.filter(|(at, _)| u64::from_str_radix(at, 16).is_ok());
        let words: BTreeSet<u64> = words
            .flat_map(|(_, words)| words.split_whitespace())
            .filter_map(|word| u64::from_str_radix(word, 16).ok())
            .collect();
        let theirs =
            objects::caches(&crash.dumped.bench.fixtures, dump, crash.dumped.vmlinux()?, &words)?;
        ensure!(named.len() > 50, "few objects: {named:x?}");
        ensure!(named == theirs, "ours {named:x?}, drgn's {theirs:x?}");
    }
    Ok(())
}

/// All ways to look at the stack of the task that crashed agree with its frames.
fn options_of_bt_show_the_stack_that_the_frames_are_on(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let plain = crash.says(&["bt"], &[])?;
        let pid = plain["backtraces"][0]["pid"].to_string();
        let frames = plain["backtraces"][0]["frames"].as_array().context("no frames")?;
        let text = |options: &[&str], words: &[&str]| {
            let mut run =
                analyzer()?.command(&[&["bt"], options].concat(), &crash.dumped.dump, None);
            xtask::process::output(run.args(words))
        };
        let (code, all_code) = (text(&["-t"], &[])?, text(&["-T"], &[])?);
        let (raw, symbolic, scanned) =
            (text(&["-f"], &[])?, text(&["-F"], &[])?, text(&["-o"], &[])?);
        // The first frame's address is in a register.
        for frame in &frames[1..] {
            let pc = hexadecimal(&frame["pc"]).context("no pc")?;
            let name = frame["function"].as_str().context("no function")?;
            for (option, said) in [("-t", &code), ("-T", &all_code), ("-o", &scanned)] {
                let line = said.lines().find(|line| {
                    line.ends_with(&format!(" at {pc:016x}"))
                        || line.contains(&format!(" at {pc:016x} "))
                });
                let found = line.is_some_and(|line| line.contains(name));
                ensure!(found, "bt {option} lacks {name} at {pc:x}:\n{said}");
            }
            ensure!(raw.contains(&format!("{pc:016x}")), "bt -f lacks {pc:x}:\n{raw}");
            ensure!(symbolic.contains(name), "bt -F lacks {name}:\n{symbolic}");
        }
        // From the place of a return address on, the same frames follow. (Not from `panic` on: on x86_64 its
        // frame begins from a register.)
        let place = frames[2]["at"].as_str().context("no place")?;
        let rest = crash.says(&["bt", "-S", place], &[])?;
        let pcs = |frames: &Value| -> Vec<Value> {
            frames.as_array().into_iter().flatten().map(|it| it["pc"].clone()).collect()
        };
        let (rest, expected) =
            (pcs(&rest["backtraces"][0]["frames"]), pcs(&plain["backtraces"][0]["frames"]));
        ensure!(rest == expected[2..], "bt -S {place}: {rest:?}, not {:?}", &expected[2..]);
        // The registers of the system call are where the frames end.
        let exceptions = text(&["-e"], &[])?;
        let entered = plain["backtraces"][0]["end"]["exception"]["at"].clone();
        let entered = hexadecimal(&entered).context("no registers of user mode")?;
        let line = format!("USER-MODE EXCEPTION FRAME AT: {entered:016x}");
        ensure!(exceptions.contains(&line), "no {line} in\n{exceptions}");
        let verified = text(&["-v"], &[])?;
        ensure!(verified.contains("No stack overflows detected"), "{verified}");
        let group = crash.says(&["bt", "-g"], &[&pid])?;
        ensure!(group["backtraces"] == plain["backtraces"], "{group}");
        let mentioned = text(&["-a", "-R", "sysrq_handle_crash"], &[])?;
        ensure!(mentioned.matches("PID: ").count() == 1, "{mentioned}");
    }
    Ok(())
}

/// The driver of the guest's disk is a module. drgn knows nothing of its types without its own debug
/// information; the kernel's structures lead to the driver's and back. Only x86_64's kernel names the
/// variables of modules.
fn structures_of_modules_have_their_values(arch: &'static str) -> Result<()> {
    for crash in on(arch)? {
        let shape = crash.says(&["struct"], &["virtio_blk.disk,vdev,io_queues"])?;
        ensure!(shape["members"][0]["type"] == "struct gendisk *", "{shape:#}");
        let operations = crash.says(&["search"], &["virtblk_fops"])?;
        let member = |structure: &str, at: &str| -> Result<Value> {
            let said = crash.says(&["struct"], &[structure, at])?;
            Ok(said[0]["value"].clone())
        };
        let offset = crash.says(&["struct"], &["gendisk.fops"])?;
        let offset = offset["members"][0]["offset"].as_u64().context("no offset")?;
        let mut disks = 0;
        for found in operations.as_array().context("no places")? {
            let at = hexadecimal(&found["address"]).context("no address")?;
            let disk = format!("{:#x}", at.wrapping_sub(offset));
            let Ok(names) = member("gendisk.disk_name,private_data", &disk) else { continue };
            if !names["disk_name"].as_str().is_some_and(|name| name.starts_with("vda")) {
                continue;
            }
            let driver = names["private_data"].as_str().context("no pointer")?;
            let said = member("virtio_blk.disk,vdev,num_vqs", driver)?;
            ensure!(said["disk"] == *disk, "the disk at {disk}: {said:#}");
            ensure!(said["num_vqs"].as_u64().is_some_and(|it| it > 0), "{said:#}");
            let device = said["vdev"].as_str().context("no device")?;
            ensure!(member("virtio_device.priv", device)?["priv"] == *driver, "{said:#}");
            disks += 1;
        }
        ensure!(disks == 1, "{disks} disks: {operations:#}");
    }
    Ok(())
}

fn hexadecimal(value: &Value) -> Option<u64> {
    u64::from_str_radix(value.as_str()?.trim_start_matches("0x"), 16).ok()
}
