//! Choices between kernels that do the same work: made once per adapter by measurement (`tuning`), else by rule.

use std::collections::BTreeMap;

use super::Lowering;
use super::product::Product;
use crate::backend::EngineError;
use crate::backend::wgpu::storage::View;
use crate::program::Op;

/// Name of the chosen kernel, by what it is chosen for.
pub type Choices = BTreeMap<String, String>;

/// Something to choose a kernel for.
#[derive(Clone, Debug)]
pub struct Question {
    /// The work and its shape.
    pub key: String,
    /// Names of the kernels; the first is the one whose result the others must agree with.
    pub candidates: Vec<String>,
    pub work: Work,
}

#[derive(Clone, Debug)]
pub enum Work {
    Product(Box<Product>),
    Attention(Box<Op>),
    /// RMSNorm, for all that sums over a workgroup.
    Norm(Box<Op>),
}

/// How shaders sum over a workgroup (workgroup_reduce.wgsl), and the two ways.
const SUMS: &str = "sums over a workgroup";
const HALVES: &str = "halves";
const SUBGROUPS: &str = "subgroups";

impl Lowering<'_> {
    /// The candidate chosen for `key`: by measurement if there was one, else the default.
    pub(super) fn choose(
        &mut self,
        key: String,
        candidates: Vec<String>,
        default: usize,
        work: impl FnOnce() -> Work,
    ) -> usize {
        let chosen = self.choices.get(&key).and_then(|name| candidates.iter().position(|known| known == name));
        if let Some(chosen) = chosen {
            self.used.insert(key, candidates[chosen].clone());
            return chosen;
        }
        let open = self.facts.measures && candidates.len() > 1;
        if open && !self.questions.iter().any(|question| question.key == key) {
            self.questions.push(Question { key, candidates, work: work() });
        }
        default
    }

    /// The dispatches of a question's work, by the choices given.
    ///
    /// # Errors
    /// As [`Lowering::op`].
    pub fn work(&mut self, work: &Work) -> Result<(), EngineError> {
        match work {
            Work::Product(product) => self.product(product),
            Work::Attention(op) | Work::Norm(op) => self.op(op),
        }
    }

    /// Asks for the way to sum over workgroups where there are two, which a norm is measured and compared for.
    pub(super) fn choose_sums(&mut self, norm: &Op) {
        if self.facts.subgroups {
            let candidates = vec![HALVES.to_string(), SUBGROUPS.to_string()];
            self.choose(SUMS.into(), candidates, 1, || Work::Norm(Box::new(norm.clone())));
        }
    }

    /// Whether sums over workgroups go through subgroups: where the adapter has them and they did not lose.
    pub(super) fn sums_by_subgroups(&self) -> bool {
        self.facts.subgroups && self.choices.get(SUMS).is_none_or(|name| name == SUBGROUPS)
    }

    /// Where the result of a question's work lies.
    pub fn result(&self, work: &Work) -> View {
        match work {
            Work::Product(product) => product.c,
            Work::Attention(op) => match op.as_ref() {
                Op::Attention { output, .. } => self.view(*output),
                Op::AttentionBackward { grad_qkv, .. } => self.view(*grad_qkv),
                _ => unreachable!("not attention of training"),
            },
            Work::Norm(op) => match op.as_ref() {
                Op::RmsNorm { output, .. } => self.view(*output),
                _ => unreachable!("not a norm"),
            },
        }
    }
}
