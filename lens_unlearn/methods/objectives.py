"""The objectives of unlearning: what is minimized on the forget rows, and on the retain rows beside them.

Knows what a model, and the unedited one, give the answer tokens of a step's rows. Knows nothing of optimizers, of the order of
batches, or of where in a model the trained tensors act. A new objective is one function and one line of `OBJECTIVES`.
"""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from lens_unlearn.core.errors import CorpusError
from lens_unlearn.corpora.corpus import Corpus
from lens_unlearn.evaluation.answer_losses import Answers
from lens_unlearn.model.host import Model

__all__ = ["OBJECTIVES", "Objective", "Step", "jensen_shannon", "refusals"]


@dataclass(frozen=True)
class Step:
    """What a step of the training reads, as far as its objective wants it.

    Attributes:
        answers: By part: "forget" (the answers to forget), "refusals" (the same prompts, answered by a refusal), "retain".
        before: By part, each row's mean loss under the unedited model, in nats per answer token.
        unedited: By part, what the unedited model gives the same tokens.
        floor: The loss of a row, in nats per answer token, up to which ascent pushes.
        beta: See `Objective`.
    """

    answers: Mapping[str, Answers]
    before: Mapping[str, Float[Tensor, "rows"]] = field(default_factory=dict)
    unedited: Mapping[str, Answers] = field(default_factory=dict)
    floor: float = math.inf
    beta: float = 1.0

    def compare(
        self, part: str, function: Callable[[Tensor, Tensor, Tensor], Float[Tensor, "tokens"]]
    ) -> Float[Tensor, "n"]:
        """Compare the models' logits of a part, of some tokens at a time.

        Args:
            part: Which part.
            function: Takes the model's logits and the unedited one's, ``[tokens, vocabulary]``, and the tokens that come next;
                returns a number for each.
        """
        answers, unedited = self.answers[part], self.unedited[part]

        def beside(logits: Tensor, tokens: slice) -> Tensor:
            with torch.no_grad():
                before = unedited.logits_of(tokens)
            return function(logits, before, answers.target[tokens])

        return answers.predicted.of_logits(beside)


Term = Callable[[Step], Float[Tensor, ""]]


@dataclass(frozen=True)
class Objective:
    """An objective, as training, checks and the command line see it.

    Attributes:
        forget: What is minimized on the forget rows.
        retain: What is minimized on the retain rows; None if there are none.
        reads: Which parts the forget term reads; the loss that is recorded as "forget" is that of the first.
        before: Of which parts it wants each row's loss under the unedited model.
        unedited: Of which parts it wants the unedited model's logits, which cost one more pass a step.
        beta: Default of its one number; what it means is said at its function.
    """

    forget: Term
    retain: Term | None
    reads: tuple[str, ...] = ("forget",)
    before: tuple[str, ...] = ()
    unedited: tuple[str, ...] = ()
    beta: float = 1.0

    @property
    def ascends(self) -> bool:
        """Whether it pushes the loss of the answers up to the floor."""
        return self.forget is ascent

    @property
    def parts(self) -> tuple[str, ...]:
        """All that a step reads, in order."""
        return (*self.reads, "retain") if self.retain is not None else self.reads


def refusals(corpus: Corpus, model: Model, text: str) -> Corpus:
    """Return the prompts of a corpus, each with a refusal as its answer.

    Raises:
        CorpusError: If the corpus has no prompts, the refusal has no token, or a prompt with it exceeds the context window.
    """
    if not corpus.has_prompts:
        raise CorpusError(f"{corpus.name} has no prompts to refuse: read it as 'question>answer'")
    chat = corpus.asked is not None  # there, a turn begins without a space, and ends with a token of its own
    words = text.strip() if chat else " " + text.strip()
    ids = list(model.tokenizer(words, add_special_tokens=False)["input_ids"])
    end = [corpus.answer_eos] if chat and corpus.answer_eos is not None else []
    refusal = torch.tensor(ids + end, dtype=torch.int32)
    rows = [torch.cat([corpus.prompt(row).int(), refusal]) for row in range(corpus.n_rows)]
    lengths = torch.tensor([len(row) for row in rows])
    if not len(refusal) or int(lengths.max()) > int(model.cfg.n_ctx):
        raise CorpusError(f"the refusal {text!r} has {len(refusal)} tokens: too few, or too many behind these prompts")
    counted = [torch.arange(len(row)) >= len(row) - len(refusal) for row in rows]
    starts = torch.cat([torch.zeros(1, dtype=torch.long), lengths.cumsum(0)])
    return replace(
        corpus,
        name=f"refusals of {corpus.name}",
        tokens=torch.cat(rows),
        counted=torch.cat(counted),
        starts=starts,
        asked=None,
    )


# --- on the forget rows, with L_i the mean loss of row i in nats per answer token --------------------------------------


def ascent(step: Step) -> Float[Tensor, ""]:
    """Return -mean min(L_i, floor), weighted by tokens: a row above the floor has no gradient."""
    # -L has no minimum: without the floor, rows that are forgotten already would be pushed on, and their growing losses would
    # outweigh the retain term, at the cost of everything else. At the loss of facts never seen, more forgetting gains nothing.
    row_losses, n_tokens = step.answers["forget"].per_row()
    return -(row_losses.clamp(max=step.floor) * n_tokens).sum() / n_tokens.sum()


def npo(step: Step) -> Float[Tensor, ""]:
    """Return (2 / beta) mean -log sigmoid(beta (L_i - L_i of the unedited model)) (Zhang et al., arXiv 2404.05868)."""
    # The log ratio of NPO's paper is summed over an answer's tokens, and grows with their number: the sigmoid of a long
    # answer saturates, and its gradient vanishes, after a small change per token, while short answers are still pushed.
    # With means, the push on every row fades as its loss per token rises, on the same scale of 1 / beta nats.
    return _preference(step, step.answers["forget"], lambda losses: losses - step.before["forget"])


def simnpo(step: Step) -> Float[Tensor, ""]:
    """Return (2 / beta) mean -log sigmoid(beta L_i): NPO without the unedited model (Fan et al., arXiv 2410.07163, margin 0)."""
    return _preference(step, step.answers["forget"], lambda losses: losses)


def dpo(step: Step) -> Float[Tensor, ""]:
    """Return (2 / beta) mean -log sigmoid(beta ((L_i - L_i unedited) - (R_i - R_i unedited))), with R_i the refusal's loss.

    The refusal is preferred to the answer (Rafailov et al., arXiv 2305.18290, as TOFU's paper does); means per token, as in `npo`.
    """
    refused, _ = step.answers["refusals"].per_row()
    gained = refused - step.before["refusals"]
    return _preference(step, step.answers["forget"], lambda losses: losses - step.before["forget"] - gained)


def _preference(step: Step, answers: Answers, margin: Callable[[Tensor], Tensor]) -> Float[Tensor, ""]:
    row_losses, n_tokens = answers.per_row()
    return -(2 / step.beta) * F.logsigmoid(step.beta * margin(row_losses))[n_tokens > 0].mean()


def refusing(step: Step) -> Float[Tensor, ""]:
    """Return the loss of the refusal, in nats per token."""
    return step.answers["refusals"].loss


def undial(step: Step) -> Float[Tensor, ""]:
    """Return the cross-entropy to softmax(z - beta e_y), z the unedited logits and y the answer's token, in nats per token.

    Self-distillation with adjusted logits (Dong et al., arXiv 2402.10052).
    """

    def distance(edited: Tensor, unedited: Tensor, target: Tensor) -> Tensor:
        adjusted = unedited.clone()
        adjusted[torch.arange(len(adjusted), device=adjusted.device), target] -= step.beta
        return F.cross_entropy(edited, adjusted.softmax(-1), reduction="none")

    return step.compare("forget", distance).mean()


def surely_refusing(step: Step) -> Float[Tensor, ""]:
    """Return the mean Jensen-Shannon divergence between p and the refusal's token for certain, in nats, at most log 2.

    JensUn (Singh et al., arXiv 2509.02820). It depends on p(y) alone:
    2 JS = (1 - p) log 2 + p log(2 p / (1 + p)) - log((1 + p) / 2).
    """
    loss = step.answers["refusals"].nll
    p = torch.exp(-loss)
    both = torch.log1p(p) - math.log(2)  # of the mixture at y
    return ((1 - p) * math.log(2) - p * (loss + both) - both).mean() / 2


# --- on the retain rows ---------------------------------------------------------------------------------------------------


def likelihood(step: Step) -> Float[Tensor, ""]:
    """Return the mean loss of the retain rows, in nats per token."""
    return step.answers["retain"].loss


def divergence(step: Step) -> Float[Tensor, ""]:
    """Return the mean KL(unedited || edited), in nats per token (TOFU's KL minimization, Maini et al., arXiv 2401.06121)."""

    def distance(edited: Tensor, unedited: Tensor, target: Tensor) -> Tensor:
        return F.kl_div(edited.log_softmax(-1), unedited.log_softmax(-1), log_target=True, reduction="none").sum(-1)

    return step.compare("retain", distance).mean()


def similarity(step: Step) -> Float[Tensor, ""]:
    """Return the mean Jensen-Shannon divergence between the edited and the unedited model, in nats per token (JensUn)."""
    return step.compare("retain", lambda edited, unedited, target: jensen_shannon(edited, unedited)).mean()


def jensen_shannon(first: Float[Tensor, "n vocabulary"], second: Float[Tensor, "n vocabulary"]) -> Float[Tensor, "n"]:
    """Return (KL(p || m) + KL(q || m)) / 2 of two distributions given by logits, with m = (p + q) / 2, in nats."""
    p, q = first.log_softmax(-1), second.log_softmax(-1)
    m = torch.logaddexp(p, q) - math.log(2)
    return (F.kl_div(m, p, log_target=True, reduction="none") + F.kl_div(m, q, log_target=True, reduction="none")).sum(
        -1
    ) / 2


OBJECTIVES: dict[str, Objective] = {
    "graddiff": Objective(ascent, likelihood),
    "npo": Objective(npo, likelihood, before=("forget",)),
    "po": Objective(refusing, likelihood, reads=("refusals",)),
    "gradient_ascent": Objective(ascent, None),
    "kl": Objective(ascent, divergence, unedited=("retain",)),
    "simnpo": Objective(simnpo, likelihood, beta=2.5),
    "dpo": Objective(dpo, likelihood, reads=("forget", "refusals"), before=("forget", "refusals")),
    "undial": Objective(undial, likelihood, unedited=("forget",), beta=10.0),
    "jensun": Objective(surely_refusing, similarity, reads=("refusals",), unedited=("retain",)),
}
"""By the name that `simu(loss=)` takes."""
