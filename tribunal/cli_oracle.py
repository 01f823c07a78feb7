"""``tribunal ask``: put a question to a trained oracle by hand.

tribunal ask experiments/demo.yaml --trace 47+77/0 --sentence 1 c
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from tribunal.cluster import launch
from tribunal.cluster.job import root
from tribunal.core import receipts


def register(app: typer.Typer) -> None:
    """Add the command to the app."""
    app.command()(ask)


def ask(
    experiment: Annotated[Path, typer.Argument(help="the experiment file", metavar="EXPERIMENT.yaml")],
    question: Annotated[str, typer.Argument(help="in words; to the built-in reasoner's oracle one of its codes, e.g. c for the carry")],
    trace: Annotated[str, typer.Option(help="problem_id/sample, as in traces.jsonl")],
    sentence: Annotated[int, typer.Option(help="number of the sentence in labels.jsonl, from 0")],
    layer: Annotated[int | None, typer.Option(help="layer to read; default: the middle one of those trained on")] = None,
    step: Annotated[int | None, typer.Option(help="ask the adapter kept at this step; default: the best one")] = None,
) -> None:
    """Ask the oracle about a sentence of a trace; the answers without its activations stand beside."""

    def body() -> int:
        loaded_experiment = launch.open_experiment(experiment, [])
        results = root() / "results" / loaded_experiment.name
        folders = {job: results / job for job in ("generate_traces", "label_traces", "train_oracle")}
        for folder in folders.values():
            receipts.require(folder, "ask")
        from tribunal.models.loading import load_model
        from tribunal.oracle.asking import ask as put

        reply = put(
            load_model(loaded_experiment.model),
            folders["train_oracle"],
            traces=folders["generate_traces"],
            labels=folders["label_traces"],
            trace_key=trace,
            sentence=sentence,
            question=question,
            layer=layer,
            step=step,
        )
        print(f"sentence {sentence} of {trace}: {reply.sentence}")
        print(f"oracle (step {reply.step}; {len(reply.tokens)} tokens at layer {', '.join(map(str, reply.layers))}): {reply.answer}")
        if reply.unseen:
            print(f"note: this was not trained on layer {', '.join(map(str, reply.unseen))}")
        print(f"with nothing injected: {reply.zeroed}")
        if reply.text_only is not None:
            print(f"trained without activations: {reply.text_only}")
        return 0

    sys.exit(launch.guarded(body))
