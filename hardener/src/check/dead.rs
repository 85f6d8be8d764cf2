//! Rule 4, what returns clear: a register may only be cleared where nobody reads it before writing it.
//!
//! That no compiled caller does is the ABI's promise (System V psABI, 3.2.1) for functions whose callers were compiled without
//! a look at them (`-pg`, see `thunks.rs`). Here it is put to the test: from every address to which such a function is known to
//! return, all ways are walked until the next call or return. Assembly promises nothing, so it may not be among
//! the callers; nor may code that only the run knows.
//!
//! The same walk, on behind calls and to where a traced function returns, shows that r10, r11 and the flags are free at returns
//! of functions that are not traced: their callers may have been compiled with a look at what they leave alone.

use super::Subject;
use super::callers::{Goes, Parts};
use super::exec::machine::register_name;
use super::kernel::symbols::hex;
use super::kernel::{Kernel, KernelError};
use super::owed::{computed_gotos, has_fentry};
use super::report::Findings;
use super::slots::KernelThunks;
use iced_x86::{
    Code, Decoder, DecoderOptions, FlowControl, Instruction, InstructionInfoFactory, Mnemonic,
    OpAccess, OpKind, Register, RflagsBits,
};
use penumbra_bundle::{LinkVa, VaRange};
use rustc_hash::{FxHashMap, FxHashSet};
use std::collections::BTreeMap;
use std::sync::Arc;

/// rcx, rsi, rdi, r8, r9, r10 and r11: what a call may change, less rax and rdx, which may hold its value (System V psABI,
/// figure 3.4).
pub const CLEARED: u16 = 0b1111_1100_0010;
/// How the symbols of thunks end that save what they use.
pub const SAVING: &str = "_saving";
/// How the symbols of thunks end that clear them.
pub const SUFFIX: &str = "_zeroing";
/// No stretch from one call to the next has more instructions.
const MOST: usize = 20_000;
/// More bytes than a test outside the text takes.
const TEST: usize = 24;

/// What stands behind calls, as far as it has been walked.
pub struct Dead<'a> {
    kernel: &'a Kernel,
    parts: Arc<Parts>,
    /// Where the text goes on without a branch: faults and jump labels.
    silent: BTreeMap<LinkVa, Vec<LinkVa>>,
    /// What replacements read, by where they are put.
    replaced: BTreeMap<LinkVa, Bytes>,
    /// Where a replacement may stand.
    patched: FxHashSet<LinkVa>,
    /// Where jumps may go that are replaced by jumps, or by nothing.
    switches: FxHashMap<LinkVa, Vec<LinkVa>>,
    retpolines: FxHashMap<LinkVa, Bytes>,
    ends: FxHashSet<LinkVa>,
    /// Functions with an `__fentry__` site, and functions with labels that data points to.
    traced: FxHashSet<LinkVa>,
    gotos: FxHashSet<LinkVa>,
    walked: FxHashMap<(LinkVa, Ask), Option<String>>,
    of_part: FxHashMap<(u32, Ask), Option<String>>,
}

/// What is asked of the callers.
#[derive(Clone, Copy, PartialEq, Eq, Hash, Debug)]
pub enum Ask {
    /// That [`CLEARED`] is dead. They were compiled without a look at the callee, so that calls and returns end a way.
    Cleared,
    /// That r10, r11 and the flags are, whatever is known of their callees.
    Scratch,
}

impl Ask {
    /// The bytes in question.
    fn bytes(self) -> Bytes {
        match self {
            Ask::Cleared => cleared(),
            Ask::Scratch => 0xffff << (8 * 10) | FLAGS,
        }
    }

    /// What the slots do to them.
    fn does(self) -> &'static str {
        match self {
            Ask::Cleared => "clears",
            Ask::Scratch => "uses",
        }
    }
}

impl<'a> Dead<'a> {
    /// Reads what the tables say; nothing is walked yet.
    pub fn of(kernel: &'a Kernel, thunks: &KernelThunks, parts: Arc<Parts>) -> Self {
        let mut silent: BTreeMap<LinkVa, Vec<LinkVa>> = BTreeMap::new();
        for (at, to) in &kernel.tables.silent_jumps {
            silent.entry(*at).or_default().push(*to);
        }
        let mut replaced: BTreeMap<LinkVa, Bytes> = BTreeMap::new();
        for alternative in &kernel.tables.alternatives {
            let code = kernel.bytes(alternative.replacement).unwrap_or_default();
            let at = alternative.replacement.start.0;
            let (mut seen, mut written) = (0, 0);
            for instruction in Decoder::with_ip(64, code, at, DecoderOptions::NONE) {
                let (reads, writes) = operands(&instruction);
                // Where a replacement jumps is not followed.
                seen |= match goes_on_behind(&instruction) {
                    true => reads & !written,
                    false => Bytes::MAX,
                };
                if instruction.flow_control() == FlowControl::Next {
                    written |= writes;
                }
            }
            *replaced.entry(alternative.site.start).or_default() |= seen;
        }
        let sites = kernel.tables.alternatives.iter().map(|one| one.site);
        let patched = sites.flat_map(|site| (site.start.0..site.end.0).map(LinkVa));
        let ends = kernel.symbols.find("__x86_return_thunk");
        let retpolines = thunks.indirect.iter();
        Dead {
            kernel,
            parts,
            silent,
            replaced,
            patched: patched.collect(),
            switches: switches(kernel),
            retpolines: retpolines
                .map(|(at, number)| (*at, 0xff << (8 * u32::from(*number))))
                .collect(),
            ends: ends.into_iter().collect(),
            traced: kernel.tables.fentry.iter().copied().collect(),
            gotos: computed_gotos(kernel),
            walked: FxHashMap::default(),
            of_part: FxHashMap::default(),
        }
    }

    /// Why the return at `at` may not lose what is asked about; none when all of it is dead.
    pub fn lives(&mut self, at: LinkVa, ask: Ask) -> Option<String> {
        let Some(part) = self.parts.part(at) else {
            return Some("belongs to no function".to_owned());
        };
        if let Some(known) = self.of_part.get(&(part, ask)) {
            return known.clone();
        }
        let found = self.part(part, ask);
        self.of_part.insert((part, ask), found.clone());
        found
    }

    fn part(&mut self, part: u32, ask: Ask) -> Option<String> {
        let does = ask.does();
        let Goes::Behind { callees, indirect } = self.parts.goes[part as usize].clone() else {
            return Some(format!("{does} registers, and its callers are not known"));
        };
        let indirect = match ask {
            Ask::Cleared => indirect,
            Ask::Scratch => self.parts.open[part as usize],
        };
        if indirect {
            return Some(format!("{does} registers, and indirect calls may reach it"));
        }
        // Who calls a traced function expects no more of it than the ABI says, whoever returns in its stead.
        let callees = callees.into_iter();
        let callees: Vec<u32> = callees
            .filter(|callee| ask == Ask::Cleared || !self.parts.traced.contains(callee))
            .collect();
        for callee in callees {
            let places =
                [&self.parts.back, &self.parts.replaced].map(|list| &list[callee as usize]);
            let places: Vec<LinkVa> = places.into_iter().flatten().copied().collect();
            for back in places {
                let caller = self.parts.part(LinkVa(back.0 - 1));
                if caller.is_none_or(|caller| self.parts.assembly.contains(&caller)) {
                    return Some(format!(
                        "{does} registers, and returns into assembly at {}",
                        hex(back)
                    ));
                }
                if let Some(what) = self.behind(back, ask) {
                    return Some(what);
                }
            }
        }
        None
    }

    fn behind(&mut self, back: LinkVa, ask: Ask) -> Option<String> {
        if let Some(known) = self.walked.get(&(back, ask)) {
            return known.clone();
        }
        let found = self.walk(back, ask);
        self.walked.insert((back, ask), found.clone());
        found
    }

    /// Walks all ways from `back` on; what is read there, and where.
    fn walk(&self, back: LinkVa, ask: Ask) -> Option<String> {
        if !self.kernel.sweep.is_boundary(back) {
            return Some(format!(
                "{} registers, and returns into a replacement at {}",
                ask.does(),
                hex(back)
            ));
        }
        let mut seen: FxHashMap<LinkVa, Bytes> = FxHashMap::default();
        let mut open = vec![(back, ask.bytes())];
        while let Some((at, unwritten)) = open.pop() {
            let known = seen.entry(at).or_default();
            if *known & unwritten == unwritten {
                continue;
            }
            // Tracers lose all of it (`save_mcount_regs` in arch/x86/kernel/ftrace_64.S), and who has just been called waits for
            // none of it.
            if ask == Ask::Scratch && self.traced.contains(&at) {
                continue;
            }
            if !self.kernel.in_text(at) {
                return Some(format!(
                    "{} registers, and the text is left behind the call before {}",
                    ask.does(),
                    hex(back)
                ));
            }
            *known |= unwritten;
            let unwritten = *known;
            if seen.len() > MOST {
                return Some(format!("is followed at {} by too much to walk", hex(back)));
            }
            let room = (self.kernel.text.end.0 - at.0).min(15) as usize;
            let bytes = self.kernel.vmlinux.bytes(at, room).unwrap_or_default();
            if bytes.first() == Some(&0xcc) {
                continue;
            }
            let instruction = Decoder::with_ip(64, bytes, at.0, DecoderOptions::NONE).decode();
            if instruction.is_invalid() {
                return Some(format!(
                    "is followed by what does not decode, at {}",
                    hex(at)
                ));
            }
            let branch = instruction.op0_kind() == OpKind::NearBranch64;
            let to = branch.then(|| LinkVa(instruction.near_branch_target()));
            let (mut reads, mut writes) = operands(&instruction);
            let flow = instruction.flow_control();
            if let Some(goes) = self.switches.get(&at) {
                open.extend(goes.iter().map(|to| (*to, unwritten)));
                continue;
            }
            if self.patched.contains(&at) {
                writes = 0;
                if !goes_on_behind(&instruction) {
                    reads = Bytes::MAX;
                }
            }
            reads |= self.replaced.get(&at).copied().unwrap_or_default();
            let register = to.and_then(|to| self.retpolines.get(&to));
            reads |= register.copied().unwrap_or_default();
            if ask == Ask::Scratch && self.may_read_all(&instruction, to) {
                reads = Bytes::MAX;
            }
            let ends = to.is_some_and(|to| self.ends.contains(&to)) || flow == FlowControl::Return;
            if ask == Ask::Scratch && ends && !self.is_traced(at) {
                match self.returns_to(at) {
                    Some(places) => open.extend(places.into_iter().map(|back| (back, unwritten))),
                    None => reads = Bytes::MAX,
                }
            }
            let alive = reads & unwritten;
            if alive != 0 {
                let name = match alive & FLAGS {
                    0 => register_name((alive.trailing_zeros() / 8) as u8),
                    _ => "the flags",
                };
                let (does, back, at) = (ask.does(), hex(back), hex(at));
                return Some(format!(
                    "{does} {name}, which is read at {at} behind the call before {back}"
                ));
            }
            let on = self.silent.get(&at).into_iter().flatten();
            open.extend(on.map(|to| (*to, unwritten)));
            let next = (LinkVa(instruction.next_ip()), unwritten & !writes);
            let goes = to.filter(|to| !self.ends.contains(to) && register.is_none());
            match flow {
                FlowControl::ConditionalBranch => {
                    open.push(next);
                    open.extend(goes.map(|to| (to, unwritten & !writes)));
                }
                FlowControl::UnconditionalBranch => {
                    open.extend(goes.map(|to| (to, unwritten & !writes)));
                }
                FlowControl::Call | FlowControl::IndirectCall if ask == Ask::Scratch => {
                    open.push(next);
                }
                FlowControl::Return | FlowControl::Call | FlowControl::IndirectCall => {}
                // What an indirect jump in assembly goes to, nobody knows.
                FlowControl::IndirectBranch => {
                    return Some(format!("is followed by a jump to anywhere, at {}", hex(at)));
                }
                _ => open.push(next),
            }
        }
        None
    }

    /// Where the part around `at` returns to with frames of parts that are not traced, when all that is known, compiled, and in
    /// the file.
    fn returns_to(&self, at: LinkVa) -> Option<Vec<LinkVa>> {
        let part = self.parts.part(at)?;
        let Goes::Behind { callees, .. } = &self.parts.goes[part as usize] else {
            return None;
        };
        if self.parts.open[part as usize] {
            return None;
        }
        let callees = callees.iter();
        let callees = callees.filter(|callee| !self.parts.traced.contains(callee));
        let callees = callees.map(|callee| *callee as usize);
        if callees
            .clone()
            .any(|one| !self.parts.replaced[one].is_empty())
        {
            return None;
        }
        let places = callees.flat_map(|callee| &self.parts.back[callee]);
        let places: Vec<LinkVa> = places.copied().collect();
        let compiled = |back: &LinkVa| {
            let caller = self.parts.part(LinkVa(back.0 - 1));
            caller.is_some_and(|caller| !self.parts.assembly.contains(&caller))
                && self.kernel.sweep.is_boundary(*back)
        };
        places.iter().all(compiled).then_some(places)
    }

    /// Whether the function around `at` is one whose callers expect the three to be lost.
    fn is_traced(&self, at: LinkVa) -> bool {
        let function = self.kernel.symbols.around(at);
        function.is_some_and(|range| has_fentry(self.kernel, &self.traced, range.start))
    }

    /// Whether nothing is known of who goes on: assembly that is called, a label that is jumped to.
    fn may_read_all(&self, instruction: &Instruction, to: Option<LinkVa>) -> bool {
        let function = self.kernel.symbols.around(LinkVa(instruction.ip()));
        let goto = || function.is_none_or(|range| self.gotos.contains(&range.start));
        let retpoline = to.is_some_and(|to| self.retpolines.contains_key(&to));
        match instruction.flow_control() {
            FlowControl::Call => to.is_some_and(|to| {
                let part = self.parts.part(to).filter(|_| self.kernel.in_text(to));
                !retpoline && part.is_none_or(|part| self.parts.assembly.contains(&part))
            }),
            FlowControl::UnconditionalBranch | FlowControl::ConditionalBranch => {
                retpoline && goto()
            }
            _ => false,
        }
    }
}

/// Jumps that may be replaced (`static_cpu_has`): where the one in the file goes, or the test outside the text to which it does;
/// where each replacement goes; and behind them, where a replacement is nothing.
fn switches(kernel: &Kernel) -> FxHashMap<LinkVa, Vec<LinkVa>> {
    let mut sites: FxHashMap<LinkVa, Option<(LinkVa, Vec<LinkVa>)>> = FxHashMap::default();
    for one in &kernel.tables.alternatives {
        let (start, end) = (one.site.start, one.site.end);
        let known = sites.entry(start).or_insert_with(|| {
            let own = jump(kernel, start, end)?;
            let goes = match kernel.in_text(own) {
                true => vec![own],
                false => test(kernel, own)?,
            };
            Some((end, [vec![end], goes].concat()))
        });
        let replacement = one.replacement;
        let goes = match replacement.len() {
            0 => Some(None),
            _ => jump(kernel, replacement.start, replacement.end).map(Some),
        };
        let goes = goes.filter(|to| to.is_none_or(|to| kernel.in_text(to)));
        match (known.as_mut(), goes) {
            (Some((until, all)), Some(goes)) if *until == end => all.extend(goes),
            _ => *known = None,
        }
    }
    let sites = sites.into_iter();
    sites
        .filter_map(|(at, known)| Some((at, known?.1)))
        .collect()
}

/// Where the jump goes that is all that stands between two addresses.
fn jump(kernel: &Kernel, start: LinkVa, end: LinkVa) -> Option<LinkVa> {
    let code = kernel.bytes(VaRange { start, end })?;
    let instruction = Decoder::with_ip(64, code, start.0, DecoderOptions::NONE).decode();
    let whole = instruction.is_jmp_short_or_near() && instruction.next_ip() == end.0;
    whole.then(|| LinkVa(instruction.near_branch_target()))
}

/// Where a test of memory goes on that stands outside the text: `test $imm, memory; jcc; jmp`.
fn test(kernel: &Kernel, at: LinkVa) -> Option<Vec<LinkVa>> {
    let code = kernel.vmlinux.bytes(at, TEST)?;
    let mut decoder = Decoder::with_ip(64, code, at.0, DecoderOptions::NONE);
    let [test, either, or] = [decoder.decode(), decoder.decode(), decoder.decode()];
    let reads = test.code() == Code::Test_rm8_imm8
        && test.op0_kind() == OpKind::Memory
        && test.memory_base() == Register::RIP;
    let branches = either.is_jcc_short_or_near() && or.is_jmp_short_or_near();
    let goes = [either, or].map(|branch| LinkVa(branch.near_branch_target()));
    let inside = goes.iter().all(|to| kernel.in_text(*to));
    (reads && branches && inside).then(|| goes.to_vec())
}

/// The pass.
const PASS: &str = "zero-regs";

/// The slots whose thunks clear registers, and what is wrong with them.
pub struct Cleared<'s, 'k> {
    subject: &'s Subject<'k>,
    dead: Option<Result<Dead<'k>, KernelError>>,
    slots: BTreeMap<&'k str, u64>,
    wrong: Vec<(&'k str, LinkVa, String)>,
    /// Returns that may lose r10, r11 and the flags though their functions are not traced.
    scratch: u64,
}

impl<'s, 'k> Cleared<'s, 'k> {
    /// None yet.
    pub fn of(subject: &'s Subject<'k>) -> Cleared<'s, 'k> {
        Cleared {
            subject,
            dead: None,
            slots: BTreeMap::new(),
            wrong: Vec::new(),
            scratch: 0,
        }
    }

    /// One of them, in a function that is traced by ftrace or not.
    pub fn slot(&mut self, variant: &'k str, at: LinkVa, traced: bool) {
        *self.slots.entry(variant).or_default() += 1;
        let lives = match traced {
            false => Some("clears registers of a function that is not traced".to_owned()),
            true => self.lives(at, Ask::Cleared),
        };
        self.wrong.extend(lives.map(|what| (variant, at, what)));
    }

    /// A return in a function that is not traced, whose thunk is not one that saves: none when nothing is lost by it.
    pub fn loses(&mut self, at: LinkVa) -> Option<String> {
        let lives = self.lives(at, Ask::Scratch);
        self.scratch += u64::from(lives.is_none());
        lives
    }

    /// Asks about the return at `at`; what is needed to answer is read when it is first asked.
    fn lives(&mut self, at: LinkVa, ask: Ask) -> Option<String> {
        let (kernel, thunks) = (self.subject.kernel, self.subject.thunks);
        let subject = self.subject;
        let dead = self.dead.get_or_insert_with(|| {
            let parts = subject.parts()?;
            Ok(Dead::of(kernel, thunks, parts))
        });
        match dead {
            Ok(dead) => dead.lives(at, ask),
            Err(error) => Some(error.to_string()),
        }
    }

    /// Says what is wrong, also with the counts in the manifest.
    pub fn check(self, findings: &mut Findings<'_>) {
        let wrong = self.wrong.len() as u64;
        for (variant, at, what) in self.wrong {
            findings.broken(Some(variant), Some(at), what);
        }
        for (variant, _) in self.subject.variants() {
            let found = self.slots.get(variant.name.as_str()).copied();
            let pass = variant.passes.iter().find(|pass| pass.name == PASS);
            let said = pass.map(|pass| pass.edited);
            if said.unwrap_or(0) != found.unwrap_or(0) {
                let (said, found) = (said.unwrap_or(0), found.unwrap_or(0));
                let what = format!("pass {PASS} says {said} slots, {found} clear registers");
                findings.broken(Some(&variant.name), None, what);
            }
        }
        let all: u64 = self.slots.values().sum();
        if self.scratch > 0 {
            findings.proved(
                "returns behind which r10, r11 and flags are dead",
                self.scratch,
            );
        }
        if all > 0 {
            findings.proved("returns that clear dead registers", all - wrong);
        }
    }
}

/// Bytes of registers: bit 8n + i is byte i of register n. RSP is never asked about; its place is the flags'.
type Bytes = u128;

/// CF, PF, AF, ZF, SF and OF, in iced's order.
const FLAGS: Bytes = (STATUS as Bytes) << (8 * 4);
/// The same, as iced has them.
const STATUS: u32 = RflagsBits::CF
    | RflagsBits::PF
    | RflagsBits::AF
    | RflagsBits::ZF
    | RflagsBits::SF
    | RflagsBits::OF;

/// All bytes of [`CLEARED`].
fn cleared() -> Bytes {
    let numbers = (0..16u32).filter(|number| CLEARED >> number & 1 == 1);
    numbers.fold(0, |all, number| all | 0xff << (8 * number))
}

/// Whether what stands behind an instruction is what comes next, at once or after a call.
fn goes_on_behind(instruction: &Instruction) -> bool {
    matches!(
        instruction.flow_control(),
        FlowControl::Next | FlowControl::Call | FlowControl::IndirectCall
    )
}

/// What of [`CLEARED`] and the flags an instruction reads, and what it certainly writes.
fn operands(instruction: &Instruction) -> (Bytes, Bytes) {
    let mut factory = InstructionInfoFactory::new();
    let (mut reads, mut writes) = (0, 0);
    let spread = instruction.mnemonic() == Mnemonic::Sbb
        && instruction.op1_kind() == OpKind::Register
        && instruction.op0_register() == instruction.op1_register();
    for used in factory.info(instruction).used_registers() {
        let register = used.register();
        if !register.is_gpr() {
            continue;
        }
        let second = [Register::AH, Register::CH, Register::DH, Register::BH].contains(&register);
        let bytes: Bytes = match register.size() {
            1 if second => 2,
            1 => 1,
            2 => 3,
            // 32 bits written clear the other 32 (SDM volume 1, 3.4.1.1).
            _ => 0xff,
        };
        let bytes = bytes << (8 * register.full_register().number()) & cleared();
        match used.access() {
            OpAccess::Write => writes |= bytes,
            // Of `sbb` of a register and itself only the carry matters.
            OpAccess::ReadWrite if spread => writes |= bytes,
            OpAccess::None | OpAccess::NoMemAccess | OpAccess::CondWrite => {}
            _ => reads |= bytes,
        }
    }
    reads |= Bytes::from(instruction.rflags_read() & STATUS) << (8 * 4);
    // A count of 0 leaves them as they are (SDM volume 2, SAL/SAR/SHL/SHR).
    let by_cl = (0..instruction.op_count())
        .any(|operand| instruction.op_register(operand) == Register::CL && operand > 0);
    if !by_cl {
        writes |= Bytes::from(instruction.rflags_modified() & STATUS) << (8 * 4);
    }
    (reads, writes)
}
