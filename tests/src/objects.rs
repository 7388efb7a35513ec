//! The kernel's objects as drgn reads them, to compare with what `host-analyzer --json` says.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use anyhow::Result;
use serde::Deserialize;
use serde_json::Value;
use xtask::fixtures::Fixtures;

use crate::peers::drgn_says;

/// Objects as JSON in the way of `host-analyzer struct --json`.
pub(crate) const PLAIN: &str = "\
from drgn import TypeKind, cast, Object
def bare(kind):
    while kind.kind == TypeKind.TYPEDEF:
        kind = kind.type
    return kind
def named(kind, number):
    names = [it.name for it in kind.enumerators or [] if it.value == number]
    return names[0] if names else number
def plain(it):
    kind = bare(it.type_)
    if kind.kind in (TypeKind.STRUCT, TypeKind.UNION):
        if not kind.is_complete():
            return None
        out = {}
        for member in kind.members:
            if member.name is None:
                inner = Object(program, member.type, address=it.address_ + member.offset)
                out.update(plain(inner))
            else:
                out[member.name] = plain(it.member_(member.name))
        return out
    if kind.kind == TypeKind.ARRAY:
        length = kind.length or 0
        element = bare(kind.type)
        if element.kind == TypeKind.INT and element.name == 'char':
            raw = program.read(it.address_, length)
            return raw.split(b'\\0')[0].decode(errors='replace')
        return [plain(it[index]) for index in range(length)]
    if kind.kind == TypeKind.POINTER:
        return hex(it.value_())
    if kind.kind == TypeKind.ENUM:
        return named(kind, int(it.value_()))
    if kind.size == 16:
        return hex(it.value_() % 2**128)
    return it.value_()
";

/// What is read.
const SCRIPT: &str = "\
from drgn.helpers.linux.fs import d_path, for_each_file, inode_path
from drgn.helpers.linux.mm import for_each_vma, virt_to_phys, follow_phys
from drgn.helpers.linux.module import for_each_module
from drgn.helpers.linux.pid import find_task, for_each_task
init = find_task(program, 1)
first_module = next(iter(for_each_module(program)))
objects = {
    'task_struct': [program['init_task'], init[0]],
    'mm_struct': [init.mm[0]],
    'signal_struct': [init.signal[0]],
    'cred': [init.cred[0]],
    'files_struct': [init.files[0]],
    'rq': [per_cpu(program['runqueues'], cpu) for cpu in for_each_online_cpu(program)],
    'module': [first_module[0]],
    'file': [file[0] for fd, file in for_each_file(init)],
    'super_block': [init.fs.root.mnt.mnt_sb[0]],
    'page': [],
}
names = ['init_task', 'schedule', 'jiffies_64', 'panic', 'init_mm']
print(json.dumps(dict(
    structures=[(name, one.address_, plain(one)) for name in objects for one in objects[name]],
    sizes={name: program.type('struct ' + name).size for name in objects},
    files=[(fd, d_path(file.f_path).decode()) for fd, file in for_each_file(init)],
    areas=[(vma.vm_start.value_(), vma.vm_end.value_(),
            d_path(vma.vm_file.f_path).decode() if vma.vm_file else None)
           for vma in for_each_vma(init.mm)],
    symbols={name: program.symbol(name).address for name in names},
    physical={name: follow_phys(program['init_mm'].address_of_(),
                                program.symbol(name).address).value_() for name in names},
    of_process=[(vma.vm_start.value_(), follow_phys(init.mm, vma.vm_start).value_())
                for vma in for_each_vma(init.mm) if mapped(init.mm, vma.vm_start)],
    times={task.value_(): [task.start_boottime.value_(), task.utime.value_(), task.stime.value_(),
                           task.sched_info.last_arrival.value_()]
           for task in for_each_task(program)},
)))
";

/// Whether an address of a process is mapped: drgn says it by an exception.
const MAPPED: &str = "\
def mapped(mm, at):
    from drgn.helpers.linux.mm import follow_phys
    try:
        follow_phys(mm, at)
        return True
    except drgn.FaultError:
        return False
";

/// What drgn reads.
#[derive(Debug, Deserialize)]
pub struct Objects {
    /// Structures: type, address, and all members.
    pub structures: Vec<(String, u64, Value)>,
    /// Sizes of types in bytes.
    pub sizes: BTreeMap<String, u64>,
    /// The files of PID 1: descriptor and path.
    pub files: Vec<(u32, String)>,
    /// Its memory areas: start, end and file.
    pub areas: Vec<(u64, u64, Option<String>)>,
    /// Addresses of symbols.
    pub symbols: BTreeMap<String, u64>,
    /// Physical addresses of the same.
    pub physical: BTreeMap<String, u64>,
    /// Addresses of PID 1 that are mapped, and where they lead.
    pub of_process: Vec<(u64, u64)>,
    /// Of every task but the idle ones: when it was started, its time in user mode and in the kernel, and when
    /// it last got a CPU, in nanoseconds.
    pub times: BTreeMap<u64, [u64; 4]>,
}

/// Has drgn read the objects.
///
/// # Errors
/// When drgn cannot be had or does not open the dump.
pub fn of_drgn(fixtures: &Fixtures, dump: &Path, vmlinux: &Path) -> Result<Objects> {
    drgn_says(fixtures, &format!("{MAPPED}{PLAIN}{SCRIPT}"), dump, vmlinux)
}

/// The slab caches that drgn finds objects in, of those at `addresses`.
///
/// # Errors
/// See [`of_drgn`].
pub fn caches(
    fixtures: &Fixtures,
    dump: &Path,
    vmlinux: &Path,
    addresses: &BTreeSet<u64>,
) -> Result<BTreeMap<u64, String>> {
    // Rust shows a set as Python writes one.
    let script = format!("{CACHES}of({addresses:?})\n");
    let found: Vec<(u64, String)> = drgn_says(fixtures, &script, dump, vmlinux)?;
    Ok(found.into_iter().collect())
}

/// Defines what prints the names of caches.
const CACHES: &str = "\
from drgn.helpers.linux.slab import find_containing_slab_cache
def of(addresses):
    caches = [(at, find_containing_slab_cache(program, at)) for at in addresses]
    print(json.dumps([(at, cache.name.string_().decode()) for at, cache in caches if cache]))
";

/// The first place where two documents differ: a path, and both values.
#[must_use]
pub fn difference(ours: &Value, theirs: &Value) -> Option<String> {
    match (ours, theirs) {
        (Value::Object(ours), Value::Object(theirs)) => {
            let missing = theirs.keys().find(|key| !ours.contains_key(*key));
            let extra = ours.keys().find(|key| !theirs.contains_key(*key));
            if let Some(key) = missing.or(extra) {
                return Some(format!("{key} is in one of them only"));
            }
            let one = |(key, ours): (&String, &Value)| {
                difference(ours, &theirs[key]).map(|path| format!("{key}.{path}"))
            };
            ours.iter().find_map(one)
        }
        (Value::Array(ours), Value::Array(theirs)) if ours.len() == theirs.len() => {
            let one = |(index, (ours, theirs)): (usize, (&Value, &Value))| {
                difference(ours, theirs).map(|path| format!("{index}.{path}"))
            };
            ours.iter().zip(theirs).enumerate().find_map(one)
        }
        _ => (ours != theirs).then(|| format!(": {ours} and {theirs}")),
    }
}
