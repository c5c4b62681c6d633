"""What a reader waits under load: image chats as a Poisson process to our endpoint and to `transformers serve`.

The rate is a share of what `transformers serve` answers alone. It computes one answer after the other
(benchmarks/serving.py), so its tokens come without a pause once they come, and what waits is the whole answer. So
beside the time between tokens stands that to the first token and to the last, from when the request was sent. Target:
the 99th percentile of the time between tokens is lower, and so are those of the other two.
"""

import tempfile
from pathlib import Path

import numpy as np
from result import result
from serving import (
    SMALL,
    Answered,
    chat,
    closed_loop,
    demo_version,
    open_loop,
    our_server,
    photos,
    transformers_server,
)

COUNT = 4 if SMALL else 30
SHARES = (0.8, 1.6)
"""Of the rate at which `transformers serve` answers one client."""


def main() -> None:
    """Measure and write the result."""
    loads: dict[str, dict[str, dict[str, float]]] = {}
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        version = demo_version(root)
        with our_server(version, root) as ours, transformers_server(version, root) as peer:
            warm = [chat(image) for image in photos(3, seed=99)]
            closed_loop(ours, warm, clients=3)
            closed_loop(peer, warm[:1], clients=1)
            capacity = len(warm) / closed_loop(peer, warm, clients=1)[0]
            for number, share in enumerate(SHARES):
                requests = [chat(image) for image in photos(COUNT, seed=number)]
                loads[f"{share}"] = {
                    name: percentiles(open_loop(server, requests, rate=share * capacity, seed=number))
                    for name, server in (("ours", ours), ("peer", peer))
                }
                print(share, loads[f"{share}"], flush=True)
    lower = [of["ours"][name] < of["peer"][name] for of in loads.values() for name in of["ours"] if "p99" in name]
    high = loads[f"{SHARES[-1]}"]
    result(
        "serve_latency", ours=high["ours"]["whole_p99"], peer=high["peer"]["whole_p99"], target=1.0, ok=all(lower),
        unit="seconds to the whole answer, 99th percentile", peer_requests_per_second=round(capacity, 3), loads=loads,
    )  # fmt: skip


def percentiles(answers: list[Answered]) -> dict[str, float]:
    """Median and 99th percentile, in seconds."""
    measured = {
        "first_token": [one.first for one in answers],
        "between_tokens": [wait for one in answers for wait in one.between()],
        "whole": [one.whole for one in answers],
    }
    return {
        f"{name}_p{percent}": round(float(np.percentile(values, percent)), 4)
        for name, values in measured.items()
        for percent in (50, 99)
    }


if __name__ == "__main__":
    main()
