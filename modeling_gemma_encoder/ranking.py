"""Reranking and how good it is: pairs -> scores, scores -> nDCG and its like, and whether a difference is one."""

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal
from zlib import crc32

import ir_measures
import numpy as np
import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from scipy.stats import bootstrap, permutation_test
from tqdm import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from .configuration_gemma_encoder import GemmaEncoderConfig
from .files import is_local, write
from .losses_gemma_encoder import IGNORE
from .modeling_gemma_encoder import GemmaEncoderForRanking
from .quantization_gemma_encoder import quantize_int8
from .retrieval import Collection, Run, bm25, ranked, write_run
from .templates import encode_pairs
from .verification_gemma_encoder import verify_attention

AT_ONCE = 10_000  # pairs that are tokenized together
MEASURES = ("nDCG@10", "RR@10", "AP", "R@100")  # what `ir_measures` calls them


Dtype = Literal["auto", "float32", "bfloat16", "int8"]
DTYPE = {"help": "auto is the faster of float32 and bfloat16 here; the head computes in float32."}


@dataclass(kw_only=True)
class ScoringArguments:
    """Flags of a script that scores with a trained ranker."""

    COUNTS: ClassVar[tuple[str, ...]] = ("max_length", "tokens_per_batch")  # at least 1

    model: str = field(metadata={"help": "A trained reranker: a folder, or a repository on the Hub."})
    max_length: int | None = field(
        default=None, metadata={"help": "Tokens of a pair; passages are cut, queries never. Default: as in training."}
    )
    tokens_per_batch: int | None = field(
        default=None, metadata={"help": "Default: 16384 on an accelerator, 2048 on a CPU, where more are no faster."}
    )
    dtype: Dtype = field(default="float32", metadata=DTYPE)
    device: str | None = field(default=None, metadata={"help": "Default: the accelerator, where there is one."})

    def problem(self) -> str | None:
        """What cannot be, in the words of the command line."""
        for name in self.COUNTS:
            if (value := getattr(self, name)) is not None and value < 1:
                return f"--{name} must be at least 1, got {value}"
        return None


def fast_dtype(device: str | torch.device) -> str:
    """bfloat16 where `device` computes in it, float32 where it would be converted back and forth."""
    kind = torch.device(device).type
    if kind == "cpu":
        can = torch.cpu.get_capabilities()
        return "bfloat16" if can.get("avx512_bf16") or can.get("amx_bf16") else "float32"
    return "bfloat16" if kind == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"


def choose(dtype: str, device: str | None) -> tuple[str, str]:
    """What "auto" and None stand for here: what is fast on the device, and the accelerator where there is one."""
    there = torch.accelerator.current_accelerator().type if torch.accelerator.is_available() else "cpu"
    device = there if device is None else device
    if str(device).partition(":")[0] not in ("cpu", there):
        raise ValueError(f"`device` {device} is not on this machine, which has {there}.")
    return fast_dtype(device) if dtype == "auto" else dtype, device


def load_ranker(
    checkpoint: str, dtype: str = "float32", device: str | None = None
) -> tuple[GemmaEncoderForRanking, PreTrainedTokenizerBase]:
    """
    A trained ranker, verified, on `device` or where there is one the accelerator, and its tokenizer.

    Args:
        dtype: float32, bfloat16, int8 (weights; see `quantize_int8`), or auto: the faster of the first two there
            (`choose`). The head computes in float32.

    Raises:
        ValueError: `dtype` is none of these, or the checkpoint has no trained head.
    """
    dtype, device = choose(dtype, device)
    if is_local(checkpoint) and not Path(checkpoint).exists():
        raise ValueError(f"There is no folder {checkpoint}.")
    if dtype not in ("float32", "bfloat16", "int8"):
        raise ValueError(f"`dtype` must be auto, float32, bfloat16 or int8, got {dtype}")
    config = GemmaEncoderConfig.from_pretrained(checkpoint)
    if config.architectures and config.architectures[0] != GemmaEncoderForRanking.__name__:
        raise ValueError(f"{checkpoint} is no ranker, but a {config.architectures[0]}.")
    model, loading = GemmaEncoderForRanking.from_pretrained(
        checkpoint, dtype=getattr(torch, fast_dtype(device) if dtype == "int8" else dtype), output_loading_info=True
    )
    if missing := sorted(loading["missing_keys"]):
        raise ValueError(f"{checkpoint} is no trained ranker: {', '.join(missing)} would be random.")
    if dtype == "int8" and not config.int8_weights:
        quantize_int8(model)
    model = model.to(device).eval()
    verify_attention(model)
    return model, AutoTokenizer.from_pretrained(checkpoint, trust_remote_code=False)


@torch.no_grad()
def score_pairs(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    pairs: Sequence[tuple[str, str]],
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
    progress: tqdm | None = None,
) -> np.ndarray:
    """
    Scores (n,), fp32 logits, of (query, document) pairs, in their order.

    Batches are of texts of like length, the longest first, and hold at most `tokens_per_batch` tokens; which text is
    in which batch changes no score beyond rounding.

    Args:
        max_length: Tokens of a pair, documents are cut to fit. None: as the tokenizer says (`model_max_length`), which
            a training of ours sets, and never more than the decoder's positions.
        tokens_per_batch: None: 16,384 on an accelerator; 2,048 on a CPU, where what a layer makes of more no longer
            fits the caches.
        progress: A bar that is moved on.

    Raises:
        ValueError: a query leaves no room for a document, or a score is not finite.
    """
    positions = model.config.get_text_config().max_position_embeddings
    ids = encode_pairs(tokenizer, pairs, min(max_length or tokenizer.model_max_length, positions))
    order, start = sorted(range(len(ids)), key=lambda i: -len(ids[i])), 0
    scores = np.empty(len(ids), dtype=np.float32)
    training = [module for module in model.modules() if module.training]
    model.eval()
    device = model.get_input_embeddings().weight.device
    if tokens_per_batch is None:
        tokens_per_batch = 2048 if device.type == "cpu" else 16384
    try:
        while start < len(order):
            batch = order[start : start + max(1, tokens_per_batch // max(1, len(ids[order[start]])))]
            start += len(batch)
            padded = tokenizer.pad({"input_ids": [ids[i] for i in batch]}, return_tensors="pt").to(device)
            logits = model(input_ids=padded["input_ids"], attention_mask=padded["attention_mask"]).logits
            scores[batch] = logits[:, 0].float().cpu().numpy()
            if progress is not None:
                progress.update(len(batch))
    finally:
        for module in training:
            module.training = True
    if not np.isfinite(scores).all():
        wrong = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise ValueError(
            f"The score of {pairs[wrong]!r} is {scores[wrong]}: the model is not sound, or its dtype small."
        )
    return scores


def rerank(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    collection: Collection,
    depth: int | None = None,
    max_length: int | None = None,
    tokens_per_batch: int | None = None,
) -> Run:
    """The collection's candidates with the model's scores; a judged query without candidates has none."""
    candidates = collection.candidates(depth)
    places = [(qid, pid) for qid, pids in candidates.items() for pid in pids]
    pairs = [(collection.queries[qid], collection.passages[pid]) for qid, pid in places]
    with tqdm(total=len(pairs), desc="Reranking", unit=" pairs") as progress:
        slices = [pairs[start : start + AT_ONCE] for start in range(0, len(pairs), AT_ONCE)]
        parts = [score_pairs(model, tokenizer, some, max_length, tokens_per_batch, progress) for some in slices]
    run = {qid: {} for qid in candidates}
    for (qid, pid), score in zip(places, np.concatenate([np.empty(0), *parts]), strict=True):
        run[qid][pid] = float(score)
    return run


def parse_measures(names: Sequence[str], relevance_level: int = 1) -> list:
    """
    `ir_measures` by name, those of relevance yes or no from `relevance_level` on, unless the name says `(rel=...)`.

    Raises:
        ValueError: it knows no such measure.
    """
    found = []
    for name in names:
        try:
            measure = ir_measures.parse_measure(name)
        except (NameError, ValueError, SyntaxError) as error:
            raise ValueError(
                f"{name!r} is no measure of ir_measures, such as {', '.join(MEASURES)}: {error}"
            ) from error
        if relevance_level != 1 and "rel" in measure.SUPPORTED_PARAMS and "rel" not in measure.params:
            measure = measure(rel=relevance_level)
        found.append(measure)
    return found


def measure(qrels: dict[str, dict[str, int]], run: Run, measures: Sequence) -> dict[str, dict[str, float]]:
    """
    Measure -> query -> value, of all queries of `qrels`; one the run does not have is worth 0, as `trec_eval -c` says.

    The libraries behind `ir_measures` break ties each in its own way; here they see ranks, in the order of `ranked`.
    """
    places = {
        qid: {pid: -float(rank) for rank, pid in enumerate(ranked(scores))} for qid, scores in run.items() if scores
    }
    found = {str(one): dict.fromkeys(qrels, 0.0) for one in measures}
    for value in ir_measures.iter_calc(list(measures), qrels, places):
        found[str(value.measure)][value.query_id] = value.value
    return found


def measure_lists(scores: np.ndarray, labels: np.ndarray, measures: Sequence) -> dict[str, float]:
    """Means over lists: scores and labels (num_lists, num_docs), -100 where there is no document."""
    there = [np.flatnonzero(row != IGNORE) for row in labels]
    qrels = {str(n): {str(i): int(labels[n, i]) for i in places} for n, places in enumerate(there)}
    run = {str(n): {str(i): float(scores[n, i]) for i in places} for n, places in enumerate(there)}
    return {name: float(np.mean([*found.values()])) for name, found in measure(qrels, run, measures).items()}


def baselines(collection: Collection, depth: int | None = None, seed: int = 0) -> dict[str, Run]:
    """What the same candidates are worth by BM25, in random order, and, if they are a run's, as they came."""
    first = {}
    if collection.run is not None:
        chosen = collection.candidates(depth)
        first["first stage"] = {qid: {pid: collection.run[qid][pid] for pid in pids} for qid, pids in chosen.items()}
    return {"BM25": bm25(collection, depth), **first, "random order": random_order(collection, depth, seed)}


def random_order(collection: Collection, depth: int | None = None, seed: int = 0) -> Run:
    """A draw for each query by its id, of passages in the order of theirs: the same wherever they were read."""
    run = {}
    for qid, pids in collection.candidates(depth).items():
        draw = np.random.default_rng([seed, crc32(qid.encode())])
        run[qid] = dict(zip(sorted(pids), draw.random(len(pids)).tolist(), strict=True))
    return run


def compare(ours: dict[str, float], theirs: dict[str, float], seed: int = 0) -> dict[str, float]:
    """
    The mean difference over queries, its 95 % bootstrap interval, and the p of a paired randomization test, 9,999
    drawn (Smucker et al., CIKM 2007); None below ten queries, our choice, where neither says anything.
    """
    differences = np.array([ours[qid] - theirs[qid] for qid in ours])
    result = {"difference": float(differences.mean()), "queries": len(differences), "p": None, "interval": None}
    if len(differences) < 10 or not np.ptp(differences):
        return result
    test = permutation_test(
        (differences,),
        np.mean,
        permutation_type="samples",
        n_resamples=9999,
        batch=100,
        rng=np.random.default_rng(seed),
    )
    interval = bootstrap((differences,), np.mean, method="percentile", batch=100, rng=np.random.default_rng(seed))
    bounds = [float(bound) for bound in interval.confidence_interval]
    return {**result, "p": float(test.pvalue), "interval": bounds}


def evaluate(
    collection: Collection, runs: dict[str, Run], measures: Sequence, folder: Path, facts: dict | None = None
) -> dict:
    """
    Measures runs of a collection, the first against each other one, and leaves in `folder` `<name>.run` of each,
    `results.json` with every query's values, `results.md` and `per_query.png`, the first against the second.

    Args:
        facts: Go into `results.json` as they are.
    """
    folder.mkdir(parents=True, exist_ok=True)
    values = {name: measure(collection.qrels, run, measures) for name, run in runs.items()}
    means = {name: {m: float(np.mean([*v.values()])) for m, v in found.items()} for name, found in values.items()}
    first, *others = runs
    main = str(measures[0])
    compared = {name: compare(values[first][main], values[name][main]) for name in others}
    for name, run in runs.items():
        write_run(run, folder / f"{name.replace(' ', '-')}.run", tag=name.replace(" ", "-"))
    result = {**(facts or {}), "means": means, "compared": {f"{main}, {first} - {n}": c for n, c in compared.items()}}
    result["queries"] = len(collection.qrels)
    table = markdown(means, compared, main)
    if others:
        plot_queries(values[first][main], values[others[0]][main], (first, others[0]), main, folder / "per_query.png")
    write(folder / "results.md", table)
    write(folder / "results.json", json.dumps({**result, "per_query": values}, indent=2))
    return {**result, "table": table}


def markdown(means: dict[str, dict[str, float]], compared: dict[str, dict], main: str) -> str:
    measures = list(next(iter(means.values())))
    lines = [f"| x 100 | {' | '.join(measures)} |", "| --- |" + " ---: |" * len(measures)]
    lines += [f"| {name} | {' | '.join(f'{100 * found[m]:.1f}' for m in measures)} |" for name, found in means.items()]
    for name, found in compared.items():
        line = f"\n{main} against {name}: {100 * found['difference']:+.1f} over {found['queries']} queries"
        if found["p"] is not None:
            low, high = found["interval"]
            line += f", 95 % interval {100 * low:+.1f} to {100 * high:+.1f}, p = {found['p']:.4f}"
        elif found["queries"] < 10:
            line += ", too few for more"
        lines.append(line)
    return "\n".join(lines)


def plot_queries(ours: dict[str, float], theirs: dict[str, float], names: tuple[str, str], main: str, path: Path):
    """Each query's difference as a bar, sorted."""
    differences = np.sort([ours[qid] - theirs[qid] for qid in ours])[::-1]
    figure = Figure(figsize=(9, 4.5), layout="constrained")
    axes = figure.subplots()
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if not differences.any():
        axes.text(0.5, 0.6, "no query differs", transform=axes.transAxes, ha="center")
    axes.bar(range(len(differences)), differences, width=1, color=np.where(differences > 0, "C0", "C3"))
    axes.axhline(differences.mean(), color="black", linestyle="--", label=f"mean {differences.mean():+.3f}")
    better, worse = int((differences > 0).sum()), int((differences < 0).sum())
    axes.set(
        xlabel="query, sorted",
        ylabel=f"{main}, {names[0]} - {names[1]}",
        title=f"{names[0]} better on {better} of {len(differences)} queries, {names[1]} on {worse}",
    )
    axes.legend()
    figure.savefig(path, dpi=120)
