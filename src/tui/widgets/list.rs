//! A list with a mark and a fuzzy filter.

use nucleo_matcher::pattern::{CaseMatching, Normalization, Pattern};
use nucleo_matcher::{Config, Matcher, Utf32Str};

use crate::tui::keymap::Action;

/// Items, those that match the filter, and the marked one.
#[derive(Clone, Debug)]
pub struct List<T> {
    items: Vec<T>,
    filter: String,
    /// Indices of the items shown, best match first, or all in their order.
    shown: Vec<usize>,
    selected: usize,
}

impl<T> Default for List<T> {
    fn default() -> Self {
        Self { items: Vec::new(), filter: String::new(), shown: Vec::new(), selected: 0 }
    }
}

impl<T> List<T> {
    /// Replaces the items; the mark stays on the item with the same key.
    pub fn set<K: PartialEq>(&mut self, items: Vec<T>, text: impl Fn(&T) -> String, key: impl Fn(&T) -> K) {
        let marked = self.selected().map(&key);
        self.items = items;
        self.filter(self.filter.clone(), text);
        if let Some(at) = marked.and_then(|marked| self.shown.iter().position(|&at| key(&self.items[at]) == marked)) {
            self.selected = at;
        }
    }

    /// Narrows down to what matches fuzzily; an empty filter shows everything.
    pub fn filter(&mut self, filter: String, text: impl Fn(&T) -> String) {
        let texts: Vec<String> = self.items.iter().map(text).collect();
        self.shown = fuzzy(&filter, &texts);
        self.filter = filter;
        self.selected = self.selected.min(self.shown.len().saturating_sub(1));
    }

    pub fn filter_text(&self) -> &str {
        &self.filter
    }

    pub fn items(&self) -> &[T] {
        &self.items
    }

    /// All items, to change in place; their order and what the filter sees must stay.
    pub fn items_mut(&mut self) -> &mut [T] {
        &mut self.items
    }

    /// The items that match, in the order shown.
    pub fn shown(&self) -> impl ExactSizeIterator<Item = &T> {
        self.shown.iter().map(|&at| &self.items[at])
    }

    pub fn selected(&self) -> Option<&T> {
        self.shown.get(self.selected).map(|&at| &self.items[at])
    }

    /// Place of the mark among those shown.
    pub fn position(&self) -> usize {
        self.selected
    }

    /// Marks the first item shown that `wanted` accepts.
    pub fn select(&mut self, wanted: impl Fn(&T) -> bool) {
        if let Some(at) = self.shown.iter().position(|&at| wanted(&self.items[at])) {
            self.selected = at;
        }
    }

    /// Moves the mark; false when the command does not move it.
    pub fn act(&mut self, action: Action) -> bool {
        let last = self.shown.len().saturating_sub(1);
        self.selected = match action {
            Action::Up => self.selected.saturating_sub(1),
            Action::Down => (self.selected + 1).min(last),
            Action::PageUp => self.selected.saturating_sub(10),
            Action::PageDown => (self.selected + 10).min(last),
            Action::First => 0,
            Action::Last => last,
            _ => return false,
        };
        true
    }
}

/// Indices of the texts that match, best first; all of them for an empty pattern.
pub fn fuzzy(pattern: &str, texts: &[String]) -> Vec<usize> {
    if pattern.trim().is_empty() {
        return (0..texts.len()).collect();
    }
    let mut matcher = Matcher::new(Config::DEFAULT);
    let pattern = Pattern::parse(pattern, CaseMatching::Ignore, Normalization::Smart);
    let mut buffer = Vec::new();
    let mut found: Vec<(u32, usize)> = texts
        .iter()
        .enumerate()
        .filter_map(|(at, text)| Some((pattern.score(Utf32Str::new(text, &mut buffer), &mut matcher)?, at)))
        .collect();
    found.sort_by_key(|&(score, at)| (std::cmp::Reverse(score), at));
    found.into_iter().map(|(_, at)| at).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_filter_is_fuzzy_and_the_mark_stays_on_its_item() {
        let mut list = List::default();
        let text = |name: &String| name.clone();
        list.set(vec!["Llama-3.2-1B".into(), "SmolLM2-135M".into(), "Qwen2.5".into()], text, text);
        list.act(Action::Down);
        assert_eq!(list.selected().map(String::as_str), Some("SmolLM2-135M"));
        list.set(vec!["new".into(), "Llama-3.2-1B".into(), "SmolLM2-135M".into()], text, text);
        assert_eq!(list.selected().map(String::as_str), Some("SmolLM2-135M"));
        list.filter("lma1b".into(), text);
        assert_eq!(list.selected().map(String::as_str), Some("Llama-3.2-1B"));
        list.filter("zzz".into(), text);
        assert_eq!(list.selected(), None);
        assert!(list.act(Action::Last) && list.selected().is_none());
    }
}
