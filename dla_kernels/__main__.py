"""``python -m dla_kernels``: what was built, which backend every op takes here, and why it takes no other."""

import torch

from dla_kernels import __version__, native, ops
from dla_kernels.backend import BACKENDS, choose, why_not


def devices() -> list[torch.device]:
    """The CPU, and the accelerator where there is one."""
    accelerator = torch.accelerator.current_accelerator(check_available=True)
    return [torch.device("cpu"), *([accelerator] if accelerator is not None else [])]


def table(rows: list[tuple[str, ...]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


def others(chosen: str, device: torch.device) -> str:
    """Why the other backends are not taken."""
    return "; ".join(f"{b}: {why_not(b, device) or f'{chosen} comes first'}" for b in BACKENDS if b != chosen)


def main() -> None:
    print(f"dla-kernels {__version__}, torch {torch.__version__}")
    print(f"no native library: {native.ERROR}" if native.ERROR else table(list(native.build_info().items())))
    rows = [("op", "device", "backend", "why no other")]
    for device in devices():
        for op in ops.__all__:
            chosen = choose(device, op=op)
            rows.append((op, device.type, chosen, others(chosen, device)))
    print()
    print(table(rows))


if __name__ == "__main__":
    main()
