//! Step 2: the data.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::{Line, Span};

use crate::hub::fetch::Repository;
use crate::spec::{DataSource, TrainData, keys};
use crate::tui::app::{App, Purpose, Step};
use crate::tui::keymap::Action;
use crate::tui::message::{FileEntry, Message, PieceKind, Preview, Request, RowView};
use crate::tui::theme::Role;
use crate::tui::widgets::list::List;
use crate::tui::widgets::{Look, histogram, take_bottom, take_left, take_top, text, window_start};

/// Roles that a column may be given.
const ROLES: [&str; 7] = ["prompt", "input", "response", "system", "messages", "text", "tools"];

/// Files to choose from, and the row being looked at.
#[derive(Default)]
pub struct DataScreen {
    pub files: List<FileEntry>,
    /// Of this machine; results of the hub come after them.
    local: Vec<FileEntry>,
    hub: Vec<FileEntry>,
    pub loaded: bool,
    pub searching: bool,
    /// Download under way: id, bytes had, bytes in all.
    pub download: Option<(String, u64, u64)>,
    pub row: usize,
    pub scroll: u16,
}

impl DataScreen {
    pub fn set_files(&mut self, files: Vec<FileEntry>) {
        self.loaded = true;
        self.local = files;
        self.rebuild();
    }

    fn rebuild(&mut self) {
        let hub = self.hub.iter().filter(|found| !self.local.iter().any(|file| file.path == found.path));
        let items = self.local.iter().chain(hub).cloned().collect();
        self.files.set(items, |file| file.path.clone(), |file| file.path.clone());
    }

    pub fn filter(&mut self, text: String) {
        self.files.filter(text, |file| file.path.clone());
    }
}

impl App {
    /// Asks what the data is like.
    pub(in crate::tui) fn refresh_preview(&mut self) {
        if self.draft.data_name().is_empty() || self.draft.spec.model.id.is_empty() {
            (self.draft.preview, self.draft.lengths, self.draft.previewing) = (None, None, false);
            return;
        }
        self.draft.preview_generation += 1;
        self.draft.previewing = true;
        let request =
            Request::Preview { generation: self.draft.preview_generation, spec: Box::new(self.draft.spec.clone()) };
        self.ask(request);
    }

    pub(in crate::tui) fn on_preview(&mut self, generation: u64, result: Result<Box<Preview>, String>) {
        if generation != self.draft.preview_generation {
            return;
        }
        self.draft.previewing = false;
        self.draft.lengths = result.as_ref().ok().map(|preview| std::sync::Arc::new(preview.lengths.clone()));
        self.draft.preview = Some(result);
        self.data.row = 0;
        self.data.scroll = 0;
        self.draft.judge();
        self.refresh_forecast();
    }

    pub(in crate::tui) fn on_datasets(&mut self, message: Message) {
        match message {
            Message::HubDatasets(result) => {
                self.data.searching = false;
                match result {
                    Ok(found) => {
                        let plural = if found.len() == 1 { "" } else { "s" };
                        self.tell(format!("{} dataset{plural} found on the hub", found.len()));
                        self.data.filter(String::new());
                        self.data.hub = found;
                        self.data.rebuild();
                        self.data.files.select(|file| file.downloads.is_some());
                    }
                    Err(error) => self.complain(error),
                }
            }
            Message::Progress { id, done, total, .. } => self.data.download = Some((id, done, total)),
            Message::Downloaded { id, result, .. } => {
                self.data.download = None;
                match result {
                    Ok(_) => {
                        self.tell(format!("{id} is here"));
                        self.ask(Request::ListFiles);
                        if self.draft.data_name() == id {
                            self.refresh_preview();
                        }
                    }
                    Err(error) => self.complain(error),
                }
            }
            _ => {}
        }
    }

    pub(in crate::tui) fn act_data(&mut self, action: Action) -> bool {
        let rows = match &self.draft.preview {
            Some(Ok(preview)) => preview.samples.len(),
            _ => 0,
        };
        match action {
            Action::ChooseData => match self.data.files.selected().cloned() {
                Some(file) if file.path == self.draft.data_name() && file.downloads.is_none() => self.go(Step::Tune),
                Some(file) => {
                    if file.downloads.is_some() {
                        self.data.download = Some((file.path.clone(), 0, 0));
                        self.ask(Request::Download(Repository::Dataset, file.path.clone()));
                    }
                    self.choose_data(&file.path);
                }
                None => self.complain("no file marked; o takes a path or a hub dataset"),
            },
            Action::SearchData => self.edit(Purpose::HubSearch, ""),
            Action::OpenData => {
                let now = self.draft.data_name();
                self.edit(Purpose::DataPath, &now);
            }
            Action::NextRow => self.data.row = (self.data.row + 1).min(rows.saturating_sub(1)),
            Action::PreviousRow => self.data.row = self.data.row.saturating_sub(1),
            Action::ScrollDown => self.data.scroll = (self.data.scroll + 3).min(2000),
            Action::ScrollUp => self.data.scroll = self.data.scroll.saturating_sub(3),
            Action::MapColumns => {
                let suggestion = match &self.draft.preview {
                    Some(Ok(preview)) => preview.unmapped.first().map(|column| format!("prompt={column}")),
                    _ => None,
                };
                self.edit(Purpose::MapColumns, &suggestion.unwrap_or_default());
            }
            Action::NextFormat => {
                let now = self.draft.spec.data.format.as_str();
                let at = keys::FORMATS.iter().position(|format| *format == now).unwrap_or(0);
                let next = keys::FORMATS[(at + 1) % keys::FORMATS.len()];
                let mut spec = self.draft.spec.clone();
                spec.data.format = next.into();
                self.draft.change(spec);
                self.tell(format!("data.format = \"{next}\""));
                self.refresh_preview();
            }
            other => return self.data.files.act(other),
        }
        if matches!(action, Action::NextRow | Action::PreviousRow) {
            self.data.scroll = 0;
        }
        true
    }

    /// Writes the data into the run file and asks what it is like.
    pub(in crate::tui) fn choose_data(&mut self, path: &str) {
        let mut spec = self.draft.spec.clone();
        spec.data.train = TrainData::Path(path.to_owned());
        spec.data.format = "auto".into();
        self.draft.change(spec);
        self.data.files.select(|file| file.path == path);
        if self.draft.spec.model.id.is_empty() {
            self.complain("choose a model first: the rows are shown as that model sees them");
        }
        self.refresh_preview();
    }

    /// `role=column`; an empty column takes the role away.
    pub(in crate::tui) fn map_column(&mut self, line: &str) -> Result<(), String> {
        if line.is_empty() {
            return Ok(());
        }
        let (role, column) = line.split_once('=').ok_or("write role=column, such as prompt=question")?;
        let (role, column) = (role.trim(), column.trim());
        if !ROLES.contains(&role) {
            return Err(format!("no role \"{role}\"; there are {}", ROLES.join(", ")));
        }
        let mut spec = self.draft.spec.clone();
        if let TrainData::Path(path) = &spec.data.train {
            spec.data.train = TrainData::Sources(vec![DataSource { path: path.clone(), ..DataSource::default() }]);
        }
        if let TrainData::Sources(sources) = &mut spec.data.train {
            for source in sources {
                match column {
                    "" => source.columns.remove(role),
                    column => source.columns.insert(role.to_owned(), column.to_owned()),
                };
            }
        }
        self.draft.change(spec);
        self.refresh_preview();
        Ok(())
    }

    pub(in crate::tui) fn draw_data(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let (files, rest) = if area.width >= 70 {
            take_left(area, (area.width * 3 / 10).clamp(24, 48))
        } else {
            take_top(area, (area.height / 3).clamp(3, 8))
        };
        self.draw_files(files, buffer, look);
        match &self.draft.preview {
            Some(Ok(preview)) => self.draw_preview(preview, rest, buffer, look),
            other => {
                let inner = look.panel(buffer, rest, "Rows", false);
                let lines = match other {
                    _ if self.data.download.is_some() => self.download_lines(inner.width as usize, look),
                    _ if self.draft.previewing => vec![look.line(Role::Dim, "reading the data")],
                    Some(Err(error)) => text::wrap(error, inner.width as usize)
                        .into_iter()
                        .map(|line| look.line(Role::Bad, line))
                        .collect(),
                    _ if self.draft.data_name().is_empty() => {
                        let hint = "choose a file at the left, or press o for a path or a hub dataset";
                        text::wrap(hint, inner.width as usize)
                            .into_iter()
                            .map(|line| look.line(Role::Dim, line))
                            .collect()
                    }
                    _ => vec![look.line(Role::Dim, "choose a model first (1)")],
                };
                look.put_lines(buffer, inner, lines);
            }
        }
    }

    fn download_lines(&self, width: usize, look: &Look) -> Vec<Line<'static>> {
        let Some((id, done, total)) = &self.data.download else { return Vec::new() };
        let words = match total {
            0 => format!("asking the hub for {id}"),
            _ => {
                let share = 100 * done / total;
                format!("downloading {id}: {} of {} ({share}%)", text::bytes(*done), text::bytes(*total))
            }
        };
        text::wrap(&words, width).into_iter().map(|line| look.line(Role::Warn, line)).collect()
    }

    fn draw_files(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let list = &self.data.files;
        let title = match list.filter_text() {
            "" if self.data.searching => "Files (searching the hub)".to_owned(),
            "" => "Files".to_owned(),
            filter => format!("Files matching \"{filter}\""),
        };
        let inner = look.panel(buffer, area, &title, true);
        if list.shown().len() == 0 {
            let text = if self.data.loaded { "none here; o takes a path" } else { "looking for files" };
            look.put(buffer, inner, look.line(Role::Dim, text));
            return;
        }
        let now = self.draft.data_name();
        let start = window_start(list.position(), list.shown().len(), inner.height as usize);
        for (row, file) in list.shown().enumerate().skip(start).take(inner.height as usize) {
            let sign = if file.path == now { look.glyphs.check } else { " " };
            let bytes = match file.downloads {
                Some(downloads) => format!("hub {}", text::count(downloads)),
                None if file.bytes > 0 => text::bytes(file.bytes),
                None => String::new(),
            };
            let name = (inner.width as usize).saturating_sub(bytes.len() + 3);
            let path = text::shorten_start(&file.path, name, look.glyphs.ellipsis);
            let line = Line::from(vec![
                look.span(Role::Accent, format!("{sign} ")),
                look.span(Role::Text, text::pad(&path, name, "")),
                look.span(Role::Dim, format!(" {bytes}")),
            ]);
            let at = Rect { y: inner.y + (row - start) as u16, height: 1, ..inner };
            look.put(buffer, at, line);
            if row == list.position() {
                buffer.set_style(at, look.style(Role::Selection));
            }
        }
    }

    fn draw_preview(&self, preview: &Preview, area: Rect, buffer: &mut Buffer, look: &Look) {
        let (facts_area, rest) = take_top(area, 6.min(area.height / 2));
        let title = if self.draft.previewing { "Data (reading again)" } else { "Data" };
        let inner = look.panel(buffer, facts_area, title, false);
        look.put_lines(buffer, inner, self.data_facts(preview, inner.width as usize, look));
        let tall = rest.height >= 16;
        let (row_area, length_area) = take_bottom(rest, if tall { (rest.height / 4).clamp(5, 10) } else { 0 });
        if tall {
            let limit = self.draft.spec.data.max_length;
            let cut = preview.lengths.iter().filter(|&&length| length > limit).count();
            let what = match self.draft.spec.data.too_long {
                crate::spec::TooLong::Truncate => "cut",
                crate::spec::TooLong::Drop => "dropped",
                crate::spec::TooLong::Error => "refused",
            };
            let title = format!("Lengths: {cut} of {} rows over {limit} are {what}", preview.lengths.len());
            let inner = look.panel(buffer, length_area, &title, false);
            histogram::draw(&preview.lengths, limit, inner, buffer, look);
        }
        let Some(row) = preview.samples.get(self.data.row) else { return };
        let title = format!(
            "Row {} of {}: {} tokens, {} trained",
            self.data.row + 1,
            preview.samples.len(),
            row.tokens,
            row.trained
        );
        let inner = look.panel(buffer, row_area, &title, false);
        let lines = row_lines(row, inner.width as usize, look);
        let most = lines.len().saturating_sub(inner.height as usize);
        look.put_lines(buffer, inner, lines.into_iter().skip((self.data.scroll as usize).min(most)));
    }

    fn data_facts(&self, preview: &Preview, width: usize, look: &Look) -> Vec<Line<'static>> {
        let fact = |name: &str, role: Role, value: String| {
            vec![look.span(Role::Dim, format!("{name} ")), look.span(role, value)]
        };
        let mut groups = vec![
            fact("format", Role::Accent, preview.format.clone()),
            fact("rows", Role::Text, text::thousands(preview.rows as u64)),
            fact("held out", Role::Text, text::thousands(preview.eval_rows as u64)),
            fact("trained tokens", Role::Text, text::count(preview.label_tokens as u64)),
        ];
        for (column, role) in &preview.columns {
            groups.push(match role {
                Some(role) => fact(role, Role::Text, format!("= {column}")),
                None => vec![look.span(Role::Warn, format!("({column} unused)"))],
            });
        }
        let counts = [
            ("dropped", preview.dropped),
            ("empty", preview.empty),
            ("duplicates", preview.duplicates),
            ("in both splits", preview.shared),
            ("cut", preview.cut),
        ];
        for (name, count) in counts {
            groups.push(fact(name, if count > 0 { Role::Warn } else { Role::Dim }, count.to_string()));
        }
        let mut lines = text::arrange(groups, width);
        for lint in &preview.lint {
            for line in text::wrap(&format!("{} {lint}", look.glyphs.warning), width) {
                lines.push(look.line(Role::Warn, line));
            }
        }
        if preview.lint.is_empty() {
            lines.push(look.line(Role::Good, format!("{} no lint", look.glyphs.check)));
        }
        lines
    }
}

/// The row's tokens, each in its role; ends of lines are shown and kept.
fn row_lines(row: &RowView, width: usize, look: &Look) -> Vec<Line<'static>> {
    let spans = row.pieces.iter().map(|piece| {
        let style = match piece.kind {
            PieceKind::Trained => look.style(Role::TokenTrained),
            PieceKind::Masked => look.style(Role::TokenMasked),
            PieceKind::Special => look.style(Role::TokenSpecial),
            PieceKind::TrainedSpecial => look.style(Role::TokenSpecial).patch(look.style(Role::TokenTrained)),
        };
        let text = look.glyphs.plain(&piece.text.replace('\t', "    ").replace('\r', ""));
        Span::styled(text.replace('\n', &format!("{}\n", look.glyphs.newline)), style)
    });
    text::flow(spans, width)
}
