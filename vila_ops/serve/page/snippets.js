// A request as a program that sends it. An API key is named, never written.

const KEY = "VILA_API_KEY";

// A shell command. JSON has no line that ends the quoted here-document early, whatever the texts are.
export function curl(body, { base, withKey }) {
  const lines = [`curl -sN '${base}/chat/completions'`, "-H 'Content-Type: application/json'"];
  if (withKey) lines.push(`-H "Authorization: Bearer $${KEY}"`);
  return `${lines.join(" \\\n  ")} --data-binary @- <<'JSON'\n${JSON.stringify(body)}\nJSON\n`;
}

// A program with the official client. The strings, lists and mappings of JSON are Python's too.
export function python(body, { base, withKey }) {
  const key = withKey ? `os.environ["${KEY}"]` : '"none"';
  return `${withKey ? "import os\n\n" : ""}from openai import OpenAI

client = OpenAI(base_url=${JSON.stringify(base)}, api_key=${key})
messages = ${JSON.stringify(body.messages, null, 4)}
stream = client.chat.completions.create(
    model=${JSON.stringify(body.model)}, messages=messages, temperature=${body.temperature}, stream=True
)
for chunk in stream:
    if chunk.choices:
        print(chunk.choices[0].delta.content or "", end="", flush=True)
print()
`;
}
