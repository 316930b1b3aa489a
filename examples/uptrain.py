r"""Up-train a Gemma decoder as a bidirectional encoder on plain text, before it is fine-tuned on a
task.

    python examples/uptrain.py --model examples/nano --objective mntp --text docstrings --output_dir runs/nano-mntp
    accelerate launch examples/uptrain.py --model google/gemma-2-2b --objective mlm --mask_rate 0.2 --bf16 \
        --text Salesforce/wikitext:wikitext-103-raw-v1 \
        --validation_text Salesforce/wikitext:wikitext-103-raw-v1:validation \
        --block_size 512 --per_device_train_batch_size 8 --learning_rate 2e-5 --output_dir runs/gemma-2-2b-mlm
    python examples/uptrain.py --model google/gemma-2-2b ... --lora_r 16 --dtype bfloat16 --bf16 --learning_rate 2e-4

Both objectives hide tokens and predict them with the decoder's own head: "mlm" from the hidden
token's own state, "mntp" from the state before it, as the decoder has learned (LLM2Vec, arXiv
2404.05961). The paper does no up-training. The result loads into every head:
`GemmaEncoderForSequenceClassification.from_pretrained("runs/nano-mntp")`.

The defaults are for a few million parameters. Every flag of `TrainingArguments` works. Run the same
command again and it resumes from the last checkpoint.
"""

import copy
import math
import zlib
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import torch
from datasets import Dataset, IterableDataset
from transformers import (
    DataCollatorForLanguageModeling,
    PreTrainedTokenizerBase,
    Trainer,
    TrainerCallback,
    TrainingArguments,
    set_seed,
)
from transformers.integrations import is_deepspeed_zero3_enabled

from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForMaskedLM, verify_attention
from modeling_gemma_encoder._scripts.command_line import YamlScriptParser, failing, interruptible
from modeling_gemma_encoder._scripts.training import (
    READING,
    HelpOfReading,
    checkpoint_to_resume,
    defaults_of,
    leave_report,
    plot_losses,
    refuse_another_run,
    replacing_weights,
    resumable,
    rows_per_step,
    say_how_long,
    set_steps,
    train_from,
    under_fsdp,
)
from modeling_gemma_encoder.adapter_gemma_encoder import find_adapter
from modeling_gemma_encoder.adapters import add_lora_alone
from modeling_gemma_encoder.callbacks import KeepMemory, StepTimer
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.configuration_gemma_encoder import Attention, MaskedLMObjective
from modeling_gemma_encoder.finetuning.model import refuse_training
from modeling_gemma_encoder.pretraining.blocks import load_blocks
from modeling_gemma_encoder.pretraining.corpus import TextArguments, load_documents


@dataclass(kw_only=True)
class UptrainingArguments(TextArguments):
    """Hold what is up-trained, and how tokens are hidden."""

    model: str = field(metadata={"help": "A Gemma checkpoint, raw or up-trained."})
    objective: MaskedLMObjective = field(
        default="mlm", metadata={"help": "Masked LM, or masked next-token prediction."}
    )
    mask_rate: float = field(default=0.2, metadata={"help": "Share of the tokens that are predicted."})
    mask_replace_prob: float = field(default=0.8, metadata={"help": "Share of those that become the mask token."})
    random_replace_prob: float = field(default=0.1, metadata={"help": "Share of those that become a random token."})
    mask_token: str | None = field(
        default=None, metadata={"help": 'Where the tokenizer has none: a token to use, as LLM2Vec uses "_".'}
    )
    attention: Attention = "bidirectional"
    dropout: float = field(
        default=0.0, metadata={"help": "While up-training; the checkpoint's config asks for the paper's 0.1 again."}
    )
    attn_implementation: str | None = field(
        default=None, metadata={"help": "Computes attention, see docs/options.md; default: gemma_encoder_unpadded."}
    )
    lora_r: int | None = field(
        default=None, metadata={"help": "Train adapters of this rank, which are merged into what is saved."}
    )
    lora_alpha: int | None = field(default=None, metadata={"help": "Default: twice the rank."})
    lora_dropout: float = field(default=0.05, metadata={"help": "On what enters an adapter."})
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Of the weights; bfloat16 only where adapters are trained."}
    )
    save_dtype: Literal["bfloat16", "float32"] | None = field(
        default=None, metadata={"help": "Default: bfloat16, and float32 with --lora_r: bf16 loses small updates."}
    )

    def validate(self) -> None:
        """Raise ValueError where flags contradict each other, or the model is an adapter."""
        super().validate()
        if not 0 < self.mask_rate < 1:
            raise ValueError(f"--mask_rate must be between 0 and 1; got {self.mask_rate}.")
        if self.mask_replace_prob + self.random_replace_prob > 1:
            raise ValueError(
                "--mask_replace_prob and --random_replace_prob must add up to at most 1; got "
                f"{self.mask_replace_prob} and {self.random_replace_prob}."
            )
        if self.dtype == "bfloat16" and self.lora_r is None:
            raise ValueError(
                "--dtype bfloat16 needs --lora_r, because bf16 weights lose small updates. Use --bf16 instead."
            )
        if self.lora_r is None and self.lora_alpha is not None:
            raise ValueError("--lora_alpha needs --lora_r.")
        if self.lora_r is not None and self.lora_r < 1:
            raise ValueError(f"--lora_r must be at least 1; got {self.lora_r}.")
        if find_adapter(self.model, {}):
            raise ValueError(
                f"--model {self.model} is an adapter, which is not trained further. Merge it, see docs/adapters.md."
            )


# 1. Masking


class Masking(TrainerCallback):
    """Mask blocks as upstream does, but so that what is hidden depends on the seed, the epoch and
    the block alone.

    Then neither the batch size nor an interruption changes it. The Trainer draws a batch before it
    needs it, so that a checkpoint does not hold the global random state of that time. Rows that
    have `labels` are masked already.
    """

    def __init__(self, tokenizer, vocab_size: int, seed: int, **options):
        self.masking = DataCollatorForLanguageModeling(tokenizer, **options)
        self.vocab_size, self.seed, self.epoch = vocab_size, seed, 0

    def on_train_begin(self, args, state, control, **kwargs):
        self.epoch = int(state.epoch or 0) - 1

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.epoch += 1

    def mask(self, row: dict) -> dict[str, torch.Tensor]:
        """Return `input_ids` and `labels`, (1, block_size) each, for a row's block."""
        block = np.asarray(row["input_ids"], dtype=np.int32)
        state = np.random.SeedSequence([self.seed, self.epoch, zlib.crc32(block.tobytes())]).generate_state(1)
        self.masking.generator = torch.Generator().manual_seed(int(state[0]))
        masked = self.masking([{"input_ids": block.tolist()}])
        # A tokenizer may have a token more than its model, which upstream may draw at random.
        beyond = masked["input_ids"] >= self.vocab_size
        masked["input_ids"][beyond] = self.masking.tokenizer.mask_token_id
        return masked

    def __call__(self, rows: list[dict]) -> dict[str, torch.Tensor]:
        """Collate rows to `input_ids` and `labels`, (batch, block_size) each."""
        if "labels" in rows[0]:
            return {name: torch.tensor([row[name] for row in rows]) for name in ("input_ids", "labels")}
        masked = [self.mask(row) for row in rows]
        return {name: torch.cat([row[name] for row in masked]) for name in masked[0]}


def mask_with(tokenizer, mask_token: str | None):
    """Return a copy of the tokenizer that masks with `mask_token`.

    It is a copy because the tokenizer that is saved must go on reading texts as before.

    Raises:
        ValueError: There is no such token, or no mask token at all.
    """
    tokenizer = copy.deepcopy(tokenizer)
    if mask_token is not None:
        if mask_token not in tokenizer.get_vocab():
            raise ValueError(
                f"--mask_token {mask_token!r} is not in the tokenizer's vocabulary. Choose one of its tokens."
            )
        tokenizer.mask_token = mask_token
    if tokenizer.mask_token is None:
        raise ValueError(
            "The tokenizer has no mask token. Choose one of its tokens with --mask_token, if possible one that no text "
            "contains, such as Llama 3's '<|reserved_special_token_0|>' or Qwen's '<|fim_pad|>'."
        )
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token  # upstream asks for one, and pads nothing
    return tokenizer


def mask_once(rows, masking: Masking) -> Dataset:
    """Return held-out blocks with `labels`, so that every evaluation hides the same tokens."""
    masked = [{name: values[0].tolist() for name, values in masking.mask(row).items()} for row in rows]
    return Dataset.from_list([{name: row[name] for name in ("input_ids", "labels")} for row in masked])


# 2. The encoder


@dataclass(frozen=True)
class Encoder:
    """Hold the model, and `trained`: the model itself, or the adapters around it."""

    model: GemmaEncoderForMaskedLM
    trained: torch.nn.Module

    @property
    def has_adapters(self) -> bool:
        return self.trained is not self.model


def make_encoder(options: UptrainingArguments, args: TrainingArguments, checkpoint: str | None) -> Encoder:
    """Return the encoder that is trained, with adapters around it where they are asked for.

    Raises:
        ValueError: What is to compute attention cannot train here.
    """
    with replacing_weights(checkpoint):
        model = GemmaEncoderForMaskedLM.from_pretrained(
            options.model,
            attention=options.attention,
            masked_lm_objective=options.objective,
            attention_dropout=options.dropout,
            feedforward_dropout=options.dropout,
            attn_implementation=options.attn_implementation,
            dtype=getattr(torch, options.dtype),
        )
    softcap = getattr(model.config.text_config, "attn_logit_softcapping", None)
    refuse_training(options.attn_implementation, options.dropout, softcap, args)
    verify_attention(model)
    # The layers have their dropout now. What is saved, checkpoints too, asks fine-tuning for the
    # paper's again.
    defaults = GemmaEncoderConfig()
    model.config.attention_dropout = defaults.attention_dropout
    model.config.feedforward_dropout = defaults.feedforward_dropout
    if options.lora_r is None:
        return Encoder(model, model)
    return Encoder(model, add_lora_alone(model, options.lora_r, options.lora_alpha, options.lora_dropout))


def save_dtype(options: UptrainingArguments) -> torch.dtype:
    """Return the dtype of the saved weights."""
    return getattr(torch, options.save_dtype or ("bfloat16" if options.lora_r is None else "float32"))


def round_weights(encoder: Encoder, dtype: torch.dtype) -> None:
    """Merge adapters and round all weights to `dtype`, so that the perplexity after it is that of
    the saved weights."""
    if encoder.has_adapters:
        encoder.model.float()  # or the sum is rounded once more
        encoder.trained.merge_adapter()
    with torch.no_grad():
        for parameter in encoder.model.parameters():
            parameter.copy_(parameter.to(dtype))


def save(trainer: Trainer, encoder: Encoder, dtype: torch.dtype) -> None:
    """Save the encoder without adapters, which are merged into its weights already."""
    model = encoder.model
    if encoder.has_adapters:
        model = trainer.model = encoder.trained.unload()
    model.to(dtype)
    trainer.save_model(trainer.args.output_dir)


# 3. Training


@dataclass(frozen=True)
class Uptraining:
    """Hold what is trained on what, checked, and the checkpoint to resume from."""

    encoder: Encoder
    tokenizer: PreTrainedTokenizerBase
    masking: Masking
    train: Dataset | IterableDataset
    held_out: dict[str, Dataset]
    checkpoint: str | None


def prepare(options: UptrainingArguments, args: TrainingArguments) -> Uptraining:
    """Return what is trained.

    Raises:
        ValueError: Flags contradict each other, or the folder holds another run.
    """
    options.validate()
    if options.lora_r is not None and (under_fsdp(args) or is_deepspeed_zero3_enabled()):
        raise ValueError(
            "--lora_r merges adapters into whole weights, which FSDP and DeepSpeed ZeRO-3 hold in pieces. Train "
            "without them."
        )
    tokenizer = load_tokenizer(options.model)
    masks = mask_with(tokenizer, options.mask_token)
    set_seed(args.seed)
    checkpoint = checkpoint_to_resume(args)
    run = {**asdict(options), "seed": args.seed, "batch_size": rows_per_step(args)}
    refuse_another_run(run, Path(args.output_dir), checkpoint, args.process_index == 0, defaults_of(options))
    encoder = make_encoder(options, args, checkpoint)
    masking = Masking(
        masks,
        encoder.model.config.vocab_size,
        args.seed,
        mlm_probability=options.mask_rate,
        mask_replace_prob=options.mask_replace_prob,
        random_replace_prob=options.random_replace_prob,
    )
    with args.main_process_first():
        train, held_out = load_blocks(*load_documents(options, args.seed), tokenizer, options, args.seed)
        held_out = {name: mask_once(rows, masking) for name, rows in held_out.items()}
    return Uptraining(encoder, tokenizer, masking, train, held_out, checkpoint)


def uptrain(parser: YamlScriptParser, options: UptrainingArguments, args: TrainingArguments) -> None:
    """Up-train, save and report, as the command line says."""
    with failing(parser):
        found = prepare(options, args)
        if args.process_index == 0:
            say_how_long(args, found.train, options.block_size)
    timer = StepTimer()
    trainer = Trainer(
        found.encoder.trained,
        args,
        train_dataset=found.train,
        eval_dataset=found.held_out,
        data_collator=found.masking,
        processing_class=found.tokenizer,
        callbacks=[found.masking, timer, KeepMemory()],
    )
    before = perplexities(trainer, found.held_out)
    train_from(trainer, found.checkpoint)
    verify_attention(found.encoder.model)
    dtype = save_dtype(options)
    round_weights(found.encoder, dtype)
    after = perplexities(trainer, found.held_out)
    save(trainer, found.encoder, dtype)
    if args.process_index == 0:
        changes = {name: {"before": before[name], "after": after[name]} for name in found.held_out}
        report(trainer, timer, options, changes)


def perplexities(trainer: Trainer, held_out: dict) -> dict[str, float]:
    """Return the perplexity of the hidden tokens of each held-out text."""
    metrics = trainer.evaluate()
    return {name: math.exp(metrics[f"eval_{name}_loss"]) for name in held_out}


def report(trainer: Trainer, timer: StepTimer, options: UptrainingArguments, changes: dict) -> None:
    """Write `results.json` and `training_log.json`, plot the losses, and print the perplexities.

    Args:
        changes: Held-out text -> its perplexity `before` and `after`.
    """
    folder = Path(trainer.args.output_dir)
    start = {f"eval_{name}_loss": math.log(change["before"]) for name, change in changes.items()}
    history = [{"step": 0, "num_input_tokens_seen": 0, **start}, *trainer.state.log_history]
    leave_report(trainer, timer, options, {"masked_perplexity": changes}, history)
    plot_losses(history, list(changes), folder / "training.png")
    print("\n| perplexity of hidden tokens | before | after |\n| --- | ---: | ---: |")
    for name, change in changes.items():
        print(f"| {name} | {change['before']:.1f} | {change['after']:.1f} |")
    print(f"\nEncoder, results.json, training_log.json and training.png are in {folder}")


@interruptible()
def main():
    parser = YamlScriptParser((UptrainingArguments, TrainingArguments), __doc__, HelpOfReading)
    parser.set_defaults(  # our choice, for a few million parameters; every one is a flag
        output_dir="runs/uptrain",
        learning_rate=5e-4,
        warmup_steps=0.05,
        weight_decay=0.01,
        **READING,
    )
    set_steps(parser)
    options, args = parser.parse_args_into_dataclasses()
    with resumable(args):
        uptrain(parser, options, args)


if __name__ == "__main__":
    main()
