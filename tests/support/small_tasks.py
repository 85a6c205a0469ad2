"""Every task at a small size, and what guessing reaches there."""

from __future__ import annotations

from experiments.tasks.compositional_mqar import CompositionalMQARConfig
from experiments.tasks.compression import CompressionConfig
from experiments.tasks.copying import CopyingConfig
from experiments.tasks.corpus_text import CorpusTextConfig
from experiments.tasks.cwe import CWEConfig
from experiments.tasks.forgetting_mqar import ForgettingMQARConfig
from experiments.tasks.fuzzy_recall import FuzzyRecallConfig
from experiments.tasks.fwe import FWEConfig
from experiments.tasks.induction_heads import InductionHeadsConfig
from experiments.tasks.listops import ListOpsConfig
from experiments.tasks.memorisation import MemorisationConfig
from experiments.tasks.modular_arithmetic import ModularArithmeticConfig
from experiments.tasks.mqar import MQARConfig
from experiments.tasks.multi_hop_recall import MultiHopRecallConfig
from experiments.tasks.needle import NeedleConfig
from experiments.tasks.needle_text import NeedleTextConfig
from experiments.tasks.ngram_lookup import NgramLookupConfig
from experiments.tasks.noisy_recall import NoisyRecallConfig
from experiments.tasks.parity import ParityConfig
from experiments.tasks.selective_copying import SelectiveCopyingConfig
from experiments.tasks.stdlib_text import StdlibTextConfig
from experiments.tasks.text import TextConfig
from experiments.tasks.variable_reassignment import VariableReassignmentConfig
from experiments.tasks.variable_tracking import VariableTrackingConfig
from experiments.tasks.word_problem import WordProblemConfig
from tests.support.paths import ROOT

FEW = {"validation_examples": 300, "test_examples": 40}
SMALL = {
    "mqar": MQARConfig(vocab_size=64, length=32, pairs=4, test_lengths=[48], **FEW),
    "forgetting_mqar": ForgettingMQARConfig(vocab_size=64, length=32, pairs=4, updates=2, test_lengths=[48], **FEW),
    "compositional_mqar": CompositionalMQARConfig(vocab_size=60, length=32, pairs=4, test_lengths=[55], **FEW),
    "multi_hop_recall": MultiHopRecallConfig(length=30, chains=3, hops=2, questions=4, test_lengths=[50], **FEW),
    "parity": ParityConfig(length=32, test_lengths=[70, 24], **FEW),
    "modular_arithmetic": ModularArithmeticConfig(length=25, test_lengths=[40], **FEW),
    "word_problem": WordProblemConfig(length=24, group="s3", test_lengths=[33], **FEW),
    "selective_copying": SelectiveCopyingConfig(length=40, copied=8, test_lengths=[70, 16], **FEW),
    "needle": NeedleConfig(length=256, needles=3, questions=2, test_lengths=[700], **FEW),
    "needle_text": NeedleTextConfig(length=320, needles=3, questions=2, test_lengths=[700], **FEW),
    "induction_heads": InductionHeadsConfig(length=48, test_lengths=[80], **FEW),
    "noisy_recall": NoisyRecallConfig(length=40, vocab_size=8, test_lengths=[60], **FEW),
    "fuzzy_recall": FuzzyRecallConfig(length=80, vocab_size=8, keys=4, test_lengths=[100], **FEW),
    "compression": CompressionConfig(length=40, test_lengths=[24], **FEW),
    "memorisation": MemorisationConfig(length=16, keys=20, test_lengths=[32], **FEW),
    "copying": CopyingConfig(length=32, shortest=5, test_lengths=[48], **FEW),
    "ngram_lookup": NgramLookupConfig(length=40, letters=5, ngram=2, test_lengths=[64], **FEW),
    "variable_tracking": VariableTrackingConfig(length=256, chains=2, hops=2, test_lengths=[600], **FEW),
    "variable_reassignment": VariableReassignmentConfig(length=320, reassignments=2, test_lengths=[600], **FEW),
    "cwe": CWEConfig(length=300, freq_cw=4, freq_ucw=2, num_cw=3, test_lengths=[500], **FEW),
    "fwe": FWEConfig(length=600, test_lengths=[900], **FEW),
    "listops": ListOpsConfig(length=48, depth=5, arguments=4, asked="all", test_lengths=[90], **FEW),
    "stdlib_text": StdlibTextConfig(length=64, eval_length=256, validation_files=3, test_files=5),
    "corpus_text": CorpusTextConfig(
        folder=str(ROOT / "seqarch"), glob="*.py", length=64, eval_length=256, validation_files=3, test_files=5
    ),
    "text": TextConfig(
        path=str(ROOT / "seqarch" / "**" / "*.py"),
        length=64,
        test_lengths=[100],
        validation_tokens=1024,
        test_tokens=2048,
    ),
}
CHANCES = {
    "mqar": 1 / 4,
    "forgetting_mqar": 1 / 6,
    "compositional_mqar": 1 / 4,
    "multi_hop_recall": 1 / 6,
    "parity": 1 / 2,
    "modular_arithmetic": 0.208,  # 1/5 for every sum that has a single number among its terms, more for the others
    "word_problem": 1 / 6,
    "selective_copying": 1 / 14,
    "needle": 1 / 10,
    "needle_text": 1 / 10,
    "induction_heads": 1 / 15,
    "noisy_recall": 0.485,  # the last pair has the same key (0.31 of these times), or one of 4 values by luck
    "fuzzy_recall": 1 / 4,
    "compression": 1 / 16,
    "memorisation": 1 / 20,
    "copying": 15 / 16 / 26,
    "ngram_lookup": 1 / 5,
    "variable_tracking": 1 / 26,
    "variable_reassignment": 0.141,  # one of four to twelve numbers, of which some variables hold the same
    "cwe": 4 / 23,  # a common word comes 4 times among 23
    "fwe": 30 / 3 / 36,  # the three words come 18, 8 and 4 times among 36
    "listops": 0.1,  # with up to four arguments; with ten, 0 and 9 are likelier
}
"""The score of guessing, calculated or from many examples."""
GROUPS = {
    "mqar": ["gap", "pair"],
    "forgetting_mqar": ["gap", "updated"],
    "compositional_mqar": ["gap", "pair"],
    "multi_hop_recall": ["gap", "hops"],
    "parity": ["position"],
    "modular_arithmetic": ["position"],
    "word_problem": ["position"],
    "selective_copying": ["gap", "position"],
    "needle": ["depth", "gap"],
    "needle_text": ["depth", "gap"],
    "induction_heads": ["gap"],
    "noisy_recall": ["gap", "pairs"],
    "fuzzy_recall": ["gap", "pairs"],
    "compression": ["gap", "position"],
    "memorisation": [],
    "copying": ["position"],
    "ngram_lookup": ["gap"],
    "variable_tracking": ["depth", "gap", "hops"],
    "variable_reassignment": ["depth", "gap", "hops"],
    "cwe": ["gap", "position"],
    "fwe": ["gap", "position"],
    "listops": ["size"],
    "stdlib_text": [],
    "corpus_text": [],
    "text": [],
}
"""By what results are told apart."""
