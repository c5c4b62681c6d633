"""The engine of kind vllm: vLLM's AsyncLLM behind our protocol.

It batches, caches, samples and computes in processes of its own; this module translates requests and outputs.
"""

import asyncio
import hashlib
import io
import json
import os
import threading
from collections.abc import AsyncIterator, Coroutine, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from vllm import SamplingParams
from vllm.config import StructuredOutputsConfig
from vllm.engine.arg_utils import AsyncEngineArgs
from vllm.outputs import RequestOutput
from vllm.platforms import current_platform
from vllm.sampling_params import RequestOutputKind, StructuredOutputsParams
from vllm.v1.engine.async_llm import AsyncLLM

from vila_ops.config.engine import VllmEngine
from vila_ops.data.images import Fit
from vila_ops.data.text.conversation import Tokenizer
from vila_ops.device import device_of
from vila_ops.errors import UnsupportedSetting
from vila_ops.generate.checks import check_images, check_length, check_request
from vila_ops.generate.engine import Engine, EngineOptions, ScoringItem
from vila_ops.generate.json_grammar import grammar_of
from vila_ops.generate.load import tokenizer_in
from vila_ops.generate.request import Delta, FinishReason, Loglikelihood, Prompt, Sampling, TokenLogprob
from vila_ops.model import export
from vila_ops.model.context import context_length
from vila_ops.model.folder import fit_of, normalisation
from vila_ops.packages.untrusted import read_json

DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
COLDEST = 0.01
"""vLLM raises a lower temperature to it (`_MAX_TEMP` in vllm/sampling_params.py)."""
ONE_LINE = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
"""How llguidance writes JSON, as in `json_grammar.grammar_of`."""
REASONS: Mapping[str | None, FinishReason | None] = {None: None, "stop": "stop", "length": "length", "abort": "abort"}

T = TypeVar("T")


def open_engine(config: VllmEngine, folder: Path, options: EngineOptions) -> Engine:
    """Start vLLM for a model folder. Raises CorruptArtifact, and ValueError for what vLLM cannot load."""
    if (reason := refusal(folder, options)) is not None:
        raise ValueError(f"vLLM cannot serve {folder}: {reason}; set the engine to torch")
    return VllmAdapter(folder, _arguments(config, folder, options), threads=options.threads)


def refusal(folder: Path, options: EngineOptions) -> str | None:
    """Why the vLLM of this process cannot serve a model folder; None if it can. Raises CorruptArtifact."""
    if options.precision not in DTYPES:
        return f"precision {options.precision} is of our own engine; vLLM has {', '.join(DTYPES)}"
    if (kind := device_of(options.device).type) != current_platform.device_type:
        return f"the device is {kind}, and the installed vLLM computes on {current_platform.device_type}"
    finding = export.check(folder, "vllm")
    if not finding.loads:
        return "; ".join(finding.reasons)
    text = _text_config(folder)
    size = text.get("head_dim") or text.get("hidden_size", 0) // text.get("num_attention_heads", 1)
    if kind == "cpu" and size not in (sizes := _cpu_head_sizes()):
        return f"its attention on CPUs has heads of {', '.join(map(str, sizes))} dimensions; this model's have {size}"
    return None


def _cpu_head_sizes() -> list[int]:
    from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackend  # loads its kernels

    sizes: list[int] = CPUAttentionBackend.get_supported_head_sizes()
    return sizes


def _text_config(folder: Path) -> dict[str, Any]:
    stated: dict[str, Any] = read_json(folder / "config.json").get("text_config", {})
    return stated


def _arguments(config: VllmEngine, folder: Path, options: EngineOptions) -> AsyncEngineArgs:
    _, side = fit_of(folder)
    cached = {"mm_processor_cache_gb": options.max_cached_images * 3 * side * side * 4 / 2**30}
    if options.max_batch is not None:
        cached["max_num_seqs"] = options.max_batch
    if current_platform.device_type == "cpu":  # an accelerator reads vLLM's own number of tokens at a time
        cached["max_num_batched_tokens"] = max(options.prefill_tokens, options.max_batch or 0)
    return AsyncEngineArgs(
        model=str(folder),
        load_format="safetensors",
        generation_config="vllm",  # not the folder's, whose temperature would hold where a request has none
        dtype=DTYPES[options.precision],
        max_model_len=context_length(_text_config(folder)),
        tensor_parallel_size=config.tensor_parallel,
        gpu_memory_utilization=config.memory_share,
        kv_cache_memory_bytes=config.cache_bytes,
        enable_prefix_caching=options.keep_prefixes,
        enforce_eager=not config.compiled,
        max_logprobs=-1,
        structured_outputs_config=StructuredOutputsConfig(backend="guidance"),
        disable_log_stats=True,
        **cached,
    )


@contextmanager
def _environment(threads: int) -> Iterator[None]:
    """Variables that vLLM's processes start with: no report of its use, loopback alone, and threads as asked."""
    values = {
        "VLLM_NO_USAGE_STATS": "1",
        "VLLM_HOST_IP": "127.0.0.1",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "OMP_NUM_THREADS": str(threads),
    }
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name, None)
            if value is not None:
                os.environ[name] = value


class VllmAdapter:
    """Implements `Engine`. vLLM's client lives in an event loop of its own, so callers may use any loop."""

    def __init__(self, folder: Path, arguments: AsyncEngineArgs, *, threads: int) -> None:
        self.tokenizer: Tokenizer = tokenizer_in(folder)
        fit, self.image_size = fit_of(folder)
        self.image_aspect_ratio = Fit(fit, normalisation(folder)[0])
        self.context_length: int = arguments.max_model_len
        rows = _text_config(folder)["vocab_size"]
        self._never = {self.tokenizer.image_id, *range(len(self.tokenizer.fast), rows)}
        """Ids that are no text: the image token, and the padding of the embedding."""
        self._open: set[str] = set()
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="vllm", daemon=True)
        self._thread.start()
        try:
            with _environment(threads):
                self._llm: AsyncLLM = self._called(_started(arguments))
        except BaseException:
            self._stop_loop()
            raise

    async def generate(self, prompt: Prompt, sampling: Sampling, request_id: str) -> AsyncIterator[Delta]:
        """As in `Engine`. Raises UnsupportedSetting for a temperature that vLLM would change."""
        check_request(prompt, sampling, request_id, self.tokenizer, self.context_length)
        arguments = await self._prompt(prompt), await self._params(sampling), request_id
        if request_id in self._open:
            raise ValueError(f"request {request_id!r} is not finished; choose another id")
        stream: asyncio.Queue[RequestOutput | Exception] = asyncio.Queue()
        here = asyncio.get_running_loop()

        async def forward() -> None:
            try:
                async for output in self._llm.generate(*arguments):
                    here.call_soon_threadsafe(stream.put_nowait, output)
            except Exception as error:  # noqa: BLE001 it is raised where the outputs are read
                here.call_soon_threadsafe(stream.put_nowait, error)

        self._open.add(request_id)
        forwarding = asyncio.run_coroutine_threadsafe(forward(), self._loop)
        first = True
        try:
            while True:
                output = await stream.get()
                if isinstance(output, Exception):
                    raise output
                delta = self._delta(output, sampling, first=first)
                first = False
                yield delta
                if delta.finish_reason is not None:
                    return
        finally:
            forwarding.cancel()
            self._open.discard(request_id)

    async def abort(self, request_id: str) -> None:
        """As in `Engine`."""
        if request_id in self._open:
            await self._awaited(self._llm.abort(request_id))

    async def score(self, items: Sequence[ScoringItem]) -> list[list[Loglikelihood]]:
        """As in `Engine`. vLLM reads each prompt once for each continuation, and adds a token that is dropped."""
        for number, (prompt, continuations) in enumerate(items):
            check_images(prompt, self.tokenizer, f"prompt {number}")
            for continuation in continuations:
                check_length(len(prompt.input_ids) + len(continuation) + 1, self.context_length)
        return await asyncio.gather(*(self._scores(prompt, continuations) for prompt, continuations in items))

    async def hidden_states(self, prompt: Prompt, continuation: list[int]) -> NDArray[np.float64]:
        """Raises ValueError: vLLM gives no hidden states of all layers."""
        raise ValueError("the engine vllm gives no hidden states; set the engine to torch")

    async def image_features(self, images: Sequence[bytes]) -> NDArray[np.float64]:
        """Raises ValueError: vLLM gives no features of its tower."""
        raise ValueError("the engine vllm gives no features of images; set the engine to torch")

    def close(self) -> None:
        """As in `Engine`. vLLM's processes end."""
        if self._thread.is_alive():
            self._called(self._ended())
            self._stop_loop()
            del self._llm  # it shuts itself down again when it is deleted, which fails at the end of the interpreter

    async def _ended(self) -> None:
        self._llm.shutdown()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

    async def _scores(self, prompt: Prompt, continuations: Sequence[list[int]]) -> list[Loglikelihood]:
        return await asyncio.gather(*(self._score(prompt, continuation) for continuation in continuations))

    async def _score(self, prompt: Prompt, continuation: list[int]) -> Loglikelihood:
        whole = Prompt([*prompt.input_ids, *continuation], prompt.images, prompt.cache_salt)
        params = SamplingParams(
            max_tokens=1, temperature=0, prompt_logprobs=0, detokenize=False, output_kind=RequestOutputKind.FINAL_ONLY
        )
        name = f"score-{id(whole)}"
        output = await self._awaited(self._last(await self._prompt(whole), params, name))
        known = output.prompt_logprobs[len(prompt.input_ids) :]
        nll = -sum(at[token].logprob for at, token in zip(known, continuation, strict=True))
        return Loglikelihood(float(nll), len(continuation))

    async def _last(self, prompt: dict[str, Any], params: SamplingParams, request_id: str) -> RequestOutput:
        return [output async for output in self._llm.generate(prompt, params, request_id)][-1]

    async def _prompt(self, prompt: Prompt) -> dict[str, Any]:
        """A prompt in vLLM's form: one image token for each image, and images by the hash of salt and content."""
        ids, tokens = [], iter(prompt.input_ids)
        for token in tokens:
            ids.append(token)
            if token == self.tokenizer.image_id:
                for _ in range(self.tokenizer.image_tokens - 1):
                    next(tokens)
        stated: dict[str, Any] = {"prompt_token_ids": ids}
        if prompt.cache_salt:
            stated["cache_salt"] = prompt.cache_salt
        if prompt.images:
            decoded = await asyncio.to_thread(lambda: [_decoded(image) for image in prompt.images])
            names = [hashlib.sha256(prompt.cache_salt.encode() + b"\0" + image).hexdigest() for image in prompt.images]
            stated |= {"multi_modal_data": {"image": decoded}, "multi_modal_uuids": {"image": names}}
        return stated

    async def _params(self, sampling: Sampling) -> SamplingParams:
        if 0 < sampling.temperature < COLDEST:
            text = f"{sampling.temperature} is below {COLDEST}, the lowest at which vLLM draws; use 0 for the likeliest"
            raise UnsupportedSetting("temperature", text)
        schema = None
        if sampling.json_schema is not None:
            await asyncio.to_thread(grammar_of, sampling.json_schema)  # refuses what llguidance would ignore
            schema = StructuredOutputsParams(json=json.loads(sampling.json_schema) | {"x-guidance": ONE_LINE})
        return SamplingParams(
            max_tokens=sampling.max_new_tokens,
            stop_token_ids=sorted(sampling.stop_ids),
            ignore_eos=True,  # which the stop tokens have, if it ends an answer
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            top_k=sampling.top_k,
            min_p=sampling.min_p,
            seed=_seed(sampling),
            presence_penalty=sampling.presence_penalty,
            frequency_penalty=sampling.frequency_penalty,
            repetition_penalty=sampling.repetition_penalty,
            logprobs=None if sampling.logprobs is None else sampling.logprobs + len(self._never),
            logit_bias={**sampling.logit_bias, **dict.fromkeys(self._never, -float("inf"))},
            structured_outputs=schema,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )

    def _delta(self, output: RequestOutput, sampling: Sampling, *, first: bool) -> Delta:
        (answer,) = output.outputs
        if answer.finish_reason not in REASONS:
            raise RuntimeError(f"vLLM ended a request with {answer.finish_reason!r}; its log says why")
        ids = list(answer.token_ids)
        if answer.finish_reason == "stop" and ids and ids[-1] in sampling.stop_ids:
            ids.pop()
        known = answer.logprobs or () if sampling.logprobs is not None else ()
        logprobs = tuple(self._logprob(token, at, sampling) for token, at in zip(ids, known, strict=False))
        return Delta(ids, REASONS[answer.finish_reason], logprobs, (output.num_cached_tokens or 0) if first else 0)

    def _logprob(self, token: int, at: Mapping[int, Any], sampling: Sampling) -> TokenLogprob:
        excluded = self._never | {one for one, bias in sampling.logit_bias.items() if bias == -float("inf")}
        likely = sorted((-one.logprob, number) for number, one in at.items() if number not in excluded)
        return TokenLogprob(
            token, at[token].logprob, tuple((number, -nats) for nats, number in likely[: sampling.logprobs])
        )

    async def _awaited(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return await asyncio.wrap_future(asyncio.run_coroutine_threadsafe(coroutine, self._loop))

    def _called(self, coroutine: Coroutine[Any, Any, T]) -> T:
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop).result()

    def _stop_loop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()


async def _started(arguments: AsyncEngineArgs) -> AsyncLLM:
    """vLLM's client, bound to the running loop. Blocks until its processes have loaded the model."""
    return AsyncLLM.from_engine_args(arguments)


def _decoded(square: bytes) -> Image.Image:
    return Image.open(io.BytesIO(square)).convert("RGB")


def _seed(sampling: Sampling) -> int | None:
    """A seed of 63 bits of seed and choice, so that the answers to one prompt differ."""
    if sampling.seed is None:
        return None
    text = f"{sampling.seed} {sampling.choice}".encode()
    return int.from_bytes(hashlib.sha256(text).digest()[:8], "big") >> 1
