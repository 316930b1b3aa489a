"""What recipes take, without a GPU and without weights: memory of a GPU, and hours at a rate that you have measured.

    python examples/recipes/estimate.py examples/recipes/*.yaml --tflops 300

The model is built of tensors that have a shape and no content, and takes a training step on the longest batch that the
recipe allows: counted are what it keeps for the backward pass, the optimizer's state and the operations. Not counted
are the workspaces of kernels and what an allocator loses between blocks: leave a tenth free. Hours are operations over
--tflops, what a GPU achieves and not what it is sold for: the tokens a second of a short run (`real_tokens_per_second`
in its `results.json`) times the operations a token.

Rows are those of the data sets' cards. Tokens a text are means of the nano decoder's tokenizer, whose vocabulary of
8,192 makes more of them than Gemma's; of MNLI, QQP and RTE they are assumed. ReCoRD's rows count with 12.4 candidates,
the mean of a few: batches of longer lists take more.
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd.graph import saved_tensors_hooks
from torch.nn.functional import cross_entropy
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoConfig, Trainer, TrainingArguments

sys.path.insert(0, str(Path(__file__).parent.parent))

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder._scripts.command_line import share_batch
from modeling_gemma_encoder.attention_gemma_encoder import layer_reach, unpad, with_buckets
from modeling_gemma_encoder.finetuning import glue, superglue
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments, encoder_options
from modeling_gemma_encoder.finetuning.suite import SuiteArguments, make_parser
from modeling_gemma_encoder.finetuning.tasks import Task
from modeling_gemma_encoder.ranking import arguments

# The shapes of gated checkpoints, whose config.json needs a login.
GEMMA_2 = {"sliding_window": 4096, "head_dim": 256, "vocab_size": 256000, "query_pre_attn_scalar": 256}
SHAPES = {
    "google/gemma-2-2b": GEMMA_2
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "google/gemma-2-9b": GEMMA_2
    | {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
}
# Training rows, and tokens of a text; of COPA, ReCoRD and MS MARCO texts a row, too.
ROWS = {
    **{"cola": (8551, 13), "sst2": (67349, 16), "mrpc": (3668, 72), "stsb": (5749, 22), "qnli": (104743, 67)},
    **{"mnli": (392702, 45), "qqp": (363846, 35), "rte": (2490, 75), "wnli": (635, 38)},
    **{"boolq": (9427, 196), "cb": (250, 93), "copa": (400, 24), "multirc": (27243, 380), "record": (100730, 365)},
    **{"wic": (5428, 29), "wsc": (554, 38), "msmarco": (502939, 122)},
}
TEXTS = {"copa": 2, "record": 12.4}
SUITES = {"glue": glue.TASKS, "superglue": superglue.TASKS}
GIB = 2**30


@dataclass
class Recipe:
    """A recipe's flags, as its script reads them on some number of GPUs."""

    name: str
    options: FineTuningArguments
    tasks: dict[str, tuple[Task, TrainingArguments]]  # that are trained
    list_size: int | None

    @classmethod
    def read(cls, path: Path, gpus: int) -> "Recipe":
        """
        Raises:
            ValueError: it trains what is not counted here, or its name does not end with one of the scripts'.
        """
        script, words = path.stem.rpartition("-")[2], ["--config", str(path), "--use_cpu", "true"]
        if script not in (*SUITES, "msmarco"):
            raise ValueError(f"{path}: a recipe's name ends with -glue, -superglue or -msmarco.")
        ranks = script == "msmarco"
        parser = make_parser(arguments.RankingArguments if ranks else SuiteArguments, "", "")
        parser.set_defaults(**(arguments.DEFAULTS if ranks else {}))
        known = {"msmarco": arguments.TASK} if ranks else SUITES[script]
        given = parser.parse_args(words)
        names = known if ranks or "all" in given.task else given.task
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{path}: there is no task {', '.join(unknown)}.")
        tasks = {}
        for name in names:
            task = known[name]
            parser.set_defaults(num_train_epochs=task.epochs, per_device_train_batch_size=task.batch_size)
            share_batch(parser, words, gpus)
            own, options, args = parser.parse_args_into_dataclasses(words)
            if not task.train_on:
                tasks[name] = (task, args)
        if not tasks:
            raise ValueError(f"{path} trains nothing.")
        if options.lora_r is not None or options.list_chunk_size is not None or options.dtype != "float32":
            raise ValueError(f"{path}: adapters, chunks of lists and weights in half precision are not estimated.")
        if ranks and own.train_data != ["sentence-transformers/msmarco-bm25"]:
            raise ValueError(f"{path}: how many rows {', '.join(own.train_data)} has is not known here.")
        return cls(path.stem, options, tasks, own.list_size if ranks else None)

    @property
    def args(self) -> TrainingArguments:
        return next(iter(self.tasks.values()))[1]

    def texts(self, name: str) -> float:
        return self.list_size or TEXTS.get(name, 1)

    def length(self, name: str) -> int:
        return self.options.max_length or self.tasks[name][0].max_length

    def longest_batch(self) -> tuple[int, int]:
        """Texts that a device takes at a time, and their tokens, where these are most."""
        sizes = {
            name: int(args.per_device_train_batch_size * self.texts(name)) for name, (_, args) in self.tasks.items()
        }
        name = max(sizes, key=lambda name: sizes[name] * self.length(name))
        return sizes[name], self.length(name)

    def tokens(self) -> float:
        """That are trained on by one seed."""
        total = 0
        for name, (_, args) in self.tasks.items():
            rows, tokens = ROWS[name]
            rows = args.num_train_epochs * min(rows, self.options.max_train_samples or rows)
            if args.max_steps > 0:
                rows = args.max_steps * (self.options.total_batch_size or args.train_batch_size)
            total += rows * self.texts(name) * min(tokens, self.length(name))
        return total


def decoder_config(model: str):
    if model in SHAPES:
        return AutoConfig.for_model("gemma2", **SHAPES[model])
    return GemmaEncoderConfig.from_pretrained(model).text_config


class Kept:
    """Counts what is saved for the backward pass, each storage once, parameters apart."""

    def __init__(self, model):
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.storages = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return tensor

    def bytes(self) -> int:
        return sum(storage.nbytes() for storage in self.storages.values())


@dataclass
class Step:
    """A training step of one batch: bytes, at most, and operations."""

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    halves: int  # copies of the weights in half precision, which autocast keeps for a pass
    gathered: int  # weights and gradients that FSDP holds whole at a time: the embedding and a layer
    operations: float

    def memory(self, sharded: int = 1) -> float:
        """Of a GPU by itself, or of one of several that share weights, gradients and AdamW's state by FSDP2."""
        held = self.weights + self.gradients
        if sharded == 1:
            return held + self.optimizer + self.halves + self.activations
        return (held + 2 * self.gradients) / sharded + self.gathered + self.activations


def take_step(options: FineTuningArguments, args: TrainingArguments, texts: int, length: int) -> Step:
    """A forward pass, a backward pass and the optimizer's first step, of tensors without content."""
    config = GemmaEncoderConfig(text_config=decoder_config(options.model), **encoder_options(options))
    reaches = {layer_reach(config, kind) for kind in config.text_config.layer_types}
    sequences = with_buckets(unpad(torch.ones(texts, length, dtype=torch.bool)), reaches, split=True)
    ids, labels = torch.zeros(1, texts * length, dtype=torch.long), torch.zeros(texts, dtype=torch.long)
    saved, operations = {}, 0.0
    for checkpointing in (False, True) if args.gradient_checkpointing else (False,):
        with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
            model = GemmaEncoderForSequenceClassification(config).train()
            model.get_input_embeddings().requires_grad_(not options.freeze_embeddings)
            if checkpointing:
                model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
            kept = Kept(model)
            with saved_tensors_hooks(kept, lambda tensor: tensor), torch.autocast("cpu", enabled=args.bf16):
                inputs = {"input_ids": ids, "position_ids": sequences.positions[None], "unpadding": sequences}
                states = model.model(**inputs, use_cache=False).last_hidden_state[0]
                loss = cross_entropy(model.classifier(model.pooler(states, sequences.offsets)), labels)
            loss.backward()
            saved[checkpointing] = kept.bytes()
        operations = counter.get_total_flops()
    layers = config.num_hidden_layers
    with FakeTensorMode(allow_non_fake_inputs=True):
        trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind(trained, **settings)
        optimizer.step()
        state = [value for of_one in optimizer.state.values() for value in of_one.values()]
    linear = sum(module.weight.numel() for module in model.model.layers.modules() if isinstance(module, nn.Linear))
    halves = 2 * linear if args.bf16 else 0
    embedding = model.get_input_embeddings().weight.numel()
    return Step(
        parameters=model.num_parameters(),
        weights=4 * model.num_parameters(),
        gradients=4 * sum(parameter.numel() for parameter in trained),
        optimizer=sum(value.nbytes for value in state if isinstance(value, torch.Tensor)),
        # With checkpoints: what layers are given, and all of one layer, which is computed again.
        activations=saved[True] + saved[False] // layers if args.gradient_checkpointing else saved[False] - halves,
        halves=halves,
        gathered=8 * (embedding + linear // layers),
        operations=operations,
    )


def row(path: Path, gpus: int, tflops: float) -> list[str]:
    alone, shared = Recipe.read(path, 1), Recipe.read(path, gpus)
    texts, length = alone.longest_batch()
    step = take_step(alone.options, alone.args, texts, length)
    of_many = take_step(shared.options, shared.args, *shared.longest_batch())
    a_token = step.operations / (texts * length)
    total = alone.tokens() * a_token
    parts = (step.weights + step.gradients, step.optimizer, step.halves, step.activations)
    return [
        alone.name,
        f"{step.parameters / 1e9:.2f}",
        f"{texts} x {length}",
        " + ".join(f"{part / GIB:.0f}" for part in parts) + f" = {step.memory() / GIB:.0f}",
        f"{of_many.memory(gpus) / GIB:.0f}",
        f"{a_token / 1e9:.1f}",
        f"{alone.tokens() / 1e6:,.0f}",
        f"{total / tflops / 1e12 / 3600:.1f}",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--tflops", type=float, default=300, help="That a GPU achieves, in 10^12 operations a second.")
    parser.add_argument("--gpus", type=int, default=8, help="That share the state under FSDP2.")
    options = parser.parse_args()
    if options.tflops <= 0 or options.gpus < 2:
        parser.exit(2, f"{parser.prog}: error: --tflops must be above 0 and --gpus at least 2\n")
    columns = ["recipe", "billion parameters", "longest batch, texts x tokens"]
    columns += ["one GPU, GiB: weights and gradients + optimizer + autocast's copies + activations"]
    columns += [f"each of {options.gpus} by FSDP2 with AdamW, GiB", "10^9 operations a token", "million tokens a seed"]
    columns += [f"GPU-hours a seed at {options.tflops:g} TFLOP/s"]
    print(f"| {' | '.join(columns)} |\n| --- |{' ---: |' * (len(columns) - 1)}")
    for path in options.recipes:
        try:
            print(f"| {' | '.join(row(path, options.gpus, options.tflops))} |", flush=True)
        except (OSError, ValueError) as error:
            parser.exit(2, f"{parser.prog}: error: {error}\n")


if __name__ == "__main__":
    main()
