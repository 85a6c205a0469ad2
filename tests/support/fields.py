"""Every field of another library's configurations, varied one at a time, and what its models then compute.

A model's outputs depend on its configuration by the attributes that it reads while it is made and run. These are
recorded, so that configurations which differ in others only share one model.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from seqarch.interop import FAMILIES, from_transformers, lm_config
from tests.support.families import VARIANTS, class_of, randomised

TOKENS = torch.randint(3, 53, (1, 11), generator=torch.Generator().manual_seed(1))

ROTARY = [
    {"rope_type": "default", "rope_theta": 300.0},
    {"rope_theta": 300.0, "partial_rotary_factor": 0.5},
    {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4},
    {"full_attention": {"rope_type": "default", "rope_theta": 300.0}},
]
MORE: dict[str, list[Any]] = {
    "_block_types": [["attention"]],
    "attn": [{"layers": [1], "num_heads": 4}],
    "first_k_dense_replace": [0, 2],
    "clip_qkv": [0.5],
    "index_topk_pattern": ["FSS", ["full", "full", "shared"], "SSS", "FXS"],
    "index_topk_freq": [0, 3],
    "index_skip_topk_offset": [0, 1],
    "indexer_types": [["shared", "full", "full"], ["full", "shared", "none"]],
    "no_rope_layer_interval": [2],
    "no_rope_layers": [[0, 1], [1, 1], [1, 2]],
    "full_attention_interval": [2, 3],
    "hidden_act": ["relu", "gelu"],
    "hidden_activation": ["relu", "gelu"],
    "mamba_hidden_act": ["relu"],
    "mlp_hidden_act": ["relu"],
    "weight_mode": ["fused"],
    "linear_attn_config": [
        {"full_attn_layers": [1], "kda_layers": [2, 3]},
        {"head_dim": 12, "num_heads": 3},
        {"short_conv_kernel_size": 2},
        {"full_attn_layers": [1]},
    ],
    "head_dim": [4, 8],
    "partial_rotary_factor": [0.5, 1.0],
    "rope_parameters": ROTARY,
    "rope_scaling": ROTARY,
    "rope_theta": [300.0],
    "sliding_window": [3],
    "sliding_window_pattern": [2],
    "rope_local_base_freq": [300.0],
    "use_bidirectional_attention": [True, False],
    "time_step_rank": ["auto", 3],
}
"""Further values, and fields that files may have and objects do not."""

NOT_READ = ("architectures", "auto_map", "dtype", "model_type", "transformers_version")


def plain(config: Any, whole: bool = True) -> dict[str, Any]:
    """What its ``config.json`` holds: all fields, or those alone that differ from the defaults."""
    return _decoded(json.loads(config.to_json_string(use_diff=not whole)))


def _decoded(value: Any) -> Any:
    if isinstance(value, dict):
        return float(value["__float__"]) if "__float__" in value else {k: _decoded(v) for k, v in value.items()}
    return [_decoded(each) for each in value] if isinstance(value, list) else value


def others(value: Any) -> list[Any]:
    """Values of the same type, and none."""
    found: list[Any] = []
    if isinstance(value, bool):
        found = [not value]
    elif isinstance(value, int):
        found = [2 * value, max(1, value // 2)]
    elif isinstance(value, float):
        found = [0.5 * min(value, 1e9) + 0.3]
    elif isinstance(value, list) and value:
        found = [value[::-1], value[1:] + value[:1], value[:-1]]
        found += [[0.5 * each + 0.3 for each in value]] if isinstance(value[0], float) else []
    return [each for each in found if each != value] + [None]


def pool(name: str, alone: bool = False) -> dict[str, list[Any]]:
    """The fields of a family with other values of each, and, unless it is ``alone``, of all others with two each."""
    values: dict[str, list[Any]] = {}
    for each in (name, *(() if alone else VARIANTS)):
        config = VARIANTS[each][0]()
        found = plain(config)
        found |= {alias: found.get(field) for alias, field in type(config).attribute_map.items()}
        for field in found.keys() - values.keys() - set(NOT_READ):
            values[field] = others(found[field]) if each == name else [found[field], others(found[field])[0]]
    wanted = {*values, *_fields_here(name)} if alone else MORE.keys()
    more = {field: [*values.get(field, []), *found, None] for field, found in MORE.items() if field in wanted}
    unique = {field: {json.dumps(each): each for each in found} for field, found in {**values, **more}.items()}
    return {field: list(found.values()) for field, found in sorted(unique.items())}


def _fields_here(name: str) -> set[str]:
    """The fields that the family's table reads."""
    settings = FAMILIES[VARIANTS[name][0]().model_type].Settings
    return {*settings.__dataclass_fields__, *settings.only, *settings.aliases}


@dataclass
class Edit:
    """A configuration in which one field was changed or left out.

    Attributes:
        name: of the field.
        text: what was done, for an error.
        theirs: their object; ``None`` where they refuse to make it.
        ours: what is given to this library: the object, or a file's dictionary.
    """

    name: str
    text: str
    theirs: Any
    ours: Any


def edits(name: str, alone: bool = False) -> Iterator[Edit]:
    """The edits of a family's configuration: of its object, of its file, and of its file without defaults.

    Args:
        alone: without the fields of all other families, and of the files the first only.

    Fields that are no family's own, nor named above, are varied in the first file only: what is not known of a
    configuration says nothing more beside fewer fields.
    """
    base = VARIANTS[name][0]()
    files = {"config.json": plain(base)}
    if not alone:
        files["config.json without defaults"] = plain(base, whole=False)
    known = {*files["config.json"], *MORE, *_fields_here(name)}
    for field, values in pool(name, alone).items():
        for value in values:
            for kind, file in list(files.items())[: None if field in known else 1]:
                if field not in file or file[field] != value:
                    edited = {**file, field: value}
                    theirs = _made(type(base), edited)
                    yield Edit(field, f"{field}={value!r} in {kind}", theirs, edited)
                    yield Edit(field, f"the object of {field}={value!r} in {kind}", theirs, theirs)
            changed = copy.deepcopy(base)
            try:
                setattr(changed, field, copy.deepcopy(value))
            except Exception:  # as they refuse it
                continue
            yield Edit(field, f"{field}={value!r} of the object", changed, changed)
        if field in files["config.json"]:
            edited = {name: value for name, value in files["config.json"].items() if name != field}
            yield Edit(field, f"{field} left out", _made(type(base), edited), edited)


def _made(kind: Any, values: dict[str, Any]) -> Any:
    try:
        return kind.from_dict(copy.deepcopy(values))
    except Exception:  # of whatever kind: they refuse it
        return None


class Models:
    """Their models of one family in training mode, one per set of values of the attributes that models read."""

    def __init__(self, name: str):
        self.model, self.base = class_of(name), VARIANTS[name][0]()
        self.read = self._recorded()
        self.base_key = self.key(self.base)
        self.known: dict[str, tuple[dict[str, Tensor], Tensor] | None] = {}
        self.imported: dict[str, Tensor] = {}

    def _recorded(self) -> set[str]:
        read, own = set(), type(self.base)

        class Recorded(own):
            def __getattribute__(self, key: str) -> Any:
                read.add(key)
                return super().__getattribute__(key)

        config = copy.deepcopy(self.base)
        object.__setattr__(config, "__class__", Recorded)
        read.clear()
        self._run(config)
        return {own.attribute_map.get(name, name) for name in read}

    def _run(self, config: Any) -> tuple[dict[str, Tensor], Tensor]:
        model = randomised(lambda: self.model(config)).train()
        with torch.no_grad():
            return model.state_dict(), model(TOKENS, use_cache=False).logits

    def ours(self, config: Any, state: dict[str, Tensor]) -> Tensor:
        """The logits of this library's model of a configuration, and of a state dict of theirs."""
        key = repr((lm_config(config), id(state)))
        if key not in self.imported:
            self.imported[key] = from_transformers(config, state)(TOKENS)[0]
        return self.imported[key]

    def key(self, config: Any) -> str:
        """The values of the attributes that models read."""
        read = {name: value for name, value in vars(config).items() if name in self.read}
        return json.dumps(read, sort_keys=True, default=repr)

    def __call__(self, config: Any) -> tuple[dict[str, Tensor], Tensor] | None:
        """The state dict and the logits, or ``None`` where their model cannot be made or run."""
        key = self.key(config)
        if key not in self.known:
            try:
                self.known[key] = self._run(copy.deepcopy(config))
            except Exception:  # of whatever kind: their model has no outputs for this configuration
                self.known[key] = None
        return self.known[key]
