"""litellm asks an endpoint: `python litellm_client.py URL MODEL IMAGE`."""

import json
import sys

import litellm

url, model, image = sys.argv[1:]
own = {"model": f"openai/{model}", "api_base": f"{url}/v1", "api_key": "none", "num_retries": 0, "max_tokens": 6}
parts = [{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}]
asked = {**own, "messages": [{"role": "user", "content": parts}]}

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

try:
    litellm.completion(**{**own, "messages": []})
except litellm.BadRequestError as error:
    assert "messages" in str(error)
else:
    raise AssertionError("a request without messages was answered")
