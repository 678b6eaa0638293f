"""A plan as a picture: one SVG file that needs nothing else."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from trainer.charts import StackedBar, stacked_bars_picture


def picture(told: Mapping[str, Any]) -> str:
    """The SVG of a plan, from its JSON: memory of the fullest device, and the parts of a step."""
    models = [(f"{part}: {name}", sizing) for part, parts in told["parts"].items()
              for name, sizing in parts["models"].items()]
    no_place = "; ".join(parts["no_place"] for parts in told["parts"].values() if parts["no_place"])
    verdict = "it fits" if told["fits"] else f"does not fit; change first: {told['change_first'] or 'several things'}"
    device = told["device"]
    memory = [StackedBar(name, sizing["memory_gib"], f"{sum(sizing['memory_gib'].values()):.1f} GiB, "
                                                     f"{sizing['left_gib']:.1f} left") for name, sizing in models]
    steps = [StackedBar(name, {part: ms for part, ms in sizing["step_ms"].items() if part != "total"},
                        f"{sizing['step_ms']['total']:.1f} ms") for name, sizing in models]
    return stacked_bars_picture(
        f"{told['devices']:,} x {device['name']}: {verdict}",
        no_place or f"{told['batch_rows']:,} windows a step, ZeRO {told['zero_stage']}, {told['precision']}",
        [("Memory of the fullest device, GiB", memory, device["memory_gib"]),
         ("A step, milliseconds (estimate)", steps, None)])
