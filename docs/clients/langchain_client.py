"""LangChain's ChatOpenAI asks an endpoint: `python langchain_client.py URL MODEL IMAGE`."""

import sys

import openai
from langchain_core.messages import AIMessage, HumanMessage, SystemMessage
from langchain_openai import ChatOpenAI
from pydantic import BaseModel

url, model, image = sys.argv[1:]
own = {"model": model, "base_url": f"{url}/v1", "api_key": "none", "max_retries": 0, "temperature": 0}
chat = ChatOpenAI(**own, max_tokens=6)
shown = HumanMessage([{"type": "image_url", "image_url": {"url": image}}, {"type": "text", "text": "What is this?"}])
turns = [SystemMessage("Be brief."), shown]

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


bound = ChatOpenAI(**own, max_tokens=32).with_structured_output(Answer, method="json_schema").invoke(turns)
assert isinstance(bound, Answer)

try:
    chat.bind(temperature=9).invoke(turns)
except openai.BadRequestError as error:
    assert error.param == "temperature"
else:
    raise AssertionError("temperature 9 was taken")
