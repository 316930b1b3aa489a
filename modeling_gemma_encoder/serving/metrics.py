"""What a server counts and times, for Prometheus, by the names of Text Embeddings Inference."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, disable_created_metrics, generate_latest

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10, 30, 60)
COUNTS = tuple(2**power for power in range(16))


class Metrics:
    """Count requests, and time what they wait for."""

    def __init__(self):
        disable_created_metrics()  # times of creation beside each count
        self.registry = CollectorRegistry()
        counter = {"registry": self.registry}
        self.count = Counter("te_request_count", "Requests for scores.", ["method"], **counter)
        self.success = Counter("te_request_success", "Requests that were answered.", ["method"], **counter)
        self.failure = Counter("te_request_failure", "Requests that were refused or failed.", ["err"], **counter)
        self.queue_size = Gauge("te_queue_size", "Requests that wait for scores, or are in a batch.", **counter)
        times = {"duration": "Seconds of a request.", "tokenization_duration": "Seconds to make tokens."}
        times |= {"queue_duration": "Seconds until its first batch.", "inference_duration": "Seconds of its batches."}
        self.times = {
            name: Histogram(f"te_request_{name}", text, buckets=SECONDS, **counter) for name, text in times.items()
        }
        self.batch_size = Histogram("te_batch_next_size", "Sequences of a batch.", buckets=COUNTS, **counter)
        self.batch_tokens = Histogram("te_batch_next_tokens", "Tokens of a batch.", buckets=COUNTS, **counter)

    def batch(self, rows: int, tokens: int) -> None:
        """Note a batch that begins."""
        self.batch_size.observe(rows)
        self.batch_tokens.observe(tokens)

    def answered(self, method: str, **seconds: float) -> None:
        """Note a request that was answered, with the seconds of `times`."""
        self.success.labels(method).inc()
        for name, value in seconds.items():
            self.times[name].observe(value)

    def text(self) -> bytes:
        """Return everything in Prometheus' text format. Counters have no `_total`, as Text
        Embeddings Inference names them."""
        return generate_latest(self.registry).replace(b"_total", b"")
