"""How fast a decoder pretrains here, with and without `torch.compile`, in tokens a second.

    python benchmarks/pretraining_speed.py --config examples/nano/config.json --bf16

Both take steps in turn on the same random blocks: forward, backward and AdamW, as `examples/pretrain.py` does. Medians
of the times and of the ratio of each pair of steps; compiling itself is timed apart.
"""

import json
import statistics
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import AutoConfig, AutoModelForCausalLM, HfArgumentParser

from modeling_gemma_encoder.precision_gemma_encoder import computes_in_bf16


@dataclass
class SpeedArguments:
    config: str = field(metadata={"help": "A Gemma config."})
    batch_size: int = 32
    block_size: int = 256
    steps: int = field(default=15, metadata={"help": "Of each, after two to warm up."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision, as the Trainer's --bf16."})
    output_dir: str = "runs/pretraining_speed"


def make_step(options: SpeedArguments, device: torch.device, compiled: bool):
    torch.manual_seed(0)
    decoder = AutoModelForCausalLM.from_config(
        AutoConfig.from_pretrained(options.config, trust_remote_code=False).get_text_config()
    )
    decoder.to(device).train()
    optimizer = torch.optim.AdamW(decoder.parameters(), lr=1e-3)
    forward = torch.compile(decoder) if compiled else decoder

    def step(blocks: torch.Tensor) -> float:
        """Seconds of an optimizer step."""
        began = time.perf_counter()
        with torch.autocast(device.type, torch.bfloat16, enabled=options.bf16):
            loss = forward(input_ids=blocks, labels=blocks, use_cache=False).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss.item()  # waits for the device
        return time.perf_counter() - began

    return step, decoder.config.vocab_size


def main():
    (options,) = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses()
    device = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    if options.bf16 and not computes_in_bf16(device):
        raise SystemExit(f"--bf16: {device} has no bf16 instructions and would be many times slower than without it.")
    (eager, vocab_size), (compiled, _) = (make_step(options, device, compiled) for compiled in (False, True))
    blocks = torch.randint(vocab_size, (options.batch_size, options.block_size), device=device)
    compiling = compiled(blocks)
    for step in (eager, compiled, eager, compiled):
        step(blocks)
    times = {"eager": [], "compiled": []}
    for _ in range(options.steps):
        times["eager"].append(eager(blocks))
        times["compiled"].append(compiled(blocks))
    tokens = options.batch_size * options.block_size
    rates = {name: tokens / statistics.median(seconds) for name, seconds in times.items()}
    gain = statistics.median(slow / fast for slow, fast in zip(*times.values(), strict=True))
    report = {"tokens_per_second": rates, "gain": gain, "seconds_to_compile": compiling, "device": str(device)}
    report |= {"torch": torch.__version__, "options": asdict(options)}
    folder = Path(options.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "results.json").write_text(json.dumps(report, indent=2) + "\n")
    print("| | tokens a second |\n| --- | ---: |")
    for name, rate in rates.items():
        print(f"| {name} | {rate:,.0f} |")
    print(f"\nCompiled is {gain:.2f} times as fast (median of {options.steps}); compiling took {compiling:.0f} s.")


if __name__ == "__main__":
    main()
