"""The tasks of GLUE (Wang et al., 2018, arXiv 1804.07461). Add a row to `TASKS` for a task of your
own."""

from .metrics import accuracy, accuracy_and_f1, matthews_correlation, pearson_and_spearman
from .tasks import Task, by_label

NLI = ("entailment", "neutral", "contradiction")

SENTENCES = ("sentence1", "sentence2")

BOTH = ("premise", "hypothesis")

MATCHED = {"validation": ("validation_matched", "validation_mismatched"), "test": ("test_matched", "test_mismatched")}

TASKS = {
    "cola": Task(("sentence",), by_label(matthews_correlation), ("unacceptable", "acceptable"), epochs=10),
    "sst2": Task(("sentence",), by_label(accuracy), ("negative", "positive")),
    "mrpc": Task(SENTENCES, by_label(accuracy_and_f1), ("not_equivalent", "equivalent"), epochs=10),
    "stsb": Task(SENTENCES, by_label(pearson_and_spearman), problem="regression", epochs=10),
    "qqp": Task(("question1", "question2"), by_label(accuracy_and_f1), ("not_duplicate", "duplicate")),
    "mnli": Task(BOTH, by_label(accuracy), NLI, **MATCHED),
    "qnli": Task(("question", "sentence"), by_label(accuracy), ("entailment", "not_entailment")),
    "rte": Task(SENTENCES, by_label(accuracy), ("entailment", "not_entailment"), max_length=256, epochs=10),
    "wnli": Task(SENTENCES, by_label(accuracy), ("not_entailment", "entailment"), epochs=10),
    "ax": Task(BOTH, by_label(matthews_correlation), NLI, train_on="mnli", validation=()),
}

# As in papers: the test set of WNLI is adversarial, and AX is a diagnostic.
UNSCORED = ("wnli", "ax")
