"""A probe that engages a vector only when it fires: ``python -m steer_compile.demo.engage``.

Two requests run side by side in one batch, a prompt of code and one of scripture. A probe at one layer reads how much
like code the stream is. Where that is above a threshold, a vector toward scripture is added: in proportion to the
excess, or latched, for the rest of the request. The other request is left alone, by the same controller.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from steer_compile.demo.dynamic_plot import draw_traces
from steer_compile.demo.dynamic_run import Axis, Stage, Trace, Traced
from steer_compile.dynamic.steering_controller import Decision, RequestState, Values
from steer_compile.dynamic.views import RequestView

LAYERS = (1, 3)
"""Where the probe reads and the vector is added, and where its effect is read."""
THRESHOLD, SLOPE, STRENGTH = 0.35, 2.0, 3.0
MEMORY = 0.9
"""Of the running mean of the score from one step to the next."""
PROMPTS = {
    "code": "import os\n\n\nclass Node:\n    def __init__(self, name):\n        ",
    "scripture": "And it came to pass in those days, that the king of Israel sent ",
}


class Engage(Traced):
    """Adds a vector in proportion to how far the running mean of a score is above a threshold.

    Args:
        mode: ``unsteered`` only looks; ``proportional``; ``latched``: full strength from the first time on.
    """

    def __init__(self, mode: str, score: Axis, projection: Axis) -> None:
        super().__init__(mode, score, projection)
        self.mode = mode
        self.away = Decision({score.site: -score.vector})

    def decide(self, request: RequestView, values: Values, state: RequestState) -> Decision | None:
        now = self.place(self.score_axis, values)
        mean = state.data["mean"] = now + MEMORY * (state.data.get("mean", now) - now)
        excess = mean - THRESHOLD
        fired = state.data["fired"] = excess > 0 or (self.mode == "latched" and state.data.get("fired", False))
        gain = 0.0 if self.mode == "unsteered" or not fired else STRENGTH
        if self.mode == "proportional":
            gain *= min(1.0, SLOPE * excess) if fired else 0.0
        self.keep(request.request, values, mean, gain)
        return self.away.at(mean, gain) if gain else None


def run(stage: Stage, tokens: int) -> list[Trace]:
    """The three runs, of the same prompts and the same noise."""
    axes = [stage.axis(layer) for layer in LAYERS]
    return [stage.run(Engage(mode, *axes), PROMPTS, tokens) for mode in ("unsteered", "proportional", "latched")]


def report(traces: Sequence[Trace], stage: Stage) -> dict[str, Any]:
    """Mean gain and projection of each request in each run, its text, and the control plane's own account."""
    runs = {}
    for trace in traces:
        runs[trace.name] = {
            name: {
                "mean_gain": sum(p.gain for p in points) / len(points),
                "mean_projection": sum(p.projection for p in points[1:]) / max(1, len(points) - 1),
                "text": trace.texts[name],
            }
            for name, points in trace.points.items()
        }
    status = stage.backend.runtime.dynamic.status()
    return {"runs": runs, "actions": status["actions"], "checksum": status["checksum"]}


def main(
    out: Annotated[Path, typer.Option(help="Folder of engage.png and engage.json.")] = Path("out/dynamic"),
    tokens: Annotated[int, typer.Option(help="Tokens of each continuation.")] = 240,
    inner: Annotated[str, typer.Option(help="Compiler of the graphs: inductor, aot_eager or eager.")] = "inductor",
) -> None:
    """Engage a vector where a probe fires, and draw what happened."""
    stage = Stage(LAYERS, len(PROMPTS), inner)
    traces = run(stage, tokens)
    found = report(traces, stage)
    out.mkdir(parents=True, exist_ok=True)
    (out / "engage.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
    draw_traces(
        out / "engage.png",
        traces,
        {"code": "request 'code'", "scripture": "request 'scripture': it never fires, so all runs are one"},
        {
            "score": f"score at layer {LAYERS[0]}, running mean\n(code 1, scripture -1)",
            "gain": "gain of the vector\ntoward scripture",
            "projection": f"projection at layer {LAYERS[1]}\n(each token, mean of 16)",
        },
        {"score": [(None, None, THRESHOLD)]},
    )
    for name, requests in found["runs"].items():
        for request, data in requests.items():
            text = data["text"].replace("\n", "\\n")[:88]
            typer.echo(f"{name:>12} {request:>9}: gain {data['mean_gain']:.2f}, {data['mean_projection']:+.2f}  {text}")
    typer.echo(f"wrote {out / 'engage.png'} and {out / 'engage.json'}")


if __name__ == "__main__":
    typer.run(main)
