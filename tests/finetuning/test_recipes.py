"""Laws of recipes: files are flags, batches are the same on any number of devices, estimates are of what happens."""

import json
import os
import subprocess
import sys
from pathlib import Path

import estimate
import glue
import pytest
import torch
import yaml
from helpers import NANO, ROOT
from transformers import TrainingArguments

from modeling_gemma_encoder.finetuning.arguments import FineTuningArguments
from modeling_gemma_encoder.finetuning.suite import SuiteArguments, make_parser, parse
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16

RECIPES = sorted((ROOT / "examples" / "recipes").glob("*.yaml"))


def parsed(monkeypatch, *words, task="cola"):
    monkeypatch.setattr(sys, "argv", ["glue.py", *map(str, words)])
    return parse(make_parser(SuiteArguments, "", ""), glue.TASKS[task])


@pytest.fixture
def recipe(tmp_path):
    def write(**flags) -> Path:
        path = tmp_path / "recipe.yaml"
        flags = {"task": ["cola"], "model": str(NANO), "output_dir": str(tmp_path / "out"), "use_cpu": True, **flags}
        path.write_text(yaml.safe_dump(flags))
        return path

    return write


def test_a_file_is_its_flags_and_the_command_line_wins(recipe, monkeypatch):
    path = recipe(seeds=[1, 2], learning_rate="1e-5", bf16=True, max_steps=None, lr_scheduler_kwargs={"num_cycles": 2})
    words = ["--config", path, "--task", "sst2", "stsb", "--pooling", "last_k", "--force_bf16"]
    own, options, args = parsed(monkeypatch, *words)
    assert (own.task, own.seeds) == (["sst2", "stsb"], [1, 2])
    assert (options.pooling, options.model) == ("last_k", str(NANO))
    assert (args.learning_rate, args.bf16, args.max_steps) == (1e-5, True, -1)
    assert args.lr_scheduler_kwargs == {"num_cycles": 2}


def test_values_mean_what_they_say(recipe, monkeypatch, tmp_path):
    """YAML reads a plain `no` as false; values may begin with a dash, and lists may be empty."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "-data").mkdir()
    path = recipe(save_strategy=False, eval_strategy=False, bf16=False, learning_rate=-1e-5, seeds=[], data_dir="-data")
    own, _, args = parsed(monkeypatch, f"--config={path}")
    assert args.save_strategy == args.eval_strategy == "no" and args.bf16 is False
    assert (args.learning_rate, own.seeds, own.data_dir) == (-1e-5, None, "-data")


def test_an_abbreviated_config_is_not_silently_nothing(recipe, monkeypatch, capsys):
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--task", "cola", "--model", NANO, "--conf", recipe(learning_rate=0.1))
    assert "--config cannot be abbreviated" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("learning_rat: 1", "there is no flag 'learning_rat'. Did you mean 'learning_rate'?"),
        ("config: other.yaml", "there is no flag 'config'"),
        ("help: true", "there is no flag 'help'"),
        ("- task", "`flag: value`"),
        ("task: [", "expected the node content"),
        (None, "No such file"),
    ],
)
def test_bad_files_are_named(text, message, tmp_path, monkeypatch, capsys):
    path = tmp_path / "recipe.yaml"
    if text is not None:
        path.write_text(text)
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--config", path)
    assert f"--config {path}" in capsys.readouterr().err.replace("\n", " ")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--config", path)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("processes", "most", "size", "steps"), [(1, 32, 32, 1), (1, 8, 8, 4), (2, 12, 8, 2), (4, 8, 8, 1), (8, 8, 4, 1)]
)
def test_the_batch_is_the_same_on_any_number_of_devices(processes, most, size, steps, recipe, monkeypatch):
    path = recipe(total_batch_size=32, per_device_train_batch_size=most)
    monkeypatch.setattr(TrainingArguments, "world_size", processes)
    monkeypatch.setenv("WORLD_SIZE", str(processes))
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 1, raising=False)
    for _ in range(2):  # a suite reads the command line anew for every task
        _, _, args = parsed(monkeypatch, "--config", path)
        assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (size, steps)
        assert size * steps * processes == 32


def test_plain_python_uses_one_gpu(recipe, monkeypatch):
    """The Trainer's own way, `torch.nn.DataParallel`, would read eight batches a step where there are eight GPUs."""
    monkeypatch.setattr(TrainingArguments, "_setup_devices", torch.device("cpu"))
    monkeypatch.setattr(TrainingArguments, "_n_gpu", 8, raising=False)
    monkeypatch.setattr(TrainingArguments, "world_size", 1)
    said = []
    monkeypatch.setattr("modeling_gemma_encoder._scripts.command_line.logger.warning_once", said.append)
    _, _, args = parsed(monkeypatch, "--config", recipe(), "--per_device_train_batch_size", "4")
    assert (args.n_gpu, args.train_batch_size) == (1, 4)
    assert "There are 8 GPUs and one is used" in said[0]


def test_the_command_line_wins_over_a_files_batch(recipe, monkeypatch):
    path = recipe(total_batch_size=32, per_device_train_batch_size=4)
    _, _, args = parsed(monkeypatch, "--config", path, "--gradient_accumulation_steps", "1")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 1)
    _, _, args = parsed(monkeypatch, "--config", path, "--gradient_acc", "2")  # argparse takes abbreviations
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 2)
    path = recipe(gradient_accumulation_steps=3, per_device_train_batch_size=4)
    _, _, args = parsed(monkeypatch, "--config", path, "--total_batch_size", "16")
    assert (args.per_device_train_batch_size, args.gradient_accumulation_steps) == (4, 4)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"per_device_train_batch_size": 0}, "0 rows at a time"),
        ({"gradient_accumulation_steps": 2}, "--total_batch_size sets --gradient_accumulation_steps"),
        ({"total_batch_size": 31}, "31 cannot be divided among 2 devices"),
    ],
)
def test_batches_that_cannot_be_are_named(flags, message, recipe, monkeypatch, capsys):
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(SystemExit):
        parsed(monkeypatch, "--config", recipe(**{"total_batch_size": 32, **flags}))
    assert message in capsys.readouterr().err


def test_a_recipe_trains(decoder, tmp_path, monkeypatch):
    """The file as it is, but for the decoder, the data and the number of steps."""
    (tmp_path / "cola").mkdir()
    rows = "".join(json.dumps({"sentence": f"word {number}", "label": number % 2}) + "\n" for number in range(40))
    for split in ("train", "validation", "test"):
        (tmp_path / "cola" / f"{split}.jsonl").write_text(rows)
    words = f"--config {RECIPES[0]} --model {decoder} --data_dir {tmp_path} --task cola --seeds 1 --max_steps 2"
    words += f" --output_dir {tmp_path / 'out'} --use_cpu true --disable_tqdm true"
    monkeypatch.setattr(sys, "argv", ["glue.py", *words.split()])
    glue.run_suite(glue.SUITE, "runs/glue")
    began = json.loads((tmp_path / "out" / "cola" / "seed-1" / "run.json").read_text())
    assert (began["batch_size"], began["bf16"], began["learning_rate"]) == (32, computes_in_bf16("cpu"), 1e-5)
    assert began["attention_dropout"] == began["feedforward_dropout"] == 0.1


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_recipes_are_what_their_scripts_take(path):
    recipe = estimate.Recipe.read(path, 1)
    assert recipe.options.total_batch_size == 32 and recipe.args.gradient_checkpointing and recipe.args.bf16
    assert f"--config examples/recipes/{path.name}" in path.read_text()
    assert recipe.tasks.keys() <= estimate.ROWS.keys()
    for gpus in (1, 2, 4, 8):
        for _, args in estimate.Recipe.read(path, gpus).tasks.values():
            assert args.per_device_train_batch_size * args.gradient_accumulation_steps * gpus == 32
    config = estimate.decoder_config(recipe.options.model)
    assert (config.model_type, config.vocab_size) == ("gemma2", 256000)


def test_a_step_of_gemma_2_2b_counted_by_hand():
    """2.61 billion parameters: 26 layers of 77.9 million, the norm, the embedding of 589.8 million, and the head."""
    recipe = estimate.Recipe.read(next(path for path in RECIPES if path.stem == "gemma-2-2b-glue"), 1)
    step = estimate.take_step(recipe.options, recipe.args, texts=2, length=64)
    width, inner, layers, heads, head = 2304, 9216, 26, 8 + 2 * 4, 256
    linear = layers * (width * heads * head + 8 * head * width + 3 * width * inner)
    whole = linear + layers * 4 * width + width + 256000 * width
    assert step.parameters == whole + width + 2 * (width + 1)  # the head: its norm, two outputs with biases
    assert step.weights == step.gradients == 4 * step.parameters
    assert step.optimizer == pytest.approx(8 * step.parameters, rel=1e-6)
    products = 2 * 128 * linear + 4 * layers * 8 * head * 2 * 64**2  # attention: two products, 2 operations each
    assert step.operations == pytest.approx(4 * products, rel=1e-3)  # a forward pass, another, and twice backward
    assert step.activations > layers * 128 * width * 4  # what each layer is given, at least


CHECK = """
import re, sys, torch
from pathlib import Path
from modeling_gemma_encoder import GemmaEncoderConfig, GemmaEncoderForSequenceClassification
import estimate
held = lambda: 1024 * int(re.search(r"VmHWM:\\s+(\\d+)", Path("/proc/self/status").read_text())[1])
torch.randn(64, 64) @ torch.randn(64, 64)
before = held()
model = GemmaEncoderForSequenceClassification(GemmaEncoderConfig(text_config=estimate.decoder_config(sys.argv[1])))
optimizer = torch.optim.AdamW(model.train().parameters(), fused=True)
ids, labels = torch.randint(1, 99, (16, 128)), torch.zeros(16, dtype=torch.long)
for _ in range(2):
    model(ids, torch.ones_like(ids), labels=labels).loss.backward()
    optimizer.step()
print(held() - before)
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="the memory of a process, as Linux tells it")
def test_an_estimate_is_what_a_step_takes(tmp_path):
    """On a CPU, where the memory of a process is measured by the system: at most the estimate, and not much less."""
    shape = {**estimate.GEMMA_2, "hidden_size": 384, "intermediate_size": 1536, "num_hidden_layers": 4}
    shape |= {"num_attention_heads": 2, "num_key_value_heads": 1, "vocab_size": 8192, "head_dim": 256}
    estimate.AutoConfig.for_model("gemma2", **shape).save_pretrained(tmp_path)
    args = TrainingArguments(str(tmp_path), use_cpu=True, optim="adamw_torch_fused")
    expected = estimate.take_step(FineTuningArguments(model=str(tmp_path)), args, 16, 128).memory()
    give_back = {"MALLOC_TRIM_THRESHOLD_": "0", "MALLOC_MMAP_THRESHOLD_": "65536", "OMP_NUM_THREADS": "1"}
    places = os.pathsep.join([str(ROOT), str(ROOT / "examples" / "recipes")])
    environment = {**os.environ, **give_back, "PYTHONPATH": places}
    command = [sys.executable, "-c", CHECK, str(tmp_path)]
    taken = int(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout)
    assert 0.75 * expected < taken < 1.1 * expected


def seconds_of_a_core(*words: str) -> float:
    """What a Python process takes; other work on the machine does not count."""
    process = subprocess.Popen([sys.executable, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    _, status, used = os.wait4(process.pid, 0)
    assert os.waitstatus_to_exitcode(status) == 0
    return used.ru_utime + used.ru_stime


@pytest.mark.skipif(not hasattr(os, "wait4"), reason="counts a process's own time")
@pytest.mark.parametrize("script", ["ablations.py", "app.py"])
def test_help_answers_in_less_than_ten_seconds(script):
    """Of those that import most; a busy machine may take longer for the same, once. Where importing the Trainer alone
    takes about ten seconds, half of that may come on top."""
    words = [str(ROOT / "examples" / script), "--help"]
    if (seconds := seconds_of_a_core(*words)) >= 10:
        imports = seconds_of_a_core("-c", "from transformers import Trainer")
        assert min(seconds, seconds_of_a_core(*words)) < 1.5 * imports
