//! `ps`: what [`Options`] says.

mod times;

use std::collections::{BTreeMap, HashMap};
use std::io::Write;

use clap::Args;
use serde_json::json;

use crate::kernel::Kernel;
use crate::linux::Linux;
use crate::linux::process::{Process, ProcessLayout};
use crate::linux::task::{Task, TaskList};
use crate::render::table::{Align, table};
use crate::render::text;
use crate::{Error, ReadError};

use super::bt::TaskId;
use times::View;

/// The tasks
///
/// A row per task, threads included, as crash shows them: `>` marks those that were running on a CPU,
/// ST is the state (RU running, IN interruptible, UN uninterruptible, ID idle, ST stopped, TR traced,
/// PA parked, ZO zombie, DE dead, WA waking, NE new), VSZ and RSS are KiB, the names of kernel threads
/// stand in brackets. `?` is what could not be read, `-` what does not exist.
#[derive(Args, Clone, Debug, Default, PartialEq, Eq)]
pub struct Options {
    /// The tasks to show, by PID, address or name; none means all.
    #[arg(skip)]
    pub tasks: Vec<String>,
    /// Children below their parents, indented
    #[arg(long, group = "view")]
    pub tree: bool,
    /// Since when each task has been there, its start time in seconds since boot, and its time in user mode and in the
    /// kernel in nanoseconds
    #[arg(short, long, group = "view")]
    pub times: bool,
    /// When each task last got a CPU, in nanoseconds of the scheduler's clock; the last one first
    #[arg(short, long, group = "view")]
    pub last_run: bool,
    /// The same as how long ago that was: days, hours, minutes, seconds
    #[arg(short = 'm', long, group = "view")]
    pub since_last_run: bool,
    /// Kernel threads only
    #[arg(short, long)]
    pub kernel: bool,
    /// Tasks of user space only
    #[arg(short, long, conflicts_with = "kernel")]
    pub user: bool,
    /// The first thread of each process only
    #[arg(short = 'G', long)]
    pub leaders: bool,
    /// Tasks that were running on a CPU only
    #[arg(short = 'A', long)]
    pub active: bool,
    /// Instead of the tasks: how many there are in each state
    #[arg(short = 'S', long, group = "view")]
    pub summary: bool,
    /// Output as JSON
    #[arg(long)]
    pub json: bool,
}

impl Options {
    /// Which times are wanted.
    fn view(&self) -> Option<View> {
        let views = [
            (self.times, View::Each),
            (self.last_run, View::LastRun),
            (self.since_last_run, View::SinceLastRun),
        ];
        views.into_iter().find_map(|(wanted, view)| wanted.then_some(view))
    }

    /// Whether a task is of a kind that is wanted. One of which that cannot be told is.
    fn admits(&self, process: &Process) -> bool {
        let of_kind = match process.kernel_thread {
            Ok(kernel) => !(self.kernel && !kernel || self.user && kernel),
            Err(_) => true,
        };
        of_kind && (!self.leaders || process.task.pid == process.task.tgid)
    }
}

/// Runs the command. A task that cannot be read costs its row.
///
/// # Errors
/// [`Error::NoTask`], [`Error::TaskNotFound`], [`Error::NothingToShow`], [`Error::Output`], and whatever
/// makes all tasks unreadable.
pub fn run(kernel: &Kernel<'_>, options: &Options, out: &mut dyn Write) -> Result<(), Error> {
    let linux = Linux::new(kernel);
    let layout = ProcessLayout::new(kernel)?;
    let TaskList { tasks, mut problems } = linux.all_tasks()?;
    let (running, missing) = linux.running();
    let torn = !missing.is_empty();
    problems.extend(missing);
    let (found, absent) = chosen(tasks, &options.tasks);
    if found.is_empty() {
        return Err(match (problems.is_empty(), options.tasks.is_empty()) {
            (true, _) => Error::NoTask(options.tasks.join(", ")),
            (false, true) => Error::NothingToShow(problems.join("; ")),
            (false, false) => Error::TaskNotFound(options.tasks.join(", "), problems.join("; ")),
        });
    }
    let cpu_of: HashMap<_, _> = running.into_iter().map(|(cpu, task)| (task, cpu)).collect();
    let running_on = |task: &Task| {
        // Where a run queue is lost, the task itself still tells.
        let by_task = Some(task.cpu).filter(|_| torn && task.on_cpu);
        cpu_of.get(&task.address).copied().or(by_task)
    };
    let processes = found.into_iter().map(|task| layout.read(kernel, task));
    let wanted =
        |it: &Process| options.admits(it) && (!options.active || running_on(&it.task).is_some());
    let processes: Vec<Process> = processes.filter(wanted).collect();
    if options.summary {
        return summary(kernel, options, &processes, &problems, out);
    }
    if let Some(view) = options.view() {
        if !options.json {
            text::completeness(kernel.dump(), out)?;
        }
        let all: Vec<_> = processes.iter().map(|it| (it, running_on(&it.task))).collect();
        if let Some(tasks) = times::show(&linux, &all, view, options.json, out)? {
            let document = json!({"tasks": tasks, "not_found": absent, "problems": problems});
            return text::json(&document, out);
        }
        return not_shown(absent, &problems, out);
    }
    let listed = if options.tree { as_tree(processes) } else { flat(processes) };
    if options.json {
        let one = |(_, it): &(usize, Process)| document(it, running_on(&it.task));
        let all: Vec<_> = listed.iter().map(one).collect();
        let document = json!({"tasks": all, "not_found": absent, "problems": problems});
        return text::json(&document, out);
    }
    text::completeness(kernel.dump(), out)?;
    let row = |(depth, it): &(usize, Process)| row(it, *depth, running_on(&it.task));
    let rows: Vec<_> = listed.iter().map(row).collect();
    table(COLUMNS, &rows, out)?;
    not_shown(absent, &problems, out)
}

fn not_shown(absent: Vec<String>, problems: &[String], out: &mut dyn Write) -> Result<(), Error> {
    for name in absent {
        writeln!(out, "not found: {name}")?;
    }
    text::problems(problems, out)
}

/// How many tasks there are, and how many in each state.
fn summary(
    kernel: &Kernel<'_>,
    options: &Options,
    processes: &[Process],
    problems: &[String],
    out: &mut dyn Write,
) -> Result<(), Error> {
    let mut states: BTreeMap<&str, usize> = BTreeMap::new();
    for process in processes {
        *states.entry(process.task.state().short).or_default() += 1;
    }
    if options.json {
        let document = json!({"total": processes.len(), "states": states, "problems": problems});
        return text::json(&document, out);
    }
    text::completeness(kernel.dump(), out)?;
    let counted = states.iter().map(|(state, count)| format!("{state}: {count}"));
    let counted: Vec<String> = counted.collect();
    writeln!(out, "TASKS: {}  {}", processes.len(), counted.join("  "))?;
    text::problems(problems, out)
}

const COLUMNS: [(&str, Align); 9] = [
    ("", Align::Left),
    ("PID", Align::Right),
    ("PPID", Align::Right),
    ("CPU", Align::Right),
    ("TASK", Align::Left),
    ("ST", Align::Left),
    ("VSZ", Align::Right),
    ("RSS", Align::Right),
    ("COMM", Align::Left),
];

fn row(process: &Process, depth: usize, running_on: Option<u32>) -> [String; 9] {
    let unknown = |_: ReadError| "?".to_owned();
    let kib = |bytes: u64| (bytes / 1024).to_string();
    let Task { pid, address, cpu, comm, .. } = &process.task;
    let (mapped, resident) = match process.size {
        Ok(Some(size)) => (kib(size.mapped), size.resident.map_or("?".to_owned(), kib)),
        Ok(None) => ("-".to_owned(), "-".to_owned()),
        Err(error) => (unknown(error), unknown(error)),
    };
    let comm = match process.kernel_thread {
        Ok(true) => format!("[{comm}]"),
        Ok(false) => comm.clone(),
        Err(_) => format!("{comm} ?"),
    };
    [
        if running_on.is_some() { ">" } else { "" }.to_owned(),
        pid.to_string(),
        process.parent.map_or_else(unknown, |parent| parent.to_string()),
        running_on.unwrap_or(*cpu).to_string(),
        format!("{address:016x}"),
        process.task.state().short.to_owned(),
        mapped,
        resident,
        format!("{:indent$}{comm}", "", indent = depth * 2),
    ]
}

fn document(process: &Process, running_on: Option<u32>) -> serde_json::Value {
    let task = &process.task;
    let size = process.size.ok();
    json!({"pid": task.pid, "tgid": task.tgid, "ppid": process.parent.ok(),
        "cpu": running_on.unwrap_or(task.cpu), "running": running_on.is_some(),
        "task": format!("{:#x}", task.address.0), "state": task.state().name,
        "vsz": size.map(|it| it.map_or(0, |it| it.mapped)),
        "rss": size.and_then(|it| it.map_or(Some(0), |it| it.resident)),
        "kernel_thread": process.kernel_thread.ok(), "command": task.comm})
}

/// Those of `tasks` that are named by `wanted`, and what is named and not among them.
fn chosen(tasks: Vec<Task>, wanted: &[String]) -> (Vec<Task>, Vec<String>) {
    if wanted.is_empty() {
        return (tasks, Vec::new());
    }
    let names = |text: &String, task: &Task| {
        let id = match text.parse() {
            Ok(TaskId::Pid(pid)) => task.pid == pid,
            Ok(TaskId::Address(address)) => task.address == address,
            Err(_) => false,
        };
        id || task.comm == *text
    };
    let absent = |text: &&String| !tasks.iter().any(|task| names(text, task));
    let absent = wanted.iter().filter(absent).cloned().collect();
    let named = |task: &Task| wanted.iter().any(|text| names(text, task));
    (tasks.into_iter().filter(named).collect(), absent)
}

fn flat(processes: Vec<Process>) -> Vec<(usize, Process)> {
    processes.into_iter().map(|process| (0, process)).collect()
}

/// Every process below its parent, with the depth in the tree. Those whose parent is not among them
/// are roots; so is, of a circle of parents, the first.
fn as_tree(processes: Vec<Process>) -> Vec<(usize, Process)> {
    let leader = |it: &Process| it.task.pid == it.task.tgid;
    // The idle tasks have one PID; what the first of them started (init, kthreadd) stands below it.
    let mut leaders = HashMap::new();
    for (index, process) in processes.iter().enumerate().filter(|(_, it)| leader(it)) {
        leaders.entry(process.task.tgid).or_insert(index);
    }
    let parent = |it: &Process| {
        let parent = leaders.get(&it.parent.ok()?).copied();
        parent.filter(|_| it.task.tgid != 0 && it.parent != Ok(it.task.tgid))
    };
    let mut children: HashMap<usize, Vec<usize>> = HashMap::new();
    for (index, process) in processes.iter().enumerate() {
        if let Some(parent) = parent(process) {
            children.entry(parent).or_default().push(index);
        }
    }
    let mut order = Vec::new();
    let mut placed = vec![false; processes.len()];
    let roots = (0..processes.len()).filter(|&index| parent(&processes[index]).is_none());
    for root in roots.chain(0..processes.len()) {
        let mut waiting = vec![(0, root)];
        while let Some((depth, index)) = waiting.pop() {
            if std::mem::replace(&mut placed[index], true) {
                continue;
            }
            order.push((depth, index));
            // A process's children stand below its first thread.
            let below = children.get(&index);
            waiting.extend(below.into_iter().flatten().rev().map(|&child| (depth + 1, child)));
        }
    }
    let mut processes: Vec<_> = processes.into_iter().map(Some).collect();
    order.into_iter().filter_map(|(depth, index)| Some((depth, processes[index].take()?))).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::VirtAddr;

    fn process(pid: u32, parent: u32) -> Process {
        let task = Task::example(VirtAddr(u64::MAX << 32 | u64::from(pid)), pid, "task");
        Process { task, parent: Ok(parent), kernel_thread: Ok(false), size: Ok(None) }
    }

    fn tree(processes: &[(u32, u32)]) -> Vec<(usize, u32)> {
        let processes = processes.iter().map(|&(pid, parent)| process(pid, parent)).collect();
        as_tree(processes).into_iter().map(|(depth, process)| (depth, process.task.pid)).collect()
    }

    #[test]
    fn children_stand_below_their_parents() {
        let all = [(0, 0), (0, 1), (1, 0), (2, 0), (7, 2), (9, 1), (8, 2), (10, 9)];
        let expected = [(0, 0), (1, 1), (2, 9), (3, 10), (1, 2), (2, 7), (2, 8), (0, 0)];
        assert_eq!(tree(&all), expected);
    }

    #[test]
    fn circle_of_parents_and_a_parent_that_is_missing_lose_no_task() {
        assert_eq!(tree(&[(5, 6), (6, 5), (7, 99)]), [(0, 7), (0, 5), (1, 6)]);
    }

    #[test]
    fn tasks_are_chosen_by_pid_address_and_name() {
        let tasks = || {
            let task = |pid: u32, comm| {
                Task::example(VirtAddr(0xffff_8880_0000_0000 + u64::from(pid)), pid, comm)
            };
            vec![task(1, "init"), task(2, "7"), task(7, "sh")]
        };
        let pids = |wanted: &[&str]| {
            let wanted: Vec<String> = wanted.iter().map(|&text| text.to_owned()).collect();
            let (found, absent) = chosen(tasks(), &wanted);
            (found.iter().map(|task| task.pid).collect::<Vec<_>>(), absent.len())
        };
        assert_eq!(pids(&["init", "0xffff888000000007"]), (vec![1, 7], 0));
        assert_eq!(pids(&["7"]), (vec![2, 7], 0));
        assert_eq!(pids(&["sh", "nobody"]), (vec![7], 1));
        assert_eq!(pids(&[]).0.len(), 3);
    }

    #[test]
    fn kinds_of_tasks_are_told_apart_and_none_is_lost_for_lack_of_knowledge() {
        let user = process(1, 0);
        let kernel = Process { kernel_thread: Ok(true), ..process(2, 0) };
        let torn =
            Process { kernel_thread: Err(ReadError::NotMapped(VirtAddr(0))), ..process(3, 0) };
        let admitted = |options: Options| [&user, &kernel, &torn].map(|it| options.admits(it));
        assert_eq!(admitted(Options { kernel: true, ..Options::default() }), [false, true, true]);
        assert_eq!(admitted(Options { user: true, ..Options::default() }), [true, false, true]);
        let mut thread = process(4, 0);
        thread.task.tgid = 1;
        assert!(!Options { leaders: true, ..Options::default() }.admits(&thread));
    }

    #[test]
    fn what_cannot_be_read_is_a_question_mark_in_its_row() {
        let error = ReadError::NotMapped(VirtAddr(0));
        let whole = process(42, 1);
        let torn = Process { parent: Err(error), size: Err(error), ..whole.clone() };
        assert_eq!(row(&whole, 0, Some(3))[..4], [">", "42", "1", "3"]);
        let cells = row(&torn, 1, None);
        assert_eq!(cells[..3], ["", "42", "?"]);
        assert_eq!(cells[6..], ["?", "?", "  task"]);
    }
}
