//! The workbench: screens, widgets, keymap, themes.
