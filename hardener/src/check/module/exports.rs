//! What the kernel exports, by name (include/linux/export.h: two offsets from their own places).

use crate::check::kernel::btf::Btf;
use crate::check::kernel::{Kernel, KernelError};
use penumbra_bundle::LinkVa;
use std::collections::HashMap;

/// Addresses of exported symbols.
pub type Exports = HashMap<String, LinkVa>;

/// Reads `__ksymtab` and `__ksymtab_gpl`.
pub fn read(kernel: &Kernel, btf: &Btf<'_>) -> Result<Exports, KernelError> {
    let structure = "kernel_symbol";
    let need = |member: &'static str| {
        let found = match member {
            "" => btf.size(structure),
            _ => btf.offset(structure, member),
        };
        found
            .map(u64::from)
            .ok_or(KernelError::Layout { structure, member })
    };
    let (size, value, name) = (need("")?, need("value_offset")?, need("name_offset")?);
    let mut exports = Exports::new();
    for table in ["__ksymtab", "__ksymtab_gpl"] {
        let range = kernel.vmlinux.section(table)?.range;
        for at in (range.start.0..range.end.0).step_by(size.max(1) as usize) {
            let value = kernel.vmlinux.pc_relative(LinkVa(at.wrapping_add(value)));
            let name = kernel.vmlinux.pc_relative(LinkVa(at.wrapping_add(name)));
            let (value, name) = value.zip(name).ok_or(KernelError::Truncated)?;
            let text = crate::check::image::string(kernel, name).ok_or(KernelError::Truncated)?;
            exports.insert(text, value);
        }
    }
    Ok(exports)
}
