//! Why a thunk is no membership in its tables, for people.

use super::Subject;
use super::exec::tree::Wrong;
use super::kernel::symbols::hex;
use penumbra_bundle::LinkVa;

/// What is wrong, with addresses as linked; it was found with the kernel moved up by `slide`.
pub fn explain(subject: &Subject<'_>, wrong: Wrong, slide: u64) -> String {
    let symbols = &subject.kernel.symbols;
    let name = |at: u64| {
        let at = LinkVa(at.wrapping_sub(slide));
        match symbols.name(at) {
            Some(name) if subject.kernel.in_text(at) => format!("{} ({name})", hex(at)),
            _ => hex(at),
        }
    };
    match wrong {
        Wrong::Unbounded(first) => format!(
            "reads its table or traps for addresses that it has not compared with the table's range, from {}",
            name(first)
        ),
        Wrong::HandsOver(first) => {
            format!("leaves {} to another thunk", name(first))
        }
        Wrong::NoTable => "lets addresses through without looking in a table".to_owned(),
        Wrong::Outside(first) => {
            format!(
                "reads or traps for {}, of which its tables say nothing",
                name(first)
            )
        }
        Wrong::Reads(first, at) => {
            format!("reads {} outside the cave for {}", name(at), name(first))
        }
        Wrong::NotATable(first, at) => {
            format!("reads {} outside every table for {}", name(at), name(first))
        }
        Wrong::Passes(first) => format!("passes {}, which its tables do not hold", name(first)),
        Wrong::Traps(first) => format!("traps {}, which its tables hold", name(first)),
    }
}
