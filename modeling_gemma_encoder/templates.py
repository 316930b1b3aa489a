"""Templates that join texts into the one text an encoder reads. They are kept in the tokenizer, and
saved with it.

After `set_template(tokenizer, pair="Query: {first} Document: {second}")`, a plain `tokenizer(query,
document)` returns the tokens of the filled template, as pipelines and sentence-transformers call
it. Truncation shortens the texts, never the template.
"""

import re
from collections.abc import Sequence

from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerBase

FIELDS = {"{first}": "$A", "{second}": "$B"}
RANKING_TEMPLATE = "Query: {first} Document: {second}"  # RankT5, arXiv 2210.10634, section 3


def set_template(
    tokenizer: PreTrainedTokenizerBase, single: str = "{first}", pair: str = "{first}\n{second}"
) -> PreTrainedTokenizerBase:
    """Have `tokenizer(text)` and `tokenizer(first, second)` fill these templates, after <bos> if
    the tokenizer adds one.

    The words of a template become tokens by themselves, apart from the texts, so that a space
    before a text is a token of its own. Special tokens that are written in a template are those
    tokens. A tokenizer without a padding token, such as Llama's, pads with its end of text, since
    an encoder never sees padding.

    Raises:
        ValueError: a template lacks a field or has one twice, or the tokenizer is not a fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(
            f"`tokenizer` must be a fast tokenizer; got {type(tokenizer).__name__}, whose template cannot be set."
        )
    parts = {"single": split_template("single", single), "pair": split_template("pair", pair)}
    words = [part for part in dict.fromkeys([*parts["single"], *parts["pair"]]) if part not in FIELDS]
    pieces = {part: piece_of(tokenizer, part) for part in words}
    names = {**FIELDS, **{part: piece["id"] for part, piece in pieces.items()}}
    form = {kind: [names[part] for part in template] for kind, template in parts.items()}
    special = {piece["id"]: piece for piece in pieces.values()}  # different words may have the same tokens
    bos, number = tokenizer.bos_token, tokenizer.bos_token_id
    if bos is not None and tokenizer("")["input_ids"][:1] == [number]:
        form = {kind: [bos, *names] for kind, names in form.items()}
        special[bos] = {"id": bos, "ids": [number], "tokens": [bos]}
    backend.post_processor = TemplateProcessing(**form, special_tokens=list(special.values()))
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    # With these in its config, a tokenizer that is loaded forgets the template and only adds <bos>.
    for flag in ("add_bos_token", "add_eos_token"):
        tokenizer.init_kwargs.pop(flag, None)
    return tokenizer


def split_template(kind: str, template: str) -> list[str]:
    """Return the fields and the words between them, in order. Raise ValueError unless each field is
    there once."""
    fields = list(FIELDS)[: 1 if kind == "single" else 2]
    parts = re.split(r"(\{\w*\})", template)
    if sorted(parts[1::2]) != sorted(fields):
        raise ValueError(f"`{kind}` must contain {' and '.join(fields)} once each, got {template!r}.")
    return [part for part in parts if part]


def piece_of(tokenizer: PreTrainedTokenizerBase, words: str) -> dict:
    """Return the tokens of a template's words, as `TemplateProcessing` takes them."""
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    return {"id": f"words-{'-'.join(map(str, ids))}", "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int | None = None
) -> list[list[int]]:
    """
    Return the token ids of pairs (query, document) in the tokenizer's template.

    Args:
        max_length: Number of tokens of a pair, template included, to which documents are cut.

    Raises:
        ValueError: a query leaves no room for its document.
    """
    if not pairs:
        return []
    queries, documents = map(list, zip(*pairs, strict=True))
    cut = {} if max_length is None else {"truncation": "only_second", "max_length": max_length}
    error, backend = None, tokenizer.backend_tokenizer
    template = tokenizer.num_special_tokens_to_add(pair=True)
    if max_length is not None and max_length <= template + 1:
        raise ValueError(
            f"`max_length` of {max_length} tokens leaves no room for a query and a document beside the template's "
            f"{template} tokens. Raise it."
        )
    try:
        ids = tokenizer(queries, documents, return_attention_mask=False, verbose=False, **cut)["input_ids"]
    except Exception as problem:  # the tokenizers library has no kinds of errors
        error = problem
    backend.no_truncation()  # or the tokenizer would be saved with this call's
    if error is None:
        return ids
    alone = tokenizer(queries, [""] * len(queries), return_attention_mask=False, verbose=False)["input_ids"]
    needed, longest = max(zip(map(len, alone), queries, strict=True))
    if max_length is None or needed < max_length:
        raise error
    raise ValueError(
        f"`max_length` of {max_length} tokens leaves no room for a document after the query {longest!r}, which takes "
        f"{needed} with the template. Raise it, or shorten the query."
    ) from error
