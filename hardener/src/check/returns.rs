//! Rule 5, returns by function: each thunk lets through exactly the return addresses of the functions whose slots lead to it.

use super::Subject;
use super::callers::{self, Goes, Parts};
use super::exec::calls::Decides;
use super::kernel::KernelError;
use super::kernel::symbols::hex;
use super::report::Findings;
use super::return_classes::{self, Claimed};
use super::sets::Legal;
use super::slots::{Original, Replacement};
use super::thunks::Roles;
use penumbra_bundle::{LinkVa, PassSummary};
use rustc_hash::FxHashSet;
use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;

/// The pass, its parameter, and what the parameter may be.
const PASS: &str = "return-cfi";
const POLICY: &str = "policy";
const BY_FUNCTION: &str = "function";
const BY_CLASS: &str = "class";
const BY_SITE: &str = "return-sites";

/// A function's thunk, that of its class, and that of all indirect calls.
const MOST_LINKS: usize = 3;

/// Everything that the thunks are compared with.
struct Compared<'a> {
    subject: &'a Subject<'a>,
    roles: &'a Roles,
    parts: Arc<Parts>,
    /// What is claimed of classes of returns.
    claimed: Option<Claimed>,
    sites: &'a Legal,
    /// All return sites, those that make no difference too.
    any: BTreeSet<LinkVa>,
    /// What is legal without and with indirect calls, whatever the function.
    common: [BTreeSet<LinkVa>; 2],
    after_calls: FxHashSet<LinkVa>,
}

/// Which of the common sets each thunk passes that follows each address, or what is wrong with it and where.
type Kinds = BTreeMap<LinkVa, Result<usize, (LinkVa, String)>>;

/// What the comparison of one thunk with one function's set came to.
#[derive(Default)]
struct Compare {
    legal: u64,
    accidents: u64,
    wrong: Vec<(LinkVa, String)>,
}

/// What thunks decide one after another.
struct Chain {
    /// Return addresses that one of them passes, ascending.
    passed: Vec<u64>,
    /// Those that one of them stops.
    stopped: Vec<u64>,
    /// The callees with which they compare.
    names: Vec<u32>,
    /// The thunk to which all others are left.
    others: LinkVa,
}

impl Compare {
    /// A thunk passes `at`, which is not legal there.
    fn passed(&mut self, compared: &Compared<'_>, at: LinkVa, what: &str) {
        if !compared.after_calls.contains(&at) && compared.looks_like_call(at) {
            self.accidents += 1;
        } else {
            self.wrong.push((at, what.to_owned()));
        }
    }
}

/// Proves it; `sites` are all return sites.
pub fn check(
    subject: &Subject<'_>,
    roles: &Roles,
    sites: &Legal,
    findings: &mut Findings<'_>,
) -> Result<(), KernelError> {
    policies(subject, roles, findings);
    if roles.followed.is_empty() {
        return Ok(());
    }
    let kernel = subject.kernel;
    let parts = subject.parts()?;
    let without = callers::without_call(kernel, &sites.required);
    let claimed = Claimed::of(subject);
    if let Some(claimed) = &claimed {
        let returns = subject.edits().map(|(_, edit)| subject.place(edit));
        let returns = returns.filter(|at| {
            let original = subject.thunks.original(kernel, *at);
            matches!(original, Some((Original::Return, _)))
        });
        let checked = returns.filter_map(|at| parts.part(at)).collect();
        return_classes::check(subject, (&parts, &checked), claimed, findings);
    }
    let indirect = claimed
        .as_ref()
        .map_or(&parts.indirect, |claimed| &claimed.any);
    let with = without.union(indirect).copied().collect();
    let compared = Compared {
        subject,
        roles,
        sites,
        any: sites.required.union(&sites.optional).copied().collect(),
        common: [without, with],
        after_calls: kernel.sweep.after_calls.iter().copied().collect(),
        claimed,
        parts,
    };
    let kinds = compared.kinds();
    compared.shared(&kinds, findings);
    compared.slots(&kinds, findings);
    for (what, count) in callers::counted(&compared.parts) {
        findings.proved(what, count);
    }
    Ok(())
}

/// What each return pass says its policy is, is what its variant's slots lead to.
fn policies(subject: &Subject<'_>, roles: &Roles, findings: &mut Findings<'_>) {
    for (variant, edits) in subject.variants() {
        let Some(said) = variant.passes.iter().find(|pass| pass.name == PASS) else {
            continue;
        };
        let by_function = edits.iter().any(|edit| {
            let thunk = subject.check_of(edit);
            matches!(thunk, Some(Replacement::Jump(to)) if roles.followed.contains_key(&to))
        });
        let found = match (by_function, &subject.bundle.backward) {
            (false, _) => BY_SITE,
            (true, None) => BY_FUNCTION,
            (true, Some(_)) => BY_CLASS,
        };
        if let Some(what) = contradicts(said, found) {
            findings.broken(Some(&variant.name), None, what);
        }
    }
}

fn contradicts(said: &PassSummary, found: &str) -> Option<String> {
    // A bundle from before there was a choice says nothing.
    let said = said.parameters.get(POLICY).map_or(BY_SITE, String::as_str);
    (said != found).then(|| format!("pass {PASS} says {POLICY} `{said}`, its thunks do `{found}`"))
}

impl Compared<'_> {
    /// The addresses that a thunk passes which follows each; none when it is no such thunk.
    fn passes(&self, thunk: LinkVa) -> Option<BTreeSet<LinkVa>> {
        let Decides::Each(ended) = self.roles.followed.get(&thunk)? else {
            return None;
        };
        let mut passes: BTreeSet<LinkVa> = ended.passed.iter().copied().map(LinkVa).collect();
        for (to, at) in &ended.handed_over {
            // Thunks of tables pass their tables' members, which are proved to be the return sites.
            if self.roles.by_table.contains(&LinkVa(*to)) && self.any.contains(&LinkVa(*at)) {
                passes.insert(LinkVa(*at));
            }
        }
        Some(passes)
    }

    /// A thunk to which one that follows each address leaves some, though it does not ask tables: what that lets through is not
    /// counted.
    fn leaves_to_another(&self, thunk: LinkVa) -> Option<LinkVa> {
        let Decides::Each(ended) = self.roles.followed.get(&thunk)? else {
            return None;
        };
        let mut all = ended.leaves_to.iter().map(|to| LinkVa(*to));
        all.find(|to| !self.roles.by_table.contains(to))
    }

    /// Which of the common sets a thunk passes.
    fn kinds(&self) -> Kinds {
        let mut kinds = BTreeMap::new();
        for thunk in self.roles.followed.keys() {
            let Some(passes) = self.passes(*thunk) else {
                continue;
            };
            if let Some(other) = self.leaves_to_another(*thunk) {
                let what = "is where it leaves return addresses to, and no thunk that asks tables";
                kinds.insert(*thunk, Err((other, what.to_owned())));
                continue;
            }
            let differs = |legal: &BTreeSet<LinkVa>| {
                let missing = legal.difference(&passes).next();
                let extra = passes.difference(legal);
                let mut extra = extra.filter(|at| !self.sites.optional.contains(at));
                missing
                    .map(|at| (*at, "kills"))
                    .or(extra.next().map(|at| (*at, "passes")))
            };
            let kind = match (differs(&self.common[0]), differs(&self.common[1])) {
                (None, _) => Ok(0),
                (_, None) => Ok(1),
                (Some((at, does)), Some((other, also))) => Err((
                    at,
                    format!(
                        "{does} {} and {also} {}: it is no thunk for direct calls only, nor one for indirect calls",
                        hex(at),
                        hex(other)
                    ),
                )),
            };
            kinds.insert(*thunk, kind);
        }
        kinds
    }

    fn shared(&self, kinds: &Kinds, findings: &mut Findings<'_>) {
        let mut proved = 0;
        for (thunk, kind) in kinds {
            match kind {
                Ok(_) => proved += 1,
                Err((at, what)) => {
                    let what = format!("the thunk at {} {what}", hex(*thunk));
                    findings.broken(None, Some(*at), what);
                }
            }
        }
        findings.proved("thunks followed for every address", proved);
        findings.proved("legal after indirect calls", self.common[1].len() as u64);
    }

    fn slots(&self, kinds: &Kinds, findings: &mut Findings<'_>) {
        let mut known: FxHashSet<(LinkVa, u32)> = FxHashSet::default();
        let (mut functions, mut legal, mut accidents) = (0, 0, 0);
        for (variant, edit) in self.subject.edits() {
            let at = self.subject.place(edit);
            let original = self.subject.thunks.original(self.subject.kernel, at);
            let (Some((Original::Return, _)), Some(Replacement::Jump(thunk))) =
                (original, self.subject.check_of(edit))
            else {
                continue;
            };
            let Some(part) = self.parts.part(at) else {
                continue;
            };
            if !known.insert((thunk, part)) {
                continue;
            }
            let compare = self.slot(thunk, part, kinds);
            functions += 1;
            legal += compare.legal;
            accidents += compare.accidents;
            for (place, what) in compare.wrong {
                let what = format!("{what}; the return is the one at {}", hex(at));
                findings.broken(Some(variant), Some(place), what);
            }
        }
        findings.proved("functions whose returns are compared", functions);
        findings.proved("legal after direct calls", legal);
        if accidents > 0 {
            findings.proved(
                "addresses before which a call stands by accident",
                accidents,
            );
        }
    }

    fn slot(&self, thunk: LinkVa, part: u32, kinds: &Kinds) -> Compare {
        let mut compare = Compare::default();
        let own = self.roles.followed.get(&thunk);
        let goes = &self.parts.goes[part as usize];
        let (callees, indirect) = match (goes, own) {
            (_, None) if !self.roles.by_table.contains(&thunk) => return compare,
            (Goes::Anywhere, None) => return compare,
            // It looks at the call first, and leaves what it does not know to a table.
            (
                Goes::Anywhere,
                Some(Decides::Some {
                    passed,
                    stopped,
                    others,
                    ..
                }),
            ) if stopped.is_empty() && self.roles.by_table.contains(&LinkVa(*others)) => {
                for at in passed.iter().copied().map(LinkVa) {
                    if self.any.contains(&at) {
                        continue;
                    }
                    compare.passed(self, at, "is passed, though it is no return site");
                }
                return compare;
            }
            (Goes::Anywhere, Some(_)) => {
                let what = "may return to any site, and its thunk does not let it".to_owned();
                compare.wrong.push((thunk, what));
                return compare;
            }
            (Goes::Behind { .. }, None) => {
                let what =
                    "may return to any site, though its callers are known; the check is weakened";
                compare.wrong.push((thunk, what.to_owned()));
                return compare;
            }
            (Goes::Behind { callees, indirect }, Some(_)) => (callees, usize::from(*indirect)),
        };
        let Chain {
            passed,
            stopped,
            names,
            others,
        } = self.chain(thunk);
        match kinds.get(&others) {
            Some(Ok(kind)) if *kind == indirect => {}
            // What is wrong with it has been said.
            Some(Err(_)) => {}
            _ => {
                let calls = ["direct calls only", "indirect calls too"][indirect];
                let what = format!("is reached by {calls}, which is not what its thunk is for");
                compare.wrong.push((others, what));
            }
        }
        let common = &self.common[indirect];
        let back = callees
            .iter()
            .flat_map(|callee| &self.parts.back[*callee as usize]);
        let mut legal: BTreeSet<LinkVa> = back.copied().collect();
        compare.legal = legal.len() as u64;
        if let (1, Some(claimed)) = (indirect, &self.claimed) {
            legal.extend(claimed.class(self.parts.entry(part)));
        }
        for at in &legal {
            let through = passed.binary_search(&at.0).is_ok();
            let common = common.contains(at) && stopped.binary_search(&at.0).is_err();
            if !through && !common {
                let what = "is killed, though a call that gets there returns to it".to_owned();
                compare.wrong.push((*at, what));
            }
        }
        // Calls that a replacement brings name the callee all the same, only not in the file.
        for callee in callees {
            let named = names.contains(&(self.parts.start(*callee).0 as u32));
            let replaced = self.parts.replaced[*callee as usize].iter();
            let through = |at: &LinkVa| named || passed.binary_search(&at.0).is_ok();
            for at in replaced.filter(|at| !through(at) && !common.contains(at)) {
                let what = "is killed, though a call that the kernel puts before it gets there";
                compare.wrong.push((*at, what.to_owned()));
            }
        }
        for at in passed.iter().copied().map(LinkVa) {
            if legal.contains(&at) || common.contains(&at) {
                continue;
            }
            let what = "is passed, though no call that gets there returns to it";
            compare.passed(self, at, what);
        }
        compare
    }

    /// What a thunk decides together with those to which it leaves what it does not know.
    fn chain(&self, thunk: LinkVa) -> Chain {
        let mut chain = Chain {
            passed: Vec::new(),
            stopped: Vec::new(),
            names: Vec::new(),
            others: thunk,
        };
        for _ in 0..MOST_LINKS {
            let Some(Decides::Some {
                passed,
                stopped,
                names,
                others,
            }) = self.roles.followed.get(&chain.others)
            else {
                break;
            };
            // Who was stopped or passed before is not left to this one.
            let (before, after) = (&chain.stopped, &chain.passed);
            let more = passed.iter().filter(|at| before.binary_search(at).is_err());
            let less = stopped.iter().filter(|at| after.binary_search(at).is_err());
            let (more, less): (Vec<u64>, Vec<u64>) =
                (more.copied().collect(), less.copied().collect());
            chain.passed.extend(more);
            chain.stopped.extend(less);
            for list in [&mut chain.passed, &mut chain.stopped] {
                list.sort_unstable();
                list.dedup();
            }
            chain.names.extend(names);
            chain.others = LinkVa(*others);
        }
        chain.names.sort_unstable();
        chain
    }

    /// The five bytes before `at` would be a call, if an instruction started there.
    fn looks_like_call(&self, at: LinkVa) -> bool {
        let before = LinkVa(at.0.wrapping_sub(5));
        !self.subject.kernel.sweep.is_boundary(before)
            && self.subject.kernel.vmlinux.bytes(before, 1) == Some(&[0xe8])
    }
}
