use super::Recipe;
use super::read::MAX_RECIPE;
use crate::passes::{self, FORWARD_CFI, RETURN_CFI};
use penumbra_bundle::ViolationAction;

fn said(src: impl AsRef<[u8]>) -> String {
    match Recipe::parse("r.toml", src.as_ref()) {
        Ok(recipe) => recipe.to_string(),
        Err(error) => error.to_string(),
    }
}

#[test]
fn a_pass_does_what_its_recipe_says_and_kills_otherwise() {
    let src = "schema = 1\n\n[pass.return-cfi]\non-violation = \"log\"\n";
    let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
    assert_eq!(recipe.on_violation(RETURN_CFI), ViolationAction::Log);
    assert_eq!(recipe.on_violation(FORWARD_CFI), ViolationAction::Kill);
    assert_eq!(recipe.to_string(), src);
}

#[test]
fn of_a_list_each_value_is_a_choice_and_the_first_ones_come_first() {
    let src = "schema = 1\n\n[pass.forward-cfi]\npolicy = [\"typed\", \"address-taken\"]\n\n\
               [pass.return-cfi]\npolicy = [\"function\", \"return-sites\"]\n";
    let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
    assert_eq!(recipe.to_string(), src);
    let choices = recipe.choices();
    let policies = choices.iter().map(|choice| {
        let has = (passes::is_typed(choice), passes::is_per_function(choice));
        (has, recipe.given_up(choice))
    });
    let no_function = "return-cfi: policy `return-sites` instead of `function`".to_owned();
    let no_types = "forward-cfi: policy `address-taken` instead of `typed`".to_owned();
    assert_eq!(
        policies.collect::<Vec<_>>(),
        [
            ((true, true), vec![]),
            ((true, false), vec![no_function.clone()]),
            ((false, true), vec![no_types.clone()]),
            ((false, false), vec![no_types, no_function]),
        ]
    );
    assert_eq!(Recipe::default().choices(), [Recipe::default()]);
}

#[test]
fn returns_by_class_need_branches_by_class() {
    let both = "schema = 1\n\n[pass.forward-cfi]\npolicy = [\"typed\", \"address-taken\"]\n\n\
                [pass.return-cfi]\npolicy = [\"class\", \"function\"]\n";
    let recipe = Recipe::parse("r.toml", both.as_bytes()).unwrap();
    let choices = recipe.choices();
    let choices = choices.iter();
    let choices = choices.map(|choice| (passes::is_typed(choice), passes::is_by_class(choice)));
    assert_eq!(
        choices.collect::<Vec<_>>(),
        [(true, true), (true, false), (false, false)]
    );
    assert_eq!(
        said("schema = 1\n[pass.return-cfi]\npolicy = \"class\"\n"),
        "r.toml:3:10: policy `class` goes by the classes of branches; give forward-cfi the policy `typed`, or returns \
         `function`"
    );
}

#[test]
fn a_pass_that_is_off_by_default_is_named_to_run() {
    let src = "schema = 1\n\n[pass.zero-regs]\n";
    let recipe = Recipe::parse("r.toml", src.as_bytes()).unwrap();
    assert!(recipe.names("zero-regs") && !recipe.names(RETURN_CFI));
    assert_eq!(recipe.to_string(), src);
    assert!(!Recipe::default().names("zero-regs"));
}

#[test]
fn the_documented_example_is_a_recipe() {
    let doc = include_str!("mod.rs").lines();
    let example: Vec<&str> = doc
        .skip_while(|line| *line != "//! ```toml")
        .skip(1)
        .map_while(|line| line.strip_prefix("//!").filter(|line| *line != " ```"))
        .map(str::trim_start)
        .collect();
    let recipe = Recipe::parse("doc", example.join("\n").as_bytes()).unwrap();
    assert_eq!(recipe.on_violation(FORWARD_CFI), ViolationAction::Panic);
}

#[test]
fn each_mistake_is_named_with_its_place() {
    for (src, expected) in [
        (
            "",
            "r.toml:1:1: the recipe has no `schema`; write `schema = 1`, the version of this format",
        ),
        (
            "schema = 2\n[pass.x]\n",
            "r.toml:1:10: this version reads schema 1 only; use a newer hardener, or write the recipe as schema 1",
        ),
        (
            "schema = \"1\"\n",
            "r.toml:1:10: expected an integer, found a string",
        ),
        (
            "schema = 1\npasses = 3\n",
            "r.toml:2:1: unknown key `passes`; did you mean `pass`?",
        ),
        (
            "schema = 1\n[pass.retrun-cfi]\n",
            "r.toml:2:7: unknown pass `retrun-cfi`; did you mean `return-cfi`?",
        ),
        (
            "schema = 1\n[pass.return-cfi]\non-violation = \"ignore\"\n",
            "r.toml:3:16: unknown action `ignore`; there are: kill, log, panic",
        ),
        (
            "schema = 1\n[pass.return-cfi]\non-violation = 1\n[pass.forward-cfi]\nwhen = 1\n",
            "r.toml:3:16: expected a string, found an integer\n\
             r.toml:5:1: unknown parameter `when`; there are: on-violation, policy",
        ),
        (
            "schema = 1\n[pass.no-rethunk]\non-violation = \"log\"\n",
            "r.toml:3:1: unknown parameter `on-violation`; there is none",
        ),
        (
            "schema = 1\n[pass.forward-cfi]\npolicy = \"type\"\n",
            "r.toml:3:10: unknown policy `type`; did you mean `typed`?",
        ),
        (
            "schema = 1\n[pass.return-cfi]\npolicy = []\n",
            "r.toml:3:10: expected at least one string, found an array",
        ),
        (
            "schema = 1\n[pass.return-cfi]\npolicy = [\"function\", 1]\n",
            "r.toml:3:23: expected a string, found an integer",
        ),
        (
            "schema = 1\n[pass.return-cfi]\npolicy = 1\n",
            "r.toml:3:10: expected a string or a list of strings, found an integer",
        ),
        (
            "schema = 1\n[pass.return-cfi]\non-violation = [\"log\"]\n",
            "r.toml:3:16: expected a string, found an array",
        ),
        (
            "schema = 1\n[pass.return-cfi]\npolicy = \"functions\"\n",
            "r.toml:3:10: unknown policy `functions`; did you mean `function`?",
        ),
        (
            "schema = 1\npass = 1\n",
            "r.toml:2:8: expected a table, found an integer",
        ),
    ] {
        assert_eq!(said(src), expected, "{src}");
    }
    assert!(said("schema = 1\n[pass").starts_with("r.toml:2:"));
    assert_eq!(
        said(b"schema = 1\n# \xff"),
        "r.toml:2:3: not UTF-8, as TOML must be"
    );
    let long = "#".repeat(MAX_RECIPE as usize + 1);
    assert!(said(long).contains("larger than"));
}
