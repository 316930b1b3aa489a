"""Laws of up-training's script: what it leaves fine-tunes like any checkpoint, and survives interruption."""

import json
import shutil
import sys
from pathlib import Path

import pytest
import torch
import uptrain
from datasets import Dataset
from helpers import NANO, ROOT
from safetensors.torch import load_file
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer, TrainingArguments

from modeling_gemma_encoder import GemmaEncoderForMaskedLM, GemmaEncoderForSequenceClassification
from modeling_gemma_encoder._scripts.command_line import ScriptParser
from modeling_gemma_encoder._scripts.training import READING, say_how_long, set_steps
from modeling_gemma_encoder.adapters import TARGET_MODULES, add_lora
from modeling_gemma_encoder.hub.run_record import read_run_record


@pytest.fixture
def run(tmp_path, monkeypatch):
    """Up-trains the nano decoder on this repository's own prose."""
    text = tmp_path / "text.txt"
    text.write_text((ROOT / "README.md").read_text())
    held_out = tmp_path / "held_out.txt"
    held_out.write_text(text.read_text()[:2000])

    def run(*flags: str) -> Path:
        folder = tmp_path / "encoder"
        command = ["uptrain.py", "--model", str(NANO), "--text", str(text), "--validation_text", str(held_out)]
        command += ["--output_dir", str(folder), "--block_size", "32", "--max_steps", "6", "--save_steps", "3"]
        command += ["--per_device_train_batch_size", "8", "--disable_tqdm", "true", "--learning_rate", "1e-3"]
        monkeypatch.setattr(sys, "argv", [*command, *flags])
        uptrain.main()
        return folder

    return run


@pytest.mark.parametrize("objective", ["mlm", "mntp"])
def test_an_up_trained_encoder_predicts_better_and_loads_into_a_head(objective, run):
    folder = run("--objective", objective)
    report = json.loads((folder / "results.json").read_text())
    assert report["masked_perplexity"]["held_out"]["after"] < report["masked_perplexity"]["held_out"]["before"]
    model = AutoModelForMaskedLM.from_pretrained(folder)
    assert model.config.masked_lm_objective == objective and model.dtype == torch.bfloat16
    classifier, info = AutoModelForSequenceClassification.from_pretrained(folder, output_loading_info=True)
    assert {name.split(".")[0] for name in info["missing_keys"]} == {"classifier"} and not info["unexpected_keys"]
    assert classifier.config.attention_dropout == classifier.config.feedforward_dropout == 0.1
    assert torch.equal(classifier.model.norm.weight, model.model.norm.weight)
    assert AutoTokenizer.from_pretrained(folder).mask_token == "<mask>"


def test_adapters_are_merged_into_what_is_saved(run):
    """Only the decoder's linear layers change, by an update of the rank asked for."""
    folder = run("--lora_r", "2", "--dtype", "bfloat16", "--gradient_checkpointing")
    report = json.loads((folder / "results.json").read_text())
    before, after = report["masked_perplexity"]["held_out"].values()
    assert after < before
    assert (folder / "checkpoint-6" / "adapter_model.safetensors").exists()
    assert not [*folder.glob("adapter_config*"), *folder.glob("adapter_model*")]
    start = GemmaEncoderForMaskedLM.from_pretrained(NANO, dtype=torch.bfloat16).state_dict()
    saved = GemmaEncoderForMaskedLM.from_pretrained(folder, dtype=torch.float32)
    adapter = load_file(folder / "checkpoint-6" / "adapter_model.safetensors")
    changed = set()
    for name, weight in saved.state_dict().items():
        update = weight - start[name].float()
        if (factor := f"base_model.model.{name.removesuffix('.weight')}.lora_B.weight") in adapter:
            expected = 2 * adapter[factor] @ adapter[factor.replace("lora_B", "lora_A")]  # alpha / r is 2
            torch.testing.assert_close(update, expected, rtol=1e-4, atol=1e-6)
            changed.add(name.split(".")[-2])
        else:
            assert not update.any()
    assert changed == set(TARGET_MODULES)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float32)
    assert torch.equal(
        classifier.model.layers[0].self_attn.q_proj.weight, saved.model.layers[0].self_attn.q_proj.weight
    )


@pytest.mark.parametrize("flags", [[], ["--lora_r", "2"]])
def test_an_interrupted_run_ends_with_the_same_weights(run, flags):
    folder = run("--dropout", "0.1", *flags)
    whole = load_file(folder / "model.safetensors")
    shutil.rmtree(folder / "checkpoint-6")
    (folder / "model.safetensors").unlink()
    resumed = load_file(run("--dropout", "0.1", *flags) / "model.safetensors")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_masks_depend_on_the_block_and_the_epoch_alone(nano_tokenizer):
    options = {"mlm_probability": 0.3, "mask_replace_prob": 0.8, "random_replace_prob": 0.1}
    masking = uptrain.Masking(nano_tokenizer, 8192, 1, **options)
    blocks = [{"input_ids": [2, *row]} for row in torch.randint(300, 8000, (50, 63)).tolist()]
    together = masking(blocks)
    alone = [masking([block]) for block in reversed(blocks)][::-1]
    for name, values in together.items():
        assert values.shape == (50, 64)
        assert torch.equal(values, torch.cat([row[name] for row in alone]))
    hidden, original = together["labels"] != -100, torch.tensor([block["input_ids"] for block in blocks])
    assert torch.equal(together["labels"][hidden], original[hidden]) and not hidden[:, 0].any()
    assert torch.equal(together["input_ids"][~hidden], original[~hidden])
    assert hidden[:, 1:].float().mean().item() == pytest.approx(0.3, abs=0.03)
    replaced = (together["input_ids"] == nano_tokenizer.mask_token_id)[hidden].float().mean().item()
    assert replaced == pytest.approx(0.8, abs=0.05)
    for other in (uptrain.Masking(nano_tokenizer, 8192, 2, **options), masking):
        other.epoch += other is masking
        assert not torch.equal(other(blocks)["labels"], together["labels"])


def test_no_token_is_drawn_that_the_model_lacks(nano_tokenizer):
    masking = uptrain.Masking(nano_tokenizer, 400, 0, mlm_probability=0.5, mask_replace_prob=0, random_replace_prob=1)
    assert masking([{"input_ids": [2] + [300] * 500}])["input_ids"].max() < 400


def test_streaming_trains(run):
    folder = run("--streaming", "--objective", "mntp")
    report = json.loads((folder / "results.json").read_text())
    assert report["masked_perplexity"]["held_out"]["after"] < report["masked_perplexity"]["held_out"]["before"]


def test_checkpoints_ask_for_dropout_that_up_training_did_without(run):
    folder = run()
    for name in ("checkpoint-3", "."):
        config = json.loads((folder / name / "config.json").read_text())
        assert config["attention_dropout"] == config["feedforward_dropout"] == 0.1


def test_a_token_of_the_vocabulary_can_be_the_mask(run):
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    masking = uptrain.Masking(uptrain.mask_with(tokenizer, "_"), 8192, 0, mlm_probability=0.9)
    assert (masking([{"input_ids": [2] + [300] * 50}])["input_ids"] == tokenizer.convert_tokens_to_ids("_")).any()
    again = AutoTokenizer.from_pretrained(run("--mask_token", "_", "--max_steps", "1"))
    text = "The __init__ of my_var."
    assert (
        again(text)["input_ids"]
        == tokenizer(text)["input_ids"]
        == AutoTokenizer.from_pretrained(NANO)(text)["input_ids"]
    )


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--dtype", "bfloat16", "--force_bf16"], "--dtype bfloat16 needs --lora_r"),
        (["--lora_r", "0"], "--lora_r must be at least 1; got 0"),
        (["--lora_r", "2", "--lora_dropout", "1.5"], "got 1.5"),
        (["--mask_rate", "1.5"], "--mask_rate must be between 0 and 1; got 1.5"),
        (["--random_replace_prob", "0.5"], "add up to at most 1; got"),
        (["--mask_token", "[GAP]"], "--mask_token '[GAP]' is not in the tokenizer's vocabulary"),
        (["--text", "no/such/file.txt"], "no/such/file.txt: there is no such file or folder"),
        (["--model", "./nope"], "nope"),
        (["--streaming", "--max_steps", "-1", "--num_train_epochs", "1"], "--streaming needs --max_steps"),
        (["--attn_implementation", "flex_attention", "--use_cpu"], "trains on a GPU only"),
        (["--text", "nowhere/"], "--text nowhere/: there is no such file or folder"),
        (["--text", "README.md"], "--text README.md: a file must be one of .parquet, .jsonl, .json, .csv, .txt"),
        (["--dropout", "1.5"], "smaller than 1, got 1.5"),
        (["--attn_implementation", "flash_attention_2"], "FlashAttention2"),
    ],
)
def test_flags_that_cannot_be_are_named(flags, message, run, capsys):
    with pytest.raises(SystemExit):
        run(*flags)
    assert message in capsys.readouterr().err


def test_adapters_are_not_trained_further_nor_merged_in_pieces(run, tmp_path, capsys, monkeypatch):
    encoder = GemmaEncoderForSequenceClassification.from_pretrained(NANO, num_labels=2)
    add_lora(encoder, r=2).save_pretrained(tmp_path / "adapter")
    with pytest.raises(SystemExit):
        run("--model", str(tmp_path / "adapter"))
    assert "is an adapter, which is not trained further" in capsys.readouterr().err
    monkeypatch.setenv("ACCELERATE_USE_FSDP", "true")
    with pytest.raises(SystemExit):
        run("--lora_r", "2")
    assert "which FSDP and DeepSpeed ZeRO-3 hold in pieces" in capsys.readouterr().err


def test_epochs_are_what_is_asked_for_and_the_card_says_what_was_done(run, capsys):
    folder = run("--max_steps", "-1", "--num_train_epochs", "1", "--objective", "mntp")
    report = json.loads((folder / "results.json").read_text())
    blocks = int(
        capsys.readouterr().out.split(" steps of 8 blocks of 32 tokens")[0].rpartition("\n")[2].replace(",", "")
    )
    assert report["steps"] == blocks > 6
    found = read_run_record(folder)
    rows, (table,) = dict(found.training), found.results
    assert rows["objective"] == "mntp" and rows["learning rate"] == "0.001" and rows["precision"] == "fp32"
    assert rows["data"] == "text.txt" and found.command.startswith("python uptrain.py --model")
    before, after = report["masked_perplexity"]["held_out"].values()
    assert f"| held_out | {before:.1f} | {after:.1f} |" in table


@pytest.mark.parametrize(
    ("flags", "steps"),
    [
        ([], 1000),
        (["--num_train_epochs", "2"], -1),
        (["--max_steps", "7"], 7),
        (["--max_steps", "7", "--num_train_epochs", "2"], 7),
        (["--num_train_epochs", "0"], -1),
    ],
)
def test_epochs_alone_are_not_cut_short_by_a_default(flags, steps, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "argv", ["uptrain.py", *flags])
    parser = ScriptParser(TrainingArguments, "")
    parser.set_defaults(output_dir=str(tmp_path), streaming=False, **READING)
    set_steps(parser)
    args = parser.parse_args()
    assert (args.max_steps, args.num_train_epochs) == (steps, {"2": 2.0, "0": 0.0}.get("".join(flags[-1:]), 3.0))


@pytest.mark.parametrize(("epochs", "steps", "tokens"), [(1, 2, 512), (3, 6, 1536), (0.5, 1, 256)])
def test_how_long_it_trains_is_said_as_the_trainer_counts(epochs, steps, tokens, tmp_path, capsys):
    """16 blocks by 12: two steps an epoch, the second of 4."""
    args = TrainingArguments(str(tmp_path), per_device_train_batch_size=12, num_train_epochs=epochs, use_cpu=True)
    say_how_long(args, Dataset.from_dict({"input_ids": [[1] * 32] * 16}), 32)
    printed = capsys.readouterr().out
    assert printed.startswith(
        f"{steps} step{'s' * (steps > 1)} of 12 blocks of 32 tokens: {tokens:,} tokens; the text has 512,"
    )
