//! Recipes: what is taken says again what it says.
#![no_main]

use hardener::recipe::Recipe;
use hardener_fuzz::{memory, seen};
use libfuzzer_sys::fuzz_target;

fuzz_target!(init: memory(64), |data: &[u8]| {
    let read = Recipe::parse("r", data);
    match &read {
        Ok(recipe) => {
            let said = recipe.to_string();
            let again = Recipe::parse("r", said.as_bytes()).unwrap_or_else(|error| panic!("{said}: {error}"));
            assert_eq!(again, *recipe, "{said}");
            assert!(!recipe.choices().is_empty());
        }
        Err(error) => assert!(error.to_string().starts_with("r:"), "{error}"),
    }
    seen("the reader", read);
});
