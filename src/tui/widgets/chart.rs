//! A line chart: braille dots, or plain characters where there are none.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::style::Style;

use super::Look;
use super::text;
use crate::tui::theme::Role;

/// How a series is drawn.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Mark {
    /// Points joined by lines.
    Line,
    /// From lowest to highest at each x.
    Range,
    /// One sign for each point.
    Points,
}

/// One curve.
#[derive(Clone, Debug)]
pub struct Series {
    pub name: &'static str,
    pub role: Role,
    pub mark: Mark,
    /// x, lowest and highest y; the same y twice for a line.
    pub points: Vec<(f64, f64, f64)>,
}

impl Series {
    pub fn line(name: &'static str, role: Role, points: impl IntoIterator<Item = (f64, f64)>) -> Self {
        let points = points.into_iter().map(|(x, y)| (x, y, y)).collect();
        Self { name, role, mark: Mark::Line, points }
    }
}

/// What to draw, and between which bounds.
#[derive(Clone, Debug)]
pub struct Chart {
    pub series: Vec<Series>,
    pub x: (f64, f64),
    /// Logarithmic y axis; values that are not positive are left out.
    pub log: bool,
    /// Writes a y value for the axis.
    pub label: fn(f64) -> String,
    pub x_name: &'static str,
}

/// Dots of a canvas, with a style a cell.
struct Canvas {
    width: usize,
    height: usize,
    /// Eight dots a cell.
    dots: Vec<u8>,
    styles: Vec<Option<Style>>,
    /// A character in place of the dots.
    signs: Vec<Option<&'static str>>,
    braille: bool,
}

impl Canvas {
    fn new(area: Rect, braille: bool) -> Self {
        let cells = area.width as usize * area.height as usize;
        Self {
            width: area.width as usize,
            height: area.height as usize,
            dots: vec![0; cells],
            styles: vec![None; cells],
            signs: vec![None; cells],
            braille,
        }
    }

    /// Dots across and down.
    fn size(&self) -> (i64, i64) {
        if self.braille {
            (self.width as i64 * 2, self.height as i64 * 4)
        } else {
            (self.width as i64, self.height as i64)
        }
    }

    fn set(&mut self, x: i64, y: i64, style: Style, sign: Option<&'static str>) {
        let (width, height) = self.size();
        if !(0..width).contains(&x) || !(0..height).contains(&y) {
            return;
        }
        let (across, down) = if self.braille { (2, 4) } else { (1, 1) };
        let cell = (y / down) as usize * self.width + (x / across) as usize;
        // Unicode's braille dots count down the columns, the lowest row apart.
        const BITS: [[u8; 2]; 4] = [[0x01, 0x08], [0x02, 0x10], [0x04, 0x20], [0x40, 0x80]];
        self.dots[cell] |= if self.braille { BITS[(y % 4) as usize][(x % 2) as usize] } else { 1 };
        self.styles[cell] = Some(style);
        if sign.is_some() {
            self.signs[cell] = sign;
        }
    }

    fn line(&mut self, from: (i64, i64), to: (i64, i64), style: Style, sign: Option<&'static str>) {
        let (across, down) = ((to.0 - from.0).abs(), (to.1 - from.1).abs());
        let steps = across.max(down).max(1);
        for step in 0..=steps {
            let x = from.0 + ((to.0 - from.0) * step + (to.0 - from.0).signum() * steps / 2) / steps;
            let y = from.1 + ((to.1 - from.1) * step + (to.1 - from.1).signum() * steps / 2) / steps;
            self.set(x, y, style, sign);
        }
    }
}

/// Bounds of the y axis around the values, on round numbers so that they seldom move.
pub fn y_bounds(series: &[Series], x: (f64, f64), log: bool) -> Option<(f64, f64)> {
    let mut low = f64::INFINITY;
    let mut high = f64::NEG_INFINITY;
    for &(at, bottom, top) in series.iter().flat_map(|series| &series.points) {
        if at < x.0 || at > x.1 || !bottom.is_finite() || !top.is_finite() || (log && bottom <= 0.0) {
            continue;
        }
        low = low.min(bottom);
        high = high.max(top);
    }
    if low > high {
        return None;
    }
    if log {
        // Halves of a decade at the coarsest, tenths where the values lie close.
        let (low, high) = (low.log10(), high.log10());
        let step = if high - low > 1.0 { 0.5 } else { 0.1 };
        let (bottom, top) = ((low / step).floor() * step, (high / step).ceil() * step);
        return Some((bottom, if top <= bottom { bottom + step } else { top }));
    }
    let step = round_step((high - low).max(high.abs() * 0.02).max(1e-12) / 4.0);
    let (bottom, top) = ((low / step).floor() * step, (high / step).ceil() * step);
    Some((bottom, if top <= bottom { bottom + step } else { top }))
}

/// The next of 1, 2, 5 times a power of ten that is at least `value`.
fn round_step(value: f64) -> f64 {
    let power = 10f64.powf(value.log10().floor());
    [1.0, 2.0, 5.0, 10.0].into_iter().map(|factor| factor * power).find(|step| *step >= value * 0.999).unwrap_or(power)
}

impl Chart {
    /// Columns of the plot itself when the chart is drawn `width` wide.
    pub fn plot_width(width: u16) -> u16 {
        width.saturating_sub(LABELS)
    }

    /// Draws axes and curves.
    pub fn draw(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        if area.width < LABELS + 8 || area.height < 3 {
            return;
        }
        let plot = Rect { x: area.x + LABELS, y: area.y, width: area.width - LABELS, height: area.height - 1 };
        let Some((low, high)) = y_bounds(&self.series, self.x, self.log) else {
            look.put(buffer, Rect { y: area.y + area.height / 2, ..plot }, look.line(Role::Dim, "nothing to draw yet"));
            return;
        };
        let mut canvas = Canvas::new(plot, look.glyphs.braille);
        let (across, down) = canvas.size();
        let span = (self.x.1 - self.x.0).max(1e-12);
        let to_x = |x: f64| (((x - self.x.0) / span) * (across - 1) as f64).round() as i64;
        let to_y = |y: f64| {
            let y = if self.log { y.log10() } else { y };
            (((high - y) / (high - low)) * (down - 1) as f64).round() as i64
        };
        for series in &self.series {
            self.draw_series(series, &mut canvas, look, &to_x, &to_y);
        }
        for row in 0..plot.height {
            for column in 0..plot.width {
                let cell = row as usize * canvas.width + column as usize;
                let Some(style) = canvas.styles[cell] else { continue };
                let target = &mut buffer[(plot.x + column, plot.y + row)];
                target.set_style(style);
                match canvas.signs[cell] {
                    Some(sign) => target.set_symbol(sign),
                    None => target.set_char(char::from_u32(0x2800 + u32::from(canvas.dots[cell])).unwrap_or('*')),
                };
            }
        }
        self.draw_axes(area, plot, (low, high), buffer, look);
    }

    fn draw_series(
        &self,
        series: &Series,
        canvas: &mut Canvas,
        look: &Look,
        to_x: &dyn Fn(f64) -> i64,
        to_y: &dyn Fn(f64) -> i64,
    ) {
        let style = look.style(series.role);
        let plain = |sign| (!look.glyphs.braille).then_some(sign);
        let mut last: Option<(i64, i64)> = None;
        for &(x, low, high) in &series.points {
            if x < self.x.0 || x > self.x.1 {
                continue;
            }
            if !low.is_finite() || !high.is_finite() || (self.log && low <= 0.0) {
                last = None;
                continue;
            }
            let (at, bottom, top) = (to_x(x), to_y(low), to_y(high));
            match series.mark {
                Mark::Line => {
                    let to = (at, top);
                    canvas.line(last.unwrap_or(to), to, style, plain("*"));
                    last = Some(to);
                }
                Mark::Range => canvas.line((at, bottom), (at, top), style, plain(".")),
                Mark::Points => canvas.set(at, top, style, Some(look.glyphs.point)),
            }
        }
    }

    fn draw_axes(&self, area: Rect, plot: Rect, (low, high): (f64, f64), buffer: &mut Buffer, look: &Look) {
        let rows = plot.height as usize;
        for (row, value) in ticks(low, high, rows, self.log) {
            let label = text::pad_left(&(self.label)(value), LABELS as usize - 1);
            let at = Rect { x: area.x, y: plot.y + row as u16, width: LABELS - 1, height: 1 };
            look.put(buffer, at, look.line(Role::Dim, label));
        }
        for row in 0..plot.height {
            let cell = &mut buffer[(plot.x - 1, plot.y + row)];
            cell.set_symbol(look.glyphs.vertical).set_style(look.style(Role::ChartGrid));
        }
        let foot = Rect { y: plot.bottom(), height: 1, ..plot };
        let (first, last) = (text::count(self.x.0.max(0.0) as u64), text::count(self.x.1 as u64));
        look.put(buffer, foot, look.line(Role::Dim, format!("{first} {}", self.x_name)));
        let width = last.len() as u16;
        if foot.width > width {
            look.put(buffer, Rect { x: foot.right() - width, width, ..foot }, look.line(Role::Dim, &*last));
        }
        let mut x = foot.x + first.len() as u16 + self.x_name.len() as u16 + 4;
        for series in self.series.iter().filter(|series| !series.name.is_empty()) {
            let sign = match series.mark {
                Mark::Points => look.glyphs.point,
                Mark::Line if look.glyphs.braille => look.glyphs.horizontal,
                Mark::Line => "*",
                Mark::Range if look.glyphs.braille => "⣿",
                Mark::Range => ".",
            };
            let label = look.span(series.role, format!("{sign} {}", series.name));
            let width = label.width() as u16;
            if x + width + last.len() as u16 + 2 > foot.right() {
                break;
            }
            look.put(buffer, Rect { x, width, ..foot }, label);
            x += width + 2;
        }
    }
}

/// Rows with a label, and its value: round values, at least three rows apart.
fn ticks(low: f64, high: f64, rows: usize, log: bool) -> Vec<(usize, f64)> {
    let most = (rows / 3).clamp(1, 6) as f64;
    let step = round_step(((high - low) / most).max(1e-12));
    let row_of = |value: f64| ((high - value) / (high - low) * (rows - 1) as f64).round() as usize;
    let mut labels: Vec<(usize, f64)> = Vec::new();
    let mut value = (low / step).ceil() * step;
    while value <= high + step * 1e-6 && labels.len() < rows {
        // Steps of a tenth add up to a little more or less.
        let exact = (value / step).round() * step;
        labels.push((row_of(exact).min(rows - 1), if log { 10f64.powf(exact) } else { exact }));
        value += step;
    }
    labels
}

/// Columns of the y axis, its line included.
const LABELS: u16 = 8;

/// A curve in a single row, for tables.
pub fn sparkline(values: &[f64], width: usize, levels: &[&'static str]) -> String {
    let finite: Vec<f64> = values.iter().copied().filter(|value| value.is_finite()).collect();
    if finite.is_empty() || width == 0 || levels.is_empty() {
        return String::new();
    }
    let low = finite.iter().copied().fold(f64::INFINITY, f64::min);
    let high = finite.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let columns = width.min(finite.len());
    (0..columns)
        .map(|column| {
            let part = &finite[column * finite.len() / columns..((column + 1) * finite.len() / columns).max(1)];
            let mean = part.iter().sum::<f64>() / part.len().max(1) as f64;
            let share = if high > low { (mean - low) / (high - low) } else { 0.0 };
            levels[((share * (levels.len() - 1) as f64).round() as usize).min(levels.len() - 1)]
        })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bounds_are_round_and_hold_the_values() {
        let series = vec![Series::line("", Role::Text, [(0.0, 0.53), (1.0, 2.31)])];
        let (low, high) = y_bounds(&series, (0.0, 1.0), false).unwrap();
        assert!(low <= 0.53 && high >= 2.31);
        assert_eq!((low * 2.0).fract(), 0.0);
        assert_eq!(y_bounds(&[], (0.0, 1.0), false), None);
        let flat = vec![Series::line("", Role::Text, [(0.0, 1.0), (1.0, 1.0)])];
        let (low, high) = y_bounds(&flat, (0.0, 1.0), false).unwrap();
        assert!(low < high);
        let broken = vec![Series::line("", Role::Text, [(0.0, f64::NAN), (1.0, f64::INFINITY)])];
        assert_eq!(y_bounds(&broken, (0.0, 1.0), false), None);
    }

    #[test]
    fn a_sparkline_falls_with_its_values() {
        let levels = crate::tui::glyphs::UNICODE.levels;
        assert_eq!(sparkline(&[8.0, 4.0, 1.0], 3, levels), "█▄▁");
        assert_eq!(sparkline(&[1.0; 100], 4, levels), "▁▁▁▁");
        assert_eq!(sparkline(&[], 4, levels), "");
    }
}
