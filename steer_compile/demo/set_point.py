"""A closed loop that holds a projection at a set point: ``python -m steer_compile.demo.set_point``.

A PID controller reads where the stream of one layer lies between scripture (-1) and code (1), and adds a vector at an
earlier layer so that the mean stays where it should be. The set point changes half way. Both readings and gains are one
step apart, as an action acts from the next step on.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from steer_compile.demo.dynamic_plot import draw_traces
from steer_compile.demo.dynamic_run import Axis, Stage, Trace, Traced
from steer_compile.dynamic.steering_controller import Decision, RequestState, Values
from steer_compile.dynamic.views import RequestView

LAYERS = (1, 2)
"""Where the vector is added, and where the projection is held."""
MEMORY, FARTHEST = 0.8, 1.5
"""Of the running mean from one step to the next; how far off one token counts at most (a line break lies at 8)."""
PROMPTS = {"scripture": "And it came to pass in those days, that the king of Israel sent "}


@dataclass(frozen=True)
class Pid:
    """Gains of the loop and the bound of its output; the integral stands still while the output is at the bound."""

    proportional: float = 0.6
    integral: float = 0.12
    derivative: float = 0.2
    most: float = 4.0

    def step(self, error: float, state: dict[str, Any]) -> float:
        """Output for an error; ``state`` keeps the integral and the last error."""
        change = error - state.get("error", error)
        total = state.get("total", 0.0) + error
        output: float = self.proportional * error + self.integral * total + self.derivative * change
        if abs(output) <= self.most:
            state["total"] = total
        state["error"] = error
        return max(-self.most, min(self.most, output))


class SetPoint(Traced):
    """Holds the running mean of a projection at a set point.

    Args:
        name: ``held``, or ``unsteered``, which only looks.
        points: pairs of a step and the set point from it on.
    """

    def __init__(self, name: str, act: Axis, read: Axis, points: Sequence[tuple[int, float]], pid: Pid) -> None:
        super().__init__(name, read, read)
        self.points, self.pid = points, pid
        self.pushes = {sign: Decision({act.site: sign * act.vector}) for sign in (1.0, -1.0)}

    def wanted(self, step: int) -> float:
        """The set point of a step."""
        return [height for begin, height in self.points if begin <= step][-1]

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        now = max(-FARTHEST, min(FARTHEST, self.place(self.score_axis, values)))
        mean = state.data["mean"] = now + MEMORY * (state.data.get("mean", now) - now)
        gain = 0.0
        if self.name != "unsteered":
            gain = self.pid.step(self.wanted(state.steps) - mean, state.data)
        self.keep(request.request, values, mean, gain)
        return self.pushes[1.0 if gain > 0 else -1.0].at(mean, abs(gain)) if gain else None


def run(stage: Stage, tokens: int, points: Sequence[tuple[int, float]]) -> list[Trace]:
    """Without and with the loop, of the same prompt and the same noise."""
    act, read = (stage.axis(layer) for layer in LAYERS)
    names = ("unsteered", "held")
    return [stage.run(SetPoint(name, act, read, points, Pid()), PROMPTS, tokens) for name in names]


def errors(trace: Trace, points: Sequence[tuple[int, float]]) -> list[float]:
    """Mean distance from each set point over the second half of its time."""
    found, readings = [], next(iter(trace.points.values()))
    ends = [begin for begin, _ in points[1:]] + [len(readings)]
    for (begin, height), end in zip(points, ends, strict=True):
        settled = readings[(begin + end) // 2 : end]
        found.append(sum(p.projection for p in settled) / len(settled) - height)
    return found


def main(
    out: Annotated[Path, typer.Option(help="Folder of set_point.png and set_point.json.")] = Path("out/dynamic"),
    tokens: Annotated[int, typer.Option(help="Tokens of the continuation.")] = 400,
    inner: Annotated[str, typer.Option(help="Compiler of the graphs: inductor, aot_eager or eager.")] = "inductor",
) -> None:
    """Hold a projection at a set point, change that half way, and draw what happened."""
    stage = Stage(LAYERS, len(PROMPTS), inner)
    points = [(0, 0.0), (tokens // 2, 0.5)]
    traces = run(stage, tokens, points)
    found: dict[str, Any] = {
        "set_points": points,
        "errors": {trace.name: errors(trace, points) for trace in traces},
        "texts": {trace.name: trace.texts for trace in traces},
        "checksum": stage.backend.runtime.dynamic.status()["checksum"],
    }
    out.mkdir(parents=True, exist_ok=True)
    (out / "set_point.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    heights = [(begin, end, height) for (begin, height), end in zip(points, [tokens // 2, None], strict=True)]
    draw_traces(
        out / "set_point.png",
        traces,
        {name: f"request {name!r}, set points dashed" for name in PROMPTS},
        {
            "score": f"score at layer {LAYERS[1]}, running mean\n(code 1, scripture -1)",
            "gain": f"gain of the vector\nat layer {LAYERS[0]} (+: code)",
            "projection": f"projection at layer {LAYERS[1]}\n(each token, mean of 16)",
        },
        {"score": heights, "projection": heights},
    )
    for name, distances in found["errors"].items():
        shown = ", ".join(f"{d:+.2f}" for d in distances)
        typer.echo(f"{name:>10}: mean distance from the set points, settled: {shown}")
    typer.echo(f"wrote {out / 'set_point.png'} and {out / 'set_point.json'}")


if __name__ == "__main__":
    typer.run(main)
