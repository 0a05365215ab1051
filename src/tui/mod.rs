//! The workbench: the terminal interface.
//!
//! It holds no training state: it reads a run's events and writes commands to its worker.

pub mod app;
pub mod draft;
pub mod event_loop;
pub mod glyphs;
pub mod history;
pub mod keymap;
pub mod message;
mod open;
pub mod screens;
pub mod terminal;
pub mod theme;
pub mod widgets;
pub mod work;

pub use open::{OpenError, Start, open, settings};
