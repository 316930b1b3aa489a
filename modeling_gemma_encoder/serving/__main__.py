"""The command line of the server, `python -m modeling_gemma_encoder.serving`; `examples/serve.py` is
the same."""

import os
import signal
import socket
import sys

import uvicorn

from .._scripts.command_line import ScriptParser, failing
from .app import Service, create_app
from .arguments import ServingArguments, load_engine
from .metrics import Metrics

KEEP_ALIVE = 75  # seconds; longer than the 60 of common load balancers
ENDING = "Ending when the open requests are answered."


def announce(args: ServingArguments, port: int) -> None:
    """Print where the server is."""
    host = "127.0.0.1" if args.host in ("0.0.0.0", "::") else args.host  # nosec B104
    print(f"Serving {args.model} at http://{host}:{port}, with its page at /docs", flush=True)


def bind(args: ServingArguments) -> socket.socket:
    """Return a socket on the port, or raise ValueError if it is taken."""
    family = socket.AF_INET6 if ":" in args.host else socket.AF_INET
    found = socket.socket(family, socket.SOCK_STREAM)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        found.bind((args.host, args.port))
    except OSError as error:
        raise ValueError(f"--host {args.host} --port {args.port}: {error.strerror}.") from error
    return found


class Server(uvicorn.Server):
    """Say why the process does not end at once."""

    def handle_exit(self, sig: int, frame) -> None:
        if self.server_state.tasks and not self.should_exit:
            print(ENDING, flush=True)
        super().handle_exit(sig, frame)


def serve_here(args: ServingArguments, parser: ScriptParser) -> None:
    """Serve in this process until it is told to end."""
    with failing(parser):
        listening, metrics = bind(args), Metrics()
        engine, about = load_engine(args, metrics)
        app = create_app(Service(engine, about, metrics), args.limits(), engine.close)
    sys.setswitchinterval(1e-4)  # the model's thread waits less for the one that answers
    config = uvicorn.Config(
        app,
        log_level="warning",
        timeout_graceful_shutdown=args.drain_seconds,
        timeout_keep_alive=KEEP_ALIVE,
        server_header=False,
    )
    listening.listen(2048)  # so that whoever reads the next line can connect
    announce(args, listening.getsockname()[1])
    Server(config).run(sockets=[listening])


def serve_on_ray(args: ServingArguments, parser: ScriptParser) -> None:
    """Serve on a Ray cluster until this process is told to end."""
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    import ray
    from ray import serve

    from .replicas import NAME, application

    with failing(parser):
        app = application(args)
        # "local": not the cluster that a variable or a file of Ray's names.
        ray.init(args.ray_address or "local", ignore_reinit_error=True, log_to_driver=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        shared = bool(serve.status().proxies)
        serve.start(http_options={"host": args.host, "port": args.port, "keep_alive_timeout_s": KEEP_ALIVE})
        serve.run(app, name=NAME, route_prefix="/")
        if shared:
            place = f"the host and port of the Serve that ran there already, not {args.host}:{args.port}"
            print(f"Serving {args.model} at {place}", flush=True)
        else:
            announce(args, args.port)
        signal.pause()
    except KeyboardInterrupt:
        print(ENDING, flush=True)
    finally:
        serve.delete(NAME)  # waits for the replicas
        if args.ray_address is None:
            serve.shutdown()


def main(description: str | None = __doc__) -> None:
    """Serve what the command line asks for until the process is told to end."""
    parser = ScriptParser(ServingArguments, description)
    args = parser.parse_args_into_dataclasses()[0]
    with failing(parser):
        args.validate()
    (serve_here if args.replicas is None else serve_on_ray)(args, parser)


if __name__ == "__main__":
    main()
