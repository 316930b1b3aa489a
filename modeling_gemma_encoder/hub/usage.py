"""Write the code of a card's "Use" section: a snippet that runs as it is, for each kind of model."""

from dataclasses import dataclass
from string import Template

PINNED = 'pinned = {"revision": "$revision", "trust_remote_code": True}'

ADAPTER = """\
from transformers import AutoTokenizer

from modeling_gemma_encoder import $architecture  # pip install the package gemma-encoder

pinned = {"revision": "$revision"}
tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = $architecture.from_pretrained("$repo_id", **pinned).eval()"""

RANKER = f"""\
from sentence_transformers import CrossEncoder  # pip install sentence-transformers

{PINNED}
ranker = CrossEncoder("$repo_id", **pinned)
ranker.rank("how do cats purr", ["They vibrate their larynx.", "Dogs bark."])

# or with transformers alone
from transformers import AutoModelForSequenceClassification, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = AutoModelForSequenceClassification.from_pretrained("$repo_id", **pinned).eval()
batch = tokenizer(["how do cats purr"], ["They vibrate their larynx."], return_tensors="pt")
scores = model(**batch).logits  # higher is more relevant"""

REGRESSOR = f"""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer

{PINNED}
tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = AutoModelForSequenceClassification.from_pretrained("$repo_id", **pinned).eval()
batch = tokenizer($batch, truncation=True, return_tensors="pt")
numbers = model(**batch).logits  # (texts, numbers of each)"""

CLASSIFIER = f"""\
from transformers import AutoModelForSequenceClassification, AutoTokenizer, pipeline

{PINNED}
classify = pipeline("text-classification", "$repo_id", **pinned)
classify($text, truncation=True)

# or
tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = AutoModelForSequenceClassification.from_pretrained("$repo_id", **pinned).eval()"""

MASKED_LM = f"""\
from transformers import AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer

{PINNED}
tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = AutoModelForMaskedLM.from_pretrained("$repo_id", **pinned).eval()

# to be fine-tuned
model = AutoModelForSequenceClassification.from_pretrained("$repo_id", **pinned, num_labels=2)"""

ENCODER = f"""\
from transformers import AutoModel, AutoTokenizer

{PINNED}
tokenizer = AutoTokenizer.from_pretrained("$repo_id", **pinned)
model = AutoModel.from_pretrained("$repo_id", **pinned).eval()"""

SNIPPETS = {
    "GemmaEncoderForRanking": RANKER,
    "GemmaEncoderForSequenceClassification": CLASSIFIER,
    "GemmaEncoderForMaskedLM": MASKED_LM,
    "GemmaEncoderModel": ENCODER,
}


@dataclass(frozen=True)
class Usage:
    """Hold what decides how a published model is loaded and called."""

    repo_id: str
    architecture: str  # name of the model's class
    adapter: bool = False
    regressor: bool = False
    pairs: bool = False  # whether it reads pairs of texts

    def snippet(self, revision: str | None) -> str:
        """Return code that loads the model at a commit and calls it."""
        code = SNIPPETS[self.architecture]
        if self.adapter:
            code = ADAPTER
        elif self.regressor:
            code = REGRESSOR
        return Template(code).substitute(
            repo_id=self.repo_id,
            revision=revision or "<commit>",
            architecture=self.architecture,
            text='{"text": "A first text.", "text_pair": "A second one."}' if self.pairs else '"A text."',
            batch='["A first text."], ["A second one."]' if self.pairs else '["A text."]',
        )
