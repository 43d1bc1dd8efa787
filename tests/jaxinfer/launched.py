"""What each of several processes does with one engine; test_launch.py starts it with `jaxinfer launch`.

launched.py '{"source": PATH, "config": {...}, "prompts": [...]}': every process writes one line of JSON to stderr, process 0 to stdout.
"""

from __future__ import annotations

import json
import os
import sys
import threading
import time
from typing import Any

import jax

import jaxinfer
from jaxinfer import SamplingParams, errors
from sharding import distributed


def refused(call) -> str:
    try:
        call()
    except errors.PromptError as error:
        return str(error)
    return "accepted"


def go(number: int) -> None:
    print(f"process {os.getpid()} goes at {time.time()}", file=sys.stderr, flush=True)
    os.kill(os.getpid(), number)


def main(job: dict[str, Any]) -> dict[str, Any]:
    distributed.start()
    first = jax.process_index() == 0
    if first and "place" in job:  # where a relative source is, on this process alone
        os.chdir(job["place"])
    engine = jaxinfer.init_inference(job["source"], job["config"])
    prompts, params = job["prompts"], SamplingParams(max_tokens=job.get("tokens", 8))
    drawn = SamplingParams(max_tokens=8, temperature=1.0, seed=3)
    if "signal" in job:
        engine.generate(prompts, params)
        if jax.process_index() == job["victim"]:  # in the middle of what follows
            threading.Timer(0.5, go, [job["signal"]]).start()
        while True:
            engine.generate(prompts, params)
    on_all = engine.generate(prompts, params)
    on_first = engine.generate(prompts if first else None, params if first else None)
    sampled = engine.generate(prompts, drawn)
    stream = engine.stream(prompts[1] if first else None, params if first else None, every=2)
    pieces = [next(stream).token_ids]
    stream.close()  # before its end; the next request comes while it may still run
    after = engine.generate(prompts[0], params)
    return {
        "all": [result.token_ids for result in on_all],
        "first": [result.token_ids for result in on_first],
        "sampled": [result.token_ids for result in sampled],
        "piece": pieces[0],
        "after": after.token_ids,
        "logprob": round(engine.score(prompts[1]).total_logprob, 3),
        "differs": refused(lambda: engine.generate([[1, 2 + jax.process_index()]], params)),
        "none": refused(lambda: engine.generate(None if first else prompts, params)),
        "devices": [len(jax.local_devices()), len(jax.devices())],
    }


if __name__ == "__main__":
    answer = json.dumps(main(json.loads(sys.argv[1])))
    print(answer, file=sys.stdout if jax.process_index() == 0 else sys.stderr)
