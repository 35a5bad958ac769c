"""Peak resident memory of loading, tuning and saving, beside transformers' own dequantized load.

    python benchmarks/memory.py [MODEL.gguf] [--json]

Each is a process of its own. A process first imports torch and transformers and loads the tokenizer; what it holds then is
its zero. A thread reads the resident size (memory-mapped file pages included) every 5 ms from there on.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from step import default_model

STEPS, BATCH, LENGTHS = 40, 16, range(12, 45)


class Peak:
    """The highest resident size since it was made, over the size then."""

    def __init__(self) -> None:
        import gc

        from gradless.memory import resident_bytes

        gc.collect()
        self.zero = self.highest = resident_bytes()
        self._read = resident_bytes
        threading.Thread(target=self._watch, daemon=True).start()

    def _watch(self) -> None:
        while True:
            self.highest = max(self.highest, self._read())
            time.sleep(0.005)

    @property
    def bytes(self) -> int:
        return max(self.highest, self._read()) - self.zero


def tokenizer_of(path: Path):
    importlib.import_module("torch")
    importlib.import_module("transformers").Trainer  # noqa: B018  transformers imports its parts on first use
    from gradless.formats.gguf_model import load_tokenizer

    return load_tokenizer(path)


def ours(path: Path) -> int:
    """Load, forty QZO steps through the trainer on batches of all lengths, save."""
    tokenizer = tokenizer_of(path)
    peak = Peak()
    from gradless.formats.gguf_model import load_gguf
    from gradless.objectives import TokenizedExample
    from gradless.training.trainer import ZOConfig, ZOTrainer

    loaded = load_gguf(path, tokenizer=tokenizer)
    prompts = [tuple(range(100, 100 + LENGTHS[7 * i % len(LENGTHS)])) for i in range(20 * BATCH)]
    examples = [TokenizedExample((prompt, prompt), ((5,), (6,)), i % 2) for i, prompt in enumerate(prompts)]
    with tempfile.TemporaryDirectory() as folder:
        config = ZOConfig(
            output_dir=folder, max_steps=STEPS, per_device_train_batch_size=BATCH, use_cpu=True, disable_tqdm=True
        )
        trainer = ZOTrainer(loaded.model, config, examples, checkpoint=loaded, processing_class=tokenizer)
        trainer.train()
        trainer.save_model()
    return peak.bytes


def dequantized(path: Path) -> int:
    """transformers' from_pretrained, in bf16."""
    tokenizer_of(path)
    import torch
    from transformers import AutoModelForCausalLM

    peak = Peak()
    AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.bfloat16)
    return peak.bytes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", choices=("ours", "dequantized"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        print({"ours": ours, "dequantized": dequantized}[arguments.only](arguments.model))
        return
    measured = {}
    for name in ("ours", "dequantized"):
        command = [sys.executable, __file__, str(arguments.model), "--only", name]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        measured[name] = int(output.split()[-1])
    size = arguments.model.stat().st_size
    allowed = 1.3 * size + 150e6
    result = {"file": size, **measured, "allowed_without_activations": allowed}
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"file                                        {size / 1e6:8.1f} MB")
    print(f"gradless: load, {STEPS} steps of batch {BATCH}, save  {measured['ours'] / 1e6:8.1f} MB")
    print(f"1.3 x file + 150 MB                         {allowed / 1e6:8.1f} MB, activations not counted")
    print(f"transformers: load in bf16                  {measured['dequantized'] / 1e6:8.1f} MB")


if __name__ == "__main__":
    main()
