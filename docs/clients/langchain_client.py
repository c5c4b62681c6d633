"""ChatOpenAI of LangChain asks an endpoint with the key in VILA_API_KEY: `langchain_client.py URL MODEL IMAGE`."""

import os
import sys
from typing import Any

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model, image = sys.argv[1:]
own: dict[str, Any] = {
    "model": model,
    "base_url": f"{url}/v1",
    "api_key": os.environ["VILA_API_KEY"],
    "max_retries": 0,
    "temperature": 0,
    "max_tokens": 6,
}
chat = ChatOpenAI(**own)
shown = HumanMessage([{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}])
turns = [SystemMessage("Be brief."), shown]


def refusal(kind: type[openai.APIStatusError], **changes: Any) -> openai.APIStatusError:
    """The client's error for a request that is refused."""
    try:
        ChatOpenAI(**{**own, **changes}).invoke(turns)
    except kind as error:
        return error
    raise AssertionError(f"a request with {changes} was answered")


whole = chat.invoke(turns)
assert isinstance(whole, AIMessage)
assert 0 < whole.usage_metadata["output_tokens"] <= 6
assert "".join(chunk.text for chunk in chat.stream(turns)) == whole.text
assert (
    chat.invoke([*turns, whole, HumanMessage("And now?")]).usage_metadata["input_tokens"]
    > whole.usage_metadata["input_tokens"]
)
assert len(chat.batch([turns, turns, turns])) == 3


class Answer(BaseModel):
    """What an answer is read as."""

    sure: bool


bound = ChatOpenAI(**{**own, "max_tokens": 32}).with_structured_output(Answer, method="json_schema").invoke(turns)
assert isinstance(bound, Answer)

drawn = {**own, "n": 2, "temperature": 1, "logprobs": True, "top_logprobs": 2}
without_effect = {"service_tier": "default", "model_kwargs": {"parallel_tool_calls": False}}
once, again, other = (
    ChatOpenAI(**drawn, **without_effect, seed=seed).generate([turns]).generations[0] for seed in (7, 7, 8)
)
assert len(once) == 2
for choice in once:
    tokens = choice.generation_info["logprobs"]["content"]
    assert tokens
    assert all(one["logprob"] <= 0 and len(one["top_logprobs"]) == 2 for one in tokens)
texts = [[choice.text for choice in answer] for answer in (once, again, other)]
assert texts[0] == texts[1] != texts[2]

assert refusal(openai.BadRequestError, temperature=9).param == "temperature"
assert refusal(openai.BadRequestError, service_tier="flex").param == "service_tier"
assert refusal(openai.AuthenticationError, api_key="none").status_code == 401
