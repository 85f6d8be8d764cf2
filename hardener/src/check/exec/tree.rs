//! What a thunk decides, and the proof that it is membership in its tables.

use super::interval::Set;
use super::machine::Code;
use super::term::{Arena, Op, Term, apply_all, sign_extend};
use rustc_hash::FxHashMap;
use std::collections::BTreeSet;

/// More subjects than any table speaks about.
const MAX_SUBJECTS: u64 = 1 << 28;
/// Entries that follow each other byte by byte.
const MAX_RUN: u64 = 16;
/// Subjects evaluated at a time.
const LANES: u64 = 4096;

/// A node in a [`Tree`].
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub struct NodeId(pub usize);

/// How a path ends.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Leaf {
    /// As the slot would have gone on.
    Pass,
    /// Reported.
    Trap,
    /// Left to the thunk at this address.
    HandOver(u64),
}

/// A decision.
#[derive(Clone, PartialEq, Eq, Debug)]
pub enum Node {
    /// A conditional branch.
    Branch {
        /// The condition, 0 or 1.
        cond: Term,
        /// Where 1 goes.
        yes: NodeId,
        /// Where 0 goes.
        no: NodeId,
    },
    /// Memory is read whose address depends on the subject.
    Touch {
        /// The load.
        load: Term,
        /// Who comes this way.
        subjects: Set,
        /// What comes next.
        next: NodeId,
    },
    /// The end, and who may get there.
    Leaf(Leaf, Set),
}

/// All that a thunk does with its subject.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Tree {
    pub(super) ops: Vec<Op>,
    /// Its nodes.
    pub nodes: Vec<Node>,
    pub(super) root: NodeId,
    /// Conditions that hold only when what stands before the subject names an address.
    pub(super) names: FxHashMap<Term, Name>,
    /// Conditions that hold for one subject only.
    pub(super) exact: FxHashMap<Term, u64>,
    /// Whether anything stands before the subject that it looks at.
    looks_before: bool,
}

/// What has to be named for a condition to hold.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub(super) struct Name {
    /// The address, modulo 2^32, or the next.
    pub least: u32,
    /// Which of the two, if there are two: the first where the byte before the four that name it is below this, the next where it
    /// is not.
    pub limit: Option<u64>,
}

impl Name {
    /// The one that a call's opcode goes with.
    pub fn called(self) -> u32 {
        match self.limit {
            Some(limit) if CALL >= limit => self.least.wrapping_add(1),
            _ => self.least,
        }
    }

    /// Both, where there are two.
    pub fn each(self) -> impl Iterator<Item = u32> {
        let next = self.limit.map(|_| self.least.wrapping_add(1));
        std::iter::once(self.least).chain(next)
    }
}

/// `call rel32`.
const CALL: u64 = 0xe8;

/// What comparisons alone decide.
#[derive(Clone, PartialEq, Eq, Debug)]
pub struct Compared {
    /// Who passes: intervals, both ends inside.
    pub passed: Vec<(u64, u64)>,
    /// Who is stopped.
    pub stopped: Vec<(u64, u64)>,
}

impl Compared {
    /// The subjects from `low` to `high`, both inside, that pass; none when somebody outside is stopped, or when whole
    /// stretches pass as no list of entries has them.
    pub fn members(&self, low: u64, high: u64) -> Option<Vec<u64>> {
        let inside = |at: &(u64, u64)| low <= at.0 && at.1 <= high;
        if self.stopped.is_empty() || !self.stopped.iter().all(inside) {
            return None;
        }
        let mut members = Vec::new();
        for (from, to) in &self.passed {
            let (from, to) = (*from.max(&low), *to.min(&high));
            if from <= to {
                // Two entries side by side are one instruction of a byte apart.
                if to - from > MAX_RUN {
                    return None;
                }
                members.extend(from..=to);
            }
        }
        Some(members)
    }
}

/// A table as decoded: where it lies, and which subjects it holds.
pub struct Lookup<'a> {
    /// The memory that it takes, at the slide in use.
    pub place: (u64, u64),
    /// The first subject that it speaks about, and the first after.
    pub covers: (u64, u64),
    /// Its members, ascending.
    pub members: &'a [u64],
}

impl Tree {
    /// Keeps only what the nodes need, so that thunks which decide alike are equal.
    pub fn new(arena: &Arena, mut nodes: Vec<Node>, root: NodeId) -> Tree {
        let mut tree = Tree {
            ops: Vec::new(),
            nodes: Vec::new(),
            root,
            names: FxHashMap::default(),
            exact: FxHashMap::default(),
            looks_before: false,
        };
        let mut map = FxHashMap::default();
        for node in &mut nodes {
            match node {
                Node::Branch { cond, .. } => {
                    let (named, exact) = (named(arena, *cond), exact(arena, *cond));
                    *cond = tree.adopt(arena, &mut map, *cond);
                    tree.names.extend(named.map(|name| (*cond, name)));
                    tree.exact.extend(exact.map(|subject| (*cond, subject)));
                }
                Node::Touch { load, .. } => *load = tree.adopt(arena, &mut map, *load),
                Node::Leaf(..) => {}
            }
        }
        nodes.shrink_to_fit();
        tree.ops.shrink_to_fit();
        tree.nodes = nodes;
        tree
    }

    fn adopt(&mut self, arena: &Arena, map: &mut FxHashMap<Term, Term>, term: Term) -> Term {
        if let Some(known) = map.get(&term) {
            return *known;
        }
        let op = match arena.op(term) {
            Op::Bin(op, left, right) => {
                let left = self.adopt(arena, map, left);
                Op::Bin(op, left, self.adopt(arena, map, right))
            }
            Op::SignExtend(bits, inner) => Op::SignExtend(bits, self.adopt(arena, map, inner)),
            Op::Load(bytes, inner) => {
                self.looks_before |= arena.before_subject(inner).is_some();
                Op::Load(bytes, self.adopt(arena, map, inner))
            }
            op => op,
        };
        let own = Term(self.ops.len() as u32);
        self.ops.push(op);
        map.insert(term, own);
        own
    }

    /// Whether it decides by what stands before the subject, or leaves decisions to others: such a tree is followed, not
    /// proved to be membership.
    pub fn follows_calls(&self) -> bool {
        let hands_over = |node: &Node| matches!(node, Node::Leaf(Leaf::HandOver(_), _));
        self.looks_before || self.nodes.iter().any(hands_over)
    }

    /// Proves that the thunk passes exactly the members of the tables that it reads, and everything that none of those
    /// tables speaks about. Which tables it reads, or what is wrong.
    pub fn prove(&self, code: &Code<'_>, tables: &[Lookup<'_>]) -> Result<BTreeSet<usize>, Wrong> {
        let mut bounded = Set::none();
        for node in &self.nodes {
            match node {
                // What stands at a fixed place may be read for every subject.
                Node::Touch { load, .. } if self.is_fixed(*load) => {}
                Node::Touch { subjects, .. } | Node::Leaf(Leaf::Trap, subjects) => {
                    bounded = bounded.union(subjects);
                }
                _ => {}
            }
        }
        let size = |set: &Set| {
            let spans = set.spans().iter();
            spans.fold(0u64, |sum, (low, high)| {
                sum.saturating_add((high - low).saturating_add(1))
            })
        };
        if size(&bounded) > MAX_SUBJECTS {
            let stray = bounded.hull().map_or(0, |(low, _)| low);
            return Err(Wrong::Unbounded(stray));
        }
        let mut seen = BTreeSet::new();
        let mut passed = Vec::new();
        let hull = bounded.hull().unwrap_or((0, 0));
        let concerned = self.concerned(code, tables, hull, false);
        for &(low, high) in bounded.spans() {
            let ended = match &concerned {
                Some(Ok(subjects)) => {
                    let from = subjects.partition_point(|at| *at < low);
                    let to = subjects.partition_point(|at| *at <= high);
                    // The ends show which tables are read for those whom no word means.
                    let mut some = [&[low], &subjects[from..to], &[high]].concat();
                    some.dedup();
                    self.evaluate_each(code, tables, &some, &mut seen)?
                }
                _ => self.evaluate(code, tables, low, high, &mut seen)?,
            };
            if let Some((_, subject)) = ended.handed_over.first() {
                return Err(Wrong::HandsOver(*subject));
            }
            passed.extend(ended.passed);
        }
        if seen.is_empty() {
            return Err(Wrong::NoTable);
        }
        let mut covered = Set::none();
        let mut members: Vec<u64> = Vec::new();
        for table in &seen {
            let table = &tables[*table];
            covered = covered.union(&Set::span(table.covers.0, table.covers.1.saturating_sub(1)));
            members.extend(table.members);
        }
        members.sort_unstable();
        members.dedup();
        if let Some((stray, _)) = bounded.minus(&covered).hull() {
            return Err(Wrong::Outside(stray));
        }
        // What is covered but not bounded passes unseen: right only for members.
        let unseen = covered.minus(&bounded);
        for &(low, high) in unseen.spans() {
            let mut next = low;
            let from = members.partition_point(|member| *member < low);
            for member in &members[from..] {
                if *member != next {
                    break;
                }
                next += 1;
            }
            if next <= high {
                return Err(Wrong::Passes(next));
            }
        }
        // Both ascend; those in `unseen` are members, so they are left out on both sides.
        let inside = |member: &u64| {
            let mut spans = bounded.spans().iter();
            spans.any(|(low, high)| low <= member && member <= high)
        };
        let mut wanted = members.iter().copied().filter(inside).peekable();
        let mut passed = passed.into_iter().peekable();
        loop {
            match (wanted.peek(), passed.peek()) {
                (None, None) => return Ok(seen),
                (Some(want), Some(pass)) if want == pass => {
                    wanted.next();
                    passed.next();
                }
                (Some(want), pass) if pass.is_none_or(|pass| want < pass) => {
                    return Err(Wrong::Traps(*want));
                }
                (_, pass) => return Err(Wrong::Passes(*pass.expect("one of the two is there"))),
            }
        }
    }

    /// For a thunk that compares its subject with constants only: who passes and who is stopped, as sorted intervals.
    pub fn compared(&self) -> Option<Compared> {
        let mut ends: Vec<(u64, u64, bool)> = Vec::new();
        for node in &self.nodes {
            match node {
                Node::Branch { .. } => {}
                Node::Leaf(Leaf::Pass, set) => {
                    ends.extend(set.spans().iter().map(|(low, high)| (*low, *high, true)));
                }
                Node::Leaf(Leaf::Trap, set) => {
                    ends.extend(set.spans().iter().map(|(low, high)| (*low, *high, false)));
                }
                Node::Leaf(Leaf::HandOver(_), _) | Node::Touch { .. } => return None,
            }
        }
        ends.sort_unstable();
        // Where a condition is no comparison, both ways have the same subjects.
        let apart = ends.windows(2).all(|pair| pair[0].1 < pair[1].0);
        let of = |passes: bool| {
            let all = ends.iter().filter(move |end| end.2 == passes);
            all.map(|(low, high, _)| (*low, *high)).collect()
        };
        apart.then(|| Compared {
            passed: of(true),
            stopped: of(false),
        })
    }

    fn is_fixed(&self, load: Term) -> bool {
        match self.ops[load.0 as usize] {
            Op::Load(_, address) => matches!(self.ops[address.0 as usize], Op::Const(_)),
            _ => false,
        }
    }

    /// Evaluates every subject from `low` to `high`, both inside.
    pub(super) fn evaluate(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        low: u64,
        high: u64,
        seen: &mut BTreeSet<usize>,
    ) -> Result<Ended, Wrong> {
        let mut ended = Ended::default();
        let mut first = low;
        loop {
            let last = first.saturating_add(LANES - 1).min(high);
            let before = ended.passed.len();
            self.evaluate_all(code, tables, (first..=last).collect(), seen, &mut ended)?;
            ended.passed[before..].sort_unstable();
            if last == high {
                return Ok(ended);
            }
            first = last + 1;
        }
    }

    /// Evaluates these subjects, sorted.
    pub(super) fn evaluate_each(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        subjects: &[u64],
        seen: &mut BTreeSet<usize>,
    ) -> Result<Ended, Wrong> {
        let mut ended = Ended::default();
        for some in subjects.chunks(LANES as usize) {
            let before = ended.passed.len();
            self.evaluate_all(code, tables, some.to_vec(), seen, &mut ended)?;
            ended.passed[before..].sort_unstable();
        }
        Ok(ended)
    }

    /// Evaluates these subjects; adds how they end.
    fn evaluate_all(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        subjects: Vec<u64>,
        seen: &mut BTreeSet<usize>,
        ended: &mut Ended,
    ) -> Result<(), Wrong> {
        // Lanes part at branches and go on as smaller groups.
        let mut groups: Vec<(NodeId, Vec<u64>)> = vec![(self.root, subjects)];
        while let Some((at, mut lanes)) = groups.pop() {
            match &self.nodes[at.0] {
                Node::Branch { cond, yes, no } => {
                    let truths = self.values(code, *cond, &lanes);
                    let taken = part(&mut lanes, truths);
                    let arms = [(*yes, taken), (*no, lanes)];
                    groups.extend(arms.into_iter().filter(|(_, lanes)| !lanes.is_empty()));
                }
                Node::Touch { load, next, .. } => {
                    self.touch(code, tables, *load, &lanes, seen)?;
                    groups.push((*next, lanes));
                }
                Node::Leaf(Leaf::Pass, _) => ended.passed.extend(lanes),
                Node::Leaf(Leaf::Trap, _) => {}
                Node::Leaf(Leaf::HandOver(to), _) => {
                    let lanes = lanes.into_iter().map(|lane| (*to, lane));
                    ended.handed_over.extend(lanes);
                }
            }
        }
        Ok(())
    }

    /// Every read is of a table.
    fn touch(
        &self,
        code: &Code<'_>,
        tables: &[Lookup<'_>],
        load: Term,
        lanes: &[u64],
        seen: &mut BTreeSet<usize>,
    ) -> Result<(), Wrong> {
        let Op::Load(bytes, address) = self.ops[load.0 as usize] else {
            return Ok(());
        };
        let values = self.values(code, address, lanes);
        let (low, high) = values.iter().fold((u64::MAX, 0), |(low, high), at| {
            (low.min(*at), high.max(*at))
        });
        let whole = tables
            .iter()
            .position(|table| table.place.0 <= low && high < table.place.1);
        if let (Some(table), Some(_)) = (whole, code.load(high, bytes)) {
            seen.insert(table);
            return Ok(());
        }
        for (lane, at) in lanes.iter().zip(values) {
            if code.load(at, bytes).is_none() {
                return Err(Wrong::Reads(*lane, at));
            }
            let table = tables
                .iter()
                .position(|table| table.place.0 <= at && at < table.place.1);
            seen.insert(table.ok_or(Wrong::NotATable(*lane, at))?);
        }
        Ok(())
    }

    /// The value of `term` for each subject.
    fn values(&self, code: &Code<'_>, term: Term, lanes: &[u64]) -> Vec<u64> {
        match self.ops[term.0 as usize] {
            Op::Subject => lanes.to_vec(),
            Op::Const(value) => vec![value; lanes.len()],
            Op::Bin(op, left, right) => {
                let mut out = self.values(code, left, lanes);
                if let Op::Const(value) = self.ops[right.0 as usize] {
                    apply_all(op, &mut out, std::iter::repeat(value));
                } else {
                    let right = self.values(code, right, lanes);
                    apply_all(op, &mut out, right.into_iter());
                }
                out
            }
            Op::SignExtend(bits, inner) => {
                let mut out = self.values(code, inner, lanes);
                for place in &mut out {
                    *place = sign_extend(*place, u32::from(bits));
                }
                out
            }
            Op::Load(bytes, address) => {
                let mut out = self.values(code, address, lanes);
                // `touch` has refused reads outside the cave on every path that gets here, but for those before the subject.
                for place in &mut out {
                    let value = code.load(*place, bytes);
                    let value = value.or_else(|| code.load_text(*place, bytes));
                    *place = value.unwrap_or(0);
                }
                out
            }
            Op::Reg(_) | Op::Flag(_) | Op::Stack(_) | Op::Unknown(_) | Op::Flags(_) => {
                unreachable!("the machine refuses conditions and addresses on anything else")
            }
        }
    }
}

/// Leaves the lanes whose truth is 0, in their order, and gives the others in theirs. Both lists are of one length; the memory is
/// theirs.
fn part(lanes: &mut Vec<u64>, mut truths: Vec<u64>) -> Vec<u64> {
    let (mut taken, mut left) = (0, 0);
    // Which way each lane goes is as good as random, so nothing branches on it.
    for index in 0..lanes.len() {
        let (lane, truth) = (lanes[index], truths[index]);
        truths[taken] = lane;
        lanes[left] = lane;
        taken += usize::from(truth != 0);
        left += usize::from(truth == 0);
    }
    truths.truncate(taken);
    lanes.truncate(left);
    truths
}

/// How subjects end.
#[derive(Default, PartialEq, Eq, Debug)]
pub struct Ended {
    /// Those that pass, ascending where they were given so.
    pub passed: Vec<u64>,
    /// Those that are left to the thunk at an address: the address, the subject.
    pub handed_over: Vec<(u64, u64)>,
    /// To which thunks it leaves subjects at all.
    pub leaves_to: BTreeSet<u64>,
}

/// What the call before the subject must name for `cond` to hold: call and subject are added up.
fn named(arena: &Arena, cond: Term) -> Option<Name> {
    let Op::Bin(super::term::Bin::Eq, left, right) = arena.op(cond) else {
        return None;
    };
    // Only then is it a question modulo 2^32.
    if !arena.is_half(left) || !arena.is_half(right) {
        return None;
    }
    let (left, right) = (arena.sum(left)?, arena.sum(right)?);
    let (sum, other) = match right.carry {
        None => (left, right),
        Some(_) => (right, left),
    };
    let difference = sum.less(&other)?;
    let name = match (difference.subject, difference.named, difference.carry) {
        (1, 1, _) => difference.constant.wrapping_neg(),
        (u32::MAX, u32::MAX, None) => difference.constant,
        _ => return None,
    };
    // What is added for the byte is not named.
    let added = u32::from(difference.carry.is_some());
    Some(Name {
        least: name.wrapping_sub(added),
        limit: difference.carry,
    })
}

/// The one subject for which `cond` holds, when it compares the whole of it with a constant.
fn exact(arena: &Arena, cond: Term) -> Option<u64> {
    match arena.op(cond) {
        Op::Bin(super::term::Bin::Eq, left, right) if arena.op(left) == Op::Subject => {
            arena.value(right)
        }
        _ => None,
    }
}

/// Why a decision is not membership; each with the first subject for which it goes wrong.
#[derive(Clone, Copy, PartialEq, Eq, Debug)]
pub enum Wrong {
    /// It reads or traps for subjects that no comparison has bounded.
    Unbounded(u64),
    /// It leaves a subject to another thunk.
    HandsOver(u64),
    /// It looks in no table.
    NoTable,
    /// It reads or traps for a subject that no table it reads speaks about.
    Outside(u64),
    /// It reads outside the cave: subject, address.
    Reads(u64, u64),
    /// It reads the cave outside every table: subject, address.
    NotATable(u64, u64),
    /// It passes what is not in its tables.
    Passes(u64),
    /// It traps what is in its tables.
    Traps(u64),
}
