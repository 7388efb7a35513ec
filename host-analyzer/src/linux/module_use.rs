//! Who uses a module, and what else `mod` tells of it.

use crate::kernel::Kernel;
use crate::kernel::types::Types;
use crate::{Error, ReadError, VirtAddr, bytes};

use super::list;
use super::module::{Module, NAME};

/// What module.refcnt is when nobody uses the module (MODULE_REF_BASE, kernel/module/main.c, 6.1).
const UNUSED: i64 = 1;

/// Letters of the taints, by bit (taint_flags, kernel/panic.c, 6.12).
const TAINTS: &[u8] = b"PFSRMBUDAWCIOELKXTN";

/// Where the members lie, in bytes; `None` where this kernel has no such member.
pub struct UseLayout {
    sizes: Vec<u64>,
    references: Option<u64>,
    taints: Option<u64>,
    state: Option<u64>,
    /// `source_list` of struct module, `source_list` and `source` of struct module_use.
    users: Option<(u64, u64, u64)>,
    name: u64,
}

/// What is to be told of a module. What could not be read is an error of its own.
#[derive(Clone, Debug)]
pub struct ModuleUse {
    /// Bytes that it takes, as /proc/modules counts them.
    pub size: Result<u64, ReadError>,
    /// How many use it; `None` in a kernel that cannot unload modules.
    pub references: Result<Option<i64>, ReadError>,
    /// The modules that use it.
    pub users: Vec<String>,
    /// Why that list is not complete, if it is not.
    pub users_missing: Option<String>,
    /// Letters of its taints.
    pub taints: Result<String, ReadError>,
    /// Its state as /proc/modules calls it, when that is not `Live`.
    pub state: Option<&'static str>,
}

impl UseLayout {
    /// Looks the members up in the kernel's types.
    ///
    /// # Errors
    /// [`Error::NoMember`], [`Error::NoTypes`].
    pub fn new(kernel: &Kernel<'_>) -> Result<UseLayout, Error> {
        let module = "module";
        let optional = |name, path| {
            let field = kernel.field(name, path)?;
            Ok::<_, Error>(field.map(|field| field.offset as u64))
        };
        let source = optional("module_use", "source")?;
        let own = optional("module_use", "source_list")?;
        let head = optional(module, "source_list")?;
        Ok(UseLayout {
            sizes: sizes(kernel)?,
            references: optional(module, "refcnt")?,
            taints: optional(module, "taints")?,
            state: optional(module, "state")?,
            users: head.zip(own).zip(source).map(|((head, own), source)| (head, own, source)),
            name: kernel.offset(module, "name")?,
        })
    }

    /// Reads what there is to tell of `module`.
    #[must_use]
    pub fn read(&self, kernel: &Kernel<'_>, module: &Module) -> ModuleUse {
        let memory = kernel.memory();
        let word = |offset: u64| memory.u32(module.address.offset(offset));
        let size = self.sizes.iter().try_fold(0u64, |sum, &at| Ok(sum + u64::from(word(at)?)));
        let references = self.references.map(|at| Ok(i64::from(word(at)? as i32) - UNUSED));
        let taints = self.taints.map(|at| memory.u64(module.address.offset(at)));
        let (users, users_missing) = self.users(kernel, module.address);
        ModuleUse {
            size,
            references: references.transpose(),
            users,
            users_missing,
            taints: taints.transpose().map(|taints| letters(taints.unwrap_or(0))),
            state: self.state.and_then(|at| state(word(at).ok()?)),
        }
    }

    fn users(&self, kernel: &Kernel<'_>, module: VirtAddr) -> (Vec<String>, Option<String>) {
        let Some((head, own, source)) = self.users else { return (Vec::new(), None) };
        let memory = kernel.memory();
        let walk = list::walk(memory, module.offset(head));
        let mut missing = walk.broken;
        let mut users = Vec::new();
        for node in walk.nodes {
            let user = memory.pointer(node.back(own).offset(source));
            match user.and_then(|user| memory.bytes(user.offset(self.name), NAME)) {
                Ok(name) => users.push(bytes::c_string(&name)),
                Err(error) => missing = Some(error.to_string()),
            }
        }
        (users, missing)
    }
}

/// The members that add up to a module's size: of each struct module_memory from 6.4 on
/// (module_total_size, kernel/module/procfs.c, 6.12), of the layouts before (6.1).
fn sizes(kernel: &Kernel<'_>) -> Result<Vec<u64>, Error> {
    if let Some(array) = kernel.field("module", "mem")? {
        let types = kernel.types()?;
        let size = kernel.offset("module_memory", "size")?;
        let (kind, count) = types.array_of(array.kind).unwrap_or((array.kind, 1));
        let distance = types.size_of(kind).unwrap_or(0) as u64;
        let member = |index| array.offset as u64 + index * distance + size;
        return Ok((0..(count as u64).min(64)).map(member).collect());
    }
    let layouts = ["core_layout.size", "init_layout.size", "data_layout.size"];
    let mut sizes = Vec::new();
    for path in layouts {
        sizes.extend(kernel.field("module", path)?.map(|field| field.offset as u64));
    }
    Ok(sizes)
}

/// enum module_state (include/linux/module.h, 6.1), in the words of m_show (kernel/module/procfs.c).
fn state(value: u32) -> Option<&'static str> {
    match value {
        0 => None,
        1 => Some("Loading"),
        2 => Some("Unloading"),
        3 => Some("Unformed"),
        _ => Some("?"),
    }
}

fn letters(taints: u64) -> String {
    let set = |(bit, _): &(usize, &u8)| taints >> bit & 1 == 1;
    TAINTS.iter().enumerate().filter(set).map(|(_, &letter)| char::from(letter)).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn taints_have_the_letters_of_proc_modules() {
        assert_eq!(letters(1 << 12 | 1 << 13), "OE");
        assert_eq!(letters(1), "P");
        assert_eq!(letters(0), "");
    }
}
