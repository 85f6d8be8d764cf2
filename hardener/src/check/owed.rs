//! What slots ask of the thunks that they go to.

use super::exec::machine::Contract;
use super::kernel::Kernel;
use super::slots::Original;
use penumbra_bundle::LinkVa;
use rustc_hash::FxHashSet;

/// r10 and r11 as a set of register numbers.
const R10_R11: u16 = 1 << 10 | 1 << 11;

/// What a slot asks of its thunk: whether r10, r11 and the flags are free at a return there, and whether its function jumps to
/// labels in itself.
pub fn contract(original: Original, free: bool, goto: bool) -> Contract {
    match original {
        // Calls ask for nothing; their thunks are proved by their instructions.
        Original::Return | Original::ModuleFree(_) | Original::Direct { .. } => Contract {
            target: None,
            scratch: if free { R10_R11 } else { 0 },
            flags: free,
            cleared: 0,
            plain: false,
        },
        Original::Call(register) | Original::Jump(register) => {
            // A call and a tail call may clobber r11 and flags, which carry no argument (System V psABI, 3.2.1 and
            // figure 3.4); r10 may be a static chain. A computed goto stays in its function, where all may be live.
            let inside = matches!(original, Original::Jump(_)) && goto;
            let scratch = if inside || register == 11 { 0 } else { 1 << 11 };
            Contract {
                target: Some(register),
                scratch,
                flags: !inside,
                cleared: 0,
                plain: false,
            }
        }
    }
}

/// A function traced by ftrace: compiled with -pg, so without -fipa-ra, so its callers expect r10, r11 and flags to be
/// lost. With IBT the call follows a 4-byte ENDBR64.
pub fn has_fentry(kernel: &Kernel, traced: &FxHashSet<LinkVa>, start: LinkVa) -> bool {
    traced.contains(&start)
        || traced.contains(&LinkVa(start.0 + 4))
            && kernel.vmlinux.bytes(start, 4) == Some(&[0xf3, 0x0f, 0x1e, 0xfa])
}

/// Functions with labels that data points to.
pub fn computed_gotos(kernel: &Kernel) -> FxHashSet<LinkVa> {
    let places = kernel.vmlinux.relocs.abs64.iter();
    let places = places.filter(|place| {
        let tables = &kernel.tables.descriptive;
        !tables.iter().any(|table| table.contains(**place))
    });
    let labels = places.filter_map(|place| kernel.vmlinux.u64(*place).map(LinkVa));
    labels
        .filter(|label| kernel.in_text(*label))
        .filter_map(|label| {
            let function = kernel.symbols.around(label)?;
            (function.start != label).then_some(function.start)
        })
        .collect()
}
