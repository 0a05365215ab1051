//! Prepares the pre-training of the embedded model: trains its tokenizer on the corpus and writes the corpus as
//! prompt-completion rows.
//!
//! ```text
//! cargo run --release --example prepare_demo -- corpus.jsonl.xz OUT
//! ```
//!
//! `OUT/model` is then a folder with `config.json`, the tokenizer and no weights, which `tune train` starts from
//! random ones; `OUT/train.jsonl` holds the rows. The recipe is `assets/demo/README.md`.

use std::fs::{self, File};
use std::io::{BufRead, BufReader, BufWriter, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, bail};
use serde::Deserialize;
use serde_json::json;
use tokenizers::decoders::byte_level::ByteLevel as ByteLevelDecoder;
use tokenizers::models::bpe::{BPE, BpeTrainer};
use tokenizers::pre_tokenizers::PreTokenizerWrapper;
use tokenizers::pre_tokenizers::byte_level::ByteLevel;
use tokenizers::pre_tokenizers::digits::Digits;
use tokenizers::pre_tokenizers::sequence::Sequence;
use tokenizers::{AddedToken, NormalizerWrapper, PostProcessorWrapper, TokenizerBuilder};

/// Tokens in the vocabulary, the three special ones and the 256 bytes included.
const VOCABULARY: usize = 2048;

const SPECIAL: [&str; 3] = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"];

/// The model folder's other files, written by hand.
const FILES: [(&str, &str); 3] = [
    ("config.json", include_str!("../assets/demo/model/config.json")),
    ("generation_config.json", include_str!("../assets/demo/model/generation_config.json")),
    ("tokenizer_config.json", include_str!("../assets/demo/model/tokenizer_config.json")),
];

#[derive(Deserialize)]
struct Row {
    prompt: String,
    text: String,
    /// Whether the text ends by itself, or was cut at a length.
    complete: bool,
}

fn main() -> anyhow::Result<()> {
    let mut arguments = std::env::args_os().skip(1).map(PathBuf::from);
    let (Some(corpus), Some(out), None) = (arguments.next(), arguments.next(), arguments.next()) else {
        bail!("usage: prepare_demo CORPUS.jsonl[.xz] OUT");
    };
    let rows = read(&corpus)?;
    let (kept, dropped): (Vec<_>, Vec<_>) = rows.into_iter().map(clean).partition(Option::is_some);
    let rows: Vec<Row> = kept.into_iter().flatten().collect();
    println!("{} rows kept, {} left out (not plain English text, or no whole sentence)", rows.len(), dropped.len());

    let model = out.join("model");
    fs::create_dir_all(&model).with_context(|| format!("cannot make {}", model.display()))?;
    write_rows(&rows, &out.join("train.jsonl"))?;
    write_tokenizer(&rows, &model)?;
    println!("wrote {}", out.display());
    Ok(())
}

fn read(path: &Path) -> anyhow::Result<Vec<Row>> {
    let file = File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
    let reader: Box<dyn BufRead> = if path.extension().is_some_and(|extension| extension == "xz") {
        Box::new(BufReader::new(xz2::read::XzDecoder::new(file)))
    } else {
        Box::new(BufReader::new(file))
    };
    let parse = |(number, line): (usize, std::io::Result<String>)| {
        let line = line.with_context(|| format!("cannot read {}", path.display()))?;
        serde_json::from_str(&line).with_context(|| format!("{} line {}", path.display(), number + 1))
    };
    reader.lines().enumerate().map(parse).collect()
}

/// The row in plain ASCII with a whole last sentence; none when that cannot be had. A text that was cut at a
/// length loses its last, unfinished sentence, so that the model learns to end where a sentence ends.
fn clean(row: Row) -> Option<Row> {
    let plain = |text: &str| text.replace(['\u{2018}', '\u{2019}'], "'").replace(['\u{201c}', '\u{201d}'], "\"");
    let (prompt, mut text) = (plain(&row.prompt), plain(row.text.trim()));
    if !prompt.is_ascii() || !text.is_ascii() {
        return None;
    }
    if !row.complete {
        let end = text.rfind(". ").max(text.rfind(".\n")).max(text.rfind("! ")).max(text.rfind("? "))?;
        text.truncate(end + 1);
    }
    (text.len() >= 20).then_some(Row { prompt, text, complete: true })
}

fn write_rows(rows: &[Row], path: &Path) -> anyhow::Result<()> {
    let mut file = BufWriter::new(File::create(path).with_context(|| format!("cannot write {}", path.display()))?);
    for row in rows {
        writeln!(file, "{}", json!({ "prompt": row.prompt, "completion": row.text }))?;
    }
    file.flush()?;
    Ok(())
}

fn write_tokenizer(rows: &[Row], folder: &Path) -> anyhow::Result<()> {
    let special = SPECIAL.map(|token| AddedToken::from(token, true));
    let mut trainer = BpeTrainer::builder()
        .vocab_size(VOCABULARY)
        .special_tokens(special.to_vec())
        .initial_alphabet(ByteLevel::alphabet().into_iter().collect())
        .show_progress(false)
        .build();
    let bytes = ByteLevel::new(false, true, true);
    // Digits one by one, then the words of GPT-2's pattern, each as bytes.
    let pieces =
        Sequence::new(vec![PreTokenizerWrapper::Digits(Digits::new(true)), PreTokenizerWrapper::ByteLevel(bytes)]);
    let mut tokenizer =
        TokenizerBuilder::<BPE, NormalizerWrapper, Sequence, PostProcessorWrapper, ByteLevelDecoder>::new()
            .with_model(BPE::default())
            .with_pre_tokenizer(Some(pieces))
            .with_decoder(Some(bytes))
            .build()
            .map_err(|error| anyhow::anyhow!("{error}"))?;
    let texts = rows.iter().flat_map(|row| [row.prompt.as_str(), row.text.as_str()]);
    tokenizer.train(&mut trainer, texts).map_err(|error| anyhow::anyhow!("{error}"))?;
    let json = tokenizer.to_string(false).map_err(|error| anyhow::anyhow!("{error}"))?;
    fs::write(folder.join("tokenizer.json"), json)?;
    for (name, text) in FILES {
        fs::write(folder.join(name), text)?;
    }
    Ok(())
}
