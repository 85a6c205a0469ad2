"""The benchmarks by name: one or more for each operation, and those of whole models.

torch's attention over all keys is a baseline of the operations that take less too: it computes something else, and is
what they must beat.
"""

from __future__ import annotations

from dataclasses import dataclass

from experiments.bench import baselines, inputs, models, training_steps
from experiments.bench.benchmark import Benchmark, Implementation, Work, of_operation
from experiments.bench.sizes import BLOCK, BLOCKS, CHOSEN, INDEX_HEADS, INDEX_WIDTH, LEVELS, STATES, TAPS, TOP_K, Sizes
from seqarch.ops.causal_conv1d import flops as conv_flops
from seqarch.ops.delta_rule import flops as delta_flops
from seqarch.ops.linear_attention import flops as linear_flops
from seqarch.ops.selective_scan import flops as scan_flops

MATRICES = "H = {heads}, K = V = {width}"
PER_HEAD, PER_KEY = f"{MATRICES}, one decay per head and step", f"{MATRICES}, one decay per key dimension and step"
LINEAR, DELTA = inputs.head_flops(linear_flops), inputs.head_flops(delta_flops)

INDEXER = f"{INDEX_HEADS} index heads of {INDEX_WIDTH}"
NOBODY: dict[str, dict[str, Implementation]] = {"cpu": {}, "cuda": {}}
"""The baselines of what no other package computes."""

OPERATIONS: dict[str, Benchmark] = {
    "linear_attention": of_operation(
        "linear_attention",
        title=PER_HEAD,
        inputs=inputs.head_decay,
        flops=LINEAR,
        baselines=baselines.HEAD_DECAY,
        token=inputs.token_after_state(inputs.head_decay, LINEAR),
    ),
    "linear_attention_per_key": of_operation(
        "linear_attention",
        title=PER_KEY,
        inputs=inputs.key_decay,
        flops=LINEAR,
        baselines=baselines.KEY_DECAY,
    ),
    "log_linear_attention": of_operation(
        "log_linear_attention",
        title=f"{PER_HEAD}, {LEVELS} levels",
        inputs=inputs.levels,
        flops=inputs.log_linear_flops,
        baselines=NOBODY,
    ),
    "retention": of_operation(
        "linear_attention",
        title=f"{MATRICES}, one decay per head",
        inputs=inputs.retention,
        flops=LINEAR,
        baselines=baselines.RETENTION,
    ),
    "delta_rule": of_operation(
        "delta_rule",
        title=PER_HEAD,
        inputs=inputs.with_beta(inputs.head_decay),
        flops=DELTA,
        baselines=baselines.DELTA_RULE,
        token=inputs.token_after_state(inputs.with_beta(inputs.head_decay), DELTA),
    ),
    "delta_rule_per_key": of_operation(
        "delta_rule",
        title=PER_KEY,
        inputs=inputs.with_beta(inputs.key_decay),
        flops=DELTA,
        baselines=baselines.DELTA_RULE_PER_KEY,
    ),
    "selective_scan": of_operation(
        "selective_scan",
        title=f"D = {{channels}}, N = {STATES}",
        inputs=inputs.scan,
        flops=inputs.channel_flops(scan_flops, STATES),
        baselines=baselines.SCAN,
        output="x",
    ),
    "attention": of_operation(
        "attention",
        title=f"{MATRICES}, causal",
        inputs=inputs.heads,
        flops=inputs.attention_flops,
        baselines=baselines.ATTENTION,
        token=inputs.token_after_keys(inputs.heads),
    ),
    "stick_breaking_attention": of_operation(
        "stick_breaking_attention",
        title=f"{MATRICES}",
        inputs=inputs.heads,
        flops=inputs.stick_breaking_flops,
        baselines=NOBODY,
    ),
    "path_attention": of_operation(
        "path_attention",
        title=f"{MATRICES}",
        inputs=inputs.path,
        flops=inputs.path_flops,
        baselines=NOBODY,
    ),
    "window_attention": of_operation(
        "attention",
        title=f"{MATRICES}, causal, window of {{window}}",
        inputs=inputs.window,
        flops=inputs.attention_flops,
        baselines=baselines.ATTENTION,
        token=inputs.token_after_keys(inputs.window),
    ),
    "block_sparse_attention": of_operation(
        "block_sparse_attention",
        title=f"{MATRICES}, {BLOCKS} blocks of {BLOCK} per query and head",
        inputs=inputs.blocks,
        flops=inputs.block_flops,
        baselines=baselines.BLOCK_SPARSE,
        token=inputs.token_after_keys(inputs.blocks),
    ),
    "compressed_attention": of_operation(
        "compressed_attention",
        title=f"{MATRICES}, blocks of 32 tokens, 16 apart",
        inputs=inputs.compressed,
        flops=inputs.compressed_flops,
        baselines=NOBODY,
        output="q",
    ),
    "index_topk": of_operation(
        "index_topk",
        title=f"{INDEXER}, {TOP_K} tokens per query",
        inputs=inputs.indexer,
        flops=inputs.index_flops,
        baselines=NOBODY,
        output="q",
        modes=("forward",),
    ),
    "indexer_loss": of_operation(
        "indexer_loss",
        title=f"{INDEXER}, {MATRICES}, {TOP_K} tokens per query",
        inputs=inputs.indexer_loss,
        flops=inputs.indexer_loss_flops,
        baselines=NOBODY,
        output="weight",
    ),
    "causal_conv1d": of_operation(
        "causal_conv1d",
        title=f"D = {{channels}}, W = {TAPS}, SiLU",
        inputs=inputs.convolution,
        flops=inputs.channel_flops(conv_flops, TAPS),
        baselines=baselines.CONVOLUTION,
        output="x",
    ),
    "gated_rnn": of_operation(
        "gated_rnn",
        title="sLSTM, H = {heads}, W = {width}",
        inputs=inputs.recurrent_gates,
        flops=inputs.recurrent_flops,
        baselines={"cpu": {}},
        output="x",
    ),
    "experts": of_operation(
        "experts",
        title=f"D = {{d_model}}, F = {{hidden}}, {CHOSEN} of {{experts}} experts, gated",
        inputs=inputs.experts,
        flops=inputs.expert_flops,
        baselines=baselines.EXPERTS,
        output="x",
    ),
}
BENCHMARKS = {**OPERATIONS, **models.BENCHMARKS, **training_steps.BENCHMARKS}


def names_on(kind: str) -> list[str]:
    """The benchmarks that run on a kind of device."""
    return [name for name, one in BENCHMARKS.items() if kind in one.baselines]


@dataclass(frozen=True)
class Point:
    """One measurement: an implementation of a benchmark, in one mode, at some sizes."""

    benchmark: str
    implementation: str
    mode: str
    sizes: Sizes

    def work(self) -> Work:
        """Ready to be timed, with inputs of its own.

        Raises:
            Absent: the implementation cannot run here.
        """
        benchmark = BENCHMARKS[self.benchmark]
        inputs = benchmark.inputs(self.mode, self.sizes)
        return benchmark.work(self.implementation, self.mode, self.sizes.setup, inputs)
