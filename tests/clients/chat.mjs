// What the tests ask of openai for node, run as `node chat.mjs ADDRESS PICTURE`: prints one object of what came back.
import fs from "node:fs";
import { createRequire } from "node:module";
import { pathToFileURL } from "node:url";

const [address, picture, modules] = process.argv.slice(2);
const found = createRequire(`${modules}/`).resolve("openai");
const { default: OpenAI } = await import(pathToFileURL(found));
const client = new OpenAI({ baseURL: `${address}/v1`, apiKey: "none", maxRetries: 0 });
const url = "data:image/png;base64," + fs.readFileSync(picture).toString("base64");
const text = "How many shapes are there?";
const messages = [{ role: "user", content: [{ type: "text", text }, { type: "image_url", image_url: { url } }] }];
const out = {};

const whole = await client.chat.completions.create({ model: "tiny", messages, logprobs: true, top_logprobs: 2 });
out.whole = whole.choices[0].message.content;
out.usage = whole.usage;
out.logprobs = whole.choices[0].logprobs.content.map((token) => token.token).join("");

out.streamed = "";
const options = { stream: true, stream_options: { include_usage: true } };
for await (const chunk of await client.chat.completions.create({ model: "tiny", messages, ...options })) {
  out.streamed += chunk.choices[0]?.delta?.content ?? "";
  out.streamUsage = chunk.usage ?? out.streamUsage;
}

const shapes = { type: "integer", enum: [2, 3, 4] };
const schema = { type: "object", properties: { shapes }, required: ["shapes"], additionalProperties: false };
const response_format = { type: "json_schema", json_schema: { name: "count", schema, strict: true } };
try {
  const json = await client.chat.completions.create({ model: "tiny", messages, response_format });
  out.json = JSON.parse(json.choices[0].message.content);
} catch (error) {
  out.json = error.message;
}

try {
  await client.chat.completions.create({ model: "gpt", messages });
} catch (error) {
  out.error = [error.constructor.name, error.status, error.code, error.param];
}

const content = [{ type: "input_text", text }, { type: "input_image", image_url: url, detail: "auto" }];
const response = await client.responses.create({ model: "tiny", input: [{ role: "user", content }] });
out.response = response.output_text;
out.events = "";
for await (const event of await client.responses.create({ model: "tiny", input: [{ role: "user", content }], stream: true })) {
  if (event.type === "response.output_text.delta") out.events += event.delta;
}
out.models = (await client.models.list()).data.map((model) => model.id);
console.log(JSON.stringify(out));
