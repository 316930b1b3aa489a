"""Laws of verification: what was published as it is passes; anything that changes what a model does is seen."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from helpers import ROOT, TEMPLATE
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForSequenceClassification
from modeling_gemma_encoder.checkpoints import load_tokenizer
from modeling_gemma_encoder.hub.golden import GOLDEN_FILE, hash_of
from modeling_gemma_encoder.hub.publishing import stage
from modeling_gemma_encoder.hub.run_record import RunRecord
from modeling_gemma_encoder.hub.verification import compare, run_in_fresh_process, verify


def test_a_published_tokenizer_says_nothing_of_the_machine_it_was_loaded_on(trained, tmp_path):
    source = Path(shutil.copytree(trained, tmp_path / "source"))
    saved = json.loads((source / "tokenizer_config.json").read_text())
    assert "local_files_only" in saved  # upstream writes it
    of_machine = {
        "cache_dir": "/home/ada/cache",
        "token": "hf_abc",
        "name_or_path": "/home/ada/model",
        "is_local": True,
    }
    (source / "tokenizer_config.json").write_text(json.dumps({**saved, **of_machine}))
    stage(str(source), tmp_path / "out", "me/it", TEMPLATE, RunRecord(), base="examples/nano", licence="apache-2.0")
    published = json.loads((tmp_path / "out" / "tokenizer_config.json").read_text())
    assert all(published[name] == saved[name] for name in saved.keys() - {"local_files_only", "is_local"})
    assert not published.keys() & {"local_files_only", *of_machine}
    load_tokenizer(source).save_pretrained(tmp_path / "trained_further")
    further = json.loads((tmp_path / "trained_further" / "tokenizer_config.json").read_text())
    assert not further.keys() & {"local_files_only", *of_machine}


@pytest.fixture
def folder(staged, tmp_path):
    return Path(shutil.copytree(staged, tmp_path / "copy"))


def failed(folder, **options) -> dict[str, str]:
    return {check.name: check.found for check in verify(folder, **options) if not check.passed}


def edit(folder, file, change, rehash: bool = True):
    """A change whose author also brings the hashes up to date: what it does must be seen too."""
    content = json.loads((folder / file).read_text())
    change(content)
    (folder / file).write_text(json.dumps(content))
    if rehash:
        golden = json.loads((folder / GOLDEN_FILE).read_text())
        golden["files"][file] = hash_of(folder / file)
        (folder / GOLDEN_FILE).write_text(json.dumps(golden))


def rewrite(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_is_published_is_all_that_is_needed_and_nothing_else(staged):
    names = {path.name for path in staged.iterdir()}
    assert names == {path.name for path in ROOT.glob("modeling_gemma_encoder/*_gemma_encoder.py")} | {
        *("config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"),
        *("README.md", "LICENSE", GOLDEN_FILE),
    }
    tokenizer = AutoTokenizer.from_pretrained(staged)
    assert tokenizer.decode(tokenizer("rain", "It rains.")["input_ids"]) == "<bos>Query: rain Document: It rains."


@pytest.mark.own_process
def test_a_published_folder_passes_by_function_and_command(staged):
    assert failed(staged) == {}
    command = [sys.executable, "-m", "modeling_gemma_encoder.hub", "verify", str(staged), "--json"]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert {check["passed"] for check in json.loads(result.stdout)} == {True}


def test_a_causal_reload_is_caught(folder):
    edit(folder, "config.json", lambda config: config.update(attention="causal"))
    assert {"settings", "outputs"} <= set(wrong := failed(folder)) and "attention='causal'" in wrong["settings"]


def test_a_window_halved_is_caught(folder):
    edit(folder, "config.json", lambda config: config["text_config"].update(sliding_window=64))
    assert {"settings", "outputs"} <= set(wrong := failed(folder)) and "sliding_window=64" in wrong["settings"]


def test_an_edited_template_is_caught(folder):
    def other_words(tokenizer):
        for piece in tokenizer["post_processor"]["special_tokens"].values():
            piece["ids"] = piece["ids"][::-1]

    edit(folder, "tokenizer.json", other_words)
    assert {"tokens and template", "outputs"} <= set(failed(folder))


def test_a_head_left_random_is_caught(folder):
    rewrite(folder, lambda tensors: tensors["classifier.out_proj.weight"].normal_(0, 0.02))
    assert set(failed(folder)) == {"hashes", "outputs"}


def test_a_missing_pooler_is_caught(folder):
    rewrite(folder, lambda tensors: [tensors.pop(name) for name in list(tensors) if name.startswith("pooler")])
    assert (
        "lacks" in (wrong := failed(folder))["loads in a fresh process"]
        and "pooler" in wrong["loads in a fresh process"]
    )


def test_a_file_cut_short_is_caught(folder):
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    assert {"hashes", "loads in a fresh process"} <= set(failed(folder))


@pytest.mark.own_process
def test_missing_or_other_code_is_caught_and_never_run(folder, tmp_path):
    original = (folder / "pooling_gemma_encoder.py").read_text()
    witness = tmp_path / "witness"
    (folder / "pooling_gemma_encoder.py").write_text(f"open({str(witness)!r}, 'w')\n" + original)
    wrong = failed(folder)
    assert "pooling_gemma_encoder.py" in wrong["code"] and "loads in a fresh process" in wrong and not witness.exists()
    assert set(failed(folder, trust_remote_code=True)) == {"hashes"} and witness.exists()
    (folder / "pooling_gemma_encoder.py").unlink()
    wrong = failed(folder, trust_remote_code=True)
    assert wrong["files"] == "no pooling_gemma_encoder.py" and "pooling_gemma_encoder.py" in wrong["code"]


@pytest.mark.parametrize(
    ("file", "change"),
    [
        ("config.json", {"auto_map": {"AutoModel": "evil/repo--model.Model"}}),
        ("config.json", {"configuration_files": ["config.4.0.0.json"], "evil/repo": ""}),
        ("config.json", {"custom_pipelines": {"text-classification": {"impl": "evil/repo--pipe.Pipe"}}}),
        ("config.json", {"text_config": {"auto_map": {"AutoModel": "evil/repo--model.Model"}}}),
        ("tokenizer_config.json", {"auto_map": {"AutoTokenizer": ["evil/repo--tokenizer.Tokenizer", None]}}),
        ("config.4.0.0.json", {"auto_map": {"AutoConfig": "evil/repo--model.Config"}}),
        ("modules.json", {"type": "evil.Module"}),
    ],
)
def test_a_config_that_names_other_code_is_caught(folder, file, change):
    if not (folder / file).exists():
        (folder / file).write_text("{}")
    edit(folder, file, lambda config: config.update(change))
    assert (wrong := failed(folder))["names in configs"] and "loads in a fresh process" in wrong


def test_settings_that_scores_in_fp32_do_not_show_are_caught(folder):
    """What a user gets who does not load as verification does."""
    activation = {"activation_fn": "torch.nn.modules.activation.Tanh"}
    changes = {"dtype": "float16", "sentence_transformers": activation, "output_hidden_states": True}
    edit(folder, "config.json", lambda config: config.update(changes))
    edit(folder, "config.json", lambda config: config["text_config"].update(max_position_embeddings=200_000))
    edit(folder, "tokenizer_config.json", lambda config: config.update(model_max_length=7000))
    wrong = failed(folder)
    for name in (*changes, "text_config.max_position_embeddings", "tokenizer.model_max_length"):
        assert f"{name}=" in wrong["settings"]


@pytest.mark.parametrize(
    ("file", "text"),
    [
        (GOLDEN_FILE, "[]"),
        (GOLDEN_FILE, "{}"),
        (GOLDEN_FILE, "no JSON"),
        ("README.md", "---\n- {\n---\n"),
        ("tokenizer_config.json", "{"),
    ],
)
def test_malformed_files_are_rows_of_the_table(folder, file, text):
    (folder / file).write_text(text)
    assert failed(folder)


def test_outputs_that_are_no_numbers_are_caught(staged):
    golden = json.loads((staged / GOLDEN_FILE).read_text())
    found = {**golden, "outputs": [[float("inf")] for _ in golden["outputs"]], "padding_changes": float("inf")}
    wrong = {check.name for check in compare(json.loads(json.dumps(found)), golden, staged) if not check.passed}
    assert wrong == {"padding, batches", "outputs"}


def test_many_and_long_inputs_are_verified(staged):
    found = run_in_fresh_process(staged, ["word " * 1000] * 40, "cpu")  # 200 kB
    assert "error" not in found and len(found["outputs"]) == 40


def test_pickles_and_new_files_are_caught(folder):
    (folder / "pytorch_model.bin").write_bytes(b"pickled")
    (folder / "README.md").unlink()
    wrong = failed(folder)
    assert wrong["files"] == "no README.md, of no kind known here: pytorch_model.bin"
    assert wrong["hashes"] == "pytorch_model.bin is new" and wrong["card"] == "license: None"


def test_what_is_no_encoder_is_named(tmp_path, decoder):
    with pytest.raises(ValueError, match=r"no config\.json"):
        verify(tmp_path)
    with pytest.raises(ValueError, match="model_type='gemma2'"):
        verify(decoder)


def test_what_is_not_trained_is_not_staged(tmp_path, decoder):
    with pytest.raises(ValueError, match="decoder as it is"):
        stage(str(decoder), tmp_path / "a", "me/a", TEMPLATE, RunRecord())
    model = GemmaEncoderForSequenceClassification.from_pretrained(decoder)
    model.save_pretrained(tmp_path / "bare")
    with pytest.raises(ValueError, match="has no tokenizer"):
        stage(str(tmp_path / "bare"), tmp_path / "b", "me/b", TEMPLATE, RunRecord())
    with pytest.raises(ValueError, match="not empty"):
        stage(str(decoder), tmp_path / "bare", "me/b", TEMPLATE, RunRecord())
    with pytest.raises(ValueError, match=r"no config\.json, so it is no model; below it are: .*bare"):
        stage(str(tmp_path), tmp_path / "b", "me/b", TEMPLATE, RunRecord())


def test_where_a_model_comes_from_is_said_or_asked_for(tmp_path, trained):
    with pytest.raises(ValueError, match="does not say which decoder it was made of"):
        stage(str(trained), tmp_path / "a", "me/a", TEMPLATE, RunRecord())
    stage(str(trained), tmp_path / "own", "me/own", TEMPLATE, RunRecord(), licence="mit")
    card = (tmp_path / "own" / "README.md").read_text()
    assert "license: mit" in card and "base_model" not in card and "A decoder as a bidirectional encoder" in card
    assert not (tmp_path / "own" / "NOTICE").exists()
