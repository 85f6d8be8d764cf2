//! From TOML to [`Policy`]: schema 1.

use crate::diagnostic::{Diagnostic, Severity};
use crate::fields::{MAX_FOUND, Reader, Table, Value, list, suggest};
use crate::{Condition, DEFAULT_RULE, Glob, Policy, Process, Rule, Test, View};
use std::collections::BTreeMap;
use std::ops::Range;
use toml::de::DeTable;

/// The largest policy.
pub(crate) const MAX_POLICY: usize = 1 << 20;
/// (uid_t)-1 means "no change" to Linux's setuid family and is no user's id.
const UIDS: Range<u64> = 0..u32::MAX as u64;
/// Directories in which others than root make files.
const OTHERS_WRITE: [&str; 6] = [
    "/tmp",
    "/var/tmp",
    "/dev/shm",
    "/home",
    "/run/user",
    "/media",
];

impl Policy {
    /// Reads the policy `src`; `name` is the file's name for messages.
    ///
    /// The error holds every finding, in the order of the file; draw them with [`crate::render`].
    pub fn parse(name: &str, src: &str) -> Result<Policy, Vec<Diagnostic>> {
        if src.len() > MAX_POLICY {
            let message = format!("larger than {MAX_POLICY} bytes; is it the right file?");
            let place = (name, "");
            return Err(vec![Diagnostic::new(
                place,
                Severity::Error,
                "P001",
                0..0,
                message,
            )]);
        }
        let mut reader = Reader {
            file: name,
            src,
            found: Vec::new(),
            overflow: None,
            broken: false,
        };
        let policy = read(&mut reader);
        let mut found = reader.found;
        found.sort_by_key(|diagnostic| (diagnostic.span.start, diagnostic.code));
        // The TOML parser says once for each of many open brackets that the file ends.
        found.dedup();
        if reader.overflow.is_some() {
            let message = format!("more than {MAX_FOUND} findings; the rest was not looked at");
            let end = src.len()..src.len();
            found.push(Diagnostic::new(
                (name, src),
                Severity::Error,
                "P001",
                end,
                message,
            ));
        }
        let refused = |diagnostic: &Diagnostic| diagnostic.severity == Severity::Error;
        match policy {
            Some(policy) if !found.iter().any(refused) => Ok(Policy {
                warnings: found,
                ..policy
            }),
            _ => Err(found),
        }
    }

    /// Like [`Policy::parse`], from a file's bytes.
    pub fn parse_bytes(name: &str, bytes: &[u8]) -> Result<Policy, Vec<Diagnostic>> {
        match std::str::from_utf8(bytes) {
            Ok(src) => Policy::parse(name, src),
            Err(error) => {
                let at = error.valid_up_to();
                let src = String::from_utf8_lossy(bytes);
                let message = "not UTF-8, as TOML must be";
                let place = (name, &*src);
                Err(vec![Diagnostic::new(
                    place,
                    Severity::Error,
                    "P001",
                    at..at,
                    message,
                )])
            }
        }
    }
}

fn read(reader: &mut Reader<'_>) -> Option<Policy> {
    let (root, errors) = DeTable::parse_recoverable(reader.src);
    for error in errors {
        let span = error.span().unwrap_or(0..0);
        reader.error("P001", span, error.message());
        reader.broken = true;
    }
    let root = Table {
        fields: root.get_ref(),
        place: "the policy",
        head: 0,
    };
    // Of another schema nothing else can be said.
    let schema = reader.need(
        root,
        "schema",
        "write `schema = 1`, the version of this format",
    );
    if let Some(value) = schema
        && reader.integer(value, 0..u64::MAX)? != 1
    {
        reader
            .error("P005", value.span(), "this version reads schema 1 only")
            .help = "use a newer `installer`, or write the policy as schema 1".to_owned();
        return None;
    }
    let known = [
        "schema", "name", "version", "mode", "kernel", "default", "modules", "rule", "test",
    ];
    reader.only(root, &known);
    let name = reader.need(
        root,
        "name",
        "name the policy, for example `name = \"web-tier\"`",
    );
    let name = name.and_then(|value| reader.name(value));
    let version = reader.need(
        root,
        "version",
        "write `version = 1` and count up with each change",
    );
    let version = version.and_then(|value| reader.integer(value, 1..1 << 32));
    read_mode(reader, root);
    let kernels = read_kernels(reader, root);
    let default = read_default(reader, root);
    let refuses_unknown_modules = read_modules(reader, root);
    let rules = read_rules(reader, root);
    let tests = read_tests(reader, root, &rules);
    Some(Policy {
        name: name?,
        version: version?,
        kernels,
        default,
        refuses_unknown_modules,
        rules: rules.into_values().collect(),
        tests,
        warnings: Vec::new(),
    })
}

fn read_mode(reader: &mut Reader<'_>, root: Table<'_, '_>) {
    let Some(value) = root.fields.get("mode") else {
        return;
    };
    match reader.text(value) {
        None | Some("enforce") => {}
        Some("audit") => {
            reader
                .error("P013", value.span(), "mode `audit` is not supported yet")
                .help = "use `enforce`, or try the rules with [[test]] entries".to_owned();
        }
        Some(other) => {
            let message = format!("unknown mode `{other}`");
            reader.error("P013", value.span(), message).help = "the mode is `enforce`".to_owned();
        }
    }
}

fn read_kernels(reader: &mut Reader<'_>, root: Table<'_, '_>) -> Vec<String> {
    let mut kernels = Vec::new();
    let table = root.fields.get("kernel");
    let Some(table) = table.and_then(|value| reader.table(value, "[kernel]")) else {
        return kernels;
    };
    reader.only(table, &["build-id"]);
    let help =
        "write `build-id = [\"...\"]` as `hardener inspect` shows it, or leave [kernel] away";
    let Some(value) = reader.need(table, "build-id", help) else {
        return kernels;
    };
    for value in reader.one_or_many(value) {
        let Some(text) = reader.text(value) else {
            continue;
        };
        // A linker's build-id is 16 (md5, uuid) or 20 (sha1) bytes; others can be given by hand.
        let hexadecimal = text.bytes().all(|b| b.is_ascii_hexdigit());
        if hexadecimal && text.len().is_multiple_of(2) && (16..=128).contains(&text.len()) {
            kernels.push(text.to_ascii_lowercase());
        } else {
            reader
                .error("P006", value.span(), format!("`{text}` is no build-id"))
                .help = "a build-id is hexadecimal, usually 40 digits; `hardener inspect` shows it"
                .to_owned();
        }
    }
    kernels
}

fn read_default(reader: &mut Reader<'_>, root: Table<'_, '_>) -> View {
    let table = root.fields.get("default");
    let Some(table) = table.and_then(|value| reader.table(value, "[default]")) else {
        return View::Hardened;
    };
    reader.only(table, &["view", "allow-fast-default"]);
    let allowed = table.fields.get("allow-fast-default");
    let allowed = allowed
        .and_then(|value| reader.boolean(value))
        .unwrap_or(false);
    let Some(value) = reader.need(table, "view", "write `view = \"hardened\"`") else {
        return View::Hardened;
    };
    let view = read_view(reader, value).unwrap_or(View::Hardened);
    if view != View::Hardened && !allowed {
        let message =
            format!("the default view is `{view}`: whatever no rule names would lack the checks");
        reader.error("P008", value.span(), message).help =
            "use `hardened`, or say that it is meant: `allow-fast-default = true`".to_owned();
    }
    view
}

/// What becomes of a module whose text is not the bundle's: `report` (the default) or `refuse`.
fn read_modules(reader: &mut Reader<'_>, root: Table<'_, '_>) -> bool {
    let table = root.fields.get("modules");
    let Some(table) = table.and_then(|value| reader.table(value, "[modules]")) else {
        return false;
    };
    reader.only(table, &["unknown"]);
    let help = "write `unknown = \"refuse\"`, or leave [modules] away";
    let Some(value) = reader.need(table, "unknown", help) else {
        return false;
    };
    match reader.text(value) {
        None | Some("report") => false,
        Some("refuse") => true,
        Some(other) => {
            let message = format!("unknown modules cannot be met with `{other}`");
            reader.error("P015", value.span(), message).help =
                "`report` says that they stay on their own text; `refuse` also keeps everybody on the default view while one is loaded"
                    .to_owned();
            true
        }
    }
}

fn read_view(reader: &mut Reader<'_>, value: &Value<'_>) -> Option<View> {
    let text = reader.text(value)?;
    let names = View::ALL.map(View::name);
    let view = View::ALL.into_iter().find(|view| view.name() == text);
    if view.is_none() {
        let help = match suggest(text, &names) {
            Some(near) => format!("did you mean `{near}`?"),
            None => format!("views are {}", list(&names)),
        };
        reader
            .error("P007", value.span(), format!("unknown view `{text}`"))
            .help = help;
    }
    view
}

/// The rules, by where their ids stand; rules with errors are left out, which [`Policy::parse`] then refuses.
fn read_rules(reader: &mut Reader<'_>, root: Table<'_, '_>) -> BTreeMap<usize, Rule> {
    let mut rules = BTreeMap::new();
    let mut ids: BTreeMap<String, Range<usize>> = BTreeMap::new();
    for table in reader.tables(root, "rule", "this [[rule]]") {
        reader.only(table, &["id", "reason", "view", "match", "unless"]);
        let id = reader.need(table, "id", "name the rule: `installer ps` shows the id");
        let id = id.and_then(|value| Some((reader.name(value)?, value.span())));
        if let Some((id, span)) = &id {
            if id == DEFAULT_RULE {
                let message =
                    format!("`{DEFAULT_RULE}` is what decisions without a rule are called");
                reader.error("P010", span.clone(), message).help = "choose another id".to_owned();
            } else if let Some(first) = ids.get(id) {
                let related = (first.clone(), "first used here".to_owned());
                let message = format!("two rules have the id `{id}`");
                let diagnostic = reader.error("P010", span.clone(), message);
                diagnostic.help = "choose another id".to_owned();
                diagnostic.related = Some(related);
            } else {
                ids.insert(id.clone(), span.clone());
            }
        }
        let reason = table.fields.get("reason");
        let reason = reason
            .and_then(|value| reader.text(value))
            .map(str::to_owned);
        let help = format!("views are {}", list(&View::ALL));
        let view_value = reader.need(table, "view", &help);
        let view = view_value.and_then(|value| read_view(reader, value));
        if view == Some(View::Fast) && !table.fields.contains_key("reason") && !reader.broken {
            let span = view_value.map_or(0..0, |value| value.span());
            reader
                .error("P009", span, "a rule for `fast` must say why")
                .help = "add `reason = \"who decided this, when, and why it is safe\"`".to_owned();
        }
        let when = reader.need(
            table,
            "match",
            "write for example `match = { exe = \"/usr/bin/x\" }`",
        );
        let when = when.and_then(|value| read_condition(reader, value, "match"));
        let unless = table.fields.get("unless");
        let unless = unless.map(|value| read_condition(reader, value, "unless"));
        if let (Some(View::Fast), Some(value)) = (view, table.fields.get("match")) {
            warn_wide(reader, value, when.as_ref());
        }
        if let (Some((id, span)), Some(view), Some(when)) = (id, view, when) {
            let rule = Rule {
                id,
                reason,
                view,
                when,
                unless: unless.flatten(),
            };
            rules.insert(span.start, rule);
        }
    }
    rules
}

fn read_condition(reader: &mut Reader<'_>, value: &Value<'_>, place: &str) -> Option<Condition> {
    let table = reader.table(value, place)?;
    reader.only(table, &["exe", "uid"]);
    if table.fields.is_empty() {
        let message = format!("an empty `{place}` holds for every process");
        let help = "ask for `exe` or `uid`; what holds for every process is [default]";
        reader.error("P012", value.span(), message).help = help.to_owned();
        return None;
    }
    let before = reader.found.len();
    let mut condition = Condition::default();
    if let Some(value) = table.fields.get("exe") {
        for value in reader.one_or_many(value) {
            let Some(text) = reader.text(value) else {
                continue;
            };
            match Glob::new(text) {
                Ok(glob) => condition.exe.push(glob),
                Err(error) => {
                    let message = format!("pattern `{text}` {error}");
                    reader.error("P011", value.span(), message);
                }
            }
        }
    }
    if let Some(value) = table.fields.get("uid") {
        for value in reader.one_or_many(value) {
            let uid = reader.integer(value, UIDS);
            condition
                .uid
                .extend(uid.and_then(|uid| u32::try_from(uid).ok()));
        }
    }
    // A list that lost a value would mean something else.
    (reader.found.len() == before).then_some(condition)
}

/// What a `fast` rule probably should not trust.
fn warn_wide(reader: &mut Reader<'_>, value: &Value<'_>, when: Option<&Condition>) {
    for glob in when.into_iter().flat_map(|when| &when.exe) {
        let prefix = glob.fixed_prefix();
        let inside = |dir: &&&str| prefix == ***dir || prefix.starts_with(&format!("{dir}/"));
        if prefix.is_empty() {
            let message = format!("`{glob}` trusts programs in directories of any user");
            reader
                .add(Severity::Warning, "P102", value.span(), message)
                .help =
                "begin the pattern with a directory that only root writes, such as /usr/bin"
                    .to_owned();
        } else if let Some(dir) = OTHERS_WRITE.iter().find(inside) {
            let message = format!("`{glob}`: others than root can usually put files under {dir}");
            reader
                .add(Severity::Warning, "P101", value.span(), message)
                .help = "install the program where only root writes, and match it there".to_owned();
        }
    }
}

fn read_tests(
    reader: &mut Reader<'_>,
    root: Table<'_, '_>,
    rules: &BTreeMap<usize, Rule>,
) -> Vec<Test> {
    let mut tests = Vec::new();
    for table in reader.tables(root, "test", "this [[test]]") {
        reader.only(table, &["name", "process", "expect"]);
        let name = reader.need(table, "name", "say what the test shows");
        let name = name.and_then(|value| Some((reader.text(value)?.to_owned(), value.span())));
        let help = "write `process = { exe = \"/bin/sh\", uid = 0 }`; what is left away is unknown";
        let process = reader.need(table, "process", help);
        let process = process.and_then(|value| read_process(reader, value));
        let help = "write `expect = { view = \"hardened\" }`";
        let expect = reader.need(table, "expect", help);
        let Some(expect) = expect.and_then(|value| reader.table(value, "expect")) else {
            continue;
        };
        reader.only(expect, &["view", "rule"]);
        let view = reader.need(expect, "view", help);
        let view = view.and_then(|value| read_view(reader, value));
        let rule = expect.fields.get("rule");
        let rule = rule.and_then(|value| Some((reader.name(value)?, value.span())));
        if let Some((rule, span)) = &rule {
            let ids: Vec<_> = rules.values().map(|rule| rule.id.as_str()).collect();
            if rule != DEFAULT_RULE && !ids.contains(&rule.as_str()) && !reader.broken {
                let near = suggest(rule, &ids)
                    .map_or("`default` is for no rule".to_owned(), |near| {
                        format!("did you mean `{near}`?")
                    });
                let message = format!("there is no sound rule with the id `{rule}`");
                reader.error("P014", span.clone(), message).help = near;
            }
        }
        if let (Some((name, span)), Some(process), Some(view)) = (name, process, view) {
            tests.push(Test {
                name,
                process,
                view,
                rule: rule.map(|(rule, _)| rule),
                span,
            });
        }
    }
    tests
}

fn read_process(reader: &mut Reader<'_>, value: &Value<'_>) -> Option<Process> {
    let table = reader.table(value, "process")?;
    reader.only(table, &["exe", "uid"]);
    let mut process = Process::default();
    if let Some(value) = table.fields.get("exe") {
        let exe = reader.text(value)?;
        if !exe.starts_with('/') {
            reader.error(
                "P011",
                value.span(),
                "a process's executable is an absolute path",
            );
            return None;
        }
        process.exe = Some(exe.to_owned());
    }
    if let Some(value) = table.fields.get("uid") {
        process.uid = reader
            .integer(value, UIDS)
            .and_then(|uid| u32::try_from(uid).ok());
    }
    Some(process)
}
