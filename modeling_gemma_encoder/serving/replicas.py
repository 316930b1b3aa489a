"""The same application on a Ray cluster: processes that answer HTTP, and replicas of the model.

If a replica dies, Ray starts another, and the requests that it had are scored by others: scores do
not depend on who computes them, so that a request can be sent twice.
"""

import asyncio
from typing import Any

import torch
from ray import serve
from ray.exceptions import ActorUnavailableError, RayActorError
from ray.serve.exceptions import RayServeException

from .app import Service, create_app
from .arguments import ServingArguments, describe_unloaded, load_engine
from .engine import Cut, Scored, Texts
from .errors import Late, RequestError, Unhealthy, Unscorable
from .metrics import Metrics

NAME, SCORER = "gemma-encoder", "Scorer"
ATTEMPTS = 20
MOST_DEATHS = 3  # a request that kills replicas is not sent to all of them


class Scorer:
    """Hold the model in a process of its own, and score what the front sends."""

    def __init__(self, args: ServingArguments):
        if args.gpus_per_replica == 0:
            torch.set_num_threads(max(1, int(args.cpus_per_replica)))
            args.device = "cpu"
        self.engine, _ = load_engine(args, Metrics())

    async def score(self, texts: Texts, cut: Cut, seconds: float | None) -> Scored | RequestError:
        """Return the logits of texts, or the error, as raised ones travel with a traceback."""
        try:
            return await self.engine.score(texts, cut, seconds)
        except RequestError as error:
            return error

    async def queue_size(self) -> int:
        return await self.engine.queue_size()

    async def check_health(self) -> None:
        """Raise if nothing scores any more, so that Ray replaces this process."""
        if not await self.engine.healthy():
            raise RuntimeError("The model does not score.")


class Replicas:
    """Score with the replicas of the model on a Ray cluster."""

    async def score(self, texts: Texts, cut: Cut, seconds: float | None) -> Scored:
        """Return the logits of texts, from another replica if one dies."""
        try:
            result = await asyncio.wait_for(self._score(texts, cut, seconds), seconds)
        except asyncio.TimeoutError:
            raise Late(f"There was no answer within {seconds:g} s.") from None
        if isinstance(result, RequestError):
            raise result
        return result

    async def _score(self, texts: Texts, cut: Cut, seconds: float | None) -> Scored | RequestError:
        deaths = 0
        for attempt in range(ATTEMPTS):
            response = self.handle.score.remote(texts, cut, seconds)
            try:
                return await response
            except asyncio.CancelledError:
                response.cancel()
                raise
            except (RayActorError, RayServeException) as error:
                deaths += isinstance(error, RayActorError) and not isinstance(error, ActorUnavailableError)
                if deaths == MOST_DEATHS:
                    raise Unscorable(f"{deaths} replicas died while they scored this request.") from error
                await asyncio.sleep(min(1.0, 0.05 * 2**attempt))
        raise Unhealthy("Replicas of the model died again and again.")

    @property
    def handle(self):
        return serve.get_deployment_handle(SCORER, app_name=NAME)

    async def healthy(self) -> bool:
        """Return whether a replica answers within five seconds."""
        try:
            await asyncio.wait_for(self._queue_size(), 5)
        except (asyncio.TimeoutError, RayActorError, RayServeException):
            return False
        return True

    async def queue_size(self) -> int:
        """Return how many requests wait at one of the replicas."""
        try:
            return await asyncio.wait_for(self._queue_size(), 5)
        except (asyncio.TimeoutError, RayActorError, RayServeException):
            return 0

    async def _queue_size(self) -> int:
        return await self.handle.queue_size.remote()


def application(args: ServingArguments):
    """Return the Ray Serve application: a front that answers HTTP, and replicas of the model."""
    limits, about = args.limits(), describe_unloaded(args)

    def build():
        metrics = Metrics()
        return create_app(Service(Replicas(), about, metrics), limits)

    ongoing = {"max_ongoing_requests": args.max_concurrent_requests}
    scale: dict[str, Any] = {"num_replicas": args.replicas}
    if args.max_replicas is not None:
        # Under load, each replica should have a handful of requests to batch.
        bounds = {"min_replicas": args.replicas, "max_replicas": args.max_replicas, "target_ongoing_requests": 8}
        scale = {"autoscaling_config": bounds}
    resources = {"num_cpus": args.cpus_per_replica, "num_gpus": args.gpus_per_replica}
    draining = {"graceful_shutdown_timeout_s": args.drain_seconds}
    scorer = serve.deployment(
        name=SCORER, ray_actor_options=resources, health_check_period_s=5, **scale, **ongoing, **draining
    )(Scorer)
    # The front must see more requests than it accepts, to refuse them.
    crowd = {"max_ongoing_requests": 2 * args.max_concurrent_requests, "max_queued_requests": 1000}
    front = serve.deployment(name="Front", ray_actor_options={"num_cpus": 0}, **crowd, **draining)(
        serve.ingress(build)()
    )
    return front.bind(scorer.bind(args))
