//! Pokes at run time: ftrace, jump labels, static calls.

use super::{exact, site};
use crate::image::{Fault, Image, Tables};
use crate::text::{Span, TextError};
use penumbra_bundle::{Form, LinkVa, Site, SiteKind};

const NOP2: [u8; 2] = [0x66, 0x90];
const NOP5: [u8; 5] = [0x0f, 0x1f, 0x44, 0, 0];
/// `cs cs cs xor %eax,%eax`: a call of `__static_call_return0` (arch/x86/kernel/static_call.c, `xor5rax`).
const RETURN0: [u8; 5] = [0x2e, 0x2e, 0x2e, 0x31, 0xc0];
const RETURN: [u8; 5] = [0xc3, 0xcc, 0xcc, 0xcc, 0xcc];
/// Where ftrace sets the tracer's address in its own callers (arch/x86/kernel/ftrace.c, `ftrace_update_ftrace_func`).
const FTRACE_CALLS: [&str; 2] = ["ftrace_call", "ftrace_regs_call"];

/// Adds the sites.
pub fn sites(
    image: &Image,
    tables: &Tables,
    span: Span,
    sites: &mut Vec<Site>,
) -> Result<(), TextError> {
    for va in &tables.fentry {
        // Traced: a call of ftrace_caller or of a trampoline that ftrace allocated.
        let forms = vec![exact(&NOP5), Form::CallAnywhere];
        sites.extend(site(span, *va, 5, SiteKind::Fentry, forms));
    }
    for name in FTRACE_CALLS {
        if let Some(va) = image.symbol(name) {
            sites.extend(site(span, va, 5, SiteKind::Other, vec![Form::CallAnywhere]));
        }
    }
    for entry in &tables.jump_labels {
        if span.offset(entry.code).is_some() {
            let (len, forms) = jump_label(image, entry.code, entry.target)?;
            sites.extend(site(span, entry.code, len, SiteKind::JumpLabel, forms));
        }
    }
    for one in &tables.static_calls {
        // The function may be a module's. A tail call of nothing is a return; a call of nothing is a NOP.
        let forms = if one.tail {
            vec![
                Form::Jump,
                Form::JumpAnywhere,
                exact(&RETURN),
                Form::JumpReturnThunk,
            ]
        } else {
            vec![
                Form::Call,
                Form::CallAnywhere,
                exact(&NOP5),
                exact(&RETURN0),
            ]
        };
        sites.extend(site(span, one.site, 5, SiteKind::StaticCall, forms));
    }
    let trampolines = image
        .symbols
        .iter()
        .filter(|symbol| symbol.name.starts_with("__SCT__"));
    for symbol in trampolines {
        let forms = vec![
            Form::Jump,
            Form::JumpAnywhere,
            exact(&RETURN),
            Form::JumpReturnThunk,
        ];
        sites.extend(site(
            span,
            symbol.va,
            5,
            SiteKind::StaticCallTrampoline,
            forms,
        ));
    }
    Ok(())
}

/// A jump label's length, as the file's instruction has it, and its other state.
fn jump_label(image: &Image, code: LinkVa, target: LinkVa) -> Result<(u8, Vec<Form>), Fault> {
    let damaged = |what: &str| Fault::damaged("__jump_table", format!("the site {code} {what}"));
    let bytes = image
        .at(code, 5)
        .ok_or_else(|| damaged("is not in the file"))?;
    let short = bytes.starts_with(&NOP2) || bytes[0] == 0xeb;
    let long = bytes == NOP5 || bytes[0] == 0xe9;
    if short {
        let displacement = i8::try_from(target.0.wrapping_sub(code.0 + 2) as i64);
        let displacement =
            displacement.map_err(|_| damaged("is a short jump, its target is far"))?;
        Ok((2, vec![exact(&NOP2), exact(&[0xeb, displacement as u8])]))
    } else if long {
        let displacement = i32::try_from(target.0.wrapping_sub(code.0 + 5) as i64);
        let displacement = displacement.map_err(|_| damaged("has its target out of reach"))?;
        let mut jump = vec![0xe9];
        jump.extend(displacement.to_le_bytes());
        Ok((5, vec![exact(&NOP5), exact(&jump)]))
    } else {
        Err(damaged("is neither a NOP nor a jump"))
    }
}
