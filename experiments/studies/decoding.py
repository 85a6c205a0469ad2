"""Decoding against context: tokens per second and bytes of state of attention, recurrent models and hybrids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import torch

from experiments.bench.decoding import FILLED, Condition
from experiments.bench.decoding_rounds import Measurement
from experiments.studies import decoding_tables as tables
from experiments.studies import plan
from experiments.studies.measured import Decision, Ledger, Measured, MeasuredVersion, Measuring, TimeClaim, decide, read
from experiments.studies.records import FILE
from experiments.studies.study import Figure, Study, Table
from seqarch.models import LanguageModel, LMConfig


@dataclass(frozen=True)
class Model:
    """A pattern and its mixers' options."""

    pattern: str
    mixers: dict[str, dict[str, Any]] = field(default_factory=dict)

    def __str__(self) -> str:
        return f"{self.pattern} {self.mixers}" if self.mixers else self.pattern


MODELS: dict[str, Model] = {
    "attention": Model("attention"),
    "attention, 1 key head": Model("attention", {"attention": {"num_kv_heads": 1}}),
    "mla": Model("mla"),
    "sliding_window": Model("sliding_window"),
    "attention in 1 of 4": Model("3*gated_delta_net attention"),
    "attention in 1 of 8": Model("7*gated_delta_net attention"),
    "gla": Model("gla"),
    "mlstm": Model("mlstm"),
    "mamba2": Model("mamba2"),
    "delta_net": Model("delta_net"),
    "gated_delta_net": Model("gated_delta_net"),
    "rwkv7": Model("rwkv7"),
}
RECURRENT = ("gla", "mlstm", "mamba2", "delta_net", "gated_delta_net", "rwkv7")
CONTEXTS = tuple(4**power for power in range(4, 10))
VOCABULARY = 4096
MULTIPLE = 8
"""Inner widths of the channel mixers are multiples of it."""


def configurations(condition: Condition) -> dict[str, LMConfig]:
    """The models of a condition with about as many parameters as that with attention.

    The inner width of their SwiGLU makes up for what a mixer has more or less.
    """
    wanted = _parameters(_config(condition, MODELS["attention"], None))
    return {name: _config(condition, model, _hidden(condition, model, wanted)) for name, model in MODELS.items()}


def _config(condition: Condition, model: Model, hidden: int | None) -> LMConfig:
    channels = {} if hidden is None else {"swiglu": {"hidden": hidden}}
    return LMConfig(
        vocab_size=condition.vocabulary,
        d_model=condition.width,
        depth=condition.depth,
        pattern=model.pattern,
        mixers=model.mixers,
        channels=channels,
    )


def _hidden(condition: Condition, model: Model, wanted: int) -> int:
    """The inner width with which a model has nearest to so many parameters, which are linear in it."""
    one, two = (_parameters(_config(condition, model, MULTIPLE * count)) for count in (1, 2))
    return MULTIPLE * max(1, round(1 + (wanted - one) / (two - one)))


def _parameters(config: LMConfig) -> int:
    with torch.device("meta"):
        return LanguageModel(config).num_parameters()


def claims(condition: Condition) -> tuple[TimeClaim, ...]:
    """What was expected of the first condition, and by which margin, before anything was measured."""
    first, longest = condition.contexts[0], condition.contexts[-1]
    long = condition.contexts[-2] if len(condition.contexts) > 1 else longest
    twice = [
        TimeClaim(
            f"twice at {context}",
            f"After {context:,} tokens, attention takes more than twice as long per token as recurrent models"
            " (geometric mean of six)",
            tuple((("attention", context), (model, context)) for model in RECURRENT),
            "more",
            2.0,
        )
        for context in condition.contexts
    ]
    constant = [
        TimeClaim(
            f"{model} is constant",
            f"{model} takes as long per token after {longest:,} tokens as after {first:,}",
            (((model, longest), (model, first)),),
            "equal",
            1.05,
        )
        for model in (*RECURRENT, "sliding_window")
    ]
    cheaper = [
        TimeClaim(name, f"After {longest:,} tokens, attention takes more than {factor} times as long as {text}",
                  ((("attention", longest), (model, longest)),), "more", float(factor))
        for name, text, model, factor in (
            ("one layer in eight", "a hybrid with attention in 1 of 8 layers", "attention in 1 of 8", 4),
            ("one layer in four", "a hybrid with attention in 1 of 4 layers", "attention in 1 of 4", 2),
            ("one key head", "attention with one key head", "attention, 1 key head", 2),
            ("latents", "multi-head latent attention", "mla", 2),
        )
    ]  # fmt: skip
    return (
        *twice,
        *constant,
        *cheaper,
        TimeClaim("one key head is enough",
                  f"After {long:,} tokens, attention with one key head takes less than twice as long as recurrent"
                  " models (geometric mean of six)",
                  tuple((("attention, 1 key head", long), (model, long)) for model in RECURRENT), "less", 2.0),
        TimeClaim("filled as read",
                  f"A state of {condition.prefilled:,} tokens that was filled takes as long as one that was read"
                  " (geometric mean of all models)",
                  tuple(((model, FILLED), (model, condition.prefilled)) for model in MODELS), "equal", 1.05),
    )  # fmt: skip


def planned(conditions: tuple[Condition, ...], alone: float) -> MeasuredVersion:
    common = "random weights; greedy decoding; parameters as of attention's model, by the inner width of SwiGLU"
    names = {name: str(model) for name, model in MODELS.items()}
    return MeasuredVersion(common, Measuring(names, conditions, alone), claims(conditions[0]))


RECORDED = (
    Condition("width 512, float32, 2 threads, 1 sequence", 512, 8, VOCABULARY, CONTEXTS, prefilled=16384, rounds=16,
              passes=2, check_from=256),
    Condition("width 512, float32, 1 thread, 1 sequence", 512, 8, VOCABULARY, CONTEXTS, prefilled=1024, rounds=10,
              threads=1),
    Condition("width 512, float32, 2 threads, 8 sequences", 512, 8, VOCABULARY, CONTEXTS, prefilled=256, rounds=10,
              batch=8),
    Condition("width 512, bfloat16, 2 threads, 1 sequence", 512, 8, VOCABULARY, CONTEXTS, prefilled=1024, rounds=10,
              dtype="bfloat16"),
    Condition("width 1024, float32, 2 threads, 1 sequence", 1024, 8, VOCABULARY, CONTEXTS, prefilled=1024, rounds=10),
)  # fmt: skip

SMALL = (
    Condition("width 128, float32, 1 thread, 1 sequence", 128, 8, 512, CONTEXTS[:3], prefilled=1024, rounds=4,
              threads=1, passes=2, check_from=256),
    Condition("width 128, bfloat16, 1 thread, 2 sequences", 128, 8, 512, CONTEXTS[:3], prefilled=256, rounds=4,
              dtype="bfloat16", threads=1, batch=2),
)  # fmt: skip


class Decoding(Study[MeasuredVersion, list[Measured]]):
    name = "decoding"
    title = "What does a context cost a decoded token?"
    question = (
        "How many tokens per second does a model decode after a context of N tokens, and how many bytes does it keep of"
        " them: attention, attention with a smaller cache, recurrent models, and hybrids, of equal parameters?"
    )
    does = "measures"
    versions: ClassVar[Mapping[str, MeasuredVersion]] = {
        "recorded": planned(RECORDED, alone=0.05),
        "small": planned(SMALL, alone=1.0),
    }

    def complete(self, version: MeasuredVersion, folder: Path, runs: Path, jobs: int) -> int:
        """Measure what is missing, one model after another; 1 where others kept the machine busy for too long."""
        ledger, done = Ledger(folder, version.plan), True
        for condition in version.protocol.conditions:
            own = [line for line in ledger.lines if line["condition"] == condition.name]
            done &= Measurement(condition, configurations(condition), own, ledger.add, version.protocol.alone).run()
        if not done:
            print(
                f"others took more than {version.protocol.alone:.0%} of the machine again and again; the same command"
                " measures what is missing, once it is alone",
                flush=True,
            )
        return int(not done)

    def read(self, version: MeasuredVersion, folder: Path) -> list[Measured]:
        lines = read(folder)
        return [Measured(condition, lines, version.protocol.alone) for condition in version.protocol.conditions]

    def plans(self, results: list[Measured]) -> set[str]:
        return {name for each in results for name in each.plans}

    def unfinished(self, results: list[Measured]) -> Sequence[str]:
        lacking = [f"{each.missing} of {each.condition.name}" for each in results if each.missing]
        return [f"**In progress**: rounds and passes are missing: {'; '.join(lacking)}."] if lacking else []

    def decisions(self, results: list[Measured]) -> list[Decision]:
        """On all claims, by the first condition."""
        return [decide(results[0], claim) for claim in claims(results[0].condition)]

    def answer(self, results: list[Measured]) -> str:
        main, found = results[0], {each.claim.name: each for each in self.decisions(results)}
        first, last = main.condition.contexts[0], main.condition.contexts[-1]
        compared = {"a recurrent model": found[f"twice at {last}"]} | {text: found[name] for name, text in COMPARED}
        shown = "; ".join(
            f"{text} {tables.times(each)}" for text, each in compared.items() if each.interval is not None
        )
        constant = [found[f"{model} is constant"].verdict.answer for model in RECURRENT]
        return (
            f"{_start(main, found)} After {last:,} tokens attention takes, as a multiple of the time of others:"
            f" {shown or 'unknown'}; {constant.count('yes')} of {len(RECURRENT)} recurrent models take as long there as"
            f" after {first:,} tokens, to 5 % ({constant.count('no')} do not, {constant.count('unresolved')} are"
            f" unresolved). Decided for {main.condition.name}; factors are means over {len(main.rounds)} rounds with"
            " 95 % intervals."
        )

    def verdicts(self, results: list[Measured]) -> Table:
        return tables.verdicts(self.decisions(results))

    def figures(self, results: list[Measured]) -> Sequence[Figure]:
        return tables.figures(results, {name: model.pattern for name, model in MODELS.items()})

    def tables(self, results: list[Measured]) -> Sequence[Table]:
        own = claims(results[0].condition)
        rest = [decide(measured, claim) for claim in own for measured in results[1:]]
        return [*tables.tables(results[0]), *tables.others(results[1:], own, rest)]

    def made(self, results: list[Measured]) -> Sequence[Table | str]:
        return []

    def provenance(self, results: list[Measured]) -> Sequence[str]:
        lines = (
            f"Recorded, a line per round: [{FILE}]({self.name}/{FILE}); its margins were committed before in"
            f" [{plan.FILE}]({self.name}/{plan.FILE}), whose hash every line has."
        )
        return [lines, tables.provenance(results)]


COMPARED = (
    ("one key head", "attention with one key head"),
    ("latents", "latent attention"),
    ("one layer in four", "a hybrid with attention in 1 of 4 layers"),
    ("one layer in eight", "a hybrid with attention in 1 of 8 layers"),
)
"""Claims on what attention's time is compared with at the longest context, and how the answer calls that."""


def _start(main: Measured, found: Mapping[str, Decision]) -> str:
    """From which context on attention takes more than twice as long as recurrent models."""
    contexts = main.condition.contexts
    answers = [found[f"twice at {context}"].verdict.answer for context in contexts]
    beyond = next((context for i, context in enumerate(contexts) if set(answers[i:]) == {"yes"}), None)
    if beyond is None:
        return f"Attention was not found to take more than twice a recurrent model's time at {contexts[-1]:,} tokens."
    return (
        f"From {beyond:,} tokens of context on, a token of attention takes more than twice as long as one of a"
        f" recurrent model ({tables.times(found[f'twice at {beyond}'])} there)."
    )
