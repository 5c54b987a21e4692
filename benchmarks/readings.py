"""What is read off a measured row."""

from collections.abc import Sequence
from statistics import median

from dla.benchmarks.measure import MACHINE

#: How much faster or slower another machine copies memory.
ANOTHER = 0.15
#: A spread that tells of other work on the machine.
DISTURBED = 0.10


def p50(row: dict, rival: str) -> float | None:
    return row["seconds"][rival]["p50"] if rival in row["seconds"] else None


def ours(row: dict) -> str:
    return next(iter(row["seconds"]))


def ratio(row: dict, rival: str | None = None) -> float:
    """A rival's time, by default ours, over the base's."""
    return row["over_ours"][rival or ours(row)] / row["over_ours"][row["base"]]


def moved(row: dict) -> int:
    """Bytes that an op must move."""
    return (row["facts"]["reads"] + row["facts"]["writes"]) * row["facts"]["map_bytes"]


def of_copy(row: dict) -> float | None:
    """Bytes a second over those of a copy of such a map, from memory to memory, in the same rounds."""
    if not moved(row):
        return None
    return moved(row) / (2 * row["facts"]["map_bytes"]) * row["over_ours"]["copy"]


def of_limit(row: dict) -> float | None:
    """What the reads take at the rate of a sum, and the writes at that of a copy less its reads, over our time."""
    if not moved(row):
        return None
    read, copy = row["over_ours"]["read"], row["over_ours"]["copy"]
    return row["facts"]["reads"] * read + row["facts"]["writes"] * max(0, copy - read)


def reached(row: dict) -> float:
    """What a row of ``floors`` is measured by: see that file."""
    facts, over_ours = row["facts"], row["over_ours"]
    match facts["unit"]:
        case "of copy":
            return of_copy(row)
        case "x two launches":
            return 1 / (2 * over_ours["empty"] + facts["bytes"] / (2 * facts["map_bytes"]) * over_ours["copy"])
        case "x as fast":
            return over_ours[row["base"]]
        case "x the time":
            return 1 / over_ours[row["base"]]
    raise ValueError(f"no such unit: {facts['unit']}")


def met(row: dict) -> bool | None:
    """Whether a row reaches its goal; None for one that has none."""
    facts = row["facts"]
    if "asked" in facts:
        return reached(row) <= facts["asked"] if facts["is_most"] else reached(row) >= facts["asked"]
    if "goal" not in facts:
        return None
    return of_copy(row) >= facts["goal"] if row["question"] == "ops" else ratio(row) <= facts["goal"]


def spread(row: dict, rival: str) -> float:
    """Half of what lies between the 20th and the 80th percentile of a rival's time, over the median."""
    times = row["seconds"][rival]
    return (times["p80"] - times["p20"]) / 2 / times["p50"]


def unrest(row: dict) -> float:
    """The larger spread of our time and the base's."""
    return max(spread(row, ours(row)), spread(row, row["base"]))


def elsewhere(row: dict, rows: Sequence[dict]) -> float:
    """How much more time than in most of the rows a copy took beside this one, 0 where none was measured."""
    copies = [time for r in rows if "error" not in r and (time := p50(r, MACHINE))]
    own = None if "error" in row else p50(row, MACHINE)
    return own / median(copies) - 1 if own and copies else 0.0


def doubt(row: dict, rows: Sequence[dict]) -> float:
    """Over 1 for a row that met another machine than most, or one that did other work; 0 for an error."""
    return 0.0 if "error" in row else max(abs(elsewhere(row, rows)) / ANOTHER, unrest(row) / DISTURBED)
