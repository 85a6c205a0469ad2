"""The tasks that models are trained and evaluated on: a file per task, and a line here."""

from experiments.tasks.compositional_mqar import CompositionalMQAR
from experiments.tasks.compression import Compression
from experiments.tasks.copying import Copying
from experiments.tasks.corpus_text import CorpusText
from experiments.tasks.cwe import CWE
from experiments.tasks.forgetting_mqar import ForgettingMQAR
from experiments.tasks.fuzzy_recall import FuzzyRecall
from experiments.tasks.fwe import FWE
from experiments.tasks.induction_heads import InductionHeads
from experiments.tasks.listops import ListOps
from experiments.tasks.memorisation import Memorisation
from experiments.tasks.modular_arithmetic import ModularArithmetic
from experiments.tasks.mqar import MQAR
from experiments.tasks.multi_hop_recall import MultiHopRecall
from experiments.tasks.needle import Needle
from experiments.tasks.needle_text import NeedleText
from experiments.tasks.ngram_lookup import NgramLookup
from experiments.tasks.noisy_recall import NoisyRecall
from experiments.tasks.parity import Parity
from experiments.tasks.selective_copying import SelectiveCopying
from experiments.tasks.stdlib_text import StdlibText
from experiments.tasks.task import Batch, Metric, Task, TaskError
from experiments.tasks.text import Text
from experiments.tasks.variable_reassignment import VariableReassignment
from experiments.tasks.variable_tracking import VariableTracking
from experiments.tasks.word_problem import WordProblem

TASKS: dict[str, type[Task]] = {
    "mqar": MQAR,
    "forgetting_mqar": ForgettingMQAR,
    "compositional_mqar": CompositionalMQAR,
    "multi_hop_recall": MultiHopRecall,
    "parity": Parity,
    "modular_arithmetic": ModularArithmetic,
    "word_problem": WordProblem,
    "selective_copying": SelectiveCopying,
    "needle": Needle,
    "needle_text": NeedleText,
    "induction_heads": InductionHeads,
    "noisy_recall": NoisyRecall,
    "fuzzy_recall": FuzzyRecall,
    "compression": Compression,
    "memorisation": Memorisation,
    "copying": Copying,
    "ngram_lookup": NgramLookup,
    "variable_tracking": VariableTracking,
    "variable_reassignment": VariableReassignment,
    "cwe": CWE,
    "fwe": FWE,
    "listops": ListOps,
    "stdlib_text": StdlibText,
    "corpus_text": CorpusText,
    "text": Text,
}

__all__ = ["TASKS", "Batch", "Metric", "Task", "TaskError"]
