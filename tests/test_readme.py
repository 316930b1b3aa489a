"""The README's code runs as it stands, with a tiny checkpoint in the place of the one it names."""

import json
import re
from pathlib import Path

from conftest import decoder_config
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, GemmaTokenizer

README = Path(__file__).parent.parent / "README.md"


def tiny_gemma(folder: Path) -> GemmaTokenizer:
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    words = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True))
    words.normalizer = normalizers.Replace(" ", "▁")
    words.pre_tokenizer = pre_tokenizers.Split("▁", "merged_with_next")
    words.train_from_iterator([README.read_text()], trainers.BpeTrainer(vocab_size=99, special_tokens=special))
    trained = json.loads(words.to_str())["model"]
    merges = [tuple(merge) for merge in trained["merges"]]
    tokenizer = GemmaTokenizer(vocab=trained["vocab"], merges=merges, add_bos_token=True)
    tokenizer.save_pretrained(folder)
    config = decoder_config("gemma2", vocab_size=len(tokenizer), max_position_embeddings=128)
    AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return tokenizer


def test_the_readme_runs(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    tiny_gemma(tmp_path / "gemma")
    rows = ["text,label", "It rains.,wet", "The sun is out.,dry", "Snow and a longer text.,cold", ""]
    (tmp_path / "train.csv").write_text("\n".join(rows))
    (tmp_path / "test.csv").write_text("\n".join([*rows[:3], ""]))  # a class is missing: ids must not shift
    names = {}
    blocks = re.findall(r"```python\n(.*?)```", README.read_text(), re.DOTALL)
    assert len(blocks) == 4
    for block in blocks:
        exec(block.replace("google/gemma-2-2b", "gemma"), names)
    assert names["logits"].shape == (2, 3)
    assert type(names["model"]).__name__ == "GemmaEncoderForSequenceClassification"
    assert names["model"].config.id2label == {0: "cold", 1: "dry", 2: "wet"}
    assert names["dataset"]["test"]["labels"][:] == [2, 1]
    assert (tmp_path / "my-encoder" / "attention_gemma_encoder.py").exists()
    assert sorted(names["best_first"].tolist()) == [0, 1] and names["loss"].item() > 0
    assert (tmp_path / "my-adapter" / "adapter_model.safetensors").exists()
