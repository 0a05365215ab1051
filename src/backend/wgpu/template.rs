//! The few directives that make one WGSL file serve many shapes.
//!
//! ```text
//! #include NAME            the text of shaders/NAME
//! #if NAME  #if !NAME      the lines up to #else or #end, when the constant is not (is) 0
//! #for i NAME              the lines up to #end once for each i in 0..NAME, with {i} replaced
//! ```
//! `NAME` is a constant of the kernel or, in `#for`, a number. Constants that appear nowhere count as 0.

use std::collections::BTreeMap;

/// Expands the directives of `source`.
///
/// # Errors
/// A message with the line at fault.
pub fn expand(
    source: &str,
    constants: &BTreeMap<&'static str, u32>,
    include: &dyn Fn(&str) -> Option<&'static str>,
) -> Result<String, String> {
    let lines: Vec<&str> = source.lines().collect();
    let mut output = String::with_capacity(source.len());
    emit(&lines, constants, include, &mut Vec::new(), &mut output)?;
    Ok(output)
}

type Loops = Vec<(String, u32)>;

fn emit(
    lines: &[&str],
    constants: &BTreeMap<&'static str, u32>,
    include: &dyn Fn(&str) -> Option<&'static str>,
    loops: &mut Loops,
    output: &mut String,
) -> Result<(), String> {
    let mut at = 0;
    while at < lines.len() {
        let line = lines[at];
        let Some(directive) = line.trim_start().strip_prefix('#') else {
            output.push_str(&substitute(line, loops));
            output.push('\n');
            at += 1;
            continue;
        };
        let words: Vec<&str> = directive.split_whitespace().collect();
        match words.as_slice() {
            ["include", name] => {
                let text = include(name).ok_or_else(|| format!("no shader named {name}"))?;
                let included: Vec<&str> = text.lines().collect();
                emit(&included, constants, include, loops, output)?;
                at += 1;
            }
            ["if", condition] => {
                let (otherwise, end) = block(lines, at)?;
                let (name, negated) = condition.strip_prefix('!').map_or((*condition, false), |name| (name, true));
                let truth = constants.get(name).is_some_and(|&value| value != 0) != negated;
                let body = match (truth, otherwise) {
                    (true, middle) => &lines[at + 1..middle.unwrap_or(end)],
                    (false, Some(middle)) => &lines[middle + 1..end],
                    (false, None) => &lines[..0],
                };
                emit(body, constants, include, loops, output)?;
                at = end + 1;
            }
            ["for", variable, count] => {
                let (_, end) = block(lines, at)?;
                let count = match count.parse() {
                    Ok(number) => number,
                    Err(_) => *constants.get(count).ok_or_else(|| format!("unknown count: {line}"))?,
                };
                for value in 0..count {
                    loops.push((format!("{{{variable}}}"), value));
                    emit(&lines[at + 1..end], constants, include, loops, output)?;
                    loops.pop();
                }
                at = end + 1;
            }
            _ => return Err(format!("unknown directive: {line}")),
        }
    }
    Ok(())
}

/// The `#else` (of an `#if`) and the `#end` that belong to the directive at `start`.
fn block(lines: &[&str], start: usize) -> Result<(Option<usize>, usize), String> {
    let (mut depth, mut otherwise) = (0, None);
    for (index, line) in lines.iter().enumerate().skip(start + 1) {
        let Some(directive) = line.trim_start().strip_prefix('#') else { continue };
        match directive.split_whitespace().next() {
            Some("if" | "for") => depth += 1,
            Some("else") if depth == 0 => otherwise = Some(index),
            Some("end") if depth == 0 => return Ok((otherwise, index)),
            Some("end") => depth -= 1,
            _ => {}
        }
    }
    Err(format!("no #end for: {}", lines[start]))
}

fn substitute(line: &str, loops: &Loops) -> String {
    let mut text = line.to_string();
    for (variable, value) in loops {
        if text.contains(variable.as_str()) {
            text = text.replace(variable.as_str(), &value.to_string());
        }
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loops_nest_and_conditions_choose() {
        let constants = BTreeMap::from([("N", 2), ("ON", 1)]);
        let source = "#for i N\n#if ON\na{i}\n#else\nb\n#end\n#for j 2\nc{i}{j}\n#end\n#end\n#if !ON\nd\n#end";
        let text = expand(source, &constants, &|_| None).expect("expands");
        assert_eq!(text, "a0\nc00\nc01\na1\nc10\nc11\n");
    }
}
