"""`Adjust`: what it draws and changes, to the last bit, however many draws are made at once."""

from contextlib import ExitStack

import pytest
import tiny
import torch
from positions_helpers import adjust_of, run, watching

from lens_unlearn.core.counter_rng import key_of, mix, prefixes, uniform
from lens_unlearn.interventions.adjust import Adjust


@pytest.mark.parametrize("together", [0, 10**9], ids=["site by site", "all sites at once"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_is_drawn_and_changed_is_what_the_formula_says_to_the_last_bit(
    dtype: torch.dtype, together: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With or without a cache; saved interventions and stored results rest on that."""
    monkeypatch.setattr("lens_unlearn.interventions.adjust.TOGETHER", together)
    model = tiny.model("gpt2") if dtype == torch.float32 else tiny.build("gpt2").to(dtype)
    act = adjust_of(model, ["mlp.pre", "attn.z"], seed=3)
    sites = list(act.selection)
    with ExitStack() as stack:
        before = {site: stack.enter_context(watching(model, site)) for site in sites}
        live = stack.enter_context(act.on(model))
        after = {site: stack.enter_context(watching(model, site)) for site in sites}
        for tokens in (tiny.some_tokens(3, 11), tiny.some_tokens(2, 1), tiny.some_tokens(3, 11)):
            run(model, tokens)
            assert live.rows is not None
            keys, _ = prefixes(tokens, torch.ones_like(tokens), tokens.new_zeros(len(tokens), 2))
            assert torch.equal(live.rows.keys, keys)
            for site in sites:
                index = act.selection[site].reshape(-1).nonzero()[:, 0]
                x = before[site].pop().flatten(2)
                mf, sf, mr, sr = (getattr(act, name)[site].reshape(-1)[index] for name in Adjust._MAPS)
                z_f, z_r = (x[..., index].float() - mf) / sf, (x[..., index].float() - mr) / sr
                odds = 0.5 * (z_r - z_f) * (z_r + z_f) + (sr / sf).log()
                drawn = uniform(keys[:, :, None] + mix(index + key_of("neuron adjust", 3, str(site))))
                flip = (odds >= 0) & (drawn < odds.sigmoid())
                expected = x.clone()
                expected[..., index] = torch.where(flip, (mr - sr * z_f).to(dtype), x[..., index])
                assert torch.equal(after[site].pop().flatten(2), expected)


def test_draws_are_those_of_earlier_versions() -> None:
    keys, _ = prefixes(torch.tensor([[40, 41]]), torch.ones(1, 2, dtype=torch.int64), torch.zeros(1, 2).long())
    neurons = mix(torch.arange(3) + key_of("neuron adjust", 0, "L0.mlp.pre"))
    drawn = (uniform(keys[:, :, None] + neurons) * 2**24).long()
    assert drawn[0].tolist() == [[4009980, 3094072, 13546952], [3749639, 11862432, 8430201]]
