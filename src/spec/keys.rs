//! Every key of the run file, defined once.

use super::domain::Domain::{self, *};

/// One key of `RUN.toml`.
#[derive(Debug)]
pub struct Key {
    pub section: &'static str,
    pub name: &'static str,
    pub domain: Domain,
    /// As TOML; none where leaving the key out means something that no value says.
    pub default: Option<&'static str>,
    /// One line, no full stop.
    pub help: &'static str,
    /// What Hugging Face, Unsloth, Axolotl, LLaMA-Factory and others call it.
    pub synonyms: &'static [&'static str],
}

impl Key {
    /// `train.learning_rate`.
    pub fn path(&self) -> String {
        format!("{}.{}", self.section, self.name)
    }

    /// The default as a TOML value.
    pub fn default_value(&self) -> Option<toml::Value> {
        self.default.map(|text| text.parse().expect("defaults in the table are TOML"))
    }
}

/// Sections in the order of the file, with what each is for.
pub const SECTIONS: [(&str, &str); 6] = [
    ("model", "What is fine-tuned"),
    ("data", "What it learns from"),
    ("method", "What is trained: an adapter or every weight"),
    ("train", "How it is trained"),
    ("sample", "What it is asked on the way"),
    ("engine", "What it runs on"),
];

/// Looks a key up by section and name.
pub fn find(section: &str, name: &str) -> Option<&'static Key> {
    KEYS.iter().find(|key| key.section == section && key.name == name)
}

/// Looks a key up by `section.name`, or by its name alone where only one section has it.
pub fn find_path(path: &str) -> Option<&'static Key> {
    if let Some((section, name)) = path.split_once('.') {
        return find(section, name);
    }
    let mut named = KEYS.iter().filter(|key| key.name == path);
    let key = named.next()?;
    named.next().is_none().then_some(key)
}

/// The run file with every default in it.
pub fn defaults() -> toml::Table {
    let mut file = toml::Table::new();
    for (section, _) in SECTIONS {
        let keys = KEYS.iter().filter(|key| key.section == section);
        let values = keys.filter_map(|key| Some((key.name.to_owned(), key.default_value()?)));
        file.insert(section.to_owned(), toml::Value::Table(values.collect()));
    }
    file
}

/// Formats of a data file.
pub const FORMATS: &[&str] =
    &["auto", "alpaca", "sharegpt", "messages", "prompt-completion", "preference", "text", "tokens"];

pub const KEYS: &[Key] = &[
    Key {
        section: "model",
        name: "id",
        domain: Place,
        default: Some("\"\""),
        help: "hub id, a folder with config.json and safetensors, or \"demo\", which is built in",
        synonyms: &[
            "model_name_or_path",
            "model_name",
            "base_model",
            "model",
            "model_id",
            "name",
            "path",
            "checkpoint",
        ],
    },
    Key {
        section: "model",
        name: "revision",
        domain: Text,
        default: Some("\"\""),
        help: "commit, tag or branch; empty for the newest",
        synonyms: &["model_revision", "revision_of_model", "commit"],
    },
    Key {
        section: "model",
        name: "weights",
        domain: Choice(&["auto", "nf4", "int8", "fp8"]),
        default: Some("\"auto\""),
        help: "auto: as stored; or quantized on load",
        synonyms: &[
            "quantization",
            "quantization_bit",
            "quantization_method",
            "bnb_4bit_quant_type",
            "load_in_8bit",
            "load_in_fp8",
        ],
    },
    Key {
        section: "data",
        name: "train",
        domain: Sources,
        default: Some("\"\""),
        help: "file, folder or hub dataset; or [[data.train]] tables",
        synonyms: &["dataset", "datasets", "train_file", "dataset_name", "train_dataset", "train_data", "dataset_path"],
    },
    Key {
        section: "data",
        name: "eval",
        domain: Evaluation,
        default: Some("0.1"),
        help: "a fraction held out, or a file; 0 for none",
        synonyms: &[
            "val_set_size",
            "val_size",
            "eval_dataset",
            "validation_file",
            "validation_split",
            "test_datasets",
            "eval_file",
            "test_size",
        ],
    },
    Key {
        section: "data",
        name: "format",
        domain: Choice(FORMATS),
        default: Some("\"auto\""),
        help: "how rows are read; auto: found out and printed",
        synonyms: &["dataset_type", "formatting", "type", "data_format", "dataset_format"],
    },
    Key {
        section: "data",
        name: "shuffle",
        domain: Flag,
        default: Some("true"),
        help: "another order of rows every epoch",
        synonyms: &["shuffle_merged_datasets", "dataset_shuffle", "shuffle_dataset"],
    },
    Key {
        section: "data",
        name: "template",
        domain: Place,
        default: Some("\"auto\""),
        help: "the model's own chat template, a built-in name, or a file",
        synonyms: &["chat_template", "chat_template_jinja", "prompt_template", "conversation_template"],
    },
    Key {
        section: "data",
        name: "system",
        domain: Text,
        default: Some("\"\""),
        help: "system prompt for rows that have none",
        synonyms: &["system_prompt", "default_system", "system_message", "default_system_message"],
    },
    Key {
        section: "data",
        name: "max_length",
        domain: Whole { least: 2, most: 4_194_304 },
        default: Some("2048"),
        help: "tokens of the longest row",
        synonyms: &[
            "max_seq_length",
            "max_seq_len",
            "sequence_len",
            "sequence_length",
            "cutoff_len",
            "model_max_length",
            "block_size",
            "seq_len",
            "context_length",
        ],
    },
    Key {
        section: "data",
        name: "too_long",
        domain: Choice(&["truncate", "drop", "error"]),
        default: Some("\"truncate\""),
        help: "what happens to longer rows; always counted",
        synonyms: &["excess_length_strategy", "truncation", "truncation_mode", "overflow"],
    },
    Key {
        section: "data",
        name: "packing",
        domain: Flag,
        default: Some("true"),
        help: "several rows a micro-batch; false: one",
        synonyms: &["sample_packing", "padding_free", "neat_packing", "pack", "packed"],
    },
    Key {
        section: "data",
        name: "loss_on",
        domain: Choice(&["responses", "last", "all"]),
        default: Some("\"responses\""),
        help: "which tokens are learned: all responses, the last one, or everything",
        synonyms: &[
            "train_on_inputs",
            "train_on_responses_only",
            "train_on_prompt",
            "mask_history",
            "completion_only_loss",
            "assistant_only_loss",
            "roles_to_train",
            "mask_prompt",
        ],
    },
    Key {
        section: "data",
        name: "drop_duplicates",
        domain: Flag,
        default: Some("false"),
        help: "leave out training rows that repeat an earlier one; counted",
        synonyms: &["deduplicate", "dataset_exact_deduplication", "dedup"],
    },
    Key {
        section: "data",
        name: "drop_shared",
        domain: Flag,
        default: Some("false"),
        help: "leave out training rows that are evaluation rows too; counted",
        synonyms: &["drop_leaked", "decontaminate"],
    },
    Key {
        section: "method",
        name: "kind",
        domain: Choice(&["lora", "qlora", "full"]),
        default: Some("\"lora\""),
        help: "lora, qlora (lora on 4-bit weights), full",
        synonyms: &[
            "finetuning_type",
            "adapter",
            "load_in_4bit",
            "full_finetuning",
            "use_peft",
            "fine_tune_type",
            "peft_type",
        ],
    },
    Key {
        section: "method",
        name: "rank",
        domain: Whole { least: 1, most: 4096 },
        default: Some("16"),
        help: "size of the adapter",
        synonyms: &["lora_r", "r", "lora_rank"],
    },
    Key {
        section: "method",
        name: "alpha",
        domain: Real { above: Some(0.0), least: f64::MIN, most: 65536.0 },
        default: Some("16"),
        help: "the adapter counts alpha / rank times (with rslora alpha / sqrt(rank))",
        synonyms: &["lora_alpha"],
    },
    Key {
        section: "method",
        name: "dropout",
        domain: Real { above: None, least: 0.0, most: 0.95 },
        default: Some("0.0"),
        help: "share of the adapter's inputs that are dropped",
        synonyms: &["lora_dropout"],
    },
    Key {
        section: "method",
        name: "targets",
        domain: Targets,
        default: Some("\"all-linear\""),
        help: "\"all-linear\" or a list of projection names",
        synonyms: &[
            "target_modules",
            "lora_target",
            "lora_target_modules",
            "lora_target_linear",
            "modules",
            "lora_layers",
        ],
    },
    Key {
        section: "method",
        name: "rslora",
        domain: Flag,
        default: Some("false"),
        help: "rank-stabilised scale",
        synonyms: &["use_rslora", "peft_use_rslora", "rs_lora"],
    },
    Key {
        section: "method",
        name: "init",
        domain: Place,
        default: Some("\"\""),
        help: "continue from this adapter (a PEFT folder)",
        synonyms: &["adapter_name_or_path", "lora_model_dir", "adapter_path", "peft_model_id", "resume_adapter_file"],
    },
    Key {
        section: "train",
        name: "epochs",
        domain: Real { above: Some(0.0), least: f64::MIN, most: 100_000.0 },
        default: Some("1.0"),
        help: "times over the rows; steps counts alone when set",
        synonyms: &["num_train_epochs", "num_epochs", "n_epochs", "max_epochs"],
    },
    Key {
        section: "train",
        name: "steps",
        domain: Whole { least: 1, most: 1_000_000_000 },
        default: None,
        help: "updates; left out, epochs counts",
        synonyms: &["max_steps", "num_steps", "iters", "total_steps", "max_train_steps", "num_iterations"],
    },
    Key {
        section: "train",
        name: "batch",
        domain: Whole { least: 1, most: 65536 },
        default: Some("8"),
        help: "rows per update, however they are cut into micro-batches",
        synonyms: &[
            "per_device_train_batch_size",
            "gradient_accumulation_steps",
            "micro_batch_size",
            "batch_size",
            "train_batch_size",
            "global_batch_size",
            "effective_batch_size",
        ],
    },
    Key {
        section: "train",
        name: "learning_rate",
        domain: Real { above: Some(0.0), least: f64::MIN, most: 1.0 },
        default: None,
        help: "peak of the schedule; left out, 2e-4 for lora and qlora, 2e-5 for full",
        synonyms: &["lr", "max_lr", "peak_lr", "base_lr", "max_learning_rate"],
    },
    Key {
        section: "train",
        name: "schedule",
        domain: Choice(&["linear", "cosine", "constant"]),
        default: Some("\"linear\""),
        help: "how the learning rate falls after warmup",
        synonyms: &["lr_scheduler_type", "lr_scheduler", "scheduler", "lr_schedule"],
    },
    Key {
        section: "train",
        name: "warmup",
        domain: Share,
        default: Some("0.05"),
        help: "a fraction of the run below 1, or updates",
        synonyms: &["warmup_ratio", "warmup_steps", "num_warmup_steps", "lr_warmup_steps"],
    },
    Key {
        section: "train",
        name: "optimizer",
        domain: Choice(&["adamw", "adamw8bit"]),
        default: Some("\"adamw\""),
        help: "adamw, or adamw8bit with its states in 8 bits",
        synonyms: &["optim", "optimizer_type"],
    },
    Key {
        section: "train",
        name: "optimizer_memory",
        domain: Choice(&["auto", "device", "host"]),
        default: Some("\"auto\""),
        help: "where the optimizer's states are kept",
        synonyms: &["optimizer_offload", "offload_optimizer", "offload_optimizer_device", "paged_optimizer"],
    },
    Key {
        section: "train",
        name: "betas",
        domain: Betas,
        default: Some("[0.9, 0.999]"),
        help: "decay of AdamW's first and second moment",
        synonyms: &["adam_beta1", "adam_beta2", "adam_betas", "beta1", "beta2"],
    },
    Key {
        section: "train",
        name: "epsilon",
        domain: Real { above: Some(0.0), least: f64::MIN, most: 1.0 },
        default: Some("1e-8"),
        help: "AdamW's epsilon",
        synonyms: &["adam_epsilon", "adam_eps", "eps"],
    },
    Key {
        section: "train",
        name: "weight_decay",
        domain: Real { above: None, least: 0.0, most: 10.0 },
        default: Some("0.01"),
        help: "decoupled, on every trainable tensor",
        synonyms: &["decay", "wd", "adam_weight_decay"],
    },
    Key {
        section: "train",
        name: "max_grad_norm",
        domain: Real { above: None, least: 0.0, most: 1e9 },
        default: Some("1.0"),
        help: "gradients are scaled down to this norm; 0: never",
        synonyms: &["gradient_clipping", "clip_grad_norm", "grad_clip", "max_norm", "gradient_clip_val"],
    },
    Key {
        section: "train",
        name: "seed",
        domain: Whole { least: 0, most: i64::MAX },
        default: Some("3407"),
        help: "of the adapter's start, the order of rows, dropout and the held-out split",
        synonyms: &["random_state", "random_seed", "data_seed"],
    },
    Key {
        section: "train",
        name: "eval_every",
        domain: Share,
        default: Some("0.1"),
        help: "a fraction of the run below 1, or updates; also before the first and after the last",
        synonyms: &[
            "eval_steps",
            "evals_per_epoch",
            "eval_strategy",
            "evaluation_strategy",
            "steps_per_eval",
            "val_check_interval",
        ],
    },
    Key {
        section: "train",
        name: "save_every",
        domain: Share,
        default: Some("0.1"),
        help: "a fraction of the run below 1, or updates; also after the last",
        synonyms: &["save_steps", "saves_per_epoch", "save_strategy", "checkpointing_steps"],
    },
    Key {
        section: "train",
        name: "keep",
        domain: Whole { least: 1, most: 10_000 },
        default: Some("2"),
        help: "checkpoints that are kept, beside the best",
        synonyms: &["save_total_limit", "max_checkpoints", "keep_last_n"],
    },
    Key {
        section: "train",
        name: "patience",
        domain: Whole { least: 0, most: 1_000_000 },
        default: Some("0"),
        help: "evaluations without improvement before stopping; 0: never",
        synonyms: &["early_stopping_patience", "early_stopping", "early_stopping_steps"],
    },
    Key {
        section: "sample",
        name: "prompts",
        domain: Texts,
        default: Some("[]"),
        help: "answered at every evaluation",
        synonyms: &["sample_prompts", "eval_prompts", "do_sample_eval", "prompt"],
    },
    Key {
        section: "engine",
        name: "device",
        domain: Device,
        default: Some("\"auto\""),
        help: "auto, cpu, wgpu, wgpu:N, cuda, cuda:N",
        synonyms: &["device_map", "accelerator", "use_cpu", "no_cuda", "gpu", "backend"],
    },
    Key {
        section: "engine",
        name: "precision",
        domain: Choice(&["auto", "f32", "f16", "bf16", "fp8"]),
        default: Some("\"auto\""),
        help: "auto, f32, f16 (wgpu), bf16 (cuda), fp8 (cuda)",
        synonyms: &["fp16", "dtype", "torch_dtype", "mixed_precision", "tf32", "compute_type"],
    },
    Key {
        section: "engine",
        name: "vram",
        domain: Size,
        default: Some("\"auto\""),
        help: "most the plan may take, as \"22GiB\"; auto: what is free",
        synonyms: &["max_memory", "gpu_memory_limit", "gpu_memory_utilization", "memory"],
    },
    Key {
        section: "engine",
        name: "recompute",
        domain: Choice(&["auto", "none", "all"]),
        default: Some("\"auto\""),
        help: "activations computed again in the backward pass: auto (searched), none, all",
        synonyms: &[
            "gradient_checkpointing",
            "use_gradient_checkpointing",
            "activation_checkpointing",
            "grad_checkpoint",
            "activation_offloading",
        ],
    },
];

/// Other trainers' keys that are no key here, and what to do instead.
pub const ELSEWHERE: &[(&[&str], &str)] = &[
    (
        &["output_dir", "out_dir", "save_path", "adapter_output"],
        "runs are kept under $TUNE_HOME/runs, each in a folder of its own",
    ),
    (
        &["resume_from_checkpoint", "auto_resume_from_checkpoints", "resume"],
        "`tune resume RUN` goes on from a run's last checkpoint",
    ),
    (&["logging_steps", "logging_strategy", "log_every_n_steps", "steps_per_report"], "every update is recorded"),
    (
        &["report_to", "wandb_project", "use_wandb", "logging_dir", "run_name", "wandb_run_id"],
        "events.jsonl in the run's folder has everything; `tune train --json` prints it",
    ),
    (&["push_to_hub", "hub_model_id", "hub_token"], "results stay on this machine"),
    (
        &[
            "load_in_16bit",
            "attn_implementation",
            "flash_attention",
            "flash_attn",
            "xformers_attention",
            "sdp_attention",
        ],
        "the engine chooses; leave it out",
    ),
    (
        &[
            "group_by_length",
            "pad_to_sequence_len",
            "dataloader_num_workers",
            "dataset_num_proc",
            "preprocessing_num_workers",
        ],
        "rows are packed and nothing is padded by length; leave it out",
    ),
    (&["trust_remote_code"], "code from a model repository is never run; leave it out"),
    (
        &[
            "do_train",
            "do_eval",
            "stage",
            "bias",
            "task_type",
            "remove_unused_columns",
            "overwrite_output_dir",
            "overwrite_cache",
        ],
        "leave it out",
    ),
    (&["deepspeed", "fsdp", "fsdp_config", "ddp_timeout", "world_size"], "one device per run; leave it out"),
];
