//! Recipes that come with the hardener. Each is a TOML file in `hardener/presets`, to be read, copied and changed
//! (`hardener recipe show NAME`).

use crate::recipe::{Recipe, RecipeError};

/// A recipe that comes with the hardener.
pub struct Preset {
    /// What `--preset` calls it.
    pub name: &'static str,
    /// The recipe, as TOML.
    pub text: &'static str,
}

/// All presets, from the cheapest to the strictest.
pub const ALL: [Preset; 4] = [
    Preset {
        name: "fast",
        text: include_str!("../presets/fast.toml"),
    },
    Preset {
        name: "balanced",
        text: include_str!("../presets/balanced.toml"),
    },
    Preset {
        name: "hardened",
        text: include_str!("../presets/hardened.toml"),
    },
    Preset {
        name: "paranoid",
        text: include_str!("../presets/paranoid.toml"),
    },
];

/// The preset called `name`.
pub fn find(name: &str) -> Option<&'static Preset> {
    ALL.iter().find(|preset| preset.name == name)
}

impl Preset {
    /// The recipe; refused only when a preset and the passes have come apart, which a test prevents.
    pub fn recipe(&self) -> Result<Recipe, RecipeError> {
        Recipe::parse(&format!("preset {}", self.name), self.text.as_bytes())
    }

    /// What it is for: its first comment, without its name.
    pub fn about(&self) -> &'static str {
        let first = self.text.lines().next().unwrap_or_default();
        let comment = first.trim_start_matches("# ");
        comment.split_once(": ").map_or(comment, |(_, about)| about)
    }
}

#[cfg(test)]
mod tests {
    use super::{ALL, find};
    use crate::passes;

    #[test]
    fn each_preset_is_a_recipe_that_sets_every_parameter_of_every_pass() {
        for preset in &ALL {
            let recipe = preset.recipe();
            assert!(recipe.is_ok(), "{:?}", recipe.err());
            assert_eq!(
                preset.text.matches(&format!("# {}: ", preset.name)).count(),
                1
            );
            assert!(preset.about().ends_with('.'), "{}", preset.about());
            for (name, pass) in passes::known() {
                // Those run where somebody names them.
                if pass.is_optional() {
                    let strict = ["hardened", "paranoid"].contains(&preset.name);
                    let wanted = strict && name == "stack-clear";
                    let named = recipe.as_ref().is_ok_and(|recipe| recipe.names(name));
                    assert_eq!(named, wanted, "{}: {name}", preset.name);
                    continue;
                }
                // A parameter that a preset leaves out would follow a default that may change.
                let head = format!("[pass.{name}]\n");
                let own = preset.text.split_once(&head).map_or("", |(_, own)| own);
                let own = own.split("\n[").next().unwrap_or_default();
                let lines = own.lines().filter(|line| line.contains(" = "));
                assert_eq!(
                    lines.count(),
                    pass.parameters().len(),
                    "{}: {name}",
                    preset.name
                );
            }
        }
        assert!(find("reckless").is_none());
    }

    #[test]
    fn paranoid_stops_the_kernel_and_no_other_does() {
        use penumbra_bundle::ViolationAction;
        for preset in &ALL {
            let recipe = preset.recipe().unwrap();
            let panics = [passes::RETURN_CFI, passes::FORWARD_CFI]
                .map(|pass| recipe.on_violation(pass) == ViolationAction::Panic);
            assert_eq!(panics, [preset.name == "paranoid"; 2], "{}", preset.name);
        }
    }
}
