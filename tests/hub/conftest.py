"""A ranker as training leaves it, and the folder that is published."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from helpers import NANO, TEMPLATE
from transformers import AutoTokenizer

from modeling_gemma_encoder import GemmaEncoderForRanking
from modeling_gemma_encoder.hub import verification
from modeling_gemma_encoder.hub.publishing import stage
from modeling_gemma_encoder.hub.run_record import RunRecord
from modeling_gemma_encoder.templates import RANKING_TEMPLATE, set_template


@pytest.fixture(scope="session")
def trained(tmp_path_factory):
    """A ranker's folder, as after a training."""
    folder = tmp_path_factory.mktemp("trained")
    torch.manual_seed(0)
    GemmaEncoderForRanking.from_pretrained(NANO, pooling="kv_probe", dtype=torch.float32).save_pretrained(folder)
    tokenizer = set_template(AutoTokenizer.from_pretrained(NANO), pair=RANKING_TEMPLATE)
    tokenizer("cut", truncation=True, max_length=2)
    tokenizer.save_pretrained(folder)
    (folder / "training_args.bin").write_bytes(b"pickled")
    (folder / "optimizer.pt").write_bytes(b"pickled")
    return folder


@pytest.fixture(scope="session")
def staged(trained, tmp_path_factory):
    folder = tmp_path_factory.mktemp("staged") / "folder"
    stage(str(trained), folder, "me/ranker", TEMPLATE, RunRecord(), base="examples/nano", licence="apache-2.0")
    return folder


# `verify` starts a process for each folder, most of whose time is imports. Here one process has imported torch and
# transformers, and forks for each. Tests marked `own_process` leave it as users have it.
SERVER = """
import json, os, sys, traceback
import torch, peft
import transformers.models.gemma2.modeling_gemma2, transformers.models.gemma2.configuration_gemma2
from transformers import AutoConfig, AutoModel, AutoModelForMaskedLM, AutoModelForSequenceClassification, AutoTokenizer
from transformers import PreTrainedTokenizerFast, Trainer, dynamic_module_utils
from transformers.utils import hub

for line in sys.stdin:
    request = json.loads(line)
    child = os.fork()
    if child == 0:
        for number, name in ((1, "stdout"), (2, "stderr")):
            os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT), number)
        os.environ.clear()
        os.environ.update(request["env"])
        os.chdir(request["cwd"])
        hub.HF_MODULES_CACHE = dynamic_module_utils.HF_MODULES_CACHE = os.environ["HF_MODULES_CACHE"]
        sys.argv = ["-c", *request["arguments"]]
        code = 0
        try:
            exec(request["source"], {"__name__": "__main__"})
        except BaseException:
            traceback.print_exc()
            code = 1
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


@pytest.fixture(scope="session")
def server():
    process = subprocess.Popen([sys.executable, "-c", SERVER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    yield process
    process.stdin.close()
    process.wait()


@pytest.fixture(autouse=True)
def _forked(request, monkeypatch, server, tmp_path_factory):
    if request.node.get_closest_marker("own_process"):
        return

    def run(command, env, cwd, **options):
        folder = tmp_path_factory.mktemp("forked")
        files = {name: str(folder / name) for name in ("stdout", "stderr")}
        _, _, source, *arguments = command
        asked = {"source": source, "arguments": arguments, "env": env, "cwd": cwd, **files}
        server.stdin.write(json.dumps(asked) + "\n")
        server.stdin.flush()
        code = int(server.stdout.readline())
        return subprocess.CompletedProcess(command, code, *(Path(file).read_text() for file in files.values()))

    monkeypatch.setattr(verification, "subprocess", SimpleNamespace(run=run, DEVNULL=subprocess.DEVNULL))
