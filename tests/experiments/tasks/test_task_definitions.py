"""The properties of each task; those that all share are in test_tasks.py."""

from __future__ import annotations

import math
import re
from collections import Counter
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from experiments.tasks.byte_text import START, position_bins
from experiments.tasks.coded_words import coded_words
from experiments.tasks.compositional_mqar import CompositionalMQAR, CompositionalMQARConfig
from experiments.tasks.compression import CompressionConfig
from experiments.tasks.copying import Copying, CopyingConfig
from experiments.tasks.cwe import CWE, CWEConfig
from experiments.tasks.forgetting_mqar import ForgettingMQAR, ForgettingMQARConfig
from experiments.tasks.fuzzy_recall import FuzzyRecall, FuzzyRecallConfig
from experiments.tasks.fwe import FWE, FWEConfig
from experiments.tasks.generated import Draws
from experiments.tasks.haystack import distinct
from experiments.tasks.induction_heads import InductionHeads, InductionHeadsConfig
from experiments.tasks.listops import ListOps, ListOpsConfig
from experiments.tasks.memorisation import Memorisation, MemorisationConfig
from experiments.tasks.modular_arithmetic import ModularArithmeticConfig, values
from experiments.tasks.mqar import MQAR, MQARConfig
from experiments.tasks.multi_hop_recall import MultiHopRecall, MultiHopRecallConfig
from experiments.tasks.needle import Needle, NeedleConfig
from experiments.tasks.needle_text import NeedleText, NeedleTextConfig
from experiments.tasks.ngram_lookup import NgramLookup, NgramLookupConfig
from experiments.tasks.noisy_recall import NoisyRecall, NoisyRecallConfig
from experiments.tasks.selective_copying import SelectiveCopying, SelectiveCopyingConfig
from experiments.tasks.stdlib_text import StdlibText, StdlibTextConfig
from experiments.tasks.task import IGNORED, TaskError
from experiments.tasks.trees import BLANK, grow, mixed
from experiments.tasks.variable_reassignment import VariableReassignment, VariableReassignmentConfig
from experiments.tasks.variable_tracking import VariableTracking, VariableTrackingConfig
from experiments.tasks.word_problem import WordProblemConfig, multiplication, order, prefix_products
from tests.support.small_tasks import FEW, SMALL
from tests.support.solvers import solve


class TestMQAR:
    def test_a_dictionary_solves_it_among_random_fillers(self):
        task = MQAR(MQARConfig(vocab_size=64, length=32, pairs=4, filler="random"))
        batch = task.train_batch(0, 0, 200)
        asked = batch.targets != IGNORED
        assert np.array_equal(solve("mqar", batch, task.config)[asked], batch.targets[asked])
        assert (batch.tokens[:, 8:][~asked[:, 8:]] > 0).mean() > 0.9

    def test_guessing_among_the_values_is_chance(self, tasks):
        task = tasks["mqar"]
        batch = task.train_batch(0, 0, 4000)
        asked = batch.targets != IGNORED
        values = batch.tokens[:, 1:8:2]
        columns = np.random.default_rng(0).integers(4, size=batch.targets.shape)
        guesses = np.take_along_axis(values, columns.clip(max=3), axis=1)
        measured = task.score(batch.targets, np.zeros(asked.shape), guesses == batch.targets)["accuracy"]
        assert task.chance()[0] == 0.25
        assert measured == pytest.approx(0.25, abs=0.015)

    def test_the_definition_holds(self, tasks):
        batch = tasks["mqar"].train_batch(0, 0, 500)
        keys, values = batch.tokens[:, 0:8:2], batch.tokens[:, 1:8:2]
        assert keys.min() >= 1
        assert keys.max() == 31
        assert values.min() == 32
        assert values.max() == 63
        for drawn in (keys, values):
            assert all(len(set(row)) == 4 for row in drawn)
        asked = batch.targets != IGNORED
        assert (asked.sum(axis=1) == 4).all()
        assert not asked[:, :8].any()
        assert not asked[:, 1::2].any()
        assert (batch.tokens[:, 8:][~asked[:, 8:]] == 0).all()

    def test_gaps_follow_the_power_law(self):
        """The first key's slot is one draw from p(g) ~ g^(a - 1)."""
        task = MQAR(MQARConfig(vocab_size=64, length=32, pairs=1, power=0.5))
        batch = task.train_batch(0, 0, 20000)
        slots = (np.argmax(batch.targets != IGNORED, axis=1) - 2) // 2
        expected = np.arange(1, 16) ** -0.5
        expected /= expected.sum()
        assert np.bincount(slots, minlength=15) / 20000 == pytest.approx(expected, abs=0.01)

    @pytest.mark.parametrize(
        "wrong",
        [{"length": 30}, {"length": 33}, {"vocab_size": 9}, {"vocab_size": 16}, {"power": 0.0}, {"filler": "zeros"}],
    )
    def test_impossible_settings_are_refused(self, wrong):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            MQARConfig(**{"vocab_size": 64, "length": 32, "pairs": 8, **wrong})


class TestForgettingMQAR:
    def test_some_keys_are_given_new_values(self):
        config = ForgettingMQARConfig(vocab_size=64, length=64, pairs=8, updates=3)
        batch = ForgettingMQAR(config).train_batch(0, 0, 2000)
        keys, values = batch.tokens[:, 0:22:2], batch.tokens[:, 1:22:2]
        again = keys[:, :8, None] == keys[:, None, 8:]
        assert (again.sum(axis=(1, 2)) == 3).all()
        assert again.any(axis=2).mean(axis=0) == pytest.approx([3 / 8] * 8, abs=0.05)
        assert all(len(set(row)) == 8 for row in keys[:100, :8])
        assert all(len(set(row)) == 11 for row in values[:100])

    def test_whoever_keeps_the_first_value_is_right_about_the_others(self, tasks):
        task = tasks["forgetting_mqar"]
        (batch,) = task.evaluation("test")
        backwards = batch.tokens.copy()
        backwards[:, :12] = batch.tokens[:, :12].reshape(-1, 6, 2)[:, ::-1].reshape(-1, 12)
        kept = solve("forgetting_mqar", batch._replace(tokens=backwards), task.config) == batch.targets
        assert task.score(batch.targets, np.zeros(kept.shape), kept)["accuracy"] == 2 / 4
        asked = batch.targets != IGNORED
        assert np.array_equal(kept[asked], batch.groups["updated"][asked] == 0)

    def test_without_updates_it_is_plain_recall(self):
        config = ForgettingMQARConfig(vocab_size=64, length=32, pairs=4, updates=0, filler="random")
        batch = ForgettingMQAR(config).train_batch(0, 0, 100)
        asked = batch.targets != IGNORED
        assert np.array_equal(solve("mqar", batch, config)[asked], batch.targets[asked])


def test_neither_part_of_a_key_gives_its_value():
    config = CompositionalMQARConfig(vocab_size=60, length=80, pairs=9, filler="random")
    batch = CompositionalMQAR(config).train_batch(0, 0, 300)
    for first, second, value in zip(*(batch.tokens[:, part:27:3] for part in range(3)), strict=True):
        assert len({*zip(first, second, strict=True)}) == len({*value}) == 9
        assert len({*first}) == len({*second}) == 3
    kinds = [batch.tokens[:, part:27:3] for part in range(3)]
    assert [(kind.min(), kind.max()) for kind in kinds] == [(1, 19), (20, 39), (40, 59)]
    asked = batch.targets != IGNORED
    assert (asked.sum(axis=1) == 9).all()
    assert np.array_equal(solve("compositional_mqar", batch, config)[asked], batch.targets[asked])


class TestMultiHopRecall:
    def test_every_pass_shows_all_links_in_an_order_of_its_own(self):
        config = MultiHopRecallConfig(length=100, chains=3, hops=3, passes=3, questions=5)
        task = MultiHopRecall(config)
        batch = task.train_batch(0, 0, 200)
        passes = batch.tokens[:, :54].reshape(200, 3, 9, 2)
        codes = passes[..., 0] * 64 + passes[..., 1]
        assert (np.sort(codes, axis=2) == np.sort(codes[:, :1], axis=2)).all()
        assert (codes[:, 0] == codes[:, 1]).mean() == pytest.approx(1 / 9, abs=0.03)
        asked = batch.targets != IGNORED
        assert (asked.sum(axis=1) == 5).all()
        assert np.array_equal(solve("multi_hop_recall", batch, config)[asked], batch.targets[asked])

    def test_every_number_of_hops_is_asked_for(self):
        batch = MultiHopRecall(MultiHopRecallConfig()).train_batch(0, 0, 2000)
        hops = batch.groups["hops"][batch.targets != IGNORED]
        assert np.bincount(hops)[1:] / len(hops) == pytest.approx([1 / 3] * 3, abs=0.02)


def test_products_bind_before_sums():
    numbers, operators = np.array([[3, 4, 2, 1, 4]]), np.array([list("+*-*")])
    assert values(numbers, operators, 5).tolist() == [[3, 7 % 5, 11 % 5, 10 % 5, 7 % 5]]


@pytest.mark.parametrize(
    ("group", "size"), [("s3", 6), ("a4", 12), ("a5", 60), ("s5", 120), ("z60", 60), ("a4xz5", 60)]
)
def test_groups_are_groups(group, size):
    table = multiplication(group)
    assert len(table) == order(group) == size
    every = np.arange(size)
    assert np.array_equal(table[0], every)
    assert np.array_equal(table[:, 0], every)
    for lines in (table, table.T):
        assert np.array_equal(np.sort(lines, axis=1), np.broadcast_to(every, (size, size)))
    a, b, c = np.random.default_rng(0).integers(size, size=(3, 2000))
    assert np.array_equal(table[table[a, b], c], table[a, table[b, c]])
    assert np.array_equal(table, table.T) == (group == "z60")


def test_prefix_products_of_any_length_are_those_one_by_one():
    table = multiplication("a5")
    elements = np.random.default_rng(0).integers(60, size=(3, 37))
    products = prefix_products(elements, table)
    one = elements[:, 0]
    for place in range(1, 37):
        one = table[one, elements[:, place]]
        assert np.array_equal(products[:, place], one)


def test_letters_stand_anywhere():
    task = SelectiveCopying(SelectiveCopyingConfig(length=12, copied=2))
    tokens = task.train_batch(0, 0, 20000).tokens[:, :-2]
    letters = (tokens > 0) & (tokens < 15)
    assert (letters.sum(axis=1) == 2).all()
    assert letters.mean(axis=0) == pytest.approx(0.2, abs=0.01)
    assert np.bincount(tokens[letters], minlength=15)[1:] / 40000 == pytest.approx(1 / 14, abs=0.005)


class TestNeedles:
    def test_as_it_reads(self):
        """Six statements of 27 bytes without a haystack, of which the last ends before its point."""
        batch = Needle(NeedleConfig(length=159, digits=2)).train_batch(0, 0, 3)
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            text = bytes(tokens.astype(np.uint8)).decode() + chr(targets[-1])
            lines = f"{text}.".split("\n")
            assert all(re.fullmatch(r"The number of [a-z]{5} is \d\d\.", line) for line in lines)
            assert len(set(lines[:4])) == 4
            assert len({*lines[4:]} & {*lines[:4]}) == len(lines[4:]) == 2
            assert (targets != IGNORED).sum() == 4

    def test_needles_stand_before_any_line(self):
        task = Needle(NeedleConfig(length=1000, needles=1, questions=1))
        texts = [bytes(tokens.astype(np.uint8)) for tokens in task.train_batch(0, 0, 3000).tokens]
        places = np.array([text.index(b"The number") for text in texts])
        assert all(text[place - 1 : place] == b"\n" for text, place in zip(texts, places, strict=True))
        assert np.histogram(places, 4, (0, 1000 - 58))[0] / 3000 == pytest.approx(1 / 4, abs=0.03)

    def test_haystacks_are_of_the_splits_own_files(self, tasks):
        task = tasks["needle_text"]
        for split in ("train", "validation", "test"):
            (text,) = task.examples(0, split, 0, 1).tokens
            hay = re.split(rb"The number of [a-z]{5} is \d{4}\.\n", bytes(text.astype(np.uint8)))
            pieces = [piece for piece in hay[:-2] if len(piece) > 40]
            assert pieces
            assert all(piece in task.texts[split].tobytes() for piece in pieces)

    def test_all_bytes_can_be_predicted(self, tasks):
        alone, task = tasks["needle_text"], NeedleText(replace(SMALL["needle_text"], predict="all"))
        batch, answers = task.train_batch(0, 0, 8), alone.train_batch(0, 0, 8)
        assert np.array_equal(batch.tokens, answers.tokens)
        assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])
        asked = answers.targets != IGNORED
        assert np.array_equal(batch.targets[asked], answers.targets[asked])
        scores = task.score(batch.targets, np.where(asked, 0.0, math.log(2)), asked)
        assert (scores["accuracy"], scores["sequence_accuracy"]) == (1, 1)
        assert scores["bits_per_byte"] == pytest.approx(1)
        assert scores["loss"] == pytest.approx(math.log(2) * (~asked).mean())


def test_distinct_numbers_are_uniform_and_differ():
    numbers = distinct(Draws(0, "train", 0, 30000), "numbers", 3, 4)
    assert all(len(set(row)) == 3 for row in numbers[:1000])
    codes = numbers @ [16, 4, 1]
    counts = np.bincount(codes, minlength=64)
    assert (counts > 0).sum() == 24
    assert counts[counts > 0] / 30000 == pytest.approx(1 / 24, abs=0.005)


def test_the_special_token_is_anywhere_and_twice():
    batch = InductionHeads(InductionHeadsConfig(length=6)).train_batch(0, 0, 8000)
    assert ((batch.tokens == 15).sum(axis=1) == 2).all()
    assert (batch.tokens[:, -1] == 15).all()
    places = np.argmax(batch.tokens == 15, axis=1)
    assert np.bincount(places, minlength=5) / 8000 == pytest.approx([0.25] * 4 + [0], abs=0.02)
    assert ((batch.targets != IGNORED).sum(axis=1) == 1).all()


def test_a_share_of_the_pairs_is_noise():
    task = NoisyRecall(NoisyRecallConfig())
    tokens = task.train_batch(0, 0, 500).tokens.reshape(500, 64, 2)
    is_noise = tokens >= 16
    assert np.array_equal(is_noise[:, :, 0], is_noise[:, :, 1])
    assert is_noise.mean() == pytest.approx(0.2, abs=0.01)
    plain = NoisyRecall(NoisyRecallConfig(noise=0.0))
    assert plain.vocab_size == 16
    tokens = plain.train_batch(0, 0, 500).tokens
    assert (tokens[:, ::2] < 8).all()
    assert (tokens[:, 1::2] >= 8).all()


def test_noise_is_no_part_of_what_is_known():
    """With as little noise as none, examples are those without: its streams are its own."""
    quiet, plain = (NoisyRecall(NoisyRecallConfig(noise=noise)) for noise in (1e-9, 0.0))
    assert np.array_equal(quiet.train_batch(0, 0, 50).tokens, plain.train_batch(0, 0, 50).tokens)


def test_motifs_of_every_length_occur():
    batch = FuzzyRecall(FuzzyRecallConfig()).train_batch(0, 0, 2000)
    text = "".join(np.array(list("k" * 8 + "v" * 8 + "="))[batch.tokens[:, :60]].ravel())
    for kind, end in (("k", "="), ("v", "k")):
        found = [len(run) for run in re.findall(f"(?<=[^{kind}]){kind}+(?={end})", text)]
        assert np.bincount(found, minlength=4)[1:4] / len(found) == pytest.approx(1 / 3, abs=0.03)
    assert (batch.targets != IGNORED).mean() > 0.2


def test_the_map_is_that_of_its_own_seed():
    maps = [Memorisation(MemorisationConfig(map_seed=seed)).values for seed in (0, 0, 1)]
    assert np.array_equal(maps[0], maps[1])
    assert not np.array_equal(maps[0], maps[2])
    assert sorted(maps[2]) == list(range(127, 254))


def test_strings_to_copy_are_of_all_lengths_in_training_and_of_the_longest_in_tests():
    task = Copying(CopyingConfig(length=22, shortest=3, test_lengths=[42], **FEW))
    batch = task.train_batch(0, 0, 8000)
    counts = (batch.targets != IGNORED).sum(axis=1) - 1
    assert np.bincount(counts)[3:] / 8000 == pytest.approx([1 / 8] * 8, abs=0.015)
    blank = batch.tokens == task.blank
    assert (blank.sum(axis=1) == 20 - 2 * counts).all()
    assert (np.diff(blank.astype(int), axis=1) >= 0).all()
    for split, longest in (("validation", 10), ("test", 10), ("test_42", 20)):
        assert all(((each.targets != IGNORED).sum(axis=1) == longest + 1).all() for each in task.evaluation(split))


@pytest.mark.parametrize("length", [10, 40])
def test_letters_are_asked_for_before_the_string_too(length):
    task = NgramLookup(NgramLookupConfig(length=length, ngram=2, answer=2, letters=4, asked="before"))
    batch = task.train_batch(0, 0, 300)
    asked = batch.targets != IGNORED
    assert batch.tokens.shape == (300, length)
    assert (asked.sum(axis=1) == 2).all()
    assert np.array_equal(solve("ngram_lookup", batch, task.config)[asked], batch.targets[asked])


def test_chains_are_given_in_any_order_that_keeps_each():
    """Of two chains of two statements there are six such orders."""
    task = VariableTracking(VariableTrackingConfig(length=300, chains=2, hops=1))
    seen = []
    for tokens in task.train_batch(0, 0, 3000).tokens:
        first = bytes(tokens.astype(np.uint8)).decode()
        assigned = re.findall(r"VAR (\w+) = (\w+)", first)
        asked = first.split("Which are ")[1][:5]
        chain = [name for name, value in assigned if value == asked]
        seen.append(tuple(asked in pair or chain[0] in pair for pair in assigned))
    counts = Counter(seen)
    assert len(counts) == 6
    assert [count / 3000 for count in counts.values()] == pytest.approx([1 / 6] * 6, abs=0.03)


class TestVariableReassignment:
    def test_every_variable_is_assigned_as_often(self):
        config = VariableReassignmentConfig(length=600, variables=3, reassignments=4, copied=0.3)
        batch = VariableReassignment(config).train_batch(0, 0, 300)
        copies = []
        for tokens in batch.tokens:
            said = re.findall(r"VAR (\w+) = (\w+)\n", bytes(tokens.astype(np.uint8)).decode())
            assert sorted(Counter(name for name, _ in said).values()) == [5] * 3
            assigned = [{name for name, _ in said[:place]} for place in range(15)]
            assert all(right.isdigit() or right in before for (_, right), before in zip(said, assigned, strict=True))
            numbers = [right for _, right in said if right.isdigit()]
            assert len(set(numbers)) == len(numbers)
            copies.append(15 - len(numbers))
        assert 0.2 < np.mean(copies) / 15 < 0.3

    def test_only_the_newest_assignment_counts(self):
        """Without copies: that of the last line which names a variable; with them hops are counted."""
        plain = VariableReassignment(VariableReassignmentConfig(copied=0.0)).train_batch(0, 0, 100)
        asked = plain.targets != IGNORED
        assert (plain.groups["hops"][asked] == 0).all()
        for tokens, targets in zip(plain.tokens, plain.targets, strict=True):
            text = bytes(tokens.astype(np.uint8)).decode()
            last = dict(re.findall(r"VAR (\w+) = (\w+)\n", text))
            answers = bytes(targets[targets != IGNORED].astype(np.uint8)).decode()
            assert "".join(last[name] for name in re.findall(r"Now (\w+) is", text)) == answers
        copied = VariableReassignment(VariableReassignmentConfig(copied=1.0)).train_batch(0, 0, 300)
        assert copied.groups["hops"][copied.targets != IGNORED].max() > 3


class TestWords:
    def test_they_differ_and_are_random(self):
        words = coded_words(Draws(0, "train", 0, 4), "words", 20000)
        assert all(len({word.tobytes() for word in row}) == 20000 for row in words)
        assert np.bincount(words.ravel() - ord("a")) / words.size == pytest.approx([1 / 26] * 26, abs=0.002)
        assert abs(np.corrcoef(words[0, :-1, 0], words[0, 1:, 0])[0, 1]) < 0.03

    @pytest.mark.parametrize("length", [4096, 131072])
    def test_rulers_lengths(self, length):
        cwe, fwe = CWE(CWEConfig(test_lengths=[131072])), FWE(FWEConfig(test_lengths=[131072]))
        split = {4096: "test", 131072: "test_131072"}[length]
        for name, task in (("cwe", cwe), ("fwe", fwe)):
            batch = task.examples(0, split, 0, 2)
            assert batch.tokens.shape == (2, length)
            asked = batch.targets != IGNORED
            assert np.array_equal(solve(name, batch, task.config)[asked], batch.targets[asked])
        text = bytes(cwe.examples(0, split, 0, 1).tokens[0].astype(np.uint8)).decode()
        numbers, words = zip(*re.findall(r"(\d+)\. ([a-z]{6}) ", text), strict=True)
        assert [int(number) for number in numbers] == list(range(1, len(words) + 1))
        counts = Counter(Counter(words).values())
        assert counts[30] == 10
        assert sum(number for count, number in counts.items() if count < 3) <= 1
        text = bytes(fwe.examples(0, split, 0, 1).tokens[0].astype(np.uint8)).decode().split("\n")[0]
        most, *rest = (count for _, count in Counter(text.split()).most_common())
        assert text.count("... ") == most
        assert rest == [most // rank**2 for rank in range(2, len(rest) + 2)]
        assert length - len(text.rstrip()) < 150

    def test_a_short_list_asks_for_no_counting(self):
        """Naming the next new word each time, as the docstring says."""
        right = {}
        for length in (4096, 16384):
            task, found = CWE(CWEConfig(length=length)), []
            batch = task.train_batch(0, 0, 40)
            for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
                seen = list(dict.fromkeys(re.findall(rb"\d+\. ([a-z]{6}) ", bytes(tokens.astype(np.uint8)))))
                answers = re.findall(rb".{6}", bytes(targets[targets != IGNORED].astype(np.uint8)))
                places = [-1, *(seen.index(answer) for answer in answers)]
                found += [place == before + 1 for before, place in pairwise(places)]
            right[length] = np.mean(found)
        assert right == {4096: pytest.approx(0.75, abs=0.06), 16384: pytest.approx(0.14, abs=0.06)}

    def test_a_word_with_a_wrong_letter_is_wrong(self, tasks):
        task = tasks["fwe"]
        batch = task.train_batch(0, 0, 2)
        hits = batch.targets != IGNORED
        hits[0, np.flatnonzero(hits[0])[[2, 3]]] = False
        scores = task.score(batch.targets, np.zeros(hits.shape), hits)
        assert (scores["accuracy"], scores["sequence_accuracy"]) == (5 / 6, 1 / 2)
        assert scores["token_accuracy"] == pytest.approx(34 / 36)
        each = task.answer_scores(batch.targets, np.zeros(hits.shape), hits)
        assert each[batch.targets != IGNORED].tolist() == [0] * 6 + [1] * 30


class TestListOps:
    def test_trees_are_those_of_the_definition(self):
        """Without a bound on the length: how many arguments are operators, and how many there are."""
        levels, _ = grow(mixed(np.arange(3000).astype(np.uint64)), 10, 10, 0.25, 10**6)
        inner = [level for level in levels[1:9] if len(level.tree)]
        operators = np.concatenate([level.arguments > 0 for level in inner])
        assert operators.mean() == pytest.approx(0.25, abs=0.005)
        counts = np.concatenate([level.arguments for level in levels[:9]])
        assert np.bincount(counts[counts > 0])[2:] / (counts > 0).sum() == pytest.approx([1 / 9] * 9, abs=0.005)
        assert not (levels[9].arguments > 0).any()
        for kind in range(4):
            share = np.concatenate([(level.token == 10 + kind) for level in levels]).sum() / (counts > 0).sum()
            assert share == pytest.approx(1 / 4, abs=0.01)

    def test_the_published_size(self):
        task = ListOps(ListOpsConfig(validation_examples=8, test_examples=8))
        batch = task.train_batch(0, 0, 32)
        assert np.array_equal(
            solve("listops", batch, task.config)[batch.targets != IGNORED], batch.targets[batch.targets != IGNORED]
        )
        sizes = (batch.tokens != BLANK).sum(axis=1)
        assert sizes.min() >= 500
        assert sizes.max() > 1500
        assert ((batch.targets != IGNORED).sum(axis=1) == 1).all()

    def test_a_tree_does_not_depend_on_those_beside_it(self):
        task = ListOps(ListOpsConfig(length=100))
        whole = task.train_batch(4, 0, 20).tokens
        assert all(np.array_equal(task.train_batch(4, row, 1).tokens[0], whole[row]) for row in range(20))

    def test_lengths_that_do_not_occur(self):
        task = ListOps(ListOpsConfig(length=2000, shortest=0.9, operators=0.0))
        with pytest.raises(TaskError, match="none had 1800 to 2000 tokens"):
            task.train_batch(0, 0, 1)


@pytest.mark.parametrize(
    ("config", "wrong"),
    [
        (ModularArithmeticConfig, {"modulus": 1}),
        (ModularArithmeticConfig, {"operators": "+/"}),
        (ModularArithmeticConfig, {"operators": "++"}),
        (ModularArithmeticConfig, {"operators": ""}),
        (WordProblemConfig, {"group": "d4"}),
        (WordProblemConfig, {"group": "s7"}),
        (WordProblemConfig, {"group": "a4xz99"}),
        (SelectiveCopyingConfig, {"length": 31}),
        (SelectiveCopyingConfig, {"copied": 0}),
        (SelectiveCopyingConfig, {"vocab_size": 3}),
        (NeedleConfig, {"length": 170}),
        (NeedleConfig, {"questions": 5}),
        (NeedleConfig, {"digits": 0}),
        (NeedleConfig, {"digits": 16}),
        (NeedleTextConfig, {"predict": "digits"}),
        (InductionHeadsConfig, {"length": 2}),
        (InductionHeadsConfig, {"vocab_size": 2}),
        (NoisyRecallConfig, {"length": 129}),
        (NoisyRecallConfig, {"length": 16}),
        (NoisyRecallConfig, {"vocab_size": 15}),
        (NoisyRecallConfig, {"noise": 1.0}),
        (NoisyRecallConfig, {"noise_vocab": 0}),
        (FuzzyRecallConfig, {"length": 62}),
        (FuzzyRecallConfig, {"vocab_size": 14}),
        (FuzzyRecallConfig, {"motif": 0}),
        (FuzzyRecallConfig, {"motif": 18}),
        (CompressionConfig, {"length": 33}),
        (CompressionConfig, {"test_lengths": [66]}),
        (CompressionConfig, {"vocab_size": 1}),
        (MemorisationConfig, {"length": 15}),
        (MemorisationConfig, {"keys": 1}),
        (CopyingConfig, {"length": 33}),
        (CopyingConfig, {"shortest": 32}),
        (CopyingConfig, {"letters": 0}),
        (NgramLookupConfig, {"length": 14}),
        (NgramLookupConfig, {"asked": "between"}),
        (NgramLookupConfig, {"ngram": 14}),
        (NgramLookupConfig, {"answer": 0}),
        (VariableTrackingConfig, {"length": 140}),
        (VariableTrackingConfig, {"chains": 0}),
        (VariableTrackingConfig, {"hops": -1}),
        (ForgettingMQARConfig, {"length": 38}),
        (ForgettingMQARConfig, {"updates": 9}),
        (ForgettingMQARConfig, {"updates": -1}),
        (ForgettingMQARConfig, {"vocab_size": 22}),
        (CompositionalMQARConfig, {"length": 23}),
        (CompositionalMQARConfig, {"pairs": 5}),
        (CompositionalMQARConfig, {"vocab_size": 8}),
        (CompositionalMQARConfig, {"power": 0.0}),
        (CompositionalMQARConfig, {"filler": "zeros"}),
        (MultiHopRecallConfig, {"length": 39}),
        (MultiHopRecallConfig, {"vocab_size": 15}),
        (MultiHopRecallConfig, {"hops": 0}),
        (MultiHopRecallConfig, {"passes": 0}),
        (VariableReassignmentConfig, {"length": 324}),
        (VariableReassignmentConfig, {"variables": 1}),
        (VariableReassignmentConfig, {"reassignments": -1}),
        (VariableReassignmentConfig, {"questions": 5}),
        (VariableReassignmentConfig, {"copied": 1.1}),
        (CWEConfig, {"length": 3000}),
        (CWEConfig, {"freq_cw": 3}),
        (CWEConfig, {"freq_ucw": 0}),
        (CWEConfig, {"num_cw": 0}),
        (FWEConfig, {"length": 100}),
        (FWEConfig, {"length": 20}),
        (FWEConfig, {"alpha": 1.0}),
        (ListOpsConfig, {"length": 3}),
        (ListOpsConfig, {"length": 200, "depth": 2, "shortest": 0.5}),
        (ListOpsConfig, {"depth": 1}),
        (ListOpsConfig, {"arguments": 1}),
        (ListOpsConfig, {"operators": 1.0}),
        (ListOpsConfig, {"shortest": -0.1}),
        (ListOpsConfig, {"asked": "first"}),
    ],
)
def test_impossible_settings_are_refused(config, wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        config(**wrong)


class TestStdlibText:
    def test_windows_are_pieces_of_training_files(self, tasks):
        batch = tasks["stdlib_text"].train_batch(0, 0, 64)
        contents = [bytes([0]) + content for content in tasks["stdlib_text"].files["train"].values()]
        starts = 0
        for tokens, targets in zip(batch.tokens, batch.targets, strict=True):
            asked = targets != IGNORED
            assert np.array_equal(tokens[1:][asked[:-1]], targets[:-1][asked[:-1]])
            window = bytes(targets[asked].astype(np.uint8))
            if tokens[0] == START:
                starts += 1
                assert any(content[1:].startswith(window) for content in contents)
            else:
                assert any(bytes([tokens[0]]) + window in content for content in contents)
        assert 4 <= starts <= 32

    def test_files_are_split_by_path_and_no_test_or_package_is_read(self, tasks):
        files = tasks["stdlib_text"].files
        paths = [path for contents in files.values() for path in contents]
        assert len(paths) == len(set(paths)) > 200
        assert not any(part in ("test", "tests", "site-packages") for path in paths for part in path.split("/"))
        assert len(files["train"]) > 5 * len(files["validation"]) > 0

    def test_validation_is_windows_of_held_out_files_as_in_training(self):
        """Of the training length, as many of them from a file's beginning, files weighed by their bytes."""
        task = StdlibText(StdlibTextConfig(length=64, eval_length=4096, validation_files=16))
        batches = list(task.evaluation("validation"))
        assert sum(len(batch.tokens) for batch in batches) == 16 * 4096 // 64
        assert {batch.tokens.shape[1] for batch in batches} == {64}
        contents = task.files["validation"].values()
        whole = b"".join(bytes([10, *content]) for content in contents)
        tokens, targets = (np.concatenate(arrays) for arrays in zip(*(batch[:2] for batch in batches), strict=True))
        for window, following in zip(tokens, targets, strict=True):
            asked = following != IGNORED
            assert asked.any()
            assert np.array_equal(window[1:][asked[:-1]], following[:-1][asked[:-1]])
            assert bytes(following[asked].astype(np.uint8)) in whole
        at_start = tokens[:, 0] == START
        longest = max(contents, key=len)
        share = np.mean([bytes(row[row != IGNORED].astype(np.uint8)) in longest for row in targets[~at_start]])
        drawn = task.train_batch(0, 0, 4000).tokens[:, 0] == START
        assert at_start.mean() == pytest.approx(drawn.mean(), abs=0.03)
        assert share == pytest.approx(len(longest) / sum(map(len, contents)), abs=0.04)

    def test_validation_counts_what_is_in_the_files(self):
        """Windows longer than a file end in symbols that nobody predicts and that no score counts."""
        task = StdlibText(StdlibTextConfig(length=20000, eval_length=256, validation_files=1000))
        batches = list(task.evaluation("validation"))
        targets, mask = (np.concatenate([batch[part] for batch in batches]) for part in (1, 2))
        asked = targets != IGNORED
        assert not asked.all()
        assert mask[asked].all()
        perfect = task.score(targets, np.zeros(asked.shape), asked)
        assert (perfect["accuracy"], perfect["bits_per_byte"], perfect["loss"]) == (1, 0, 0)
        bits = task.score(targets, np.where(asked, math.log(2), 0), ~asked)
        assert (bits["accuracy"], bits["bits_per_byte"]) == (0, pytest.approx(1))

    def test_no_validation_file(self, monkeypatch):
        task = StdlibText(StdlibTextConfig())
        monkeypatch.setitem(task.files, "validation", {"empty.py": b""})
        with pytest.raises(TaskError, match="no validation file has any bytes"):
            next(task.evaluation("validation"))

    def test_evaluated_from_the_first_byte_of_held_out_files(self, tasks):
        batch = next(tasks["stdlib_text"].evaluation("test"))
        assert batch.tokens.shape == (5, 256)
        beginnings = {content[:256] for content in tasks["stdlib_text"].files["test"].values()}
        assert all(bytes(row.astype(np.uint8)) in beginnings for row in batch.targets)
        assert (batch.tokens[:, 0] == START).all()
        assert np.array_equal(batch.tokens[:, 1:], batch.targets[:, :-1])

    def test_bits_per_byte_by_position(self, tasks):
        targets = np.zeros((2, 256), int)
        losses = np.zeros((2, 256))
        losses[:, :16] = math.log(2)
        scores = tasks["stdlib_text"].score(targets, losses, targets == 0)
        assert scores["bits_per_byte"] == pytest.approx(16 / 256)
        curve = dict(zip(scores["curve"]["x"], scores["curve"]["y"], strict=True))
        assert all(bits == pytest.approx(1.0 if position < 16 else 0.0) for position, bits in curve.items())

    def test_chance_knows_the_bytes_and_no_more(self, tasks):
        value, words = tasks["stdlib_text"].chance()
        assert 4 < value < 5.5
        assert "byte" in words

    @pytest.mark.parametrize("length", [1, 2, 3, 100, 4096])
    def test_bins_cover_every_position_once(self, length):
        edges = position_bins(length)
        assert edges[0] == 0
        assert edges[-1] == length
        assert edges == sorted(set(edges))

    def test_no_file_long_enough(self):
        task = StdlibText(StdlibTextConfig(eval_length=10**8))
        with pytest.raises(TaskError, match="no test file has eval_length = 100000000"):
            list(task.evaluation("test"))
