"""Continuous batching: requests join the rows that are decoded, and leave them, between any two tokens."""

from __future__ import annotations

import threading
from collections import deque
from typing import Any

import torch

from seqarch.layers.mixer import first_tensor
from seqarch.layers.modules.options import MOST
from seqarch.layers.rows import join_rows, leave_rows
from seqarch.models import LanguageModel
from seqarch.models.generation import Prompts, as_rows
from seqarch.models.sampling import GenerationOptions
from seqarch.ops.dispatch.checks import fits, show
from seqarch.serving.request import Request
from seqarch.state.prefix_cache import PrefixCache

ROOM = 512
"""Tokens for which room is reserved in caches at a time; then they are copied into larger ones."""


class Generator:
    """Continues any number of requests with one model, up to ``max_rows`` of them at a time, a token each in a step.

    A request's prompt is read by itself, in parts of at most ``prefill_tokens`` a step, so that a long prompt holds the
    others up for no longer than that; then its state joins those that are decoded. Each samples from a source of its
    own: which others run changes a request's logits by rounding alone, and its tokens only where two are as good.

    What is wrong with one request ends that one alone: a wrong option or prompt is refused by :meth:`submit`, an error
    of a logits processor, or logits that are no numbers, is raised to whoever waits for its tokens.

    Any thread may submit, wait and cancel; a step is one thread's at a time. There is no thread of its own: the model
    works while somebody waits for a token, or calls :meth:`step` or :meth:`run`.

    Args:
        model: its parameters are not to change meanwhile.
        max_rows: requests that are decoded at a time, the others wait in the order in which they came. On a CPU up to
            8 rows take the compiled path for one token.
        prefill_tokens: tokens of prompts that are read in a step, at most.
        prefix_cache: of states after prompts, and after what several have in common, where reading then begins.

    Raises:
        ValueError: a bound is of another kind or below 1, or the cache is of another model.
    """

    def __init__(
        self,
        model: LanguageModel,
        *,
        max_rows: int = 8,
        prefill_tokens: int = 2048,
        prefix_cache: PrefixCache | None = None,
    ):
        for name, count in (("max_rows", max_rows), ("prefill_tokens", prefill_tokens)):
            if not fits(count, (int,)) or count < 1:
                raise ValueError(f"Generator: {name} is {show(count)}, expected an int of at least 1")
        if prefix_cache is not None and prefix_cache.model is not model:
            raise ValueError("Generator: prefix_cache is of another model, expected one made with this one")
        self.model, self.max_rows, self.prefill_tokens = model, max_rows, prefill_tokens
        self.prefix_cache = prefix_cache
        self.waiting: deque[Request] = deque()
        self.running: list[Request] = []
        self._state: Any = None  # of the running requests, a row each
        self._room = 0  # tokens that its caches have room for
        self._lock = threading.RLock()

    def submit(self, prompt: Prompts, max_new_tokens: int, *, seed: int | None = None, **options: Any) -> Request:
        """Take a request, which is read and continued in the steps to come.

        Args:
            prompt: integers or a tensor ``[T]``.
            seed: of the request's own source of randomness, in place of a ``generator``; with neither it is drawn from
                torch's.
            options: those of :meth:`seqarch.LanguageModel.generate`, but for ``num_sequences``.

        Raises:
            ValueError: the prompt or an option is of another kind or out of range. No other request notices.
        """
        vocab_size, device = self.model.config.vocab_size, first_tensor(self.model).device
        if options.get("generator") is None:
            source = torch.Generator(device=device)
            if seed is not None and not (fits(seed, (int,)) and 0 <= seed <= MOST):
                raise ValueError(f"submit: seed is {show(seed)}, expected an int from 0 to {MOST}, or None")
            source.manual_seed(int(torch.randint(2**62, ())) if seed is None else seed)
            options["generator"] = source
        elif seed is not None:
            raise ValueError("submit: both a seed and a generator were given, expected one of them")
        checked = GenerationOptions(max_new_tokens=max_new_tokens, **options)
        checked.check_vocabulary(vocab_size)
        rows = as_rows(prompt, vocab_size, device)
        if len(rows) != 1:
            raise ValueError(f"submit: {len(rows)} prompts were given, expected one a request")
        request = Request(rows[0], checked, self.step)
        if not request.done:
            self.waiting.append(request)
        return request

    def run(self) -> None:
        """Go on until no request waits or runs."""
        while self.step():
            pass

    @torch.no_grad()
    def step(self) -> bool:
        """Read some of the prompts that wait, and decode a token of each request that runs.

        Returns:
            Whether any request waits or runs still.
        """
        with self._lock:
            self._let_go()
            self._decode()
            self._admit()
            return bool(self.running or self.waiting)

    def _let_go(self) -> None:
        """Take the rows of requests that are done out of the state, and those that wait no more out of the queue."""
        gone = [row for row, request in enumerate(self.running) if request.done]
        if gone:
            left = leave_rows(self._state, gone)
            self.running = [request for request in self.running if not request.done]
            self._regroup([left])
        for request in [request for request in list(self.waiting) if request.done]:
            self.waiting.remove(request)  # in place: other threads append to it

    def _regroup(self, states: list[Any]) -> None:
        """Put the running rows' states together, caches as long as the longest, with room for tokens to come."""
        if not self.running:
            self._state, self._room = None, 0
            return
        left = [each.options.max_new_tokens - len(each.new) for each in self.running]
        longest = max(len(each.prompt) + len(each.new) for each in self.running)
        self._room = min(max(left), ROOM)
        self._state = join_rows([self.model.init_state(0, max_length=longest + self._room), *states])

    def _decode(self) -> None:
        if not self.running:
            return
        if not self._room:
            self._regroup([self._state])
        last = torch.tensor([[request.new[-1]] for request in self.running], device=first_tensor(self.model).device)
        try:
            features, self._state = self.model.features(last, self._state)
            logits = self.model.logits(features[:, 0])
        except BaseException as error:  # the state may be half of this token and half of the last
            for request in self.running:
                request.fail(error)
            self.running, self._state, self._room = [], None, 0
            if not isinstance(error, Exception):
                raise
            return
        self._room -= 1
        for request, row in zip(self.running, logits.split(1), strict=True):
            request.choose(row)

    def _admit(self) -> None:
        """Read prompts, the first that came first, and add those that are read to the running requests."""
        left, joining = self.prefill_tokens, []
        while self.waiting and left > 0 and len(self.running) + len(joining) < self.max_rows:
            request = self.waiting[0]
            try:
                left -= self._read(request, left)
            except BaseException as error:
                request.fail(error)
                if not isinstance(error, Exception):
                    raise
            if request.done:
                request.state = None
            elif request.read == len(request.prompt):
                joining.append(request)
            else:
                continue
            self.waiting.popleft()
        if joining:
            states = [*([] if self._state is None else [self._state]), *(request.state for request in joining)]
            self.running += joining
            self._regroup(states)
            for request in joining:
                request.state = None

    def _read(self, request: Request, most: int) -> int:
        """Read at most so many tokens of a prompt and, after its last, choose the first new one: how many were read."""
        if request.state is None:
            self._start(request)
        end = min(request.read + most, len(request.prompt))
        if request.read < request.shared < end:
            end = request.shared
        part = request.prompt[request.read : end]
        last = torch.tensor([len(part) - 1], device=part.device)
        features, request.state = self.model.features(part[None], request.state, places=last)
        request.read = end
        if self.prefix_cache is not None and end in (request.shared, len(request.prompt)):
            self.prefix_cache.insert(request.prompt[:end], request.state)
        if end == len(request.prompt):
            request.choose(self.model.logits(features[:, 0]))
        return len(part)

    def _start(self, request: Request) -> None:
        """Give a request the state from which its prompt is read: its last token in any case, for the logits."""
        if self.prefix_cache is not None:
            before = request.prompt[:-1]
            request.reused, request.state = self.prefix_cache.longest(before)
            request.read, shared = request.reused, self.prefix_cache.shared(before)
            request.shared = shared if shared >= self.prefix_cache.min_tokens else 0
        if request.state is None:
            request.state = self.model.init_state(1)
