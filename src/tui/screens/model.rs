//! Step 1: the model.

use ratatui::buffer::Buffer;
use ratatui::layout::Rect;
use ratatui::text::Line;

use crate::hub::fetch::Repository;
use crate::tui::app::{App, Purpose, Step};
use crate::tui::keymap::Action;
use crate::tui::message::{Fit, Message, ModelEntry, Origin, Request};
use crate::tui::theme::Role;
use crate::tui::widgets::list::List;
use crate::tui::widgets::{Look, take_bottom, take_left, text, window_start};

/// Models to choose from.
#[derive(Default)]
pub struct ModelScreen {
    pub list: List<ModelEntry>,
    /// Models of this machine; results of the hub come after them.
    local: Vec<ModelEntry>,
    hub: Vec<ModelEntry>,
    /// The machine was looked through.
    pub loaded: bool,
    pub searching: bool,
    /// Model of the hub whose configuration was asked for last, and why it could not be had.
    examined: Option<(String, Option<String>)>,
    /// Download under way: id, bytes had, bytes in all.
    pub download: Option<(String, u64, u64)>,
}

fn search_text(entry: &ModelEntry) -> String {
    format!("{} {}", entry.id, entry.family)
}

impl ModelScreen {
    fn rebuild(&mut self) {
        let items = self.local.iter().chain(&self.hub).cloned().collect();
        self.list.set(items, search_text, |entry| (entry.id.clone(), entry.origin));
    }

    pub fn filter(&mut self, text: String) {
        self.list.filter(text, search_text);
    }

    /// Marks a model.
    pub fn select(&mut self, id: &str) {
        self.list.select(|entry| entry.id == id);
    }
}

impl App {
    pub(in crate::tui) fn on_models(&mut self, message: Message) {
        match message {
            Message::Models(models) => {
                self.model.local = models;
                self.model.loaded = true;
                self.model.rebuild();
                let id = self.draft.spec.model.id.clone();
                self.model.select(&id);
            }
            Message::Fits { id, fits } => {
                for entry in self.model.local.iter_mut().chain(self.model.list.items_mut()) {
                    if entry.id == id && entry.origin != Origin::Hub {
                        entry.fits.clone_from(&fits);
                    }
                }
            }
            Message::HubModels(result) => {
                self.model.searching = false;
                match result {
                    Ok(models) => {
                        let plural = if models.len() == 1 { "" } else { "s" };
                        self.tell(format!("{} model{plural} found on the hub", models.len()));
                        self.model.filter(String::new());
                        self.model.hub = models;
                        self.model.rebuild();
                        self.model.list.select(|entry| entry.origin == Origin::Hub);
                        self.examine_marked();
                    }
                    Err(error) => self.complain(error),
                }
            }
            Message::Examined { id, result } => {
                let entries = self.model.hub.iter_mut().chain(self.model.list.items_mut());
                for entry in entries.filter(|entry| entry.id == id && entry.origin == Origin::Hub) {
                    if let Ok(examined) = &result {
                        entry.family.clone_from(&examined.family);
                        entry.parameters = Some(examined.parameters);
                        entry.context = Some(examined.context);
                        entry.fits.clone_from(&examined.fits);
                    }
                }
                if let Err(error) = result {
                    self.model.examined = Some((id, Some(error)));
                }
            }
            Message::Progress { id, done, total, .. } => self.model.download = Some((id, done, total)),
            Message::Downloaded { id, result, .. } => {
                self.model.download = None;
                match result {
                    Ok(_) => {
                        self.tell(format!("{id} is here"));
                        self.ask(Request::ListModels);
                        if self.draft.spec.model.id == id {
                            self.refresh_preview();
                            self.refresh_forecast();
                        }
                    }
                    Err(error) => self.complain(error),
                }
            }
            _ => {}
        }
    }

    pub(in crate::tui) fn act_model(&mut self, action: Action) -> bool {
        match action {
            Action::ChooseModel => {
                let Some(entry) = self.model.list.selected().cloned() else {
                    self.complain("no model marked; o takes a path");
                    return true;
                };
                if let Some(problem) = entry.problem {
                    self.complain(problem);
                } else {
                    if entry.origin == Origin::Hub {
                        self.model.download = Some((entry.id.clone(), 0, entry.bytes.unwrap_or(0)));
                        self.ask(Request::Download(Repository::Model, entry.id.clone()));
                    }
                    self.choose_model(&entry.id);
                    self.go(Step::Data);
                }
            }
            Action::OpenFolder => self.edit(Purpose::ModelFolder, ""),
            Action::SearchHub => self.edit(Purpose::HubSearch, ""),
            Action::RefreshModels => {
                self.model.loaded = false;
                self.ask(Request::ListModels);
            }
            other => {
                let done = self.model.list.act(other);
                self.examine_marked();
                return done;
            }
        }
        true
    }

    /// Asks what the marked model of the hub is, once.
    fn examine_marked(&mut self) {
        let Some(entry) = self.model.list.selected() else { return };
        let asked = self.model.examined.as_ref().is_some_and(|(id, _)| *id == entry.id);
        if entry.origin == Origin::Hub && entry.fits.is_empty() && !asked {
            let id = entry.id.clone();
            self.model.examined = Some((id.clone(), None));
            self.ask(Request::Examine(id));
        }
    }

    /// Writes the model into the run file and asks what follows from it.
    pub(in crate::tui) fn choose_model(&mut self, id: &str) {
        let mut spec = self.draft.spec.clone();
        (spec.model.id, spec.model.revision) = (id.to_owned(), String::new());
        // A default must not be refused: rows are at most as long as the model's context.
        let context = self.model.list.items().iter().find(|entry| entry.id == id).and_then(|entry| entry.context);
        if let Some(context) = context.filter(|&context| spec.data.max_length > context) {
            spec.data.max_length = context;
            self.tell(format!("data.max_length = {context}, the model's context"));
        }
        if self.draft.change(spec) {
            self.model.select(id);
            self.refresh_preview();
            self.refresh_forecast();
        }
    }

    pub(in crate::tui) fn draw_model(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let screen = &self.model;
        let (list_area, detail_area) = if area.width >= 110 {
            take_left(area, area.width * 2 / 3)
        } else {
            take_bottom(area, 7.min(area.height / 3))
        };
        let shown = screen.list.shown().len();
        let title = match screen.list.filter_text() {
            "" => format!("Models {shown}"),
            filter => format!("Models {shown} of {} matching \"{filter}\"", screen.list.items().len()),
        };
        let inner = look.panel(buffer, list_area, &title, true);
        self.draw_model_list(inner, buffer, look);
        if detail_area.height >= 2 {
            let inner = look.panel(buffer, detail_area, "This model", false);
            self.draw_model_detail(inner, buffer, look);
        }
    }

    fn draw_model_list(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let screen = &self.model;
        if screen.list.shown().len() == 0 {
            let text = match (screen.loaded, screen.list.filter_text()) {
                (false, _) => "looking for models",
                (true, "") => "no models here; h searches the hub, o takes a folder",
                _ => "nothing matches",
            };
            look.put(buffer, area, look.line(Role::Dim, text));
            return;
        }
        // Columns go as room does: context and origin first.
        let with_context = area.width >= 96;
        let with_origin = area.width >= 64;
        let with_size = area.width >= 52;
        let fits = 20;
        let fixed = 8
            + fits
            + if with_size { 10 } else { 0 }
            + if with_origin { 10 } else { 0 }
            + if with_context { 8 } else { 0 };
        let name = (area.width as usize).saturating_sub(fixed + 2);
        let mut head = format!("  {}{}", text::pad("", name, ""), text::pad_left("params", 8));
        if with_size {
            head.push_str(&text::pad_left("disk", 10));
        }
        if with_context {
            head.push_str(&text::pad_left("context", 8));
        }
        if with_origin {
            head.push_str(&text::pad("  from", 10, ""));
        }
        head.push_str("    lora qlora  full");
        look.put(buffer, area, look.line(Role::Dim, head));
        let area = Rect { y: area.y + 1, height: area.height.saturating_sub(1), ..area };
        let start = window_start(screen.list.position(), screen.list.shown().len(), area.height as usize);
        for (row, entry) in screen.list.shown().enumerate().skip(start).take(area.height as usize) {
            let marked = row == screen.list.position();
            let chosen = entry.id == self.draft.spec.model.id;
            let sign = if chosen {
                look.glyphs.check
            } else if marked {
                look.glyphs.marker
            } else {
                " "
            };
            let mut line = Line::default();
            let role = if entry.problem.is_some() { Role::Dim } else { Role::Text };
            line.push_span(look.span(Role::Accent, format!("{sign} ")));
            line.push_span(
                look.span(role, text::pad(&text::shorten_start(&entry.id, name, look.glyphs.ellipsis), name, "")),
            );
            let parameters = entry.parameters.map(text::count).unwrap_or_else(|| "-".into());
            line.push_span(look.span(role, text::pad_left(&parameters, 8)));
            if with_size {
                let bytes = entry.bytes.map(text::bytes).unwrap_or_else(|| "-".into());
                line.push_span(look.span(Role::Dim, text::pad_left(&bytes, 10)));
            }
            if with_context {
                let context = entry.context.map(|tokens| tokens.to_string()).unwrap_or_else(|| "-".into());
                line.push_span(look.span(Role::Dim, text::pad_left(&context, 8)));
            }
            if with_origin {
                line.push_span(look.span(Role::Dim, text::pad(&format!("  {}", entry.origin.name()), 10, "")));
            }
            line.push_span(look.span(Role::Text, "  "));
            for (method, width) in [("lora", 6), ("qlora", 6), ("full", 6)] {
                let fit = entry.fits.iter().find(|(name, _)| *name == method).map(|(_, fit)| *fit);
                let (role, word) = fit_word(fit);
                line.push_span(look.span(role, text::pad_left(word, width)));
            }
            let at = Rect { y: area.y + (row - start) as u16, height: 1, ..area };
            look.put(buffer, at, line);
            if marked {
                buffer.set_style(at, look.style(Role::Selection));
            }
        }
    }

    fn draw_model_detail(&self, area: Rect, buffer: &mut Buffer, look: &Look) {
        let screen = &self.model;
        let mut lines: Vec<Line<'static>> = Vec::new();
        if let Some((id, done, total)) = &screen.download {
            let share = if *total > 0 { 100 * done / total } else { 0 };
            let words = format!("downloading {id}: {} of {} ({share}%)", text::bytes(*done), text::bytes(*total));
            lines.push(look.line(Role::Warn, words));
        } else if screen.searching {
            lines.push(look.line(Role::Warn, "searching the hub"));
        }
        if let Some(entry) = screen.list.selected() {
            lines.push(
                look.line(Role::Title, text::shorten_start(&entry.id, area.width as usize, look.glyphs.ellipsis)),
            );
            if let Some(problem) = &entry.problem {
                for line in text::wrap(problem, area.width as usize) {
                    lines.push(look.line(Role::Bad, line));
                }
            }
            let or_dash = |text: Option<String>| text.unwrap_or_else(|| "-".into());
            let license = if entry.license.is_empty() { "not stated".into() } else { entry.license.clone() };
            let mut facts = vec![
                ("family", entry.family.clone()),
                ("parameters", or_dash(entry.parameters.map(text::thousands))),
                ("on disk", or_dash(entry.bytes.map(text::bytes))),
                ("context", or_dash(entry.context.map(|tokens| format!("{} tokens", text::thousands(tokens as u64))))),
                ("license", license),
            ];
            if let Some(downloads) = entry.downloads {
                facts.push(("downloads", text::thousands(downloads)));
            }
            // Beside each other where there is little height.
            let flat = (area.height as usize) < facts.len() + entry.fits.len() + 2;
            if flat {
                let joined: Vec<String> = facts.iter().map(|(name, value)| format!("{name} {value}")).collect();
                for line in text::wrap(&joined.join("   "), area.width as usize) {
                    lines.push(look.line(Role::Text, line));
                }
            } else {
                for (name, value) in facts {
                    lines.push(Line::from(vec![
                        look.span(Role::Dim, text::pad(name, 12, "")),
                        look.span(Role::Text, value),
                    ]));
                }
            }
            let mut beside = Line::default();
            for (method, fit) in &entry.fits {
                let (role, _) = fit_word(Some(*fit));
                if flat {
                    let words = fit_sentence(*fit);
                    if beside.width() + method.len() + words.len() + 1 > area.width as usize {
                        lines.push(std::mem::take(&mut beside));
                    }
                    beside.push_span(look.span(Role::Dim, format!("{method} ")));
                    beside.push_span(look.span(role, format!("{words}   ")));
                } else {
                    lines.push(Line::from(vec![
                        look.span(Role::Dim, text::pad(method, 12, "")),
                        look.span(role, fit_sentence(*fit)),
                    ]));
                }
            }
            if beside.width() > 0 {
                lines.push(beside);
            }
            let refused = screen.examined.as_ref().filter(|(id, _)| *id == entry.id).and_then(|(_, why)| why.as_ref());
            match refused {
                Some(why) if entry.origin == Origin::Hub => {
                    lines.extend(
                        text::wrap(why, area.width as usize).into_iter().map(|line| look.line(Role::Warn, line)),
                    );
                }
                _ if entry.fits.is_empty() && entry.problem.is_none() => {
                    lines.push(look.line(Role::Dim, "working out what fits"));
                }
                _ => {}
            }
        }
        look.put_lines(buffer, area, lines);
    }
}

fn fit_word(fit: Option<Fit>) -> (Role, &'static str) {
    match fit {
        Some(Fit::Fits(_)) => (Role::Good, "fits"),
        Some(Fit::Tight(_)) => (Role::Warn, "tight"),
        Some(Fit::TooLarge(_)) => (Role::Bad, "no"),
        Some(Fit::Unsupported) => (Role::Dim, "-"),
        None => (Role::Dim, "?"),
    }
}

fn fit_sentence(fit: Fit) -> String {
    match fit {
        Fit::Fits(bytes) => format!("fits: {}", text::bytes(bytes)),
        Fit::Tight(bytes) => format!("tight: {}", text::bytes(bytes)),
        Fit::TooLarge(bytes) => format!("does not fit: {}", text::bytes(bytes)),
        Fit::Unsupported => "not on this engine yet".into(),
    }
}
