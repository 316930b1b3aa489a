"""Estimate the memory and the GPU-hours that recipes take, without a GPU and without weights.

    python examples/recipes/estimate.py examples/recipes/*.yaml --tflops 300

The model is built of tensors that have a shape and no content. It takes a training step on the
longest batch that the recipe allows. The script counts what the step keeps for the backward pass,
the state of the optimizer, and the operations. It does not count the workspaces of kernels and
what an allocator loses between blocks: leave a tenth of the memory free.

Hours are the operations divided by `--tflops`, the rate that a GPU achieves, which is less than
the rate in its data sheet. To measure it, make a short run and multiply `real_tokens_per_second`
in its `results.json` by the operations a token.

The numbers of rows are those of the data sets' cards. The tokens of a text are means with the
tokenizer of the nano decoder. Its vocabulary of 8,192 makes more tokens than Gemma's does. Those of
MNLI, QQP and RTE are assumed. A row of ReCoRD counts with 12.4 candidates, the mean of a few rows;
batches of longer lists take more.
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
from modeling_gemma_encoder._scripts.command_line import YamlScriptParser, fail, failing, share_batch
from modeling_gemma_encoder.attention_gemma_encoder import Unpadding, layer_reach, unpad, with_buckets
from modeling_gemma_encoder.finetuning import glue, superglue
from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments, encoder_options
from modeling_gemma_encoder.finetuning.suite import SuiteArguments, make_parser
from modeling_gemma_encoder.finetuning.tasks import Task
from modeling_gemma_encoder.ranking import arguments

# The shapes of gated checkpoints, whose config.json needs a login.
GEMMA_2 = {
    "sliding_window": 4096,
    "head_dim": 256,
    "vocab_size": 256000,
    "query_pre_attn_scalar": 256,
}
SHAPES = {
    "google/gemma-2-2b": GEMMA_2
    | {"hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26}
    | {"num_attention_heads": 8, "num_key_value_heads": 4},
    "google/gemma-2-9b": GEMMA_2
    | {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42}
    | {"num_attention_heads": 16, "num_key_value_heads": 8},
}
# Training rows, and tokens of a text.
ROWS = {
    "cola": (8551, 13),
    "sst2": (67349, 16),
    "mrpc": (3668, 72),
    "stsb": (5749, 22),
    "qnli": (104743, 67),
    "mnli": (392702, 45),
    "qqp": (363846, 35),
    "rte": (2490, 75),
    "wnli": (635, 38),
    "boolq": (9427, 196),
    "cb": (250, 93),
    "copa": (400, 24),
    "multirc": (27243, 380),
    "record": (100730, 365),
    "wic": (5428, 29),
    "wsc": (554, 38),
    "msmarco": (502939, 122),
}
# The texts of a row, where they are several; those of MS MARCO are its `list_size`.
TEXTS = {"copa": 2, "record": 12.4}
SUITES = {"glue": glue.TASKS, "superglue": superglue.TASKS}
MSMARCO = "sentence-transformers/msmarco-bm25"
GIB = 2**30


@dataclass(frozen=True)
class Recipe:
    """Hold a recipe's options, as its script reads them on some number of GPUs.

    `tasks` has only those that are trained, with their training options.
    """

    name: str
    options: FineTuningArguments
    tasks: dict[str, tuple[Task, TrainingArguments]]
    list_size: int | None

    @classmethod
    def read(cls, path: Path, gpus: int) -> "Recipe":
        """Read a recipe.

        Raises:
            ValueError: The recipe trains nothing, or something that is not estimated, or its name
                does not end with the name of a script.
        """
        ranks, known = known_tasks(path)
        parser = recipe_parser(ranks)
        # Counted for GPUs, whatever this processor can do.
        words = ["--config", str(path), "--use_cpu", "true", "--force_bf16"]
        given = parser.parse_args(words)
        names = list(known) if ranks or "all" in given.task else given.task
        if unknown := [name for name in names if name not in known]:
            raise ValueError(f"{path}: `task` must be some of {', '.join(known)}; got {', '.join(unknown)}.")
        tasks = {}
        for name in names:
            task = known[name]
            parser.set_defaults(
                num_train_epochs=task.epochs,
                per_device_train_batch_size=task.batch_size,
            )
            share_batch(parser, words, gpus)
            own, options, args = parser.parse_args_into_dataclasses(words)
            if not task.train_on:  # else it has no training rows
                tasks[name] = (task, args)
        if not tasks:
            raise ValueError(f"{path}: the recipe trains nothing. Name a task that is trained.")
        validate(path, options, own.train_data if ranks else None)
        return cls(path.stem, options, tasks, own.list_size if ranks else None)

    @property
    def args(self) -> TrainingArguments:
        """Return the training options of the first task."""
        return next(iter(self.tasks.values()))[1]

    def texts(self, name: str) -> float:
        """Return the texts of a row of a task."""
        return self.list_size or TEXTS.get(name, 1)

    def length(self, name: str) -> int:
        """Return the most tokens of a text of a task."""
        return self.options.max_length or self.tasks[name][0].max_length

    def longest_batch(self) -> tuple[int, int]:
        """Return the texts of the largest batch of a device, and the tokens of each text."""
        batches = []
        for name, (_, args) in self.tasks.items():
            texts = int(args.per_device_train_batch_size * self.texts(name))
            batches.append((texts, self.length(name)))
        return max(batches, key=lambda batch: batch[0] * batch[1])

    def tokens(self) -> float:
        """Return the tokens that one seed trains on."""
        total = 0
        for name, (_, args) in self.tasks.items():
            rows, tokens = ROWS[name]
            rows = args.num_train_epochs * min(rows, self.options.max_train_samples or rows)
            if args.max_steps > 0:
                rows = args.max_steps * (self.options.total_batch_size or args.train_batch_size)
            total += rows * self.texts(name) * min(tokens, self.length(name))
        return total


def known_tasks(path: Path) -> tuple[bool, dict[str, Task]]:
    """Return whether a recipe trains a ranker, and the tasks of its script, named by its file.

    Raises:
        ValueError: The name of the file does not end with the name of a script.
    """
    script = path.stem.rpartition("-")[2]
    if script == "msmarco":
        return True, {"msmarco": arguments.TASK}
    if script not in SUITES:
        raise ValueError(f"{path}: the name of a recipe must end with -glue, -superglue or -msmarco.")
    return False, SUITES[script]


def recipe_parser(ranks: bool) -> YamlScriptParser:
    """Return the parser of the script that trains rankers, or of those that train classifiers."""
    if not ranks:
        return make_parser(SuiteArguments, "", "")
    parser = make_parser(arguments.RankingArguments, "", "")
    parser.set_defaults(**arguments.DEFAULTS)
    return parser


def validate(path: Path, options: FineTuningArguments, train_data: list[str] | None) -> None:
    """Raise ValueError for a recipe whose training step or number of rows is not known here.

    Args:
        train_data: What a ranker is trained on; None: the recipe trains on a suite of tasks.
    """
    if options.lora_r is not None or options.list_chunk_size is not None:
        raise ValueError(
            f"{path}: adapters and chunks of lists are not estimated. Leave out `lora_r` and `list_chunk_size`."
        )
    if options.dtype != "float32":
        raise ValueError(f"{path}: `dtype` must be 'float32', because no others are estimated; got {options.dtype!r}.")
    if train_data not in (None, [MSMARCO]):
        raise ValueError(
            f"{path}: `train_data` must be {MSMARCO}, because the rows of no other data are known "
            f"here; got {', '.join(train_data)}."
        )


def decoder_config(model: str):
    """Return the config of a decoder: that of a checkpoint, or a shape in `SHAPES`."""
    if model in SHAPES:
        return AutoConfig.for_model("gemma2", **SHAPES[model])
    return GemmaEncoderConfig.from_pretrained(model).text_config


class SavedTensors:
    """Count the bytes saved for the backward pass: each storage once, and no parameters."""

    def __init__(self, model: nn.Module):
        self.weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
        self.storages = {}

    def __call__(self, tensor: torch.Tensor) -> torch.Tensor:
        """Note a tensor that is saved, and return it."""
        storage = tensor.untyped_storage()
        if storage._cdata not in self.weights:
            self.storages[storage._cdata] = storage
        return tensor

    def bytes(self) -> int:
        """Return the bytes of all storages that were noted."""
        return sum(storage.nbytes() for storage in self.storages.values())


@dataclass(frozen=True)
class Batch:
    """Hold a batch of texts of the same length, unpadded. `total_tokens` is texts times length."""

    ids: torch.Tensor  # (1, total_tokens)
    labels: torch.Tensor  # (texts,)
    sequences: Unpadding

    @classmethod
    def make(cls, config: GemmaEncoderConfig, texts: int, length: int) -> "Batch":
        """Return a batch whose sequences are arranged as the model arranges them."""
        reaches = {layer_reach(config, kind) for kind in config.text_config.layer_types}
        mask = torch.ones(texts, length, dtype=torch.bool)
        ids = torch.zeros(1, texts * length, dtype=torch.long)
        labels = torch.zeros(texts, dtype=torch.long)
        return cls(ids, labels, with_buckets(unpad(mask), reaches, split=True))

    def loss(self, model: GemmaEncoderForSequenceClassification) -> torch.Tensor:
        """Return the loss of a model. Its own forward pass would look at the values of the mask."""
        states = model.model(
            input_ids=self.ids,
            position_ids=self.sequences.positions[None],
            unpadding=self.sequences,
            use_cache=False,
        ).last_hidden_state[0]  # (total_tokens, hidden)
        pooled = model.pooler(states, self.sequences.offsets)  # (texts, hidden)
        return cross_entropy(model.classifier(pooled), self.labels)


@dataclass(frozen=True)
class Step:
    """Hold the most bytes that a training step takes, by their use, and its operations.

    `halves` are the copies of the weights in half precision, which autocast keeps for a pass.
    `gathered` are the weights and gradients of the embedding and of one layer, which FSDP holds
    whole at a time.
    """

    parameters: int
    weights: int
    gradients: int
    optimizer: int
    activations: int
    halves: int
    gathered: int
    operations: float

    def memory(self, sharded: int = 1) -> float:
        """Return the bytes of a GPU.

        Args:
            sharded: The GPUs that share weights, gradients and the state of AdamW by FSDP2.
        """
        held = self.weights + self.gradients
        if sharded == 1:
            return held + self.optimizer + self.halves + self.activations
        return (held + 2 * self.gradients) / sharded + self.gathered + self.activations


@dataclass(frozen=True)
class Passes:
    """Hold a model after a forward and a backward pass, the bytes saved, and the operations."""

    model: GemmaEncoderForSequenceClassification
    saved: int
    operations: int


def run_passes(
    config: GemmaEncoderConfig, batch: Batch, freeze_embeddings: bool, bf16: bool, checkpointing: bool
) -> Passes:
    """Run a forward and a backward pass of tensors without content, with autocast for `bf16`."""
    with FakeTensorMode(allow_non_fake_inputs=True), FlopCounterMode(display=False) as counter:
        model = GemmaEncoderForSequenceClassification(config).train()
        model.get_input_embeddings().requires_grad_(not freeze_embeddings)
        if checkpointing:
            how = {"use_reentrant": False}
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=how)
        saved = SavedTensors(model)
        with saved_tensors_hooks(saved, lambda tensor: tensor), torch.autocast("cpu", enabled=bf16):
            loss = batch.loss(model)
        loss.backward()
    return Passes(model, saved.bytes(), counter.get_total_flops())


def optimizer_bytes(trained: list[nn.Parameter], args: TrainingArguments) -> int:
    """Return the bytes of the optimizer's state after its first step."""
    with FakeTensorMode(allow_non_fake_inputs=True):
        kind, settings = Trainer.get_optimizer_cls_and_kwargs(args)
        optimizer = kind(trained, **settings)
        optimizer.step()
        state = [value for of_one in optimizer.state.values() for value in of_one.values()]
        return sum(value.nbytes for value in state if isinstance(value, torch.Tensor))


def take_step(options: FineTuningArguments, args: TrainingArguments, texts: int, length: int) -> Step:
    """Return the counts of a forward pass, a backward pass and the optimizer's first step."""
    decoder = decoder_config(options.model)
    config = GemmaEncoderConfig(text_config=decoder, **encoder_options(options))
    batch, layers = Batch.make(config, texts, length), config.num_hidden_layers
    passes = run_passes(config, batch, options.freeze_embeddings, args.bf16, checkpointing=False)
    linear = linear_weights(passes.model)
    halves = 2 * linear if args.bf16 else 0
    activations = passes.saved - halves
    if args.gradient_checkpointing:
        # What layers are given, and all of one layer, which is computed again.
        of_one_layer = passes.saved // layers
        passes = run_passes(config, batch, options.freeze_embeddings, args.bf16, checkpointing=True)
        activations = passes.saved + of_one_layer
    model = passes.model
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    embedding = model.get_input_embeddings().weight.numel()
    return Step(
        parameters=model.num_parameters(),
        weights=4 * model.num_parameters(),
        gradients=4 * sum(parameter.numel() for parameter in trained),
        optimizer=optimizer_bytes(trained, args),
        activations=activations,
        halves=halves,
        gathered=8 * (embedding + linear // layers),
        operations=passes.operations,
    )


def linear_weights(model: GemmaEncoderForSequenceClassification) -> int:
    """Return the number of weights of all linear layers within the transformer layers."""
    linear = (part for part in model.model.layers.modules() if isinstance(part, nn.Linear))
    return sum(part.weight.numel() for part in linear)


def estimate(path: Path, gpus: int, tflops: float) -> list[str]:
    """Return the row of a recipe in the table; see `columns`."""
    alone, shared = Recipe.read(path, 1), Recipe.read(path, gpus)
    texts, length = alone.longest_batch()
    step = take_step(alone.options, alone.args, texts, length)
    of_many = take_step(shared.options, shared.args, *shared.longest_batch())
    per_token = step.operations / (texts * length)
    parts = (step.weights + step.gradients, step.optimizer, step.halves, step.activations)
    return [
        alone.name,
        f"{step.parameters / 1e9:.2f}",
        f"{texts} x {length}",
        " + ".join(f"{part / GIB:.0f}" for part in parts) + f" = {step.memory() / GIB:.0f}",
        f"{of_many.memory(gpus) / GIB:.0f}",
        f"{per_token / 1e9:.1f}",
        f"{alone.tokens() / 1e6:,.0f}",
        f"{alone.tokens() * per_token / tflops / 1e12 / 3600:.1f}",
    ]


def columns(gpus: int, tflops: float) -> list[str]:
    """Return the names of the table's columns."""
    return [
        "recipe",
        "billion parameters",
        "longest batch, texts x tokens",
        "one GPU, GiB: weights and gradients + optimizer + autocast's copies + activations",
        f"each of {gpus} by FSDP2 with AdamW, GiB",
        "10^9 operations a token",
        "million tokens a seed",
        f"GPU-hours a seed at {tflops:g} TFLOP/s",
    ]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", type=Path, nargs="+")
    parser.add_argument("--tflops", type=float, default=300, help="The rate of a GPU, in 10^12 operations a second.")
    parser.add_argument("--gpus", type=int, default=8, help="The GPUs that share the state by FSDP2.")
    options = parser.parse_args()
    if options.tflops <= 0 or options.gpus < 2:
        got = f"got {options.tflops:g} and {options.gpus}"
        fail(parser, f"--tflops must be above 0 and --gpus at least 2; {got}.")
    names = columns(options.gpus, options.tflops)
    print(f"| {' | '.join(names)} |\n| --- |{' ---: |' * (len(names) - 1)}")
    for path in options.recipes:
        with failing(parser):
            print(f"| {' | '.join(estimate(path, options.gpus, options.tflops))} |", flush=True)


if __name__ == "__main__":
    main()
