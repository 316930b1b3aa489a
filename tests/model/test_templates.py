"""Laws of templates: plain tokenizer calls read them, truncation spares them, and they come back with the tokenizer."""

import pytest
from helpers import NANO
from transformers import AutoTokenizer

from modeling_gemma_encoder.templates import set_template

RANKING = "Query: {first} Document: {second}"


@pytest.fixture
def tokenizer():
    return AutoTokenizer.from_pretrained(NANO)


def test_a_pair_reads_as_its_template(tokenizer):
    set_template(tokenizer, pair=RANKING)
    ids = tokenizer("rain", "It rains a lot.")["input_ids"]
    assert tokenizer.decode(ids) == "<bos>Query: rain Document: It rains a lot."
    assert tokenizer("rain")["input_ids"] == AutoTokenizer.from_pretrained(NANO)("rain")["input_ids"]
    set_template(tokenizer, single="Text: {first}", pair="{second}\n{first}")
    assert tokenizer.decode(tokenizer("a")["input_ids"]) == "<bos>Text: a"
    assert tokenizer.decode(tokenizer("a", "b")["input_ids"]) == "<bos>b\na"


@pytest.mark.parametrize("strategy", ["longest_first", "only_second"])
def test_truncation_spares_the_template(tokenizer, strategy):
    set_template(tokenizer, pair=RANKING)
    rows = tokenizer(["a query"], ["word " * 50], truncation=strategy, max_length=20, padding="max_length")
    text = tokenizer.decode(rows["input_ids"][0])
    assert text.startswith("<bos>Query: a query Document: word word") and len(rows["input_ids"][0]) == 20


@pytest.mark.parametrize("add_bos", [None, True])
def test_a_saved_tokenizer_has_its_template(tokenizer, add_bos, tmp_path):
    if add_bos:  # as Google's checkpoints are
        tokenizer = AutoTokenizer.from_pretrained(NANO, add_bos_token=True)
    set_template(tokenizer, pair=RANKING)
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    pair = ("rain", "It rains. <mask>")
    assert again(*pair)["input_ids"] == tokenizer(*pair)["input_ids"]
    assert again.decode(again(*pair)["input_ids"]) == "<bos>Query: rain Document: It rains. <mask>"


@pytest.mark.parametrize(
    "template", ["Query: {first}", "{first} {second} {second}", "{first} {second} {third}", "{} {}"]
)
def test_bad_templates_are_named(tokenizer, template):
    with pytest.raises(ValueError, match=r"`pair` must contain \{first\} and \{second\} once each"):
        set_template(tokenizer, pair=template)


def test_a_tokenizer_without_padding_pads_with_its_end(tmp_path):
    """As Llama's come; which token pads cannot matter to an encoder."""
    tokenizer = AutoTokenizer.from_pretrained(NANO)
    tokenizer.pad_token = None
    set_template(tokenizer).save_pretrained(tmp_path)
    batch = AutoTokenizer.from_pretrained(tmp_path)(["a b c", "a"], padding=True)
    assert (batch["input_ids"][1][0], batch["attention_mask"][1][0]) == (tokenizer.eos_token_id, 0)  # on the left
