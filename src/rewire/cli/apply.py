"""`rewire apply`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewire.cli.guard import Code, complain
from rewire.cli.models import Source, parse_values
from rewire.cli.options import Allow, AllowCode, Debug, Dtype, Html, Json, Model, Quiet, Seed, Values
from rewire.cli.screen import Screen
from rewire.errors import PlanError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rewire import Plan, Proof, Receipt

EXAMPLE = "Example: [cyan]rewire apply ./my-model --plan plan.yaml --out ./edited --prove[/]"


def apply(
    model: Model,
    plan: Annotated[
        Path, typer.Option("--plan", "-p", metavar="FILE", show_default=False, help="The plan: what to change.")
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="DIR", show_default=False, help="The folder to write; new or empty."),
    ],
    prove: Annotated[
        bool,
        typer.Option(
            "--prove",
            metavar="",
            help="Before saving, compare the result with the untouched model; write nothing if that fails.",
        ),
    ] = False,
    layout: Annotated[
        Literal["original", "edited"],
        typer.Option(
            metavar="LAYOUT",
            help="original: tensors by the names of the untouched model, so that anyone can load DIR; "
            "edited: as they are now. rewire.load brings the edited model back from both.",
        ),
    ] = "original",
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the model that DIR holds.")
    ] = False,
    merge_adapters: Annotated[
        bool,
        typer.Option(
            "--merge-adapters",
            metavar="",
            help="Merge LoRA adapters into the weights instead of saving them beside.",
        ),
    ] = False,
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
    """Edit a model as a plan says, and save it.

    Either everything is done or nothing: a plan that does not fit is refused with the reason before anything changes,
    and DIR appears whole or not at all. Tokenizer and other side files are copied along.
    """
    screen = Screen(quiet, as_json)
    source = Source(model, parse_values(values), seed, dtype, tuple(allow or ()), allow_code)
    if html is not None and not prove:
        raise typer.BadParameter("--html goes with --prove")
    wanted = _read(plan)
    source.check()
    _check_output(out, overwrite)
    with screen.models():
        job = _Job(source, wanted, screen)
        job.edit()
        proof = job.prove(html) if prove else None
        if proof is not None and not proof.passed:
            screen.result(lambda: _data(job.receipt, proof, None))
            detail = proof.summary().removeprefix("FAILED: ") if quiet or as_json else ""
            complain("proof failed", f"nothing was written to {out}", detail)
            raise typer.Exit(Code.PROOF_FAILED)
        job.save(out, layout=layout, overwrite=overwrite, merge_adapters=merge_adapters)
        screen.result(lambda: _data(job.receipt, proof, out))
        screen.show(f"saved to {out} ({layout} layout)")


def _read(path: Path) -> Plan:
    import rewire

    plan = rewire.Plan.read(path)
    if not plan.edits:
        raise PlanError(f"{path} has no edits, so there is nothing to do")
    return plan


def _check_output(folder: Path, overwrite: bool) -> None:
    """What saving would find out, before minutes are spent."""
    from rewire.artefact import check_destination

    check_destination(folder, overwrite=overwrite)


def _data(receipt: Receipt, proof: Proof | None, out: Path | None) -> dict[str, Any]:
    return {
        "out": None if out is None else str(out),
        "receipt": receipt.to_dict(),
        "proof": None if proof is None else json.loads(proof.to_json()),
    }


class _Job:
    """One run of the command: the model as it goes through its steps."""

    model: PreTrainedModel
    receipt: Receipt

    def __init__(self, source: Source, plan: Plan, screen: Screen) -> None:
        self.source = source
        self.plan = plan
        self.screen = screen

    def edit(self) -> None:
        import rewire

        with self.screen.doing(f"loading and editing {self.source.text}") as progress:
            self.model = self.source.open(self.plan, progress)
        with self.screen.doing("hashing the tensors"):
            self.receipt = rewire.receipt(self.model)
        self.screen.show(self.receipt, "")

    def prove(self, html: Path | None) -> Proof:
        import rewire

        with self.screen.doing(f"loading {self.source.text} untouched"):
            before = self.source.open(rewire.Plan([]))
        with self.screen.doing("proving") as progress:
            proof = rewire.prove(before, self.model, progress=progress)
        self.screen.show(proof, "")
        if html is not None:
            proof.write(html)
            self.screen.show(f"the proof as a page: {html}")
        return proof

    def save(self, out: Path, **options: Any) -> None:
        import rewire
        from rewire import hf_seam

        with self.screen.doing(f"saving to {out}"):
            sides = None if self.source.is_config else hf_seam.side_folder(self.source.location)
            rewire.save(self.model, out, side_files_from=sides, **options)
