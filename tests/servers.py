"""Servers in this process, over nano with untrained heads."""

import socket
import sys
import threading
import time
from contextlib import contextmanager

import torch
import uvicorn
from helpers import NANO
from transformers import AutoTokenizer

from modeling_gemma_encoder.serving.app import Service, create_app
from modeling_gemma_encoder.serving.arguments import ServingArguments, load_engine
from modeling_gemma_encoder.serving.metrics import Metrics
from modeling_gemma_encoder.templates import set_template


class Server:
    """A server in a thread: its address, and what it is made of."""

    def __init__(self, args: ServingArguments):
        self.args, metrics = args, Metrics()
        self.engine, self.about = load_engine(args, metrics)
        app = create_app(Service(self.engine, self.about, metrics), args.limits(), self.engine.close)
        self.uvicorn = uvicorn.Server(uvicorn.Config(app, port=0, log_level="warning"))
        self.thread = threading.Thread(target=self.uvicorn.run, daemon=True)
        self.thread.start()
        while not self.uvicorn.started:
            time.sleep(0.01)
        port = self.uvicorn.servers[0].sockets[0].getsockname()[1]
        self.url = f"http://127.0.0.1:{port}"


# The threads of the model, the server and the client take turns; Python's own turns are of 5 ms.
sys.setswitchinterval(1e-4)


@contextmanager
def serving(folder, **options):
    """A server of a checkpoint in fp32 with these options."""
    server = Server(ServingArguments(model=str(folder), dtype="float32", device="cpu", **options))
    try:
        yield server
    finally:
        server.uvicorn.should_exit = True
        server.thread.join(20)


def save(folder, cls, template=None, **config):
    torch.manual_seed(0)
    model = cls.from_pretrained(NANO, **config)
    torch.nn.init.normal_(model.classifier.out_proj.weight, std=0.2)
    model.save_pretrained(folder)
    set_template(AutoTokenizer.from_pretrained(NANO), **(template or {})).save_pretrained(folder)
    return folder


def wait_until(true, seconds=5):
    for _ in range(100 * seconds):
        if true():
            return
        time.sleep(0.01)
    raise AssertionError(f"waited for {seconds} s")


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        return one.getsockname()[1]
