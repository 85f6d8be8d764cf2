//! Entries of which BTF may have another function's prototype: what is claimed of each is what thunks let through, and each
//! fault in a claim is caught with the entry named.

use super::{place_in_file, real, said};
use penumbra_bundle::{Bundle, ForwardDoubt, TextOff};

fn symbol(bundle: &Bundle, name: &str) -> TextOff {
    let mut named = bundle.symbols.0.iter();
    let found = named.find(|symbol| symbol.name == name);
    found.unwrap_or_else(|| panic!("no {name}")).at
}

/// The first doubt of which `is` holds, by index.
fn doubt(is: impl Fn(&ForwardDoubt) -> bool) -> (usize, ForwardDoubt) {
    let claims = real().1.forward.as_ref().unwrap();
    let index = claims.doubts.iter().position(is).unwrap();
    (index, claims.doubts[index].clone())
}

/// What the checker says once the claim at `index` is another; it must name the entry.
fn said_of(index: usize, change: impl FnOnce(&mut ForwardDoubt)) -> String {
    let said = said(|bundle| change(&mut bundle.forward.as_mut().unwrap().doubts[index]));
    let at = real().1.forward.as_ref().unwrap().doubts[index].at;
    let at = real().1.manifest.text.start.0 + u64::from(at.0);
    assert!(said.contains(&format!("{at:#x}")), "{at:#x}: {said}");
    said
}

#[test]
fn entries_that_share_their_names_are_claimed_and_few_are_untold() {
    let claims = real().1.forward.as_ref().unwrap();
    let by = |reason: &str| {
        claims
            .doubts
            .iter()
            .filter(|doubt| doubt.by == reason)
            .count()
    };
    assert!(by("name") > 300, "{}", by("name"));
    // CPU hotplug's callbacks for instances are put where those without are declared.
    assert!(by("place") >= 10, "{}", by("place"));
    let untold = claims.doubts.iter().filter(|doubt| !doubt.told);
    assert!((1..60).contains(&untold.count()));
}

/// `bio_cpu_dead(cpu, node)` is put where `int (*)(unsigned int)` is declared, `put_device(device)` where `void (*)(void *)` is.
#[test]
fn what_is_put_where_something_else_is_declared_is_in_both_classes() {
    let bundle = &real().1;
    let claims = bundle.forward.as_ref().unwrap();
    let holding = |names: &[&str]| {
        let at: Vec<TextOff> = names.iter().map(|name| symbol(bundle, name)).collect();
        let classes = claims.classes.iter().filter(|class| {
            let mut holds = at.iter().map(|at| class.entries.binary_search(at).is_ok());
            class.by == "prototype" && holds.all(|holds| holds)
        });
        classes.count()
    };
    assert!(holding(&["bio_cpu_dead", "page_writeback_cpu_online"]) > 0);
    assert!(holding(&["put_device"]) > 1);
    for name in ["bio_cpu_dead", "put_device"] {
        let at = symbol(bundle, name);
        let doubt = claims.doubts.iter().find(|doubt| doubt.at == at).unwrap();
        assert_eq!(doubt.by, "place", "{name}");
    }
}

/// `dst_output` is a header's, which several files take the address of: the same code, so that its prototype is known.
#[test]
fn functions_of_one_name_that_are_the_same_code_are_believed() {
    let bundle = &real().1;
    let at: Vec<TextOff> = bundle
        .symbols
        .0
        .iter()
        .filter(|symbol| symbol.name == "dst_output")
        .map(|symbol| symbol.at)
        .collect();
    assert!(at.len() > 2, "{at:?}");
    let claims = bundle.forward.as_ref().unwrap();
    assert!(!claims.doubts.iter().any(|doubt| at.contains(&doubt.at)));
    // Said to be doubtful for its name, one is not: they are one function.
    let classes = claims.classes.iter();
    let entries = classes.flat_map(|class| &class.entries);
    let taken = entries.into_iter().find(|entry| at.contains(entry));
    let (at, said) = (*taken.unwrap(), |by: &str| {
        said(|bundle| {
            let doubts = &mut bundle.forward.as_mut().unwrap().doubts;
            let index = doubts.partition_point(|doubt| doubt.at < *taken.unwrap());
            let doubt = ForwardDoubt {
                at: *taken.unwrap(),
                by: by.to_owned(),
                told: true,
            };
            doubts.insert(index, doubt);
        })
    });
    let said = said("name");
    assert!(
        said.contains("share its name with functions that BTF lacks, and does not"),
        "{at:?}: {said}"
    );
}

#[test]
fn a_shared_name_that_is_not_claimed_is_caught() {
    let (index, _) = doubt(|doubt| doubt.by == "name");
    let said = said(|bundle| {
        bundle.forward.as_mut().unwrap().doubts.remove(index);
    });
    assert!(said.contains("is not claimed to be doubtful"), "{said}");
}

#[test]
fn a_name_that_nothing_shares_is_caught() {
    let (index, _) = doubt(|doubt| doubt.by == "place");
    let said = said_of(index, |doubt| doubt.by = "name".to_owned());
    assert!(
        said.contains("share its name with functions that BTF lacks, and does not"),
        "{said}"
    );
}

#[test]
fn an_unknown_reason_is_caught() {
    let (index, _) = doubt(|doubt| doubt.by == "place");
    let said = said_of(index, |doubt| doubt.by = "guess".to_owned());
    assert!(said.contains("for no reason that there is"), "{said}");
}

#[test]
fn a_doubtful_entry_whose_address_is_never_taken_is_caught() {
    let (index, _) = doubt(|doubt| doubt.by == "place" && doubt.told);
    let said = said(|bundle| bundle.forward.as_mut().unwrap().doubts[index].at.0 += 1);
    assert!(
        said.contains("is claimed to be doubtful, and its address is never taken"),
        "{said}"
    );
}

#[test]
fn an_entry_that_thunks_let_through_everywhere_and_is_said_to_be_told_is_caught() {
    let (index, _) = doubt(|doubt| !doubt.told);
    let said = said(|bundle| bundle.forward.as_mut().unwrap().doubts[index].told = true);
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

#[test]
fn an_entry_that_thunks_know_and_is_said_to_be_untold_is_caught() {
    let (index, _) = doubt(|doubt| doubt.told);
    let said = said(|bundle| bundle.forward.as_mut().unwrap().doubts[index].told = false);
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}

/// `put_device` is exported, and the kernel itself puts it where `void (*)(void *)` is declared.
#[test]
fn an_exported_entry_whose_places_are_said_to_be_known_is_caught() {
    let at = symbol(&real().1, "put_device");
    let (index, known) = doubt(|doubt| doubt.at == at);
    assert!(!known.told);
    let said = said_of(index, |doubt| doubt.told = true);
    assert!(said.contains("modules may put it anywhere"), "{said}");
}

/// The thunk that the others ask last compares with every entry of which nothing is known.
#[test]
fn a_last_question_that_lets_another_entry_through_is_caught() {
    let bundle = &real().1;
    let (_, untold) = doubt(|doubt| !doubt.told);
    let elf = goblin::elf::Elf::parse(&bundle.cave).unwrap();
    let mut symbols = elf.syms.iter();
    let thunk =
        symbols.find(|symbol| elf.strtab.get_at(symbol.st_name) == Some("forward_cfi_untold_rax"));
    let thunk = thunk.unwrap();
    let place = place_in_file(bundle, thunk.st_value);
    let code = &bundle.cave[place..place + thunk.st_size as usize];
    // An address, as 32 bits that are sign-extended.
    let address = bundle.manifest.text.start.0 as u32 + untold.at.0;
    let field = code
        .windows(4)
        .position(|bytes| bytes == address.to_le_bytes());
    let said = said(|bundle| bundle.cave[place + field.unwrap()] ^= 0x40);
    assert!(
        said.contains("lets through something other than class"),
        "{said}"
    );
}
