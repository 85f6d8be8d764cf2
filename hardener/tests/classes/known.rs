//! Branches of which it is known what they call: each goes by the one prototype that is declared there.

use crate::real;
use penumbra_bundle::{ForwardClass, TextOff};

/// Where a function starts.
fn at(name: &str) -> TextOff {
    let mut symbols = real().1.symbols.0.iter();
    symbols.find(|symbol| symbol.name == name).unwrap().at
}

/// The classes of a function's indirect branches.
fn classes_in(function: &str) -> Vec<&'static ForwardClass> {
    let bundle = &real().1;
    let claims = bundle.forward.as_ref().unwrap();
    let from = at(function);
    let later = bundle.symbols.0.iter().map(|symbol| symbol.at);
    let next = later.filter(|at| *at > from).min().unwrap();
    let sites = claims.sites.iter();
    let sites = sites.filter(|site| (from..next).contains(&site.at));
    sites
        .map(|site| &claims.classes[site.class as usize])
        .collect()
}

/// Some branch of `function` goes by one prototype, to `members` among others, and none of those to `others`.
fn reaches(function: &str, members: &[&str], others: &[&str]) {
    let all = classes_in(function);
    let has = |class: &ForwardClass, name: &&str| class.entries.contains(&at(name));
    let reach = all
        .iter()
        .filter(|class| class.by == "prototype" && members.iter().all(|name| has(class, name)));
    let reach: Vec<_> = reach.collect();
    let by: Vec<_> = all
        .iter()
        .map(|class| (&class.by, class.entries.len()))
        .collect();
    assert!(!reach.is_empty(), "{function}: {by:?}");
    for class in reach {
        assert!(!others.iter().any(|name| has(class, name)), "{function}");
    }
}

/// `file_operations.read_iter`.
#[test]
fn a_member_of_a_structure_that_is_declared() {
    reaches(
        "vfs_read",
        &["seq_read_iter", "pipe_read"],
        &["inet_stream_connect"],
    );
}

/// `pipe_buf_operations.confirm`: the pipe is a file's `private_data`, whose lock and queues are passed on.
#[test]
fn a_structure_by_all_that_it_is_passed_on_as() {
    reaches(
        "pipe_read",
        &["page_cache_pipe_buf_confirm"],
        &["pipe_read"],
    );
}

/// `kmsg_dumper.dump`: the entries of a list that has a name of its own.
#[test]
fn an_entry_of_a_list() {
    let by = classes_in("kmsg_dump");
    assert!(
        by.iter()
            .all(|class| class.by == "prototype" && class.entries.len() < 100)
    );
}

/// `dst_entry.input` and `output`: a packet has the route in a number, beside the links of a list.
#[test]
fn a_pointer_that_is_declared_as_a_number() {
    reaches(
        "ip_rcv_finish",
        &["ip_forward", "ip_local_deliver"],
        &["pipe_read"],
    );
}

/// `bpf_prog.bpf_func`: programs stand in an array at the end of a structure, which has no length.
#[test]
fn a_structure_in_a_last_array() {
    reaches("trace_call_bpf", &["__bpf_prog_run32"], &["pipe_read"]);
}

/// `hrtimer_clock_base.get_time`: one of several members of a union, which has what is used there.
#[test]
fn a_member_of_a_union() {
    reaches("common_hrtimer_arm", &["ktime_get"], &["pipe_read"]);
}
