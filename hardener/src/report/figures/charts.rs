//! Pictures, as SVG that stands in a page.

use super::Targets;
use super::cost::Cost;
use super::sections::{Map, What};
use plotters::coord::Shift;
use plotters::prelude::*;
use std::fmt::Display;

/// Colours of series that are told apart with any kind of sight (Okabe and Ito), in this order.
pub const SERIES: [RGBColor; 4] = [
    RGBColor(0, 114, 178),
    RGBColor(213, 94, 0),
    RGBColor(0, 158, 115),
    RGBColor(204, 121, 167),
];
const INK: RGBColor = RGBColor(51, 65, 85);
const FAINT: RGBColor = RGBColor(226, 232, 240);
const FILLER: RGBColor = RGBColor(241, 245, 249);
/// Thunks and tables in the map.
pub const CAVE: RGBColor = RGBColor(230, 159, 0);
/// Cells in a row of the map.
const ROW: usize = 64;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;

/// Draws on a canvas of this size, in pixels.
///
/// # Panics
/// When plotters refuses to draw: writing into memory fails for mistakes in a picture only.
fn svg(
    size: (u32, u32),
    draw: impl FnOnce(&Area<'_>) -> Result<(), Box<dyn std::error::Error>>,
) -> String {
    let mut out = String::new();
    {
        let area = SVGBackend::with_string(&mut out, size).into_drawing_area();
        draw(&area).expect("a picture in memory");
        area.present().expect("a picture in memory");
    }
    out
}

/// A number as an axis has it: 10k, 3M.
fn short(value: impl Into<f64>) -> String {
    let value: f64 = value.into();
    let (scaled, unit) = match value {
        1e6.. => (value / 1e6, "M"),
        1e3.. => (value / 1e3, "k"),
        _ => (value, ""),
    };
    format!("{}{unit}", (scaled * 10.0).round() / 10.0)
}

/// The share of slots (upwards) whose sets have at most so many members (to the right, logarithmic), a step line for each.
pub fn set_sizes(targets: &[&Targets]) -> String {
    let most = targets.iter().map(|one| one.before).max().unwrap_or(1) as f64;
    svg((860, 320), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(46)
            .y_label_area_size(58)
            .build_cartesian_2d((1f64..most * 1.6).log_scale(), 0f64..102f64)?;
        chart
            .configure_mesh()
            .axis_style(INK)
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .label_style(("sans-serif", 13, &INK))
            .axis_desc_style(("sans-serif", 13, &INK))
            .x_desc("addresses that a slot may reach")
            .y_desc("% of slots")
            .x_labels(9)
            .x_label_formatter(&|value| short(*value))
            .y_label_formatter(&|value| format!("{value:.0}"))
            .draw()?;
        let before = [(most, 0.0), (most, 100.0)];
        chart.draw_series(DashedLineSeries::new(before, 5, 4, INK.stroke_width(2)))?;
        for (targets, colour) in targets.iter().zip(SERIES.iter().cycle()) {
            let all: u64 = targets.classes.iter().map(|class| class.slots).sum();
            let (mut at, mut seen) = (vec![(1.0, 0.0)], 0);
            for class in &targets.classes {
                // A slot that may reach nothing stands with those that may reach one.
                let size = (class.size as f64).max(1.0);
                at.push((size, seen as f64 * 100.0 / all as f64));
                seen += class.slots;
                at.push((size, seen as f64 * 100.0 / all as f64));
            }
            at.push((most, 100.0));
            chart.draw_series(LineSeries::new(at, colour.stroke_width(3)))?;
        }
        Ok(())
    })
}

/// Instructions for each kind of slot: a bar for the usual way, a line from the least to the most.
pub fn costs(costs: &[Cost]) -> String {
    let most = costs.iter().map(|cost| cost.most.unwrap_or(0)).max();
    let usual = costs.iter().map(|cost| cost.usual.ceil() as u32).max();
    let most = f64::from(most.max(usual).unwrap_or(1)) * 1.08;
    let height = 70 + 44 * costs.len() as u32;
    svg((860, height), |area| {
        let mut chart = ChartBuilder::on(area)
            .margin(12)
            .x_label_area_size(42)
            .y_label_area_size(230)
            .build_cartesian_2d(0f64..most, 0f64..costs.len() as f64)?;
        chart
            .configure_mesh()
            .axis_style(INK)
            .bold_line_style(FAINT)
            .light_line_style(TRANSPARENT)
            .disable_y_axis()
            .disable_y_mesh()
            .label_style(("sans-serif", 13, &INK))
            .axis_desc_style(("sans-serif", 13, &INK))
            .x_desc("instructions that a slot adds")
            .x_label_formatter(&|value| format!("{value:.0}"))
            .draw()?;
        for (index, cost) in costs.iter().enumerate() {
            let middle = (costs.len() - index) as f64 - 0.5;
            let bar = [(0.0, middle - 0.28), (cost.usual, middle + 0.28)];
            let colour = SERIES[0];
            chart.draw_series([Rectangle::new(bar, colour.filled())])?;
            let end = cost.most.map_or(most, f64::from);
            let range = [(f64::from(cost.least), middle), (end, middle)];
            chart.draw_series([PathElement::new(range, INK.stroke_width(2))])?;
            let caps = [f64::from(cost.least), end].map(|at| {
                let cap = [(at, middle - 0.14), (at, middle + 0.14)];
                PathElement::new(cap, INK.stroke_width(2))
            });
            chart.draw_series(caps)?;
            let (_, y) = chart.backend_coord(&(0.0, middle));
            let label = format!("{} ({})", cost.pass, cost.variant);
            let style = ("sans-serif", 14).into_text_style(area).color(&INK);
            area.draw_text(&label, &style, (14, y - 8))?;
        }
        Ok(())
    })
}

/// The text from its first address, row by row: the darker a cell, the more slots; thunks and tables apart.
pub fn map(map: &Map, first: impl Fn(usize) -> String) -> String {
    let (cell, left) = (11i32, 150i32);
    let rows = map.cells.len().div_ceil(ROW);
    let most = map
        .cells
        .iter()
        .map(|cell| cell.slots)
        .max()
        .unwrap_or(1)
        .max(1);
    let size = (
        (left + cell * ROW as i32 + 6) as u32,
        (cell * rows as i32 + 6) as u32,
    );
    svg(size, |area| {
        let style = ("monospace", 11).into_text_style(area).color(&INK);
        for (index, one) in map.cells.iter().enumerate() {
            let (row, column) = ((index / ROW) as i32, (index % ROW) as i32);
            if column == 0 && row % 4 == 0 {
                area.draw_text(&first(index), &style, (2, row * cell + 3))?;
            }
            let (x, y) = (left + column * cell, 3 + row * cell);
            let corners = [(x, y), (x + cell - 1, y + cell - 1)];
            let colour = match one.what {
                What::Cave => CAVE,
                What::Filler => FILLER,
                What::Code => shade(one.slots, most),
            };
            area.draw(&Rectangle::new(corners, colour.filled()))?;
        }
        Ok(())
    })
}

/// From nearly white to dark, by the share of `most`.
pub fn shade(slots: u64, most: u64) -> RGBColor {
    let (light, dark) = ([219u8, 234, 246], [3u8, 60, 120]);
    // Few cells have many slots: the root keeps the others apart.
    let share = (slots as f64 / most.max(1) as f64).sqrt();
    let mix = |n: usize| {
        let (from, to) = (f64::from(light[n]), f64::from(dark[n]));
        (from + (to - from) * share).round() as u8
    };
    if slots == 0 {
        return FAINT;
    }
    RGBColor(mix(0), mix(1), mix(2))
}

/// A colour as style sheets have it.
pub fn css(colour: RGBColor) -> impl Display {
    format!("#{:02x}{:02x}{:02x}", colour.0, colour.1, colour.2)
}
