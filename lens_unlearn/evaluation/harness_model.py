"""A TransformerLens model as lm-evaluation-harness takes models.

Knows what the harness asks of a model (log probabilities, texts, a chat template); knows nothing of tasks, conditions or reports.
"""

from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from lm_eval.api.model import TemplateLM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from lens_unlearn.core.errors import CorpusError, LensUnlearnError
from lens_unlearn.corpora.corpus import Batch
from lens_unlearn.evaluation.generation import continue_rows, require_unbroken
from lens_unlearn.evaluation.question_answering import line_breaks
from lens_unlearn.evaluation.teacher_forcing import outcomes, predict, require_finite, split_rows
from lens_unlearn.model.host import Model, require_eval, require_model
from lens_unlearn.model.special_tokens import bos_token, encode, end_token

__all__ = ["HarnessModel"]


class HarnessModel(TemplateLM):
    """A `TransformerBridge` or `HookedTransformer` as lm-evaluation-harness takes models.

    A text begins with BOS where `read_corpus` has it, once. A continuation that an intervention withholds has constant logits:
    every token has probability 1 / vocabulary, and none is the most probable one. Where it generates, the refusal is what was
    written. A prompt that does not fit the context together with the longest answer stays whole, and the answer is shorter; one
    that does not fit it alone loses its beginning, behind BOS, and `lost` counts it.

    Args:
        model: With a tokenizer, in evaluation mode.
        batch_size: Rows per forward.
        chat: The name of one of the tokenizer's chat templates, or True for its default one.

    Raises:
        CorpusError: If the model has no tokenizer, or no chat template where one is wanted; in use, if a continuation is longer
            than the context.
        ModelError: If the model is in training mode.
        ActivationError: In use, if the model's logits are NaN or infinite.
    """

    def __init__(self, model: Model, batch_size: int = 8, chat: bool | str = False) -> None:
        super().__init__()
        require_model(model)
        require_eval(model)
        if getattr(model, "tokenizer", None) is None:
            raise CorpusError("this model has no tokenizer: tasks are texts")
        if batch_size < 1:
            raise LensUnlearnError(f"batch_size={batch_size} is too small: at least 1")
        self.model, self.tokenizer, self.batch_size = model, model.tokenizer, batch_size
        self._breaks: list[int] | None = None
        self.lost = 0
        """The prompts that lost their beginnings."""
        self._template: str | None = None
        if chat:
            if not self.tokenizer.chat_template:
                raise CorpusError("this model's tokenizer has no chat template: leave apply_chat_template out")
            try:
                self._template = self.tokenizer.get_chat_template(chat if isinstance(chat, str) else None)
            except ValueError as error:
                raise CorpusError(f"the tokenizer has no chat template {chat!r}: {error}") from error

    @property
    def eot_token_id(self) -> int:
        """The token that ends a text."""
        end = end_token(self.model)
        if end is None:
            raise CorpusError(
                "this tokenizer has neither BOS nor an end-of-text token, so a text without a context cannot be scored"
            )
        return end

    @property
    def prefix_token_id(self) -> int:
        """What stands before a text without a context."""
        bos = self.tokenizer.bos_token_id
        return self.eot_token_id if bos is None or bos >= int(self.model.cfg.d_vocab) else int(bos)

    @property
    def tokenizer_name(self) -> str:
        """What the harness calls the tokenizer in the names of its caches."""
        return str(self.tokenizer.name_or_path).replace("/", "__")

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        """Return a conversation as the model was trained on it, up to where it answers."""
        options = {
            "tokenize": False,
            "add_generation_prompt": add_generation_prompt,
            "continue_final_message": not add_generation_prompt,
        }
        return self.tokenizer.apply_chat_template(chat_history, chat_template=self._template, **options)

    def tok_encode(self, string: str, add_special_tokens: bool | None = None, **_: Any) -> list[int]:
        """Return token ids, with BOS before them, once, where `read_corpus` has it."""
        bos = None if add_special_tokens is False else bos_token(self.model)
        return encode(self.tokenizer, string, bos)

    def loglikelihood(self, requests: list[Any], disable_tqdm: bool = True) -> list[tuple[float, bool]]:
        """Return of each continuation its log probability in nats, and whether it is the greedy one."""
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def loglikelihood_rolling(self, requests: list[Any], disable_tqdm: bool = True) -> list[float]:
        """Return the log probability of whole texts, in windows of the context's length."""
        pieces: list[tuple[tuple[str, str], list[int], list[int]]] = []
        owners: list[int] = []
        for owner, request in enumerate(requests):
            windows = get_rolling_token_windows(
                token_list=self.tok_encode(request.args[0], False),
                prefix_token=self.prefix_token_id,
                max_seq_len=int(self.model.cfg.n_ctx),
                context_len=1,
            )
            for window in windows:
                pieces.append((("", ""), *make_disjoint_window(window)))
                owners.append(owner)
        sums = [0.0] * len(requests)
        for owner, (value, _) in zip(owners, self._loglikelihood_tokens(pieces), strict=True):
            sums[owner] += value
        return sums

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], **_: Any
    ) -> list[tuple[float, bool]]:
        context = int(self.model.cfg.n_ctx)
        for _text, _given, continuation in requests:
            if not 0 < len(continuation) <= context:
                raise CorpusError(f"a continuation of {len(continuation)} tokens does not fit a context of {context}")
        rows = [(given + continuation)[-(context + 1) :] for _text, given, continuation in requests]
        self.lost += sum(len(given) + len(continuation) > context + 1 for _text, given, continuation in requests)
        order = sorted(range(len(rows)), key=lambda i: -len(rows[i]))
        found: dict[int, tuple[float, bool]] = {}
        for start in range(0, len(order), self.batch_size):
            part = order[start : start + self.batch_size]
            found |= zip(part, self._score([rows[i] for i in part], [len(requests[i][2]) for i in part]), strict=True)
        return [found[i] for i in range(len(rows))]

    def _score(self, rows: Sequence[Sequence[int]], counts: Sequence[int]) -> Iterator[tuple[float, bool]]:
        """Score the last tokens of rows, so many of each."""
        tokens = [torch.tensor(row) for row in rows]
        masks = [torch.arange(len(row)) >= len(row) - count for row, count in zip(rows, counts, strict=True)]
        batch, quantities = Batch.of(tokens, masks, range(len(rows))), ("loss", "right")
        with torch.no_grad():
            predicted = predict(self.model, batch, last=False)
            (table,) = outcomes([predicted], quantities)
        require_finite(self.model, batch, predicted, table)
        for row in split_rows(predicted, table, quantities):
            yield -float(row["loss"].sum()), bool(row["right"].all())

    def generate_until(self, requests: list[Any], disable_tqdm: bool = True) -> list[str]:
        """Return what is written after each context, up to the first of its stop texts."""
        groups: dict[tuple[tuple[str, ...], int, float], list[int]] = defaultdict(list)
        for number, request in enumerate(requests):
            groups[_generation(request.args[1])].append(number)
        answers: dict[int, str] = {}
        for (until, longest, temperature), numbers in groups.items():
            # continue_rows ends an answer where the context does, so the prompt is what is kept.
            rows = [self._shortened(self.tok_encode(requests[number].args[0]), longest) for number in numbers]
            options: dict[str, Any] = {"max_new_tokens": longest, "temperature": temperature}
            stop = self._line_breaks() if "\n" in until else []
            written = continue_rows(self.model, rows, batch_size=self.batch_size, stop=stop, **options)
            require_unbroken(self.model, rows, written)
            for number, one in zip(numbers, written, strict=True):
                answers[number] = one.text if one.abstained else _cut(one.text, until)
        return [answers[number] for number in range(len(requests))]

    def _shortened(self, ids: list[int], longest: int) -> list[int]:
        """Return a prompt that leaves room for an answer: itself if it is shorter than the context, else its end behind BOS."""
        context = int(self.model.cfg.n_ctx)
        if len(ids) < context:
            return ids
        self.lost += 1
        head = [id for id in ids[:1] if id == bos_token(self.model)]
        room = context - min(longest, context // 2) - len(head)
        return [*head, *ids[-room:]]

    def _line_breaks(self) -> list[int]:
        if self._breaks is None:
            self._breaks = line_breaks(self.model)
        return self._breaks


def _generation(settings: Mapping[str, Any]) -> tuple[tuple[str, ...], int, float]:
    """Read a task's generation settings: stop texts, most tokens, temperature."""
    given = dict(settings)
    until = given.pop("until", None) or ()
    names = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")
    named = [value for name in names if (value := given.pop(name, None)) is not None]
    longest = named[0] if named else 256
    drawn = given.pop("do_sample", None)
    temperature = float(given.pop("temperature", None) or 0.0)
    if drawn is not None:
        temperature = (temperature or 1.0) if drawn else 0.0
    odd = [key for key, value in given.items() if value not in (None, 1, 1.0, False)]
    if odd:
        raise LensUnlearnError(
            f"a task wants text generated with {', '.join(sorted(odd))}, which is not here: leave it out"
        )
    return (until,) if isinstance(until, str) else tuple(until), int(longest), temperature


def _cut(text: str, until: Sequence[str]) -> str:
    return min((text.split(stop, 1)[0] for stop in until if stop), key=len, default=text)
