"""The options of training, ``train`` in a run's configuration, and which of them go together."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

from experiments.config.tasks import MOST

MOST_THREADS = 1024
"""More CPU threads than this are a slip of the hand, and torch crashes on them."""

NOT_NEGATIVE = (
    *("lr", "weight_decay", "warmup", "final_lr_ratio", "decay_share", "grad_clip", "spike"),
    *("least_improvement", "plateau_tokens", "target_weight"),
    *("micro_batch", "bptt", "first_state_std", "save_every", "log_every", "patience", "threads", "stage_warmup"),
)

OF_TEACHERS = ("mixer_outputs", "mixer_matrices", "logits")
"""Objectives that need one."""

WHERE_SET = (
    *("stage_target", "stage_warmup", "start_from", "start_sha256", "bptt", "carry_state"),
    *("first_state", "first_state_std"),
    *("convert", "objective", "teacher", "teacher_sha256", "temperature", "target_weight"),
    *("lora", "trainable"),
)
"""Options of training that are written only where they are set, so that runs which have none are as if there were none
of them."""


@dataclass(frozen=True)
class LoraConfig:
    """The options of low-rank adapters (LoRA).

    Attributes:
        rank: of the change of each matrix.
        alpha: each change is multiplied by ``alpha / rank``.
        targets: names of mixers and channel mixers (``mamba2``, ``moe``), to adapt those alone, of their projections
            (``out_proj``), or ``q``, ``k``, ``v`` and ``o`` for those of heads, each by itself; all projections if none
            is given.
    """

    rank: int = 8
    alpha: float = 16.0
    targets: list[str] = field(default_factory=list)

    def __post_init__(self):
        if self.rank < 1:
            raise ValueError(f"rank must be at least 1, got {self.rank}")
        if not 0 < self.alpha < math.inf:
            raise ValueError(f"alpha must be a positive number, got {self.alpha}")


@dataclass(frozen=True)
class TrainConfig:
    """The options of training.

    Attributes:
        steps: optimizer steps at most.
        batch_size: sequences per step, each of the task's training length, in all processes together.
        micro_batch: sequences of that length that one process takes at a time, their gradients summed; 0 for its whole
            share. Of longer ones of ``task.train_on`` it takes fewer, and more of shorter ones.
        bptt: tokens after which the gradient is cut (truncated backpropagation through time): a sequence is processed
            in segments of so many, each from the state after the one before, and no gradient passes from a segment
            into those before it. One update at the end. 0 for whole sequences.
        carry_state: whether the mixers' states go on from one step to the next, without gradients; by default where
            the task's batches continue one another, as those of the task ``text`` with ``documents: streamed``.
        first_state: what the mixers' states are before the first token of a training sequence: ``initial``;
            ``passed``, what another sequence of the step before ended with; ``noise``, normal with the standard
            deviation ``first_state_std``; or ``fitted_noise``, normal with the mean and deviation of the states that
            the step before ended with. It is for lengths beyond that of training, where states are others
            (:mod:`experiments.training.first_states`). Evaluations begin with the initial state in any case.
        first_state_std: of ``noise``.
        start_from: the folder of a finished run, or of a checkpoint in a run's folder, whose weights training begins
            with; its optimizer, counters and random streams are not taken.
        start_sha256: the hash of that checkpoint's manifest, which is found where it is not given.
        convert: of a checkpoint whose model has other mixers, take what maps to those of this one
            (:func:`seqarch.convert.convert`): the ``whole`` of queries, keys, values and outputs, or, ``partial``, what
            there is of them. Sizes of heads that the model does not say are those that fit.
        objective: what is made small: the loss of the task's ``targets``; how far what each mixer gives is from the
            teacher's at the teacher's input, ``mixer_outputs``, or the matrix by which it mixes, ``mixer_matrices``, in
            the layers where the two differ, and nothing but these mixers is trained; or how far its ``logits`` are from
            the teacher's where there are targets.
        teacher: the folder of a finished run, or of a checkpoint in a run's folder, for the other objectives.
        teacher_sha256: the hash of that checkpoint's manifest, which is found where it is not given.
        temperature: by which both logits are divided for ``logits``.
        target_weight: of the loss of the task's targets beside that of ``logits``, which has the rest of 1.
        lora: low-rank adapters of what ``start_from`` names, with its options ``rank``, ``alpha`` and ``targets``. They
            learn and nothing else does; checkpoints hold the model with them merged.
        trainable: names of parameters, or of modules with all inside of them, as ``head`` or ``*.out_proj``: only these
            learn, with ``lora`` beside the adapters. All learn where neither is given.
        optimizer: ``adamw``, or ``muon`` for the layers' linear maps with AdamW for the rest.
        lr, warmup, final_lr_ratio: the rate climbs linearly to ``lr`` over ``warmup`` steps, at most all of them, then
            falls along the schedule to ``final_lr_ratio * lr`` at ``steps``.
        weight_decay: of the weights that decay; norms, biases and decay rates do not.
        schedule: ``cosine``; ``wsd``: stable, then falling in a line over the last ``decay_share`` of the steps; or
            ``until_converged``: stable until the validation loss no longer falls, then a decay of ``decay_share`` as
            many steps more. ``steps`` is then the most that it takes.
        decay_share: of ``wsd``, the share of the steps in which the rate falls; of ``until_converged``, the steps of
            the decay for each one of the stable phase.
        least_improvement: of ``until_converged``, the share by which the validation loss must fall over the last
            quarter of the steps so far for the stable phase to go on.
        plateau_tokens: training tokens over which it must fail to, at least; losses that are flat at first need some.
        stage_target: of a curriculum (``task.order``), the validation metric at which a stage other than the last is
            over; without one, or before it, a stage is over when its validation loss no longer falls.
        stage_warmup: steps of the climb to ``lr`` at the beginning of each further stage.
        grad_clip: bound on the norm of the gradient; 0 for none.
        spike: a gradient norm above this many times its running mean is bad as one that is not finite is; 0 for never.
        bad_step: ``stop`` at one, or ``skip`` its update. Its batch is kept in the run's folder ``bad`` either way.
        precision: ``float32``, or ``bfloat16`` by autocast; parameters and optimizer are float32 throughout.
        param_dtype: FSDP2's, with several processes: the type that parameters are gathered and used in, while those
            that are kept and updated stay float32. ``bfloat16`` halves the traffic and rounds every parameter, those of
            norms, decays and routers too.
        activation_checkpointing: keep only the layers' inputs for the backward pass, and run each layer's forward pass
            again there.
        compile: run each layer through ``torch.compile``.
        eval_every: steps between two evaluations on the validation split, each with a checkpoint.
        save_every: steps between checkpoints besides; 0 for none.
        log_every: steps between two lines of training loss, gradient norm, learning rate and tokens per second, besides
            those of evaluations; 0 for none.
        keep_last: how many of the latest checkpoints stay; the best so far of each of these stays too.
        target: stop once the validation metric is this good.
        patience: stop after so many evaluations without a better validation metric; 0 for never.
        eval_checkpoint: the checkpoint that is tested at the end, the ``best`` on validation or the ``last``.
        threads: CPU threads; 0 leaves it to torch.
        device: ``cpu``, ``cuda`` or ``auto`` (CUDA where there is one).
        dry_run: print what the run would take, and train nothing.
    """

    steps: int
    batch_size: int
    lr: float
    micro_batch: int = 0
    bptt: int = 0
    carry_state: bool | None = None
    first_state: Literal["initial", "passed", "noise", "fitted_noise"] = "initial"
    first_state_std: float = 1.0
    start_from: str | None = None
    start_sha256: str | None = None
    convert: Literal["whole", "partial"] | None = None
    objective: Literal["targets", "mixer_outputs", "mixer_matrices", "logits"] = "targets"
    teacher: str | None = None
    teacher_sha256: str | None = None
    temperature: float = 1.0
    target_weight: float = 0.0
    lora: LoraConfig | None = None
    trainable: list[str] | None = None
    optimizer: Literal["adamw", "muon"] = "adamw"
    weight_decay: float = 0.1
    warmup: int = 0
    final_lr_ratio: float = 0.1
    schedule: Literal["cosine", "wsd", "until_converged"] = "cosine"
    decay_share: float = 0.2
    least_improvement: float = 0.01
    plateau_tokens: int = 0
    stage_target: float | None = None
    stage_warmup: int = 0
    grad_clip: float = 1.0
    spike: float = 0.0
    bad_step: Literal["stop", "skip"] = "stop"
    precision: Literal["float32", "bfloat16"] = "float32"
    param_dtype: Literal["float32", "bfloat16"] = "float32"
    activation_checkpointing: bool = False
    compile: bool = False
    eval_every: int = 100
    save_every: int = 0
    log_every: int = 10
    keep_last: int = 2
    target: float | None = None
    patience: int = 0
    eval_checkpoint: Literal["best", "last"] = "best"
    threads: int = 0
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dry_run: bool = False

    def __post_init__(self):
        for name in ("steps", "batch_size", "eval_every", "keep_last"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.batch_size > MOST:
            raise ValueError(f"batch_size must be at most {MOST}, got {self.batch_size}")
        for name in NOT_NEGATIVE:
            if not 0 <= getattr(self, name) < math.inf:
                raise ValueError(f"{name} must be a finite number and not negative, got {getattr(self, name)}")
        for name in ("decay_share", "final_lr_ratio", "target_weight"):
            if getattr(self, name) > 1:
                raise ValueError(f"{name} must be at most 1, got {getattr(self, name)}")
        self._check_schedule()
        if 0 < self.spike <= 1:
            raise ValueError(f"spike must be above 1, or 0 for never, got {self.spike}")
        for name in ("target", "stage_target"):
            if (target := getattr(self, name)) is not None and not math.isfinite(target):
                raise ValueError(f"{name} must be a finite number or null, got {target}")
        if self.first_state_std != TrainConfig.first_state_std and self.first_state != "noise":
            raise ValueError(f"first_state_std is of first_state: noise, and that is {self.first_state}")
        self._check_teacher()
        if self.trainable == [] and self.lora is None:
            raise ValueError("trainable is empty, so that nothing would learn: name what does, or leave it out for all")
        if self.threads > MOST_THREADS:
            raise ValueError(f"threads must be at most {MOST_THREADS}, got {self.threads}")

    def _check_teacher(self) -> None:
        """Refuse a teacher without a use for it, and what a teacher cannot do."""
        if self.objective == "targets":
            if self.teacher is not None:
                raise ValueError(f"a teacher is for objective: {', '.join(OF_TEACHERS)}; got targets")
        elif self.bptt or self.carry_state:
            name = "bptt" if self.bptt else "carry_state"
            raise ValueError(f"objective: {self.objective} is of whole sequences from their start: leave {name} out")
        elif self.objective != "logits" and (self.compile or self.activation_checkpointing):
            name = "compile" if self.compile else "activation_checkpointing"
            raise ValueError(f"objective: {self.objective} runs mixers by themselves, without {name}: leave it out")
        if not 0 < self.temperature < math.inf:
            raise ValueError(f"temperature must be a positive number, got {self.temperature}")
        if self.objective != "logits" and (self.temperature != 1 or self.target_weight):
            name = "temperature" if self.temperature != 1 else "target_weight"
            raise ValueError(f"{name} is of objective: logits, got {self.objective}")

    @property
    def trains_all(self) -> bool:
        """Whether all weights learn."""
        return self.lora is None and self.trainable is None

    @property
    def restriction(self) -> str:
        """The option by which only some do."""
        return "trainable" if self.lora is None else "lora"

    @property
    def most_warmup(self) -> int:
        """The longest warm-up that the steps and the schedule's decay leave room for."""
        return math.floor(self.steps - self._decay + 1e-6)

    @property
    def _decay(self) -> float:
        """The steps of the decay in the schedules that have one, where training takes all its steps."""
        share = self.decay_share * self.steps
        return {"wsd": share, "until_converged": share / (1 + self.decay_share)}.get(self.schedule, 0.0)

    def _check_schedule(self) -> None:
        """Refuse rates that would never reach ``lr``, or would jump down from it."""
        if self.warmup > self.steps:
            raise ValueError(f"warmup must be at most steps ({self.steps}), got {self.warmup}")
        if self.warmup > self.most_warmup:
            decay = f"{self._decay:g} steps of decay_share ({self.decay_share:g})"
            raise ValueError(f"warmup ({self.warmup}) and the {decay} must fit into steps ({self.steps})")
        if self.stage_warmup > self.eval_every:
            raise ValueError(
                f"stage_warmup must be at most eval_every ({self.eval_every}), after which a stage can be over; got"
                f" {self.stage_warmup}"
            )

    def plain(self) -> dict[str, Any]:
        """The options by name, those of :data:`WHERE_SET` where they are set."""
        unset = {name for name in WHERE_SET if getattr(self, name) == getattr(TrainConfig, name)}
        return {name: value for name, value in asdict(self).items() if name not in unset}
