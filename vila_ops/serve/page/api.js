// Calls of the endpoint's API. Addresses are relative to the page, so that a proxy may serve both under a path.

export class ApiError extends Error {
  constructor(message, status) {
    super(message);
    this.status = status;
  }
}

async function call(path, key, options = {}) {
  const headers = { ...options.headers };
  if (key) headers.Authorization = `Bearer ${key}`;
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(body?.error?.message ?? `the endpoint answered with status ${response.status}`, response.status);
}

function post(path, body, key, signal) {
  const headers = { "Content-Type": "application/json" };
  return call(path, key, { method: "POST", headers, body: JSON.stringify(body), signal });
}

// The card of the model that is served: id, version, digest.
export async function model(key) {
  const models = await (await call("v1/models", key)).json();
  return models.data[0];
}

// Whether the endpoint takes feedback.
export async function takesFeedback(key) {
  const schema = await (await call("openapi.json", key)).json();
  return "/v1/feedback" in schema.paths;
}

export async function sendFeedback(feedback, key) {
  await post("v1/feedback", feedback, key);
}

// The chunks of a streamed answer. Throws ApiError when it is refused, fails, or ends before its last event.
export async function* answer(body, key, signal) {
  const response = await post("v1/chat/completions", body, key, signal);
  let rest = "";
  for await (const text of texts(response.body)) {
    const events = (rest + text).split("\n\n");
    rest = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ")) continue; // a comment that keeps the connection open
      const data = event.slice("data: ".length);
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(chunk.error.message, response.status);
      yield chunk;
    }
  }
  throw new ApiError("the connection ended before the answer was complete", response.status);
}

// Streams are not iterable in every browser.
async function* texts(stream) {
  const reader = stream.pipeThrough(new TextDecoderStream()).getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    yield value;
  }
}
