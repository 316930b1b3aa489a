"""Measure how fast a decoder pretrains with and without `torch.compile`, in tokens a second.

    python benchmarks/pretraining_speed.py --config examples/nano/config.json --bf16

Both take steps in turn on the same random blocks: a forward pass, a backward pass and AdamW, as in
`examples/pretrain.py`. Rates are medians of the times, and the gain is the median of the ratios of
each pair of steps. The time to compile is measured separately.
"""

import json
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from modeling_gemma_encoder._scripts.command_line import Help, failing
from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16


@dataclass
class SpeedArguments:
    """Hold the options of what is measured."""

    config: str = field(metadata={"help": "A Gemma config."})
    batch_size: int = 32
    block_size: int = 256
    steps: int = field(default=15, metadata={"help": "Steps of each, after two to warm up."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision, as the Trainer's --bf16."})
    output_dir: str = "runs/pretraining_speed"


@dataclass(frozen=True)
class Times:
    """Hold the seconds of the steps, and of the first compiled step, which compiles the model."""

    eager: list[float]
    compiled: list[float]
    compiling: float

    def gain(self) -> float:
        """Return how many times as fast a compiled step is."""
        ratios = [slow / fast for slow, fast in zip(self.eager, self.compiled, strict=True)]
        return statistics.median(ratios)

    def rates(self, tokens: int) -> dict[str, float]:
        """Return the tokens a second of each way, for the tokens of a step."""
        times = {"eager": self.eager, "compiled": self.compiled}
        return {name: tokens / statistics.median(seconds) for name, seconds in times.items()}


def validate(options: SpeedArguments, device: torch.device) -> None:
    """Raise ValueError for bf16 on a device that has no instructions for it."""
    if options.bf16 and not computes_in_bf16(device):
        raise ValueError(
            f"--bf16 is many times slower than fp32 on this device ({device}), which has no "
            "instructions for bf16. Leave it out."
        )


def make_step(
    options: SpeedArguments, device: torch.device, compiled: bool
) -> tuple[Callable[[torch.Tensor], float], int]:
    """Return a function that takes a step and returns its seconds, and the vocabulary size."""
    torch.manual_seed(0)
    config = AutoConfig.from_pretrained(options.config, trust_remote_code=False)
    decoder = AutoModelForCausalLM.from_config(config.get_text_config())
    decoder.to(device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    forward = torch.compile(decoder) if compiled else decoder

    def step(blocks: torch.Tensor) -> float:
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = forward(input_ids=blocks, labels=blocks, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - began

    return step, decoder.config.vocab_size


def measure(options: SpeedArguments, device: torch.device) -> Times:
    """Return the times of the steps of both ways, taken in turn."""
    eager, vocab_size = make_step(options, device, compiled=False)
    compiled, _ = make_step(options, device, compiled=True)
    shape = (options.batch_size, options.block_size)
    blocks = torch.randint(vocab_size, shape, device=device)
    times = Times([], [], compiling=compiled(blocks))
    for step in (eager, compiled, eager, compiled):  # to warm up
        step(blocks)
    for _ in range(options.steps):
        times.eager.append(eager(blocks))
        times.compiled.append(compiled(blocks))
    return times


def main():
    parser = HfArgumentParser(SpeedArguments, description=__doc__, formatter_class=Help)
    (options,) = parser.parse_args_into_dataclasses()
    device = torch.device("cpu")
    if torch.accelerator.is_available():
        device = torch.accelerator.current_accelerator()
    with failing(parser):
        validate(options, device)
    times = measure(options, device)
    gain, rates = times.gain(), times.rates(options.batch_size * options.block_size)
    report = {
        "tokens_per_second": rates,
        "gain": gain,
        "seconds_to_compile": times.compiling,
        "device": str(device),
        "torch": torch.__version__,
        "options": asdict(options),
    }
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print("| | tokens a second |\n| --- | ---: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} |")
    ending = f"(median of {options.steps}); compiling took {times.compiling:.0f} s."
    print(f"\nCompiled is {gain:.2f} times as fast {ending}")


if __name__ == "__main__":
    main()
