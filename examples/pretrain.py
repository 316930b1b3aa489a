r"""Pretrain a Gemma decoder as a causal language model, from a config or further from a checkpoint.

This command made `nano/` in this folder, from books, one in each row, and from the documentation of
installed packages:

    python examples/pretrain.py --config examples/nano/config.json \
        --text gutenberg/train.parquet docstrings --validation_text gutenberg/validation.parquet docstrings \
        --join_lines --output_dir runs/nano --max_steps 3000 --save_steps 250 --learning_rate 2e-3 \
        --bf16 --torch_compile

Other sizes and data, several GPUs, and a checkpoint trained further on text of its own field:

    accelerate launch examples/pretrain.py --config google/gemma-3-270m --tokenizer google/gemma-3-270m \
        --text HuggingFaceFW/fineweb-edu:sample-10BT \
        --validation_text Salesforce/wikitext:wikitext-103-raw-v1:validation \
        --streaming --block_size 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \
        --learning_rate 5e-4 --max_steps 20000 --bf16 --output_dir runs/gemma-3-270m
    python examples/pretrain.py --model google/gemma-2-2b --text notes/ --learning_rate 2e-5 \
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --bf16 --output_dir runs/notes

The defaults are for a few million parameters: change --learning_rate and the batch size for larger
decoders. All weights are trained in fp32. Every flag of `TrainingArguments` works. Run the same
command again and it resumes from the last checkpoint of `--output_dir`. It leaves a bf16 checkpoint
that plain `AutoModelForCausalLM` loads, `results.json` (perplexity on held-out text beside those of
a unigram and a trigram model), `training_log.json` and `training.png`.
"""

import copy
import json
import math
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder._scripts.command_line import ScriptParser, failing, interruptible
from modeling_gemma_encoder._scripts.training import (
    READING,
    HelpOfReading,
    checkpoint_to_resume,
    defaults_of,
    leave_report,
    plot_losses,
    refuse_another_run,
    resumable,
    rows_per_step,
    say_how_long,
    set_steps,
    train_from,
)
from modeling_gemma_encoder.callbacks import KeepMemory, StepTimer
from modeling_gemma_encoder.checkpoints import load_tokenizer, load_upstream
from modeling_gemma_encoder.pretraining.blocks import collate_blocks, load_blocks, mix, sample
from modeling_gemma_encoder.pretraining.corpus import TextArguments, join_lines, load_documents
from modeling_gemma_encoder.pretraining.ngrams import NGramModel, perplexity

FAMILIES = ("gemma", "gemma2", "gemma3_text")


@dataclass
class PretrainingArguments(TextArguments):
    """Hold which decoder is pretrained, on which text."""

    config: str | None = field(
        default=None, metadata={"help": "A Gemma 1, 2 or 3 config, from which a decoder with random weights is made."}
    )
    model: str | None = field(default=None, metadata={"help": "Or a checkpoint, which is trained further."})
    tokenizer: str | None = field(
        default=None,
        metadata={"help": "Default: that of --model; with --config, one trained here to the config's `vocab_size`."},
    )
    ngram_tokens: int = field(
        default=100_000_000, metadata={"help": "Tokens that the n-gram baselines count, at most; 0 for no baselines."}
    )
    attn_implementation: str | None = None
    save_dtype: Literal["bfloat16", "float32"] = "bfloat16"

    def validate(self) -> None:
        """Raise ValueError where flags contradict each other."""
        super().validate()
        if (self.config is None) == (self.model is None):
            raise ValueError("Give either --config, for random weights, or --model, to train a checkpoint further.")


# 1. The tokenizer


def documents(rows: Dataset | IterableDataset, join: bool, limit: int) -> Iterator[str]:
    """Yield documents until `limit` characters are read."""
    for row in rows:
        text = row["text"] or ""
        yield join_lines(text) if join else text
        limit -= len(text)
        if limit < 0:
            break


def train_tokenizer(texts, vocab_size: int, block_size: int) -> GemmaTokenizer:
    """Train a Gemma tokenizer (BPE with byte fallback) whose tokens stay within words, numbers or
    punctuation."""
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>", *(f"<0x{byte:02X}>" for byte in range(256))]
    words = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    pattern = Regex(r"▁?[\p{L}\p{M}]+|\p{N}|▁?[^\p{L}\p{M}\p{N}▁\n]+|\n+|▁+")
    words.pre_tokenizer = pre_tokenizers.Split(pattern, "isolated")
    trainer = trainers.BpeTrainer(vocab_size=vocab_size, special_tokens=special, limit_alphabet=512)
    words.train_from_iterator(texts, trainer)
    trained = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    return GemmaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True, model_max_length=block_size)


def make_tokenizer(options: PretrainingArguments, texts: dict, made: bool, args: TrainingArguments):
    """Return the tokenizer that was named, or that this run has made already, or a new one, and
    save it.

    Args:
        made: Whether this run has made one already.
    """
    folder = Path(args.output_dir)
    if named := options.tokenizer or options.model:
        tokenizer = load_tokenizer(named)
    elif made:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    else:
        print("Training a tokenizer", flush=True)
        vocab_size = AutoConfig.from_pretrained(options.config, trust_remote_code=False).get_text_config().vocab_size
        mixed = mix(list(texts.values()), args.seed).shuffle(seed=args.seed)
        words = documents(mixed, options.join_lines, limit=50_000_000)
        tokenizer = train_tokenizer(words, vocab_size, options.block_size)
    if args.local_process_index == 0:
        tokenizer.save_pretrained(folder)
    return tokenizer


# 2. The decoder


def make_decoder(options: PretrainingArguments, tokenizer) -> PreTrainedModel:
    """Return the decoder that is trained, from a checkpoint or with random weights.

    Raises:
        ValueError: The config is not one of Gemma 1, 2 or 3.
    """
    form = {"dtype": torch.float32, "attn_implementation": options.attn_implementation}
    if options.model:
        return load_upstream(AutoModelForCausalLM, options.model, **form)
    config = AutoConfig.from_pretrained(options.config, trust_remote_code=False).get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--config {options.config}: model_type must be one of {', '.join(FAMILIES)}; got {config.model_type!r}."
        )
    config.vocab_size = max(config.vocab_size, len(tokenizer))  # Gemma 3's text models lack their tokenizer's last one
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return AutoModelForCausalLM.from_config(config, **form)


def save_decoder(trainer: Trainer, dtype: torch.dtype) -> None:
    """Save the whole decoder as `from_pretrained` expects it, gathered from all devices that hold
    parts of it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    if trainer.is_world_process_zero():
        config = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model).config)
        config.use_cache = True  # the Trainer turned it off; readers generate
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype)
        decoder.load_state_dict(state)
        decoder.save_pretrained(trainer.args.output_dir)


def ngram_perplexities(train, held_out: dict, vocab_size: int, limit: int) -> dict[str, dict[str, float]]:
    """Return the perplexities of a unigram and a trigram model on each held-out text.

    Args:
        limit: How many tokens of `train` are counted, at most.
    """
    counted, blocks = 0, []
    train = sample(train, limit // len(next(iter(train))["input_ids"]), seed=0)
    for rows in train.with_format("numpy").iter(batch_size=1000):
        blocks.append(np.stack(list(rows["input_ids"])).astype(np.int32))
        counted += blocks[-1].size
        if counted >= limit:
            break
    model = NGramModel(np.concatenate(blocks), vocab_size)
    results = {}
    for name, rows in held_out.items():
        blocks = np.array([row["input_ids"] for row in rows])
        unigram, trigram = model.unigram_probabilities(blocks), model.trigram_probabilities(blocks)
        results[name] = {"unigram": perplexity(unigram), "trigram": perplexity(trigram)}
    return results


# 3. Training


@dataclass(frozen=True)
class Pretraining:
    """Hold what is trained on what, checked, and the checkpoint to resume from."""

    decoder: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    train: Dataset | IterableDataset
    held_out: dict[str, Dataset | IterableDataset]
    checkpoint: str | None

    @property
    def parameters(self) -> int:
        return self.decoder.num_parameters()

    @property
    def parameters_beside_embedding(self) -> int:
        return self.parameters - self.decoder.get_input_embeddings().weight.numel()


def prepare(options: PretrainingArguments, args: TrainingArguments) -> Pretraining:
    """Return what is trained.

    Raises:
        ValueError: Flags contradict each other, or the folder holds another run.
    """
    options.validate()
    set_seed(args.seed)
    checkpoint = checkpoint_to_resume(args)
    run = {**asdict(options), "seed": args.seed, "batch_size": rows_per_step(args)}
    refuse_another_run(run, Path(args.output_dir), checkpoint, args.process_index == 0, defaults_of(options))
    with args.main_process_first():
        texts, held_out = load_documents(options, args.seed)
        # The first process of a machine makes the tokenizer, which the others read.
        made = checkpoint is not None or args.local_process_index > 0
        tokenizer = make_tokenizer(options, texts, made, args)
        train, held_out = load_blocks(texts, held_out, tokenizer, options, args.seed)
    return Pretraining(make_decoder(options, tokenizer), tokenizer, train, held_out, checkpoint)


def pretrain(parser: ScriptParser, options: PretrainingArguments, args: TrainingArguments) -> None:
    """Pretrain, save and report, as the command line says."""
    with failing(parser):
        found = prepare(options, args)
        if args.process_index == 0:
            say_how_long(args, found.train, options.block_size)
        beside = found.parameters_beside_embedding
        print(f"{found.parameters:,} parameters, {beside:,} of them beside the embedding", flush=True)
    timer = StepTimer()
    trainer = Trainer(
        found.decoder,
        args,
        train_dataset=found.train,
        eval_dataset=found.held_out,
        data_collator=collate_blocks,
        processing_class=found.tokenizer,
        callbacks=[timer, KeepMemory()],
    )
    train_from(trainer, found.checkpoint)

    # Held-out perplexity is that of the weights as they are saved.
    dtype = getattr(torch, options.save_dtype)
    with torch.no_grad():
        for parameter in found.decoder.parameters():
            parameter.copy_(parameter.to(dtype))
    metrics = trainer.evaluate()
    save_decoder(trainer, dtype)
    if trainer.is_world_process_zero():
        report(trainer, timer, options, found, measure(options, found, metrics))


def measure(options: PretrainingArguments, found: Pretraining, metrics: dict[str, float]) -> dict:
    """Return held-out text -> perplexities of the decoder and, where they are counted, of n-gram
    models."""
    perplexities = {name: {"decoder": math.exp(metrics[f"eval_{name}_loss"])} for name in found.held_out}
    if options.ngram_tokens:
        print("Counting n-grams", flush=True)
        counted = ngram_perplexities(found.train, found.held_out, len(found.tokenizer), options.ngram_tokens)
        for name, values in counted.items():
            perplexities[name] |= values
    return perplexities


def report(
    trainer: Trainer, timer: StepTimer, options: PretrainingArguments, found: Pretraining, perplexities: dict
) -> None:
    """Write `results.json` and `training_log.json`, plot the losses, and print the perplexities."""
    folder = Path(trainer.args.output_dir)
    facts = {
        "perplexity": perplexities,
        "parameters": found.parameters,
        "parameters_beside_embedding": found.parameters_beside_embedding,
        "blocks": None if options.streaming else len(found.train),
    }
    leave_report(trainer, timer, options, facts)
    levels = {
        name: {model: math.log(value) for model, value in values.items() if model != "decoder"}
        for name, values in perplexities.items()
    }
    plot_losses(trainer.state.log_history, list(found.held_out), folder / "training.png", levels)
    models = list(next(iter(perplexities.values())))
    print(f"\n| perplexity a token | {' | '.join(models)} |\n| --- |{' ---: |' * len(models)}")
    for name, values in perplexities.items():
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values.values())} |")
    print(f"\nDecoder, results.json, training_log.json and training.png are in {folder}")


@interruptible()
def main():
    parser = ScriptParser((PretrainingArguments, TrainingArguments), __doc__, HelpOfReading)
    parser.set_defaults(  # our choice, for a few million parameters; every one is a flag
        output_dir="runs/pretrain",
        learning_rate=1e-3,
        warmup_steps=0.02,
        weight_decay=0.1,
        adam_beta2=0.95,
        **READING,
    )
    set_steps(parser)
    options, args = parser.parse_args_into_dataclasses()
    with resumable(args):
        pretrain(parser, options, args)


if __name__ == "__main__":
    main()
