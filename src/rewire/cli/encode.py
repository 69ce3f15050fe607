"""`rewire encode`."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer

from rewire.cli.models import Source
from rewire.cli.options import AllowCode, Debug, Json, Quiet
from rewire.cli.screen import Screen
from rewire.errors import CheckpointError, OutputError, RewireError

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from rewire.fastpath import EncodedFile, Pooling

EXAMPLE = "Example: [cyan]rewire encode ./my-encoder passages.txt --out vectors.npy[/]"


def encode(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="A folder, or a name on the Hub, of an encoder.")
    ],
    texts: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            show_default=False,
            help="The texts: a file with one per line, .jsonl, .csv or .tsv; - is standard input.",
        ),
    ],
    out: Annotated[
        Path,
        typer.Option("--out", "-o", metavar="FILE", show_default=False, help="What to write: .npy or .parquet."),
    ],
    field: Annotated[
        str | None,
        typer.Option(metavar="NAME", show_default=False, help="Key or column that holds the texts; else `text`."),
    ] = None,
    pooling: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME",
            show_default=False,
            help="mean, cls, max, mean_sqrt_len_tokens, weightedmean, lasttoken or pooler; of several the vectors are "
            "put side by side. By default what the model's folder says, else mean.",
        ),
    ] = None,
    normalize: Annotated[
        bool | None,
        typer.Option(
            "--normalize/--no-normalize",
            show_default=False,
            help="Whether vectors get length 1. By default what the model's folder says.",
        ),
    ] = None,
    prompt: Annotated[
        str | None, typer.Option(metavar="TEXT", show_default=False, help="Text put in front of every text.")
    ] = None,
    max_length: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Tokens of a text at most; the rest is cut off."),
    ] = None,
    batch_tokens: Annotated[int, typer.Option(metavar="N", min=1, help="Tokens of one batch.")] = 4096,
    precision: Annotated[
        Literal["float32", "bfloat16", "int8"],
        typer.Option(metavar="TYPE", help="float32, or bfloat16 or int8: faster and less exact."),
    ] = "float32",
    pack: Annotated[
        bool,
        typer.Option("--pack/--no-pack", help="Whether to run on real tokens only, where the model allows it."),
    ] = True,
    resume: Annotated[
        bool, typer.Option("--resume", metavar="", help="Go on where an interrupted run ended, if there was one.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", metavar="", help="Replace the output, and what an interrupted run left.")
    ] = False,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Turn every text of a file into a vector.

    Files of any size: texts are read as they are needed, sorted by tokens and encoded in batches, and the vectors are
    written in the order of the texts. An interrupted run can be resumed. With the settings of a sentence-transformers
    folder the vectors are those of sentence-transformers.
    """
    screen = Screen(quiet, as_json)
    if precision != "float32" and not pack:
        raise typer.BadParameter(f"--precision {precision} goes with --pack")
    if overwrite and resume:
        raise typer.BadParameter("--overwrite begins anew, --resume goes on; give one of them")
    source = Source(model, allow_code=allow_code)
    if source.is_config:
        raise CheckpointError(
            "a model made from a configuration has no tokenizer; name a folder, or a model on the Hub"
        )
    source.check()
    _check_files(texts, out, overwrite)
    with screen.models():
        how = _pooling(source, pooling, normalize, prompt, max_length)
        ready, note = _model(source, screen, precision, pack)
        screen.show(note)
        options = {"field": field, "batch_tokens": batch_tokens, "resume": resume, "overwrite": overwrite}
        found = _encode(screen, source, ready, texts, out, how, identity=_identity(source, precision, pack), **options)
    screen.result(lambda: {**found.to_dict(), "pooling": list(how.modes), "normalize": how.normalize, "pack": note})
    screen.show(_line(found))


def _check_files(texts: str, out: Path, overwrite: bool) -> None:
    """What encoding would find out, before the model is loaded."""
    if texts != "-" and not Path(texts).is_file():
        raise typer.BadParameter(f"{texts} is no file")
    if out.suffix not in {".npy", ".parquet"}:
        raise typer.BadParameter(f"{out} must end in .npy or .parquet")
    if out.exists() and not overwrite:
        raise OutputError(f"{out} exists; choose another name, or allow overwriting it (--overwrite)")


def _pooling(
    source: Source, names: list[str] | None, normalize: bool | None, prompt: str | None, max_length: int | None
) -> Pooling:
    """What the folder says, and what the command line says instead."""
    from rewire import hf_seam
    from rewire.fastpath import Pooling
    from rewire.fastpath.pooling import saved_pooling

    folder = hf_seam.side_folder(source.location)
    saved = (None if names else saved_pooling(folder)) or Pooling()
    said: dict[str, Any] = {
        "modes": tuple(names) if names else None,
        "normalize": normalize,
        "prompt": prompt,
        "max_length": max_length,
    }
    return replace(saved, **{key: value for key, value in said.items() if value is not None})


def _model(source: Source, screen: Screen, precision: str, pack: bool) -> tuple[PreTrainedModel, str]:
    """The model, packed where that is wanted and possible, and a sentence on that."""
    import rewire
    from rewire.plan import Pack

    with screen.doing(f"loading {source.text}") as progress:
        model = source.open(progress=progress)
        if not pack:
            return model, "not packed, as asked"
        dtype: Any = None if precision == "float32" else precision
        try:
            receipt = rewire.apply_(model, Pack("@encoder", dtype=dtype), hashes=False)
        except RewireError as error:
            if dtype is not None:
                raise
            return model, f"not packed: {error}"
    changed = [decision for decision in receipt.decisions if decision.outcome == "changed"]
    return model, "packed: " + "; ".join(f"{decision.path} {decision.detail}" for decision in changed)


def _identity(source: Source, precision: str, pack: bool) -> dict[str, Any]:
    """What vectors depend on besides texts and pooling."""
    folder = Path(source.location)
    files = sorted(folder.glob("*.safetensors")) if folder.is_dir() else []
    weights = [[file.name, file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return {"model": source.text, "weights": weights, "precision": precision, "pack": pack}


def _encode(
    screen: Screen, source: Source, model: PreTrainedModel, texts: str, out: Path, how: Pooling, **options: Any
) -> EncodedFile:
    from rewire import hf_seam
    from rewire.fastpath import encode_file

    tokenizer = hf_seam.tokenizer_of(hf_seam.side_folder(source.location))
    with screen.doing(f"encoding {texts}") as progress:
        return encode_file(model, tokenizer, texts, out, how, progress=progress, **options)


def _line(found: EncodedFile) -> str:
    before = f", {found.resumed:,} of them by an earlier run" if found.resumed else ""
    rate = (found.rows - found.resumed) / found.seconds if found.seconds else 0.0
    speed = f"{found.seconds:.1f} s, {rate:.0f} texts/s"
    return f"{found.rows:,} vectors of {found.width} numbers{before} → {found.path} ({speed})"
