//! Plots, as SVG.

use std::error::Error;
use std::path::Path;

use plotters::coord::Shift;
use plotters::prelude::*;

use super::stats::Interval;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

const FONT: &str = "sans-serif";

pub struct Lines {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// Horizontal lines to compare with.
    pub levels: Vec<(String, f64)>,
}

pub struct Axis {
    /// With the unit.
    pub label: String,
    pub log: bool,
}

pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Axis {
    pub fn linear(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            log: false,
        }
    }

    pub fn log(label: &str) -> Self {
        Self {
            label: label.to_owned(),
            log: true,
        }
    }
}

/// The ratio of each way as a dot, with its interval.
pub fn ratios(path: &Path, title: &str, label: &str, ways: &[(String, Interval)]) {
    let size = (900, 120 + 34 * ways.len() as u32);
    draw(path, size, |area| draw_ratios(&area, title, label, ways));
}

pub fn lines(path: &Path, lines: &Lines) {
    draw(path, (900, 520), |area| draw_lines(&area, lines));
}

fn draw(path: &Path, size: (u32, u32), content: impl FnOnce(Area<'_>) -> Drawn) {
    let area = SVGBackend::new(path, size).into_drawing_area();
    // The figures are in the tables: a plot that cannot be drawn ends nothing.
    if let Err(error) = content(area) {
        eprintln!("{}: {error}", path.display());
    }
}

fn draw_ratios(area: &Area<'_>, title: &str, label: &str, ways: &[(String, Interval)]) -> Drawn {
    area.fill(&WHITE)?;
    let low = ways.iter().map(|way| way.1.low).fold(1.0, f64::min);
    let high = ways.iter().map(|way| way.1.high).fold(1.0, f64::max);
    let margin = ((high - low) * 0.08).max(0.002);
    let count = ways.len() as f64;
    let range = low - margin..high + margin;
    // Ways are at whole numbers, from the top down.
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(230)
        .build_cartesian_2d(range.clone(), (count - 0.5)..-0.5)?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .y_labels(0)
        .x_desc(label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .x_label_formatter(&|x| format_number(*x))
        .draw()?;
    let one = [(1.0, count - 0.5), (1.0, -0.5)];
    chart.draw_series(LineSeries::new(one, BLACK.mix(0.4)))?;
    for (row, (name, interval)) in ways.iter().enumerate() {
        let y = row as f64;
        let ends = [(interval.low, y), (interval.high, y)];
        let style = BLUE.stroke_width(2);
        chart.draw_series(LineSeries::new(ends, style))?;
        chart.draw_series([Circle::new((interval.median, y), 4, BLUE.filled())])?;
        let style = TextStyle::from((FONT, 14).into_font()).pos(right());
        let at = chart.backend_coord(&(range.start, y));
        area.draw_text(name, &style, (at.0 - 8, at.1))?;
    }
    area.present()?;
    Ok(())
}

fn right() -> plotters::style::text_anchor::Pos {
    use plotters::style::text_anchor::{HPos, Pos, VPos};
    Pos::new(HPos::Right, VPos::Center)
}

/// plotters has a type for each kind of axis: both are drawn as linear ones, of the logarithm where
/// that is wanted.
fn draw_lines(area: &Area<'_>, lines: &Lines) -> Drawn {
    area.fill(&WHITE)?;
    let place = |axis: &Axis, value: f64| if axis.log { value.log10() } else { value };
    let points = || lines.series.iter().flat_map(|series| &series.points);
    let xs = range(points().map(|point| place(&lines.x, point.0)), 0.0);
    let levels = lines.levels.iter().map(|level| level.1);
    let ys = points().map(|point| point.1).chain(levels);
    let ys = range(ys.map(|y| place(&lines.y, y)), 0.06);
    let ys = if lines.y.log { ys } else { 0.0..ys.end };
    let mut chart = ChartBuilder::on(area)
        .caption(&lines.title, (FONT, 20))
        .margin(16)
        .x_label_area_size(50)
        .y_label_area_size(78)
        .build_cartesian_2d(xs.clone(), ys)?;
    let name = |axis: &Axis, at: f64| format_number(if axis.log { 10_f64.powf(at) } else { at });
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(&lines.x.label)
        .y_desc(&lines.y.label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .x_label_formatter(&|x| name(&lines.x, *x))
        .y_label_formatter(&|y| name(&lines.y, *y))
        .draw()?;
    for (name, level) in &lines.levels {
        let y = place(&lines.y, *level);
        let ends = [(xs.start, y), (xs.end, y)];
        let style = BLACK.mix(0.4);
        chart
            .draw_series(LineSeries::new(ends, style))?
            .label(name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], style));
    }
    for (index, series) in lines.series.iter().enumerate() {
        let color = Palette99::pick(index).to_rgba();
        let points = series.points.iter();
        let points: Vec<_> = points
            .map(|&(x, y)| (place(&lines.x, x), place(&lines.y, y)))
            .collect();
        chart
            .draw_series(LineSeries::new(points.clone(), color.stroke_width(2)))?
            .label(&series.name)
            .legend(move |(x, y)| PathElement::new([(x, y), (x + 20, y)], color.stroke_width(2)));
        let dots = points.into_iter();
        chart.draw_series(dots.map(|point| Circle::new(point, 3, color.filled())))?;
    }
    chart
        .configure_series_labels()
        .position(SeriesLabelPosition::UpperLeft)
        .background_style(WHITE.mix(0.85))
        .border_style(BLACK.mix(0.3))
        .label_font((FONT, 14))
        .draw()?;
    area.present()?;
    Ok(())
}

fn range(values: impl Iterator<Item = f64>, margin: f64) -> std::ops::Range<f64> {
    let (low, high) = values.fold((f64::INFINITY, f64::NEG_INFINITY), |(low, high), value| {
        (low.min(value), high.max(value))
    });
    let margin = ((high - low) * margin).max(1e-9);
    low - margin..high + margin
}

fn format_number(number: f64) -> String {
    let digits = match number.abs() {
        0.0 => 0,
        small if small < 0.1 => 3,
        small if small < 10.0 => 2,
        small if small < 100.0 => 1,
        _ => 0,
    };
    let text = format!("{number:.digits$}");
    let text = if text.contains('.') {
        text.trim_end_matches('0').trim_end_matches('.')
    } else {
        &text
    };
    // 1000000 as 1 000 000.
    let (whole, rest) = text.split_at(text.find('.').unwrap_or(text.len()));
    let mut grouped = String::new();
    for (index, digit) in whole.chars().enumerate() {
        if index > 0 && (whole.len() - index) % 3 == 0 && digit.is_ascii_digit() {
            grouped.push(' ');
        }
        grouped.push(digit);
    }
    grouped + rest
}
