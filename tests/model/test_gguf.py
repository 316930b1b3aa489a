"""Laws of GGUF files: they load as what was written, whoever reads them, and leave no trace of quantization."""

import json
import subprocess
import sys

import gguf
import pytest
import torch
from gguf_files import F32, Q8_0, write_gguf
from helpers import NANO, decoder_config, pad, texts
from transformers import AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from modeling_gemma_encoder import (
    GemmaEncoderConfig,
    GemmaEncoderForMaskedLM,
    GemmaEncoderForSequenceClassification,
    GemmaEncoderModel,
)
from modeling_gemma_encoder.adapters import add_lora, merge
from modeling_gemma_encoder.checkpoints import convert_gguf, load_tokenizer, load_upstream
from modeling_gemma_encoder.gguf_gemma_encoder import split_gguf

FAMILIES = ("gemma2", "gemma3_text", "llama", "qwen2", "qwen3")
BATCH = pad(texts((40, 25, 7)))
# What such files do not say, so that a decoder has the family's own: how layers alternate.
SIX = {"num_hidden_layers": 6, "layer_types": None, "hidden_size": 64, "intermediate_size": 96}
load = GemmaEncoderModel.from_pretrained


def make(family: str, **fields):
    torch.manual_seed(1)
    eager = {"attn_implementation": "eager"}  # transformers 5.20 chooses one that does not soft-cap
    decoder = AutoModelForCausalLM.from_config(decoder_config(family, **{**SIX, **fields}), **eager)
    for name, parameter in decoder.named_parameters():
        parameter.data.normal_(0, 0.2)
        if "norm" in name and not family.startswith("gemma"):
            parameter.data += 1
    return decoder.eval()


def write(family: str, path, kind=F32, leave_out=None, metadata=None, **fields):
    if family == "qwen2":
        fields = {"use_sliding_window": False, "head_dim": 16, **fields}
    if family.startswith("gemma") and "head_dim" in fields:  # equal in all but the 27B
        fields = {"query_pre_attn_scalar": fields["head_dim"], **fields}
    decoder = make(family, **fields)
    return write_gguf(decoder, path / "x.gguf", kind=kind, leave_out=leave_out, **(metadata or {})), decoder


@torch.no_grad()
def states(model, **options):
    found = model(**BATCH, **options).last_hidden_state
    return found * BATCH["attention_mask"][..., None]


@pytest.mark.parametrize("family", FAMILIES)
def test_causal_states_are_those_of_the_decoder_that_was_written_and_of_upstreams_reading(family, tmp_path):
    file, decoder = write(family, tmp_path)
    ours = states(load(file, attention="causal"))
    torch.testing.assert_close(ours, states(decoder.model, use_cache=False), rtol=1e-4, atol=1e-4)
    eager = {"attn_implementation": "eager"}
    upstream = AutoModel.from_pretrained(tmp_path, gguf_file="x.gguf", config=decoder.config, **eager)
    torch.testing.assert_close(ours, states(upstream, use_cache=False), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_config_is_the_one_that_was_written(family, tmp_path):
    file, decoder = write(family, tmp_path, tie_word_embeddings=family != "llama")
    ours, written = GemmaEncoderConfig.from_pretrained(file).text_config.to_dict(), decoder.config.to_dict()
    aside = ("architectures", "dtype", "transformers_version", "_name_or_path", "initializer_range", "use_cache")
    different = {key for key in written if key not in aside and ours.get(key) != written[key]}
    assert different <= {"head_dim", "use_sliding_window", "sliding_window", "max_window_layers"}


LLAMA3 = {"factor": 32.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0, "original_max_position_embeddings": 8192}
SCALED = [
    ("llama", {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3}),
    ("llama", {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 8.0}),
    ("qwen3", {"rope_type": "yarn", "rope_theta": 1e6, "factor": 4.0, "original_max_position_embeddings": 16}),
    (
        "gemma3_text",
        {
            "full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
        },
    ),
]


@pytest.mark.parametrize(("family", "rope"), SCALED)
def test_scaled_rotary_positions_are_read_where_upstream_leaves_them_out(family, rope, tmp_path):
    """Gemma 3 from 4B on, Llama 3.1 and 3.2, and Qwen's long contexts."""
    file, decoder = write(family, tmp_path, rope_parameters=rope, head_dim=64)
    ours = GemmaEncoderConfig.from_pretrained(file).text_config.rope_parameters
    assert ours == decoder.config.rope_parameters
    torch.testing.assert_close(
        states(load(file, attention="causal")), states(decoder.model, use_cache=False), rtol=1e-4, atol=1e-4
    )


def test_an_old_files_linear_scaling_is_read(tmp_path):
    file, decoder = write("llama", tmp_path, metadata={"arch__rope__scale_linear": 4.0})
    rope = GemmaEncoderConfig.from_pretrained(file).text_config.rope_parameters
    assert rope == decoder.config.rope_parameters | {"rope_type": "linear", "factor": 4.0}


@pytest.mark.parametrize(("family", "depth", "scale"), [("gemma2", 46, 144), ("gemma3_text", 62, 168)])
def test_27b_divides_attention_by_its_own_scale(family, depth, scale, tmp_path):
    """`query_pre_attn_scalar` of google/gemma-2-27b and gemma-3-27b-it: 4608 / 32 and 5376 / 32."""
    width, heads = {"gemma2": (4608, 32), "gemma3_text": (5376, 32)}[family]
    decoder = make(family, num_hidden_layers=1)
    decoder.config.num_hidden_layers = depth
    decoder.config.hidden_size, decoder.config.num_attention_heads = width, heads
    decoder.config.head_dim = 128
    file = write_gguf(decoder, tmp_path / "x.gguf")
    assert GemmaEncoderConfig.from_pretrained(file).text_config.query_pre_attn_scalar == scale


def test_quantized_weights_are_those_that_llama_cpp_reads(tmp_path):
    file, decoder = write("gemma3_text", tmp_path, kind=Q8_0)
    weight = decoder.model.layers[0].mlp.up_proj.weight
    expected = torch.from_numpy(gguf.dequantize(gguf.quantize(weight.detach().numpy(), Q8_0), Q8_0))
    read = load(file)
    assert read.dtype == torch.float32
    torch.testing.assert_close(read.model.layers[0].mlp.up_proj.weight, expected, rtol=0, atol=0)
    assert not torch.equal(expected, weight)
    half = load(tmp_path, gguf_file="x.gguf", dtype=torch.bfloat16)
    torch.testing.assert_close(half.model.layers[0].mlp.up_proj.weight, expected.bfloat16(), rtol=0, atol=0)


RELOAD = """
import sys, json, torch
sys.modules["modeling_gemma_encoder"] = None  # not to be had
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained(sys.argv[1], trust_remote_code=True).eval()
batch = {name: torch.tensor(values) for name, values in json.loads(sys.argv[2]).items()}
with torch.no_grad():
    print(json.dumps(model(**batch).logits.tolist()))
"""


def test_what_is_saved_is_an_ordinary_checkpoint(tmp_path):
    file, _ = write("gemma3_text", tmp_path, kind=Q8_0)
    model = GemmaEncoderForSequenceClassification.from_pretrained(file, num_labels=3, pooling="query_probe")
    with torch.no_grad():
        expected = model(**BATCH).logits
    model.save_pretrained(tmp_path / "saved")
    config = (tmp_path / "saved" / "config.json").read_text()
    assert "quantization" not in config and "gguf" not in config
    batch = json.dumps({name: values.tolist() for name, values in BATCH.items()})
    command = [sys.executable, "-c", RELOAD, str(tmp_path / "saved"), batch]
    printed = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    torch.testing.assert_close(torch.tensor(json.loads(printed)), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tied", [True, False])
def test_a_masked_language_model_has_the_files_own_head(tied, tmp_path):
    file, decoder = write("llama", tmp_path, tie_word_embeddings=tied)
    model = GemmaEncoderForMaskedLM.from_pretrained(file, attention="causal")
    assert model.config.tie_word_embeddings == tied
    with torch.no_grad():
        logits, expected = model(**BATCH).logits, decoder(**BATCH, use_cache=False).logits
    real = BATCH["attention_mask"].bool()
    torch.testing.assert_close(logits[real], expected[real], rtol=1e-4, atol=1e-4)


def test_an_adapter_is_loaded_over_the_file_it_was_trained_on(tmp_path):
    file, _ = write("gemma3_text", tmp_path)
    model = GemmaEncoderForSequenceClassification.from_pretrained(file, num_labels=3)
    adapted = add_lora(model, r=2)
    for name, parameter in adapted.named_parameters():
        if "lora_B" in name:
            parameter.data.normal_(0, 0.1)
    with torch.no_grad():
        expected = adapted.eval()(**BATCH).logits
    adapted.save_pretrained(tmp_path / "adapter")
    again = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "adapter")
    with torch.no_grad():
        torch.testing.assert_close(again(**BATCH).logits, expected, rtol=1e-5, atol=1e-5)
    AutoTokenizer.from_pretrained(NANO).save_pretrained(tmp_path / "adapter")
    merge(tmp_path / "adapter", tmp_path / "merged")
    whole = GemmaEncoderForSequenceClassification.from_pretrained(tmp_path / "merged")
    with torch.no_grad():
        torch.testing.assert_close(whole(**BATCH).logits, expected, rtol=1e-4, atol=1e-4)


@pytest.fixture(scope="session")
def nano_gguf(tmp_path_factory):
    """The nano decoder, its vocabulary and all, as a GGUF file."""
    decoder = AutoModelForCausalLM.from_pretrained(NANO, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    return write_gguf(decoder, tmp_path_factory.mktemp("gguf") / "nano.gguf", tokenizer)


TEXTS = ["It rains.", "", " lead  and trail ", "naïve 漢字 😀\n\tx = 3;", "<bos> <mask> <pad>", "a" * 300]


def test_the_tokenizer_reads_as_the_one_that_was_written(nano_gguf):
    read, written = load_tokenizer(nano_gguf), AutoTokenizer.from_pretrained(NANO)
    assert [read(text)["input_ids"] for text in TEXTS] == [written(text)["input_ids"] for text in TEXTS]
    assert read.special_tokens_map == written.special_tokens_map


def test_a_converted_file_is_a_checkpoint_that_anyone_loads(nano_gguf, tmp_path):
    convert_gguf(nano_gguf, tmp_path / "nano", torch.float32)
    written, read = (AutoModel.from_pretrained(place, dtype=torch.float32) for place in (NANO, tmp_path / "nano"))
    torch.testing.assert_close(states(read, use_cache=False), states(written, use_cache=False), rtol=1e-4, atol=1e-4)
    text = "A text that both read."
    ids = [AutoTokenizer.from_pretrained(place)(text)["input_ids"] for place in (NANO, tmp_path / "nano")]
    assert ids[0] == ids[1]
    assert "local" not in (tmp_path / "nano" / "tokenizer_config.json").read_text()
    with pytest.raises(ValueError, match="is not empty"):
        convert_gguf(nano_gguf, tmp_path / "nano", torch.float32)
    with pytest.raises(ValueError, match="is not a GGUF file"):
        convert_gguf(NANO, tmp_path / "again", torch.float32)


def test_upstreams_own_classes_have_the_files_weights(nano_gguf):
    options = {"num_labels": 3, "attn_implementation": "eager"}
    read = load_upstream(AutoModelForSequenceClassification, nano_gguf, torch.float32, **options)
    written = load_upstream(AutoModelForSequenceClassification, NANO, torch.float32, **options)
    assert type(read) is type(written) and read.config._attn_implementation == "eager"
    assert read.score.out_features == 3
    torch.testing.assert_close(read.model.norm.weight, written.model.norm.weight, rtol=1e-4, atol=1e-4)
    assert not getattr(read, "hf_quantizer", None)


@pytest.mark.parametrize(
    ("name", "gguf_file", "meant"),
    [
        ("google/gemma-2-2b", None, ("google/gemma-2-2b", None)),
        ("owner/repo/sub/x.gguf", None, ("owner/repo", "sub/x.gguf")),
        ("folder/x.gguf", None, ("folder", "x.gguf")),
        ("x.gguf", None, (".", "x.gguf")),
        ("/a/b/c/x.gguf", None, ("/a/b/c", "x.gguf")),
        ("./a/b/x.gguf", None, ("a/b", "x.gguf")),
        ("owner/repo", "x.gguf", ("owner/repo", "x.gguf")),
        (None, None, (None, None)),
    ],
)
def test_a_name_means_a_folder_or_a_repository_and_a_file(name, gguf_file, meant):
    assert split_gguf(name, gguf_file) == meant


def test_a_path_of_a_file_that_is_there_is_no_repository(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "x.gguf").touch()
    assert split_gguf("a/b/x.gguf") == ("a/b", "x.gguf")


def test_what_cannot_be_read_says_why(tmp_path, monkeypatch):
    file, _ = write("gemma3_text", tmp_path)
    with pytest.raises(OSError, match=r"has no file y\.gguf; its GGUF files: x\.gguf"):
        load(tmp_path / "y.gguf")
    (tmp_path / "text.gguf").write_text("no such file at all, but long enough to have a header")
    with pytest.raises(ValueError, match="not a GGUF file"):
        load(tmp_path / "text.gguf")
    writer = gguf.GGUFWriter(tmp_path / "other.gguf", "mamba")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(ValueError, match="architecture 'mamba'; gemma2, gemma3"):
        load(tmp_path / "other.gguf")
    monkeypatch.setattr("modeling_gemma_encoder.gguf_gemma_encoder.is_gguf_available", lambda: False)
    with pytest.raises(ImportError, match="pip install gguf"):
        load(file)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({"split__count": 2}, "one of 2 parts"),
        ({"arch__rope__scaling__type": "longrope"}, r"rotary scaling of .* got 'longrope'"),
    ],
)
def test_metadata_that_cannot_be_followed_is_refused(metadata, message, tmp_path):
    file, _ = write("gemma3_text", tmp_path, metadata=metadata)
    with pytest.raises(ValueError, match=message):
        load(file)


def test_frequencies_that_no_llama_has_are_refused(tmp_path):
    rope = {"rope_type": "llama3", "rope_theta": 500000.0, **LLAMA3, "factor": 5.0}
    file, _ = write("llama", tmp_path, rope_parameters=rope, head_dim=64)
    with pytest.raises(ValueError, match=r"rope_freqs\.weight"):
        load(file)


def test_weights_that_are_missing_are_not_made_up(tmp_path):
    file, _ = write("gemma3_text", tmp_path, leave_out="blk.1.ffn_up")
    with pytest.raises(ValueError, match=r"lacks 1 weights, model\.layers\.1\.mlp\.up_proj\.weight"):
        load(file)
    whole = (tmp_path / "x.gguf").read_bytes()
    (tmp_path / "cut.gguf").write_bytes(whole[: len(whole) // 2])
    with pytest.raises((ValueError, OSError)):
        load(tmp_path / "cut.gguf")


def test_a_file_of_the_same_name_in_the_working_directory_is_not_read_instead(tmp_path, monkeypatch):
    for name in ("here", "there"):
        (tmp_path / name).mkdir()
    file, decoder = write("gemma3_text", tmp_path / "there")
    other = make("gemma3_text")
    other.model.norm.weight.data += 5
    write_gguf(other, tmp_path / "here" / "x.gguf")
    monkeypatch.chdir(tmp_path / "here")
    torch.testing.assert_close(load(file).model.norm.weight, decoder.model.norm.weight, rtol=1e-4, atol=1e-4)


def test_options_of_encoder_and_decoder_are_those_that_are_given(tmp_path):
    file, _ = write("gemma3_text", tmp_path)
    model = load(file, max_position_embeddings=99, pooling="last_k", attn_implementation="eager", dtype="bfloat16")
    assert (model.config.max_position_embeddings, model.config.pooling) == (99, "last_k")
    assert model.model.config._attn_implementation == "eager" and model.dtype == torch.bfloat16
    config = GemmaEncoderConfig.from_pretrained(file, pooling="first_k")
    assert load(file, config=config).config.pooling == "first_k"
    with pytest.raises(ValueError, match="`config` must be a GemmaEncoderConfig"):
        load(file, config=config.text_config)


def test_a_header_that_is_cut_says_so(tmp_path):
    file, _ = write("gemma3_text", tmp_path)
    file.write_bytes(file.read_bytes()[:700])
    with pytest.raises(ValueError, match="cut short"):
        load(file)


def test_a_folder_that_is_called_like_a_file_is_a_folder(tmp_path):
    (tmp_path / "model.gguf").mkdir()
    assert split_gguf(tmp_path / "model.gguf") == (tmp_path / "model.gguf", None)
