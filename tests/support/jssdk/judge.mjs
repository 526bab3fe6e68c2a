// The official JavaScript SDKs as judges of what a gateway says. Reads jobs from standard input, a line of JSON each; has as
// many under way as there are; writes what came of each, a line of JSON too, as soon as it is known.
//
// A job is {id, format, stream, params} and where its response comes from: {base_url, headers}, a server to ask; or {status,
// headers, chunks}, a response whose body the SDK reads in exactly these chunks (base64), so that no network splits it anew.
// What came of it is {id, final}, what the SDK's own accumulator made of the response; or {id, error: {name, status,
// message}}, what the SDK threw.

import { createRequire } from "node:module";
import { createInterface } from "node:readline";

const require = createRequire(new URL("../../clients/package.json", import.meta.url));
const { Anthropic } = require("@anthropic-ai/sdk");
const { OpenAI } = require("openai");

const SDKS = { messages: Anthropic, chat: OpenAI, responses: OpenAI };

const STREAMED = {
  messages: (client, params) => client.messages.stream(params).finalMessage(),
  chat: (client, params) => client.chat.completions.stream(params).finalChatCompletion(),
  responses: (client, params) => client.responses.stream(params).finalResponse(),
};

const BLOCKING = {
  messages: (client, params) => client.messages.create(params),
  chat: (client, params) => client.chat.completions.create(params),
  responses: (client, params) => client.responses.create(params),
};

function recorded({ status, headers, chunks }) {
  const rest = chunks.values();
  const source = {
    pull(controller) {
      const { value, done } = rest.next();
      if (done) controller.close();
      else controller.enqueue(Buffer.from(value, "base64"));
    },
  };
  return new Response(new ReadableStream(source, { highWaterMark: 0 }), { status, headers });
}

function clientOf({ format, base_url, headers, ...rest }) {
  const source = base_url
    ? { baseURL: base_url, defaultHeaders: headers }
    : { baseURL: "http://recorded.invalid", fetch: async () => recorded({ headers, ...rest }) };
  return new SDKS[format]({ apiKey: "sk-of-the-javascript-sdk", maxRetries: 0, ...source });
}

async function verdict({ id, stream, params, ...job }) {
  try {
    const final = await (stream ? STREAMED : BLOCKING)[job.format](clientOf(job), params);
    return JSON.stringify({ id, final }); // here: an SDK parses a tool's arguments as late as when they are read
  } catch (error) {
    const { status = null, message } = error;
    return JSON.stringify({ id, error: { name: error.constructor.name, status, message } });
  }
}

for await (const line of createInterface({ input: process.stdin })) {
  verdict(JSON.parse(line)).then((answer) => process.stdout.write(`${answer}\n`));
}
