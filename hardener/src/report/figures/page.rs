//! The report as one HTML file.

use super::charts::{self, CAVE, SERIES, css, shade};
use super::{Report, Targets, per_cent};
use crate::report::place;
use maud::{DOCTYPE, Markup, PreEscaped, html};
use penumbra_bundle::{LinkVa, SlotKind};

const STYLE: &str = "
:root { color-scheme: light; font: 15px/1.5 system-ui, sans-serif; color: #1e293b; background: #f8fafc; }
body { max-width: 960px; margin: 0 auto; padding: 2rem 1.25rem 4rem; }
h1 { font-size: 1.7rem; margin: 0 0 .2rem; }
h2 { font-size: 1.15rem; margin: 0 0 .3rem; }
p { margin: .3rem 0 .8rem; color: #475569; }
code { font: .9em ui-monospace, monospace; overflow-wrap: anywhere; }
section { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: 1.1rem 1.3rem; margin-top: 1.2rem; overflow-x: auto; }
.facts { display: grid; grid-template-columns: repeat(auto-fit, minmax(200px, 1fr)); gap: .9rem; margin-top: 1.2rem; }
.facts div { background: #fff; border: 1px solid #e2e8f0; border-radius: 10px; padding: .8rem 1rem; }
.facts b { display: block; font-size: 1.5rem; line-height: 1.3; color: #0f172a; }
.facts span { color: #64748b; font-size: .87rem; }
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th { text-align: left; color: #64748b; font-weight: 600; border-bottom: 1px solid #cbd5e1; }
th, td { padding: .3rem .6rem .3rem 0; vertical-align: top; }
tr + tr td { border-top: 1px solid #f1f5f9; }
td.n, th.n { padding-left: .6rem; }
td:last-child, th:last-child { padding-right: 0; }
.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
svg { max-width: 100%; height: auto; display: block; margin: .6rem 0 .8rem; }
.key span { display: inline-block; margin-right: 1.3rem; font-size: .88rem; color: #334155; }
.key i { display: inline-block; width: .9rem; height: .9rem; border-radius: 3px; margin-right: .4rem; vertical-align: -.1rem; }
.key i.line { height: 0; border-top: 2px dashed #334155; vertical-align: .25rem; border-radius: 0; }
";

/// Writes the page.
pub fn write(report: &Report) -> String {
    let page = html! {
        (DOCTYPE)
        html lang="en" {
            head {
                meta charset="utf-8";
                meta name="viewport" content="width=device-width, initial-scale=1";
                title { "Hardened text of " (report.kernel) }
                style { (PreEscaped(STYLE)) }
            }
            body {
                h1 { "Hardened text of " (report.kernel) }
                p { "build-id " code { (report.build_id) } ", written by " (report.generator) }
                (facts(report))
                (passes(report))
                (targets(report))
                (text(report))
                (costs(report))
            }
        }
    };
    page.into_string()
}

/// The few numbers that matter most.
fn facts(report: &Report) -> Markup {
    let fact = |value: String, what: String| html! { div { b { (value) } span { (what) } } };
    let of = |slot: SlotKind| report.targets.iter().find(|one| one.slot == slot);
    let slots: u64 = report.sections.iter().map(|one| one.slots.all()).sum();
    html! {
        div.facts {
            @if let Some(returns) = of(SlotKind::Return) {
                (fact(per_cent(returns.left), "of the text's addresses are left to a return (mean)".to_owned()))
            }
            @if let Some(forward) = of(SlotKind::Indirect) {
                (fact(grouped(forward.median), "functions an indirect branch may reach (median)".to_owned()))
            }
            (fact(grouped(slots), "instructions that differ in some variant".to_owned()))
            (fact(format!("{:.1} MiB", report.text_bytes as f64 / 1048576.0), format!("of text, {} functions", grouped(report.functions as u64))))
        }
    }
}

fn passes(report: &Report) -> Markup {
    html! {
        section {
            h2 { "Variants" }
            table {
                tr { th { "variant" } th { "pass" } th { "what it does" } th.n { "slots" } th.n { "left alone" } th { "parameters" } }
                @for variant in &report.variants {
                    @for (n, pass) in variant.passes.iter().enumerate() {
                        tr {
                            td { @if n == 0 { (variant.name) } }
                            td { (pass.name) }
                            td { (pass.does) }
                            td.n { (grouped(pass.edited)) }
                            td.n title=(pass.left.iter().map(|(reason, count)| format!("{reason} {count}")).collect::<Vec<_>>().join(", ")) {
                                (grouped(pass.left.values().sum()))
                            }
                            td { (pass.parameters.iter().map(|(name, value)| format!("{name} = {value}")).collect::<Vec<_>>().join(", ")) }
                        }
                    }
                }
            }
            @for variant in report.variants.iter().filter(|variant| !variant.leaves_out.is_empty()) {
                p { (variant.name) " leaves out " (variant.leaves_out.join(", ")) ": a branch-predictor barrier is issued when a CPU enters it." }
            }
        }
    }
}

fn targets(report: &Report) -> Markup {
    let all: Vec<&Targets> = report.targets.iter().collect();
    html! {
        @if !all.is_empty() {
            section {
                h2 { "Where slots may go" }
                p { "Share of the slots of each pass that may reach at most so many addresses. Further left and higher is narrower." }
                div.key {
                    @for (one, colour) in all.iter().zip(SERIES.iter().cycle()) {
                        span { i style=(format!("background:{}", css(*colour))) {} (one.pass) " (" (one.variant) ")" }
                    }
                    span { i.line {} "without the pass: any byte of the text" }
                }
                (PreEscaped(charts::set_sizes(&all)))
                table {
                    tr { th { "pass" } th.n { "before" } th.n { "median" } th.n { "90 % at most" } th.n { "mean" } th.n { "share of the text left" } th.n { "share of its targets" } }
                    @for one in &all {
                        tr {
                            td { (one.pass) " (" (one.variant) ")" }
                            td.n { (grouped(one.before)) }
                            td.n { (grouped(one.median)) }
                            td.n { (grouped(one.p90)) }
                            td.n { (format!("{:.1}", one.mean)) }
                            td.n { (per_cent(one.left)) }
                            td.n { @if one.members > 0 { (per_cent(one.mean / one.members as f64)) } }
                        }
                    }
                }
            }
        }
    }
}

fn text(report: &Report) -> Markup {
    let start = report
        .sections
        .first()
        .map_or(0, |section| section.range.start.0);
    let cell = report.map.cell_bytes;
    let address = |index: usize| LinkVa(start + index as u64 * cell).to_string();
    let most = report
        .map
        .cells
        .iter()
        .map(|cell| cell.slots)
        .max()
        .unwrap_or(0);
    let swatch = |colour| format!("background:{}", css(colour));
    html! {
        section {
            h2 { "The text" }
            p { "Each square is " (cell / 1024) " KiB of text; the darker, the more slots in it." }
            div.key {
                span { i style=(swatch(shade(1, most))) {} "1 slot" }
                span { i style=(swatch(shade(most, most))) {} (most) " slots" }
                span { i style=(swatch(shade(0, 1))) {} "none" }
                span { i style=(swatch(CAVE)) {} "thunks and tables" }
            }
            (PreEscaped(charts::map(&report.map, address)))
            table {
                tr { th { "part" } th { "from" } th.n { "KiB" } th.n { "returns" } th.n { "indirect branches" } th.n { "calls" } }
                @for one in &report.sections {
                    tr {
                        td { (one.name) }
                        td { code { (one.range.start) } }
                        td.n { (format!("{:.1}", one.range.len() as f64 / 1024.0)) }
                        td.n { (grouped(one.slots.returns)) }
                        td.n { (grouped(one.slots.indirect)) }
                        td.n { (grouped(one.slots.calls)) }
                    }
                }
            }
        }
    }
}

fn costs(report: &Report) -> Markup {
    html! {
        @if !report.costs.is_empty() {
            section {
                h2 { "What slots cost" }
                p {
                    "Instructions that a thunk runs before it goes on as the slot would have, counted along the ways through its code: the bar is "
                    "the shortest way that looks a target up, as a mean over the slots; the line goes from the shortest way of all to the longest "
                    "that comes to no place twice. How often each slot runs is not in a bundle."
                }
                (PreEscaped(charts::costs(&report.costs)))
                table {
                    tr { th { "pass" } th { "slot" } th.n { "slots" } th.n { "least" } th.n { "usual" } th.n { "most" } }
                    @for one in &report.costs {
                        tr {
                            td { (one.pass) " (" (one.variant) ")" }
                            td { (place::slot(one.slot).1) }
                            td.n { (grouped(one.slots)) }
                            td.n { (one.least) }
                            td.n { (format!("{:.1}", one.usual)) }
                            td.n { (one.most.map_or("unbounded".to_owned(), |most| most.to_string())) }
                        }
                    }
                }
            }
        }
    }
}

/// 1234567 as 1,234,567.
fn grouped(value: u64) -> String {
    let digits = value.to_string();
    let mut out = String::new();
    for (n, digit) in digits.chars().enumerate() {
        if n > 0 && (digits.len() - n).is_multiple_of(3) {
            out.push(',');
        }
        out.push(digit);
    }
    out
}

#[cfg(test)]
mod tests {
    use super::grouped;

    #[test]
    fn numbers_are_grouped_from_the_right() {
        let said = [0, 12, 123, 1234, 123_456, 1_234_567].map(grouped);
        assert_eq!(said, ["0", "12", "123", "1,234", "123,456", "1,234,567"]);
    }
}
