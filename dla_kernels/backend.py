"""Which implementations of the ops this install has."""


def backends() -> dict[str, bool | str]:
    """The backends by name: True for one that runs here, otherwise the reason why it does not."""
    return {"reference": True}
