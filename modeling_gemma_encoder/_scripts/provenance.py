"""The origin of a run: its command without folders and secrets, and the machine."""

import os
import platform
import re
import shlex
import sys
from pathlib import Path

import torch

from .files import is_local

TABLES = (".csv", ".tsv", ".jsonl", ".json", ".parquet", ".txt", ".run", ".yaml", ".yml")


def own_name(name: str) -> str:
    """Return the last part of a path of this machine, and other names, such as those of the Hub, as
    they are."""
    place, colon, split = name.partition(":")
    if "://" in name or not (is_local(place) or place.endswith(TABLES)):
        return name
    return f"{Path(place).expanduser().name or 'here'}{colon}{split}"


def masked(command: str) -> str:
    """Return a command line without secrets and folders of this machine.

    It has no tokens of the Hub, no values of flags that hold secrets, and of a path only its last
    part, unless it is that of a script.
    """
    places = re.compile(r"(?<![^\s=])(?:'([^']*)'|\"([^\"]*)\"|([^\s='\"]+))(?=\s|$)")

    def named(match: re.Match) -> str:
        name = next(filter(None, match.groups()), "")
        script = name.endswith(".py") and not name.startswith(("/", "~"))
        return match[0] if not name or name.startswith("-") or script else match[0].replace(name, own_name(name))

    command = places.sub(named, command)
    command = re.sub(r"(?<![\w.~/:])[~/](?:[\w.-]+/)+", "", command)  # paths within other words
    command = re.sub(
        r"(--(?!mask[-_]token|tokens[-_])\S*(?:token|key|secret|password)\S*?(?:=|\s+))\S+",
        r"\1...",
        command,
        flags=re.IGNORECASE,
    )
    return re.sub(r"hf_[A-Za-z0-9]+", "hf_...", command)


def provenance() -> dict[str, str]:
    """Return the command line of this process without secrets, and what it runs on, for a model
    card."""
    script = Path(sys.argv[0])
    if script.is_absolute():  # the reader of a card types a relative path
        script = script.relative_to(Path.cwd()) if script.is_relative_to(Path.cwd()) else Path(script.name)
    command = ["python", str(script), *sys.argv[1:]]
    if (processes := int(os.environ.get("WORLD_SIZE", "1"))) > 1:
        command[0] = f"torchrun --nproc_per_node {os.environ.get('LOCAL_WORLD_SIZE', processes)}"
    if torch.cuda.is_available():
        hardware = f"{processes} x {torch.cuda.get_device_name()}"
    else:
        hardware = f"{processes * torch.get_num_threads()} CPU threads ({platform.machine()})"
    return {"command": masked(" ".join([command[0], *map(shlex.quote, command[1:])])), "hardware": hardware}


def describe_rows(source: dict[str, str]) -> str:
    """Return the file or data set that rows are from, and which part of it was held out."""
    data = f"{source['data']}, split {source['split']!r}" if "split" in source else source["data"]
    return f"{source['part']} of {data}, held out" if "part" in source else data
