"""Peak resident memory of loading, tuning and saving, beside transformers' own dequantized load.

    python benchmarks/memory.py [MODEL.gguf] [--methods all|qzo,adamw,..] [--json]

Each is a process of its own. A process first imports torch and transformers and loads the tokenizer; what it holds then is
its zero. A thread reads the resident size (memory-mapped file pages included) every 5 ms from there on.

--methods adds the peak of a few steps of a method, loading left out, and what `gradless plan` predicts of it. All take the same
batch, 16 prompts of 64 tokens. mezo, lora (where peft is installed), sgd and adamw tune the model dequantized. A ratio below 1
means that the plan says more than was measured: of a mapped file only what is read counts here, and the plan counts all of it.
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
from importlib.util import find_spec
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")

from step import default_model

STEPS, BATCH, LENGTHS = 40, 16, range(12, 45)
FEW, LENGTH = 3, 64
PACKED, DENSE = ("qzo", "ezo", "quzo", "zoqo"), ("mezo", *(["lora"] if find_spec("peft") else []), "sgd", "adamw")
"""What --methods can measure, by the model that it tunes."""
SIZES = ("forward", "step", "nzo")
"""What `resident` can measure."""


class Peak:
    """The highest resident size since it was made, or since `restart`, over the size when it was made."""

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

    def restart(self) -> None:
        self.highest = self._read()

    @property
    def bytes(self) -> int:
        return max(self.highest, self._read()) - self.zero


def tokenizer_of(path: Path):
    importlib.import_module("torch")
    importlib.import_module("transformers").Trainer  # noqa: B018  transformers imports its parts on first use
    from transformers import AutoTokenizer

    from gradless.formats.gguf_tokenizer import load_tokenizer

    return AutoTokenizer.from_pretrained(path, local_files_only=True) if path.is_dir() else load_tokenizer(path)


def examples_of(lengths: list[int]):
    """Prompts of so many tokens, each with a choice between two words."""
    from gradless.objectives import TokenizedExample

    prompts = [tuple(range(100, 100 + length)) for length in lengths]
    return [TokenizedExample((prompt, prompt), ((5,), (6,)), i % 2) for i, prompt in enumerate(prompts)]


def trainer_of(loaded, tokenizer, examples, folder: str, **options):
    from gradless.training.trainer import ZOConfig, ZOTrainer

    config = ZOConfig(output_dir=folder, per_device_train_batch_size=BATCH, use_cpu=True, disable_tqdm=True, **options)
    return ZOTrainer(loaded.model, config, examples, checkpoint=loaded, processing_class=tokenizer)


def ours(path: Path) -> int:
    """Load, forty QZO steps through the trainer on batches of all lengths, save."""
    tokenizer = tokenizer_of(path)
    peak = Peak()
    from gradless.formats.gguf_model import load_gguf

    loaded = load_gguf(path, tokenizer=tokenizer)
    examples = examples_of([LENGTHS[7 * i % len(LENGTHS)] for i in range(20 * BATCH)])
    with tempfile.TemporaryDirectory() as folder:
        trainer = trainer_of(loaded, tokenizer, examples, folder, max_steps=STEPS)
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


def zeroth_order(method: str, path: Path) -> int:
    """A few steps of one of gradless's methods through the trainer."""
    tokenizer = tokenizer_of(path)
    peak = Peak()
    from gradless.formats.dense import DenseModel
    from gradless.formats.gguf_model import load_gguf

    loaded = (DenseModel.load if path.is_dir() else load_gguf)(path, tokenizer=tokenizer)
    peak.restart()
    with tempfile.TemporaryDirectory() as folder:
        trainer_of(loaded, tokenizer, examples_of([LENGTH] * BATCH), folder, max_steps=FEW, method=method).train()
    return peak.bytes


def resident(name: str, path: Path) -> int:
    """The highest resident size, libraries included, of a few forwards ("forward"), of steps of QZO ("step"), or of a run of
    NZO, its calibration and trainer included ("nzo")."""
    tokenizer = tokenizer_of(path)
    import torch

    from gradless import QZO
    from gradless.formats.gguf_model import load_gguf
    from gradless.objectives import collate, losses

    loaded = load_gguf(path, tokenizer=tokenizer)
    optimizer = QZO(loaded.spaces("blocks", loaded.file.linear_layers())) if name == "step" else None
    examples = examples_of([LENGTH] * BATCH)
    batch = collate(examples)
    peak = Peak()
    if name == "nzo":
        with tempfile.TemporaryDirectory() as folder:
            trainer_of(loaded, tokenizer, examples, folder, max_steps=2 * FEW, method="nzo").train()
        return peak.zero + peak.bytes
    with torch.inference_mode():
        for _ in range(2 * FEW):
            if optimizer is None:
                losses(loaded.model, batch)
            else:
                optimizer.step(lambda: losses(loaded.model, batch)[0].mean())
    return peak.zero + peak.bytes


def first_order(method: str, path: Path) -> int:
    """A few steps of torch's optimizer: all parameters in fp32, or peft's adapters on a bf16 model."""
    tokenizer_of(path)
    import torch
    from transformers import AutoModelForCausalLM

    from gradless.memory import RANK
    from gradless.objectives import collate, losses

    if method == "lora":
        from peft import LoraConfig, get_peft_model
    peak = Peak()
    dtype = torch.bfloat16 if method == "lora" else torch.float32
    model = AutoModelForCausalLM.from_pretrained(path, dtype=dtype, local_files_only=True)
    if method == "lora":
        model = get_peft_model(model, LoraConfig(r=RANK, target_modules="all-linear"))
    tuned = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = torch.optim.SGD(tuned, lr=1e-6) if method == "sgd" else torch.optim.AdamW(tuned, lr=1e-6)
    batch = collate(examples_of([LENGTH] * BATCH))
    peak.restart()
    for _ in range(FEW):
        losses(model, batch)[0].mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    return peak.bytes


def measured(name: str, path: Path) -> int:
    """One peak, in a process of its own."""
    command = [sys.executable, __file__, str(path), "--only", name]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()[-1])


def beside_the_plan(model: Path, methods: list[str]) -> dict[str, dict[str, float]]:
    """Measured and predicted bytes of each method, and the one over the other."""
    from gradless import memory

    rows, shapes = {}, memory.shapes_of(model)
    with tempfile.TemporaryDirectory() as folder:
        dense = Path(folder) / "dense"
        if set(methods) & set(DENSE):
            command = [sys.executable, "-m", "gradless.cli", "dequantize", str(model), "--output", str(dense)]
            subprocess.run(command, check=True, capture_output=True)
        for name in methods:
            peak = measured(name, dense if name in DENSE else model)
            predicted = memory.need(name, shapes, batch_size=BATCH, length=LENGTH).total
            rows[name] = {"measured": peak, "predicted": predicted, "ratio": round(peak / predicted, 3)}
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", type=Path, default=default_model())
    parser.add_argument("--methods", default="", help="measure these too: all, or a list with commas")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--only", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.only:
        name, path = arguments.only, arguments.model
        if name in ("ours", "dequantized"):
            print({"ours": ours, "dequantized": dequantized}[name](path))
        elif name in SIZES:
            print(resident(name, path))
        else:
            print((zeroth_order if name in (*PACKED, "mezo") else first_order)(name, path))
        return
    chosen = [*PACKED, *DENSE] if arguments.methods == "all" else [name for name in arguments.methods.split(",") if name]
    if unknown := set(chosen) - {*PACKED, *DENSE}:
        parser.error(f"--methods has {', '.join(sorted(unknown))}; it can have {', '.join((*PACKED, *DENSE))}")
    size = arguments.model.stat().st_size
    allowed = 1.3 * size + 150e6
    peaks = {name: measured(name, arguments.model) for name in ("ours", "dequantized")}
    sizes = {name: measured(name, arguments.model) for name in SIZES}
    ratios = {
        "resident memory of a QZO step / of a forward, libraries included": sizes["step"] / sizes["forward"],
        "resident memory of NZO / of a forward, libraries included": sizes["nzo"] / sizes["forward"],
    }
    result = {"file": size, **peaks, "allowed_without_activations": allowed, **sizes, "ratios": ratios}
    if chosen:
        result["methods"] = beside_the_plan(arguments.model, chosen)
    if arguments.json:
        print(json.dumps(result))
        return
    print(f"file                                        {size / 1e6:8.1f} MB")
    print(f"gradless: load, {STEPS} steps of batch {BATCH}, save  {peaks['ours'] / 1e6:8.1f} MB")
    print(f"1.3 x file + 150 MB                         {allowed / 1e6:8.1f} MB, activations not counted")
    print(f"transformers: load in bf16                  {peaks['dequantized'] / 1e6:8.1f} MB")
    print(f"a QZO step / a forward, libraries included  {sizes['step'] / sizes['forward']:8.3f}")
    print(f"NZO / a forward, libraries included         {sizes['nzo'] / sizes['forward']:8.3f}")
    for name, row in result.get("methods", {}).items():
        print(
            f"{name:6} {FEW} steps of {BATCH} x {LENGTH} tokens            {row['measured'] / 1e6:8.1f} MB, "
            f"planned {row['predicted'] / 1e6:8.1f} MB, ratio {row['ratio']:.2f}"
        )


if __name__ == "__main__":
    main()
