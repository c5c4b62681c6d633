// The official npm client asks an endpoint with the key in VILA_API_KEY: `node openai_client.mjs URL MODEL IMAGE`.
import assert from "node:assert/strict";
import OpenAI from "openai";

const [url, model, image] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: process.env.VILA_API_KEY, maxRetries: 0 });
const content = [{ type: "image_url", image_url: { url: image } }, { type: "text", text: "What is this?" }];
const asked = { model, messages: [{ role: "user", content }], max_tokens: 6 };

const models = await client.models.list();
assert.equal(models.data[0].id, model);
const whole = await client.chat.completions.create(asked);
assert.ok(whole.usage.completion_tokens <= 6);

let text = "", usage = null, reason = null;
for await (const chunk of await client.chat.completions.create({ ...asked, stream: true, stream_options: { include_usage: true } })) {
  text += chunk.choices[0]?.delta?.content ?? "";
  reason = chunk.choices[0]?.finish_reason ?? reason;
  usage = chunk.usage ?? usage;
}
assert.equal(text, whole.choices[0].message.content);
assert.equal(reason, whole.choices[0].finish_reason);
assert.equal(usage.completion_tokens, whole.usage.completion_tokens);

const turns = [...asked.messages, whole.choices[0].message, { role: "user", content: "And now?" }];
const second = await client.chat.completions.create({ ...asked, messages: turns });
assert.ok(second.usage.prompt_tokens > whole.usage.prompt_tokens);

const schema = { type: "object", properties: { a: { type: "boolean" } }, required: ["a"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "answer", schema, strict: true } };
const bound = await client.chat.completions.create({ ...asked, max_tokens: 32, response_format });
assert.equal(typeof JSON.parse(bound.choices[0].message.content).a, "boolean");

const drawn = { ...asked, n: 2, temperature: 1, logprobs: true, top_logprobs: 2 };
const withoutEffect = { tools: [], parallel_tool_calls: false, service_tier: "default", reasoning_effort: "none" };
const texts = [];
for (const seed of [7, 7, 8]) {
  const { choices } = await client.chat.completions.create({ ...drawn, ...withoutEffect, seed });
  assert.equal(choices.length, 2);
  for (const { logprobs } of choices) {
    assert.ok(logprobs.content.length > 0);
    assert.ok(logprobs.content.every((one) => one.logprob <= 0 && one.top_logprobs.length === 2));
  }
  texts.push(choices.map((choice) => choice.message.content));
}
assert.deepEqual(texts[0], texts[1]);
assert.notDeepEqual(texts[0], texts[2]);

for (const [param, value] of Object.entries({ temperature: 9, service_tier: "flex" })) {
  await assert.rejects(client.chat.completions.create({ ...asked, [param]: value }), (error) =>
    error instanceof OpenAI.BadRequestError && error.param === param);
}
await assert.rejects(client.withOptions({ apiKey: "none" }).chat.completions.create(asked), OpenAI.AuthenticationError);
const stream = await client.chat.completions.create({ ...asked, stream: true });
stream.controller.abort();
