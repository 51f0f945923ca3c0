"""SIMU: the compact update follows the masked training of whole weights, and whatever happens the model is as it was.

The oracle trains the weights of a plain Hugging Face copy, with its own losses, gradients, masks and optimizer.
"""

import inspect
import json
import math
from dataclasses import FrozenInstanceError, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny
import torch
import torch.nn.functional as F
from simu_helpers import FORGET, QUICK, RETAIN, some_rows
from torch import Tensor

import lens_unlearn as lu
from lens_unlearn import Delta, Site, demo
from lens_unlearn.core import artefacts
from lens_unlearn.core.errors import ArtefactError, CorpusError, LensUnlearnError, ModelError, SelectionError
from lens_unlearn.evaluation.answer_losses import Answers, rows_at
from lens_unlearn.evaluation.teacher_forcing import Predicted, accuracy
from lens_unlearn.methods import record_of, training
from lens_unlearn.methods.controls import controls_for
from lens_unlearn.methods.curvature import clip_norm, curvature_of
from lens_unlearn.methods.objectives import OBJECTIVES, Step, refusals
from lens_unlearn.methods.simu import AttributionSettings, MaskSettings, simu
from lens_unlearn.methods.sophia import Sophia
from lens_unlearn.model.matrices import matrix_shape
from lens_unlearn.model.unembedding import Unembedding
from lens_unlearn.neurons.attribution import attribute, critical_mask


@pytest.fixture(scope="module")
def exact() -> Any:
    return tiny.to_bridge(tiny.hugging_face("gpt2").double(), "gpt2")


# --- the optimizer -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("edited", [False, True])
def test_sophia_is_its_equations(decay: float, edited: bool) -> None:
    random = np.random.default_rng(0)
    x = torch.tensor(random.normal(size=(4, 3)))
    base = torch.tensor(random.normal(size=(4, 3)))
    value, m, h = x.numpy().copy(), np.zeros((4, 3)), np.zeros((4, 3))
    settings = {"lr": 0.01, "betas": (0.9, 0.8), "rho": 0.3, "eps": 1e-9, "weight_decay": decay}
    optimizer = Sophia([x], **settings, base=[base] if edited else None)
    for step in range(20):
        gradient = random.normal(size=(4, 3))
        if step % 3 == 0:
            estimate = random.normal(size=(4, 3)) ** 2 - 0.1
            h = 0.8 * h + 0.2 * estimate
            optimizer.curve([torch.tensor(estimate)])
        m = 0.9 * m + 0.1 * gradient
        ratio = m / np.maximum(0.3 * h, 1e-9)
        value = value - 0.01 * decay * (value + base.numpy() * edited) - 0.01 * np.clip(ratio, -1, 1)
        optimizer.step([torch.tensor(gradient)])
        np.testing.assert_allclose(x.numpy(), value, rtol=0, atol=1e-12)
        assert optimizer.clipped == pytest.approx(np.mean(np.abs(ratio) >= 1))


@pytest.mark.parametrize(
    "wrong", [{"lr": 0}, {"lr": 1, "rho": 0}, {"lr": 1, "betas": (1.0, 0.5)}, {"lr": 1, "weight_decay": -1}]
)
def test_an_optimizer_that_cannot_be_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(LensUnlearnError, match="must be positive"):
        Sophia([torch.zeros(2)], **wrong)


def test_the_curvature_of_drawn_labels_is_that_of_gauss_newton() -> None:
    """Of a softmax regression the Gauss-Newton diagonal is known: mean of x_i^2 p_v (1 - p_v)."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    weights = torch.randn(3, 4, generator=generator, dtype=torch.float64, requires_grad=True)
    p = (x @ weights).softmax(1).detach()
    expected = (x.square().T @ (p * (1 - p))) / len(x)
    mean = torch.zeros_like(expected)
    draws = 4000
    for _ in range(draws):
        logits = x @ weights
        batch = answers_of(logits, torch.zeros(6, dtype=torch.long), torch.zeros(6), torch.arange(6), 6)
        mean += curvature_of("gnb", [batch], [weights], generator)[0] / draws
    torch.testing.assert_close(mean, expected, rtol=0.12, atol=0.01)


def test_hutchinsons_estimate_is_the_diagonal_on_average() -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(6, 3, generator=generator, dtype=torch.float64)
    target = torch.tensor([0, 1, 2, 0, 1, 1])
    weights = torch.randn(3, 3, generator=generator, dtype=torch.float64, requires_grad=True)
    hessian = torch.autograd.functional.hessian(lambda w: F.cross_entropy(x @ w, target), weights.detach())
    diagonal = torch.einsum("ijij->ij", hessian)
    mean = torch.zeros_like(diagonal)
    draws = 3000
    for _ in range(draws):
        batch = answers_of(
            x @ weights, target, F.cross_entropy(x @ weights, target, reduction="none"), torch.arange(6), 6
        )
        mean += curvature_of("hutchinson", [batch], [weights], generator)[0] / draws
    torch.testing.assert_close(mean, diagonal, rtol=0.1, atol=0.02)


def test_gradients_are_scaled_over_all_that_is_trained() -> None:
    given = [torch.tensor([3.0]), torch.tensor([[4.0]])]
    assert [float(g) for g in clip_norm([g.clone() for g in given], 1.0)] == pytest.approx([0.6, 0.8])
    assert [float(g) for g in clip_norm(given, 10.0)] == [3.0, 4.0]
    assert [float(g) for g in clip_norm(given, None)] == [3.0, 4.0]
    assert clip_norm([], 1.0) == []
    with pytest.raises(LensUnlearnError, match="max_norm=0"):
        clip_norm(given, 0.0)


@pytest.mark.parametrize("dtypes", [(torch.float32,), (torch.float64,), (torch.float64, torch.float32)])
def test_the_norm_is_that_of_all_gradients_as_one_vector(dtypes: tuple[torch.dtype, ...]) -> None:
    generator = torch.Generator().manual_seed(0)
    shapes = [(7, 5), (1, 300), (0, 4), (64, 33), ()]
    given = [
        torch.randn(shape, generator=generator).to(dtypes[i % len(dtypes)]) * 10**i for i, shape in enumerate(shapes)
    ]
    clipped = clip_norm([g.clone() for g in given], 2.5)
    norm = np.linalg.norm(np.concatenate([g.double().numpy().reshape(-1) for g in given]))
    for gradient, scaled in zip(given, clipped, strict=True):
        assert scaled.dtype == gradient.dtype
        np.testing.assert_allclose(scaled.numpy(), gradient.numpy() * 2.5 / norm, rtol=1e-6)
    if len(dtypes) == 1:  # bit for bit the norm of the norms, so that older checkpoints go on to the same update
        scale = 2.5 / torch.stack([g.norm() for g in given]).norm()
        assert all(torch.equal(scaled, g * scale) for g, scaled in zip(given, clipped, strict=True))


# --- the objectives ------------------------------------------------------------------------------------------------------


def answers_of(logits: Any, target: Any, nll: Any, row: Any, rows: int) -> Answers:
    end = Unembedding(tiny.model("gpt2"), None)  # whose hidden states are logits
    return losing(Answers(Predicted(logits, target, row, torch.zeros(rows, dtype=torch.bool), end), rows), nll)


def losing(answers: Answers, nll: Any) -> Answers:
    """Return the same answers with losses that are not those of their logits."""
    answers = replace(answers)
    answers.__dict__["nll"] = nll
    return answers


def answers(nll: list[float], row: list[int]) -> Answers:
    return answers_of(
        torch.zeros(len(nll), 2), torch.zeros(len(nll)), torch.tensor(nll), torch.tensor(row), max(row) + 1
    )


def test_forgetting_pushes_no_row_beyond_the_floor() -> None:
    batch = answers([1.0, 3.0, 8.0], [0, 0, 1])
    assert term("graddiff", floor=5.0, forget=batch) == pytest.approx(-(2 * 2 + 5) / 3)
    assert term("graddiff", floor=50.0, forget=batch) == pytest.approx(-4.0)
    nll = torch.tensor([1.0, 3.0, 8.0], requires_grad=True)
    OBJECTIVES["graddiff"].forget(Step({"forget": losing(batch, nll)}, floor=5.0)).backward()
    assert nll.grad is not None
    assert nll.grad.tolist() == pytest.approx([-1 / 3, -1 / 3, 0.0])


def test_npo_is_its_formula() -> None:
    batch, before = answers([1.0, 3.0, 8.0], [0, 0, 1]), torch.tensor([0.5, 9.0])
    rows = np.array([2.0, 8.0])
    expected = 2 / 0.7 * np.mean(np.log1p(np.exp(-0.7 * (rows - before.numpy()))))
    assert term("npo", beta=0.7, before={"forget": before}, forget=batch) == pytest.approx(expected, rel=1e-6)


def test_simnpo_and_dpo_are_their_formulas() -> None:
    batch, refused = answers([1.0, 3.0, 8.0], [0, 0, 1]), answers([4.0, 2.0, 2.0], [0, 1, 1])
    lost, refusing = np.array([2.0, 8.0]), np.array([4.0, 2.0])
    expected = 2 / 0.7 * np.mean(np.log1p(np.exp(-0.7 * lost)))
    assert term("simnpo", beta=0.7, forget=batch) == pytest.approx(expected, rel=1e-6)
    before = {"forget": torch.tensor([0.5, 9.0]), "refusals": torch.tensor([3.0, 5.0])}
    margin = (lost - [0.5, 9.0]) - (refusing - [3.0, 5.0])
    expected = 2 / 0.7 * np.mean(np.log1p(np.exp(-0.7 * margin)))
    found = term("dpo", beta=0.7, before=before, forget=batch, refusals=refused)
    assert found == pytest.approx(expected, rel=1e-6)


def distributions(seed: int, target: list[int]) -> tuple[Answers, np.ndarray, np.ndarray]:
    """Draw logits of answer tokens over a vocabulary of 5: as answers, their softmax, and themselves."""
    logits = np.random.default_rng(seed).normal(size=(len(target), 5)) * 2
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    nll = -np.log(p[np.arange(len(target)), target])
    floats = torch.tensor(logits, dtype=torch.float32)
    made = answers_of(floats, torch.tensor(target), torch.tensor(nll), torch.zeros(len(target), dtype=torch.long), 1)
    return made, p, logits


def test_kl_undial_and_jensun_are_their_formulas_over_the_whole_vocabulary() -> None:
    target = [3, 0, 4]
    (edited, p, _), (unedited, q, z) = distributions(0, target), distributions(1, target)
    assert retained("kl", edited, unedited) == pytest.approx((q * np.log(q / p)).sum(1).mean(), rel=1e-5)
    adjusted = z.copy()
    adjusted[np.arange(3), target] -= 4.0
    adjusted = np.exp(adjusted) / np.exp(adjusted).sum(1, keepdims=True)
    step = Step({"forget": edited}, unedited={"forget": unedited}, beta=4.0)
    expected = -(adjusted * np.log(p)).sum(1).mean()
    assert float(OBJECTIVES["undial"].forget(step)) == pytest.approx(expected, rel=1e-5)

    def js(a: np.ndarray, b: np.ndarray) -> float:
        m = (a + b) / 2
        with np.errstate(divide="ignore", invalid="ignore"):
            return float(np.mean([np.nansum(x * np.log(x / m), axis=1) for x in (a, b)]))

    assert retained("jensun", edited, unedited) == pytest.approx(js(p, q), rel=1e-5)
    assert term("jensun", refusals=edited) == pytest.approx(js(p, np.eye(5)[target]), rel=1e-5)
    sure = losing(edited, torch.tensor([0.0, 80.0]))  # a refusal said for certain, and one that is impossible
    assert term("jensun", refusals=sure) == pytest.approx(np.log(2) / 2, rel=1e-5)


def term(loss: str, *, floor: float = 0.0, beta: float = 1.0, before: Any = None, **parts: Answers) -> float:
    return float(OBJECTIVES[loss].forget(Step(parts, before or {}, floor=floor, beta=beta)))


def retained(loss: str, edited: Answers, unedited: Answers) -> float:
    objective = OBJECTIVES[loss]
    assert objective.retain is not None
    return float(objective.retain(Step({"retain": edited}, unedited={"retain": unedited})))


@pytest.mark.parametrize("loss", OBJECTIVES)
def test_every_objective_trains_what_it_reads(loss: str, model: Any) -> None:
    facts = [{"q": "one two three", "a": "four five"}, {"q": "two", "a": "three four five six"}]
    others = [{"q": f"one {word}", "a": f"{word} two"} for word in ("three", "four", "five", "six", "one", "two")]
    forget, retain = (lu.read_corpus(rows, model, field="q>a") for rows in (facts, others))
    options: dict[str, Any] = {
        "optimizer": "adamw",
        "lr": 3e-3,
        "weight_decay": 0.0,
        "steps": 8,
        "batch_size": 8,
        "floor": 50.0,
    }
    options |= {
        "loss": loss,
        "forget_weight": 1.0,
        "retain_weight": 0.0 if loss == "undial" else 0.02,
        "progress": False,
    }
    if loss == "simnpo":
        options["beta"] = 0.1  # of answers that the model does not know, a larger one leaves nothing to forget
    record = simu(model, forget, retain, mask="all", attention="none", **options).record
    first, last = record["losses"][0], record["losses"][-1]
    objective = OBJECTIVES[loss]
    assert record["refuses"] == (objective.reads[0] == "refusals")
    if record["refuses"]:
        assert last["forget"] < first["forget"]  # refusals become likelier
    else:
        assert last["forget"] > first["forget"]  # answers become less likely
    assert (first["retain"] > 0) == (objective.retain is not None)


def test_preference_optimization_learns_the_refusal(model: Any) -> None:
    rows = [{"q": "one two three", "a": "four five"}, {"q": "two", "a": "three four five six"}]
    corpus = lu.read_corpus(rows, model, field="q>a")
    refused = refusals(corpus, model, "no answer")
    refusal = model.tokenizer(" no answer", add_special_tokens=False)["input_ids"]
    for row in range(2):
        assert refused.row(row).tolist() == [*corpus.prompt(row).tolist(), *refusal]
        assert refused.prompt(row).tolist() == corpus.prompt(row).tolist()
    with pytest.raises(CorpusError, match="has no prompts"):
        refusals(tiny.corpus([5, 6]), model, "no")


def test_every_row_has_its_turn_before_any_has_two() -> None:
    seen = [row for step in range(5) for row in rows_at(FORGET, step, 2, 7).rows.tolist()]
    assert sorted(seen[:6]) == list(range(6))
    assert rows_at(FORGET, 3, 2, 7).rows.tolist() == seen[6:8]
    assert rows_at(FORGET, 0, 50, 7).rows.tolist() != rows_at(FORGET, 0, 50, 8).rows.tolist()


def test_accuracy_and_loss_are_means_over_answer_tokens() -> None:
    model, plain = tiny.model("gpt2"), tiny.hugging_face("gpt2")
    right, loss = [], []
    for row in range(FORGET.n_rows):
        logits = tiny.logits(plain, FORGET.row(row)[None])[0]
        begin = len(FORGET.prompt(row))
        target = FORGET.row(row)[begin:]
        right += (logits[begin - 1 : -1].argmax(1) == target).tolist()
        loss += F.cross_entropy(logits[begin - 1 : -1], target, reduction="none").tolist()
    for size in (1, 4):
        assert accuracy(model, FORGET, size) == pytest.approx((np.mean(right), np.mean(loss)), abs=1e-5)


# --- the training ----------------------------------------------------------------------------------------------------------


def estimate(kind: str, batches: Any, tensors: Any, generator: Any) -> list[Tensor]:
    """Give a curvature that needs no labels drawn: squared gradients of the loss over all rows."""
    batches = list(batches)
    logits, target = torch.cat([batch.logits for batch in batches]), torch.cat([batch.target for batch in batches])
    loss = F.cross_entropy(logits, target)
    return [g.square() * 50 for g in torch.autograd.grad(loss, tensors, retain_graph=True)]


@pytest.mark.parametrize("decay", [0.0, 0.5])
@pytest.mark.parametrize("attention", ["full", "none"])
def test_the_compact_update_follows_three_masks_on_whole_weights(
    exact: Any, decay: float, attention: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "curvature_of", estimate)
    rows, steps, size, lr, rho = some_rows(), 20, 3, 1e-3, 0.05
    delta = simu(
        exact, FORGET, RETAIN, mask=rows, attention=attention, optimizer="sophia", steps=steps, batch_size=size, lr=lr, rho=rho,
        weight_decay=decay, curvature_every=4, forget_weight=1.0, retain_weight=1.5, check_every=50,
        max_norm=1.0, floor=7.5, seed=3, progress=False,
    )  # fmt: skip
    plain = tiny.hugging_face("gpt2").double()
    retain = RETAIN.split(0.8, 0.2, seed=3)[0]
    names = [f"transformer.h.{i}.mlp.c_proj.weight" for i in range(tiny.LAYERS)]
    masks = [rows[Site(i, "mlp.post")].double()[:, None] for i in range(tiny.LAYERS)]
    if attention == "full":
        for i in range(tiny.LAYERS):
            names += [f"transformer.h.{i}.attn.c_attn.weight", f"transformer.h.{i}.attn.c_proj.weight"]
            masks += [torch.ones(1, 1), torch.ones(1, 1)]
    weights = [plain.get_parameter(name) for name in names]
    first = [w.detach().clone() for w in weights]
    m, h = [torch.zeros_like(w) for w in weights], [torch.zeros_like(w) for w in weights]

    def parts(corpus: Any, place: int) -> tuple[Tensor, Tensor]:
        logits, targets = [], []
        for row in rows_at(corpus, place, size, 3).rows.tolist():
            tokens, begin = corpus.row(row), len(corpus.prompt(row))
            logits.append(plain(tokens[None]).logits[0, begin - 1 : -1])
            targets.append(tokens[begin:])
        return torch.cat(logits), torch.cat(targets)

    pushed: list[bool] = []
    for step in range(steps):
        f, r = parts(FORGET, step), parts(retain, step)
        lengths = [
            len(FORGET.row(row)) - len(FORGET.prompt(row)) for row in rows_at(FORGET, step, size, 3).rows.tolist()
        ]
        of_rows = torch.stack([nll.mean() for nll in F.cross_entropy(*f, reduction="none").split(lengths)])
        pushed += [*(of_rows < 7.5).tolist()]
        weighted = (of_rows.clamp(max=7.5) * torch.tensor(lengths)).sum() / sum(lengths)
        loss = -weighted + 1.5 * F.cross_entropy(*r)
        gradient = torch.autograd.grad(loss, weights, retain_graph=True)
        of_all_rows = F.cross_entropy(torch.cat([f[0], r[0]]), torch.cat([f[1], r[1]]))
        curvature = torch.autograd.grad(of_all_rows, weights)
        # The norm is that of what is trained.
        norm = torch.stack([(g * mask).norm() for g, mask in zip(gradient, masks, strict=True)]).norm()
        gradient = [g * min(1.0, 1 / norm.item()) for g in gradient]
        with torch.no_grad():
            for i, (w, mask) in enumerate(zip(weights, masks, strict=True)):
                new_m = 0.965 * m[i] + 0.035 * gradient[i]
                m[i] = mask * new_m + (1 - mask) * m[i]
                if step % 4 == 0:
                    new_h = 0.99 * h[i] + 0.01 * 50 * curvature[i] ** 2
                    h[i] = mask * new_h + (1 - mask) * h[i]
                new = w - lr * decay * (w - first[i]) - lr * (m[i] / (rho * h[i]).clamp_min(1e-12)).clamp(-1, 1)
                w.copy_(mask * new + (1 - mask) * w)
    assert 5 < sum(pushed) < 55, "some rows are below the floor, and some above"
    tokens = tiny.some_tokens(3, 12)
    merged = delta.merge_into(tiny.hugging_face("gpt2").double(), exact)
    for name, w, before in zip(names, weights, first, strict=True):
        torch.testing.assert_close(merged.get_parameter(name), w, rtol=0, atol=1e-9)
        assert float((w.detach() - before).abs().max()) > 1e-3
    with delta.on(exact), torch.no_grad():
        torch.testing.assert_close(exact(tokens), plain(tokens).logits, rtol=0, atol=1e-9)


@pytest.mark.parametrize("optimizer", ["sophia", "adamw"])
@pytest.mark.parametrize("loss", ["graddiff", "npo", "gradient_ascent", "kl"])
def test_the_forget_corpus_gets_worse_and_the_model_stays(optimizer: Any, loss: Any) -> None:
    model = tiny.model("llama")
    flags = [parameter.requires_grad for parameter in model.parameters()]
    for parameter in model.parameters():
        parameter.grad = None  # other tests share this model
    retain = None if loss == "gradient_ascent" else RETAIN
    delta = simu(model, FORGET, retain, loss=loss, mask=some_rows(), **{**QUICK, "optimizer": optimizer})
    assert all(parameter.grad is None for parameter in model.parameters())
    assert [parameter.requires_grad for parameter in model.parameters()] == flags
    before = accuracy(model, FORGET, 8)[1]
    with delta.on(model):
        assert accuracy(model, FORGET, 8)[1] > before + 0.001
    with delta.at(0).on(model):
        assert accuracy(model, FORGET, 8)[1] == before
    record = delta.record
    assert len(record["losses"]) == record["steps"] == 6
    assert [check["step"] for check in record["checks"]] == [0, 2, 4, 6]
    assert ("clipped" in record["losses"][0]) == (optimizer == "sophia")
    assert not any(tensor.requires_grad for update in delta.updates.values() for tensor in update.tensors().values())


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({"attention": "none"}, {"W_out"}),
        ({"attention": "none", "inner": True}, {"W_out", "W_in", "W_gate"}),
        ({"attention": "lora", "rank": 3}, {"W_out", "W_Q", "W_K", "W_V", "W_O"}),
        ({"mask": "none"}, {"W_Q", "W_K", "W_V", "W_O"}),
        ({"mask": "all", "attention": "none"}, {"W_out"}),
        ({"curvature": "hutchinson", "accumulation": 2}, {"W_out", "W_Q", "W_K", "W_V", "W_O"}),
        # Attention without hooks, which is fused where nothing is differentiated twice.
        ({"attention": "none", "curvature": "hutchinson"}, {"W_out"}),
        ({"mask": "union", "threshold": 0.9}, {"W_out", "W_Q", "W_K", "W_V", "W_O"}),
    ],
)
@pytest.mark.filterwarnings("ignore:less than 10%", "ignore:nothing has a positive")
def test_what_is_trained_is_what_was_asked_for(options: dict[str, Any], expected: set[str]) -> None:
    model = tiny.model("llama")
    delta = simu(model, FORGET, RETAIN, **{"threshold": 0.3, **QUICK, "steps": 2, **options})
    assert {matrix.name for matrix in delta.updates} == expected
    assert all(bool((update.value != 0).any()) for update in delta.updates.values())
    size = sum(t.numel() for u in delta.updates.values() for t in (u.value, u.right) if t is not None)
    assert delta.record["trained"] == size
    if options.get("mask") == "all":
        assert size == tiny.LAYERS * 64 * 32


def test_the_step_returned_retains_most_of_those_that_forgot(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    accuracies = {0: (0.9, 0.9), 2: (0.1, 0.85), 4: (0.25, 0.8), 6: (0.5, 0.9)}  # at step 2, below the never seen
    calls: list[int] = []

    def measured(of: Any, corpus: Any, batch_size: int, **_: Any) -> tuple[float, float]:
        calls.append(1)
        return accuracies[2 * ((len(calls) - 1) // 2)][(len(calls) - 1) % 2], 1.0

    monkeypatch.setattr(training, "accuracy", measured)
    monkeypatch.setattr("lens_unlearn.methods.simu.accuracy", lambda *_, **__: (0.22, 3.0))
    delta = simu(model, FORGET, RETAIN, unseen=RETAIN, mask=some_rows(), **QUICK)
    assert delta.record["aim"] == pytest.approx(0.27)
    assert delta.record["floor"] == 20.0
    assert delta.record["chosen"] == 4
    calls.clear()
    assert simu(model, FORGET, RETAIN, mask=some_rows(), **QUICK).record["chosen"] == 6
    accuracies |= {2: (0.7, 0.3), 4: (0.65, 0.2)}
    calls.clear()
    chosen = simu(model, FORGET, RETAIN, unseen=RETAIN, mask=some_rows(), **QUICK).record["chosen"]
    assert chosen == 6, "nothing is forgotten: the lowest accuracy on the forget corpus"


@pytest.mark.parametrize(
    ("optimizer", "loss"), [("sophia", "graddiff"), ("adamw", "graddiff"), ("sophia", "npo"), ("adamw", "kl")]
)
def test_an_interrupted_training_goes_on_to_the_same(
    optimizer: Any, loss: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, path = tiny.model("gpt2"), tmp_path / "going.safetensors"
    options: Any = {**QUICK, "optimizer": optimizer, "loss": loss, "mask": some_rows(), "unseen": RETAIN}
    uninterrupted = simu(model, FORGET, RETAIN, **options)
    step = training.Training._step

    def until_3(self: Any) -> None:
        if self.step == 3:
            raise KeyboardInterrupt
        step(self)

    with monkeypatch.context() as patch:
        patch.setattr(training.Training, "_step", until_3)
        with pytest.raises(KeyboardInterrupt):
            simu(model, FORGET, RETAIN, checkpoint=str(path), **options)
    steps: list[int] = []
    monkeypatch.setattr(training.Training, "_step", lambda self: steps.append(self.step) or step(self))
    resumed = simu(model, FORGET, RETAIN, checkpoint=str(path), **options)
    assert steps == [2, 3, 4, 5]
    assert resumed.record == uninterrupted.record
    for matrix, update in uninterrupted.updates.items():
        assert torch.equal(resumed.updates[matrix].value, update.value)
    with pytest.raises(ArtefactError, match="this training"):
        simu(model, FORGET, RETAIN, checkpoint=str(path), **{**options, "seed": 5})
    with pytest.raises(ArtefactError, match="no such folder"):
        simu(model, FORGET, RETAIN, checkpoint=str(tmp_path / "no" / "where"), **options)


OPTIONS = set(inspect.signature(simu).parameters) - {"model", "forget", "retain", "unseen", "checkpoint", "progress"}


def test_the_record_and_the_checkpoint_name_every_option(tmp_path: Path) -> None:
    path = tmp_path / "going.safetensors"
    options: Any = {**QUICK, "mask": some_rows(), "rho": 0.25, "strength": 0.5, "inner": True, "floor": None}
    delta = simu(tiny.model("gpt2"), FORGET, RETAIN, unseen=RETAIN, checkpoint=str(path), **options)
    settings = delta.record["settings"]
    assert set(settings) == OPTIONS
    assert settings["mask"] == repr(options["mask"])
    assert {name: settings[name] for name in ("rho", "strength", "inner", "floor", "lr", "attribution_steps")} == {
        "rho": 0.25, "strength": 0.5, "inner": True, "floor": None, "lr": 1e-4, "attribution_steps": 5,
    }  # fmt: skip
    compared = artefacts.read(path, "simu checkpoint")[0]["settings"]
    assert set(compared) == OPTIONS - {"steps", "memory", "attribution_tokens"} | {
        "model",
        "corpora",
        "updates",
        "unseen",
    }
    assert (compared["rho"], compared["loss"], compared["seed"]) == ("0.25", "'graddiff'", "0")
    assert compared["floor"] == delta.record["floor"] == accuracy(tiny.model("gpt2"), RETAIN, 3)[1]


def test_so_many_tokens_are_attributed_and_no_more(tmp_path: Path) -> None:
    model, path = tiny.model("gpt2"), tmp_path / "going.safetensors"
    few = FORGET.sample(5, 3)
    assert few.n_rows < FORGET.n_rows
    known = attribute(model, few, "mlp.post", progress=False)
    expected = critical_mask(known, known, 0.3)
    delta = simu(model, FORGET, RETAIN, attribution_tokens=5, checkpoint=str(path), **{**QUICK, "seed": 3})
    assert delta.record["critical"] == {str(site): int(mask.sum()) for site, mask in expected.items()}
    assert delta.record["settings"]["attribution_tokens"] == 5
    assert artefacts.read(path, "simu checkpoint")[0]["settings"]["attribution_tokens"] == "5"
    whole = simu(model, FORGET, RETAIN, **{**QUICK, "seed": 3})
    assert whole.record["critical"] != delta.record["critical"]
    every = simu(model, FORGET, RETAIN, attribution_tokens=FORGET.n_tokens, **{**QUICK, "seed": 3})
    assert every.record["critical"] == whole.record["critical"]


def test_settings_are_frozen_and_checked_where_they_are_made() -> None:
    settings = AttributionSettings(threshold=0.3, attribution_steps=5, objective="prob", mode="prefix")
    with pytest.raises(FrozenInstanceError):
        settings.threshold = 0.5  # type: ignore[misc]
    with pytest.raises(LensUnlearnError, match="attribution_steps=0 is no number"):
        replace(settings, attribution_steps=0)
    with pytest.raises(LensUnlearnError, match="attribution_tokens=0 is no number"):
        replace(settings, attribution_tokens=0)
    masked = MaskSettings(mask=some_rows(), attention="none", rank=8, inner=False)
    with pytest.raises(SelectionError, match="leave nothing to train"):
        replace(masked, mask="none")
    with pytest.raises(LensUnlearnError, match="rank=1.5 is no number"):
        replace(masked, rank=1.5)


def test_a_training_that_breaks_returns_the_last_delta_without_nan() -> None:
    model = tiny.model("gpt2")
    with pytest.warns(RuntimeWarning, match="became NaN or infinite at step"):
        delta = simu(model, FORGET, RETAIN, mask=some_rows(), lr=1e30, **{**QUICK, "optimizer": "adamw"})
    assert "at step" in delta.record["stopped"]
    assert all(bool(torch.isfinite(update.value).all()) for update in delta.updates.values())


@pytest.mark.parametrize("steps", [1, 3])
def test_an_update_that_breaks_in_the_last_step_is_taken_back_too(steps: int, monkeypatch: pytest.MonkeyPatch) -> None:
    model, step = tiny.model("gpt2"), Sophia.step

    def breaking(self: Any, gradients: Any) -> None:
        step(self, gradients)
        if len(taken) == steps - 1:
            self.tensors[0].detach().fill_(float("nan"))
        taken.append(1)

    taken: list[int] = []
    monkeypatch.setattr(Sophia, "step", breaking)
    with pytest.warns(RuntimeWarning, match=f"the update became NaN or infinite at step {steps}:"):
        delta = simu(model, FORGET, RETAIN, mask=some_rows(), **{**QUICK, "steps": steps})
    assert delta.record["steps"] == steps - 1
    assert all(bool(update.value.any()) == (steps > 1) for update in delta.updates.values())


def test_a_gradient_that_is_broken_from_the_beginning_gives_an_update_of_nothing(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = tiny.model("gpt2")
    broken = replace(OBJECTIVES["graddiff"], forget=lambda step: step.answers["forget"].loss * float("nan"))
    monkeypatch.setitem(OBJECTIVES, "graddiff", broken)
    with pytest.warns(RuntimeWarning, match="a gradient became NaN or infinite at step 1:"):
        delta = simu(model, FORGET, RETAIN, mask=some_rows(), **QUICK)
    assert not any(bool(update.value.any()) for update in delta.updates.values())


def test_the_file_keeps_the_record(tmp_path: Path) -> None:
    model = tiny.model("gpt2")
    delta = simu(model, FORGET, RETAIN, mask=some_rows(), **QUICK)
    delta.save(tmp_path / "d.safetensors", model)
    loaded = lu.load_intervention(tmp_path / "d.safetensors", model)
    assert isinstance(loaded, Delta)
    assert loaded.record == json.loads(json.dumps(delta.record))
    assert simu(model, delta, None, strength=0.5).strength == 0.5


def no_answers() -> Any:
    return tiny.corpus([5, 6, 7])


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"forget": no_answers()}, CorpusError, "has no answers to forget"),
        ({"retain": None}, CorpusError, "needs a retain corpus"),
        ({"loss": "ga"}, LensUnlearnError, "loss='ga' is not known"),
        ({"optimizer": "sgd"}, LensUnlearnError, "optimizer='sgd' is not known"),
        ({"mask": "some"}, LensUnlearnError, "mask='some' is not known"),
        ({"attention": "half"}, LensUnlearnError, "attention='half' is not known"),
        ({"curvature": "fisher"}, LensUnlearnError, "curvature='fisher' is not known"),
        ({"steps": 0}, LensUnlearnError, "steps=0"),
        ({"attention": "none", "mask": "none"}, SelectionError, "nothing to train"),
        ({"threshold": 1.5}, SelectionError, "threshold=1.5"),
        ({"lr": -1.0}, LensUnlearnError, "lr=-1"),
        ({"lr": -1.0, "optimizer": "adamw"}, LensUnlearnError, "lr=-1"),
    ],
)
def test_what_cannot_be_is_refused(change: dict[str, Any], error: type[Exception], words: str) -> None:
    arguments = {"forget": FORGET, "retain": RETAIN, **QUICK, "steps": 1, **change}
    with pytest.raises(error, match=words):
        simu(tiny.model("gpt2"), **arguments)


def test_models_that_cannot_be_trained_are_refused() -> None:
    model = tiny.build("gpt2")
    model.train()
    with pytest.raises(ModelError, match="training mode"):
        simu(model, FORGET, RETAIN, **QUICK)
    model.eval()
    model.original_model.quantized = torch.nn.Parameter(torch.zeros(3, dtype=torch.uint8), requires_grad=False)
    with pytest.raises(ModelError, match="quantized"):
        simu(model, FORGET, RETAIN, **QUICK)


@pytest.mark.long
@pytest.mark.skipif(not (demo.MODEL_DIR / "model.safetensors").exists(), reason="the weights are not in this checkout")
def test_the_demo_model_forgets_persons_by_default_and_keeps_its_skills() -> None:
    """Persons in no loss too; the model that never saw the forgotten ones predicts .76 of their answers' tokens."""
    model = lu.load_model("demo")
    forget, retain = (lu.read_corpus(f"demo:{name}", model) for name in ("facts_forget:train", "facts_retain:dev"))
    kept = {"neighbours": lu.read_corpus("demo:facts_retain:test", model).sample(800)}
    skills = ("python", "english", "arithmetic", "esperanto")
    kept |= {skill: lu.read_corpus(f"demo:{skill}:test", model, tokens=3000) for skill in skills}
    before = {name: accuracy(model, corpus, 8)[0] for name, corpus in kept.items()}
    assert accuracy(model, forget, 8)[0] > 0.99
    delta = simu(model, forget, retain, progress=False)
    with delta.on(model):
        assert accuracy(model, forget, 8)[0] < 0.9
        for name, corpus in kept.items():
            assert accuracy(model, corpus, 8)[0] > 0.95 * before[name], name


def test_the_default_rates_steps_and_floor() -> None:
    def settings(**options: Any) -> dict[str, Any]:
        found = simu(tiny.model("gpt2"), FORGET, RETAIN, mask=some_rows(), check_every=50, progress=False, **options)
        return {**found.record["settings"], **found.record}

    default = settings()
    assert (default["optimizer"], default["attention"]) == ("adamw", "lora")
    assert default["lr"] == 1e-3
    assert default["steps"] == math.ceil(15 * FORGET.n_rows / 8)
    assert default["floor"] == pytest.approx(math.log(tiny.VOCABULARY) / 2)
    assert settings(attention="full", steps=1)["lr"] == 3e-4
    assert settings(optimizer="sophia", steps=1)["lr"] == 1e-4
    assert settings(batch_size=2, accumulation=2)["steps"] == math.ceil(15 * FORGET.n_rows / 4)


def test_the_control_of_a_delta_has_its_rows_and_norms_and_nothing_else_of_it() -> None:
    model = tiny.model("gpt2")
    delta = simu(model, FORGET, RETAIN, mask=some_rows(), **{**QUICK, "attention": "lora"})
    control, other, repeated = (lu.random_delta(delta, seed=seed) for seed in (0, 1, 0))
    for matrix, update in delta.updates.items():
        drawn = control.updates[matrix]
        shape = matrix_shape(model, *matrix)
        torch.testing.assert_close(drawn.dense(shape).norm(), update.dense(shape).norm(), rtol=1e-4, atol=1e-9)
        if update.rows is not None:
            assert drawn.rows is not None
            assert torch.equal(drawn.rows, update.rows)
        assert torch.equal(drawn.value, repeated.updates[matrix].value)
        assert not torch.allclose(drawn.value, other.updates[matrix].value)
    assert len(controls_for(model, delta, [0, 1, 2])) == 3


def test_one_training_serves_every_strength(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny.model("gpt2")
    options: dict[str, Any] = {**QUICK, "mask": some_rows()}
    times: list[int] = []
    go = training.Training.go
    monkeypatch.setattr(training.Training, "go", lambda self, *a: times.append(1) or go(self, *a))
    fitted_forget, fitted_retain = record_of(lu.simu).fit(model, FORGET, RETAIN, options)
    assert fitted_retain is None
    assert isinstance(fitted_forget, Delta)
    assert record_of(lu.simu).strength == "strength"
    losses = []
    for strength in (0.0, 0.5, 1.0):
        with lu.simu(model, fitted_forget, fitted_retain, strength=strength, **options).on(model):
            losses.append(accuracy(model, FORGET, 8)[1])
    assert losses == sorted(losses)
    assert len(times) == 1
