"""Each rule of the conversion, as text before and after."""

from __future__ import annotations

from pathlib import Path
from textwrap import dedent

import pytest

from rewire.source import build
from source_tree import RUFF, body_of, gemma_from_llama, needs_ruff, write_tree

pytestmark = needs_ruff

PARENT = '''
class LlamaMLP(nn.Module):
    """A gated Llama MLP."""

    bias = False  # of all three
    act: str = "silu"

    def __init__(self, config):
        super().__init__()
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size)
        self.act_fn = ACT2FN[config.hidden_act]

    @property
    def size(self):
        return self.up_proj.out_features

    def forward(self, x: torch.Tensor, scale=1.0, **kwargs) -> torch.Tensor:
        """Runs it."""
        # Llama has no dropout
        return self.act_fn(self.up_proj(x)) * scale
'''


def merged(folder: Path, modular: str, parent: str = PARENT, **settings: str) -> str:
    return gemma_from_llama(folder, parent, modular, **settings)


# ---------------------------------------------------------------- names


def test_every_capitalisation_is_renamed_in_names_strings_and_comments(tmp_path: Path) -> None:
    text = merged(tmp_path, "class GemmaMLP(LlamaMLP): pass")
    assert text == dedent(PARENT).lstrip().replace("Llama", "Gemma")


def test_text_of_f_strings_stays_but_their_expressions_do_not(tmp_path: Path) -> None:
    parent = """
    class LlamaMLP(nn.Module):
        def forward(self, llama):
            return f"Llama {llama} {'llama'} {{llama}}" + "llama"
    """
    text = merged(tmp_path, "class GemmaMLP(LlamaMLP): pass", parent)
    assert """f"Llama {gemma} {'gemma'} {{llama}}" + "gemma\"""" in text


def test_markers_of_copies_go_and_absolute_imports_stay(tmp_path: Path) -> None:
    parent = """
    # Copied from x.y.Z with Z->Llama
    class LlamaMLP(nn.Module):
        def forward(self):
            from llama.kernels import llama_kernel as kernel
            return kernel(self)
    """
    text = merged(tmp_path, "class GemmaMLP(LlamaMLP): pass", parent)
    assert "Copied" not in text
    assert "from llama.kernels import llama_kernel as kernel" in text


def test_names_of_other_packages_are_never_renamed(tmp_path: Path) -> None:
    files = {
        "mamba/modeling_mamba.py": """
            class MambaMixer(nn.Module):
                def forward(self):
                    return mamba_ssm(lazy("mamba-ssm"), self.mamba_block, "mamba-ssm and more")
            """,
        "gemma/modular_gemma.py": """
            from ..mamba.modeling_mamba import MambaMixer
            class GemmaMixer(MambaMixer): pass
            """,
    }
    models = write_tree(tmp_path, files)
    text = build(models / "gemma/modular_gemma.py", ruff=RUFF)["modeling_gemma.py"]
    assert 'return mamba_ssm(lazy("mamba-ssm"), self.gemma_block, "gemma-ssm and more")' in text
    old = build(models / "gemma/modular_gemma.py", ruff=RUFF, rules="5.14")["modeling_gemma.py"]
    assert 'return gemma_ssm(lazy("gemma-ssm"), self.gemma_block, "gemma-ssm and more")' in old


def test_a_name_all_in_capitals_stays_in_capitals_before_other_than_letters(tmp_path: Path) -> None:
    files = {
        "clip/modeling_clip.py": 'class CLIPMLP(nn.Module):\n    """CLIP layer of CLIPModel, clip_loss."""\n',
        "gemma/modular_gemma.py": "from ..clip.modeling_clip import CLIPMLP\nclass GemmaMLP(CLIPMLP): pass\n",
    }
    models = write_tree(tmp_path, files)
    text = build(models / "gemma/modular_gemma.py", ruff=RUFF)["modeling_gemma.py"]
    assert '"""GEMMA layer of GemmaModel, gemma_loss."""' in text


def test_strings_of_a_class_speak_of_the_class_that_inherits(tmp_path: Path) -> None:
    parent = 'class LlamaRMSNorm(nn.Module):\n    """LlamaRMSNorm of Llama."""\n\n    llama = "llama"\n'
    text = merged(tmp_path, "class GemmaL2Norm(LlamaRMSNorm): pass", parent)
    # One class decides: its ending is Norm, so Llama becomes GemmaL2, and then GemmaL2RMS becomes GemmaL2.
    assert text == 'class GemmaL2Norm(nn.Module):\n    """GemmaL2Norm of GemmaL2."""\n\n    gemma_l2 = "gemma_l2"\n'


def test_most_classes_decide_what_a_parent_is_renamed_to(tmp_path: Path) -> None:
    parent = "class LlamaA(nn.Module):\n    x = Llama\n\n\nclass LlamaB(nn.Module):\n    x = Llama\n"
    modular = "class GemmaTextA(LlamaA): pass\n\n\nclass GemmaTextB(LlamaB): pass\n"
    assert merged(tmp_path, modular, parent).count("x = GemmaText\n") == 2


# ---------------------------------------------------------------- attributes


def test_attributes_are_replaced_in_place_and_new_ones_come_last(tmp_path: Path) -> None:
    modular = """
    class GemmaMLP(LlamaMLP):
        new = 1
        # why not
        act: str = "gelu"
    """
    text = merged(tmp_path, modular)
    expected = '    bias = False  # of all three\n    # why not\n    act: str = "gelu"\n    new = 1\n'
    assert expected in text


def test_an_attribute_is_deleted_by_an_error(tmp_path: Path) -> None:
    text = merged(tmp_path, "class GemmaMLP(LlamaMLP):\n    bias = AttributeError()\n")
    assert "bias" not in text


def test_an_attribute_removes_a_property_since_5_17(tmp_path: Path) -> None:
    modular = "class GemmaMLP(LlamaMLP):\n    size: int = 3\n"
    assert "def size" not in merged(tmp_path, modular)
    assert "def size" in merged(tmp_path, modular, version="5.16.0")


# ---------------------------------------------------------------- methods


def test_a_removed_method(tmp_path: Path) -> None:
    modular = """
    class GemmaMLP(LlamaMLP):
        x = 1

        def forward(self):  # not here
            raise AttributeError("no")
    """
    assert "def forward" not in merged(tmp_path, modular)


@pytest.mark.parametrize("above", ["", "\n\n", "\n    @property\n"], ids=["no blank line", "two", "decorated"])
def test_a_raising_method_that_does_not_delete(tmp_path: Path, above: str) -> None:
    modular = f'class GemmaMLP(LlamaMLP):\n{above}    def forward(self):\n        raise AttributeError("no")\n'
    assert 'raise AttributeError("no")' in merged(tmp_path, modular)


def test_an_overriding_method_inherits_docstring_annotation_comments_and_decorators(tmp_path: Path) -> None:
    parent = """
    class LlamaMLP(nn.Module):
        # why it is so
        @torch.no_grad()
        def forward(self, x) -> int:
            \"\"\"Runs Llama.\"\"\"
            return x
    """
    text = merged(
        tmp_path, "class GemmaMLP(LlamaMLP):\n    # lost\n    def forward(self, y):\n        return y + 1\n", parent
    )
    expected = '''
    class GemmaMLP(nn.Module):
        # why it is so
        @torch.no_grad()
        def forward(self, y) -> int:
            """Runs Gemma."""
            return y + 1
    '''
    assert text == dedent(expected).lstrip()


def test_decorators_replace_the_parents_or_go(tmp_path: Path) -> None:
    parent = "class LlamaMLP(nn.Module):\n    @one\n    @two\n    def forward(self):\n        return 1\n"
    modular = "class GemmaMLP(LlamaMLP):\n    @{}\n    def forward(self):\n        return 2\n"
    assert "    @three\n    def forward" in merged(tmp_path / "a", modular.format("three"), parent)
    assert "@" not in merged(tmp_path / "b", modular.format("no_inherit_decorator"), parent)


def test_deprecate_kwarg_is_added_to_the_parents_decorators_since_5_24(tmp_path: Path) -> None:
    parent = (
        'class LlamaMLP(nn.Module):\n    @deprecate_kwarg("a")\n    @one\n    def forward(self):\n        return 1\n'
    )
    modular = 'class GemmaMLP(LlamaMLP):\n    @deprecate_kwarg("b")\n    def forward(self):\n        return 2\n'
    assert '    @one\n    @deprecate_kwarg("b")\n    def forward' in merged(tmp_path, modular, parent)
    assert "@one" not in merged(tmp_path, modular, parent, version="5.23.0")


def test_super_kwargs_inherit_the_parameters(tmp_path: Path) -> None:
    modular = """
    class GemmaMLP(LlamaMLP):
        def forward(self, scale=2.0, bias=None, **super_kwargs):
            return x
    """
    assert "def forward(self, x: torch.Tensor, scale=2.0, bias=None, **kwargs) -> torch.Tensor:" in merged(
        tmp_path, modular
    )


def test_a_property_and_its_setter_are_two_methods(tmp_path: Path) -> None:
    parent = """
    class LlamaMLP(nn.Module):
        @property
        def size(self):
            return 1

        @size.setter
        def size(self, value):
            self.x = value
    """
    text = merged(tmp_path, "class GemmaMLP(LlamaMLP):\n    @property\n    def size(self):\n        return 2\n", parent)
    assert "return 2" in text
    assert "self.x = value" in text


# ---------------------------------------------------------------- super()

INIT = """
class LlamaMLP(nn.Module):
    def __init__(self, config):
        super().__init__(config)
        self.a = 1
        self.b = 2
        self.c: int = 3
        self.post_init()
"""

UNRAVELLED = {
    "statements after the call follow, post_init stays last": (
        "self.d = 4",
        "self.a = 1\nself.b = 2\nself.c: int = 3\nself.d = 4\nself.post_init()",
    ),
    "an assignment replaces the parent's": (
        "self.a = 7  # new",
        "self.a = 7  # new\nself.b = 2\nself.c: int = 3\nself.post_init()",
    ),
    "del removes an assignment": ("del self.b", "self.a = 1\nself.c: int = 3\nself.post_init()"),
    "del removes an annotated assignment": ("del self.c", "self.a = 1\nself.b = 2\nself.post_init()"),
    "del and an assignment move it to the end": (
        "del self.a\nself.a = 5",
        "self.b = 2\nself.c: int = 3\nself.a = 5\nself.post_init()",
    ),
    "what is there already is not written twice": (
        "self.post_init()  # again",
        "self.a = 1\nself.b = 2\nself.c: int = 3\nself.post_init()",
    ),
}


@pytest.mark.parametrize(("after", "body"), UNRAVELLED.values(), ids=UNRAVELLED.keys())
def test_super_call_is_replaced_by_the_parents_statements(tmp_path: Path, after: str, body: str) -> None:
    head = "class GemmaMLP({}):\n    def __init__(self, config):\n        super().__init__(config)\n"
    own, expected = ("".join(f"        {line}\n" for line in lines.split("\n")) for lines in (after, body))
    assert merged(tmp_path, head.format("LlamaMLP") + own, INIT) == head.format("nn.Module") + expected


def test_statements_before_the_call_end_up_behind_super_init(tmp_path: Path) -> None:
    modular = (
        "class GemmaMLP(LlamaMLP):\n    def __init__(self, config):\n        x = 1\n        super().__init__(config)\n"
    )
    assert "        super().__init__(config)\n        x = 1\n        self.a = 1\n" in merged(tmp_path, modular, INIT)


def test_an_explicit_parent_call_becomes_super(tmp_path: Path) -> None:
    modular = """
    class GemmaMLP(LlamaMLP):
        def __init__(self, config):
            nn.Module.__init__(self)
            self.x = nn.Linear(1, 1)
            other.Module.__init__(self)
    """
    text = merged(tmp_path, modular, INIT)
    expected = "        super().__init__()\n        self.x = nn.Linear(1, 1)\n        other.Module.__init__(self)\n"
    assert text.endswith(expected)


def test_other_uses_of_super_stay(tmp_path: Path) -> None:
    modular = "class GemmaMLP(LlamaMLP):\n    def forward(self, x):\n        y = super().forward(x)\n        return y\n"
    assert "y = super().forward(x)" in merged(tmp_path, modular)


def test_assignments_are_carried_over_to_later_methods(tmp_path: Path) -> None:
    parent = """
    class LlamaMLP(nn.Module):
        def __init__(self):
            super().__init__()

        def forward(self, x):
            size = x.shape[0]
            return size
    """
    modular = """
    class GemmaMLP(LlamaMLP):
        def __init__(self):
            super().__init__()
            size = 3

        def forward(self, x):
            super().forward(x)
    """
    assert "    def forward(self, x):\n        size = 3\n        return size\n" in merged(tmp_path, modular, parent)


# ---------------------------------------------------------------- bases

BASES = {
    "kept": ("LlamaBase(PreTrainedModel)", "GemmaBase(LlamaBase)", "GemmaBase(PreTrainedModel)"),
    "replaced by one that ends alike": (
        "LlamaModel(LlamaPreTrainedModel)",
        "GemmaModel(LlamaModel, GEMMAPreTrainedModel)",
        "GemmaModel(GEMMAPreTrainedModel)",
    ),
    "replaced by a longer one": (
        "LlamaProcessor(ProcessorMixin)",
        "GemmaBlock(LlamaProcessor, OmniProcessorMixin)",
        "GemmaBlock(OmniProcessorMixin)",
    ),
    "added": ("LlamaA(Base)", "GemmaA(LlamaA, Mixed)", "GemmaA(Base, Mixed)"),
    "no nn.Module beside checkpointing": (
        "LlamaA(nn.Module)",
        "GemmaA(LlamaA, GradientCheckpointingLayer)",
        "GemmaA(GradientCheckpointingLayer)",
    ),
    "keywords are the parent's": (
        "LlamaA(TypedDict, total=False)",
        "GemmaA(LlamaA, total=True)",
        "GemmaA(TypedDict, total=False)",
    ),
}


@pytest.mark.parametrize(("parent", "own", "expected"), BASES.values(), ids=BASES.keys())
def test_bases(tmp_path: Path, parent: str, own: str, expected: str) -> None:
    assert f"class {expected}:\n" in merged(tmp_path, f"class {own}: pass\n", f"class {parent}:\n    x = 1\n")


# ---------------------------------------------------------------- what comes along

NEEDS = """
import math
from torch import nn
from .configuration_llama import LlamaConfig

logger = logging.get_logger(__name__)

def helper(x):
    return inner(x)

def inner(x):
    return math.sqrt(x)

def unneeded(x):
    return x

class LlamaAttention(nn.Module):
    def __init__(self, config: LlamaConfig):
        self.scale = helper(config.size)

class LlamaLayer(nn.Module):
    def __init__(self, config):
        self.attention = LlamaAttention(config)
        logger.info("made")
"""


def test_classes_and_functions_that_are_needed_come_along(tmp_path: Path) -> None:
    text = merged(tmp_path, "class GemmaLayer(LlamaLayer): pass", NEEDS)
    order = [line.split("(")[0] for line in text.splitlines() if line[:1] not in ("", " ")]
    assert order == [
        "import math",
        "from torch import nn",
        "from .configuration_gemma import GemmaConfig",
        "logger = logging.get_logger",
        "def helper",
        "def inner",
        "class GemmaAttention",
        "class GemmaLayer",
    ]


def test_a_new_function_replaces_the_parents_and_brings_what_it_uses(tmp_path: Path) -> None:
    modular = """
    def deepest(x):
        return x

    def helper(x):
        return deepest(x) + 1

    class GemmaLayer(LlamaLayer): pass
    """
    text = merged(tmp_path, modular, NEEDS)
    assert "return deepest(x) + 1" in text
    assert "def deepest" in text
    assert "def inner" not in text
    assert "import math" not in text


def test_an_imported_function_comes_along_with_a_plain_class(tmp_path: Path) -> None:
    files = {
        "llama/modeling_llama.py": NEEDS,
        "gemma/modular_gemma.py": """
            from torch import nn
            from ..llama.modeling_llama import helper
            class GemmaLayer(nn.Module):
                def forward(self, x):
                    return helper(x)
            """,
    }
    text = body_of(build(write_tree(tmp_path, files) / "gemma/modular_gemma.py", ruff=RUFF)["modeling_gemma.py"])
    assert [line.split("(")[0] for line in text.splitlines() if line.startswith(("def", "class"))] == [
        "def helper",
        "def inner",
        "class GemmaLayer",
    ]
    assert text.startswith("import math\n\nfrom torch import nn\n")


def test_one_file_for_each_type_with_imports_between_them(tmp_path: Path) -> None:
    files = {
        "gemma/modular_gemma.py": """
            from torch import nn
            from ...configuration_utils import PreTrainedConfig
            class GemmaConfig(PreTrainedConfig):
                size = 1
            class GemmaModel(nn.Module):
                config: GemmaConfig
            __all__ = ["GemmaConfig", "GemmaModel",]  # both
            """
    }
    texts = build(write_tree(tmp_path, files) / "gemma/modular_gemma.py", ruff=RUFF)
    assert sorted(texts) == ["configuration_gemma.py", "modeling_gemma.py"]
    assert "from .configuration_gemma import GemmaConfig\n" in texts["modeling_gemma.py"]
    assert texts["configuration_gemma.py"].endswith('\n\n__all__ = ["GemmaConfig"]\n')


def test_getattr_goes_where_its_names_go(tmp_path: Path) -> None:
    files = {
        "gemma/modular_gemma.py": """
            from ...processing_utils import ProcessorMixin
            from ...utils import f
            from torch import nn
            class GemmaProcessor(ProcessorMixin):
                x = 1
            class GemmaModel(nn.Module):
                x = 1
            __getattr__ = f(__name__, remove={"GemmaProcessorKwargs": 1, "GemmaLayer": 2}, rename={"GemmaBlock": "B"})
            """
    }
    path = write_tree(tmp_path, files) / "gemma/modular_gemma.py"
    texts = build(path, ruff=RUFF)
    assert '__getattr__ = f(__name__, remove={"GemmaProcessorKwargs": 1})' in texts["processing_gemma.py"]
    assert (
        '__getattr__ = f(__name__, remove={"GemmaLayer": 2}, rename={"GemmaBlock": "B"})' in texts["modeling_gemma.py"]
    )
    assert "__getattr__" not in build(path, ruff=RUFF, rules="5.16")["modeling_gemma.py"]


# ---------------------------------------------------------------- imports


def test_guards_keep_their_test_and_else(tmp_path: Path) -> None:
    files = {
        "gemma/modular_gemma.py": """
            from torch import nn
            from ...utils import is_x_available
            if is_x_available():
                import x
                import y
            else:
                x = None
            class GemmaModel(nn.Module):
                def forward(self):
                    return x.f(self)
            """
    }
    text = build(write_tree(tmp_path, files) / "gemma/modular_gemma.py", ruff=RUFF)["modeling_gemma.py"]
    assert "\nif is_x_available():\n    import x\nelse:\n    x = None\n" in text


def test_pil_files_load_without_torch(tmp_path: Path) -> None:
    files = {
        "gemma/modular_gemma.py": """
            import torch
            from ...image_processing_backends import PilBackend
            from ...utils import auto_docstring
            @auto_docstring
            class GemmaImageProcessorPil(PilBackend):
                def forward(self):
                    return torch.zeros(1)
            """
    }
    texts = build(write_tree(tmp_path, files) / "gemma/modular_gemma.py", ruff=RUFF)
    text = texts["image_processing_pil_gemma.py"]
    assert (
        "from ...utils import auto_docstring, is_torch_available\n\n\nif is_torch_available():\n    import torch\n"
        in text
    )


def test_words_that_begin_like_the_model_are_renamed_too(tmp_path: Path) -> None:
    files = {
        "sam/modeling_sam.py": 'class SamMLP(nn.Module):\n    """Takes a sample, re-sampled."""\n',
        "sam2/modular_sam2.py": "from ..sam.modeling_sam import SamMLP\nclass Sam2MLP(SamMLP): pass\n",
    }
    text = build(write_tree(tmp_path, files) / "sam2/modular_sam2.py", ruff=RUFF)["modeling_sam2.py"]
    assert '"""Takes a sam2ple, re-sam2pled."""' in text
