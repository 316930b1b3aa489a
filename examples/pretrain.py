"""Pretrains a Gemma decoder as a causal language model, from a config or further from a checkpoint.

How this folder's `nano/` was made, from books, one a row, and the documentation of what is installed:

    python examples/pretrain.py --config examples/nano/config.json \\
        --text gutenberg/train.parquet docstrings --validation_text gutenberg/validation.parquet docstrings \\
        --join_lines --output_dir runs/nano --max_steps 3000 --save_steps 250 --learning_rate 2e-3 \\
        --bf16 --torch_compile

Other sizes and data, several GPUs, and a checkpoint trained further on text of its own field:

    accelerate launch examples/pretrain.py --config google/gemma-3-270m --tokenizer google/gemma-3-270m \\
        --text HuggingFaceFW/fineweb-edu:sample-10BT \\
        --validation_text Salesforce/wikitext:wikitext-103-raw-v1:validation \\
        --streaming --block_size 2048 --per_device_train_batch_size 4 --gradient_accumulation_steps 8 \\
        --learning_rate 5e-4 --max_steps 20000 --bf16 --output_dir runs/gemma-3-270m
    python examples/pretrain.py --model google/gemma-2-2b --text notes/ --learning_rate 2e-5 \\
        --per_device_train_batch_size 4 --gradient_accumulation_steps 8 --bf16 --output_dir runs/notes

The defaults, --learning_rate and batch above all, are for a few million parameters. All weights are trained, in fp32.
Every flag of `TrainingArguments` works. Run the same command again and it resumes from the last checkpoint of
`--output_dir`. It leaves a bf16 checkpoint that plain `AutoModelForCausalLM` loads, `results.json` (perplexity on
held-out text beside a unigram and a trigram model's), `training_log.json` and `training.png`.
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
    Trainer,
    TrainingArguments,
    set_seed,
)

from modeling_gemma_encoder._scripts.command_line import ScriptParser, fail, failing, interruptible
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
from modeling_gemma_encoder.callbacks import StepTimer
from modeling_gemma_encoder.checkpoints import load_tokenizer, load_upstream
from modeling_gemma_encoder.pretraining.blocks import collate_blocks, load_blocks, mix, sample
from modeling_gemma_encoder.pretraining.corpus import TextArguments, join_lines, load_documents
from modeling_gemma_encoder.pretraining.ngrams import NGramModel, perplexity

FAMILIES = ("gemma", "gemma2", "gemma3_text")


@dataclass
class PretrainingArguments(TextArguments):
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

    def problem(self) -> str | None:
        """What cannot be, in the words of the command line."""
        if (self.config is None) == (self.model is None):
            return "give either --config, for random weights, or --model, to train a checkpoint further"
        return super().problem()


# 1. The tokenizer


def documents(rows: Dataset | IterableDataset, join: bool, limit: int) -> Iterator[str]:
    """Documents until `limit` characters are read."""
    for row in rows:
        text = row["text"] or ""
        yield join_lines(text) if join else text
        limit -= len(text)
        if limit < 0:
            break


def train_tokenizer(texts, vocab_size: int, block_size: int) -> GemmaTokenizer:
    """A Gemma tokenizer (BPE with byte fallback) whose tokens stay within words, numbers or punctuation."""
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


def make_tokenizer(options: PretrainingArguments, texts: dict, folder: Path, made: bool, args: TrainingArguments):
    """The tokenizer that was named, or that this run has made already, or a new one; saved with the decoder."""
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


def make_decoder(options: PretrainingArguments, tokenizer):
    form = {"dtype": torch.float32, "attn_implementation": options.attn_implementation}
    if options.model:
        return load_upstream(AutoModelForCausalLM, options.model, **form)
    config = AutoConfig.from_pretrained(options.config, trust_remote_code=False).get_text_config()
    if config.model_type not in FAMILIES:
        raise ValueError(
            f"--config {options.config}: model_type {config.model_type!r} is not of {', '.join(FAMILIES)}."
        )
    config.vocab_size = max(config.vocab_size, len(tokenizer))  # Gemma 3's text models lack their tokenizer's last one
    for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
        setattr(config, name, getattr(tokenizer, name))
    return AutoModelForCausalLM.from_config(config, **form)


def save_decoder(trainer: Trainer, dtype: torch.dtype) -> None:
    """The whole decoder, gathered wherever its parts are, as a stranger's `from_pretrained` expects it."""
    state = trainer.accelerator.get_state_dict(trainer.model_wrapped if trainer.is_deepspeed_enabled else trainer.model)
    if trainer.is_world_process_zero():
        config = copy.deepcopy(trainer.accelerator.unwrap_model(trainer.model).config)
        config.use_cache = True  # the Trainer turned it off; readers generate
        decoder = AutoModelForCausalLM.from_config(config, dtype=dtype)
        decoder.load_state_dict(state)
        decoder.save_pretrained(trainer.args.output_dir)


def ngram_perplexities(train, held_out: dict, vocab_size: int, limit: int) -> dict[str, dict[str, float]]:
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


def pretrain(parser, options, args):
    """Everything, as the command line says."""
    if problem := options.problem():
        fail(parser, problem)
    with failing(parser):
        set_seed(args.seed)
        folder, is_main = Path(args.output_dir), args.process_index == 0
        checkpoint, batch_size = checkpoint_to_resume(args), rows_per_step(args)
        run = {**asdict(options), "seed": args.seed, "batch_size": batch_size}
        refuse_another_run(run, folder, checkpoint, is_main, defaults_of(options))

        with args.main_process_first():
            texts, held_out = load_documents(options, args.seed)
            tokenizer = make_tokenizer(
                options, texts, folder, made=checkpoint or args.local_process_index > 0, args=args
            )
            train, held_out = load_blocks(texts, held_out, tokenizer, options, args.seed)
        decoder = make_decoder(options, tokenizer)
    parameters = decoder.num_parameters()
    beside = parameters - decoder.get_input_embeddings().weight.numel()
    if is_main:
        say_how_long(args, train, options.block_size)
        print(f"{parameters:,} parameters, {beside:,} of them beside the embedding", flush=True)
    timer = StepTimer()
    trainer = Trainer(
        decoder,
        args,
        train_dataset=train,
        eval_dataset=held_out,
        data_collator=collate_blocks,
        processing_class=tokenizer,
        callbacks=[timer],
    )
    train_from(trainer, checkpoint)

    # Held-out perplexity is that of the weights as they are saved.
    dtype = getattr(torch, options.save_dtype)
    with torch.no_grad():
        for parameter in decoder.parameters():
            parameter.copy_(parameter.to(dtype))
    metrics = trainer.evaluate()
    save_decoder(trainer, dtype)
    if not trainer.is_world_process_zero():
        return
    perplexities = {name: {"decoder": math.exp(metrics[f"eval_{name}_loss"])} for name in held_out}
    if options.ngram_tokens:
        print("Counting n-grams", flush=True)
        for name, values in ngram_perplexities(train, held_out, len(tokenizer), options.ngram_tokens).items():
            perplexities[name] |= values
    report = {"perplexity": perplexities, "parameters": parameters, "parameters_beside_embedding": beside}
    leave_report(trainer, timer, options, {**report, "blocks": None if options.streaming else len(train)})
    levels = {
        name: {model: math.log(value) for model, value in values.items() if model != "decoder"}
        for name, values in perplexities.items()
    }
    plot_losses(trainer.state.log_history, list(held_out), folder / "training.png", levels)
    models = list(next(iter(perplexities.values())))
    print(f"\n| perplexity a token | {' | '.join(models)} |\n| --- |{' ---: |' * len(models)}")
    for name, values in perplexities.items():
        print(f"| {name} | {' | '.join(f'{value:.1f}' for value in values.values())} |")
    print(f"\nDecoder, results.json, training_log.json and training.png are in {folder}")


if __name__ == "__main__":
    main()
