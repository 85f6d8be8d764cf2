//! `.retpoline_sites`, `.return_sites` and `.ibt_endbr_seal`.

use super::{exact, nops, site};
use crate::image::{Image, Tables};
use crate::text::slots::REGISTERS;
use crate::text::{Span, TextError};
use penumbra_bundle::{Form, LinkVa, Site, SiteKind, TextOff};

/// Return thunks (arch/x86/lib/retpoline.S), over the versions.
const RETURN_THUNKS: [&str; 9] = [
    "__x86_return_thunk",
    "retbleed_return_thunk",
    "srso_return_thunk",
    "srso_alias_return_thunk",
    "srso_safe_ret_alias",
    "its_return_thunk",
    "call_depth_return_thunk",
    "zen_return_thunk",
    "entry_return_thunk",
];

const LFENCE: [u8; 3] = [0x0f, 0xae, 0xe8];
const INT3: u8 = 0xcc;
/// What sealing leaves of ENDBR64 (`gen_endbr_poison`): to 6.1, to 6.12.
const ENDBR_POISON: [[u8; 4]; 2] = [[0x66, 0x0f, 0x1f, 0x00], [0x0f, 0x1f, 0x40, 0xd6]];

/// The return thunks that the image has; sorted.
pub fn return_thunks(image: &Image, span: Span) -> Vec<TextOff> {
    let mut found: Vec<TextOff> = RETURN_THUNKS
        .iter()
        .filter_map(|name| span.offset(image.symbol(name)?))
        .collect();
    found.sort_unstable();
    found.dedup();
    found
}

/// Adds the sites.
pub fn sites(
    image: &Image,
    tables: &Tables,
    span: Span,
    sites: &mut Vec<Site>,
) -> Result<(), TextError> {
    let plain_return = exact(&[0xc3, INT3, INT3, INT3, INT3]);
    for va in &tables.returns {
        let forms = vec![plain_return.clone(), Form::JumpReturnThunk];
        sites.extend(site(span, *va, 5, SiteKind::Return, forms));
    }
    let mut thunks = Vec::new();
    for (number, name) in (0u8..).zip(REGISTERS) {
        if let Some(va) = image.symbol(&format!("__x86_indirect_thunk_{name}")) {
            thunks.push((va, number));
        }
    }
    for va in &tables.retpolines {
        let Some(bytes) = image.at(*va, 6).filter(|_| span.offset(*va).is_some()) else {
            continue;
        };
        let prefix = usize::from(bytes[0] == 0x2e);
        let len = 5 + prefix;
        let (opcode, displacement) = (bytes[prefix], &bytes[prefix + 1..prefix + 5]);
        let displacement = i32::from_le_bytes(displacement.try_into().expect("four bytes"));
        let target = LinkVa((va.0 + len as u64).wrapping_add_signed(i64::from(displacement)));
        let register = thunks.iter().find(|(thunk, _)| *thunk == target);
        let forms = match register {
            Some((_, register)) if matches!(opcode, 0xe8 | 0xe9) => inlined(opcode, *register, len),
            // Not a site that `apply_retpolines` knows: only the file's own bytes are explained.
            _ => vec![],
        };
        sites.extend(site(span, *va, len as u8, SiteKind::Retpoline, forms));
    }
    for va in &tables.sealed_endbr {
        let forms = ENDBR_POISON.iter().map(|bytes| exact(bytes)).collect();
        sites.extend(site(span, *va, 4, SiteKind::Other, forms));
    }
    Ok(())
}

/// What a site holds when retpolines are off (`patch_retpoline`): the branch itself, with LFENCE before it for
/// `spectre_v2=retpoline,lfence` where it fits; the installer refuses to build views over either.
fn inlined(opcode: u8, register: u8, len: usize) -> Vec<Form> {
    let mut branch = Vec::new();
    if register >= 8 {
        branch.push(0x41);
    }
    let modrm = if opcode == 0xe8 { 0xd0 } else { 0xe0 };
    branch.extend([0xff, modrm | register & 7]);
    let mut forms = Vec::new();
    for before in [&[][..], &LFENCE] {
        let mut bytes = before.to_vec();
        bytes.extend(&branch);
        if bytes.len() > len {
            continue;
        }
        if opcode == 0xe9 && bytes.len() < len {
            bytes.push(INT3);
        }
        let used = bytes.len();
        bytes.resize(len, 0x90);
        nops::fill(&mut bytes[used..], 8);
        forms.push(exact(&bytes));
    }
    forms
}
