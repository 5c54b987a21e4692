"""``python sanitized.py LIBRARY [MISTAKE]``: every row of the op tests on a library built with SANITIZE, or a planted
mistake. An access out of bounds ends the process."""

import ctypes
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))

import pytest
import torch


def main(library: str) -> None:
    from cuda_on_cpu import backend
    from cuda_on_cpu.build import OPS
    from test_dla_kernels.cases import ROWS

    backend.load(Path(library))
    with pytest.MonkeyPatch.context() as monkeypatch:
        backend.register(monkeypatch)
        rows = [row for row in ROWS if row.id.partition("-")[0] in OPS]
        for row in rows:
            for dtype in (torch.float32, torch.bfloat16):
                row.values[0](dtype=dtype).run(backend.NAME)
    print(f"{len(rows)} rows ran")


def planted(library: str, mistake: int) -> None:
    values = torch.ones(2 * 128)
    out = torch.empty_like(values)
    pointers = (ctypes.c_void_p(t.data_ptr()) for t in (values, out))
    print("returned", ctypes.CDLL(library).run_mirror(mistake, 2, *pointers))


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(sys.argv[1]) if len(sys.argv) == 2 else planted(sys.argv[1], int(sys.argv[2]))
