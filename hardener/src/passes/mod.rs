//! The passes: each turns slots into edits. Where to add one: a file here, and its name in [`VARIANTS`].

mod debloat;
mod forward_cfi;
mod module_free;
mod no_rethunk;
mod no_retpoline;
mod no_self_checks;
mod probe;
mod promote;
mod return_cfi;
mod stack_clear;
mod stack_depth;
mod zero_regs;

pub use debloat::{NAME as DEBLOAT, narrows_targets, profile as debloat_profile};
pub use forward_cfi::{NAME as FORWARD_CFI, is_typed};
pub use no_self_checks::left_out;
pub use probe::{NAME as PROBE, functions as probed_functions};
pub use promote::profile as promote_profile;
pub use return_cfi::{
    NAME as RETURN_CFI, is_by_change, is_by_class, is_by_frame, is_per_function,
    thunk_name as return_check,
};
pub use stack_clear::is_wanted as is_clearing;
pub use stack_depth::{NAME as STACK_DEPTH, limits as stack_limits};
pub use zero_regs::is_wanted as is_zeroing;

use crate::recipe::{Parameter, Recipe};
use crate::text::changeable::Changeable;
use crate::text::exposed::Exposed;
use crate::text::large_frames::LargeFrames;
use crate::text::outside::Outside;
use crate::text::probed::Probed;
use crate::text::promotion::Promotion;
use crate::text::return_sets::ReturnSets;
use crate::text::stack_use::StackUse;
use crate::text::watched::Watched;
use crate::text::zeroing::Zeroing;
use crate::text::{Indirect, Return, Slots, Text};
use crate::thunks::{self, CaveContents};
use crate::types::Forward;
use penumbra_bundle::{
    Edit, Edits, LinkVa, Mitigation, ModuleEdit, PassSummary, SlotKind, TextOff,
};
use std::collections::{BTreeMap, HashSet};
use thiserror::Error;

/// What a pass works on.
pub struct Context<'a> {
    /// The kernel's text and its slots.
    pub text: &'a Text,
    /// The thunks that edits may jump to.
    pub cave: &'a CaveContents,
    /// What the passes' parameters are.
    pub recipe: &'a Recipe,
    /// What was found out for passes that ask for it.
    pub analyses: Analyses<'a>,
}

/// What is found out only when a pass asks for it.
#[derive(Clone, Copy, Default)]
pub struct Analyses<'a> {
    /// What indirect branches may reach.
    pub forward: Option<&'a Forward>,
    /// Which calls reach which function.
    pub return_sets: Option<&'a ReturnSets>,
    /// Which returns leave frames that can be overrun, when only these are checked.
    pub exposed: Option<&'a Exposed>,
    /// Which returns may go elsewhere than to their call, when only these are checked.
    pub changeable: Option<&'a Changeable>,
    /// Which returns may clear registers.
    pub zeroing: Option<&'a Zeroing>,
    /// Which returns clear the stack, and which mark it.
    pub stack: Option<&'a StackUse>,
    /// Which indirect branches compare with which targets.
    pub promotion: Option<&'a Promotion>,
    /// Which functions lie outside the profile.
    pub outside: Option<&'a Outside>,
    /// Which functions are probed.
    pub probed: Option<&'a Probed>,
    /// Which functions take much of the stack, and how much must be left for them.
    pub large_frames: Option<&'a LargeFrames>,
}

impl Analyses<'_> {
    /// Whether the return in the R slot of this number is checked: for its own sake, or because another pass edits it.
    pub fn checks(&self, index: usize) -> bool {
        let own = self.exposed.is_none_or(|exposed| exposed.0[index])
            && self.changeable.is_none_or(|changeable| changeable.0[index]);
        own || self.zeroing.is_some_and(|zeroing| zeroing.of_slot[index])
            || self.stack.is_some_and(|stack| stack.is_used(index))
    }

    /// Why the others are not.
    pub fn unchecked(&self) -> Option<&'static str> {
        let by_frame = self.exposed.map(|_| "frame-not-exposed");
        by_frame.or(self.changeable.map(|_| "cannot-have-changed"))
    }
}

/// A pass: edits slots of one kind.
pub trait Pass: Sync {
    /// Its name, as the design has it.
    fn name(&self) -> &'static str;

    /// The kind of slot that it edits.
    fn slot(&self) -> SlotKind;

    /// What its edits do, in half a line.
    fn does(&self) -> &'static str;

    /// Whether it runs only when the recipe names it.
    fn is_optional(&self) -> bool {
        false
    }

    /// Whether it edits slots that a pass before it edits too; its thunks then do both.
    fn shares_slots(&self) -> bool {
        false
    }

    /// Whether the thunk of this name does its part: asked where its traps do not tell, or it shares slots.
    fn is_in(&self, _thunk: &str) -> bool {
        false
    }

    /// The speculation mitigation that its edits leave out.
    fn drops(&self) -> Option<Mitigation> {
        None
    }

    /// The parameters that a recipe may set.
    fn parameters(&self) -> &'static [Parameter] {
        &[]
    }

    /// The file that a recipe must give it.
    fn file(&self) -> Option<FileParameter> {
        None
    }

    /// What it measured on this kernel.
    fn figures(&self, _context: &Context<'_>) -> BTreeMap<String, u64> {
        BTreeMap::new()
    }

    /// Its edits in a module with these slots.
    fn module(
        &self,
        _slots: &Slots,
        _cave: &CaveContents,
        _recipe: &Recipe,
    ) -> Result<Vec<ModuleEdit>, PassError> {
        Ok(Vec::new())
    }

    /// Its edits, and the slots of its kind that it left alone, by reason.
    fn run(&self, context: &Context<'_>) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError>;
}

/// A parameter that is the name of a file, from the recipe's folder.
#[derive(Clone, Copy)]
pub struct FileParameter {
    /// Its key.
    pub name: &'static str,
    /// What is wrong with the file's text, if anything is.
    pub check: fn(&str) -> Result<(), String>,
}

/// Why a variant cannot be made. Each is a mistake in a pass: the slots were checked before.
#[derive(Debug, Error)]
pub enum PassError {
    /// A thunk that an edit needs was not made.
    #[error("{pass}: there is no thunk {thunk}; report it")]
    NoThunk {
        /// The pass.
        pass: &'static str,
        /// The thunk.
        thunk: String,
    },
    /// The edits of a variant contradict each other or the text.
    #[error("variant {variant}: the edit at {at} {detail}; report it")]
    SelfCheck {
        /// The variant.
        variant: &'static str,
        /// Where.
        at: LinkVa,
        /// What is wrong.
        detail: &'static str,
    },
}

/// The variants of every bundle: name and passes. `stock` comes first.
pub const VARIANTS: [(&str, &[&dyn Pass]); 3] = [
    ("stock", &[&module_free::ModuleFree]),
    (
        "fast",
        &[
            &no_retpoline::NoRetpoline,
            &promote::Promote,
            &no_rethunk::NoRethunk,
            &no_self_checks::NoSelfChecks,
            &module_free::ModuleFree,
        ],
    ),
    (
        "hardened",
        &[
            &return_cfi::ReturnCfi,
            &forward_cfi::ForwardCfi,
            &zero_regs::ZeroRegs,
            &stack_clear::StackClear,
            &debloat::Debloat,
            &probe::Probe,
            &stack_depth::StackDepth,
            &module_free::ModuleFree,
        ],
    ),
];

/// A variant as its passes made it.
pub struct Made {
    /// Its name.
    pub name: &'static str,
    /// What each pass did.
    pub passes: Vec<PassSummary>,
    /// What the passes leave out.
    pub drops: Vec<Mitigation>,
    /// The edits, by address.
    pub edits: Edits,
}

/// Runs the passes of one variant and checks that their edits fit together.
pub fn run(
    name: &'static str,
    passes: &[&dyn Pass],
    context: &Context<'_>,
) -> Result<Made, PassError> {
    let mut made = Made {
        name,
        passes: Vec::new(),
        drops: Vec::new(),
        edits: Edits::default(),
    };
    let wanted = |pass: &&&dyn Pass| !pass.is_optional() || context.recipe.names(pass.name());
    for pass in passes.iter().filter(wanted) {
        let (edits, left) = pass.run(context)?;
        if pass.shares_slots() {
            let taken: HashSet<TextOff> = edits.iter().map(|edit| edit.at).collect();
            made.edits.0.retain(|edit| !taken.contains(&edit.at));
        }
        made.passes.push(PassSummary {
            name: pass.name().to_owned(),
            edited: edits.len() as u64,
            left,
            parameters: parameters(*pass, context.recipe),
            figures: pass.figures(context),
        });
        made.drops.extend(pass.drops());
        made.edits.0.extend(edits);
    }
    made.drops.sort();
    // Passes that share slots leave out the same.
    made.drops.dedup();
    made.edits.0.sort_by_key(|edit| edit.at);
    self_check(name, context.text, &made.edits)?;
    Ok(made)
}

/// Runs the passes of each variant over a module's slots.
pub fn run_module(
    slots: &Slots,
    cave: &CaveContents,
    recipe: &Recipe,
) -> Result<Vec<Vec<ModuleEdit>>, PassError> {
    let variants = VARIANTS.iter().map(|(_, passes)| {
        let mut edits = Vec::new();
        for pass in *passes {
            edits.extend(pass.module(slots, cave, recipe)?);
        }
        edits.sort_by_key(|edit: &ModuleEdit| edit.at);
        Ok(edits)
    });
    variants.collect()
}

/// Every pass that some variant runs, by name.
pub fn known() -> BTreeMap<&'static str, &'static dyn Pass> {
    let all = VARIANTS.iter().flat_map(|(_, passes)| passes.iter());
    all.map(|pass| (pass.name(), *pass)).collect()
}

/// The values of a pass's parameters, for the manifest.
fn parameters(pass: &dyn Pass, recipe: &Recipe) -> BTreeMap<String, String> {
    let value = |parameter: &Parameter| {
        let value = recipe.value(pass.name(), parameter);
        (parameter.name.to_owned(), value.to_owned())
    };
    pass.parameters().iter().map(value).collect()
}

/// Stays in release builds: edits are whole instructions, apart from one another (design, invariant 1).
fn self_check(variant: &'static str, text: &Text, edits: &Edits) -> Result<(), PassError> {
    let mut free = 0;
    for edit in &edits.0 {
        let end = TextOff(edit.at.0 + edit.bytes.len() as u32);
        let inner = edit.at.0 as usize + 1..end.0 as usize;
        let detail = if edit.at.0 < free {
            "overlaps the one before"
        } else if !text.sweep.is_boundary(edit.at) || !text.sweep.is_boundary(end) {
            "is not a whole instruction"
        } else if text.sweep.boundaries.any(inner) {
            "covers more than one instruction"
        } else {
            free = end.0;
            continue;
        };
        return Err(PassError::SelfCheck {
            variant,
            at: text.va(edit.at),
            detail,
        });
    }
    Ok(())
}

/// Leads the calls of what `pass` watches to their thunks: the edits, and what is left alone.
fn to_thunks(
    context: &Context<'_>,
    pass: &'static str,
    watched: Option<&Watched>,
) -> Result<(Vec<Edit>, BTreeMap<String, u64>), PassError> {
    let Some(watched) = watched else {
        return Ok((Vec::new(), BTreeMap::new()));
    };
    let edits = watched.slots.iter().map(|slot| {
        let thunk = context.thunk(pass, &thunks::watched::name(pass, watched, slot.to))?;
        let opcode = if slot.jump { JMP } else { CALL };
        Ok(Edit {
            at: slot.at,
            slot: SlotKind::Call,
            bytes: context.branch(slot.at, 0, opcode, thunk),
        })
    });
    Ok((
        edits.collect::<Result<_, PassError>>()?,
        watched.left.clone(),
    ))
}

fn thunk(cave: &CaveContents, pass: &'static str, name: &str) -> Result<LinkVa, PassError> {
    let known = cave.thunks.get(name).copied();
    known.ok_or_else(|| PassError::NoThunk {
        pass,
        thunk: name.to_owned(),
    })
}

impl Context<'_> {
    fn thunk(&self, pass: &'static str, name: &str) -> Result<LinkVa, PassError> {
        thunk(self.cave, pass, name)
    }

    /// `opcode rel32` to `target`, behind `prefixes` CS prefixes.
    fn branch(&self, at: TextOff, prefixes: usize, opcode: u8, target: LinkVa) -> Vec<u8> {
        let next = self.text.va(at).0 + prefixes as u64 + 5;
        // The cave lies in the same text: well inside 2 GiB.
        let displacement = target.0.wrapping_sub(next) as u32;
        let mut bytes = vec![CS; prefixes];
        bytes.push(opcode);
        bytes.extend(displacement.to_le_bytes());
        bytes
    }

    fn returns(&self) -> impl Iterator<Item = &Return> {
        self.text.slots.returns.iter()
    }

    fn indirect(&self) -> impl Iterator<Item = &Indirect> {
        self.text.slots.indirect.iter()
    }
}

/// The CS segment prefix: ignored in 64-bit mode (SDM volume 2, 2.1.1).
const CS: u8 = 0x2e;
const CALL: u8 = 0xe8;
const JMP: u8 = 0xe9;
