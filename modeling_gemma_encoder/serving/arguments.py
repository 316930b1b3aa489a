"""Options of a server."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from transformers import AutoTokenizer, PreTrainedTokenizerBase

from ..configuration_gemma_encoder import GemmaEncoderConfig
from ..modeling_gemma_encoder import GemmaEncoderForRanking, GemmaEncoderForSequenceClassification
from ..ranking.scoring import ScoringArguments, choose, default_tokens_per_batch, load_trained, most_tokens
from .description import Description
from .engine import Engine
from .metrics import Metrics

KINDS = {"classifier": GemmaEncoderForSequenceClassification, "ranker": GemmaEncoderForRanking}


@dataclass(kw_only=True)
class ServingArguments(ScoringArguments):
    """Options of what is served, where, and to how many."""

    COUNTS: ClassVar = (
        *ScoringArguments.COUNTS,
        *("max_concurrent_requests", "max_client_batch_size", "max_body_bytes", "max_waiting_tokens"),
        *("request_seconds", "body_seconds", "drain_seconds", "replicas", "max_replicas"),
    )

    model: str = field(metadata={"help": "A trained classifier or reranker: a folder, or a repository on the Hub."})
    host: str = field(default="127.0.0.1", metadata={"help": "0.0.0.0 listens on all of the machine's addresses."})
    port: int = field(default=8080, metadata={"help": "0: any free one, which is printed."})
    token_file: str | None = field(
        default=None,
        metadata={"help": "A file with the token that requests must send. Or set the variable SERVE_TOKEN."},
    )
    auto_truncate: bool = field(
        default=True, metadata={"help": "Whether texts with too many tokens are cut or refused, unless a request says."}
    )
    max_concurrent_requests: int = field(default=512, metadata={"help": "More at a time are answered with 429."})
    max_client_batch_size: int = field(default=1000, metadata={"help": "The most texts of a request."})
    max_body_bytes: int = field(default=2_000_000, metadata={"help": "The most bytes of a request."})
    max_waiting_tokens: int = field(
        default=1_000_000, metadata={"help": "While more than this wait, requests are answered with 429."}
    )
    request_seconds: float = field(default=60.0, metadata={"help": "How long a request may take."})
    body_seconds: float = field(default=10.0, metadata={"help": "How long a request may take to arrive."})
    drain_seconds: int = field(default=60, metadata={"help": "How long open requests have after SIGTERM or Ctrl-C."})
    replicas: int | None = field(
        default=None, metadata={"help": "Serve on Ray with so many processes, each with the model."}
    )
    max_replicas: int | None = field(default=None, metadata={"help": "Add processes under load, up to so many."})
    ray_address: str | None = field(
        default=None,
        metadata={"help": "The Ray cluster to serve on, or auto. Default: one of its own here."},
    )
    cpus_per_replica: float = field(default=1.0, metadata={"help": "Cores of each process, and its threads."})
    gpus_per_replica: float = field(default=0.0, metadata={"help": "1 where there are GPUs."})

    def validate(self) -> None:
        """Raise ValueError if an option has an impossible value or contradicts another."""
        super().validate()
        if self.replicas is None and self.ray_address is not None:
            self.replicas = 1
        if self.replicas is None and self.max_replicas is not None:
            raise ValueError("--max_replicas needs --replicas, which serves on Ray.")
        if self.max_replicas is not None and self.max_replicas < self.replicas:
            raise ValueError(f"--max_replicas {self.max_replicas} is less than --replicas {self.replicas}.")
        if self.replicas is not None and self.device is not None:
            raise ValueError("--device does nothing on Ray; replicas have the GPUs of --gpus_per_replica, or none.")
        if not 0 <= self.port < 65536:
            raise ValueError(f"--port must be from 0 to 65535; got {self.port}.")
        if self.replicas is not None and self.port == 0:
            raise ValueError("--port 0 does nothing on Ray; name a port.")
        if self.replicas is not None and Path(self.model).exists():
            self.model = str(Path(self.model).absolute())  # workers have folders of their own
        self.token()

    def token(self) -> str | None:
        """Return the token that requests must send; raise ValueError if it is empty."""
        token = os.environ.get("SERVE_TOKEN")
        if self.token_file is not None:
            token = Path(self.token_file).read_text()
        if token is not None and not token.strip():
            raise ValueError("The token is empty. Write one to --token_file, or unset SERVE_TOKEN.")
        return token and token.strip()

    def limits(self) -> dict[str, Any]:
        """Return the arguments of `Gate`."""
        return {
            "max_concurrent_requests": self.max_concurrent_requests,
            "max_body_bytes": self.max_body_bytes,
            "body_seconds": self.body_seconds,
            "token": self.token(),
        }


def describe(args: ServingArguments, config: GemmaEncoderConfig, tokenizer: PreTrainedTokenizerBase) -> Description:
    """Return what is served. Raise ValueError if there is no trained head."""
    architecture = config.architectures[0] if config.architectures else None
    if architecture not in {cls.__name__ for cls in KINDS.values()}:
        raise ValueError(f"{args.model} is not a trained {' or '.join(KINDS)}.")
    dtype, device = choose(args.dtype, "cpu" if args.replicas and not args.gpus_per_replica else args.device)
    return Description(
        model=args.model,
        config=config,
        ranks=architecture == GemmaEncoderForRanking.__name__,
        dtype=dtype,
        device=str(device).partition(":")[0],
        max_length=most_tokens(config, tokenizer, args.max_length),
        tokens_per_batch=args.tokens_per_batch or default_tokens_per_batch(device),
        max_client_batch_size=args.max_client_batch_size,
        request_seconds=args.request_seconds,
        auto_truncate=args.auto_truncate,
    )


def describe_unloaded(args: ServingArguments) -> Description:
    """Return what is served, without loading the weights."""
    tokenizer = AutoTokenizer.from_pretrained(args.model, trust_remote_code=False)
    return describe(args, GemmaEncoderConfig.from_pretrained(args.model), tokenizer)


def load_engine(args: ServingArguments, metrics: Metrics) -> tuple[Engine, Description]:
    """Load the model, and return what scores with it and its description."""
    # By default oneDNN keeps what it compiled for the last 1,024 sizes; here every batch has its
    # own. It reads this at its first product.
    os.environ.setdefault("ONEDNN_PRIMITIVE_CACHE_CAPACITY", "64")
    model, tokenizer = load_trained(args.model, KINDS, args.dtype, args.device)
    engine = Engine(model, tokenizer, args.max_length, args.tokens_per_batch, args.max_waiting_tokens, metrics)
    return engine, describe(args, model.config, tokenizer)
