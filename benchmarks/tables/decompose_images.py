"""A film composed of photographs, and the channels of real keys."""

from typing import Any

from benchmarks.markdown import scientific


def statements(result: dict[str, Any]) -> dict[str, list[str]]:
    film, keys = result["film"], result["outlier channels of keys"]
    assert film["background pixels taken for foreground"] == 0
    assert keys["heads where they hold more than half"] == 0
    median, even = (
        keys[f"share of the three largest channels, {which}"] for which in ("median", "even split")
    )
    return {
        "docs/decompose.md": [
            f"a relative error of {scientific(film['relative error of the background'])} (rank {film['rank']})",
            f"{film['foreground pixels found']:.0%} of the pixels of the patch, with no pixel of the background",
            f"hold {median:.0%} of the energy in the median ({even:.0%} would be an even split), and more than half in "
            "no head",
        ]
    }
