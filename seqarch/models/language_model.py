"""LanguageModel: an embedding, a stack and a head over tokens."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from seqarch.layers import Layer
from seqarch.layers.channel.expert_cache import Policy
from seqarch.layers.channel.offloaded import OffloadedExperts
from seqarch.layers.mixer import CuSeqlens, first_tensor, linear_flops
from seqarch.layers.modules.configured import Configured, from_options
from seqarch.layers.modules.linear import PLAIN, Linear, hold_the_same, is_plain_linear
from seqarch.layers.modules.norms import build_norm
from seqarch.layers.modules.quantized import QuantizedWeight
from seqarch.models.config import LMConfig
from seqarch.models.generation import generate, stream
from seqarch.models.greedy_token import GreedyToken
from seqarch.models.loss import head_cross_entropy, serves
from seqarch.models.mup import scale_initialisation
from seqarch.models.stack import Stack, StackState
from seqarch.ops.dispatch.checks import accumulation_dtype, entries_within, fits, show, unknown_name
from seqarch.ops.dispatch.eager import is_plain, knows_values

LARGEST_SHARE = 0.75
"""Of the targets: where more of them count, bringing theirs together is not worth its copies."""


class LanguageModel(Configured):
    """``logits, state = model(tokens, state, cu_seqlens)``: tokens ``[B, T]``, logits ``[B, T, vocab_size]``.

    The embedding is normal with ``embedding_std``, the head has ``nn.Linear``'s initialisation unless tied;
    everything in the stack initialises itself. There is no position embedding: mixers that need positions have them.

    Attributes:
        config: the :class:`LMConfig` that it was made of.
        tokenizer: with ``encode(text)`` and ``decode(tokens)``, of a model of text that was read from a folder.
        origin: the :class:`seqarch.checkpoints.origin.Origin` of a model that was read from a folder.
        expert_store: the :class:`seqarch.pretrained.ExpertStore` of a model whose experts are not all in memory.
    """

    Config = LMConfig
    tokenizer: Any = None
    origin: Any = None
    expert_store: Any = None
    generate = generate
    stream = stream

    @from_options
    def __init__(self, config: LMConfig):
        super().__init__()
        if not isinstance(config, LMConfig):
            raise ValueError(f"language model: config is {show(config)}, expected an LMConfig")
        self.config = config
        self.embedding = nn.Embedding(config.vocab_size, config.d_model)
        nn.init.normal_(self.embedding.weight, std=config.embedding_std)
        self.embedding_norm = _norm(config, config.embedding_norm) if config.embedding_norm != "none" else None
        self.stack = Stack(config)
        self.norm = _norm(config, config.final_norm or config.norm)
        self.head = Linear(config.d_model, config.vocab_size, bias=False)
        self.greedy_token = GreedyToken()
        _tie(self)
        self.register_load_state_dict_post_hook(_tie)
        scale_initialisation(self)

    @staticmethod
    def from_pretrained(
        path: str | PathLike[str],
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        *,
        step: int | None = None,
        verify: bool = False,
        experts_in_memory: int | None = None,
        expert_policy: str | Callable[[], Policy] = "lru",
    ) -> LanguageModel:
        """The model of a folder, in eval mode, with its ``config``, its ``origin`` and, of text, its ``tokenizer``.

        Reads what :meth:`save_pretrained` writes; a folder of safetensors that ``transformers`` or a hub has, of a
        family in :data:`seqarch.interop.FAMILIES`; and a run's folder, or a checkpoint in it, as :func:`seqarch.load`.
        Tensors go straight to their place: at no time is much more in memory than the model. Nothing is unpickled.

        Args:
            dtype: of the parameters, as ``model.to(dtype)`` gives it. By default that of most of the files' numbers;
                then mixers' own parameters, such as ``A_log``, stay as wide as the files have them.
            device: to load to; by default torch's own.
            step: of another checkpoint of a run.
            verify: also compare the files with the SHA-256 in the folder's manifest, which reads them once more.
                Otherwise their sizes and headers are compared.
            experts_in_memory: how many routed experts of each layer are in memory at once; the others are read from the
                folder's files when a token asks for them. The same to the bit, on a CPU, without gradients.
            expert_policy: which expert makes room for another: ``"lru"``, ``"lfu"``, or ``"layer_before"``, which reads
                ahead; or what makes a :class:`seqarch.layers.channel.expert_cache.Policy` for each layer.

        Raises:
            CheckpointError: the folder holds no such model, or a file is missing, damaged or unsafe, or has other
                tensors than ``config.json`` describes; a ``ValueError``, it names which.
        """
        import seqarch

        offload = {"experts_in_memory": experts_in_memory, "expert_policy": expert_policy}
        return seqarch.pretrained.from_pretrained(path, dtype, device, step=step, verify=verify, **offload)

    def save_pretrained(
        self, path: str | PathLike[str], *, family: str | None = None, max_shard_size: int | str = "5GB"
    ) -> None:
        """Write the model as a folder that :meth:`from_pretrained` reads: config, safetensors, tokenizer, manifest.

        The folder is written beside its place and then renamed, so that a failure leaves what was there. It may take
        the place of an empty folder, or of one that was saved so and holds nothing else.

        Args:
            family: of :data:`seqarch.interop.FAMILIES`, to write what ``transformers.AutoModelForCausalLM`` loads; by
                default seqarch's own form, which holds every model.
            max_shard_size: of a file of tensors; with more, there are several and an index.

        Raises:
            ValueError: something else lies at the path, the family has no such model, or the model's ``config`` does
                not describe its tensors. Nothing is written then.
            OSError: it cannot be written.
        """
        import seqarch

        seqarch.pretrained.save_pretrained(self, path, family=family, max_shard_size=max_shard_size)

    def _apply(self, fn: Any, recurse: bool = True) -> LanguageModel:
        super()._apply(fn, recurse)
        _tie(self)  # each module's tensors are converted by themselves, as by to_empty
        return self

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *arguments: Any) -> None:
        super()._load_from_state_dict(state_dict, prefix, *arguments)
        names = f"{prefix}embedding.weight", f"{prefix}head.weight"
        given = [state_dict.get(name) for name in names]
        if self.config.tie_embeddings and all(type(each) in PLAIN for each in given) and not hold_the_same(*given):
            arguments[-1].append(f"{names[0]} and {names[1]} are one parameter (tie_embeddings) but differ here")

    def forward(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        token_mask: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        features, after = self.features(tokens, state, cu_seqlens, token_mask)
        return self.logits(features), after

    def features(
        self,
        tokens: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        token_mask: Tensor | None = None,
        places: Tensor | None = None,
    ) -> tuple[Tensor, StackState]:
        """The normalised outputs of the stack, ``[B, T, D]``, which the head reads, and the state.

        Args:
            token_mask: bool ``[B, T]``, false where a token is padding, as :class:`seqarch.models.Stack` takes it.
            places: int64 ``[M]``, the tokens whose outputs are wanted, by their places among all ``B T``: the outputs
                are then ``[1, M, D]``, as :class:`seqarch.models.Stack` gives them.

        Raises:
            ValueError: the tokens are not int32 or int64 ``[B, T]``, or (on a CPU) one is not in the vocabulary.
        """
        self._check_tokens(tokens)
        try:
            embedded = self.embedded(tokens)
        except IndexError:  # a check of every token in advance would cost one-token decoding 3 %
            entries_within("language model", "tokens", tokens, 0, self.config.vocab_size - 1)
            raise
        asked = {} if places is None else {"places": places}
        x, after = self.stack(embedded, state, cu_seqlens, token_mask, **asked)
        return self.norm(x), after

    def embedded(self, tokens: Tensor) -> Tensor:
        """What the stack reads of the tokens: ``[B, T, D]``."""
        embedded = self.embedding(tokens)
        if self.config.embedding_scale != 1:
            embedded = embedded * self.config.embedding_scale
        return embedded if self.embedding_norm is None else self.embedding_norm(embedded)

    @staticmethod
    def _check_tokens(tokens: Tensor) -> None:
        if not isinstance(tokens, Tensor) or tokens.ndim != 2 or tokens.dtype not in (torch.int32, torch.int64):
            tensor = isinstance(tokens, Tensor)
            given = f"{tokens.dtype} of shape {list(tokens.shape)}" if tensor else type(tokens).__name__
            raise ValueError(f"tokens must be int32 or int64 [B, T], got {given}")

    def logits(self, features: Tensor) -> Tensor:
        """The head on what :meth:`features` returns, or on some of its tokens: ``[..., vocab_size]``."""
        logits, cap = self.head(self._scaled(features)), self.config.logit_cap
        return logits if cap is None else cap * torch.tanh(logits / cap)

    def _scaled(self, features: Tensor) -> Tensor:
        """The features times ``logit_scale``, so that the logits are, at fewer products than of the logits."""
        return features if self.config.logit_scale == 1 else self.config.logit_scale * features

    def loss(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        *,
        token_mask: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> Tensor:
        """The cross entropy of the logits and ``targets`` ``[B, T]``, the tokens that come next: a scalar.

        It is ``F.cross_entropy`` of what the model returns, in float32 at least. On a CPU, in float32 or float64, the
        logits are held once and not four times, and one backward pass can be made, for first derivatives. Everywhere
        else, and under autocast, a compiler, ``torch.func``, a ``logit_cap``, hooks or another head, torch computes it.

        Where at most three of four targets count, head and last channel mixer do no work for the others. That needs to
        know which count: for targets on a CPU. A GPU would have to be waited for, so all targets there are gone
        through; those that are still on the host may be given as they are.

        Args:
            targets: int64 ``[B, T]``, on the device of the tokens or on a CPU.
            token_mask: bool ``[B, T]``, false where a token is padding, which routers then do not count. Not the same
                as an ignored target: a question's tokens are read, and routed, though nobody asks what comes next.
            ignore_index: the target of a token that does not count in this loss.
            reduction: ``"mean"`` over the targets that count, or ``"sum"``.

        Raises:
            ValueError: tokens or targets are not integers ``[B, T]``, or (on a CPU) one is not in the vocabulary; or
                there is no such reduction.
        """
        return self._loss_and_state(tokens, targets, state, cu_seqlens, token_mask, ignore_index, reduction)[0]

    def loss_and_state(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        *,
        token_mask: Tensor | None = None,
        ignore_index: int = -100,
        reduction: str = "mean",
    ) -> tuple[Tensor, StackState]:
        """:meth:`loss` and the state after the tokens, from which the next segment of a sequence goes on.

        ``detach_state`` of it cuts the gradient there: truncated backpropagation through time (Williams and Peng 1990,
        "An Efficient Gradient-Based Algorithm for On-Line Training of Recurrent Network Trajectories").
        """
        return self._loss_and_state(tokens, targets, state, cu_seqlens, token_mask, ignore_index, reduction)

    def _loss_and_state(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StackState | None,
        cu_seqlens: CuSeqlens,
        token_mask: Tensor | None,
        ignore_index: int,
        reduction: str,
    ) -> tuple[Tensor, StackState]:
        if reduction not in ("mean", "sum"):
            raise unknown_name("reduction", reduction, ("mean", "sum"))
        if not fits(ignore_index, (int,)):
            raise ValueError(f"language model: ignore_index is {show(ignore_index)}, expected an int")
        self._check_tokens(tokens)
        expected, places = self._expected(tokens, targets, ignore_index)
        features, after = self.features(tokens, state, cu_seqlens, token_mask, places)
        features = features.flatten(0, 1)
        expected = expected.to(features.device, non_blocking=True)
        counted = expected != ignore_index
        if self._head_is_plain() and serves(features, self.head.weight):
            total = head_cross_entropy(self._scaled(features), self.head.weight, expected.where(counted, 0), counted)
        else:
            logits = self.logits(features)
            logits = logits.to(accumulation_dtype(logits))
            total = F.cross_entropy(logits, expected, ignore_index=ignore_index, reduction="sum")
        return total if reduction == "sum" else total / counted.sum(), after

    @torch.no_grad()
    def score_targets(
        self,
        tokens: Tensor,
        targets: Tensor,
        state: StackState | None = None,
        cu_seqlens: CuSeqlens = None,
        *,
        token_mask: Tensor | None = None,
        ignore_index: int = -100,
    ) -> tuple[Tensor, Tensor]:
        """The loss of each target, in float32 at least, and whether it was the likeliest token; both ``[B, T]``.

        They are 0 and false where a target does not count, for which head and last channel mixer do no work where
        :meth:`loss` does none. No gradients are recorded. Arguments and errors are those of :meth:`loss`.
        """
        self._check_tokens(tokens)
        expected, places = self._expected(tokens, targets, ignore_index)
        logits = self.logits(self.features(tokens, state, cu_seqlens, token_mask, places)[0].flatten(0, 1))
        logits, expected = logits.to(accumulation_dtype(logits)), expected.to(logits.device, non_blocking=True)
        losses = F.cross_entropy(logits, expected, ignore_index=ignore_index, reduction="none")
        hits = logits.argmax(-1) == expected
        if places is None:
            return losses.view(tokens.shape), hits.view(tokens.shape)
        all_losses, all_hits = losses.new_zeros(tokens.numel()), hits.new_zeros(tokens.numel())
        return (
            all_losses.index_copy(0, places, losses).view(tokens.shape),
            all_hits.index_copy(0, places, hits).view(tokens.shape),
        )

    def _expected(self, tokens: Tensor, targets: Tensor, ignore_index: int) -> tuple[Tensor, Tensor | None]:
        """All targets ``[B T]`` and ``None``, or those that count ``[M]`` and their places, on the tokens' device."""
        if not isinstance(targets, Tensor) or targets.shape != tokens.shape or targets.dtype != torch.int64:
            given = f"{targets.dtype} {list(targets.shape)}" if isinstance(targets, Tensor) else type(targets).__name__
            raise ValueError(
                f"language model: targets are {given}, expected torch.int64 {list(tokens.shape)} as tokens"
            )
        expected = targets.flatten()
        counted = expected != ignore_index
        entries_within("language model", "targets", expected.where(counted, 0), 0, self.config.vocab_size - 1)
        if not knows_values(expected):
            return expected, None
        places = counted.nonzero()[:, 0]
        if not 0 < len(places) <= LARGEST_SHARE * len(expected):
            return expected, None
        return expected[places], places.to(tokens.device, non_blocking=True)

    def _head_is_plain(self) -> bool:
        """Whether the logits are the product of features and the head's weights, and nobody changed or watches it."""
        if type(self).logits is not LanguageModel.logits or "logits" in vars(self) or self.config.logit_cap is not None:
            return False
        return is_plain_linear(self.head) and is_plain(self.head) and self.head.bias is None

    def init_state(
        self,
        batch_size: int,
        max_length: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> StackState:
        """The state before the first token."""
        return self.stack.init_state(batch_size, max_length, device, dtype)

    def state_bytes(self, length: int, batch_size: int = 1) -> int:
        """Bytes of the state after ``length`` tokens."""
        return self.stack.state_bytes(length, batch_size)

    def flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of the forward pass over ``length`` tokens, the head included; a lookup costs none."""
        return self.stack.flops(length, batch_size) + linear_flops(self.head, length * batch_size)

    def step_flops(self, length: int, batch_size: int = 1) -> int:
        """FLOPs of one more token after ``length`` of them, counted as in :meth:`flops`."""
        return self.stack.step_flops(length, batch_size) + linear_flops(self.head, batch_size)

    def num_parameters(self) -> int:
        """Parameters, quantised weights and experts on disk, shared ones counted once."""
        small = {id(q.codes): q.weights for q in self.modules() if isinstance(q, QuantizedWeight)}
        away = sum(experts.weights for experts in self.modules() if isinstance(experts, OffloadedExperts))
        return sum(parameter.numel() for parameter in self.parameters()) + sum(small.values()) + away

    def auxiliary_loss(self) -> Tensor:
        """The layers' terms of the loss of the last forward pass (such as routers' losses), summed; 0 without any."""
        losses = [layer.auxiliary_loss() for layer in self.stack.modules() if isinstance(layer, Layer)]
        zero = torch.zeros((), device=first_tensor(self).device)
        return sum((loss for loss in losses if loss is not None), zero)

    def router_metrics(self) -> dict[str, Any]:
        """Load and confidence of each router in the last forward pass, by ``layer_I/metric``."""
        found = {name: channel.router_metrics() for name, channel in self.stack.channels().items()}
        return {f"{name}/{metric}": value for name, metrics in found.items() for metric, value in metrics.items()}

    def update_routers(self) -> None:
        """Move the routers' biases: to be called once per optimizer step, after it, however many its micro-batches."""
        for channel in self.stack.channels().values():
            channel.update_router()


def _norm(config: LMConfig, kind: str) -> nn.Module:
    """A norm of the residual stream, of its width and eps; ``"none"`` changes nothing."""
    zero_centred = config.zero_centred_norms
    return nn.Identity() if kind == "none" else build_norm(kind, config.d_model, config.norm_eps, zero_centred)


def _tie(model: LanguageModel, *_: Any) -> None:
    """Make the head's weight the embedding's again, where a conversion or an assignment has made two of it."""
    if not model.config.tie_embeddings:
        return
    if isinstance(model.embedding, QuantizedWeight) and isinstance(model.head, QuantizedWeight):
        model.head.codes, model.head.scales = model.embedding.codes, model.embedding.scales
    elif all(part._parameters.get("weight") is not None for part in (model.embedding, model.head)):
        model.head.weight = model.embedding.weight
