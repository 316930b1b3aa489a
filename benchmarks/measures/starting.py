"""How long it takes until the first score of `examples/rerank.py`, a process of its own."""

import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModel

from measures.models import Case, make_config
from measures.timing import take_turns
from modeling_gemma_encoder import GemmaEncoderForRanking

SCRIPT = Path(__file__).parents[2] / "examples" / "rerank.py"


def save_ranker(case: Case, folder: str) -> None:
    """Save a ranker in `folder` with the case's decoder and tokenizer."""
    options, tokenizer = case.options, case.tokenizer()
    torch.manual_seed(0)
    source = options.model
    if source is None:
        source = f"{folder}/decoder"
        AutoModel.from_config(make_config(case, len(tokenizer))).save_pretrained(source)
    GemmaEncoderForRanking.from_pretrained(source, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def measure_start(options) -> dict:
    """Return the seconds of one score by the script, and of importing torch and transformers alone,
    in turns."""
    case = Case(options.families[-1], torch.float32, options)
    importing = [sys.executable, "-c", "import torch, transformers; transformers.PreTrainedModel"]
    with tempfile.TemporaryDirectory() as folder:
        save_ranker(case, folder)
        words = ["--model", folder, "--query", "how do cats purr", "--passages", "They vibrate."]
        commands = {"first score": [sys.executable, str(SCRIPT), *words], "imports": importing}
        ways = {
            name: lambda command=command: subprocess.run(command, check=True, capture_output=True)
            for name, command in commands.items()
        }
        seconds = take_turns(ways, options.rounds)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    beyond = [a - b for a, b in zip(seconds["first score"], seconds["imports"], strict=True)]
    return {**medians, "beyond imports": statistics.median(beyond), "seconds": seconds}
