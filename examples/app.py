"""Serve a page to try a trained encoder: classify or rerank, and see what tokens attend to and how
they are pooled.

    python examples/app.py --model runs/glue/sst2/seed-1      # http://127.0.0.1:7860
    python examples/app.py --model my-ranker --port 8000

The page needs `pip install ".[app]"` beside what training needs. It listens on this machine only,
unless you give `--host 0.0.0.0`, and sends nothing to other hosts.
"""

import argparse
import os
import threading
from pathlib import Path
from typing import NoReturn

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # before it is imported

import numpy as np
import pandas as pd
import torch
from matplotlib.figure import Figure
from transformers import BatchEncoding, PreTrainedModel, PreTrainedTokenizerBase

from modeling_gemma_encoder import (
    GemmaEncoderConfig,
    GemmaEncoderForRanking,
    GemmaEncoderForSequenceClassification,
)
from modeling_gemma_encoder._scripts.command_line import failing
from modeling_gemma_encoder.ranking.scoring import DTYPE, load_trained, score_pairs

MOST_TOKENS = 80  # of a text that is looked into, as the attention of all layers is kept
EXAMPLES = {
    "text": "A gripping, funny and humane film, and the best of its year.",
    "query": "how do cats purr",
    "documents": "Cats purr by vibrating their larynx.\nThe harbour froze in January.\nDogs bark at strangers.",
}


def refuse(message: str) -> NoReturn:
    """Show the message on the page, and stop what a button does."""
    import gradio

    raise gradio.Error(message)


def load(checkpoint: str, dtype: str = "auto") -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Load a model onto the accelerator if there is one, and its tokenizer; raise ValueError
    without a trained head."""
    kinds = {"classifier": GemmaEncoderForSequenceClassification, "ranker": GemmaEncoderForRanking}
    return load_trained(checkpoint, kinds, dtype, None)


class Page:
    """Do with a model what the buttons of the page ask for."""

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase):
        self.model, self.tokenizer = model, tokenizer
        self.lock = threading.Lock()
        self.longest = min(tokenizer.model_max_length, model.config.max_position_embeddings)

    def encode(self, first: str, second: str, longest: int | None = None) -> BatchEncoding:
        """Return the tokens of a text, or of a pair if the second is not blank, cut to the longest
        the model takes."""
        texts = [first, second] if second.strip() else [first]
        longest = min(self.longest, longest or self.longest)
        with self.lock:  # truncation is a state of the tokenizer, which other threads share
            batch = self.tokenizer(*texts, truncation=True, max_length=longest, return_tensors="pt")
            self.tokenizer.backend_tokenizer.no_truncation()
        return batch.to(self.model.device)

    @torch.no_grad()
    def classify(self, first: str, second: str) -> dict[str, float] | str:
        """Return the share of each label, or the numbers of a regression as text."""
        if not first.strip():
            refuse("There is no text.")
        logits = self.model(**self.encode(first, second)).logits[0].float()
        config = self.model.config
        if config.problem_type == "regression" or len(logits) == 1:
            return ", ".join(f"{value:.3f}" for value in logits.tolist())
        if config.calibration_temperature is not None:
            shares = self.model.probabilities(logits)
        else:
            shares = logits.sigmoid() if config.problem_type == "multi_label_classification" else logits.softmax(-1)
        return {str(config.id2label[label]): share for label, share in enumerate(shares.tolist())}

    def rerank(self, query: str, documents: str) -> pd.DataFrame:
        """Return the documents, each a line, by their scores for the query, the best first."""
        documents = [line.strip() for line in documents.splitlines() if line.strip()]
        if not query.strip() or not documents:
            refuse("Please give a query and at least one document, each on a line of its own.")
        try:
            with self.lock:
                scores = score_pairs(self.model, self.tokenizer, [(query, text) for text in documents], self.longest)
        except ValueError as error:
            refuse(str(error))
        order = np.argsort(-scores, kind="stable")
        rows = [(rank, round(float(scores[i]), 4), documents[i]) for rank, i in enumerate(order, 1)]
        return pd.DataFrame(rows, columns=["rank", "score", "document"])

    @torch.no_grad()
    def look(self, first: str, second: str, layer: int) -> Figure:
        """Draw what tokens attend to in a layer, and their shares in the pooled vector."""
        if not first.strip():
            refuse("There is no text.")
        batch = self.encode(first, second, MOST_TOKENS)
        encoded = self.model.encode(**batch, output_attentions=True)
        shares = self.model.pooler.weights(encoded.token_states, encoded.offsets).float().cpu().numpy()
        attention = encoded.attentions[int(layer) - 1][0].float().mean(0).cpu().numpy()  # (seq_len, seq_len)
        tokens = self.tokenizer.convert_ids_to_tokens(batch["input_ids"][0].tolist())
        return draw(tokens, attention, shares, int(layer), self.model.config)


def draw(
    tokens: list[str], attention: np.ndarray, shares: np.ndarray, layer: int, config: GemmaEncoderConfig
) -> Figure:
    """Draw shares in the pooled vector as bars (seq_len,), above a layer's attention (seq_len,
    seq_len).

    The attention is the mean over heads. Its square root is drawn, so that small values can be
    seen.
    """
    shown = len(tokens)
    names = [token.replace("▁", "·").replace("$", r"\$") for token in tokens]
    side = max(5.0, 0.22 * shown)
    figure = Figure(figsize=(side + 1, side + 2), layout="constrained")
    above, below = figure.subplots(2, 1, height_ratios=[1, 4], sharex=True)
    above.bar(range(shown), shares, color="C0")
    above.set(ylabel="share", title=f"Pooling: {config.pooling}")
    below.imshow(attention**0.5, cmap="Blues", vmin=0, aspect="auto")
    below.set(title=f"Layer {layer} of {config.num_hidden_layers}, mean of heads: a row attends to columns (root)")
    below.set_xticks(range(shown), names, rotation=90)
    below.set_yticks(range(shown), names)
    return figure


def build(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str):
    """Build the page, a `gradio.Blocks` with a tab for the model's head and one to look inside."""
    import gradio

    page, config = Page(model, tokenizer), model.config
    ranks = isinstance(model, GemmaEncoderForRanking)
    with gradio.Blocks(title=f"Gemma Encoder: {name}") as blocks:
        gradio.Markdown(
            f"# {name}\n{type(model).__name__} over {config.text_config.model_type}, {config.attention}, "
            f"pooling {config.pooling}, {config.num_hidden_layers} layers, texts of up to {page.longest} tokens"
        )
        if ranks:
            add_rerank_tab(page)
            texts = {"Query": EXAMPLES["query"], "Document": EXAMPLES["documents"].splitlines()[0]}
        else:
            add_classify_tab(page)
            texts = {"Text": EXAMPLES["text"], "Second text": ""}
        add_look_tab(page, texts)
    return blocks


def add_rerank_tab(page: Page) -> None:
    """Add a tab that ranks documents for a query."""
    import gradio

    with gradio.Tab("Rerank"):
        query = gradio.Textbox(EXAMPLES["query"], label="Query")
        documents = gradio.Textbox(EXAMPLES["documents"], label="Documents, one a line", lines=6)
        button = gradio.Button("Rerank", variant="primary")
        table = gradio.Dataframe(headers=["rank", "score", "document"], label="Best first", wrap=True)
        button.click(page.rerank, [query, documents], table, api_name="rerank")


def add_classify_tab(page: Page) -> None:
    """Add a tab that classifies a text, or a pair of them."""
    import gradio

    calibrated = page.model.config.calibration_temperature is not None
    with gradio.Tab("Classify"):
        first = gradio.Textbox(EXAMPLES["text"], label="Text", lines=3)
        second = gradio.Textbox("", label="Second text, for pairs", lines=2)
        button = gradio.Button("Classify", variant="primary")
        label = gradio.Label(label="Prediction, calibrated" if calibrated else "Prediction, not calibrated")
        button.click(page.classify, [first, second], label, api_name="classify")


def add_look_tab(page: Page, texts: dict[str, str]) -> None:
    """Add a tab that draws attention and pooling of two texts, which are given with their labels."""
    import gradio

    layers = page.model.config.num_hidden_layers
    with gradio.Tab("Look inside"):
        pair = [gradio.Textbox(text, label=name, lines=2) for name, text in texts.items()]
        layer = gradio.Slider(1, layers, layers, step=1, label="Layer")
        button = gradio.Button("Look", variant="primary")
        plot = gradio.Plot(label="Pooling and attention")
        button.click(page.look, [*pair, layer], plot, api_name="look")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", required=True, help="A trained classifier or ranker: a folder, or a repository on the Hub."
    )
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=None, help="Default: the first free one from 7860 on.")
    parser.add_argument("--dtype", choices=("auto", "float32", "bfloat16"), default="auto", help=DTYPE["help"])
    args = parser.parse_args()
    import gradio  # takes seconds, which --help need not

    with failing(parser):
        model, tokenizer = load(args.model, args.dtype)
    font = ["system-ui", "sans-serif"]  # the default's would be fetched
    theme = gradio.themes.Default(font=font, font_mono=["ui-monospace", "monospace"])
    blocks = build(model, tokenizer, "/".join(Path(args.model).parts[-2:]))
    blocks.launch(server_name=args.host, server_port=args.port, theme=theme, footer_links=[], share=False)


if __name__ == "__main__":
    main()
