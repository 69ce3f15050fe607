"""`rewire perplexity` and `rewire quality`: is an edited model still as good?"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from rewire.cli.models import Source
from rewire.cli.options import AllowCode, Debug, Dtype, Json, Quiet
from rewire.cli.screen import Screen
from rewire.errors import CheckpointError, MeasureError

if TYPE_CHECKING:
    from rewire import Plan
    from rewire.measure import Perplexity

PERPLEXITY = "Example: [cyan]rewire perplexity ./my-model book.txt --plan cast.yaml[/]"
QUALITY = "Example: [cyan]rewire quality ./my-encoder --plan pack-int8.yaml[/]"

BUILTIN = "builtin"
"""Stands for Python's own documentation in place of a file."""

CHARACTERS = 200_000
"""How much of it."""

PlanFile = Annotated[
    Path | None,
    typer.Option(
        "--plan",
        "-p",
        metavar="FILE",
        show_default=False,
        help="A plan: the model is measured before and after it.",
    ),
]


def perplexity(
    model: Annotated[
        str,
        typer.Argument(metavar="MODEL", show_default=False, help="A folder, or a name on the Hub, with a tokenizer."),
    ],
    text: Annotated[
        str,
        typer.Argument(
            metavar="TEXT",
            show_default=False,
            help="A file of text in UTF-8; - is standard input, builtin is Python's own documentation.",
        ),
    ],
    plan: PlanFile = None,
    window: Annotated[
        int | None,
        typer.Option(metavar="N", min=2, show_default=False, help="Tokens in a window; else what the model takes."),
    ] = None,
    stride: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Tokens from window to window; else half a window."),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(metavar="N", min=1, show_default=False, help="Windows at once; else as many as memory allows."),
    ] = None,
    dtype: Dtype = "auto",
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Measure the perplexity of a causal language model on a text.

    The text goes through the model in windows that overlap. Only tokens that no earlier window has scored count, and
    the mean is over tokens. With --plan the model is measured before and after, on the same windows, and the ratio
    comes with a 95 % interval.
    """
    screen = Screen(quiet, as_json)
    source = _source(model, dtype, allow_code)
    wanted = None if plan is None else _read_plan(plan)
    content = _text(text)
    with screen.models():
        job = _PerplexityJob(source, content, {"window": window, "stride": stride, "batch": batch}, screen)
        if wanted is None:
            found: Any = job.measure(None)
        else:
            from rewire.measure.likelihood import compare

            found = compare(job.measure(None), job.measure(wanted))
    screen.result(found.to_dict)
    screen.show(found.summary())


def _source(text: str, dtype: str, allow_code: bool) -> Source:
    source = Source(text, dtype=dtype, allow_code=allow_code)
    if source.is_config:
        raise CheckpointError(f"{text} has random weights and no tokenizer; name a folder, or a model on the Hub")
    source.check()
    return source


def _read_plan(path: Path) -> Plan:
    import rewire

    return rewire.Plan.read(path)


def _text(name: str) -> str:
    if name == BUILTIN:
        from rewire.measure.texts import real_text

        return real_text(CHARACTERS)
    try:
        return sys.stdin.read() if name == "-" else Path(name).read_text("utf-8")
    except OSError as error:
        raise MeasureError(f"{name} cannot be read: {error.strerror or error}") from error
    except UnicodeDecodeError as error:
        raise MeasureError(f"{name} is not UTF-8 text ({error.reason}); convert it first") from error


class _PerplexityJob:
    """One text, measured with one model after the other."""

    def __init__(self, source: Source, text: str, how: dict[str, int | None], screen: Screen) -> None:
        from rewire import hf_seam

        self.source, self.how, self.screen = source, how, screen
        tokenizer = hf_seam.tokenizer_of(hf_seam.side_folder(source.location))
        self.tokens = tokenizer(text, verbose=False)["input_ids"]
        self.text_bytes = len(text.encode("utf-8"))

    def measure(self, plan: Plan | None) -> Perplexity:
        from rewire.measure import perplexity

        what = "before the plan" if plan is None else "after the plan"
        with self.screen.doing(f"loading {self.source.text} {what}"):
            model = self.source.open(plan)
        with self.screen.doing("measuring") as progress:
            return perplexity(model, self.tokens, text_bytes=self.text_bytes, progress=progress, **self.how)


# ---------------------------------------------------------------- encoders


def quality(
    model: Annotated[
        str, typer.Argument(metavar="MODEL", show_default=False, help="A folder, or a name on the Hub, of an encoder.")
    ],
    plan: Annotated[Path, typer.Option("--plan", "-p", metavar="FILE", show_default=False, help="The plan to judge.")],
    texts: Annotated[
        str | None,
        typer.Option(
            metavar="FILE",
            show_default=False,
            help="Texts, as for rewire encode; else 500 sentences of Python's documentation.",
        ),
    ] = None,
    field: Annotated[
        str | None, typer.Option(metavar="NAME", show_default=False, help="Key or column that holds the texts.")
    ] = None,
    least_cosine: Annotated[
        float | None,
        typer.Option(metavar="X", show_default=False, help="Exit with 1 if a cosine is lower, such as 0.999."),
    ] = None,
    allow_code: AllowCode = False,
    as_json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Compare the embeddings of an encoder before and after a plan.

    Shows the cosine of the two embeddings of each text, and the rank correlation of the similarities of all pairs of
    texts, which says whether searches still find the same.
    """
    from rewire.cli.guard import Code, complain

    screen = Screen(quiet, as_json)
    source = _source(model, "auto", allow_code)
    wanted = _read_plan(plan)
    with screen.models():
        found = _quality(source, wanted, _texts(texts, field), screen)
    screen.result(found.to_dict)
    screen.show(found.summary())
    if least_cosine is not None and found.worst_cosine < least_cosine:
        complain("quality", f"the worst cosine is {found.worst_cosine:.6f}, less than {least_cosine}")
        raise typer.Exit(Code.PROOF_FAILED)


def _texts(name: str | None, field: str | None) -> list[str]:
    if name is None:
        from rewire.measure.texts import real_sentences

        return real_sentences(500)
    from rewire.fastpath.texts import open_texts

    with open_texts(name, field) as found:
        return list(found)


def _quality(source: Source, plan: Plan, texts: Sequence[str], screen: Screen) -> Any:
    from rewire import Plan, hf_seam
    from rewire.fastpath import Pooling, encode
    from rewire.fastpath.pooling import saved_pooling
    from rewire.measure import quality

    folder = hf_seam.side_folder(source.location)
    how = saved_pooling(folder) or Pooling()
    tokenizer = hf_seam.tokenizer_of(folder)
    settings: dict[str, Any] = {"pooling": how.modes, "max_length": how.max_length, "prompt": how.prompt}
    found = []
    for one, what in ((Plan([]), "before the plan"), (plan, "after the plan")):
        with screen.doing(f"loading {source.text} {what}"):
            model = source.open(one)
        with screen.doing("encoding") as progress:
            found.append(encode(model, tokenizer, texts, progress=progress, **settings))
    return quality(*found)
