//! Where in the dead kernel that is which is sent first. Each part is an `Option`: what the kernel does
//! not tell is sent with the rest, or with all of its image.

use crate::architecture::Architecture;
use crate::card::btf::{self, Wanted};
use crate::card::facts::Facts;
use crate::card::memory::KernelMemory;

/// Variables, all small, that lead to everything else, or that `sys` shows.
const SMALL: [&str; 17] = [
    "__per_cpu_offset",
    "nr_cpu_ids",
    "__cpu_online_mask",
    "__cpu_present_mask",
    "__cpu_possible_mask",
    "panic_cpu",
    "crashing_cpu",
    "tainted_mask",
    "modules",
    "init_uts_ns",
    "tk_core",
    "avenrun",
    "crash_notes",
    "cpu_khz",
    "prb",
    "clear_seq",
    "efi_rt_stack_top",
];
/// How much of each is sent: a CPU mask of 4096 CPUs, the timekeeper, the names in init_uts_ns.
const SMALL_SIZE: u64 = 512;

/// Per-CPU variables that lead to a CPU's task and stacks.
const PER_CPU: [&str; 7] = [
    "runqueues",
    "pcpu_hot",
    "current_task",
    "hardirq_stack_ptr",
    "cea_exception_stacks",
    "irq_stack_ptr",
    "overflow_stack",
];

/// Where things begin and end.
const BOUNDS: [&str; 12] = [
    "init_task",
    "nr_cpu_ids",
    "runqueues",
    "__per_cpu_offset",
    "__per_cpu_start",
    "__per_cpu_end",
    "_sdata",
    "_end",
    "__start_rodata",
    "__end_rodata",
    "__init_begin",
    "__init_end",
];

const MEMBERS: [Wanted; 10] = [
    ("task_struct", "tasks"),
    ("task_struct", "signal"),
    ("task_struct", "thread_node"),
    ("task_struct", "stack"),
    ("task_struct", "mm"),
    ("task_struct", "thread"),
    ("thread_struct", "sp"),
    ("thread_struct", "cpu_context"),
    ("signal_struct", "thread_head"),
    ("rq", "idle"),
];

/// Where the stack pointer is in struct cpu_context (arch/arm64/include/asm/processor.h, 6.12).
const CPU_CONTEXT_SP: u64 = 11 * 8;

/// Where things are.
pub struct Places {
    /// Small variables.
    pub small: [Option<u64>; SMALL.len()],
    /// Per-CPU variables, as the symbol table has them.
    pub per_cpu: [Option<u64>; PER_CPU.len()],
    /// The first task.
    pub init_task: Option<u64>,
    /// How many CPUs there can be (unsigned int).
    pub cpu_count: Option<u64>,
    /// The run queues.
    pub run_queues: Option<u64>,
    /// The table of where each CPU's own variables are.
    pub per_cpu_offsets: Option<u64>,
    /// A CPU's own variables, as the symbol table has them, and how many bytes they take.
    pub per_cpu_area: Option<(u64, u64)>,
    /// The image's data.
    pub data: Option<(u64, u64)>,
    /// The image's constants.
    pub constants: Option<(u64, u64)>,
    /// What of the image was freed after boot.
    pub freed: Option<(u64, u64)>,
    /// Members of struct task_struct.
    pub task: TaskLayout,
    /// rq.idle.
    pub idle: Option<u64>,
}

/// Where members of a task lie, in bytes.
#[derive(Clone, Copy, Default)]
pub struct TaskLayout {
    pub tasks: Option<u64>,
    pub signal: Option<u64>,
    pub thread_node: Option<u64>,
    pub thread_head: Option<u64>,
    pub stack: Option<u64>,
    pub mm: Option<u64>,
    /// Where the stack pointer of one that does not run is.
    pub sp: Option<u64>,
    /// Up to where it has members that matter.
    pub size: Option<u64>,
}

impl Places {
    /// Finds them.
    pub fn find(
        memory: &mut KernelMemory<'_>,
        architecture: Architecture,
        facts: &Facts,
    ) -> Places {
        let small = facts.find_all(memory, &SMALL);
        let per_cpu = facts.find_all(memory, &PER_CPU);
        let bounds = facts.find_all(memory, &BOUNDS);
        let [
            init_task,
            cpu_count,
            run_queues,
            per_cpu_offsets,
            per_cpu_start,
            per_cpu_end,
            data,
            end,
            constants,
            constants_end,
            freed,
            freed_end,
        ] = bounds;
        let found = match facts.types {
            Some(section) => {
                btf::offsets(memory, section, &MEMBERS, &|it| it.iter().flatten().count() == 9)
            }
            None => [None; MEMBERS.len()],
        };
        let [tasks, signal, thread_node, stack, mm, thread, sp, context, thread_head, idle] =
            found.map(|offset| offset.map(u64::from));
        let saved = match architecture {
            Architecture::X86_64 => sp,
            Architecture::Aarch64 => context.map(|at| at + CPU_CONTEXT_SP),
        };
        let area = part(per_cpu_start.or(Some(0)), per_cpu_end);
        Places {
            small,
            per_cpu,
            init_task,
            cpu_count,
            run_queues,
            per_cpu_offsets,
            per_cpu_area: area.map(|(start, size)| (start, size + PER_CPU_ALLOCATED)),
            data: part(data, end),
            constants: part(constants, constants_end),
            freed: part(freed, freed_end),
            task: TaskLayout {
                tasks,
                signal,
                thread_node,
                thread_head,
                stack,
                mm,
                sp: thread.zip(saved).map(|(thread, sp)| thread + sp),
                // It is the last member, and what comes after these of its is the state of the FPU.
                size: thread.map(|thread| thread + SMALL_SIZE),
            },
            idle,
        }
    }

    /// The small variables, each with its size.
    pub fn small(&self) -> impl Iterator<Item = (u64, u64)> {
        self.small.into_iter().flatten().map(|at| (at, SMALL_SIZE))
    }
}

/// What follows a CPU's static variables in its area: those of modules, and what was allocated first
/// (PERCPU_MODULE_RESERVE and PERCPU_DYNAMIC_RESERVE, include/linux/percpu.h, 6.12).
const PER_CPU_ALLOCATED: u64 = (8 << 10) + (28 << 10);

/// What lies from `start` to `end`, if that makes sense: address and size.
fn part(start: Option<u64>, end: Option<u64>) -> Option<(u64, u64)> {
    const MOST: u64 = 512 << 20;
    let (start, end) = start.zip(end)?;
    let size = end.checked_sub(start).filter(|size| (1..MOST).contains(size))?;
    Some((start, size))
}
