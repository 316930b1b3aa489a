"""The studies that can be asked for: attention, pooling, dropout, padding, training rows, baselines
and starts.

The paper's numbers are GLUE averages of Gemma 2 2B (arXiv 2503.02656). Radii, K, numbers of probes
and numbers of rows are our choice.
"""

import shlex
from collections.abc import Iterable
from dataclasses import replace
from difflib import get_close_matches
from hashlib import sha256
from pathlib import Path

from ..checkpoints import load_tokenizer
from .studies import Options, Study


def _dropout(attention: float, feedforward: float) -> Options:
    return {"attention_dropout": attention, "feedforward_dropout": feedforward}


def _pooling(name: str, **options) -> Options:
    return {"pooling": name, **options}


def _window(radius: int) -> Options:
    return {"attention": "bidirectional", "attention_window": radius}


ROWS = (250, 1000, 4000, None)
STUDIES = {
    "attention": Study(
        {
            "causal": {"attention": "causal"},
            "causal with last token": {"attention": "causal", "pooling": "last_k"},
            "bidirectional": {"attention": "bidirectional"},
            **{f"radius {radius}": _window(radius) for radius in (1, 4, 16)},
        },
        paper={"causal": 84.5, "bidirectional": 89.4},
    ),
    "pooling": Study(
        {
            "mean": _pooling("mean"),
            "first token": _pooling("first_k", pooling_k=1),
            "last token": _pooling("last_k", pooling_k=1),
            "last 4": _pooling("last_k", pooling_k=4),
            "query probe": _pooling("query_probe", pooling_num_probes=1),
            "4 query probes": _pooling("query_probe", pooling_num_probes=4),
            "4 key-value probes": _pooling("kv_probe", pooling_num_probes=4),
        },
        paper={"mean": 89.4, "last token": 89.1, "query probe": 89.0},
    ),
    "dropout": Study(
        {str(rate): _dropout(rate, rate) for rate in (0.0, 0.05, 0.1, 0.15)},
        paper={"0.0": 87.2, "0.1": 89.4},
    ),
    "dropout_place": Study(
        {
            "none": _dropout(0.0, 0.0),
            "attention": _dropout(0.1, 0.0),
            "feed-forward": _dropout(0.0, 0.1),
            "both": _dropout(0.1, 0.1),
        },
        paper={"none": 87.2, "both": 89.4},
    ),
    "baselines": Study(
        {
            "TF-IDF with logistic regression": {"kind": "words"},
            "TF-IDF on all rows": {"kind": "words", "max_train_samples": None},
            "BERT's shape with random weights": {"kind": "bert"},
            "Gemma Encoder with random weights": {"kind": "scratch"},
            "Gemma*ForSequenceClassification": {"kind": "stock"},
            "Gemma Encoder": {},
        },
        reference="Gemma Encoder",
    ),
    "rows": Study(
        {
            f"{name} on {rows or 'all'} rows": {**changed, "max_train_samples": rows}
            for name, changed in (("mean", _pooling("mean")), ("query probe", _pooling("query_probe")))
            for rows in ROWS
        },
        reference={f"query probe on {rows or 'all'} rows": f"mean on {rows or 'all'} rows" for rows in ROWS},
    ),
}
# Studies that are made of the command line: `start` has a variant for each of --starts, `padding`
# one for each side.
MADE = ("start", "padding")
# What every variant has unless it says otherwise: the config's defaults, spelled out.
PLAIN = {
    "attention": "bidirectional",
    "pooling": "mean",
    "pooling_k": 1,
    "pooling_num_probes": 1,
    **_dropout(0.1, 0.1),
}


def choose_studies(
    names: list[str], variants: list[str] | None, starts: list[str], model: str, root: Path
) -> dict[str, Study]:
    """Return the studies of these names, with these variants alone where variants are given.

    Args:
        names: Keys of `STUDIES`, names of `MADE`, or "all" for every study except `start`.
        starts: Checkpoints that the study `start` compares.
        root: Where the study `padding` makes its checkpoints.

    Raises:
        ValueError: A study or variant does not exist, or the study cannot be made.
    """
    known = (*STUDIES, *MADE)
    names = [*STUDIES, "padding"] if "all" in names else names
    if unknown := [name for name in names if name not in known]:
        raise ValueError(f"--study must be one of {', '.join(known)}, all; got {', '.join(unknown)}.")
    studies = {}
    for name in names:
        if name == "start":
            studies[name] = _compare_starts(starts)
        elif name == "padding":
            studies[name] = _compare_padding(model, root)
        else:
            studies[name] = STUDIES[name]
    return studies if variants is None else _select(studies, variants)


def _compare_starts(starts: list[str]) -> Study:
    names = {Path(start).name for start in starts}
    if len(starts) < 2 or len(names) < len(starts):
        raise ValueError(f"--study start compares two --starts or more, of different names; got {starts or 'none'}.")
    return Study({Path(start).name: {"model": start} for start in starts})


def _compare_padding(model: str, root: Path) -> Study:
    if not Path(model).is_dir():
        raise ValueError(
            f"--study padding needs a local folder as --model; got {model}. "
            "examples/convert_gguf.py makes a folder of a GGUF file."
        )
    return Study({side: {"model": _padded_on(side, model, root)} for side in ("right", "left")})


def _padded_on(side: str, model: str, root: Path) -> str:
    """Return a folder with the same checkpoint and a tokenizer that pads on this side.

    Its name is a hash of the checkpoint's place and of when its files changed.
    """
    source = Path(model).resolve()
    state = [str(source)]
    state += [f"{path.name} {path.stat().st_mtime_ns}" for path in sorted(source.iterdir())]
    folder = root / "padding" / sha256("\n".join(state).encode()).hexdigest()[:8] / side
    if not (folder / "tokenizer.json").exists():
        folder.mkdir(parents=True, exist_ok=True)
        for path in source.iterdir():
            if path.is_file() and not (folder / path.name).exists():
                (folder / path.name).symlink_to(path.resolve())
        for path in folder.glob("token*"):  # links, or saving would write into the checkpoint
            path.unlink()
        load_tokenizer(model, padding_side=side).save_pretrained(folder)
    return str(folder)


def _select(studies: dict[str, Study], variants: list[str]) -> dict[str, Study]:
    """Return studies with these variants alone, and only the studies that have one of them."""
    known = dict.fromkeys(variant for study in studies.values() for variant in study.variants)
    if unknown := [name for name in variants if name not in known]:
        raise ValueError(
            f"--variants must be one of {', '.join(known)}; got {', '.join(unknown)}.{_suggest(unknown, known)}"
        )
    selected = {}
    for name, study in studies.items():
        kept = {key: options for key, options in study.variants.items() if key in variants}
        if kept:
            selected[name] = replace(study, variants=kept)
    return selected


def _suggest(unknown: list[str], known: Iterable[str]) -> str:
    """Return a sentence with the variants that were probably meant; empty where none are similar."""
    words = [word.strip() for name in unknown for word in name.split(",")]
    if all(word in known for word in words):  # `causal,bidirectional`
        return f" Separate names with blanks: --variants {shlex.join(words)}"
    close = [get_close_matches(name.replace(",", " with"), known, 1, cutoff=0.5) for name in unknown]
    if not all(close):
        return ""
    return f" Did you mean {', '.join(repr(name) for (name,) in close)}?"
