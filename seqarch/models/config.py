"""The options of stacks and language models, checked when a config is made."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from seqarch.layers import CHANNEL_MIXERS, MIXERS, channel_mixer_class, mixer_class
from seqarch.layers.mixer import MOST_COUNTED
from seqarch.layers.modules.norms import check_norm
from seqarch.layers.modules.options import check_factors, check_options
from seqarch.models.pattern import LayerPattern, tile_pattern
from seqarch.models.streams import CONNECTIONS, OUTPUTS
from seqarch.ops.dispatch.checks import show, unknown_name


class Placement(NamedTuple):
    """Where the norm of a branch f is, which is a mixer, some side by side, or a channel mixer.

    Attributes:
        reads: f reads ``norm(x)``.
        keeps: the residual stream goes on as ``norm(x)``.
        writes: what f gives is normed before it is added.
        sums: the sum is normed.
    """

    reads: bool = False
    keeps: bool = False
    writes: bool = False
    sums: bool = False


PLACEMENTS: dict[str, Placement] = {
    "pre": Placement(reads=True),
    "post": Placement(writes=True),
    "both": Placement(reads=True, writes=True),
    "residual": Placement(reads=True, keeps=True),
    "sum": Placement(sums=True),
    "none": Placement(),
}
"""``x + f(norm(x))``; ``x + norm(f(x))``; ``x + norm(f(norm(x)))``; ``norm(x) + f(norm(x))``; ``norm(x + f(x))``; and
``x + f(x)``, of what has norms of its own."""


PARALLEL = ("none", "one_norm", "two_norms")
"""Whether a layer's channel mixer stands beside its mixers, and reads their norm or one of its own."""


STARTS = ("release", "slow_gates")
"""How gates may begin."""


@dataclass(frozen=True, kw_only=True)
class StackConfig:
    """A stack of layers.

    Attributes:
        d_model: width D of the residual stream.
        pattern: the layers' mixers, in the language of :mod:`seqarch.models.pattern`.
        depth: number of layers; a multiple of the pattern's length.
        channel: channel mixer of the layers for which the pattern names none; ``"none"`` leaves it out.
        mixers: options by mixer name, as ``{"mamba2": {"d_state": 64}}``; those of an occurrence in the pattern, as
            ``mamba2(d_state=64)``, go before them.
        channels: options by channel mixer name.
        norm_eps: added to the mean square or the variance in the norms of the residual stream.
        branch_norm: an RMS norm of each branch, without weights, before branches side by side are summed.
        branch_weights: whether branches side by side are summed with learnt weights, or as they are.
        input_factors: constants by the name of a mixer or channel mixer: its normalised input is multiplied by it.
        output_factors: likewise of its output, before it is added to the residual stream and after a norm of it.
        residual_factors: likewise of the residual stream to which it is added; the same for mixers side by side.
        norm: of the residual stream: ``"rms"``, ``"rms_without_weights"``, ``"layer"``, ``"layer_without_bias"`` or
            ``"layer_without_weights"`` (no bias either).
        zero_centred_norms: the norms of the residual stream multiply by ``1 + weight``, with weights of 0 at first.
        norm_placement: where a mixer or channel mixer f has its norm: ``"pre"``, ``x + f(norm(x))``; ``"post"``,
            ``x + norm(f(x))`` (OLMo 2); ``"both"``, ``x + norm(f(norm(x)))`` (Gemma 2); ``"residual"``,
            ``norm(x) + f(norm(x))`` (MiniMax-01); ``"sum"``, ``norm(x + f(x))`` (Vaswani et al. 2017); ``"none"``,
            ``x + f(x)``, where f has norms of its own (Zamba 2).
        norm_placements: another by the name of a mixer, which holds for the whole layer, or of a channel mixer, as
            ``{"attention": "post"}``; the same for mixers side by side.
        parallel: whether mixers and channel mixer are added to the same residual stream, ``x + mix(norm(x)) +
            channel(norm(x))``: ``"one_norm"`` (GPT-J, Cohere), or ``"two_norms"`` with one for each (GPT-NeoX);
            ``"none"`` has them one after the other.
        residual_streams: how many residual streams there are; several are read, mixed and written by weights that each
            mixer and channel mixer learns.
        stream_mixing: how: ``"hyper_connections"`` (Zhu et al. 2024), or ``"manifold"``, by matrices whose rows and
            columns sum to 1 (mHC, DeepSeek-V4).
        stream_output: what several come to after the last layer: their ``"sum"``, their ``"mean"`` or, with learnt
            weights, ``"weighted"``.
        sinkhorn_steps: how often ``"manifold"`` divides by the sums of columns, and of rows between.
        init: how gates begin: ``"release"``, as in each mixer's own release, or ``"slow_gates"``, where they forget
            more slowly, by the options that the mixer's ``Config.slow_gates`` names; options that are given go before
            these, and a mixer without any begins as released (docs/results/initialisation.md).
    """

    d_model: int
    pattern: str
    depth: int
    channel: str = "swiglu"
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)
    channels: dict[str, dict[str, Any]] = field(default_factory=dict)
    norm_eps: float = 1e-5
    branch_norm: bool = False
    branch_weights: bool = True
    input_factors: dict[str, float] = field(default_factory=dict)
    output_factors: dict[str, float] = field(default_factory=dict)
    residual_factors: dict[str, float] = field(default_factory=dict)
    norm: str = "rms"
    zero_centred_norms: bool = False
    norm_placement: str = "pre"
    norm_placements: dict[str, str] = field(default_factory=dict)
    parallel: str = "none"
    residual_streams: int = 1
    stream_mixing: str = "hyper_connections"
    stream_output: str = "sum"
    sinkhorn_steps: int = 20
    init: str = "release"

    def __post_init__(self):
        check_options(self)
        if self.norm_eps >= 1:
            raise ValueError(f"norm_eps must be a small positive number, got {self.norm_eps}")
        check_norm("norm", self.norm)
        layers = tile_pattern(self.pattern, self.depth)
        for name in (*self.mixers, *(name for layer in layers for name in layer.mixers)):
            mixer_class(name)
        for name in (*self.channels, *(self.channel_of(layer) for layer in layers)):
            if name != "none":
                channel_mixer_class(name)
        for option, choices in (("parallel", PARALLEL), ("init", STARTS)):
            if (given := getattr(self, option)) not in choices:
                raise unknown_name(option, given, choices)
        self._check_factors(layers)
        self._check_placements(layers)
        self._check_streams(layers)
        _check_layer_options("mixer", self.mixers.items())
        _check_layer_options("channel mixer", self.channels.items())
        for layer in layers:
            _check_layer_options("mixer", zip(layer.mixers, layer.options, strict=True))
            _check_layer_options("channel mixer", [(self.channel_of(layer), layer.channel_options)])

    def channel_of(self, layer: LayerPattern) -> str:
        """The name of a layer's channel mixer, ``"none"`` without one."""
        return layer.channel or self.channel

    def options_of(self, mixer: str, own: Mapping[str, Any]) -> dict[str, Any]:
        """The options of a mixer in a layer: those of its occurrence, of its name, and of how gates begin."""
        slow = mixer_class(mixer).Config.slow_gates if self.init == "slow_gates" else {}
        return {**slow, **self.mixers.get(mixer, {}), **own}

    def placements_of(self, layer: LayerPattern) -> tuple[Placement, Placement]:
        """Where a layer's mixers have their norms, and where its channel mixer."""
        own = next((self.norm_placements[n] for n in layer.mixers if n in self.norm_placements), self.norm_placement)
        return PLACEMENTS[own], PLACEMENTS[self.norm_placements.get(self.channel_of(layer), own)]

    def _check_factors(self, layers: Iterable[LayerPattern]) -> None:
        for option in ("input_factors", "output_factors", "residual_factors"):
            factors = getattr(self, option)
            check_factors(option, list(factors.values()), len(factors))
            self._check_names(option, factors, layers)
        self._check_agreement("residual_factors", 1.0, layers)

    def _check_placements(self, layers: Iterable[LayerPattern]) -> None:
        self._check_names("norm_placements", self.norm_placements, layers)
        for place in (self.norm_placement, *self.norm_placements.values()):
            if not isinstance(place, str) or place not in PLACEMENTS:
                raise unknown_name("placement of norms", place, PLACEMENTS)
        self._check_agreement("norm_placements", self.norm_placement, layers)
        if self.parallel == "two_norms":
            for layer in layers:
                place, _ = self.placements_of(layer)
                if place.keeps or place.sums:
                    raise ValueError(
                        "parallel is 'two_norms', and norm_placement has one norm of the residual stream itself in"
                        f" {layer}: expected parallel='one_norm'"
                    )

    def _check_agreement(self, option: str, default: Any, layers: Iterable[LayerPattern]) -> None:
        """Raise where those side by side, which read and are added to one residual stream, do not have the same."""
        given = getattr(self, option)
        for layer in layers:
            own = {name: given.get(name, default) for name in layer.mixers}
            channel = self.channel_of(layer)
            if self.parallel != "none" and channel != "none":
                # what holds for a layer's mixers holds for its channel mixer, of which nothing else is said
                of_layer = next(iter(own.values())) if option == "norm_placements" else default
                own[channel] = given.get(channel, of_layer)
            if len(set(own.values())) > 1:
                shown = ", ".join(f"{name}: {value!r}" for name, value in own.items())
                raise ValueError(f"{option} of what is side by side must be the same, got {shown} in {layer}")

    def _check_streams(self, layers: Iterable[LayerPattern]) -> None:
        for option, choices in (("stream_mixing", CONNECTIONS), ("stream_output", OUTPUTS)):
            if (given := getattr(self, option)) not in choices:
                raise unknown_name(option, given, choices)
        if self.residual_streams == 1:
            return
        if self.residual_factors:
            raise ValueError(
                f"residual_factors are of one residual stream, got residual_streams={self.residual_streams}"
            )
        for layer in layers:
            if any(place.keeps or place.sums for place in self.placements_of(layer)):
                raise ValueError(
                    f"norm_placement has a norm of the residual stream itself in {layer}, and residual_streams is"
                    f" {self.residual_streams}: expected 'pre', 'post' or 'both'"
                )

    def _check_names(self, option: str, given: Iterable[str], layers: Iterable[LayerPattern]) -> None:
        """Raise unless these are names of mixers or channel mixers, or paths of such in this stack."""
        used = {name for layer in layers for name in (*layer.mixers, self.channel_of(layer))}
        known = {*MIXERS, *CHANNEL_MIXERS, self.channel, *used} - {"none"}
        for name in given:
            if name not in known:
                raise unknown_name(f"mixer or channel mixer in {option}", name, sorted(known))


@dataclass(frozen=True, kw_only=True)
class LMConfig(StackConfig):
    """A language model: the options of :class:`StackConfig` and

    Attributes:
        vocab_size: number of tokens.
        embedding_std: standard deviation of the initial embedding; 0.02 is Radford et al.'s (2019) and most releases',
            1 is ``nn.Embedding``'s.
        tie_embeddings: whether the head uses the embedding's weights.
        embedding_scale: what the embedding is multiplied by before the first layer; ``sqrt(d_model)`` in Gemma.
        embedding_norm: a norm of the embedding, after ``embedding_scale``, of a kind that ``norm`` may be (RWKV), or
            ``"none"``.
        final_norm: the norm before the head: such a kind, ``"none"``, or by default ``norm``.
        logit_scale: what the logits are multiplied by, before they are bounded.
        logit_cap: bounds the logits softly, ``cap tanh(logits / cap)`` (Gemma Team 2024, "Gemma 2", section 2).
        mup_base_width: the ``d_model`` of the model whose learning rates are right for this one too: starts and rates
            of its weights follow the maximal update parametrisation (:mod:`seqarch.models.mup`). Tied embeddings need
            a ``logit_scale`` besides.
    """

    vocab_size: int
    embedding_std: float = 0.02
    tie_embeddings: bool = False
    embedding_scale: float = 1.0
    embedding_norm: str = "none"
    final_norm: str | None = None
    logit_scale: float = 1.0
    logit_cap: float | None = None
    mup_base_width: int | None = None

    def __post_init__(self):
        super().__post_init__()
        if self.vocab_size > MOST_COUNTED:
            raise ValueError(f"vocab_size must be at most {MOST_COUNTED}, got {self.vocab_size}")
        check_norm("embedding_norm", self.embedding_norm, "none")
        check_norm("final_norm", self.final_norm or self.norm, "none")
        if self.mup_base_width not in (None, self.d_model) and self.tie_embeddings and self.logit_scale == 1:
            raise ValueError(
                "mup_base_width: tied embeddings start and learn as embeddings do, so their logits need a logit_scale"
                f" of mup_base_width / d_model times that of the base, here {self.mup_base_width / self.d_model:.4g}"
            )


def _check_layer_options(kind: str, given: Iterable[tuple[str, Any]]) -> None:
    for name, options in given:
        if not isinstance(options, dict):
            raise ValueError(f"{kind} {name!r}: expected a dict of options, got {show(options)}")
        for option in options:
            if not isinstance(option, str) or option == "d_model":
                raise ValueError(f"{kind} {name!r} has no option {option!r} of its own: d_model is the stack's")
