"""Texts that are too long: which tokens are cut, and which parts of a text are never cut."""

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase


def mark(text: str, *spans: tuple[int, int]) -> tuple[str, tuple[int, int]]:
    """Return a text with square brackets around its spans, and the part of it that has all of them.

    Args:
        spans: The first character of each, and the one after its last.

    Raises:
        ValueError: A span is empty or outside of the text.
    """
    if wrong := [span for span in spans if not 0 <= span[0] < span[1] <= len(text)]:
        raise ValueError(f"The span {wrong[0]} is empty or outside of {text!r}, which has {len(text)} characters.")
    marks = sorted([(start, 1, "[ ") for start, _ in spans] + [(end, 0, " ]") for _, end in spans])
    marked, last = "", 0
    for place, _, bracket in marks:
        marked += text[last:place] + bracket
        last = place
    return marked + text[last:], (marks[0][0], len(marked))


def truncate(
    tokenizer: PreTrainedTokenizerBase,
    first: str,
    second: str | None,
    max_length: int,
    keep: dict[str, tuple[int, int]],
) -> list[int]:
    """Return the token ids of one or two texts, cut to `max_length` without ever cutting what is in `keep`.

    Without a part to keep it is `tokenizer(first, second, truncation=True, max_length=max_length)`: the longer text is
    cut first, down to the length of the other. A text with a part to keep is cut at both ends.

    Args:
        keep: The part to keep of "first" and "second": its first character, and the one after its last.

    Raises:
        ValueError: What is to be kept does not fit.
    """
    backend = tokenizer.backend_tokenizer
    backend.no_truncation()
    backend.no_padding()
    texts = {"first": first, **({} if second is None else {"second": second})}
    encodings = {name: backend.encode(text, add_special_tokens=False) for name, text in texts.items()}
    room = max_length - backend.num_special_tokens_to_add(second is not None)
    shares = share(room, [len(encoding) for encoding in encodings.values()])
    for (name, encoding), length in zip(encodings.items(), shares, strict=True):
        start, end = kept_tokens(encoding, keep.get(name))
        if end - start > length:
            raise ValueError(
                f"{texts[name]!r}: its marked part takes {end - start} tokens, of which {length} fit into the "
                f"{max_length} that are read. Raise --max_length, if the decoder has more positions."
            )
        spare = length - (end - start)
        begin = max(0, start - spare // 2)
        stop = min(len(encoding), begin + length)
        encoding.truncate(stop, direction="right")
        encoding.truncate(min(length, stop), direction="left")
    return backend.post_process(encodings["first"], encodings.get("second"), add_special_tokens=True).ids


def share(room: int, lengths: Sequence[int]) -> list[int]:
    """Return how many tokens of one or two texts fit into `room`. The longer text is cut first."""
    if sum(lengths) <= room:
        return list(lengths)
    if len(lengths) == 1:
        return [room]
    shorter = min(*lengths, room // 2)
    return [shorter, room - shorter] if lengths[0] <= lengths[1] else [room - shorter, shorter]


def kept_tokens(encoding, characters: tuple[int, int] | None) -> tuple[int, int]:
    """Return the first token of a span of characters, and the one after its last."""
    if characters is None:
        return 0, 0
    start, end = characters
    inside = [i for i, (left, right) in enumerate(encoding.offsets) if left < end and right > start]
    return inside[0], inside[-1] + 1
