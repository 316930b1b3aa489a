"""The bodies of requests and answers, as their documentation has them.

Text Embeddings Inference (TEI): https://huggingface.github.io/text-embeddings-inference. Jina:
https://api.jina.ai/redoc. Cohere: https://docs.cohere.com/reference/rerank. Fields that are not
here are ignored.
"""

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag, field_validator

Side = Annotated[
    Literal["left", "right"], BeforeValidator(lambda side: side.lower() if isinstance(side, str) else side)
]


# Names of the two forms of `/rerank`, which are in the places of errors.
FORMS = ("with texts", "with documents")


def check_unicode(text: str) -> str:
    """Return a text. Raise ValueError if it has half of a surrogate pair, which JSON can have."""
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError("has half of a surrogate pair, which is no character") from None
    return text


Text = Annotated[str, AfterValidator(check_unicode)]


class Truncating(BaseModel):
    """Fields of TEI that say what happens to texts with too many tokens."""

    truncate: bool | None = Field(None, description="Cut texts that are too long, or refuse them. Default: as served.")
    truncation_direction: Side = Field("right", description="Which end of a text is cut.")


class RerankRequest(Truncating):
    """Ask TEI's `/rerank` for the scores of texts for a query."""

    query: Text
    texts: list[Text]
    raw_scores: bool = Field(False, description="Logits, also where the model has calibrated probabilities.")
    return_text: bool = False


class Rank(BaseModel):
    """Say which text has which score."""

    index: int
    text: str | None = None
    score: float


class Parameters(BaseModel):
    """Hold the parameters of the Inference API's text classification."""

    top_k: int | None = Field(None, ge=1, description="How many labels to return. Default: all.")
    function_to_apply: Literal["sigmoid", "softmax", "none"] | None = None


class PredictRequest(Truncating):
    """Ask TEI's `/predict` for the scores of labels. With `parameters`, it is a request of the
    Inference API."""

    inputs: Text | list[Text | list[Text]] = Field(
        description="A text; a pair [text, text]; or a batch [[text], [text, text], ...]."
    )
    raw_scores: bool = Field(False, description="Logits instead of probabilities.")
    parameters: Parameters | None = None

    @field_validator("inputs")
    @classmethod
    def check(cls, inputs):
        """Raise ValueError for lists that are neither a pair nor a batch."""
        sequences = inputs if isinstance(inputs, list) and inputs and isinstance(inputs[0], list) else [inputs]
        for sequence in sequences:
            if isinstance(sequence, list) and not (
                1 <= len(sequence) <= 2 and all(isinstance(text, str) for text in sequence)
            ):
                raise ValueError("must be a text, a pair [text, text], or a batch [[text], [text, text], ...]")
            if len(sequences) > 1 and isinstance(sequence, str):
                raise ValueError("a batch must be lists, [[text], [text, text], ...]")
        return inputs

    @property
    def is_batch(self) -> bool:
        return isinstance(self.inputs, list) and isinstance(self.inputs[0], list)

    @property
    def sequences(self) -> list[tuple[str, str | None]]:
        """Return the texts and pairs of the request."""
        several = self.inputs if self.is_batch else [self.inputs]
        lists = [[one] if isinstance(one, str) else one for one in several]
        return [(one[0], one[1] if len(one) == 2 else None) for one in lists]


class Prediction(BaseModel):
    """Say which label has which score."""

    score: float
    label: str


class TextDocument(BaseModel):
    """Hold a document as an object."""

    text: Text


class DocumentsRequest(BaseModel):
    """Ask `/v1/rerank` of Jina and Cohere, or Cohere's `/v2/rerank`, for the scores of documents."""

    model: str | None = Field(None, description="Any name: there is one model, which the answer names.")
    query: Text | TextDocument
    documents: list[Text | TextDocument]
    top_n: int | None = Field(None, ge=1, description="How many to return. Default: all.")
    return_documents: bool = True
    max_tokens_per_doc: int | None = Field(None, ge=1, description="Tokens to which each document is cut first.")
    rank_fields: list[Literal["text"]] | None = Field(None, description="Documents have no other fields.")

    @property
    def question(self) -> str:
        return self.query if isinstance(self.query, str) else self.query.text

    @property
    def texts(self) -> list[str]:
        return [one if isinstance(one, str) else one.text for one in self.documents]


class DocumentRank(BaseModel):
    """Say which document has which score."""

    index: int
    relevance_score: float
    document: TextDocument | None = None


class DocumentsResponse(BaseModel):
    """Hold the documents in order, the best first."""

    id: str
    model: str
    results: list[DocumentRank]
    usage: dict[str, int]
    meta: dict[str, Any]


def form_of(body: Any) -> str:
    """Return which of the two forms of `/rerank` a body has."""
    has_documents = "documents" in body if isinstance(body, dict) else isinstance(body, DocumentsRequest)
    return FORMS[has_documents]


EitherRequest = Annotated[
    Annotated[RerankRequest, Tag(FORMS[0])] | Annotated[DocumentsRequest, Tag(FORMS[1])], Discriminator(form_of)
]


class ErrorResponse(BaseModel):
    """Say what is wrong. `message` and `detail` are where clients of Cohere and Jina look for it."""

    error: str
    error_type: str
    message: str
    detail: str
