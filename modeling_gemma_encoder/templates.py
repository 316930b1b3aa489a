"""How texts become the one text that is read, stated once: in the tokenizer, which is saved with the checkpoint.

After `set_template(tokenizer, pair="Query: {first} Document: {second}")` plain `tokenizer(query, document)` gives the
template's tokens, as pipelines and sentence-transformers call it; truncation takes from the texts, never from the
template.
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
    """Makes `tokenizer(text)` and `tokenizer(first, second)` read these templates, after <bos> where it has one.

    The words of a template become tokens by themselves, without those of the texts: a space before a text is a token
    of its own. Special tokens written in a template are those tokens. A tokenizer that pads with nothing, such as
    Llama's, pads with its end of text: an encoder never sees padding, whatever it is.

    Raises:
        ValueError: a template lacks a field or has one twice, or the tokenizer is no fast one.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None:
        raise ValueError(f"{type(tokenizer).__name__} is no fast tokenizer: its template cannot be set.")
    pieces = {}

    def compile(name: str, template: str, fields: list[str]) -> list[str]:
        parts = re.split(r"(\{\w*\})", template)
        if sorted(parts[1::2]) != sorted(fields):
            raise ValueError(f"`{name}` must contain {' and '.join(fields)} once each, got {template!r}.")
        compiled = [tokenizer.bos_token] if adds_bos else []
        for part in filter(None, parts):
            if part not in FIELDS:
                ids = tokenizer(part, add_special_tokens=False)["input_ids"]
                piece = f"words-{'-'.join(map(str, ids))}"
                pieces[piece] = {"id": piece, "ids": ids, "tokens": tokenizer.convert_ids_to_tokens(ids)}
            compiled.append(FIELDS.get(part) or piece)
        return compiled

    adds_bos = tokenizer.bos_token is not None and tokenizer("")["input_ids"][:1] == [tokenizer.bos_token_id]
    if adds_bos:
        token, number = tokenizer.bos_token, tokenizer.bos_token_id
        pieces[token] = {"id": token, "ids": [number], "tokens": [token]}
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token or tokenizer.convert_ids_to_tokens(0)
    form = {"single": compile("single", single, ["{first}"]), "pair": compile("pair", pair, list(FIELDS))}
    backend.post_processor = TemplateProcessing(**form, special_tokens=list(pieces.values()))
    # With these in its config, a tokenizer that is loaded forgets the template and only adds <bos>.
    for flag in ("add_bos_token", "add_eos_token"):
        tokenizer.init_kwargs.pop(flag, None)
    return tokenizer


def encode_pairs(
    tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]], max_length: int | None = None
) -> list[list[int]]:
    """
    Token ids of (query, document) by the tokenizer's template, documents cut to `max_length` tokens in all.

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
            f"{template}."
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
