"""For every generated task, a program that solves it: from the tokens of one sequence to its answers.

A solver reads tokens as a person would, left to right and without the random numbers behind them, so that it shares
nothing with the generator. It answers at the positions that are asked about and may answer at others.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise, permutations
from statistics import median

import numpy as np

from experiments.tasks import Batch
from experiments.tasks.compositional_mqar import CompositionalMQARConfig
from experiments.tasks.compression import CompressionConfig
from experiments.tasks.copying import CopyingConfig
from experiments.tasks.cwe import CWEConfig
from experiments.tasks.forgetting_mqar import ForgettingMQARConfig
from experiments.tasks.fuzzy_recall import FuzzyRecallConfig
from experiments.tasks.fwe import FWEConfig
from experiments.tasks.induction_heads import InductionHeadsConfig
from experiments.tasks.listops import ListOpsConfig
from experiments.tasks.memorisation import Memorisation, MemorisationConfig
from experiments.tasks.modular_arithmetic import ModularArithmeticConfig
from experiments.tasks.mqar import MQARConfig
from experiments.tasks.multi_hop_recall import MultiHopRecallConfig
from experiments.tasks.needle import NeedleConfig
from experiments.tasks.ngram_lookup import NgramLookupConfig
from experiments.tasks.noisy_recall import NoisyRecallConfig
from experiments.tasks.parity import ParityConfig
from experiments.tasks.selective_copying import SelectiveCopyingConfig
from experiments.tasks.task import IGNORED
from experiments.tasks.trees import CLOSE, OPERATORS
from experiments.tasks.variable_reassignment import VariableReassignmentConfig
from experiments.tasks.variable_tracking import VariableTrackingConfig
from experiments.tasks.word_problem import WordProblemConfig

Answers = dict[int, int]
"""By position."""


def mqar(tokens: list[int], config: MQARConfig) -> Answers:
    known = 2 * config.pairs
    book = dict(zip(tokens[:known:2], tokens[1:known:2], strict=True))
    return {place: book[token] for place, token in enumerate(tokens[known:], known) if token in book}


def forgetting_mqar(tokens: list[int], config: ForgettingMQARConfig) -> Answers:
    known = 2 * (config.pairs + config.updates)
    book: dict[int, int] = {}
    for key, value in zip(tokens[:known:2], tokens[1:known:2], strict=True):
        book[key] = value
    return {place: book[token] for place, token in enumerate(tokens[known:], known) if token in book}


def compositional_mqar(tokens: list[int], config: CompositionalMQARConfig) -> Answers:
    known = 3 * config.pairs
    book = {(tokens[place], tokens[place + 1]): tokens[place + 2] for place in range(0, known, 3)}
    keys = {place: (tokens[place - 1], tokens[place]) for place in range(known + 1, len(tokens))}
    return {place: book[key] for place, key in keys.items() if key in book}


def multi_hop_recall(tokens: list[int], config: MultiHopRecallConfig) -> Answers:
    """Follows the links one by one; the pairs end at the first token that asks for a number of hops, or at a blank."""
    known = next(place for place, token in enumerate(tokens) if token >= config.vocab_size)
    book = dict(zip(tokens[:known:2], tokens[1:known:2], strict=True))
    answers = {}
    for place, (asked, token) in enumerate(pairwise(tokens), 1):
        if config.vocab_size <= asked < config.vocab_size + config.hops:
            for _ in range(asked - config.vocab_size + 1):
                token = book[token]
            answers[place] = token
    return answers


def parity(tokens: list[int], config: ParityConfig) -> Answers:
    return {place: tokens[: place + 1].count(1) % 2 for place in range(len(tokens))}


def modular_arithmetic(tokens: list[int], config: ModularArithmeticConfig) -> Answers:
    """By Python's own arithmetic, on each prefix."""
    written = [str(token) if token < config.modulus else config.operators[token - config.modulus] for token in tokens]
    return {place: eval("".join(written[: place + 1])) % config.modulus for place in range(0, len(tokens), 2)}


def word_problem(tokens: list[int], config: WordProblemConfig) -> Answers:
    """By carrying out one permutation after the other."""
    assert config.group == "s3"
    elements = list(permutations(range(3)))
    answers, things = {}, (0, 1, 2)
    for place, token in enumerate(tokens):
        things = tuple(elements[token][thing] for thing in things)
        answers[place] = elements.index(things)
    return answers


def selective_copying(tokens: list[int], config: SelectiveCopyingConfig) -> Answers:
    letters = [token for token in tokens if 1 <= token < config.vocab_size - 1]
    markers = [place for place, token in enumerate(tokens) if token == config.vocab_size - 1]
    return dict(zip(markers, letters, strict=True))


def needle(tokens: list[int], config: NeedleConfig) -> Answers:
    """Looks for what is said first of each name, and answers wherever a name is said again."""
    text, answers = bytes(tokens).decode("latin-1"), {}
    book: dict[str, str] = {}
    for said in re.finditer(r"The number of ([a-z]{5}) is (\d*)", text):
        number = book.setdefault(said[1], said[2])
        answers |= {said.start(2) - 1 + place: ord(digit) for place, digit in enumerate(number)}
    return answers


def induction_heads(tokens: list[int], config: InductionHeadsConfig) -> Answers:
    return {len(tokens) - 1: tokens[tokens.index(tokens[-1]) + 1]}


def noisy_recall(tokens: list[int], config: NoisyRecallConfig) -> Answers:
    book: dict[int, int] = {}
    answers = {}
    for place in range(0, len(tokens), 2):
        key, value = tokens[place : place + 2]
        if key < config.vocab_size and key in book:
            answers[place] = book[key]
        book[key] = value
    return answers


def fuzzy_recall(tokens: list[int], config: FuzzyRecallConfig) -> Answers:
    """Reads motifs by what they are made of, and names the next token of a value as soon as its key is known."""
    half, between = config.vocab_size // 2, config.vocab_size
    book: dict[tuple[int, ...], list[int]] = {}
    answers, place = {}, 0
    while place < len(tokens):
        begin = place
        while place < len(tokens) and tokens[place] < half:
            place += 1
        key, value_begins = tuple(tokens[begin:place]), place + 1
        place = value_begins
        while place < len(tokens) and half <= tokens[place] < between:
            place += 1
        for number, token in enumerate(book.get(key, [])):
            answers[value_begins - 1 + number] = token
        book.setdefault(key, tokens[value_begins:place])
    return {place: answer for place, answer in answers.items() if place < len(tokens)}


def compression(tokens: list[int], config: CompressionConfig) -> Answers:
    count = len(tokens) // 2
    return {place: tokens[tokens[place] - config.vocab_size] for place in range(count, len(tokens))}


def memorisation(tokens: list[int], config: MemorisationConfig) -> Answers:
    """Learns the map from training examples, which show it whole."""
    learnt = Memorisation(config).train_batch(99, 0, 100)
    book = dict(zip(learnt.tokens[:, ::2].ravel().tolist(), learnt.targets[:, 1::2].ravel().tolist(), strict=True))
    assert len(book) == len(set(book.values())) == config.keys
    return {place: book[tokens[place - 1]] for place in range(1, len(tokens), 2)}


def copying(tokens: list[int], config: CopyingConfig) -> Answers:
    again = tokens.index(config.letters + 1)
    return dict(enumerate([*tokens[1:again], config.letters + 2], again))


def ngram_lookup(tokens: list[int], config: NgramLookupConfig) -> Answers:
    begin, mark, answered = config.letters, config.letters + 1, len(tokens) - config.answer + 1
    assert tokens[0] == begin
    string, *rest = "".join(map(chr, tokens[1:answered])).split(chr(mark))
    string, key = (string, rest[0]) if config.asked == "after" else (rest[0], string)
    found = string.index(key) + len(key)
    return {answered - 1 + number: ord(string[found + number]) for number in range(config.answer)}


def variable_tracking(tokens: list[int], config: VariableTrackingConfig) -> Answers:
    text = bytes(tokens).decode()
    book: dict[str, str] = {}
    for name, source in re.findall(r"^VAR ([A-Z]{5}) = (\w{5})$", text, re.MULTILINE):
        assert name not in book
        book[name] = book.get(source, source)
    asked = re.search(r"\nWhich are (\d{5})\?", text)
    assert asked
    answer = "".join(f" {name}" for name, value in book.items() if value == asked[1])
    return {asked.end() - 1 + place: ord(letter) for place, letter in enumerate(answer) if letter != " "}


def variable_reassignment(tokens: list[int], config: VariableReassignmentConfig) -> Answers:
    """Carries out one line after the other."""
    book: dict[str, str] = {}
    answers = {}
    for said in re.finditer(
        r"^VAR ([A-Z]{5}) = (\w{5})$|^Now ([A-Z]{5}) is (\d*)", bytes(tokens).decode(), re.MULTILINE
    ):
        if said[1]:
            book[said[1]] = said[2] if said[2].isdigit() else book[said[2]]
        else:
            answers |= {said.start(4) - 1 + place: ord(digit) for place, digit in enumerate(book[said[3]])}
    return answers


def cwe(tokens: list[int], config: CWEConfig) -> Answers:
    """Counts; a dictionary keeps the order in which words were first put into it."""
    counted, question = bytes(tokens).decode().split("\n")
    counts = Counter(re.findall(r"\d+\. ([a-z]{6}) ", counted))
    common = [word for word, count in counts.items() if count == config.freq_cw]
    return _written("".join(f" {word}" for word in common), len(counted) + 1 + question.index(":") + 1)


def fwe(tokens: list[int], config: FWEConfig) -> Answers:
    counted, question = bytes(tokens).decode().split("\n")
    (first, one), (second, two), (third, three), (_, four), *_ = Counter(re.findall("[a-z]{6}", counted)).most_common()
    assert one > two > three > four
    return _written(f" {first} {second} {third}", len(counted) + 1 + question.index(":") + 1)


def _written(answer: str, begins: int) -> Answers:
    """The letters of an answer that begins at that place of a text."""
    return {begins - 1 + place: ord(letter) for place, letter in enumerate(answer) if letter != " "}


def listops(tokens: list[int], config: ListOpsConfig) -> Answers:
    """With a stack, as a person reads brackets."""
    by_name = {"MIN": min, "MAX": max, "MED": lambda values: int(median(values)), "SM": lambda values: sum(values) % 10}
    stack: list[list[int]] = [[]]
    answers = {}
    for place, token in enumerate(tokens):
        if token < 10:
            stack[-1].append(token)
        elif token < CLOSE:
            stack.append([token - 10])
        elif token == CLOSE:
            operator, *values = stack.pop()
            answers[place] = by_name[OPERATORS[operator]](values)
            stack[-1].append(answers[place])
    assert len(stack) == len(stack[0]) == 1
    return answers


SOLVERS: dict[str, Callable[..., Answers]] = {
    "mqar": mqar,
    "forgetting_mqar": forgetting_mqar,
    "compositional_mqar": compositional_mqar,
    "multi_hop_recall": multi_hop_recall,
    "parity": parity,
    "modular_arithmetic": modular_arithmetic,
    "word_problem": word_problem,
    "selective_copying": selective_copying,
    "needle": needle,
    "needle_text": needle,
    "induction_heads": induction_heads,
    "noisy_recall": noisy_recall,
    "fuzzy_recall": fuzzy_recall,
    "compression": compression,
    "memorisation": memorisation,
    "copying": copying,
    "ngram_lookup": ngram_lookup,
    "variable_tracking": variable_tracking,
    "variable_reassignment": variable_reassignment,
    "cwe": cwe,
    "fwe": fwe,
    "listops": listops,
}


def solve(name: str, batch: Batch, config) -> np.ndarray:
    """``[B, T]``: the answers of a task's solver."""
    answers = np.full(batch.targets.shape, IGNORED)
    for row, tokens in enumerate(batch.tokens):
        for place, answer in SOLVERS[name](tokens.tolist(), config).items():
            answers[row, place] = answer
    return answers
