"""Command lines: errors in one line, flags in a YAML file, and a batch that is the same on any number of devices."""

import json
import os
import re
import sys
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from difflib import get_close_matches
from pathlib import Path
from typing import ClassVar, NoReturn, get_type_hints

import torch
import yaml
from datasets.exceptions import DatasetGenerationError
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import HfArgumentParser, TrainingArguments
from transformers.hf_argparser import string_to_bool
from transformers.utils import logging

from ..precision_gemma_encoder import computes_in_bf16
from .files import is_local

logger = logging.get_logger(__name__)


def fail(parser: ArgumentParser, message: str) -> NoReturn:
    """Ends the process with a message, without the hundreds of lines of usage."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")


@contextmanager
def failing(parser: ArgumentParser, begin: str = "") -> Iterator[None]:
    """What is wrong with what the user gave ends the process with its message after `begin`, see `fail`."""
    try:
        yield
    except OSError as error:
        fail(parser, f"{begin}{in_words(error, getattr(parser, 'given', Namespace()))}")
    except (ValueError, ImportError, StrictDataclassError, SafetensorError) as error:
        fail(parser, f"{begin}{error}")
    except DatasetGenerationError as error:
        fail(parser, f"{begin}{error}: {error.__cause__}")


CHECKPOINTS = ("model", "starts", "tokenizer")  # flags of every script that name a folder or a repository


def places(given: Namespace, flags: Iterable[str]) -> list[tuple[str, str]]:
    """Each flag that is given, and what it names that is not here."""
    values = [(flag, getattr(given, flag, None) or []) for flag in flags]
    named = [(flag, one) for flag, several in values for one in ([several] if isinstance(several, str) else several)]
    return [(flag, name) for flag, name in named if not Path(name).expanduser().exists()]


def in_words(error: OSError, given: Namespace) -> str:
    """What an error says, and that there is no such file or folder where it is of one, or of a name on the Hub."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file {error.filename}"
    data = re.search(r"(?:reach|Dataset) '([^']+)'", text)  # as `datasets` puts it
    missing = [name for _, name in places(given, CHECKPOINTS)]
    if data or (missing and "huggingface.co" in text):
        names = data[1] if data else " and no ".join(missing)
        return f"there is no folder {names} here, and from the Hub: {text.splitlines()[0]}"
    return text


@contextmanager
def interruptible(otherwise: str = "nothing new was saved; give the same command again") -> Iterator[None]:
    """
    End the process on Ctrl-C with one line and the code 130, as shells have it; also a decorator.

    What is interrupted says how to go on by raising `KeyboardInterrupt` with that text; `otherwise` is said where it
    does not.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # one line for all processes
            print(f"\nInterrupted: {str(interrupt) or otherwise}.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """A script's description as it is written, and defaults of all flags."""

    LATER: ClassVar = {}  # those that are known only when the command line was read

    def _get_help_string(self, action):
        if action.dest in self.LATER:
            return f"{action.help or ''} (default: {self.LATER[action.dest]})"
        return super()._get_help_string(action)


class ScriptParser(HfArgumentParser):
    """A parser of a script's dataclasses; an unknown flag ends the process with a line that names it.

    A process has one device. Upstream's Trainer would take all GPUs that it sees, by `torch.nn.DataParallel`: each with
    a batch of its own, so that the same command would train something else on another machine.
    """

    def __init__(self, types, description: str, formatter_class: type[Help] = Help):
        usage = "%(prog)s [flags, which --help lists]"
        super().__init__(types, usage=usage, description=description, formatter_class=formatter_class)

        if any(issubclass(kind, TrainingArguments) for kind in self.dataclass_types):
            help = "Train in bf16 also where the processor has no instructions for it, many times more slowly."
            self.add_argument("--force_bf16", nargs="?", const=True, default=False, type=string_to_bool, help=help)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """As upstream; the hundred options of its Trainer come after all of ours, in a group of their own."""
        if not issubclass(dtype, TrainingArguments):
            return super()._add_dataclass_arguments(dtype)
        group, hints = self.add_argument_group("options of transformers' TrainingArguments"), get_type_hints(dtype)
        for field in fields(dtype):
            if field.init:
                field.type = hints[field.name]
                self._parse_dataclass_field(group, field)

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        """As argparse, but fp32 takes the place of bf16 on a processor without instructions for it, which is said."""
        self.words = sys.argv[1:] if args is None else list(args)
        namespace, rest = super().parse_known_args(args, namespace)
        self.given = Namespace(**vars(namespace))  # upstream takes it apart
        forced = vars(namespace).pop("force_bf16", True)
        on_cpu = getattr(namespace, "use_cpu", False) or not torch.accelerator.is_available()
        if not forced and on_cpu and not computes_in_bf16("cpu"):
            for name, instead in (("bf16", False), ("bf16_full_eval", False), ("dtype", "float32")):
                if getattr(namespace, name, instead) in (True, "bfloat16"):
                    logger.warning_once(
                        f"--{name}: this processor has no bf16 instructions and would be many times slower than in "
                        "fp32, which is used instead. --force_bf16 insists."
                    )
                    setattr(namespace, name, instead)
        return namespace, rest

    def parse_args(self, args=None, namespace=None) -> Namespace:
        """As argparse, and a flag that does not exist is answered with the one it is most like."""
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest)}")
        for flag, name in places(namespace, (*CHECKPOINTS, "data_dir")):
            if flag == "data_dir" or is_local(name):
                fail(self, f"--{flag}: there is no {'file' if name.endswith('.gguf') else 'folder'} {name}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """As argparse; where it misses a flag, a misspelt one may be it."""
        known = self._option_string_actions
        flags = [word.partition("=")[0] for word in self.words if word.startswith("--")]
        unknown = [flag for flag in flags if flag != "--" and not any(name.startswith(flag) for name in known)]
        if unknown and "are required" in message:
            message = f"unrecognized arguments: {' '.join(unknown)}{self._meant(unknown)}"
        super().error(message)

    def _meant(self, words: list[str]) -> str:
        unknown = next((word.partition("=")[0] for word in words if word.startswith("--")), "")
        close = get_close_matches(unknown, self._option_string_actions, 1)
        return f". Did you mean {close[0]}?" if close else ""

    def parse_args_into_dataclasses(self, args=None, **options) -> tuple:
        self.parse_args(args)  # upstream raises a ValueError
        parsed = super().parse_args_into_dataclasses(args, **options)
        for found in parsed:
            if isinstance(found, TrainingArguments) and found.n_gpu > 1:
                logger.warning_once(f"{found.n_gpu} GPUs are there and one is used: `accelerate launch` uses them all.")
                found._n_gpu = 1
        return parsed


class RecipeParser(ScriptParser):
    """A parser with `--config FILE`: flags in YAML, over which those of the command line win."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last: list[str] = []  # flags that win over all that are given: `share_batch`
        self.of_file: list[str] = []  # what the file said
        self.add_argument(
            "--config", metavar="FILE", help="Flags in YAML, as in examples/recipes; flags given beside it win."
        )

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        found, words = config_flag.parse_known_args(sys.argv[1:] if args is None else args)
        self.of_file = []
        if found.config is not None:
            try:
                self.of_file = self._read(Path(found.config))
            except (OSError, ValueError, yaml.YAMLError) as error:
                fail(self, f"--config {found.config}: {error}")
        namespace, rest = super().parse_known_args([*self.of_file, *words, *self.last], namespace)
        if vars(namespace).pop("config", None) is not None:  # otherwise it has become the flags it holds
            fail(self, "--config cannot be abbreviated")
        return namespace, rest

    def _read(self, path: Path) -> list[str]:
        flags = yaml.safe_load(path.read_text())
        if not isinstance(flags, dict):
            raise ValueError("it must hold `flag: value` in each line.")
        known = {flag[2:]: action for flag, action in self._option_string_actions.items() if flag.startswith("--")}
        words = []
        for name, value in flags.items():
            if name not in known or name in ("config", "help"):
                close = get_close_matches(str(name), known, 1)
                raise ValueError(f"there is no flag {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
            if isinstance(value, list) and value:
                words += [f"--{name}", *map(as_word, value)]
            elif value is False and "no" in (known[name].choices or ()):  # YAML reads a plain `no` so
                words.append(f"--{name}=no")
            elif value not in (None, []):
                words.append(f"--{name}={as_word(value)}")
        return words


config_flag = ArgumentParser(add_help=False, allow_abbrev=False)
config_flag.add_argument("--config")


def as_word(value) -> str:
    """A value of a YAML file as it is written on a command line."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


def says(words: list[str], flag: str) -> bool:
    """Whether a command line has the flag, perhaps abbreviated; argparse has refused what is ambiguous."""
    return any(len(word) > 2 and word.startswith("--") and flag.startswith(word.partition("=")[0]) for word in words)


def share_batch(parser: RecipeParser, args: list[str] | None = None, count: int | None = None) -> None:
    """
    Divides `--total_batch_size` among devices and accumulation steps. A device takes as much at a time as
    `--per_device_train_batch_size` allows. Accumulation steps of the command line win over a file's total.

    Args:
        args: What is parsed; None: the command line.
        count: Of the devices; None: of the processes that were launched.

    Raises:
        ValueError: it cannot be divided, or `--gradient_accumulation_steps` is given beside it.
    """
    parser.last = []
    given = parser.parse_args(args)
    total, most = given.total_batch_size, given.per_device_train_batch_size
    if total is None:
        return
    count = count or int(os.environ.get("WORLD_SIZE", "1"))
    places = (parser.of_file, sys.argv[1:] if args is None else args)
    totals = [says(words, "--total_batch_size") for words in places]
    steps = [says(words, "--gradient_accumulation_steps") for words in places]
    if steps[1] and not totals[1]:
        parser.last = [f"--total_batch_size={count * most * given.gradient_accumulation_steps}"]
        return
    if (totals[0] and steps[0] and not totals[1]) or (totals[1] and steps[1]):
        raise ValueError("--total_batch_size sets --gradient_accumulation_steps: give one of the two")
    if total < 1 or most < 1 or total % count:
        raise ValueError(f"--total_batch_size {total} cannot be divided among {count} devices, {most} rows at a time")
    share = total // count
    size = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    parser.last = [f"--gradient_accumulation_steps={share // size}", f"--per_device_train_batch_size={size}"]
