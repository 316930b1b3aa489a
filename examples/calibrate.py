"""Fits a ranker's temperature and bias on held-out judgements, so that its scores become probabilities of relevance.

    python examples/calibrate.py --model my-ranker --data trec_dl/dl2020 --relevance_level 2 --output calibrated

The queries are halved: on one half both are fitted, on the other they are shown, in `reliability.png` and
`calibration.json`. --output gets the model, with them in its config; then `model.probabilities(logits)` applies them,
while logits, and so CrossEncoder's scores and every order, stay as they are.
"""

import json
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.calibration import calibration_error, fit, plot_reliability
from modeling_gemma_encoder.ranking.collection import read_collection
from modeling_gemma_encoder.ranking.scoring import DTYPE, Dtype, ScoringArguments, load_ranker, rerank


@dataclass(kw_only=True)
class CalibrationArguments(ScoringArguments):
    dtype: Dtype = field(default="float32", metadata=DTYPE)

    def problem(self) -> str | None:
        if self.dtype != "float32":
            return f"--dtype {self.dtype}: the model is written as it was read, in float32"
        return super().problem()

    data: str = field(metadata={"help": "Judged data it was not trained on, as `evaluate_ranking.py` reads it."})
    output: str = field(metadata={"help": "A folder that is not there yet."})
    relevance_level: int = field(default=1, metadata={"help": "Least grade that counts as relevant."})
    pair_columns: list[str] = field(
        default_factory=lambda: ["query", "passage", "label"], metadata={"help": "Columns of a file of pairs."}
    )
    seed: int = field(default=0, metadata={"help": "Of the halves."})


@interruptible()
def main():
    parser = ScriptParser(CalibrationArguments, __doc__)
    args = parser.parse_args_into_dataclasses()[0]
    folder = Path(args.output)
    if folder.exists():
        fail(parser, f"--output {folder} is there already: delete it, or name another")
    if problem := args.problem():
        fail(parser, problem)
    with failing(parser):
        collection = read_collection(args.data, tuple(args.pair_columns))
        collection.run = None  # only what was judged has a label
        if len(collection.qrels) < 2:
            raise ValueError(f"{args.data} has {len(collection.qrels)} judged queries: two at least are needed.")
        model, tokenizer = load_ranker(args.model, args.dtype, args.device)
        run = rerank(model, tokenizer, collection, None, args.max_length, args.tokens_per_batch)
        queries = np.random.default_rng(args.seed).permutation(sorted(run))
        halves = []
        for half in (queries[::2], queries[1::2]):
            pairs = [(run[qid][pid], grade) for qid in half for pid, grade in collection.qrels[qid].items()]
            scores, grades = map(np.array, zip(*pairs, strict=True))
            halves.append((scores, (grades >= args.relevance_level).astype(int)))
        fitted = fit(*halves[0])
    model.config.update(fitted)
    scores, labels = halves[1]
    after = model.probabilities(torch.tensor(scores)).numpy()
    curves = {"sigmoid of the logit": (1 / (1 + np.exp(-scores)), labels), "calibrated": (after, labels)}
    folder.mkdir(parents=True)
    plot_reliability(curves, folder / "reliability.png")
    errors = {name: calibration_error(*curve) for name, curve in curves.items()}
    facts = {**fitted, "expected_calibration_error": errors, "queries": [len(queries[::2]), len(queries[1::2])]}
    facts |= {"data": args.data, "relevance_level": args.relevance_level, "seed": args.seed}
    write(folder / "calibration.json", json.dumps(facts, indent=2))
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    print(f"temperature {fitted['calibration_temperature']:.3f}, bias {fitted['calibration_bias']:.3f}")
    for name, error in errors.items():
        print(f"{name}: calibration error {error:.3f} on {len(labels):,} held-out judgements")
    if errors["calibrated"] > errors["sigmoid of the logit"]:
        print("WARNING: on the held-out half it made things worse; there may be too few judgements")
    print(f"The model, plot and numbers are in {folder}")


if __name__ == "__main__":
    main()
