"""attribute: integrated gradients as plain PyTorch computes them, one sample and step at a time; and it leaves no trace."""

import warnings
from collections.abc import Callable, Iterator
from typing import Any, get_args

import pytest
import tiny
import torch
from torch import Tensor

from lens_unlearn.core.errors import (
    ActivationError,
    CorpusError,
    LensUnlearnError,
    ModelError,
    SelectionError,
    SiteError,
)
from lens_unlearn.interventions.ablate import Ablate
from lens_unlearn.model import unembedding as ends
from lens_unlearn.model.hooks import on_logits
from lens_unlearn.model.replay import replaying
from lens_unlearn.model.sites import Site, resolve
from lens_unlearn.neurons import attribution
from lens_unlearn.neurons.attribution import (
    Attribution,
    Completeness,
    Mode,
    Objective,
    Rule,
    attribute,
    critical,
    critical_mask,
)
from lens_unlearn.neurons.maps import NeuronMap

KINDS = ("mlp.post", "attn.z")
POST_NORM = "less than 10% of what"


def questions(lengths: Any = (9, 3, 14, 5, 6, 11), **options: Any) -> Any:
    """Rows whose answers are a random part."""
    return tiny.corpus(lengths, **{"uncounted": 0.5, **options})


def run(model: Any, corpus: Any, sites: Any = KINDS, **options: Any) -> Attribution:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", POST_NORM)
        return attribute(model, corpus, sites, progress=False, **options)


# --- oracles: nothing is shared, batched, replayed or left out --------------------------------------------------------


def samples_of(corpus: Any, mode: str) -> Iterator[tuple[Tensor, list[int]]]:
    """Yield each sample's text and the positions of its counted tokens that something predicts."""
    for row in range(corpus.n_rows):
        start, end = int(corpus.starts[row]), int(corpus.starts[row + 1])
        text, counted = corpus.tokens[start:end].long(), corpus.counted[start:end]
        places = [p for p in range(1, len(text)) if bool(counted[p])]
        if mode == "prefix":
            yield from ((text[: place + 1], [place]) for place in places)
        elif places:
            yield text, places


def slow(
    forward: Callable[[Tensor, Callable[[Tensor], Tensor]], Tensor],
    corpus: Any,
    *,
    steps: int = 5,
    objective: str = "prob",
    mode: str = "teacher_forced",
    rule: str = "right",
) -> tuple[Tensor, float]:
    """Give att(k) = (1/m) sum_j dF / d alpha_k at alpha = c_j, alpha scaling the site, and F(1) - F(0)."""

    def value(text: Tensor, places: list[int], at: float) -> tuple[Tensor, list[Tensor]]:
        alphas: list[Tensor] = []

        def scale(x: Tensor) -> Tensor:
            alphas.append(torch.full_like(x[0, [p - 1 for p in places]], at, requires_grad=True))
            whole = torch.ones_like(x)
            whole[0, [p - 1 for p in places]] = alphas[0]
            return x.detach() * whole

        logs = forward(text[None], scale)[0].log_softmax(-1)
        chosen = [logs[p - 1, text[p]] for p in places]
        return sum({"prob": c.exp(), "logprob": c, "loss": -c}[objective] for c in chosen), alphas

    total, difference = torch.zeros(1), 0.0
    with torch.enable_grad():
        for text, places in samples_of(corpus, mode):
            for step in range(steps):
                f, alphas = value(text, places, (step + (1.0 if rule == "right" else 0.5)) / steps)
                f.backward()
                total = total + alphas[0].grad.double().sum(0) / steps
            difference += float((value(text, places, 1.0)[0] - value(text, places, 0.0)[0]).detach())
    return total, difference


def plain_forward(plain: Any, name: str, site: Site) -> Any:
    """Run a plain Hugging Face model with a function on the input of the module behind a site."""

    def forward(text: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        def hook(_: Any, args: Any) -> Any:
            x = tiny.site_value(name, site.kind, args[0], None, text)
            return (change(x).reshape(args[0].shape), *args[1:])

        handle = tiny.module_of(plain, name, site).register_forward_pre_hook(hook)
        try:
            return plain(text).logits
        finally:
            handle.remove()

    return forward


def lens_forward(model: Any, site: Site) -> Any:
    """Run a TransformerLens model with a function at a hook."""
    name = f"blocks.{site.layer}.{'mlp.hook_post' if site.kind == 'mlp.post' else 'attn.hook_z'}"

    def forward(text: Tensor, change: Callable[[Tensor], Tensor]) -> Tensor:
        return model.run_with_hooks(text, fwd_hooks=[(name, lambda tensor, hook: change(tensor))])

    return forward


def agree(found: Attribution, site: Site, expected: tuple[Tensor, float], rtol: float = 1e-3) -> None:
    size = float(expected[0].abs().max())
    torch.testing.assert_close(found[site], expected[0].double(), rtol=rtol, atol=rtol * size)
    attributed, difference = found.completeness[site]
    assert attributed == pytest.approx(float(expected[0].sum()), rel=rtol, abs=rtol * size)
    assert difference == pytest.approx(expected[1], rel=rtol, abs=rtol * size)


# --- what it computes -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("dense", "mode"),
    [*((name, "teacher_forced") for name in tiny.DENSE), *((name, "prefix") for name in ("gpt2", "gemma2", "phi3"))],
)
def test_it_is_what_plain_pytorch_computes_sample_by_sample(dense: str, mode: Mode) -> None:
    corpus, options = questions((4, 3)), {"steps": 2 if mode == "teacher_forced" else 1, "mode": mode}
    found = run(tiny.model(dense), corpus, **options)
    plain = tiny.hugging_face(dense)
    for site in found:
        agree(found, site, slow(plain_forward(plain, dense, site), corpus, **options))


@pytest.mark.parametrize("rule", get_args(Rule))
@pytest.mark.parametrize("mode", get_args(Mode))
@pytest.mark.parametrize("objective", get_args(Objective))
def test_every_objective_mode_and_rule(objective: Objective, mode: Mode, rule: Rule) -> None:
    corpus, site = questions((5, 3)), Site(0, "mlp.post")
    options: dict[str, Any] = {"objective": objective, "mode": mode, "rule": rule, "steps": 3}
    found = run(tiny.model("neox"), corpus, site, **options)
    agree(found, site, slow(plain_forward(tiny.hugging_face("neox"), "neox", site), corpus, **options))
    predicted = sum(len(places) for _, places in samples_of(corpus, mode))
    assert {**found.provenance, "model": "m"} == {"model": "m", "corpus": "tiny", "tokens": predicted} | options


@pytest.mark.parametrize("name", sorted({*tiny.ALL} - {*tiny.DENSE}))
def test_models_that_only_transformer_lens_has(name: str) -> None:
    corpus, model = questions((5, 3)), tiny.model(name)
    found = run(model, corpus, steps=2)
    for site in found:
        agree(found, site, slow(lens_forward(model, site), corpus, steps=2))


def doubled(name: str) -> Any:
    return tiny.to_bridge(tiny.hugging_face(name).double(), name)


@pytest.mark.parametrize("mode", get_args(Mode))
def test_results_do_not_depend_on_batches_and_padding(mode: Mode) -> None:
    model, corpus = doubled("gpt2"), questions((7, 3, 9))
    expected = run(model, corpus, batch_size=1, mode=mode, steps=2)
    for size in (2, 100):
        found = run(model, corpus, batch_size=size, mode=mode, steps=2)
        for site in expected:
            torch.testing.assert_close(found[site], expected[site], rtol=1e-5, atol=1e-8)
            assert found.completeness[site] == pytest.approx(expected.completeness[site], rel=1e-5)
    # Row by row: a row's share does not depend on its neighbours.
    alone = [corpus.only([row]) for row in range(corpus.n_rows)]
    parts = [run(model, one, mode=mode, steps=2) for one in alone if [*samples_of(one, mode)]]
    for site in expected:
        torch.testing.assert_close(sum(part[site] for part in parts), expected[site], rtol=1e-5, atol=1e-8)


def test_the_modes_agree_on_answers_of_one_token_and_not_on_others() -> None:
    one = tiny.corpus((6, 4))
    last = one.starts[1:] - 1
    one.counted[:] = False
    one.counted[last] = True
    model = doubled("llama")
    both = [run(model, one, "mlp.post", mode=mode) for mode in get_args(Mode)]
    for site in both[0]:
        torch.testing.assert_close(both[0][site], both[1][site], rtol=1e-5, atol=1e-8)
    several = [run(model, questions(), Site(0, "mlp.post"), mode=mode) for mode in get_args(Mode)]
    assert not torch.allclose(several[0].flat(), several[1].flat(), rtol=1e-2)


@pytest.mark.parametrize(("rule", "order"), [("right", 1), ("midpoint", 2)])
def test_the_error_of_completeness_falls_as_it_should(rule: Rule, order: int) -> None:
    model, corpus = doubled("neox"), questions((6, 9))
    errors = []
    for steps in (20, 40):
        found = run(model, corpus, "mlp.post", steps=steps, rule=rule, objective="logprob")
        errors.append([abs(one.attributed - one.difference) for one in found.completeness.values()])
    for layer in range(tiny.LAYERS):
        for coarse, fine in zip(errors, errors[1:]):
            assert coarse[layer] / fine[layer] == pytest.approx(2**order, rel=0.15)
    assert found.completeness[Site(0, "mlp.post")].ratio == pytest.approx(1, abs=0.05)


def test_where_the_objective_is_linear_one_step_is_exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last layer's keys write logits linearly where no norm follows: att_k = sum beta_k W_out[k] W_U[:, y]."""
    from transformer_lens.config import TransformerBridgeConfig
    from transformer_lens.model_bridge import TransformerBridge

    with tiny.quiet(0):
        settings = {**tiny._settings("gpt2"), "normalization_type": None}
        model = TransformerBridge.boot_native(TransformerBridgeConfig(**settings, seed=0)).eval()
    tiny.randomize(model)
    monkeypatch.setattr(
        attribution,
        "_objective",
        lambda end, hidden, targets, objective: end.logits(hidden).gather(1, targets[:, None]).sum(dtype=torch.float64),
    )
    corpus, site = questions((6, 9)), Site(1, "mlp.post")
    seen: list[Tensor] = []
    expected = torch.zeros(64, dtype=torch.float64)
    for text, places in samples_of(corpus, "teacher_forced"):
        with torch.no_grad():
            model.run_with_hooks(text[None], fwd_hooks=[("blocks.1.mlp.hook_post", lambda t, hook: seen.append(t[0]))])
            for p in places:
                direct = model.blocks[1].mlp.W_out @ model.unembed.W_U[:, text[p]]
                expected += (seen[-1][p - 1] * direct).double()
    for rule in get_args(Rule):
        found = run(model, corpus, site, steps=1, rule=rule)
        torch.testing.assert_close(found[site], expected, rtol=1e-4, atol=1e-5)
        assert found.completeness[site].ratio == pytest.approx(1, abs=1e-4)


def test_a_planted_neuron_is_found_first() -> None:
    plain, corpus, answer = tiny.hugging_face("llama"), tiny.corpus((8, 6, 9), tokens=[5, 6, 7]), 200
    corpus.tokens[corpus.starts[1:] - 1] = answer
    corpus.counted[:] = False
    corpus.counted[corpus.starts[1:] - 1] = True
    seen = tiny.plain_activations(plain, "llama", ["mlp.post"], corpus.row(0)[None])[Site(1, "mlp.post")]
    planted = int(seen[0, -2].abs().argmax())
    with torch.no_grad():
        rows = tiny.output_rows(tiny.module_of(plain, "llama", Site(1, "mlp.post")))
        rows[planted] = 3 * torch.sign(seen[0, -2, planted]) * plain.lm_head.weight[answer]
    model = tiny.to_bridge(plain, "llama")
    found = run(model, corpus.only([0]), "mlp.post", objective="logprob", rule="midpoint")
    assert found[Site(1, "mlp.post")].argmax() == planted
    assert bool(critical(found)[Site(1, "mlp.post")][planted])
    against = run(model, corpus.only([0]), "mlp.post", objective="loss", rule="midpoint")
    assert against[Site(1, "mlp.post")].argmin() == planted
    assert (found + against).map(torch.abs).flat().max() < 1e-6


def test_dead_neurons_have_exactly_nothing() -> None:
    """Dead by an ablation around it, which acts in every run; the rest is that of the model with those weights zeroed."""
    chosen = torch.zeros(64, dtype=torch.bool)
    chosen[[3, 60]] = True
    dead = {Site(0, "mlp.post"): chosen, Site(1, "mlp.post"): ~chosen}
    plain, corpus, model = tiny.hugging_face("opt"), questions((6, 3, 9)), tiny.model("opt")
    for site, mask in dead.items():
        tiny.zero_rows(plain, "opt", site, mask)
    with Ablate(NeuronMap(dead)).on(model):
        found = run(model, corpus, "mlp.post", steps=2)
    for site, mask in dead.items():
        assert not bool(found[site][mask].any())
        expected, difference = slow(plain_forward(plain, "opt", site), corpus, steps=2)
        agree(found, site, (torch.where(mask, 0.0, expected), difference))


# --- how it computes it -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["gpt2", "gemma2", "native-neox", *tiny.HOOKED])
def test_what_stands_below_is_not_run_again(name: str) -> None:
    model, corpus, calls = tiny.model(name), questions((6, 6)), [0, 0]
    hooks = [model.hook_dict[f"blocks.{layer}.attn.hook_z"] for layer in range(2)]

    def count(layer: int) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any) -> None:
            calls[layer] += len(tensor)

        return hook

    names = [(f"blocks.{layer}.attn.hook_z", count(layer)) for layer in range(2)]
    assert len({id(hook) for hook in hooks}) == 2
    resolve(model, "mlp.post")  # its probe is not counted
    with model.hooks(fwd_hooks=names):
        run(model, corpus, Site(1, "mlp.post"), steps=4)
    rows = corpus.n_rows
    assert calls[0] == 2 * rows - rows  # the first run only
    assert calls[1] == rows + rows + rows + 4 * rows  # first, the trial of the shortcut, at zero, the steps


def test_only_predicting_positions_are_unembedded_and_no_parameter_has_a_gradient() -> None:
    with tiny.quiet():
        model = tiny.build("gpt2")
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    corpus, seen = questions((20, 20), uncounted=0.8), []
    with replaying(model) as replay, torch.no_grad():
        where = torch.rand(2, 19, generator=torch.Generator().manual_seed(0)) > 0.8
        expected = replay.first(torch.stack([corpus.row(0), corpus.row(1)])[:, :19], where)
        found = replay.again(1, torch.tensor([0, 1]), where)
        assert replay.shortcut
        torch.testing.assert_close(found, expected)
    inner = model.unembed.forward
    model.unembed.__dict__["forward"] = lambda x: (seen.append(x.shape[:2].numel()), inner(x))[1]
    allocated: list[Any] = []
    for parameter in model.parameters():
        parameter.register_hook(allocated.append)
    run(model, corpus)
    assert not allocated
    counted = sum(len(places) for _, places in samples_of(corpus, "teacher_forced"))
    sites = 4
    # Only positions that predict, of the first run, at zero, and on the steps.
    assert sum(seen) == counted * (1 + sites * (1 + 5))
    assert all(parameter.grad is None and parameter.requires_grad for parameter in model.parameters())


def test_logits_of_a_few_positions_stand_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    with tiny.quiet():
        model = tiny.build("gpt2")
    corpus, most = questions((20, 20), uncounted=0.2), []
    expected = run(model, corpus, objective="logprob")
    inner = model.unembed.forward
    model.unembed.__dict__["forward"] = lambda x: (most.append(x.shape[:2].numel()), inner(x))[1]
    monkeypatch.setattr(ends, "AT_ONCE", 3 * tiny.VOCABULARY)
    found = run(model, corpus, objective="logprob")
    assert max(most) == 3
    for site in expected:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-7)
        assert found.completeness[site].ratio == pytest.approx(expected.completeness[site].ratio, rel=1e-5)


@pytest.mark.parametrize("each", ["gpt2", "gemma2", "gpt2-compat", "native-llama", *tiny.HOOKED[:1]])
def test_low_memory_attributes_the_same(each: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model, corpus = tiny.model(each), questions((9, 6, 4))
    expected = run(model, corpus)
    monkeypatch.setattr(ends, "FEW", 0)
    monkeypatch.setattr(ends, "FEW_POSITIONS", 2)
    found = run(model, corpus, memory="low")
    for site in expected:
        largest = float(expected[site].abs().max())
        torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-5 * largest)
        assert found.completeness[site].difference == pytest.approx(expected.completeness[site].difference, rel=1e-4)


def test_hooks_of_the_user_act_once_in_every_run() -> None:
    """Module hooks at a block that is left out, at the last block and at the unembedding."""
    model, corpus = tiny.model("llama"), questions((6, 9))

    def shift(module: Any, args: Any, out: Tensor) -> Tensor:
        return out + torch.linspace(-1, 1, out.shape[-1])

    plain = tiny.hugging_face("llama")
    places = [plain.model.layers[0], plain.model.layers[1], plain.lm_head]
    for module in places:
        module.register_forward_hook(shift)
    handles = [m.register_forward_hook(shift) for m in (model.blocks[0], model.blocks[1], model.unembed)]
    try:
        found = run(model, corpus, "mlp.post", steps=2)
    finally:
        for handle in handles:
            handle.remove()
    for site in found:
        agree(found, site, slow(plain_forward(plain, "llama", site), corpus, steps=2))


def test_where_logits_pass_through_functions_every_run_is_whole() -> None:
    model, corpus, shapes = tiny.model("neox"), questions((6, 9)), set()

    def look(logits: Tensor) -> Tensor:
        shapes.add(tuple(logits.shape[1:]))
        return logits

    expected = run(model, corpus, "mlp.post", steps=2, mode="prefix")
    remove = on_logits(model, look)
    try:
        with replaying(model) as replay:
            assert not replay.shortcut
        found = run(model, corpus, "mlp.post", steps=2, mode="prefix")
    finally:
        remove()
    assert all(shape[0] <= 9 for shape in shapes)
    for site in expected:
        torch.testing.assert_close(found[site], expected[site], rtol=1e-4, atol=1e-7)


def test_a_model_with_another_way_past_its_blocks_is_run_whole() -> None:
    """Its last block also reads what the first one saw, which is nothing where that one is left out."""
    with tiny.quiet():
        model = tiny.build("llama")
    kept: list[Tensor] = []
    first, last = model.blocks[0].attn, model.blocks[1]
    first.register_forward_hook(lambda m, a, out: kept.append(out[0]))
    last.register_forward_hook(lambda m, a, out: out + kept.pop())
    corpus, site = questions((6, 9)), Site(1, "mlp.post")
    with replaying(model) as replay, torch.no_grad():
        replay.first(torch.stack([corpus.row(0)]), torch.ones(1, 7, dtype=torch.bool))
        assert not replay.shortcut
    agree(run(model, corpus, site, steps=2), site, slow(lens_forward(model, site), corpus, steps=2))


@pytest.mark.parametrize(
    ("error", "call"), [(RuntimeError, 0), (RuntimeError, 1), (KeyboardInterrupt, 1), (KeyboardInterrupt, 4)]
)
def test_an_interruption_leaves_nothing_behind(error: type[BaseException], call: int) -> None:
    with tiny.quiet():
        model = tiny.build("gpt2")
    for number, parameter in enumerate(model.parameters()):
        parameter.requires_grad_(number % 2 == 0)
    corpus = questions((6, 9))
    resolve(model, "mlp.post")
    calls = []

    def fail(module: Any, args: Any) -> None:
        calls.append(1)
        if len(calls) > call:
            raise error("stop")

    handle = model.blocks[1].mlp.register_forward_pre_hook(fail)
    before, hooks, grad = tiny.weights_hash(model), tiny.hooks_of(model), torch.is_grad_enabled()
    with pytest.raises(error, match="stop"):
        run(model, corpus, "mlp.post")
    assert (tiny.weights_hash(model), torch.is_grad_enabled()) == (before, grad)
    assert tiny.hooks_of(model) == hooks
    assert not [module for module in model.modules() if "forward" in module.__dict__]
    handle.remove()
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_forward_that_somebody_else_put_there_is_put_back() -> None:
    with tiny.quiet():
        model = tiny.build("llama")
    inner = model.blocks[0].forward
    model.blocks[0].__dict__["forward"] = theirs = lambda *a, **k: inner(*a, **k)
    run(model, questions((6,)))
    assert model.blocks[0].__dict__["forward"] is theirs


def test_it_works_under_no_grad_and_in_inference_mode() -> None:
    model, corpus = tiny.model("llama"), questions((6, 9))
    expected = run(model, corpus, steps=2)
    for mode in (torch.no_grad, torch.inference_mode, torch.enable_grad):
        with mode():
            found = run(model, corpus, steps=2)
        assert found.equals(expected)


# --- refusals ---------------------------------------------------------------------------------------------------------


def test_what_it_refuses() -> None:
    model, corpus = tiny.model("llama"), questions()
    for options, message in (
        ({"objective": "nll"}, "objective='nll' is not known: choose from prob, logprob, loss"),
        ({"mode": "fast"}, "mode='fast' is not known"),
        ({"rule": "left"}, "rule='left' is not known"),
        ({"steps": 0}, "steps=0 is no number of steps"),
    ):
        with pytest.raises(LensUnlearnError, match=message):
            run(model, corpus, **options)
    with pytest.raises(SiteError, match="mixture-of-experts"):
        run(tiny.model("mixtral"), corpus, "mlp.post")
    none = tiny.corpus((1, 1), bos=False)
    with pytest.raises(CorpusError, match="nothing to attribute"):
        run(model, none)
    training = tiny.build("gpt2")
    training.train()
    with pytest.raises(ModelError, match="training mode"):
        run(training, corpus)


def test_half_precision_is_summed_in_double() -> None:
    corpus, options = questions((6, 9)), {"steps": 2, "objective": "logprob"}
    with tiny.quiet():
        half = tiny.build("neox").to(torch.bfloat16)
    found, expected = run(half, corpus, **options), run(tiny.model("neox"), corpus, **options)
    for site in expected:
        assert found[site].dtype == torch.float64
        torch.testing.assert_close(found[site], expected[site], rtol=0.1, atol=0.1 * float(expected[site].abs().max()))


def test_a_token_that_nothing_predicts_is_left_out() -> None:
    model, corpus = tiny.model("llama"), tiny.corpus((1, 6, 4), bos=False)
    found = run(model, corpus, "mlp.post", steps=2)
    assert found.provenance["tokens"] == 5 + 3
    agree(found, Site(0, "mlp.post"), slow(lens_forward(model, Site(0, "mlp.post")), corpus, steps=2))


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_broken_activations_are_named(value: float) -> None:
    model, corpus = tiny.model("llama"), questions()

    def spoil(tensor: Tensor, hook: Any) -> Tensor:
        tensor = tensor.clone()
        tensor[:, 3:, 7] = value
        return tensor

    with (
        model.hooks(fwd_hooks=[("blocks.1.mlp.hook_post", spoil)]),
        pytest.raises(ActivationError, match=r"L1.mlp.post\[7\] is (nan|inf) at a position that predicts"),
    ):
        run(model, corpus, "mlp.post")


def test_a_broken_gradient_is_named() -> None:
    model, corpus = tiny.model("llama"), questions()

    def spoil(tensor: Tensor, hook: Any) -> Tensor:
        return tensor * float("nan") if torch.is_grad_enabled() else tensor

    with (
        model.hooks(fwd_hooks=[("blocks.1.hook_resid_post", spoil)]),
        pytest.raises(ActivationError, match="gradient at L0.mlp.post is NaN"),
    ):
        run(model, corpus, "mlp.post")


def test_a_norm_behind_the_keys_is_warned_of() -> None:
    with pytest.warns(UserWarning, match="less than 10% of what L0.mlp.post, L1.mlp.post add was attributed"):
        found = attribute(tiny.model("gemma2"), questions(), objective="logprob", progress=False)
    assert abs(found.completeness[Site(0, "mlp.post")].ratio) < 0.1


# --- what is critical -------------------------------------------------------------------------------------------------

FIRST, SECOND = Site(0, "mlp.post"), Site(1, "mlp.post")
FORGET = NeuronMap({FIRST: torch.tensor([1.0, 0.3, 0.31, -5.0]), SECOND: torch.tensor([2.0, 1.0, 0.0, 0.1])})
RETAIN = NeuronMap({FIRST: torch.tensor([1.0, 0.0, 0.0, 0.0]), SECOND: torch.tensor([0.0, 0.0, 0.0, 3.0])})


def masks(selection: NeuronMap) -> list[list[int]]:
    return [mask.nonzero()[:, 0].tolist() for _, mask in selection.items()]


def test_critical_is_strictly_above_the_share_of_the_layers_own_maximum() -> None:
    assert masks(critical(FORGET)) == [[0, 2], [0, 1]]
    assert masks(critical(FORGET, 0.99)) == [[0], [0]]
    assert masks(critical(FORGET, 0.01)) == [[0, 1, 2], [0, 1, 3]]
    assert critical(FORGET).is_selection


def test_masks_of_both_corpora() -> None:
    assert masks(critical_mask(FORGET, RETAIN)) == [[0, 2], [0, 1]]
    assert masks(critical_mask(FORGET, RETAIN, kind="forget_only")) == [[2], [0, 1]]
    assert masks(critical_mask(FORGET, RETAIN, kind="union")) == [[0, 2], [0, 1, 3]]
    with pytest.raises(SelectionError, match="leaves no neuron"):
        critical_mask(FORGET, FORGET, kind="forget_only")
    with pytest.raises(SelectionError, match="kind='both' is not known"):
        critical_mask(FORGET, RETAIN, kind="both")  # type: ignore[arg-type]


@pytest.mark.parametrize("threshold", [0.0, 1.0, -0.1, float("nan")])
def test_a_threshold_is_a_share(threshold: float) -> None:
    with pytest.raises(SelectionError, match="above 0 and below 1"):
        critical(FORGET, threshold)


def test_layers_without_anything_positive() -> None:
    negative = NeuronMap(
        {Site(0, "mlp.post"): torch.tensor([-1.0, 0.0]), Site(1, "mlp.post"): torch.tensor([2.0, 1.0])}
    )
    with pytest.warns(UserWarning, match="nothing has a positive attribution at L0.mlp.post: no neuron"):
        assert masks(critical(negative)) == [[], [0, 1]]
    with pytest.raises(SelectionError, match="no neuron has a positive attribution"):
        critical(-FORGET.map(torch.abs))
    with pytest.raises(SelectionError, match="NaN"):
        critical(FORGET * float("nan"))


def test_it_shows_itself() -> None:
    sites = {Site(0, "mlp.post"): torch.tensor([1.0, -0.25]), Site(1, "mlp.post"): torch.tensor([2.0, 1.0])}
    made = Attribution(
        sites, {Site(0, "mlp.post"): Completeness(0.75, 1.0), Site(1, "mlp.post"): Completeness(3.0, 2.5)}, {}
    )
    assert repr(made) == "Attribution(4 neurons, 2 layers, mlp.post: -0.25 to 2, mean 0.938; complete to 0.75-1.20)"
    assert type(made + 1) is NeuronMap
    assert Completeness(0.0, 0.0).ratio != Completeness(0.0, 0.0).ratio
    assert "complete" in made._repr_html_()
