"""Several requests to one model, decoded together: each is read when it comes and leaves when it is done.

For example::

    generator = Generator(model)
    first = generator.submit([1, 2, 3], max_new_tokens=100, stop_token=0)
    second = generator.submit([4, 5], max_new_tokens=20, temperature=0.8, seed=1)
    for token in first:                # as they come; the second goes on meanwhile
        print(token)
    print(second.result())
"""

from seqarch.serving.generator import Generator
from seqarch.serving.request import Cancelled, Request
from seqarch.serving.routing import RoutingTrace, record_routing, replay
from seqarch.serving.speculative import Draft, PromptLookup, Speculated, speculate

__all__ = [
    "Cancelled",
    "Draft",
    "Generator",
    "PromptLookup",
    "Request",
    "RoutingTrace",
    "Speculated",
    "record_routing",
    "replay",
    "speculate",
]
