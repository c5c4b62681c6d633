"""Image chats a second in closed loops: our endpoint with engine torch beside the same endpoint with engine vllm.

The demo's language model with a random SigLIP tower of the size of the demo's, since vLLM computes no DINOv2. Both
engines have one thread, fp32 and the same requests, each with an image that no other has. Needs an environment with
vLLM (docs/serving.md). No target: the ratio is what it is.
"""

import statistics
import tempfile
from pathlib import Path

import vllm
from result import result
from serving import NEW_TOKENS, SMALL, Server, chat, closed_loop, demo_version, our_server, photos

ROUNDS = 1 if SMALL else 2
LOADS = {1: 1, 2: 2} if SMALL else {1: 4, 16: 32}
"""Clients -> requests of a round."""
TOWER = {"kind": "random", "architecture": "siglip", "hidden_size": 384, "num_layers": 12, "num_heads": 6}


def main() -> None:
    """Measure and write the result."""
    rates: dict[str, dict[int, list[float]]] = {name: {clients: [] for clients in LOADS} for name in ("torch", "vllm")}
    same: list[bool] = []
    with tempfile.TemporaryDirectory(prefix="vila") as folder:
        root = Path(folder)
        version = demo_version(root, vision_tower=TOWER)
        with our_server(version, root) as ours, our_server(version, root, engine="vllm") as peer:
            servers: dict[str, Server] = {"torch": ours, "vllm": peer}
            for server in servers.values():
                closed_loop(server, [chat(photos(1, seed=99)[0])], clients=1)
            for number in range(ROUNDS):
                for clients, count in LOADS.items():
                    requests = [chat(image) for image in photos(count, seed=100 * number + clients)]
                    texts = {}
                    for name, server in servers.items():
                        seconds, answers = closed_loop(server, requests, clients=clients)
                        rates[name][clients].append(round(count / seconds, 3))
                        texts[name] = [one.text for one in answers]
                    same += [one == other for one, other in zip(texts["torch"], texts["vllm"], strict=True)]
                    print(rates, flush=True)
    one, many = min(LOADS), max(LOADS)
    medians = {name: {n: statistics.median(values) for n, values in of.items()} for name, of in rates.items()}
    result(
        "serve_vllm", ours=medians["torch"][many], peer=medians["vllm"][many], target=0.0, ok=True, unit="requests/s",
        clients=many, ratio_of_one_client=round(medians["torch"][one] / medians["vllm"][one], 3), new_tokens=NEW_TOKENS,
        rates=rates, same_text=round(sum(same) / len(same), 3), vllm=vllm.__version__,
    )  # fmt: skip


if __name__ == "__main__":
    main()
