"""Modular files: write a model as its differences to others, get the stand-alone files that users import.

Text goes in, text comes out: nothing is imported, neither models nor torch. The way of a modular file:

`files` reads it and its `parents`; `view` renames these; `classes`, `methods` and `supers` write each class over its
parent class; `scopes`, `order` and `gather` add what the classes need; `uses` and `imports` choose the imports;
`render` makes text of it, `tidy` formats it.
"""

from rewire.source.build import Conversion, Workspace, build, convert, workspace
from rewire.source.corpus import Built, build_many
from rewire.source.errors import RULES, Problem, SourceError
from rewire.source.fragments import Definition, Fragment, Origin
from rewire.source.graph import Outline, inheritance, levels, outline
from rewire.source.import_statements import Guard, Import
from rewire.source.modules import Package, ParentModule, generating_file, modular_files, package_around
from rewire.source.names import Names, file_type, names_of
from rewire.source.render import Generated
from rewire.source.rules import NEWEST, SINCE, Rules, rules_for
from rewire.source.tidy import FormatterError, find_ruff, tidy

__all__ = [
    "build",
    "build_many",
    "convert",
    "Built",
    "Conversion",
    "Generated",
    "Definition",
    "Fragment",
    "Origin",
    "Import",
    "Guard",
    "Workspace",
    "workspace",
    "Problem",
    "SourceError",
    "FormatterError",
    "RULES",
    "Rules",
    "NEWEST",
    "SINCE",
    "rules_for",
    "Outline",
    "outline",
    "inheritance",
    "levels",
    "Package",
    "ParentModule",
    "package_around",
    "generating_file",
    "modular_files",
    "Names",
    "names_of",
    "file_type",
    "find_ruff",
    "tidy",
]
