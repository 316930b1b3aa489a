"""Two processes train what one trains: FSDP2 as `examples/accelerate/fsdp2.yaml` sets it up, on CPUs."""

import json
import os
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest
import torch
import yaml
from helpers import ROOT, run_script
from safetensors.torch import load_file

STARRED = {path.name for path in (ROOT / "modeling_gemma_encoder").glob("*_gemma_encoder.py")}
CONFIGS = ROOT / "examples" / "accelerate"


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    (folder / "stsb").mkdir()
    rows = [
        {"sentence1": "word " * (1 + 5 * number % 7), "sentence2": "text", "label": number % 5} for number in range(33)
    ]
    for split in ("train", "validation", "test"):
        (folder / "stsb" / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def run(launch: list | None, script: str, words: list) -> None:
    """Runs a script in this process, or as the launcher does."""
    if launch is None:
        return run_script(script, *words)
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [*map(str, [*launch, script, *words])]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def train(
    launch: list | None, flags: str, decoder: Path, data: Path, output: Path, batch_size: int
) -> tuple[list, dict, list]:
    """Losses, weights and predictions, whose number, 33, two processes cannot share evenly."""
    flags += (
        " --task stsb --do_predict --max_steps 3 --learning_rate 1e-3 --lr_scheduler_type constant --logging_steps 1"
    )
    flags += " --attention_dropout 0 --feedforward_dropout 0 --pooling query_probe"
    flags += " --eval_strategy no --save_strategy no"
    words = [*flags.split(), "--use_cpu", "True", "--disable_tqdm", "True"]
    words += ["--model", decoder, "--data_dir", data, "--output_dir", output]
    words += ["--per_device_train_batch_size", batch_size, "--total_batch_size", 8]
    run(launch, "examples/glue.py", words)
    folder = output / "stsb" / "seed-42"
    history = json.loads((folder / "results.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    predicted = json.loads((folder / "predictions-test.json").read_text())["predictions"]
    assert {path.name for path in folder.glob("*.py")} >= STARRED
    auto_map = json.loads((folder / "config.json").read_text())["auto_map"]
    written = "modeling_gemma_encoder.GemmaEncoderForSequenceClassification"
    assert auto_map["AutoModelForSequenceClassification"] == written
    (weights,) = folder.glob("*model.safetensors")
    return losses, load_file(weights), predicted


@pytest.fixture(scope="module")
def alone(decoder, data, tmp_path_factory):
    """Flags -> what one process trains, in one step of eight rows."""
    return cache(lambda flags: train(None, flags, decoder, data, tmp_path_factory.mktemp("alone"), 8))


FSDP2 = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", CONFIGS / "fsdp2.yaml"]
FSDP2 += ["--num_processes", 2, "--mixed_precision", "no", ROOT / "tests" / "finetuning" / "fsdp_on_cpu.py"]
DDP = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", 2]


ADAPTERS = "--lora_r 2 --lora_dropout 0"


@pytest.mark.parametrize(
    ("launch", "flags"), [(FSDP2, ""), (DDP, ""), (FSDP2, ADAPTERS)], ids=["fsdp2", "ddp", "adapters under fsdp2"]
)
def test_two_processes_train_and_predict_what_one_does(launch, flags, alone, decoder, data, tmp_path):
    """In two accumulation steps each, as `--total_batch_size` divides it."""
    losses, weights, predictions = train(launch, flags, decoder, data, tmp_path, batch_size=2)
    losses_alone, weights_alone, predictions_alone = alone(flags)
    assert len(losses) == 3
    assert losses == pytest.approx(losses_alone, abs=1e-4)
    assert weights.keys() == weights_alone.keys() and any("lora" in name for name in weights) == bool(flags)
    for name, expected in weights_alone.items():
        torch.testing.assert_close(weights[name], expected, atol=1e-5, rtol=0, msg=name)
    assert len({round(value, 4) for value in predictions}) > 3
    assert predictions == pytest.approx(predictions_alone, abs=1e-4)


def test_two_processes_weigh_classes_as_one_does(decoder, tmp_path):
    """In two accumulation steps each; a class is rare, so the devices' batches have other sums of weights."""
    rows = [{"text": "word " * (1 + 5 * n % 7), "label": "rare" if n % 8 == 3 else "common"} for n in range(24)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = "--class_weights balanced --max_steps 3 --optim sgd --learning_rate 0.1 --lr_scheduler_type constant"
    flags += " --attention_dropout 0 --feedforward_dropout 0 --warmup_steps 0 --total_batch_size 8 --use_cpu True"
    flags += " --disable_tqdm True --eval_strategy no --do_eval False --save_strategy no --logging_steps 1"
    found = []
    for launch, batch_size in ((None, 8), (DDP, 2)):
        words = [*flags.split(), "--per_device_train_batch_size", batch_size, "--model", decoder]
        words += ["--train_file", tmp_path / "train.jsonl", "--output_dir", tmp_path / f"{batch_size}"]
        run(launch, "examples/classify.py", words)
        folder = tmp_path / f"{batch_size}" / "seed-42"
        history = json.loads((folder / "results.json").read_text())["history"]
        found.append(([entry["loss"] for entry in history if "loss" in entry], load_file(folder / "model.safetensors")))
    (alone, expected), (losses, weights) = found
    assert len(losses) == 3 and losses == pytest.approx(alone, abs=1e-4)
    for name, weight in weights.items():
        torch.testing.assert_close(weight, expected[name], atol=1e-6, rtol=1e-4, msg=name)


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_accelerate_reads_the_configs(path):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(path))
    assert config.distributed_type.name == yaml.safe_load(path.read_text())["distributed_type"]
