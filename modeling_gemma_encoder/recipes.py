"""Recipes: flags in a YAML file, and a batch that stays the same on any number of devices."""

import json
import os
import sys
from argparse import ArgumentParser, Namespace
from difflib import get_close_matches
from pathlib import Path

import torch
import yaml
from transformers import HfArgumentParser


class RecipeParser(HfArgumentParser):
    """A parser with `--config FILE`: flags in YAML, over which those of the command line win."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last: list[str] = []  # flags that win over all that are given: `share_batch`
        self.add_argument(
            "--config", metavar="FILE", help="Flags in YAML, as in examples/recipes; flags given beside it win."
        )

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        found, words = config_flag.parse_known_args(sys.argv[1:] if args is None else args)
        if found.config is not None:
            try:
                words = [*self._read(Path(found.config)), *words]
            except (OSError, ValueError, yaml.YAMLError) as error:
                self.exit(2, f"{self.prog}: error: --config {found.config}: {error}\n")
        namespace, rest = super().parse_known_args([*words, *self.last], namespace)
        vars(namespace).pop("config", None)  # it has become the flags it holds
        return namespace, rest

    def _read(self, path: Path) -> list[str]:
        flags = yaml.safe_load(path.read_text())
        if not isinstance(flags, dict):
            raise ValueError("it must hold `flag: value` in each line.")
        known = [flag[2:] for flag in self._option_string_actions if flag.startswith("--")]
        words = []
        for name, value in flags.items():
            if name not in known or name == "config":
                close = get_close_matches(str(name), known, 1)
                raise ValueError(f"there is no flag {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
            if value is not None:
                words += [f"--{name}", *map(as_word, value if isinstance(value, list) else [value])]
        return words


config_flag = ArgumentParser(add_help=False, allow_abbrev=False)
config_flag.add_argument("--config")


def as_word(value) -> str:
    """A value of a YAML file as it is written on a command line."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


def devices(use_cpu: bool) -> int:
    """How many a run will have: its processes, or the GPUs that the Trainer gives a single process."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    return processes if processes > 1 or use_cpu else max(1, torch.cuda.device_count())


def share_batch(parser: RecipeParser) -> None:
    """
    Divides `--total_batch_size` of the command line among devices and accumulation steps. A device takes as much at a
    time as `--per_device_train_batch_size` allows.

    Raises:
        ValueError: it cannot be divided, or `--gradient_accumulation_steps` is given too.
    """
    parser.last = []
    given = parser.parse_args()
    total, most = given.total_batch_size, given.per_device_train_batch_size
    if total is None:
        return
    if given.gradient_accumulation_steps != parser.get_default("gradient_accumulation_steps"):
        raise ValueError("--total_batch_size sets --gradient_accumulation_steps: give one of the two")
    count = devices(given.use_cpu)
    if total < 1 or total % count:
        raise ValueError(f"--total_batch_size {total} cannot be divided among {count} devices")
    share = total // count
    size = max(size for size in range(1, max(1, min(most, share)) + 1) if share % size == 0)
    parser.last = [f"--gradient_accumulation_steps={share // size}", f"--per_device_train_batch_size={size}"]
