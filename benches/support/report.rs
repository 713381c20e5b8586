//! The report of a bench: printed during the run, and written to `target/fuse-backing-bench/` as
//! JSON, Markdown and plots, with a summary of all benches that have run.

use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use libtest_mimic::Failed;
use serde_json::{Value, json};

use super::args::{Args, Effort};
use super::contest::Comparison;
use super::machine::Machine;
use super::plot::{self, Lines};
use super::stats::Interval;

pub struct Report {
    bench: &'static str,
    args: Args,
    machine: Machine,
    folder: PathBuf,
    markdown: String,
    results: Vec<Value>,
    bounds: Vec<Bound>,
    not_run: Vec<Value>,
}

/// A target, and whether it was met.
struct Bound {
    what: String,
    measured: Interval,
    /// For example `≤ 1.01`.
    limit: String,
    met: bool,
}

impl Report {
    pub fn new(bench: &'static str) -> Self {
        let args = Args::parse();
        // The target folder, which respects CARGO_TARGET_DIR.
        let target = Path::new(env!("CARGO_TARGET_TMPDIR")).parent();
        let mut folder = target.expect("it has a parent").join("fuse-backing-bench");
        if args.effort == Effort::Smoke {
            // Does not overwrite results of real runs.
            folder.push("smoke");
        }
        fs::create_dir_all(&folder).expect("the report's folder");
        let machine = Machine::this();
        println!("{bench}: {machine}");
        if args.effort == Effort::Smoke {
            println!("smoke run of a few rounds: the figures mean nothing");
        }
        println!();
        Self {
            bench,
            args,
            machine,
            folder,
            markdown: String::new(),
            results: Vec::new(),
            bounds: Vec::new(),
            not_run: Vec::new(),
        }
    }

    pub fn args(&self) -> &Args {
        &self.args
    }

    /// Whether to run the part with this id.
    pub fn wants(&self, id: &str) -> bool {
        self.args.wants(id)
    }

    /// Runs a part if it is wanted. If it fails, reports it as not run, with the reason.
    pub fn part(
        &mut self,
        id: &str,
        what: &str,
        run: impl FnOnce(&mut Self) -> Result<(), Failed>,
    ) {
        if !self.wants(id) {
            return;
        }
        if let Err(why) = run(self) {
            self.not_run(what, why.message().unwrap_or_default());
        }
    }

    fn say(&mut self, text: &str) {
        println!("{text}");
        self.markdown.push_str(text);
        self.markdown.push('\n');
    }

    pub fn note(&mut self, text: &str) {
        self.say(&format!("{text}\n"));
    }

    pub fn not_run(&mut self, what: &str, why: &str) {
        self.say(&format!("Not run: {what}: {why}\n"));
        self.not_run.push(json!({ "what": what, "why": why }));
    }

    /// Adds a table and a plot of the ways' ratios to the first way.
    pub fn comparison(&mut self, id: &str, heading: &str, comparison: &Comparison) {
        self.comparison_of(id, heading, comparison, "ns", None);
    }

    /// Like `comparison`, and also has the ratio of one way, `ours`, to each other way.
    pub fn comparison_of(
        &mut self,
        id: &str,
        heading: &str,
        comparison: &Comparison,
        unit: &str,
        ours: Option<&str>,
    ) {
        let Some(first) = comparison.ways.first() else {
            return;
        };
        let mut header = vec![
            "way".to_owned(),
            unit.to_owned(),
            format!("times {} (95 % CI)", first.name),
        ];
        if let Some(ours) = ours {
            header.push(format!("{ours}, times this way (95 % CI)"));
        }
        let mut rows = Vec::new();
        let mut points = Vec::new();
        let mut ways = Vec::new();
        for way in &comparison.ways {
            let ratio = comparison.ratio(&way.name, &first.name);
            let absolute = way.absolute();
            let digits = if absolute.median < 100.0 { 2 } else { 1 };
            let mut row = vec![
                way.name.clone(),
                format!("{:.digits$}", absolute.median),
                if way.name == first.name {
                    "1".to_owned()
                } else {
                    ratio.to_string()
                },
            ];
            let mut value = json!({
                "name": way.name,
                "median": absolute.median,
                "ratio": interval_json(ratio),
            });
            if let Some(ours) = ours {
                let ratio = comparison.ratio(ours, &way.name);
                row.push(if way.name == ours {
                    String::new()
                } else {
                    ratio.to_string()
                });
                value["ours"] = interval_json(ratio);
            }
            rows.push(row);
            points.push((way.name.clone(), ratio));
            ways.push(value);
        }
        let plot = self.plot_path(id);
        plot::ratios(&plot.0, heading, &format!("times {}", first.name), &points);
        self.heading(heading);
        self.say(&markdown_table(&header, &rows));
        self.say(&format!(
            "Medians of {} rounds.\n\n![{heading}]({})\n",
            comparison.rounds(),
            plot.1
        ));
        self.results.push(json!({
            "id": id,
            "heading": heading,
            "unit": unit,
            "rounds": comparison.rounds(),
            "baseline": first.name,
            "ours": ours,
            "ways": ways,
        }));
    }

    /// Adds a table of figures without a comparison. `data` goes into the JSON.
    pub fn table(
        &mut self,
        id: &str,
        heading: &str,
        header: &[&str],
        rows: &[Vec<String>],
        data: Value,
    ) {
        let header: Vec<_> = header.iter().map(|&cell| cell.to_owned()).collect();
        self.heading(heading);
        self.say(&markdown_table(&header, rows));
        self.results
            .push(json!({ "id": id, "heading": heading, "data": data }));
    }

    pub fn plot(&mut self, id: &str, lines: &Lines) {
        let plot = self.plot_path(id);
        plot::lines(&plot.0, lines);
        self.say(&format!("![{}]({})\n", lines.title, plot.1));
        self.results.push(json!({
            "id": id,
            "heading": lines.title,
            "x": lines.x.label,
            "y": lines.y.label,
            "series": lines.series.iter().map(|series| json!({
                "name": series.name,
                "points": series.points,
            })).collect::<Vec<_>>(),
        }));
    }

    /// A target: the median is at most `limit`.
    pub fn at_most(&mut self, what: &str, measured: Interval, limit: f64) {
        let met = measured.median <= limit;
        self.bound(what, measured, format!("≤ {limit}"), met);
    }

    /// A target: the upper end of the interval is at most `limit`.
    pub fn surely_at_most(&mut self, what: &str, measured: Interval, limit: f64) {
        let met = measured.high <= limit;
        self.bound(what, measured, format!("upper end ≤ {limit}"), met);
    }

    /// A target: the median is at least `limit`.
    pub fn at_least(&mut self, what: &str, measured: Interval, limit: f64) {
        let met = measured.median >= limit;
        self.bound(what, measured, format!("≥ {limit}"), met);
    }

    fn bound(&mut self, what: &str, measured: Interval, limit: String, met: bool) {
        if self.args.effort == Effort::Smoke {
            return;
        }
        self.bounds.push(Bound {
            what: what.to_owned(),
            measured,
            limit,
            met,
        });
    }

    fn heading(&mut self, heading: &str) {
        self.say(&format!("### {heading}\n"));
    }

    /// The path of a plot, and its file name.
    fn plot_path(&self, id: &str) -> (PathBuf, String) {
        let name = format!("{}-{id}.svg", self.bench);
        (self.folder.join(&name), name)
    }

    /// Writes the files. A missed target does not fail the bench: the report shows it, and the machine
    /// causes it as often as the code.
    pub fn finish(mut self) -> ExitCode {
        if !self.bounds.is_empty() {
            self.heading("Targets");
            let rows: Vec<_> = self.bounds.iter().map(Bound::row).collect();
            let header = ["what", "limit", "measured (95 % CI)", ""].map(str::to_owned);
            self.say(&markdown_table(&header, &rows));
        }
        let json = json!({
            "bench": self.bench,
            "effort": format!("{:?}", self.args.effort).to_lowercase(),
            "machine": self.machine.json(),
            "results": self.results,
            "bounds": self.bounds.iter().map(Bound::json).collect::<Vec<_>>(),
            "not_run": self.not_run,
        });
        let bench = self.bench;
        let markdown = format!("## {bench}\n\n{}\n\n{}", self.machine, self.markdown);
        let written = fs::write(self.folder.join(format!("{bench}.md")), markdown)
            .and_then(|()| write_json(&self.folder.join(format!("{bench}.json")), &json))
            .and_then(|()| summarize(&self.folder));
        match written {
            Ok(()) => {
                println!("written to {}", self.folder.display());
                ExitCode::SUCCESS
            }
            Err(error) => {
                eprintln!("{}: {error}", self.folder.display());
                ExitCode::FAILURE
            }
        }
    }
}

impl Bound {
    fn row(&self) -> Vec<String> {
        let met = if self.met { "met" } else { "**missed**" };
        let measured = self.measured.to_string();
        vec![self.what.clone(), self.limit.clone(), measured, met.into()]
    }

    fn json(&self) -> Value {
        json!({
            "what": self.what,
            "limit": self.limit,
            "measured": interval_json(self.measured),
            "met": self.met,
        })
    }
}

pub fn interval_json(interval: Interval) -> Value {
    json!({ "median": interval.median, "low": interval.low, "high": interval.high })
}

fn write_json(path: &Path, json: &Value) -> std::io::Result<()> {
    fs::write(path, format!("{json:#}\n"))
}

/// Writes `summary.md` and `summary.json` from what the benches have written so far.
fn summarize(folder: &Path) -> std::io::Result<()> {
    let mut benches = serde_json::Map::new();
    let mut names: Vec<_> = fs::read_dir(folder)?
        .filter_map(|entry| entry.ok()?.file_name().into_string().ok())
        .filter_map(|name| Some(name.strip_suffix(".json")?.to_owned()))
        .filter(|name| name != "summary")
        .collect();
    names.sort();
    let mut markdown = "# What fuse-backing costs\n\n".to_owned();
    let mut bounds = String::new();
    for name in &names {
        let text = fs::read_to_string(folder.join(format!("{name}.json")))?;
        let Ok(json) = serde_json::from_str::<Value>(&text) else {
            continue;
        };
        for bound in json["bounds"].as_array().into_iter().flatten() {
            let number = |key: &str| bound["measured"][key].as_f64().unwrap_or(f64::NAN);
            let bound = Bound {
                what: format!("{name}: {}", bound["what"].as_str().unwrap_or_default()),
                measured: Interval {
                    low: number("low"),
                    median: number("median"),
                    high: number("high"),
                },
                limit: bound["limit"].as_str().unwrap_or_default().to_owned(),
                met: bound["met"] == true,
            };
            let _ = writeln!(bounds, "| {} |", bound.row().join(" | "));
        }
        benches.insert(name.clone(), json);
    }
    if !bounds.is_empty() {
        markdown.push_str("| what | limit | measured (95 % CI) | |\n|---|---|---|---|\n");
        markdown.push_str(&bounds);
        markdown.push('\n');
    }
    for name in &names {
        markdown.push_str(&fs::read_to_string(folder.join(format!("{name}.md")))?);
        markdown.push('\n');
    }
    fs::write(folder.join("summary.md"), markdown)?;
    write_json(&folder.join("summary.json"), &Value::Object(benches))
}

/// Pads the columns, so that the table is readable in a terminal too.
fn markdown_table(header: &[String], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = std::iter::once(&header[column]).chain(rows.iter().map(|row| &row[column]));
        cells.map(|cell| cell.chars().count()).max().unwrap_or(0)
    };
    let widths: Vec<_> = (0..header.len()).map(width).collect();
    let line = |cells: &[String]| {
        let mut line = String::from("|");
        for (index, (cell, width)) in cells.iter().zip(&widths).enumerate() {
            let pad = " ".repeat(width - cell.chars().count());
            // Names are aligned left, figures right.
            let _ = match index {
                0 => write!(line, " {cell}{pad} |"),
                _ => write!(line, " {pad}{cell} |"),
            };
        }
        line.push('\n');
        line
    };
    let rule = widths.iter().enumerate().map(|(index, width)| match index {
        0 => format!("{:-<width$}--|", ""),
        _ => format!("{:-<width$}-:|", ""),
    });
    let mut table = line(header);
    table.push_str(&format!("|{}\n", rule.collect::<String>()));
    rows.iter().for_each(|row| table.push_str(&line(row)));
    table
}
