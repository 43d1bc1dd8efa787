"""Where a model comes from: paths, the hub's cache folder, and the demonstration model's name."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from golden_weights import load_case, write_case_folder

from jaxinfer.errors import CheckpointNotFoundError
from jaxinfer.loading import resolve


def test_hub_ids_are_found_in_the_hubs_own_cache(tmp_path):
    """The real fetching code against a cache folder as huggingface_hub lays it out, offline."""
    revision = "a" * 40
    repository = tmp_path / "models--someone--tiny-llama"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(revision)
    write_case_folder(load_case("mha"), repository / "snapshots" / revision)
    program = (
        "import json; from jaxinfer.loading import open_source; s = open_source('someone/tiny-llama');"
        "print(json.dumps([str(s.path), s.config.layers]))"
    )
    env = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(tmp_path), "PYTHONPATH": str(Path(__file__).parents[2])}
    done = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=120, check=True)
    path, layers = json.loads(done.stdout)
    assert path == str(repository / "snapshots" / revision) and layers > 0


@pytest.mark.parametrize("source", ["no/such/folder", "nothing-here", "./gone", "a b/c"])
def test_what_is_neither_a_path_nor_a_hub_id_is_said_to_be_so(source):
    with pytest.raises(CheckpointNotFoundError, match="is neither a path that exists, nor a hub id"):
        resolve(source)
