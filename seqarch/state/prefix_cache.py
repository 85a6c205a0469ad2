"""States after texts that come again, found by the tokens that a text begins with."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from seqarch.layers.mixer import clone_state, measured_state_bytes
from seqarch.layers.rows import row_count
from seqarch.models import LanguageModel
from seqarch.ops.dispatch.checks import fits, show


@dataclass(eq=False)
class _Node:
    """A place in the tree: after its parent's tokens and its own.

    Attributes:
        tokens: from its parent to here; the root has none.
        children: by their first token.
        state: after all tokens up to here, if that is kept; its size in bytes, and when it was last used.
    """

    tokens: tuple[int, ...] = ()
    parent: _Node | None = None
    children: dict[int, _Node] = field(default_factory=dict)
    state: Any = None
    size: int = 0
    used: int = 0


class PrefixCache:
    """States of one row, kept after some texts: a tree of tokens, whose states take at most ``max_bytes`` together.

    A state of fixed size cannot be cut to fewer tokens, so that only texts that begin with *all* tokens of a kept state
    go on from there. :meth:`shared` tells how far a text goes along with others that are kept: to keep the state at
    that place, as :class:`seqarch.serving.Generator` does, is what makes a common beginning be found from then on (Pan
    et al. 2024, "Marconi: Prefix Caching for the Era of Hybrid LLMs"). States that were used least recently go first.

    Any thread may use it. It is of one model with the parameters that it has: :meth:`clear` it when they change.

    Args:
        max_bytes: of the states' tensors, counted exactly; the tokens of the tree itself are not.
        min_tokens: shorter texts are not kept, as they are read as fast as they are looked up.

    Attributes:
        bytes: of the states that it holds.
    """

    def __init__(self, model: LanguageModel, max_bytes: int, *, min_tokens: int = 16):
        for name, count in (("max_bytes", max_bytes), ("min_tokens", min_tokens)):
            if not fits(count, (int,)) or count < 1:
                raise ValueError(f"PrefixCache: {name} is {show(count)}, expected an int of at least 1")
        self.model, self.max_bytes, self.min_tokens = model, max_bytes, min_tokens
        self.bytes = 0
        self._root = _Node()
        self._clock = 0
        self._lock = threading.RLock()

    def __len__(self) -> int:
        """How many states it holds."""
        with self._lock:
            return sum(node.state is not None for node in _below(self._root))

    def longest(self, tokens: Sequence[int] | Tensor) -> tuple[int, Any]:
        """The longest beginning of a text after which a state is kept: how many tokens it has, and a copy of the state.

        ``(0, None)`` where there is none.
        """
        with self._lock:
            path, _, _ = self._descend(_numbers(tokens))
            known = [(count, node) for count, node in path if node.state is not None]
            if not known:
                return 0, None
            count, node = known[-1]
            self._touch(node)
            return count, clone_state(node.state)

    def shared(self, tokens: Sequence[int] | Tensor) -> int:
        """How many of a text's first tokens begin a text of which a state is kept."""
        with self._lock:
            path, _, common = self._descend(_numbers(tokens))
            return path[-1][0] + common

    def insert(self, tokens: Sequence[int] | Tensor, state: Any) -> bool:
        """Keep a copy of the state after these tokens: whether it is kept, as one that is too large is not.

        Raises:
            ValueError: it is no state of one row.
        """
        numbers = _numbers(tokens)
        if (rows := row_count(state)) != 1:
            raise ValueError(f"PrefixCache: the state has {rows} rows, expected 1")
        size = measured_state_bytes(state)
        if len(numbers) < self.min_tokens or size > self.max_bytes:
            return False
        with self._lock:
            node = self._place(numbers)
            self._forget(node)
            node.state, node.size = clone_state(state), size
            self.bytes += size
            self._touch(node)
            while self.bytes > self.max_bytes:
                oldest = min((n for n in _below(self._root) if n.state is not None), key=lambda n: n.used)
                self._forget(oldest)
                self._prune(oldest)
            return True

    def clear(self) -> None:
        """Let all states go."""
        with self._lock:
            self._root, self.bytes = _Node(), 0

    def _touch(self, node: _Node) -> None:
        self._clock += 1
        node.used = self._clock

    def _forget(self, node: _Node) -> None:
        self.bytes -= node.size
        node.state, node.size = None, 0

    def _descend(self, tokens: tuple[int, ...]) -> tuple[list[tuple[int, _Node]], _Node | None, int]:
        """The nodes on the way, each with its depth; the child into which the rest leads, and how far."""
        path, depth = [(0, self._root)], 0
        while (child := path[-1][1].children.get(tokens[depth]) if depth < len(tokens) else None) is not None:
            rest = tokens[depth : depth + len(child.tokens)]
            common = next((i for i, (a, b) in enumerate(zip(rest, child.tokens, strict=False)) if a != b), len(rest))
            if common < len(child.tokens):
                return path, child, common
            depth += common
            path.append((depth, child))
        return path, None, 0

    def _place(self, tokens: tuple[int, ...]) -> _Node:
        """The node after these tokens, made if there was none."""
        path, child, common = self._descend(tokens)
        depth, node = path[-1]
        if child is not None:  # a node in the middle of the way to the child
            middle = _Node(child.tokens[:common], node)
            node.children[middle.tokens[0]] = middle
            child.tokens, child.parent = child.tokens[common:], middle
            middle.children[child.tokens[0]] = child
            depth, node = depth + common, middle
        if depth < len(tokens):
            leaf = _Node(tokens[depth:], node)
            node.children[leaf.tokens[0]] = leaf
            node = leaf
        return node

    def _prune(self, node: _Node) -> None:
        """Take away nodes that lead to no state, and those in the middle of a way."""
        while node.parent is not None and node.state is None and len(node.children) < 2:
            parent = node.parent
            if node.children:
                (child,) = node.children.values()
                child.tokens, child.parent = node.tokens + child.tokens, parent
                parent.children[child.tokens[0]] = child
                return
            del parent.children[node.tokens[0]]
            node = parent


def _numbers(tokens: Sequence[int] | Tensor) -> tuple[int, ...]:
    return tuple(tokens.tolist() if isinstance(tokens, Tensor) else tokens)


def _below(node: _Node) -> Iterator[_Node]:
    waiting = [node]
    while waiting:
        yield (node := waiting.pop())
        waiting += node.children.values()
