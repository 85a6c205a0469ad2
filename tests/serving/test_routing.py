"""Routing on record: what caches make of it, and that a model that decodes uses its experts as the replay says."""

from __future__ import annotations

import pytest
import torch

from seqarch import LanguageModel
from seqarch.layers.channel.expert_cache import ExpertUse
from seqarch.serving import RoutingTrace, record_routing, replay


def routing(*layers: list[int]) -> RoutingTrace:
    """One expert a token."""
    return RoutingTrace(torch.tensor(layers, dtype=torch.int16).T[:, :, None], 8)


@pytest.mark.parametrize(
    ("policy", "places", "hits"),
    [("lru", 2, 1), ("lfu", 2, 3), ("lru", 3, 3), ("lru", 8, 4), ("lru", 1, 1)],
)
def test_policies_give_up_what_they_say(policy, places, hits):
    use = replay(routing([0, 0, 1, 2, 0, 3, 1, 0]), places, policy)
    assert (use.asked, use.hits, use.read, use.ahead, use.bytes) == (8, hits, 8 - hits, 0, 0)
    assert use.hit_rate == hits / 8


def test_the_layer_before_tells_what_to_read():
    """The second layer does as the first, later: all but what has not been seen yet is there in time."""
    first = [0, 1, 2, 3] * 5
    use = replay(routing(first, [7 - expert for expert in first]), 2, "layer_before")
    assert replay(routing(first, [7 - expert for expert in first]), 2, "lru").hits == 0
    assert (use.hits, use.ahead, use.read) == (16, 16, 24)


def test_a_model_that_decodes_uses_its_experts_as_the_replay_says(tmp_path):
    torch.manual_seed(0)
    options = {"vocab_size": 31, "d_model": 32, "depth": 3, "channels": {"moe": {"num_experts": 8, "top_k": 2}}}
    LanguageModel(pattern="gated_delta_net/moe", **options).eval().save_pretrained(tmp_path / "model")
    tokens = torch.randint(31, (1, 25))
    found = record_routing(LanguageModel.from_pretrained(tmp_path / "model"), tokens)
    assert found.index.shape == (25, 3, 2)
    found.save(tmp_path / "routing.json")
    again = RoutingTrace.load(tmp_path / "routing.json")
    assert torch.equal(again.index, found.index)
    assert again.experts == 8
    for policy in ("lru", "lfu", "layer_before"):
        model = LanguageModel.from_pretrained(tmp_path / "model", experts_in_memory=3, expert_policy=policy)
        state = None
        for token in tokens.split(1, dim=1):  # with gradients on, so that no step is captured, which takes a call more
            _, state = model(token, state)
        use = model.expert_store.use
        assert replay(again, 3, policy) == ExpertUse(use.asked, use.hits, use.read, use.ahead)


def test_what_is_no_routing_is_refused(tmp_path):
    with pytest.raises(ValueError, match="places is int 0, expected a number of at least 1"):
        replay(routing([0]), 0)
    with pytest.raises(ValueError, match="unknown expert_policy 'best'"):
        replay(routing([0]), 1, "best")
    with pytest.raises(ValueError, match="expected a model whose experts are as many in all layers, got none"):
        record_routing(LanguageModel(vocab_size=9, d_model=32, pattern="gla", depth=1), torch.zeros(1, 2).long())
    with pytest.raises(ValueError, match="nothing holds no routing"):
        RoutingTrace.load(tmp_path / "nothing")
    for text in ("{", '{"experts": 2}', '{"experts": 2, "index": [[[2]]]}', '{"experts": 2, "index": [[1]]}'):
        (tmp_path / "other").write_text(text)
        with pytest.raises(ValueError, match="other holds no routing"):
            RoutingTrace.load(tmp_path / "other")
