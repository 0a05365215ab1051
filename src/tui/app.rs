//! The state of the workbench: what is on screen, and how keys and messages change it.
//!
//! No input or output happens here: work is asked for through [`App::take_requests`], and drawing takes `&self`.

use crossterm::event::{KeyEvent, KeyEventKind};

use super::draft::Draft;
use super::glyphs::Glyphs;
use super::keymap::{Action, Key, Keymap, Layer};
use super::message::{Message, Request};
use super::screens::compare::CompareView;
use super::screens::data::DataScreen;
use super::screens::model::ModelScreen;
use super::screens::result::ResultScreen;
use super::screens::runs::RunsScreen;
use super::screens::train::TrainScreen;
use super::screens::tune::TuneScreen;
use super::theme::{BUILT_IN, Colors, Theme};
use super::widgets::input::Input;
use super::widgets::list::fuzzy;
use crate::hub::fetch::Repository;

/// The steps in their order, and the runs beside them.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    Model,
    Data,
    Tune,
    Train,
    Result,
    Runs,
}

impl Step {
    pub const ALL: [Step; 6] = [Step::Model, Step::Data, Step::Tune, Step::Train, Step::Result, Step::Runs];

    pub fn name(self) -> &'static str {
        match self {
            Step::Model => "Model",
            Step::Data => "Data",
            Step::Tune => "Tune",
            Step::Train => "Train",
            Step::Result => "Result",
            Step::Runs => "Runs",
        }
    }

    fn layer(self) -> Layer {
        match self {
            Step::Model => Layer::Model,
            Step::Data => Layer::Data,
            Step::Tune => Layer::Tune,
            Step::Train => Layer::Train,
            Step::Result => Layer::Result,
            Step::Runs => Layer::Runs,
        }
    }
}

/// Something over the screen.
#[derive(Clone, Debug)]
pub enum Overlay {
    Help { scroll: u16, layers: Vec<Layer> },
    Palette { input: Input, selected: usize },
    Confirm { question: String, request: Request },
    RunFile { scroll: u16 },
    Compare(Box<CompareView>),
    Chat,
}

/// What a line that is being typed is for.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Purpose {
    Filter,
    HubSearch,
    ModelFolder,
    DataPath,
    MapColumns,
    /// The value of the marked hyperparameter.
    Field,
    LearningRate,
    ExportTo,
    SaveAs,
    LoadFrom,
}

impl Purpose {
    pub fn label(self) -> &'static str {
        match self {
            Purpose::Filter => "filter: ",
            Purpose::HubSearch => "search the hub: ",
            Purpose::ModelFolder => "model folder or hub id: ",
            Purpose::DataPath => "data file or hub id: ",
            Purpose::MapColumns => "role=column: ",
            Purpose::Field => "",
            Purpose::LearningRate => "learning rate: ",
            Purpose::ExportTo => "export to folder: ",
            Purpose::SaveAs => "save run file as: ",
            Purpose::LoadFrom => "load run file: ",
        }
    }
}

/// A line that is being typed.
#[derive(Clone, Debug)]
pub struct Editing {
    pub purpose: Purpose,
    pub input: Input,
    /// What is wrong with the text as it stands.
    pub problem: Option<String>,
}

/// A word to the user, until the next key.
#[derive(Clone, Debug, PartialEq)]
pub struct Notice {
    pub wrong: bool,
    pub text: String,
}

/// How the workbench starts.
pub struct Settings {
    pub theme: Theme,
    pub colors: Colors,
    pub glyphs: Glyphs,
    pub keymap: Keymap,
}

/// The workbench.
pub struct App {
    pub step: Step,
    pub overlays: Vec<Overlay>,
    pub editing: Option<Editing>,
    pub notice: Option<Notice>,
    pub theme: Theme,
    pub colors: Colors,
    pub glyphs: Glyphs,
    pub keymap: Keymap,
    pub draft: Draft,
    pub model: ModelScreen,
    pub data: DataScreen,
    pub tune: TuneScreen,
    pub train: TrainScreen,
    pub result: ResultScreen,
    pub runs: RunsScreen,
    pub(super) requests: Vec<Request>,
    pub quit: bool,
    /// Something changed since the last frame.
    dirty: bool,
    /// And the user waits to see it.
    urgent: bool,
}

impl App {
    pub fn new(settings: Settings) -> Self {
        let mut app = Self {
            step: Step::Model,
            overlays: Vec::new(),
            editing: None,
            notice: None,
            theme: settings.theme,
            colors: settings.colors,
            glyphs: settings.glyphs,
            keymap: settings.keymap,
            draft: Draft::default(),
            model: ModelScreen::default(),
            data: DataScreen::default(),
            tune: TuneScreen::default(),
            train: TrainScreen::default(),
            result: ResultScreen::default(),
            runs: RunsScreen::default(),
            requests: Vec::new(),
            quit: false,
            dirty: true,
            urgent: true,
        };
        app.ask(Request::ListModels);
        app.ask(Request::ListFiles);
        app.ask(Request::ListRuns);
        app
    }

    /// Work asked for since the last call.
    pub fn take_requests(&mut self) -> Vec<Request> {
        std::mem::take(&mut self.requests)
    }

    /// Whether a frame is due; asked once a frame.
    pub fn take_dirty(&mut self) -> bool {
        std::mem::take(&mut self.dirty)
    }

    /// Whether a frame is due at once: a key was pressed, or an answer to one came.
    pub fn take_urgent(&mut self) -> bool {
        std::mem::take(&mut self.urgent)
    }

    pub(super) fn ask(&mut self, request: Request) {
        self.requests.push(request);
    }

    pub(super) fn tell(&mut self, text: impl Into<String>) {
        self.notice = Some(Notice { wrong: false, text: text.into() });
    }

    pub(super) fn complain(&mut self, text: impl Into<String>) {
        self.notice = Some(Notice { wrong: true, text: text.into() });
    }

    /// The layers that keys go through, top first.
    pub fn layers(&self) -> Vec<Layer> {
        if self.editing.is_some() {
            return vec![Layer::Text];
        }
        match self.overlays.last() {
            Some(Overlay::Help { .. }) => vec![Layer::Help],
            Some(Overlay::Palette { .. }) => vec![Layer::Palette, Layer::Text],
            Some(Overlay::Confirm { .. }) => vec![Layer::Confirm],
            Some(Overlay::RunFile { .. }) => vec![Layer::RunFile],
            Some(Overlay::Compare(_)) => vec![Layer::Compare],
            Some(Overlay::Chat) => vec![Layer::Chat, Layer::Text],
            None => self.screen_layers(),
        }
    }

    fn screen_layers(&self) -> Vec<Layer> {
        let list = matches!(self.step, Step::Model | Step::Data | Step::Tune | Step::Runs);
        let mut layers = vec![self.step.layer()];
        layers.extend(list.then_some(Layer::List));
        layers.push(Layer::Global);
        layers
    }

    /// Takes a message. Whatever it was, a frame may be due.
    pub fn handle(&mut self, message: Message) {
        self.dirty = true;
        // What comes by itself waits for the next calm frame.
        self.urgent |= !matches!(
            message,
            Message::Events { .. }
                | Message::Machine(_)
                | Message::Fits { .. }
                | Message::Progress { .. }
                | Message::ChatPiece { .. }
                | Message::Runs(_)
        );
        match message {
            Message::Key(event) => self.key(&event),
            Message::Paste(text) => {
                if let Some(input) = self.typing() {
                    input.paste(&text);
                    self.typed();
                }
            }
            Message::Resize(..) => {}
            Message::Terminate => self.quit = true,
            Message::Done(text) => self.tell(text),
            Message::Wrong(text) => self.complain(text),
            Message::Models(..)
            | Message::Fits { .. }
            | Message::HubModels(..)
            | Message::Examined { .. }
            | Message::Progress { repository: Repository::Model, .. }
            | Message::Downloaded { repository: Repository::Model, .. } => self.on_models(message),
            Message::HubDatasets(..) | Message::Progress { .. } | Message::Downloaded { .. } => {
                self.on_datasets(message)
            }
            Message::Files(files) => self.data.set_files(files),
            Message::Preview { generation, result } => self.on_preview(generation, result),
            Message::Forecast { generation, result } => self.on_forecast(generation, result),
            Message::Loaded { path, spec } => self.on_loaded(path, *spec),
            Message::Runs(runs) => self.runs.set(runs),
            Message::Compared(comparison) => {
                self.overlays.push(Overlay::Compare(Box::new(CompareView::new(*comparison))));
            }
            Message::History { .. } | Message::Events { .. } | Message::Died { .. } | Message::Started(_) => {
                self.on_run(message);
            }
            Message::Machine(sample) => self.dirty = self.train.set_machine(*sample) && self.step == Step::Train,
            Message::ChatPiece { side, text } => self.result.chat.piece(side, &text),
            Message::ChatEnd { side, error } => self.result.chat.end(side, error),
        }
    }

    fn key(&mut self, event: &KeyEvent) {
        // Terminals that report releases would otherwise type everything twice.
        if event.kind == KeyEventKind::Release {
            return;
        }
        self.notice = None;
        let key = Key::from_event(event);
        let layers = self.layers();
        if let Some(action) = self.keymap.action(&layers, key) {
            self.act(action);
        } else if let (Some(character), true) = (key.character(), layers.iter().any(|layer| layer.takes_text()))
            && let Some(input) = self.typing()
        {
            input.insert(character);
            self.typed();
        }
    }

    /// The line that has the keyboard.
    fn typing(&mut self) -> Option<&mut Input> {
        if let Some(editing) = &mut self.editing {
            return Some(&mut editing.input);
        }
        match self.overlays.last_mut() {
            Some(Overlay::Palette { input, .. }) => Some(input),
            Some(Overlay::Chat) => Some(&mut self.result.chat.input),
            _ => None,
        }
    }

    /// Carries out a command. Public so that tests and the palette can.
    pub fn act(&mut self, action: Action) {
        if let Some(input) = self.typing()
            && input.act(action)
        {
            self.typed();
            return;
        }
        let done = self.act_overlay(action) || self.act_global(action) || self.act_screen(action);
        debug_assert!(done, "{action:?} is bound and does nothing here");
    }

    fn act_screen(&mut self, action: Action) -> bool {
        if action == Action::Filter {
            let text = match self.step {
                Step::Model => self.model.list.filter_text(),
                Step::Data => self.data.files.filter_text(),
                Step::Runs => self.runs.list.filter_text(),
                _ => self.tune.filter.as_str(),
            };
            let text = text.to_owned();
            self.edit(Purpose::Filter, &text);
            return true;
        }
        match self.step {
            Step::Model => self.act_model(action),
            Step::Data => self.act_data(action),
            Step::Tune => self.act_tune(action),
            Step::Train => self.act_train(action),
            Step::Result => self.act_result(action),
            Step::Runs => self.act_runs(action),
        }
    }

    fn act_global(&mut self, action: Action) -> bool {
        let to = |offset: isize| {
            let at = (self.step as isize + offset).rem_euclid(Step::ALL.len() as isize);
            Step::ALL[at as usize]
        };
        match action {
            Action::Quit => self.quit = true,
            Action::Help => {
                let layers = self.screen_layers();
                self.overlays.push(Overlay::Help { scroll: 0, layers });
            }
            Action::Palette => self.overlays.push(Overlay::Palette { input: Input::default(), selected: 0 }),
            Action::NextStep => self.go(to(1)),
            Action::PreviousStep => self.go(to(-1)),
            Action::GoModel => self.go(Step::Model),
            Action::GoData => self.go(Step::Data),
            Action::GoTune => self.go(Step::Tune),
            Action::GoTrain => self.go(Step::Train),
            Action::GoResult => self.go(Step::Result),
            Action::GoRuns => self.go(Step::Runs),
            Action::RunFile => self.overlays.push(Overlay::RunFile { scroll: 0 }),
            Action::NextTheme => {
                let at = BUILT_IN.iter().position(|(name, _)| *name == self.theme.name).unwrap_or(0);
                self.set_theme(BUILT_IN[(at + 1) % BUILT_IN.len()].0);
            }
            Action::Redraw => self.ask(Request::Redraw),
            Action::Suspend => self.ask(Request::Suspend),
            _ => return false,
        }
        true
    }

    fn set_theme(&mut self, name: &str) {
        match Theme::built_in(name, self.colors) {
            Ok(theme) => {
                self.theme = theme.named(name);
                let told =
                    if self.theme.monochrome && name != "monochrome" { " (without colour: NO_COLOR)" } else { "" };
                self.tell(format!("theme {name}{told}"));
            }
            Err(error) => self.complain(error.to_string()),
        }
    }

    /// To a step. The monitor runs only where its figures are seen.
    pub fn go(&mut self, step: Step) {
        if (step == Step::Train) != (self.step == Step::Train) {
            self.ask(Request::Monitor(step == Step::Train));
        }
        if step == Step::Runs && self.step != Step::Runs {
            self.ask(Request::ListRuns);
        }
        self.step = step;
    }

    fn act_overlay(&mut self, action: Action) -> bool {
        match action {
            Action::Accept => self.accept(),
            Action::Cancel => self.cancel(),
            Action::CloseHelp | Action::ClosePalette | Action::No | Action::CloseFile | Action::CloseCompare => {
                self.overlays.pop();
            }
            Action::HelpUp => self.scroll(-1),
            Action::HelpDown => self.scroll(1),
            Action::FileUp => self.scroll(-1),
            Action::FileDown | Action::CompareScroll => self.scroll(1),
            Action::PaletteUp => self.palette_move(-1),
            Action::PaletteDown => self.palette_move(1),
            Action::RunCommand => self.run_command(),
            Action::Yes => {
                if let Some(Overlay::Confirm { request, .. }) = self.overlays.pop() {
                    self.ask(request);
                }
            }
            Action::SaveFile => {
                let path = self.draft.path.clone().unwrap_or_else(|| "RUN.toml".into());
                self.edit(Purpose::SaveAs, &path.display().to_string());
            }
            Action::LoadFile => self.edit(Purpose::LoadFrom, ""),
            Action::CopyFile => {
                self.ask(Request::Copy(self.draft.spec.commented()));
                self.tell("run file copied to the clipboard (OSC 52)");
            }
            Action::CopyCommand => {
                self.ask(Request::Copy(self.draft.command_line()));
                self.tell("command copied to the clipboard (OSC 52)");
            }
            Action::CompareLog => {
                if let Some(Overlay::Compare(view)) = self.overlays.last_mut() {
                    view.log = !view.log;
                }
            }
            Action::SendChat => self.send_chat(),
            Action::LeaveChat => {
                self.overlays.pop();
                self.ask(Request::LeaveChat);
                self.result.chat.leave();
            }
            Action::ChatUp => self.result.chat.scroll(1),
            Action::ChatDown => self.result.chat.scroll(-1),
            _ => return false,
        }
        true
    }

    fn scroll(&mut self, rows: i32) {
        let scroll = match self.overlays.last_mut() {
            Some(Overlay::Help { scroll, .. } | Overlay::RunFile { scroll }) => scroll,
            Some(Overlay::Compare(view)) => {
                view.scroll = view.scroll.saturating_add(1) % (view.comparison.differences.len().max(1) as u16);
                return;
            }
            _ => return,
        };
        *scroll = scroll.saturating_add_signed(rows as i16).min(200);
    }

    /// Commands and themes that the palette offers, those that match first.
    pub fn palette_entries(&self, filter: &str) -> Vec<PaletteEntry> {
        let layers = self.screen_layers();
        let mut entries: Vec<PaletteEntry> = self
            .keymap
            .rows(&layers)
            .into_iter()
            .filter(|(binding, _)| binding.action != Action::Palette)
            .map(|(binding, keys)| PaletteEntry {
                text: format!("{}: {}", binding.name, binding.help),
                keys,
                command: Command::Act(binding.action),
            })
            .collect();
        entries.extend(BUILT_IN.iter().map(|(name, _)| PaletteEntry {
            text: format!("theme {name}"),
            keys: String::new(),
            command: Command::Theme(name),
        }));
        let texts: Vec<String> = entries.iter().map(|entry| entry.text.clone()).collect();
        fuzzy(filter, &texts).into_iter().map(|at| entries[at].clone()).collect()
    }

    fn palette_move(&mut self, rows: isize) {
        let Some(Overlay::Palette { input, .. }) = self.overlays.last() else { return };
        let count = self.palette_entries(&input.text()).len();
        if let Some(Overlay::Palette { selected, .. }) = self.overlays.last_mut() {
            *selected = selected.saturating_add_signed(rows).min(count.saturating_sub(1));
        }
    }

    fn run_command(&mut self) {
        let Some(Overlay::Palette { input, selected }) = self.overlays.pop() else { return };
        match self.palette_entries(&input.text()).get(selected).map(|entry| entry.command) {
            Some(Command::Act(action)) => self.act(action),
            Some(Command::Theme(name)) => self.set_theme(name),
            None => self.complain("no such command"),
        }
    }

    /// Opens a line for typing.
    pub(super) fn edit(&mut self, purpose: Purpose, text: &str) {
        self.editing = Some(Editing { purpose, input: Input::new(text), problem: None });
    }

    /// The typed text changed.
    fn typed(&mut self) {
        let Some(editing) = &self.editing else {
            if let Some(Overlay::Palette { selected, .. }) = self.overlays.last_mut() {
                *selected = 0;
            }
            return;
        };
        let text = editing.input.text();
        let problem = match editing.purpose {
            Purpose::Filter => {
                self.filter(text);
                None
            }
            Purpose::Field => self.try_field(&text).err(),
            Purpose::LearningRate => learning_rate(&text).err(),
            _ => None,
        };
        if let Some(editing) = &mut self.editing {
            editing.problem = problem;
        }
    }

    fn filter(&mut self, text: String) {
        match self.step {
            Step::Model => self.model.filter(text),
            Step::Data => self.data.filter(text),
            Step::Runs => self.runs.filter(text),
            _ => self.tune.set_filter(text),
        }
    }

    fn accept(&mut self) {
        let Some(editing) = self.editing.take() else { return };
        let text = editing.input.text().trim().to_owned();
        let problem = match editing.purpose {
            Purpose::Filter => None,
            Purpose::Field => self.set_field(&text).err(),
            Purpose::LearningRate => match learning_rate(&text) {
                Ok(rate) => {
                    self.send(crate::run::Command::SetLearningRate(rate));
                    None
                }
                Err(problem) => Some(problem),
            },
            Purpose::MapColumns => self.map_column(&text).err(),
            _ if text.is_empty() => None,
            Purpose::HubSearch => {
                let repository = if self.step == Step::Data { Repository::Dataset } else { Repository::Model };
                match repository {
                    Repository::Model => self.model.searching = true,
                    Repository::Dataset => self.data.searching = true,
                }
                self.ask(Request::SearchHub(repository, text));
                None
            }
            Purpose::ModelFolder => {
                self.choose_model(&text);
                if crate::hub::is_id(&text) {
                    self.ask(Request::Download(Repository::Model, text));
                }
                None
            }
            Purpose::DataPath => {
                self.choose_data(&text);
                if crate::hub::is_id(&text) {
                    self.ask(Request::Download(Repository::Dataset, text));
                }
                None
            }
            Purpose::ExportTo => {
                self.export_to(&text);
                None
            }
            Purpose::SaveAs => {
                let path = std::path::PathBuf::from(&text);
                self.draft.path = Some(path.clone());
                self.ask(Request::Save { path, text: self.draft.spec.commented() });
                None
            }
            Purpose::LoadFrom => {
                self.ask(Request::Load(text.into()));
                None
            }
        };
        if problem.is_some() {
            // What was typed stays, with what is wrong with it.
            self.editing = Some(Editing { problem, ..editing });
        }
    }

    fn cancel(&mut self) {
        let Some(editing) = self.editing.take() else { return };
        match editing.purpose {
            Purpose::Filter => self.filter(String::new()),
            // The forecast followed the typing; back to what counts.
            Purpose::Field => self.refresh_forecast(),
            _ => {}
        }
    }

    fn on_loaded(&mut self, path: Option<std::path::PathBuf>, spec: crate::spec::RunSpec) {
        if let Some(path) = &path {
            self.tell(format!("loaded {}", path.display()));
        }
        self.draft.path = path;
        self.draft.replace(spec);
        self.overlays.retain(|overlay| !matches!(overlay, Overlay::RunFile { .. }));
        self.model.select(&self.draft.spec.model.id);
        self.refresh_preview();
        self.refresh_forecast();
        if matches!(self.step, Step::Result | Step::Runs) {
            self.go(Step::Tune);
        }
    }
}

/// A line of the palette.
#[derive(Clone, Debug)]
pub struct PaletteEntry {
    pub text: String,
    pub keys: String,
    pub command: Command,
}

/// What a line of the palette does.
#[derive(Clone, Copy, Debug)]
pub enum Command {
    Act(Action),
    Theme(&'static str),
}

fn learning_rate(text: &str) -> Result<f64, String> {
    match text.trim().parse::<f64>() {
        Ok(rate) if rate > 0.0 && rate <= 1.0 => Ok(rate),
        _ => Err("a number above 0, at most 1, such as 1e-4".into()),
    }
}
