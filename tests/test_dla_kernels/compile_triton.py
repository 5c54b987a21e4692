"""Compiles the Triton kernels for a GPU that need not be there, and prints what they need, a JSON object a line.

    python compile_triton.py CAPABILITY SHAPE LAYOUT DTYPE TILES [OP ...]

The ops are called as they would be, with CPU tensors that stand for the GPU's; a launch only compiles. So the kernels
and their specialisations are those that a user gets. TILES are "default", "all" that may be chosen, or one of our own
as ELEMENTSxWARPS.
"""

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler.code_generator import CodeGenerator
from triton.runtime import jit

from dla_kernels.triton import tuning

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"


class Driver:
    """All that compiling asks of a GPU."""

    def __init__(self, capability: int):
        self.target = GPUTarget("cuda", capability, 32)

    def get_current_target(self) -> GPUTarget:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def needs(binary: bytes) -> dict:
    """Registers, stack and spills of a kernel; the bits of its widest global load; and its accesses of 16 bits."""
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary)
        file.flush()
        done = subprocess.run([CUOBJDUMP, "-res-usage", "-sass", file.name], capture_output=True, text=True, check=True)
    registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", done.stdout).groups())
    widths = {"LDG": [0], "STG": [0]}
    for name, suffix in re.findall(r"\b(LDG|STG)(\.[A-Z0-9.]+)", done.stdout):
        bits = re.search(r"\.[US]?(8|16|64|128)(\.|$)", suffix)
        widths[name].append(int(bits[1]) if bits else 32)
    return {
        "registers": registers,
        "stack": stack,
        "local": len(re.findall(r"\b(?:LDL|STL)\b", done.stdout)),
        "load": max(widths["LDG"]),
        "single": (widths["LDG"] + widths["STG"]).count(16),
    }


def compile_only(seen: set[str]):
    launch = jit.JITFunction.run

    def run(self, *args, grid, warmup, **kwargs):
        compiled = launch(self, *args, grid=grid, warmup=True, **kwargs)
        if compiled.hash not in seen:
            seen.add(compiled.hash)
            elements = kwargs["BLOCK_C"] * kwargs["BLOCK_P"] if "BLOCK_P" in kwargs else None
            warps = compiled.metadata.num_warps
            found = {
                "kernel": f"{self.fn.__module__.removeprefix('dla_kernels.').removeprefix('ops.')}.{self.fn.__name__}",
                "warps": warps,
                "elements": elements and elements / 32 / warps,
                "shared": compiled.metadata.shared,
                **needs(compiled.asm["cubin"]),
            }
            print(json.dumps(found), flush=True)
        return compiled

    return run


def refuse_lost_variables() -> None:
    """Fails where a loop assigns to a variable that the compiler does not carry from turn to turn.

    It carries those whose value after one turn is not that from before the loop. So ``a = b`` is lost where a and b
    begin as the same value, though b changes; the interpreter runs it as Python does.
    """
    visit, find = CodeGenerator.visit_compound_statement, CodeGenerator._find_carries

    def visit_body(self, statements):
        visit(self, statements)
        self.assigned = set(self.local_defs)

    def find_carries(self, node, liveins, ignore=frozenset()):
        names, *rest = find(self, node, liveins, ignore)
        lost = (self.assigned & set(liveins)) - {*names, *ignore}
        assert not lost, f"lost in a loop: {sorted(lost)}"
        return names, *rest

    CodeGenerator.visit_compound_statement, CodeGenerator._find_carries = visit_body, find_carries


def every_tile(kernel, x, tiles, launch, variant=0):
    *_, result = [launch(tile) for tile in tiles]
    return result


def with_tile(walk, elements: int, warps: int):
    return lambda *args, **kwargs: walk(*args, **kwargs | {"sizes": ((elements, warps),)})


def calls(shape: tuple[int, ...], dtype: torch.dtype, memory_format: torch.memory_format) -> dict:
    """Calls of every library op, by the op's name, with all that a kernel may have to read and to sum."""
    B, C, _, _ = shape
    state = torch.float64 if dtype == torch.float64 else torch.float32

    def m():
        return torch.empty(shape, dtype=dtype).contiguous(memory_format=memory_format)

    def v(*sizes):
        return torch.empty(sizes, dtype=state)

    def norm_residual(op):
        op.moments(m())
        for relu in (1, 2):
            keep, out = v(B) if relu == 1 else None, m() if relu == 2 else None
            vectors = v(C), v(C), v(C), v(C)
            op.forward(m(), m(), v(B, C), v(B, C), v(C), v(C), keep, 1e-5, relu)
            op.sums(m(), v(B, C), m(), out, *vectors, keep, 1e-5, relu, relu == 1)
            op.backward(m(), v(B, C), m(), out, *vectors, v(C), v(C), keep, 1e-5, relu, 9, True)
        op.forward(None, m(), *(v(C) for _ in range(4)), None, 1e-5, 1)
        op.sums(m(), None, m(), None, *vectors, None, 1e-5, 1, False)
        op.backward(m(), None, m(), None, *vectors, v(C), v(C), None, 1e-5, 1, 9, False)
        op.backward(m(), None, m(), None, *vectors, None, None, None, 1e-5, 0, 9, True)

    def light_update(op):
        for carry in ((m(), v(C), v(B, C), None), (m(), v(C), v(B, C), v(C, 1, 3, 3))):
            attention = m(), v(B, C), v(1, 1, 5), v(1, 1, 5), v(C, 1, 3, 3), *carry
            op.forward(*attention, 32)
            op.folded(*attention, v(C), v(C), v(C), v(C), 1e-5, 32, True)
            op.backward(
                m(), v(B, C), m(), v(B, C), m(), *(v(C) for _ in range(5)), v(B), 1e-5, 9, *attention, 32, True, True
            )  # fmt: skip
        alone = *attention[:5], None, None, None, None
        op.folded(*alone, v(C), v(C), v(C), v(C), 1e-5, 32, False)
        constants = v(C), v(C), v(C), None, None
        op.backward(m(), None, None, None, m(), *constants, None, 1e-5, 9, *alone, 32, False, False)

    def layer_attention(op):
        T = 20  # a launch of 16 maps, which hands its sum to one of 4
        for filters in (1, T):
            attention = v(B, T, C), v(B, T, C), v(1, 1, 5), v(filters, 1, 5), m(), v(C, 1, 3, 3)
            values = [m() for _ in range(T)]
            op.forward(*attention, values[1:], 32)
            op.folded(*attention, values[1:], v(C), v(C), v(C), v(C), 1e-5, 32)
            op.backward(
                m(), m(), v(B, C), v(B, C), m(), *(v(C) for _ in range(6)), v(B), 1e-5, 9, v(B, C), v(B, T, C),
                *attention, values, [m() for _ in range(T)], [v(B, T + j + 1, C) for j in range(T)], 32, True, True,
            )  # fmt: skip
        op.backward(
            m(), None, None, None, m(), *(v(C) for _ in range(4)), None, None, None, 1e-5, 9, v(B, C), v(B, T, C),
            *attention, values, [], [], 32, False, True,
        )  # fmt: skip

    def gap_dsu(op):
        for joint in (True, False):
            w = v(weights(joint))
            op.forward(m(), v(B, C), v(B, C), v(B, C), w, joint, 3, True)
            op.backward(*(v(B, C) for _ in range(8)), w, joint, 3, True)

    def refresh_gates(op):
        for joint in (True, False):
            arguments = v(B, 3, C), v(B, 3, C), v(B, C), v(B, C), v(weights(joint)), joint, 3, True
            op.forward(*arguments)
            op.backward(v(B, 3, C), *arguments)

    def weights(joint):
        R = max(1, C // 4)
        return 5 * C * R + 3 * C if joint else 8 * C * R + 2 * R + 6 * C

    return {f.__name__: f for f in (gap_dsu, layer_attention, light_update, norm_residual, refresh_gates)}


def prepare(capability: int) -> None:
    """From here on a launch compiles for such a GPU, and prints."""
    triton.runtime.driver.set_active(Driver(capability))
    jit.JITFunction.run = compile_only(set())
    refuse_lost_variables()


def main(capability: str, shape: str, layout: str, dtype: str, tiles: str, *ops: str) -> None:
    prepare(int(capability))
    if tiles != "default":
        tuning.run = every_tile
    memory_format = {"planes": torch.contiguous_format, "rows": torch.channels_last}[layout]
    found = calls(tuple(map(int, shape.split("x"))), getattr(torch, dtype), memory_format)
    for op in ops or found:
        module = importlib.import_module(f"dla_kernels.ops.{op}.triton")
        if "x" in tiles:
            module.walk = with_tile(module.walk, *map(int, tiles.split("x")))
        found[op](module)


if __name__ == "__main__":
    main(*sys.argv[1:])
