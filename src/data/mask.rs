//! Which bytes of a rendered conversation are trained on.
//!
//! A template is a program, so where an answer begins and ends is found by watching what it writes:
//!
//! | method | how | when |
//! | --- | --- | --- |
//! | prefix | the text up to the generation prompt, and up to the end of the turn, rendered from the first messages alone, are both prefixes of the whole | nearly always |
//! | generation tags | the template marks the answers itself with `{% generation %}` | the text of a turn depends on later turns |
//! | sentinel | the answer is exchanged for a unique word: what stays around it is the template's; the end-of-turn token after it belongs to the answer | the same, without tags, or a template without a generation prompt |

use std::ops::Range;

use minijinja::value::Value;

use super::DataError;
use super::message::Message;
use super::template::{ChatTemplate, message_value};
use crate::model::tokenizer::Tokenizer;
use crate::spec::LossOn;

/// How the answers of a conversation were found in its text.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, serde::Serialize)]
#[serde(rename_all = "kebab-case")]
pub enum MaskMethod {
    /// Nothing to find: everything is trained on.
    Whole,
    Prefix,
    GenerationTags,
    Sentinel,
}

impl MaskMethod {
    /// One phrase for a report.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Whole => "the whole text",
            Self::Prefix => "prefixes of the rendered conversation",
            Self::GenerationTags => "the template's own generation tags",
            Self::Sentinel => {
                "answers exchanged for a marker (the template changes earlier turns when later ones follow)"
            }
        }
    }
}

/// A conversation as text with the ranges to train on.
#[derive(Clone, Debug, PartialEq)]
pub struct Masked {
    pub text: String,
    /// Bytes that are trained on, with their weight; in order.
    pub answers: Vec<(Range<usize>, f32)>,
    pub method: MaskMethod,
}

/// Renders a conversation and finds what `loss_on` trains on. Every answer runs from after the generation prompt
/// through its end-of-turn token; blanks after that token are not targets.
///
/// # Errors
/// When the template fails, or when no method finds an answer in the text.
pub fn mask(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    messages: &[Message],
    tools: Option<&serde_json::Value>,
    loss_on: LossOn,
) -> Result<Masked, DataError> {
    let values: Vec<Value> = messages.iter().map(message_value).collect();
    let whole = template.render_values(&values, tools, false)?;
    if loss_on == LossOn::All {
        let answers = vec![(0..whole.text.len(), 1.0)];
        return Ok(Masked { text: whole.text, answers, method: MaskMethod::Whole });
    }
    let mut wanted: Vec<usize> = (0..messages.len()).filter(|&i| messages[i].is_assistant()).collect();
    if loss_on == LossOn::Last {
        wanted.drain(..wanted.len().saturating_sub(1));
    }
    let mut answers = Vec::with_capacity(wanted.len());
    let mut method = MaskMethod::Prefix;
    // An answer with weight 0 is found too: a template that hides it is worth knowing about.
    for &turn in &wanted {
        let found = match by_prefix(template, &whole.text, &values, tools, turn)? {
            Some(range) => Some((range, MaskMethod::Prefix)),
            None => match by_generation_tags(&whole.generation, messages, turn) {
                Some(range) => Some((range, MaskMethod::GenerationTags)),
                None => by_sentinel(template, tokenizer, &whole.text, messages, &values, tools, turn)?
                    .map(|range| (range, MaskMethod::Sentinel)),
            },
        };
        let Some((range, how)) = found else {
            return Err(DataError::Template {
                template: template.origin.clone(),
                what: format!("turn {} cannot be found in the rendered text, so it cannot be masked", turn + 1),
            });
        };
        method = method.max(how);
        let end = without_trailing_blanks(&whole.text, range.clone(), tokenizer);
        answers.push((range.start..end, messages[turn].weight));
    }
    Ok(Masked { text: whole.text, answers, method })
}

fn by_prefix(
    template: &ChatTemplate,
    whole: &str,
    values: &[Value],
    tools: Option<&serde_json::Value>,
    turn: usize,
) -> Result<Option<Range<usize>>, DataError> {
    // A template may refuse half a conversation (roles must alternate, the last turn must be the user's): then the
    // other methods decide.
    let Ok(prompt) = template.render_values(&values[..turn], tools, true) else { return Ok(None) };
    let Ok(plain) = template.render_values(&values[..turn], tools, false) else { return Ok(None) };
    if prompt.text == plain.text {
        // No generation prompt: what precedes the answer cannot be told from the answer this way.
        return Ok(None);
    }
    let end = if turn + 1 == values.len() {
        whole.len()
    } else {
        let Ok(answered) = template.render_values(&values[..=turn], tools, false) else { return Ok(None) };
        if !whole.starts_with(answered.text.as_str()) {
            return Ok(None);
        }
        answered.text.len()
    };
    let start = prompt.text.len();
    Ok((whole.starts_with(prompt.text.as_str()) && start < end).then_some(start..end))
}

/// The template's own marks, when there is one for every assistant turn.
fn by_generation_tags(generation: &[Range<usize>], messages: &[Message], turn: usize) -> Option<Range<usize>> {
    let assistants = messages.iter().filter(|message| message.is_assistant()).count();
    let index = messages[..turn].iter().filter(|message| message.is_assistant()).count();
    (generation.len() == assistants).then(|| generation[index].clone())
}

fn by_sentinel(
    template: &ChatTemplate,
    tokenizer: &Tokenizer,
    whole: &str,
    messages: &[Message],
    values: &[Value],
    tools: Option<&serde_json::Value>,
    turn: usize,
) -> Result<Option<Range<usize>>, DataError> {
    const SENTINEL: &str = "Q7answerZ3placeholderQ7";
    let mut message = messages[turn].clone();
    message.fields.insert("content".into(), SENTINEL.into());
    let mut values = values.to_vec();
    values[turn] = message_value(&message);
    let Ok(changed) = template.render_values(&values, tools, false) else { return Ok(None) };
    let Some((before, after)) = changed.text.split_once(SENTINEL) else { return Ok(None) };
    if !whole.starts_with(before) || !whole.ends_with(after) || before.len() + after.len() > whole.len() {
        return Ok(None);
    }
    let content = before.len()..whole.len() - after.len();
    if content.is_empty() {
        return Ok(None);
    }
    Ok(Some(content.start..end_of_turn(after, tokenizer).map_or(content.end, |length| content.end + length)))
}

/// Bytes through the first special token after an answer, when only blanks lie between.
fn end_of_turn(after: &str, tokenizer: &Tokenizer) -> Option<usize> {
    let blanks = after.len() - after.trim_start().len();
    let head: String = after[blanks..].chars().take(64).collect();
    let encoded = tokenizer.encode_with_offsets(&head, false).ok()?;
    let (id, (start, end)) = (*encoded.ids.first()?, *encoded.offsets.first()?);
    (start == 0 && tokenizer.is_special(id)).then_some(blanks + end)
}

/// The end of an answer without the blanks that follow its end-of-turn token (`<|im_end|>\n`).
fn without_trailing_blanks(whole: &str, range: Range<usize>, tokenizer: &Tokenizer) -> usize {
    let trimmed = whole[range.clone()].trim_end();
    let ends_turn = tokenizer.special_texts().any(|text| !text.is_empty() && trimmed.ends_with(text));
    if ends_turn { range.start + trimmed.len() } else { range.end }
}

/// Labels of tokens from the bytes to train on: a token is a target when it touches them, so that one that straddles
/// the border (a blank and the answer's first word) is.
pub fn labels(ids: &[u32], offsets: &[(usize, usize)], answers: &[(Range<usize>, f32)]) -> (Vec<i32>, Vec<f32>) {
    let mut labels = vec![super::IGNORED; ids.len()];
    let mut weights = vec![1.0_f32; ids.len()];
    for (t, &(start, end)) in offsets.iter().enumerate() {
        let touching = answers.iter().find(|(answer, _)| {
            if start == end {
                // Some tokenizers trim blanks from offsets; a token of blanks alone is left empty at its end.
                answer.start < end && end <= answer.end
            } else {
                start < answer.end && end > answer.start
            }
        });
        if let Some((_, weight)) = touching.filter(|(_, weight)| *weight != 0.0) {
            labels[t] = ids[t] as i32;
            weights[t] = *weight;
        }
    }
    if weights.iter().all(|weight| *weight == 1.0) {
        weights.clear();
    }
    (labels, weights)
}
