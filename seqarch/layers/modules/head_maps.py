"""What linear maps of a mixer are in attention's terms: its queries, keys, values and what reads the heads."""

from __future__ import annotations

from typing import Any, NamedTuple

from torch import Tensor, nn

from seqarch.layers.modules.linear import is_plain_linear


class HeadMap(NamedTuple):
    """Heads that a mixer projects its input to: some rows of a linear map. Or heads that its output is projected from:
    some columns.

    Attributes:
        role: ``"q"``, ``"k"`` or ``"v"``, or ``"o"`` of the columns; another name for what has no counterpart in
            attention.
        path: of the linear map in its mixer, as ``get_submodule`` takes it.
        heads: how many there are.
        width: channels of each; ``None`` where channels are in no heads, and ``heads`` is the number of channels.
        start: the first row, or column.
    """

    role: str
    path: str
    heads: int
    width: int | None
    start: int = 0

    @property
    def size(self) -> int:
        """Channels of all heads."""
        return self.heads * (self.width or 1)

    def split(self, count: int) -> list[HeadMap]:
        """So many maps of equally many heads, one after the other."""
        heads, size = self.heads // count, self.size // count
        return [self._replace(heads=heads, start=self.start + i * size) for i in range(count)]

    def within(self, path: str) -> HeadMap:
        """The same of a mixer that is a part, under this name, of another one."""
        return self._replace(path=f"{path}.{self.path}")

    def linear(self, mixer: nn.Module) -> nn.Linear:
        """The linear map, whose numbers can be read.

        Raises:
            ValueError: an adapter, a quantised weight or another module stands in its place.
        """
        found = mixer.get_submodule(self.path)
        if not isinstance(found, nn.Linear) or not is_plain_linear(found):
            raise ValueError(f"{self.path} is a {type(found).__name__}, expected a linear map and nothing more")
        return found

    def weight(self, mixer: nn.Module) -> Tensor:
        """A view of the weights, ``[size, D]``."""
        weight = self.linear(mixer).weight
        return (weight.mT if self.role == "o" else weight).narrow(0, self.start, self.size)

    def bias(self, mixer: nn.Module) -> Tensor | None:
        """A view of the biases of these rows, ``[size]``; of ``"o"`` the bias ``[D]`` of the map."""
        bias: Any = self.linear(mixer).bias
        return bias if bias is None or self.role == "o" else bias.narrow(0, self.start, self.size)
