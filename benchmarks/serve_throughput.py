"""Image chats a second in closed loops: our endpoint beside `transformers serve` (benchmarks/serving.py).

Every request has an image that no other has, so no cache helps but that of the template's first words. Rounds
alternate between the servers. `same_text` is the share of answers that are equal; both decode greedily in fp32.
Targets: 3 times the requests at 16 clients (4 times the goal), no fewer than 0.95 times with one.
"""

import statistics
import tempfile
from pathlib import Path

from result import result
from serving import NEW_TOKENS, SMALL, chat, closed_loop, demo_version, our_server, photos, transformers_server

ROUNDS = 1 if SMALL else 2
LOADS = {1: 2, 4: 4} if SMALL else {1: 5, 16: 32}
"""Clients -> requests of a round."""
TARGET = 3.0


def main() -> None:
    """Measure and write the result."""
    rates: dict[str, dict[int, list[float]]] = {name: {clients: [] for clients in LOADS} for name in ("ours", "peer")}
    same: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        version = demo_version(root)
        with our_server(version, root) as ours, transformers_server(version, root) as peer:
            for server in (ours, peer):
                closed_loop(server, [chat(photos(1, seed=99)[0])], clients=1)
            for number in range(ROUNDS):
                for clients, count in LOADS.items():
                    requests = [chat(image) for image in photos(count, seed=100 * number + clients)]
                    texts = {}
                    for name, server in (("ours", ours), ("peer", peer)):
                        seconds, answers = closed_loop(server, requests, clients=clients)
                        rates[name][clients].append(round(count / seconds, 3))
                        texts[name] = [one.text.strip() for one in answers]
                    same += [one == other for one, other in zip(texts["ours"], texts["peer"], strict=True)]
                    print(
                        {name: {n: values for n, values in of.items() if values} for name, of in rates.items()},
                        flush=True,
                    )
    one, many = min(LOADS), max(LOADS)
    medians = {name: {n: statistics.median(values) for n, values in of.items()} for name, of in rates.items()}
    alone = round(medians["ours"][one] / medians["peer"][one], 3)
    result(
        "serve_throughput", ours=medians["ours"][many], peer=medians["peer"][many], target=TARGET,
        ok=medians["ours"][many] >= TARGET * medians["peer"][many] and alone >= 0.95, unit="requests/s",
        clients=many, ratio_of_one_client=alone, new_tokens=NEW_TOKENS, rates=rates,
        same_text=round(sum(same) / len(same), 3),
    )  # fmt: skip


if __name__ == "__main__":
    main()
