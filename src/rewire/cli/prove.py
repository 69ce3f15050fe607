"""`rewire prove`."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.guard import Code, complain
from rewire.cli.models import Source, is_config, parse_values
from rewire.cli.options import Allow, AllowCode, Debug, Dtype, Html, Json, Quiet, Seed, Values
from rewire.cli.screen import Screen
from rewire.errors import ProofError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

EXAMPLE = "Example: [cyan]rewire prove ./original ./edited --html proof.html[/]"


def _seeds(text: str) -> str:
    if not all(part.strip().isdecimal() for part in text.split(",")):
        raise typer.BadParameter(f"{text!r} is not a list of numbers such as 0,1,2")
    return text


def prove(
    a: Annotated[
        str,
        typer.Argument(
            metavar="A", show_default=False, help="The untouched model: a folder, a name on the Hub, or config:TYPE."
        ),
    ],
    b: Annotated[
        str,
        typer.Argument(
            metavar="B",
            show_default=False,
            help="The edited one; a folder that rewire wrote is edited again as it records.",
        ),
    ],
    gradients: Annotated[
        bool, typer.Option("--gradients/--no-gradients", metavar="", help="Whether to compare gradients too.")
    ] = True,
    seeds: Annotated[
        str, typer.Option(metavar="N,…", callback=_seeds, help="Seeds of the inputs; more take longer.")
    ] = "0,1",
    dtype: Dtype = "auto",
    values: Values = None,
    seed: Seed = 0,
    allow: Allow = None,
    allow_code: AllowCode = False,
    html: Html = None,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Prove that an edited model computes what the untouched one does.

    Compares weights, outputs over many inputs, gradients and the way back, names the first module that differs, and
    makes sure that the outputs would show a mistake. Exits with 1 if the proof fails.
    """
    import rewire

    screen = Screen(quiet, as_json)
    values_given = parse_values(values)
    sources = [
        Source(text, values_given if is_config(text) else {}, seed, dtype, tuple(allow or ()), allow_code)
        for text in (a, b)
    ]
    if values_given and not any(source.is_config for source in sources):
        raise typer.BadParameter("--set is for config:TYPE; a folder has its own configuration")
    for source in sources:
        source.check()
    with screen.models():
        models = [_open(source, screen) for source in sources]
        rules = _agreed_rules(*models)
        numbers = tuple(int(part) for part in seeds.split(","))
        with screen.doing("proving") as progress:
            proof = rewire.prove(*models, seeds=numbers, gradients=gradients, progress=progress, **rules)
        screen.show(proof)
        screen.result(lambda: json.loads(proof.to_json()))
        if html is not None:
            proof.write(html)
            screen.show(f"the proof as a page: {html}")
        if not proof.passed:
            if quiet or as_json:
                complain("proof failed", proof.summary().removeprefix("FAILED: "))
            raise typer.Exit(Code.PROOF_FAILED)


def _open(source: Source, screen: Screen) -> PreTrainedModel:
    with screen.doing(f"loading {source.text}") as progress:
        return source.open(progress=progress)


def _agreed_rules(before: PreTrainedModel, after: PreTrainedModel) -> dict[str, Any]:
    """No rules where both models were edited alike; those of the edited model's receipt otherwise."""
    from rewire.receipts import receipt_of

    first, second = receipt_of(before), receipt_of(after)
    if first is None:
        return {}
    if second is None or first.plan_hash != second.plan_hash:
        raise ProofError("A is an edited model itself, by another plan than B; name the untouched model first")
    return {"rules": (), "promise": "exact"}
