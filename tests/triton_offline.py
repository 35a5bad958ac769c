"""Compile every Triton program for GPUs that need not be there: python -m tests.triton_offline.

The host code runs on CPU tensors with a recorder in place of each program; what it would launch is
compiled for sm_80 and sm_90.
"""

from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from gradless.blocks import block_type
from gradless.kernels import triton as ops
from gradless.kernels.triton import programs
from gradless.noise import Direction, RoundedGaussian, uniform_grid
from gradless.tensor import BlockWeight, Move, Part, TunedCodes, Views

TYPES = {
    torch.float32: "fp32",
    torch.bfloat16: "bf16",
    torch.uint8: "u8",
    torch.int8: "i8",
    torch.int16: "i16",
    torch.int32: "i32",
    torch.int64: "i64",
}
SHARED = 99 << 10
"""Bytes of shared memory that the smaller of the GPUs of these generations give a program."""
OPTIONS = ("enable_fp_fusion", "num_warps", "num_stages")


class Recorder:
    """Stands in a program's place and compiles what is launched."""

    def __init__(self, program: JITFunction[Any]) -> None:
        self.program, self.compiled = program, set[str]()

    def __getitem__(self, _grid: Any) -> Any:
        return self.compile

    def compile(self, **arguments: Any) -> None:
        options = {name: arguments.pop(name) for name in OPTIONS if name in arguments}
        signature: dict[str, str] = {}
        constants: dict[str, Any] = {}
        for parameter in self.program.params:
            value = arguments[parameter.name]
            if parameter.is_constexpr or value is None:
                signature[parameter.name], constants[parameter.name] = "constexpr", value
            elif isinstance(value, torch.Tensor):
                signature[parameter.name] = "*" + TYPES[value.dtype]
            else:
                signature[parameter.name] = "fp32" if isinstance(value, float) else "i32"
        source = ASTSource(self.program, signature, constants)
        for capability in (80, 90):
            made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
            assert f".target sm_{capability}" in made.asm["ptx"], capability
            assert "fma.rn.f32" not in made.asm["ptx"] or "linear" in self.program.__name__
            assert made.asm["cubin"]
            assert made.metadata.shared <= SHARED, (self.program.__name__, made.metadata.shared)
            self.compiled.add(f"{self.program.__name__}, sm_{capability}")


def main() -> None:
    recorders = []
    for name, program in vars(programs).items():
        if isinstance(program, JITFunction) and program.do_not_specialize:
            recorders.append(Recorder(program))
            setattr(programs, name, recorders[-1])
    query = Move(Direction(7, 1, 2, RoundedGaussian(0.3)), 1.0)
    for name in ("Q4_1", "Q4_K", "Q6_K", "nf4/64", "uint4/64+zero", "int8/64+fp32"):
        block = block_type(name)
        values, codes = (
            BlockWeight("w", block, torch.zeros(4, 3, block.nbytes, dtype=torch.uint8), blocks_per_value=2) for _ in range(2)
        )
        values.tune(Part.SCALE)
        values.views = Views((Move(Direction(7, 1), 0.1),) * 2)
        codes.tuned = TunedCodes()
        codes.views = Views((query, query._replace(coefficient=-1.0)))
        for weight in (values, codes):
            ops.dequantize(weight, torch.arange(4), torch.bfloat16)
            if block.levels is None:
                ops.linear_int8(weight, torch.arange(4), torch.zeros(2, 5, weight.columns, dtype=torch.bfloat16))
        codes.tuned = TunedCodes(residual=torch.zeros(4, codes.columns, dtype=torch.int8))
        ops.move_codes(codes, query)
        ops.linear(values, torch.arange(4), torch.zeros(2, ops.FEW_TOKENS, values.columns, dtype=torch.bfloat16))
        ops.move_blocks(values, [Move(Direction(7, 1, 0, uniform_grid(2)), 0.1)])
    ops.whole_steps("w", query, 100, torch.device("cpu"), torch.zeros(100, dtype=torch.int8))
    ops.moved(torch.zeros(100, dtype=torch.bfloat16), "w", query, torch.bfloat16, stochastic=True)
    for recorder in recorders:
        assert recorder.compiled, recorder.program.__name__
        print(*sorted(recorder.compiled), sep="\n")


if __name__ == "__main__":
    main()
