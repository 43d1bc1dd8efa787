"""Greedy ids of models on meshes over several processes; test_launch.py starts it with `jaxinfer launch`.

launched_families.py '{"meshes": [["llama", {"tensor": 2}], ...], "gguf": [PATH, PROMPT, TOKENS, {...}]}': process 0 writes the ids of
each mesh's prompts, and those of the file's model on a mesh by the configuration's `engine`, as one line of JSON on stdout, the others
on stderr. gguf is left out where there is none.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import jax

import jaxinfer
from jaxinfer import SamplingParams
from sharding import distributed

sys.path.insert(0, str(Path(__file__).parents[1]))


def main(job: dict[str, Any]) -> list[list[Any]]:
    distributed.start()
    from small_families import greedy_ids

    found: list[list[Any]] = [greedy_ids(family, **sizes) for family, sizes in job["meshes"]]
    if "gguf" in job:
        path, prompt, tokens, sizes = job["gguf"]
        config = {"dtype": "float32", "inference_max_tokens": 64, "micro_batch_size": 1, "engine": sizes}
        engine = jaxinfer.init_inference(path, config)
        found.append(engine.generate(prompt, SamplingParams(max_tokens=tokens, ignore_eos=True)).token_ids)
    return found


if __name__ == "__main__":
    answer = json.dumps({"ids": main(json.loads(sys.argv[1]))})
    print(answer, file=sys.stdout if jax.process_index() == 0 else sys.stderr)
