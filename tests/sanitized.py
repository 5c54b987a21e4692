"""What runs under compute-sanitizer, from benchmarks/gpu.py.

    python sanitized.py DEVICE OP            every row of an op's tests, forward and backward
    python sanitized.py planted COMMAND ...  whether the sanitizer of this command sees a mistake, and only that

The values are compared elsewhere: here each kernel that is not ours would cost its time.
"""

import ctypes
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

HERE = Path(__file__).parent
# In the order of cuda_on_cpu/planted.cu; None is the right kernel on memory that nobody has written.
MISTAKES = {"memcheck": 5, "racecheck": 1, "synccheck": 8, "initcheck": None}
#: The exit status of a sanitizer that has found something.
FOUND = 3


def rows(device: str, op: str) -> None:
    from test_dla_kernels.cases import ROWS

    torch.set_default_device(device)
    count = 0
    for row in ROWS:
        if row.id.partition("-")[0] != op:
            continue
        for dtype in (torch.float32, torch.bfloat16):
            call = row.values[0](dtype=dtype)
            call.run("native")
            with torch.no_grad():
                call("native")
        count += 1
    print(f"{op}: {count} rows ran")


def planted(command: list[str]) -> None:
    tool = command[command.index("--tool") + 1]
    with tempfile.TemporaryDirectory() as folder:
        library = f"{folder}/planted.so"
        source, include = str(HERE / "cuda_on_cpu" / "planted.cu"), f"-I{HERE.parent / 'csrc'}"
        compiler = [shutil.which("nvcc") or "nvcc", "-std=c++17", "-arch=native", "-shared", "-Xcompiler", "-fPIC"]
        subprocess.run([*compiler, include, source, "-o", library], check=True)
        status = []
        for mistake in (0, MISTAKES[tool]):
            argument = "unwritten" if mistake is None else str(mistake)
            run = [*command, sys.executable, __file__, "run", library, argument]
            status.append(subprocess.run(run, timeout=120).returncode)
    print(f"{tool}: exit status {status[0]} of the right kernel, {status[1]} of the other")
    if status != [0, FOUND]:
        raise SystemExit(1)


def run(library: str, mistake: str) -> None:
    values = torch.empty(2 * 128, device="cuda")
    if mistake != "unwritten":
        values.fill_(1)
    out = torch.zeros_like(values)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, out))
    ctypes.CDLL(library).run_mirror(0 if mistake == "unwritten" else int(mistake), 2, *pointers)
    torch.cuda.synchronize()


if __name__ == "__main__":
    sys.path.insert(0, str(HERE))
    match sys.argv[1:]:
        case ["planted", *command]:
            planted(command)
        case ["run", library, mistake]:
            run(library, mistake)
        case [device, op]:
            rows(device, op)
        case _:
            raise SystemExit(__doc__)
