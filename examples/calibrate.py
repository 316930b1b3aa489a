"""Fit a ranker's temperature and bias on held-out judgments, so that its scores become
probabilities of relevance.

    python examples/calibrate.py --model my-ranker --data trec_dl/dl2020 --relevance_level 2 --output calibrated

Both are fitted on one half of the queries, and evaluated on the other half in `reliability.png` and
`calibration.json`. --output gets the model with both in its config, so that
`model.probabilities(logits)` applies them. Logits stay the same, and with them the scores of
CrossEncoder and every order.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.calibration import calibration_error, fit, plot_reliability
from modeling_gemma_encoder.ranking.collection import Collection
from modeling_gemma_encoder.ranking.reading import read_collection
from modeling_gemma_encoder.ranking.scoring import DTYPE, Dtype, ScoringArguments, load_ranker, rerank
from modeling_gemma_encoder.ranking.trec import TrecRun

BEFORE, AFTER = "sigmoid of the logit", "calibrated"


@dataclass(kw_only=True)
class CalibrationArguments(ScoringArguments):
    """Options of what a ranker is calibrated on."""

    dtype: Dtype = field(default="float32", metadata=DTYPE)
    data: str = field(metadata={"help": "Judged data it was not trained on, as `evaluate_ranking.py` reads it."})
    output: str = field(metadata={"help": "A folder that does not exist yet."})
    relevance_level: int = field(default=1, metadata={"help": "The least grade that counts as relevant."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of a file of pairs."}
    )
    seed: int = field(default=0, metadata={"help": "Of the division into halves."})

    def validate(self) -> None:
        """Raise ValueError if an option has an impossible value."""
        if Path(self.output).exists():
            raise ValueError(f"--output {self.output} is there already: delete it, or name another.")
        if self.dtype != "float32":
            raise ValueError(f"--dtype must be float32, in which the model is saved again; got {self.dtype}.")
        super().validate()


def read_judged(args: CalibrationArguments) -> Collection:
    """Read judged queries; raise ValueError if there are fewer than two."""
    collection = read_collection(args.data, tuple(args.pair_columns))
    collection.run = None  # only what was judged has a label
    if len(collection.qrels) < 2:
        raise ValueError(f"{args.data} must have at least 2 judged queries; got {len(collection.qrels)}.")
    return collection


def labeled(trec_run: TrecRun, collection: Collection, queries: Sequence[str], level: int) -> tuple:
    """Return the scores of all judged passages of these queries, and whether each is relevant as 0
    or 1."""
    pairs = [(trec_run[qid][pid], grade) for qid in queries for pid, grade in collection.qrels[qid].items()]
    scores, grades = map(np.array, zip(*pairs, strict=True))
    return scores, (grades >= level).astype(int)


@interruptible()
def main():
    parser = ScriptParser(CalibrationArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    with failing(parser):
        args.validate()

        # 1. Score all judged passages, and fit on one half of the queries.
        collection = read_judged(args)
        model, tokenizer = load_ranker(args.model, args.dtype, args.device)
        trec_run = rerank(model, tokenizer, collection, None, args.max_length, args.tokens_per_batch)
        queries = np.random.default_rng(args.seed).permutation(sorted(trec_run))
        halves = queries[::2], queries[1::2]
        to_fit, to_show = (labeled(trec_run, collection, half, args.relevance_level) for half in halves)
        fitted = fit(*to_fit)
    model.config.update(fitted)

    # 2. Evaluate on the other half.
    scores, labels = to_show
    probabilities = {
        BEFORE: 1 / (1 + np.exp(-scores)),
        AFTER: model.probabilities(torch.tensor(scores)).numpy(),
    }
    errors = {name: calibration_error(found, labels) for name, found in probabilities.items()}

    # 3. Save the model, the plot and the numbers.
    folder = Path(args.output)
    folder.mkdir(parents=True)
    plot_reliability({name: (found, labels) for name, found in probabilities.items()}, folder / "reliability.png")
    facts = {**fitted, "expected_calibration_error": errors, "queries": list(map(len, halves))}
    facts |= {"data": args.data, "relevance_level": args.relevance_level, "seed": args.seed}
    write(folder / "calibration.json", json.dumps(facts, indent=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"temperature {fitted['calibration_temperature']:.3f}, bias {fitted['calibration_bias']:.3f}")
    for name, error in errors.items():
        print(f"{name}: calibration error {error:.3f} on {len(labels):,} held-out judgments")
    if errors[AFTER] > errors[BEFORE]:
        print("WARNING: the calibration error is higher on the held-out half; there may be too few judgments")
    print(f"The model, plot and numbers are in {folder}")


if __name__ == "__main__":
    main()
