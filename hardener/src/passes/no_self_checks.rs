//! `no-self-checks`: calls of functions by which the kernel only checks itself become one instruction that gives back what they
//! give back when nothing is wrong (see [`crate::text::self_checks`]). What they catch, the kernel of these processes does not
//! catch any more. The return address behind the slot stays, for whoever is inside such a function while the view changes; but what
//! stands before it does not name the function in every view, so that returns of these functions do not ask for that
//! ([`left_out`]).

use super::{CS, Context, Pass, PassError};
use crate::recipe::{Parameter, Recipe};
use crate::text::self_checks::{CheckCall, Gives, KNOWN};
use crate::text::{Slots, Text};
use crate::thunks::CaveContents;
use penumbra_bundle::{Edit, ModuleEdit, Put, SlotKind, TextOff};
use std::collections::BTreeMap;

const NAME: &str = "no-self-checks";
const DROP: &str = "drop";

/// Whether checks of one subject are called no more.
const fn parameter(name: &'static str) -> Parameter {
    Parameter {
        name,
        values: &[DROP, "keep"],
        takes_list: false,
    }
}

/// One for each subject of [`KNOWN`].
const PARAMETERS: &[Parameter] = &[
    parameter("fpu"),
    parameter("lists"),
    parameter("slab"),
    parameter("usercopy"),
];

/// See the module.
pub struct NoSelfChecks;

impl Pass for NoSelfChecks {
    fn name(&self) -> &'static str {
        NAME
    }

    fn slot(&self) -> SlotKind {
        SlotKind::Call
    }

    fn does(&self) -> &'static str {
        "goes on as if the kernel's check of itself had found nothing"
    }

    fn parameters(&self) -> &'static [Parameter] {
        PARAMETERS
    }

    fn figures(&self, context: &Context<'_>) -> BTreeMap<String, u64> {
        let mut figures = BTreeMap::new();
        for call in dropped(&context.text.slots, context.recipe) {
            let name = KNOWN[call.check].name;
            *figures.entry(name.to_owned()).or_default() += u64::from(call.left.is_none());
        }
        figures
    }

    fn module(
        &self,
        slots: &Slots,
        _: &CaveContents,
        recipe: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        let calls = dropped(slots, recipe).filter(|call| call.left.is_none());
        let edits = calls.map(|call| ModuleEdit {
            at: call.at,
            slot: SlotKind::Call,
            put: Put::Bytes(instead(KNOWN[call.check].gives).to_vec()),
        });
        Ok(edits.collect())
    }

    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
        let (mut edits, mut left) = (Vec::new(), BTreeMap::new());
        for call in dropped(&context.text.slots, context.recipe) {
            match call.left {
                Some(reason) => *left.entry(reason.to_owned()).or_default() += 1,
                None => edits.push(Edit {
                    at: call.at,
                    slot: SlotKind::Call,
                    bytes: instead(KNOWN[call.check].gives).to_vec(),
                }),
            }
        }
        Ok((edits, left))
    }
}

/// The branches to checks that `recipe` does not keep.
fn dropped<'a>(slots: &'a Slots, recipe: &'a Recipe) -> impl Iterator<Item = &'a CheckCall> {
    let drops = |subject: &str| {
        let mut parameters = PARAMETERS.iter();
        let parameter = parameters.find(|one| one.name == subject);
        parameter.is_some_and(|one| recipe.value(NAME, one) == DROP)
    };
    let calls = slots.check_calls.iter();
    calls.filter(move |call| drops(KNOWN[call.check].subject))
}

/// The functions of which this pass leaves out calls in the kernel's text, once for each call.
pub fn left_out(text: &Text, recipe: &Recipe) -> Vec<TextOff> {
    let calls = dropped(&text.slots, recipe).filter(|call| call.left.is_none());
    calls.filter_map(|call| text.span.offset(call.to)).collect()
}

/// The instruction of 5 bytes that stands for a call. RAX is where the result is, and nobody's before (System V psABI, 3.2.3).
fn instead(gives: Gives) -> [u8; 5] {
    match gives {
        // The recommended NOP of 5 bytes (SDM volume 2, NOP).
        Gives::Nothing => [0x0f, 0x1f, 0x44, 0, 0],
        // mov $1,%eax
        Gives::True => [0xb8, 1, 0, 0, 0],
        // mov %rdi,%rax, behind prefixes that mean nothing there
        Gives::First => [CS, CS, 0x48, 0x89, 0xf8],
    }
}

#[cfg(test)]
mod tests {
    use super::{Gives, KNOWN, PARAMETERS, instead};
    use iced_x86::{Decoder, DecoderOptions, Formatter, GasFormatter};

    #[test]
    fn each_check_is_one_instruction_of_five_bytes_and_has_a_parameter() {
        for (gives, expected) in [
            (Gives::Nothing, "nop"),
            (Gives::True, "mov $1,%eax"),
            (Gives::First, "mov %rdi,%rax"),
        ] {
            let bytes = instead(gives);
            let decoded = Decoder::new(64, &bytes, DecoderOptions::NONE).decode();
            assert_eq!(decoded.len(), 5, "{bytes:02x?}");
            let mut text = String::new();
            GasFormatter::new().format(&decoded, &mut text);
            assert!(text.contains(expected), "{text}");
        }
        for check in KNOWN {
            let named = |one: &&super::Parameter| one.name == check.subject;
            assert!(PARAMETERS.iter().any(|one| named(&one)), "{}", check.name);
        }
    }
}
