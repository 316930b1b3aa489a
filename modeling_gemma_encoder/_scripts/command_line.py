"""Command lines: errors of one line, flags in a YAML file, and the same batch on any number of
devices."""

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
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers.hf_argparser import HfArgumentParser, string_to_bool
from transformers.utils import logging

from ..precision_gemma_encoder import computes_in_bf16
from .files import is_local, is_missing

logger = logging.get_logger(__name__)


def fail(parser: ArgumentParser, message: str) -> NoReturn:
    """End the process with a message, without the hundreds of lines of usage."""
    parser.exit(2, f"{parser.prog}: error: {message}\n")


@contextmanager
def failing(parser: ArgumentParser, begin: str = "") -> Iterator[None]:
    """End the process with one line, `begin` and the message, where an error is the user's to
    correct; see `fail`."""
    try:
        yield
    except OSError as error:
        fail(parser, f"{begin}{in_words(error, getattr(parser, 'given', Namespace()))}")
    except (ValueError, ImportError, StrictDataclassError, SafetensorError) as error:
        fail(parser, f"{begin}{error}")
    except Exception as error:
        if type(error).__name__ != "DatasetGenerationError":  # of `datasets`, which may not be installed
            raise
        fail(parser, f"{begin}{error}: {error.__cause__}")


# Flags of all scripts that name a folder or a repository on the Hub.
CHECKPOINTS = ("model", "starts", "tokenizer")

WITHOUT_LOGIN = (
    " Google's checkpoints need a login: accept the license on the model's page, and run `hf auth login`. Without one, "
    "`make gemma` writes Gemma 3 270M to gemma-3-270m."
)


def absent_places(given: Namespace, flags: Iterable[str]) -> list[tuple[str, str]]:
    """Return each flag with the file or folder that it names, of those that do not exist."""
    values = [(flag, getattr(given, flag, None) or []) for flag in flags]
    named = [(flag, one) for flag, several in values for one in ([several] if isinstance(several, str) else several)]
    return [(flag, name) for flag, name in named if not Path(name).expanduser().exists()]


def in_words(error: OSError, given: Namespace) -> str:
    """Return the message of an error, which begins with the file, folder or name on the Hub that
    does not exist."""
    text = str(error)
    if isinstance(error, FileNotFoundError) and error.filename:
        return f"there is no file {error.filename}"
    data = re.search(r"(?:reach|Dataset) '([^']+)'", text)  # as `datasets` puts it
    missing = [name for _, name in absent_places(given, CHECKPOINTS)]
    if data or (missing and "huggingface.co" in text):
        names = data[1] if data else " and no ".join(missing)
        hint = WITHOUT_LOGIN if any(name.startswith("google/gemma") for name in missing) else ""
        return f"there is no folder {names} here, and from the Hub: {text.splitlines()[0]}{hint}"
    return text


@contextmanager
def interruptible(otherwise: str = "nothing new was saved; give the same command again") -> Iterator[None]:
    """
    End the process on Ctrl-C with one line and the code 130, as shells have it; also a decorator.

    Args:
        otherwise: What the line says where the `KeyboardInterrupt` itself has no text on how to go
            on.
    """
    try:
        yield
    except KeyboardInterrupt as interrupt:
        if os.environ.get("RANK", "0") == "0":  # one line for all processes
            print(f"\nInterrupted: {str(interrupt) or otherwise}.", file=sys.stderr, flush=True)
        raise SystemExit(130) from None


def is_of_trainer(kind: type) -> bool:
    """Return whether a dataclass is `TrainingArguments`, whose import takes seconds, or derived from it."""
    return any(base.__module__ == "transformers.training_args" for base in kind.__mro__)


class Help(ArgumentDefaultsHelpFormatter, RawDescriptionHelpFormatter):
    """Help with a script's description as it is written, and the defaults of all flags."""

    LATER: ClassVar = {}  # defaults that are known only after the command line is parsed

    def _get_help_string(self, action):
        if action.dest in self.LATER:
            return f"{action.help or ''} (default: {self.LATER[action.dest]})"
        return super()._get_help_string(action)


class ScriptParser(HfArgumentParser):
    """Parse the flags of a script into its dataclasses. An error ends the process with one line.

    A process uses one device. The Trainer itself would use all GPUs that it sees, with
    `torch.nn.DataParallel` and a batch on each, so that the same command would train something else
    on another machine.
    """

    def __init__(self, types, description: str, formatter_class: type[Help] = Help):
        usage = "%(prog)s [flags, which --help lists]"
        super().__init__(types, usage=usage, description=description, formatter_class=formatter_class)

        if any(map(is_of_trainer, self.dataclass_types)):
            help = "Train in bf16 also where the processor has no instructions for it, many times more slowly."
            self.add_argument("--force_bf16", nargs="?", const=True, default=False, type=string_to_bool, help=help)

    def _add_dataclass_arguments(self, dtype: type) -> None:
        """Add a dataclass as upstream does, but the hundred options of its Trainer last, in a group
        of their own."""
        if not is_of_trainer(dtype):
            return super()._add_dataclass_arguments(dtype)
        group, hints = self.add_argument_group("options of transformers' TrainingArguments"), get_type_hints(dtype)
        for field in fields(dtype):
            if field.init:
                field.type = hints[field.name]
                self._parse_dataclass_field(group, field)

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        """Parse as argparse does, and replace bf16 with fp32 on a processor without bf16
        instructions."""
        self.words = sys.argv[1:] if args is None else list(args)
        namespace, rest = super().parse_known_args(args, namespace)
        self.given = Namespace(**vars(namespace))  # a copy, as upstream empties the namespace
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
        """Parse as argparse does, and name the most similar flag where one does not exist."""
        namespace, rest = self.parse_known_args(args, namespace)
        if rest:
            self.error(f"unrecognized arguments: {' '.join(rest)}{self._meant(rest)}")
        for flag, name in absent_places(namespace, (*CHECKPOINTS, "data_dir")):
            # A tokenizer may have the name of an old repository without an owner, such as gpt2.
            missing = is_local(name) if flag == "tokenizer" else is_missing(name)
            if flag == "data_dir" or missing:
                fail(self, f"--{flag}: there is no {'file' if name.endswith('.gguf') else 'folder'} {name}")
        return namespace

    def error(self, message: str) -> NoReturn:
        """Report an error as argparse does, but a misspelt flag before one that is missing."""
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
        """Parse as upstream does, with one device a process."""
        self.parse_args(args)  # ends with one line, where upstream raises a ValueError
        parsed = super().parse_args_into_dataclasses(args, **options)
        for found in parsed:
            if is_of_trainer(type(found)) and found.n_gpu > 1:
                logger.warning_once(f"There are {found.n_gpu} GPUs and one is used: `accelerate launch` uses them all.")
                found._n_gpu = 1
        return parsed


class YamlScriptParser(ScriptParser):
    """Parse also `--config FILE`, which has flags in YAML. Flags of the command line win over those
    of the file."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.last: list[str] = []  # flags that win over all others; see `share_batch`
        self.of_file: list[str] = []  # flags of the file
        self.add_argument(
            "--config", metavar="FILE", help="Flags in YAML, as in examples/recipes; flags given beside it win."
        )

    def parse_known_args(self, args=None, namespace=None) -> tuple[Namespace, list[str]]:
        """Parse the flags of the file, then those of the command line, then `last`; the later ones
        win."""
        found, words = config_flag.parse_known_args(sys.argv[1:] if args is None else args)
        self.of_file = []
        if found.config is not None:
            try:
                self.of_file = self._read(Path(found.config))
            except (OSError, ValueError, yaml.YAMLError) as error:
                fail(self, f"--config {found.config}: {error}")
        namespace, rest = super().parse_known_args([*self.of_file, *words, *self.last], namespace)
        # `config_flag` has taken `--config` out, unless it was abbreviated.
        if vars(namespace).pop("config", None) is not None:
            fail(self, "--config cannot be abbreviated.")
        return namespace, rest

    def _read(self, path: Path) -> list[str]:
        flags = yaml.safe_load(path.read_text())
        if not isinstance(flags, dict):
            raise ValueError("the file must have `flag: value` in each line.")
        known = {flag[2:]: action for flag, action in self._option_string_actions.items() if flag.startswith("--")}
        words = []
        for name, value in flags.items():
            if name not in known or name in ("config", "help"):
                close = get_close_matches(str(name), known, 1)
                raise ValueError(f"there is no flag {name!r}." + (f" Did you mean {close[0]!r}?" if close else ""))
            if isinstance(value, list) and value:
                words += [f"--{name}", *map(as_word, value)]
            elif value is False and "no" in (known[name].choices or ()):  # YAML reads a plain `no` as False
                words.append(f"--{name}=no")
            elif value not in (None, []):
                words.append(f"--{name}={as_word(value)}")
        return words


config_flag = ArgumentParser(add_help=False, allow_abbrev=False)
config_flag.add_argument("--config")


def as_word(value) -> str:
    """Return a value of a YAML file as it is written on a command line."""
    return json.dumps(value) if isinstance(value, (bool, dict)) else str(value)


TOTAL, STEPS = "--total_batch_size", "--gradient_accumulation_steps"


def has_flag(words: list[str], flag: str) -> bool:
    """Return whether a command line has a flag, perhaps abbreviated; argparse has refused ambiguous
    ones."""
    return any(len(word) > 2 and word.startswith("--") and flag.startswith(word.partition("=")[0]) for word in words)


def share_batch(parser: YamlScriptParser, args: list[str] | None = None, count: int | None = None) -> None:
    """
    Divide `--total_batch_size` among devices and accumulation steps.

    A device takes at most `--per_device_train_batch_size` rows at a time. Accumulation steps of the
    command line win over the total of a file.

    Args:
        args: The words to parse; None: those of the command line.
        count: The number of devices; None: the number of processes that were launched.

    Raises:
        ValueError: The total cannot be divided, or `--gradient_accumulation_steps` is given beside
            it.
    """
    parser.last = []
    given = parser.parse_args(args)
    total, most = given.total_batch_size, given.per_device_train_batch_size
    if total is None:
        return
    count = count or int(os.environ.get("WORLD_SIZE", "1"))
    file, command = parser.of_file, sys.argv[1:] if args is None else args
    total_in_file, steps_in_file = has_flag(file, TOTAL), has_flag(file, STEPS)
    total_given, steps_given = has_flag(command, TOTAL), has_flag(command, STEPS)
    if steps_given and not total_given:
        parser.last = [f"{TOTAL}={count * most * given.gradient_accumulation_steps}"]
        return
    if (total_in_file and steps_in_file and not total_given) or (total_given and steps_given):
        raise ValueError("--total_batch_size sets --gradient_accumulation_steps: give one of the two.")
    if total < 1 or most < 1 or total % count:
        raise ValueError(f"--total_batch_size {total} cannot be divided among {count} devices, {most} rows at a time.")
    share = total // count
    size = max(size for size in range(1, min(most, share) + 1) if share % size == 0)
    parser.last = [f"{STEPS}={share // size}", f"--per_device_train_batch_size={size}"]
