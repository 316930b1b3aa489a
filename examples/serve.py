r"""Serve a trained reranker or classifier over HTTP, to clients of Text Embeddings Inference, Jina and
Cohere.

    python examples/serve.py --model my-ranker                 # http://127.0.0.1:8080, its page is /docs
    python examples/serve.py --model my-ranker --replicas 4    # on Ray Serve, four processes
    curl localhost:8080/rerank -H "Content-Type: application/json" \
        -d '{"query": "how do cats purr", "texts": ["They vibrate.", "Dogs bark."]}'

Rerankers answer `/rerank`, `/v1/rerank` and `/v2/rerank`, classifiers `/predict`; `/info` says what
is served, `/health` whether it works, and `/metrics` how it fares. Requests that wait are scored
together, and a score does not depend on what it is computed with. See docs/serving.md.

It needs `pip install ".[serve]"`, and for `--replicas` also `".[ray]"`. It listens on this machine
only, unless you give `--host 0.0.0.0`. After SIGTERM or Ctrl-C it answers the requests that it has.
Where the package is installed, `python -m modeling_gemma_encoder.serving` is the same command.
"""

from modeling_gemma_encoder.serving.__main__ import main

if __name__ == "__main__":
    main(__doc__)
