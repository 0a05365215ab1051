//! The loop: updates, evaluations, samples, checkpoints, commands.

use std::collections::{BTreeMap, VecDeque};
use std::ops::ControlFlow;
use std::path::PathBuf;
use std::time::{Duration, Instant};

use super::checkpoint::{self, Best, State};
use super::prepare::{self, Prepared};
use super::schedule::{RateSchedule, interval};
use super::stepper::{StepResult, Stepper};
use super::{Controls, TrainError, result};
use crate::backend::inspect::{NonFinite, locate_non_finite};
use crate::backend::{self, Found};
use crate::data::{self, ChatTemplate, Message, MicroBatch, Row};
use crate::generate::{Generator, Sampling};
use crate::program::{Plan, Role};
use crate::run::changes::{self, Replay};
use crate::run::{Command, Event, RunFolder};
use crate::spec::RunSpec;

/// How a run ended when nothing failed.
#[derive(Clone, Debug, PartialEq)]
pub enum Outcome {
    Finished,
    /// Stopped by a command, with a checkpoint at this step.
    Stopped {
        step: u64,
    },
}

/// The key that can be changed while a run goes on.
const LEARNING_RATE: &str = "train.learning_rate";

/// Tokens of an answer sampled during training.
const SAMPLE_TOKENS: usize = 128;

/// Trains on a device from the run folder's last checkpoint, or from the start where there is none.
///
/// # Errors
/// When the request does not fit, the device fails, or the result cannot be written. A checkpoint in between that
/// cannot be written is a `warning` event: training goes on.
pub fn train(
    spec: &RunSpec,
    found: &Found,
    folder: &RunFolder,
    controls: &mut dyn Controls,
) -> Result<Outcome, TrainError> {
    let prepared = prepare::prepare(spec, &|_| {})?;
    let choice = found.choice()?;
    let target = &choice.target;
    let resume_from = folder.checkpoint_steps().last().map(|step| folder.checkpoints().join(checkpoint::name(*step)));
    let resumed = resume_from.as_deref().map(checkpoint::read_state).transpose()?;
    let lengths: Vec<usize> =
        prepared.data.train.iter().chain(&prepared.data.eval).map(|row| row.input_ids.len()).collect();
    let search = prepare::search(spec, &prepared.model.config, &lengths, &choice)?;
    let (plan, plan_choice) = match &resumed {
        None => search.run()?,
        Some(state) => match search.repeat(&state.plan) {
            Ok(plan) if state.plan.device == target.name => (plan, state.plan.clone()),
            _ => {
                let (plan, chosen) = search.run()?;
                controls.emit(Event::Warning {
                    rule: "resume".into(),
                    message: format!(
                        "the plan of the checkpoint (on {}) cannot be repeated on {}: results will differ in the last \
                         bits from an uninterrupted run",
                        state.plan.device, target.name
                    ),
                    advice: "resume on the same device with as much free memory for the same bits".into(),
                });
                (plan, chosen)
            }
        },
    };
    let parameters = prepared.model.config.parameters();
    let trainable = prepared
        .adapter
        .as_ref()
        .map_or(parameters, |adapter| adapter.tensors.values().map(|tensor| tensor.values.len() as u64).sum());
    match &resumed {
        None => controls.emit(Event::Started {
            run: folder.id(),
            model: spec.model.id.clone(),
            device: target.name.clone(),
            reason: choice.reason.clone(),
            version: env!("CARGO_PKG_VERSION").into(),
            process: std::process::id(),
            rows: prepared.data.train.len(),
            eval_rows: prepared.data.eval.len(),
            steps: prepared.steps,
            epochs: prepared.steps as f64 / prepared.steps_per_epoch as f64,
            trainable_parameters: trainable,
            parameters,
        }),
        Some(state) => controls.emit(Event::Resumed {
            step: state.step,
            process: std::process::id(),
            device: target.name.clone(),
            reason: choice.reason.clone(),
        }),
    }
    if resumed.is_none() {
        warn_about_data(&prepared, controls);
    }
    controls.emit(plan_event(&plan, &plan_choice, &prepared));
    let costs: BTreeMap<usize, f64> = plan
        .summary
        .programs
        .iter()
        .filter(|program| program.role == Role::Micro)
        .map(|program| (program.tokens, program.estimated_seconds))
        .collect();
    let table = resumed.as_ref().and_then(|state| state.tuning.clone());
    let session = backend::open_tuned(plan, prepared.model.weights.clone(), &choice.device, table.as_deref())?;
    if let Some(message) = session.notice() {
        let advice = "nothing is lost; `tune doctor` looks at the device".into();
        controls.emit(Event::Warning { rule: "device".into(), message, advice });
    }
    let tuning = session.tuning();
    if resumed.as_ref().is_some_and(|state| state.plan == plan_choice) && table != tuning {
        controls.emit(Event::Warning {
            rule: "resume".into(),
            message:
                "the tuning table of the checkpoint is of another card, driver or library, or of other kernels: results will \
                 differ in the last bits from an uninterrupted run"
                    .into(),
            advice: "resume with the card, driver, libraries and version of tune that the run began with for the same bits".into(),
        });
    }
    let mut stepper = Stepper::new(session, spec.train.seed, spec.train.betas, prepared.model.config.padding_token)?;
    if let Some(adapter) = &prepared.adapter {
        stepper.load_adapter(adapter)?;
    }
    if let Some(checkpoint) = &resume_from {
        checkpoint::restore(checkpoint, &mut stepper)?;
    }
    let changes = changes_to_repeat(folder, resumed.as_ref());
    let mut state = resumed.unwrap_or(State {
        step: 0,
        learning_rate: prepared.learning_rate,
        best: None,
        stale_evaluations: 0,
        loss_sum: 0.0,
        seconds: 0.0,
        last_eval: None,
        plan: plan_choice.clone(),
        tuning: None,
        gradient_scale: None,
    });
    (state.plan, state.tuning) = (plan_choice, tuning);
    if let Some(scale) = state.gradient_scale {
        stepper.session.set_gradient_scale(scale)?;
    }
    let schedule = RateSchedule::new(spec.train.schedule, spec.train.warmup, prepared.steps);
    let generator = match spec.sample.prompts.is_empty() {
        true => None,
        false => {
            let capacity = prepare::SAMPLE_CAPACITY.min(prepared.model.config.max_position_embeddings);
            let generator = Generator::new(stepper.workload(), &prepared.model.eos_token_ids, capacity)?;
            Some((generator, ChatTemplate::choose(&spec.data.template, &prepared.tokenizer)?))
        }
    };
    let eval_rows: Vec<&Row> = prepared.data.eval.iter().collect();
    let sizes = state.plan.sizes.clone();
    let eval_batches = data::pack(&eval_rows, &sizes, |size| costs[&size], spec.data.packing)?;
    let saved_step = state.step;
    let mut trainer = Trainer {
        spec,
        folder,
        controls,
        prepared: &prepared,
        stepper,
        state,
        schedule,
        generator,
        costs,
        eval_batches,
        changes,
        pending: VecDeque::new(),
        saved_at: resume_from.map(|_| saved_step),
        order: (u64::MAX, Vec::new()),
    };
    trainer.run()
}

/// What the reader dropped, cut or doubted, once, at the start.
fn warn_about_data(prepared: &Prepared, controls: &mut dyn Controls) {
    if prepared.model.random_weights {
        controls.emit(Event::Warning {
            rule: "random weights".into(),
            message: "the model folder holds no weights: training starts from random ones".into(),
            advice: "for fine-tuning, give a folder with model.safetensors".into(),
        });
    }
    for lint in &prepared.data.report.lint {
        let (rule, message, advice) = (lint.rule.clone(), lint.message.clone(), lint.advice.clone());
        controls.emit(Event::Warning { rule, message, advice });
    }
}

fn plan_event(plan: &Plan, choice: &checkpoint::PlanChoice, prepared: &Prepared) -> Event {
    let seconds = |role: Role| {
        let largest = plan.summary.programs.iter().filter(|p| p.role == role).max_by_key(|p| p.tokens);
        largest.map_or((1, 0.0), |program| (program.tokens.max(1), program.estimated_seconds))
    };
    let tokens: usize = prepared.data.train.iter().map(|row| row.input_ids.len()).sum();
    let per_step = tokens as f64 / prepared.steps_per_epoch as f64;
    let (size, micro) = seconds(Role::Micro);
    let mut recompute = choice.in_words(prepared.model.config.layers);
    if plan.summary.host_bytes > 0 {
        recompute.push(format!("{} of the host's memory", crate::spec::size::format(plan.summary.host_bytes)));
    }
    Event::Plan {
        peak_bytes: plan.summary.peak_bytes,
        bytes: plan.summary.bytes.iter().map(|(kind, bytes)| (kind.to_string(), *bytes)).collect(),
        micro_sizes: choice.sizes.clone(),
        estimated_step_seconds: micro * per_step / size as f64 + seconds(Role::Update).1,
        recompute: recompute.join("; "),
    }
}

/// Live changes recorded after the checkpoint: a resumed run makes them again.
fn changes_to_repeat(folder: &RunFolder, resumed: Option<&State>) -> Replay {
    let Some(state) = resumed else { return Replay::default() };
    let later = changes::recorded(folder).into_iter().filter(|change| change.step >= state.step);
    Replay::new(later.filter(|change| change.key == LEARNING_RATE).collect())
}

struct Trainer<'a> {
    spec: &'a RunSpec,
    folder: &'a RunFolder,
    controls: &'a mut dyn Controls,
    prepared: &'a Prepared,
    stepper: Stepper,
    state: State,
    schedule: RateSchedule,
    generator: Option<(Generator, ChatTemplate)>,
    /// Estimated seconds of a micro-batch, by size.
    costs: BTreeMap<usize, f64>,
    eval_batches: Vec<MicroBatch>,
    /// Learning rates to set when a step is reached, from before the resume.
    changes: Replay,
    /// Commands that came during an evaluation.
    pending: VecDeque<Command>,
    saved_at: Option<u64>,
    /// An epoch and the order of its rows.
    order: (u64, Vec<usize>),
}

/// What a command asked of the loop.
enum Verdict {
    Continue,
    Stop,
}

impl Trainer<'_> {
    fn run(&mut self) -> Result<Outcome, TrainError> {
        let steps = self.prepared.steps;
        let eval_every = interval(self.spec.train.eval_every, steps);
        let save_every = interval(self.spec.train.save_every, steps);
        let mut early = false;
        if self.state.step == 0 {
            self.evaluate()?;
        }
        while self.state.step < steps {
            if let Verdict::Stop = self.obey()? {
                return self.stop();
            }
            self.one_update()?;
            let step = self.state.step;
            let last = step == steps;
            let mut improved = false;
            if last || eval_every.is_some_and(|every| step.is_multiple_of(every)) {
                improved = self.evaluate()?;
                early = self.spec.train.patience > 0 && self.state.stale_evaluations >= self.spec.train.patience;
            }
            if last || early || improved || save_every.is_some_and(|every| step.is_multiple_of(every)) {
                self.save_if_possible();
            }
            if early {
                break;
            }
        }
        self.finish(early)
    }

    fn one_update(&mut self) -> Result<(), TrainError> {
        let step = self.state.step;
        while let Some(change) = self.changes.due(step) {
            self.state.learning_rate = change.value;
        }
        let started = Instant::now();
        let batches = self.batches(step)?;
        let rate = self.state.learning_rate * self.schedule.factor(step);
        let StepResult { loss, grad_norm, .. } = self.finite_update(&batches, step, rate)?;
        let seconds = started.elapsed().as_secs_f64();
        self.state.step += 1;
        self.state.loss_sum += loss;
        self.state.seconds += seconds;
        let padding: usize = batches.iter().map(|batch| batch.padding).sum();
        let tokens = batches.iter().map(|batch| batch.size).sum::<usize>() - padding;
        self.controls.emit(Event::Step {
            step: step + 1,
            epoch: (step + 1) as f64 / self.prepared.steps_per_epoch as f64,
            loss,
            grad_norm,
            learning_rate: rate,
            tokens: tokens as u64,
            label_tokens: batches.iter().map(|batch| batch.label_tokens as u64).sum(),
            padding: padding as u64,
            tokens_per_second: tokens as f64 / seconds,
            seconds,
            vram_bytes: self.stepper.session.allocated_bytes(),
        });
        Ok(())
    }

    /// An update; where gradients overflow the type that they are held in, again with a smaller scale.
    fn finite_update(&mut self, batches: &[MicroBatch], step: u64, rate: f64) -> Result<StepResult, TrainError> {
        let begun_with = self.stepper.session.gradient_scale();
        loop {
            let result = self.stepper.update(batches, step, rate)?;
            let now = self.stepper.session.gradient_scale();
            if result.applied {
                if let (Some(from), Some(to)) = (begun_with, now)
                    && from != to
                {
                    self.state.gradient_scale = Some(to);
                    self.controls.emit(Event::Warning {
                        rule: "gradient-scale".into(),
                        message: format!(
                            "gradients overflowed f16 at update {}: they are scaled by {to} from here on, by {from} before",
                            step + 1
                        ),
                        advice: "nothing was lost; if it comes again and again lower train.learning_rate, or set \
                                 engine.precision = \"f32\""
                            .into(),
                    });
                }
                return Ok(result);
            }
            if self.stepper.shrink_gradients()?.is_none() {
                // The scale was not the reason.
                if let Some(scale) = begun_with {
                    self.stepper.session.set_gradient_scale(scale)?;
                }
                return Err(self.non_finite(batches, step, result.grad_norm));
            }
        }
    }

    /// The micro-batches of an update, counted from 0.
    fn batches(&mut self, step: u64) -> Result<Vec<MicroBatch>, TrainError> {
        let rows = &self.prepared.data.train;
        let (epoch, index) = (step / self.prepared.steps_per_epoch, step % self.prepared.steps_per_epoch);
        if self.order.0 != epoch {
            self.order = (epoch, data::order(rows.len(), self.spec.train.seed, epoch, self.spec.data.shuffle));
        }
        let batch = self.spec.train.batch.max(1);
        let first = index as usize * batch;
        let chosen: Vec<&Row> = self.order.1[first..].iter().take(batch).map(|&row| &rows[row]).collect();
        let batches = data::pack(&chosen, &self.state.plan.sizes, |size| self.costs[&size], self.spec.data.packing)?;
        if batches.iter().all(|batch| batch.label_tokens == 0) {
            return Err(TrainError::Setting {
                key: "data.train",
                value: format!("update {}", step + 1),
                what: "none of its rows has a token to train on".into(),
            });
        }
        Ok(batches)
    }

    /// Finds the operation, layer and rows of a non-finite gradient by running the update again, step by step.
    fn non_finite(&mut self, batches: &[MicroBatch], step: u64, norm: f64) -> TrainError {
        let mut place = String::from("running it again operation by operation showed nothing");
        for (index, batch) in batches.iter().enumerate() {
            let found = self
                .stepper
                .prepare(batches, index, step)
                .and_then(|program| locate_non_finite(&mut *self.stepper.session, program));
            match found {
                Ok(Some(found)) => {
                    place = self.describe(&found, batch, step);
                    break;
                }
                Ok(None) => {}
                Err(error) => {
                    place = format!("looking for the place failed: {error}");
                    break;
                }
            }
        }
        let checkpoint = match self.save() {
            Ok(path) => path,
            Err(error) => return error,
        };
        TrainError::NonFinite { step: step + 1, norm, place, checkpoint }
    }

    fn describe(&self, found: &NonFinite, batch: &MicroBatch, step: u64) -> String {
        let epoch_rows = &self.order.1;
        let first = (step % self.prepared.steps_per_epoch) as usize * self.spec.train.batch.max(1);
        // Which document each bad token lies in gives the row.
        let mut starts: Vec<i32> = batch.document_start.clone();
        starts.dedup();
        let mut rows: Vec<usize> = found
            .rows
            .iter()
            .filter_map(|&token| {
                let document = starts.partition_point(|&start| start as usize <= token).checked_sub(1)?;
                let row = *batch.rows.get(document)?;
                let index = *epoch_rows.get(first + row)?;
                Some(self.prepared.data.train[index].source)
            })
            .collect();
        rows.sort_unstable();
        rows.dedup();
        let place = |row: &usize| match self.prepared.data.report.place(*row) {
            Some(place) => place.to_string(),
            None => format!("row {row}"),
        };
        let rows = match rows.len() {
            0 => "all rows of the update".to_string(),
            _ => rows.iter().take(8).map(place).collect::<Vec<_>>().join(", "),
        };
        format!("the first value that is not finite comes out of {} ({}), {rows}", found.name, found.op)
    }

    /// Evaluates and samples; true when the held-out loss is the best so far.
    fn evaluate(&mut self) -> Result<bool, TrainError> {
        let mut improved = false;
        if !self.eval_batches.is_empty() {
            let (controls, pending) = (&mut *self.controls, &mut self.pending);
            let loss = self.stepper.evaluate(&self.eval_batches, || {
                while let Some(command) = controls.next() {
                    pending.push_back(command);
                }
                !pending.contains(&Command::Stop)
            })?;
            let Some(loss) = loss else { return Ok(false) };
            let step = self.state.step;
            let tokens = self.eval_batches.iter().map(|batch| batch.label_tokens as u64).sum();
            self.controls.emit(Event::Eval { step, loss, perplexity: loss.exp(), tokens });
            let this = Best { step, loss };
            self.state.last_eval = Some(this);
            if loss.is_finite() && self.state.best.is_none_or(|best| loss < best.loss) {
                self.state.best = Some(this);
                self.state.stale_evaluations = 0;
                improved = step > 0;
            } else {
                self.state.stale_evaluations += 1;
            }
        }
        self.sample()?;
        Ok(improved)
    }

    fn sample(&mut self) -> Result<(), TrainError> {
        let Some((generator, template)) = &mut self.generator else { return Ok(()) };
        generator.forget();
        for prompt in &self.spec.sample.prompts {
            let mut messages = vec![Message::new("user", prompt)];
            if !self.spec.data.system.is_empty() {
                messages.insert(0, Message::new("system", &self.spec.data.system));
            }
            let text = template.render(&messages, None, true)?;
            let ids = self.prepared.tokenizer.encode(&text, false)?;
            let sampling = Sampling::default();
            let go_on = |_| ControlFlow::Continue(());
            let answer = generator.generate(&mut *self.stepper.session, &ids, &sampling, SAMPLE_TOKENS, go_on)?;
            let text = self.prepared.tokenizer.decode(&answer.tokens, true)?;
            self.controls.emit(Event::Sample { step: self.state.step, prompt: prompt.clone(), text });
        }
        Ok(())
    }

    /// Carries out the commands that have come.
    fn obey(&mut self) -> Result<Verdict, TrainError> {
        while let Some(command) = self.pending.pop_front().or_else(|| self.controls.next()) {
            match command {
                Command::Pause => {
                    if let Verdict::Stop = self.pause()? {
                        return Ok(Verdict::Stop);
                    }
                }
                Command::Stop => return Ok(Verdict::Stop),
                other => self.carry_out(other)?,
            }
        }
        Ok(Verdict::Continue)
    }

    fn pause(&mut self) -> Result<Verdict, TrainError> {
        self.controls.emit(Event::Paused { step: self.state.step });
        loop {
            match self.controls.wait(Duration::from_secs(3600)) {
                Some(Command::Continue) => {
                    self.controls.emit(Event::Continued { step: self.state.step });
                    return Ok(Verdict::Continue);
                }
                Some(Command::Stop) => return Ok(Verdict::Stop),
                Some(other) => self.carry_out(other)?,
                None => {}
            }
        }
    }

    fn carry_out(&mut self, command: Command) -> Result<(), TrainError> {
        match command {
            Command::Save => self.save_if_possible(),
            Command::Evaluate => {
                self.evaluate()?;
            }
            Command::SetLearningRate(rate) if rate.is_finite() && rate >= 0.0 => {
                let from = std::mem::replace(&mut self.state.learning_rate, rate);
                self.controls.emit(Event::Changed {
                    step: self.state.step,
                    key: LEARNING_RATE.into(),
                    from: from.into(),
                    to: rate.into(),
                });
            }
            Command::SetLearningRate(_)
            | Command::Pause
            | Command::Continue
            | Command::Stop
            // The worker turns it into a stop when its time has come.
            | Command::StopAt(_) => {}
        }
        Ok(())
    }

    fn save(&mut self) -> Result<PathBuf, TrainError> {
        let path = checkpoint::write(self.folder, &mut self.stepper, self.prepared.adapter.as_ref(), &self.state)?;
        self.saved_at = Some(self.state.step);
        let best = self.state.best.map(|best| best.step);
        let step = self.state.step;
        self.controls.emit(Event::Checkpoint { step, path: path.clone(), best: best == Some(step) });
        self.prune();
        Ok(path)
    }

    fn prune(&mut self) {
        let best = self.state.best.map(|best| best.step);
        if let Err(error) = checkpoint::prune(self.folder, self.spec.train.keep, best) {
            self.warn_about_disk(format!("an old checkpoint could not be removed: {error}"));
        }
    }

    fn save_if_possible(&mut self) {
        if self.saved_at == Some(self.state.step) {
            return;
        }
        match self.save() {
            Ok(_) => {}
            // The device is what failed: the next update says so and ends the run.
            Err(error @ TrainError::Engine(_)) => self.controls.emit(Event::Warning {
                rule: "checkpoint".into(),
                message: format!("no checkpoint at step {}: {error}", self.state.step),
                advice: "`tune resume` goes on from the checkpoint before, which is whole".into(),
            }),
            Err(error) => self.warn_about_disk(format!("no checkpoint at step {}: {error}", self.state.step)),
        }
    }

    fn warn_about_disk(&mut self, message: String) {
        let advice = "free space on that disk; training goes on, and the checkpoints before are whole".into();
        self.controls.emit(Event::Warning { rule: "checkpoint".into(), message, advice });
    }

    fn stop(&mut self) -> Result<Outcome, TrainError> {
        let step = self.state.step;
        let path = match self.saved_at {
            Some(at) if at == step => self.folder.checkpoints().join(checkpoint::name(step)),
            _ => self.save()?,
        };
        self.controls.emit(Event::Stopped { step, path: Some(path), reason: "asked to stop".into() });
        Ok(Outcome::Stopped { step })
    }

    fn finish(&mut self, early: bool) -> Result<Outcome, TrainError> {
        // Early stopping gives the best state, a full run the last one.
        let mut eval_loss = self.state.last_eval.map(|eval| eval.loss);
        if early && let Some(best) = self.state.best.filter(|best| best.step != self.state.step) {
            let checkpoint = self.folder.checkpoints().join(checkpoint::name(best.step));
            if checkpoint.exists() {
                checkpoint::restore(&checkpoint, &mut self.stepper)?;
                eval_loss = Some(best.loss);
            }
        }
        // A worker that was killed while it removed old checkpoints left some without a name, and the last one was saved.
        if self.folder.checkpoints().exists() {
            self.prune();
        }
        let path = result::write(self.folder, &mut self.stepper, self.prepared)?;
        self.controls.emit(Event::Finished {
            steps: self.state.step,
            seconds: self.state.seconds,
            train_loss: self.state.loss_sum / self.state.step.max(1) as f64,
            eval_loss,
            path,
        });
        Ok(Outcome::Finished)
    }
}
