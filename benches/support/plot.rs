//! Plots in SVG.

use std::error::Error;
use std::ops::Range;
use std::path::Path;

use plotters::coord::Shift;
use plotters::coord::ranged1d::{DefaultFormatting, KeyPointHint, Ranged};
use plotters::prelude::*;
use plotters::style::text_anchor::{HPos, Pos, VPos};

use super::stats::Interval;

type Area<'a> = DrawingArea<SVGBackend<'a>, Shift>;
type Drawn = Result<(), Box<dyn Error>>;

const FONT: &str = "sans-serif";

pub struct Lines {
    pub title: String,
    pub x: Axis,
    pub y: Axis,
    pub series: Vec<Series>,
    /// Horizontal reference lines.
    pub levels: Vec<(String, f64)>,
}

pub struct Axis {
    /// Includes the unit.
    pub label: String,
    pub scale: Scale,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Scale {
    /// Starts at 0.
    Linear,
    Log,
    /// Logarithmic, marked at powers of two.
    Bytes,
}

pub struct Series {
    pub name: String,
    pub points: Vec<(f64, f64)>,
}

impl Axis {
    pub fn linear(label: &str) -> Self {
        Self::new(label, Scale::Linear)
    }

    pub fn log(label: &str) -> Self {
        Self::new(label, Scale::Log)
    }

    pub fn bytes(label: &str) -> Self {
        Self::new(label, Scale::Bytes)
    }

    fn new(label: &str, scale: Scale) -> Self {
        Self {
            label: label.to_owned(),
            scale,
        }
    }

    /// The position of a value on the axis. plotters has a type for each kind of axis; here all are
    /// linear, of the logarithm where needed, with our own marks.
    fn place(&self, value: f64) -> f64 {
        match self.scale {
            Scale::Linear => value,
            Scale::Log => value.log10(),
            Scale::Bytes => value.log2(),
        }
    }

    fn range(&self, values: impl Iterator<Item = f64>, margin: f64) -> Range<f64> {
        let start = (f64::INFINITY, f64::NEG_INFINITY);
        let (low, high) = values
            .map(|value| self.place(value))
            .fold(start, |(low, high), value| {
                (low.min(value), high.max(value))
            });
        let margin = ((high - low) * margin).max(1e-9);
        match self.scale {
            Scale::Linear => 0.0..high + margin,
            Scale::Log | Scale::Bytes => low - margin..high + margin,
        }
    }

    /// The positions that get a label.
    fn marks(&self, range: &Range<f64>) -> Vec<f64> {
        let decades = || (range.start.floor() as i32)..=(range.end.ceil() as i32);
        let marks: Vec<f64> = match self.scale {
            Scale::Linear => return linear_marks(range),
            Scale::Bytes => decades()
                .filter(|power| power % 2 == 0)
                .map(f64::from)
                .collect(),
            Scale::Log => {
                let steps: &[f64] = match range.end - range.start {
                    ..0.7 => &[1.0, 1.2, 1.5, 2.0, 2.5, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0],
                    ..1.5 => &[1.0, 1.5, 2.0, 3.0, 5.0, 7.0],
                    ..3.0 => &[1.0, 2.0, 5.0],
                    _ => &[1.0],
                };
                let within = |power| {
                    steps
                        .iter()
                        .map(move |step| f64::from(power) + step.log10())
                };
                decades().flat_map(within).collect()
            }
        };
        marks
            .into_iter()
            .filter(|mark| range.contains(mark))
            .collect()
    }

    fn name(&self, mark: f64) -> String {
        match self.scale {
            Scale::Linear => format_number(mark),
            Scale::Log => format_number(10_f64.powf(mark)),
            Scale::Bytes => match mark.round() as u32 {
                power @ ..10 => format!("{} B", 1_u64 << power),
                power @ ..20 => format!("{} KiB", 1_u64 << (power - 10)),
                power => format!("{} MiB", 1_u64 << (power - 20)),
            },
        }
    }
}

/// Marks at multiples of 1, 2 or 5 times a power of ten.
fn linear_marks(range: &Range<f64>) -> Vec<f64> {
    let rough = (range.end - range.start) / 8.0;
    let power = 10_f64.powf(rough.log10().floor());
    let step = [1.0, 2.0, 5.0, 10.0].map(|step| step * power);
    let step = step
        .into_iter()
        .find(|step| *step >= rough)
        .unwrap_or(rough);
    let first = (range.start / step).ceil() as i64;
    let last = (range.end / step).floor() as i64;
    (first..=last).map(|index| index as f64 * step).collect()
}

/// Draws the ratio of each way as a dot with its interval.
pub fn ratios(path: &Path, title: &str, label: &str, ways: &[(String, Interval)]) {
    let size = (900, 120 + 34 * ways.len() as u32);
    draw(path, size, |area| draw_ratios(&area, title, label, ways));
}

pub fn lines(path: &Path, lines: &Lines) {
    draw(path, (980, 520), |area| draw_lines(&area, lines));
}

fn draw(path: &Path, size: (u32, u32), content: impl FnOnce(Area<'_>) -> Drawn) {
    let area = SVGBackend::new(path, size).into_drawing_area();
    // A failed plot does not end the bench: the tables have the figures.
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
    let marks = linear_marks(&range);
    // Ways are at whole numbers, from top to bottom.
    let mut chart = ChartBuilder::on(area)
        .caption(title, (FONT, 20))
        .margin(12)
        .x_label_area_size(46)
        .y_label_area_size(230)
        .build_cartesian_2d(
            Marked {
                range: range.clone(),
                marks,
            },
            (count - 0.5)..-0.5,
        )?;
    chart
        .configure_mesh()
        .disable_y_mesh()
        .light_line_style(TRANSPARENT)
        .y_labels(0)
        .x_desc(label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .x_label_formatter(&|x| format_number(*x))
        .draw()?;
    let one = [(1.0, count - 0.5), (1.0, -0.5)];
    chart.draw_series(LineSeries::new(one, BLACK.mix(0.6)))?;
    for (row, (name, interval)) in ways.iter().enumerate() {
        let y = row as f64;
        let ends = [(interval.low, y), (interval.high, y)];
        let color = color(0);
        chart.draw_series(LineSeries::new(ends, color.stroke_width(3)))?;
        chart.draw_series([Circle::new((interval.median, y), 4, color.filled())])?;
        let style =
            TextStyle::from((FONT, 14).into_font()).pos(Pos::new(HPos::Right, VPos::Center));
        let at = chart.backend_coord(&(range.start, y));
        area.draw_text(name, &style, (at.0 - 8, at.1))?;
    }
    area.present()?;
    Ok(())
}

/// A linear axis with given marks.
struct Marked {
    range: Range<f64>,
    marks: Vec<f64>,
}

impl Ranged for Marked {
    type FormatOption = DefaultFormatting;
    type ValueType = f64;

    fn map(&self, value: &f64, pixels: (i32, i32)) -> i32 {
        let part = (value - self.range.start) / (self.range.end - self.range.start);
        pixels.0 + (part * f64::from(pixels.1 - pixels.0)).round() as i32
    }

    fn key_points<Hint: KeyPointHint>(&self, _: Hint) -> Vec<f64> {
        self.marks.clone()
    }

    fn range(&self) -> Range<f64> {
        self.range.clone()
    }
}

/// The width of the legend to the right of the lines, in pixels.
const LEGEND: u32 = 230;

fn draw_lines(area: &Area<'_>, lines: &Lines) -> Drawn {
    area.fill(&WHITE)?;
    let (plot, legend) = area.split_horizontally(area.dim_in_pixel().0 - LEGEND);
    let points = || lines.series.iter().flat_map(|series| &series.points);
    let levels = lines.levels.iter().map(|level| level.1);
    let xs = lines.x.range(points().map(|point| point.0), 0.0);
    let ys = points().map(|point| point.1).chain(levels);
    let ys = lines.y.range(ys, 0.06);
    let marks = (lines.x.marks(&xs), lines.y.marks(&ys));
    let mut chart = ChartBuilder::on(&plot)
        .caption(&lines.title, (FONT, 18))
        .margin(16)
        .x_label_area_size(50)
        .y_label_area_size(78)
        .build_cartesian_2d(
            Marked {
                range: xs.clone(),
                marks: marks.0,
            },
            Marked {
                range: ys,
                marks: marks.1,
            },
        )?;
    chart
        .configure_mesh()
        .light_line_style(TRANSPARENT)
        .x_desc(&lines.x.label)
        .y_desc(&lines.y.label)
        .label_style((FONT, 14))
        .axis_desc_style((FONT, 15))
        .x_label_formatter(&|x| lines.x.name(*x))
        .y_label_formatter(&|y| lines.y.name(*y))
        .draw()?;
    let mut names = Vec::new();
    for (name, level) in &lines.levels {
        let y = lines.y.place(*level);
        let style = BLACK.mix(0.6).stroke_width(1);
        chart.draw_series(LineSeries::new([(xs.start, y), (xs.end, y)], style))?;
        names.push((name, style));
    }
    for (index, series) in lines.series.iter().enumerate() {
        let color = color(index);
        let points = series.points.iter();
        let points: Vec<_> = points
            .map(|&(x, y)| (lines.x.place(x), lines.y.place(y)))
            .collect();
        let style = color.stroke_width(2);
        chart.draw_series(LineSeries::new(points.clone(), style))?;
        let dots = points.into_iter();
        chart.draw_series(dots.map(|point| Circle::new(point, 3, color.filled())))?;
        names.push((&series.name, style));
    }
    for (row, (name, style)) in names.into_iter().enumerate() {
        let y = 70 + 26 * row as i32;
        legend.draw(&PathElement::new([(0, y), (24, y)], style))?;
        let text = TextStyle::from((FONT, 14).into_font()).pos(Pos::new(HPos::Left, VPos::Center));
        legend.draw_text(name, &text, (32, y))?;
    }
    area.present()?;
    Ok(())
}

/// The palette of Okabe and Ito, which colour-blind readers can distinguish.
fn color(index: usize) -> RGBColor {
    const COLORS: [RGBColor; 7] = [
        RGBColor(0, 114, 178),
        RGBColor(213, 94, 0),
        RGBColor(0, 158, 115),
        RGBColor(204, 121, 167),
        RGBColor(230, 159, 0),
        RGBColor(86, 180, 233),
        RGBColor(0, 0, 0),
    ];
    COLORS[index % COLORS.len()]
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
    // Groups digits: 1000000 becomes 1 000 000.
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
