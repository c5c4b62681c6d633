"""litellm asks an endpoint with the key in VILA_API_KEY: `python litellm_client.py URL MODEL IMAGE`."""

import json
import os
import sys
from typing import Any

import litellm

url, model, image = sys.argv[1:]
own = {
    "model": f"openai/{model}",
    "api_base": f"{url}/v1",
    "api_key": os.environ["VILA_API_KEY"],
    "num_retries": 0,
    "max_tokens": 6,
}
parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}]
asked = {**own, "messages": [{"role": "user", "content": parts}]}


def refusal(kind: type[Exception], **changes: Any) -> str:
    """What the client's error says of a request that is refused."""
    try:
        litellm.completion(**{**asked, **changes})
    except kind as error:
        return str(error)
    raise AssertionError(f"a request with {changes} was answered")


whole = litellm.completion(**asked)
assert whole.usage.completion_tokens <= 6
assert whole.choices[0].finish_reason in ("stop", "length")

chunks = list(litellm.completion(**asked, stream=True, stream_options={"include_usage": True}))
assert (
    "".join(chunk.choices[0].delta.content or "" for chunk in chunks if chunk.choices)
    == whole.choices[0].message.content
)

turns = [*asked["messages"], whole.choices[0].message.model_dump(), {"role": "user", "content": "And now?"}]
assert litellm.completion(**{**own, "messages": turns}).usage.prompt_tokens > whole.usage.prompt_tokens

schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
form = {"type": "json_schema", "json_schema": {"name": "answer", "schema": schema, "strict": True}}
bound = litellm.completion(**{**asked, "max_tokens": 32}, response_format=form)
assert isinstance(json.loads(bound.choices[0].message.content)["a"], bool)

drawn = {**asked, "n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2}
without_effect = {"parallel_tool_calls": False, "service_tier": "default"}
once, again, other = (litellm.completion(**drawn, **without_effect, seed=seed) for seed in (7, 7, 8))
assert len(once.choices) == 2
for choice in once.choices:
    assert choice.logprobs.content
    assert all(one.logprob <= 0 and len(one.top_logprobs) == 2 for one in choice.logprobs.content)
texts = [[choice.message.content for choice in answer.choices] for answer in (once, again, other)]
assert texts[0] == texts[1] != texts[2]

assert "messages" in refusal(litellm.BadRequestError, messages=[])
assert "service_tier" in refusal(litellm.BadRequestError, service_tier="flex")
assert refusal(litellm.AuthenticationError, api_key="none")
