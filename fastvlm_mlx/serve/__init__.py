"""A local server that speaks OpenAI's form of HTTP: chat completions, responses, and live pictures of a camera.

Enters: an engine, a socket, keys.
Leaves: answers over HTTP; a refusal in one sentence where something is wrong with a request.
May import: errors, version, inputs, decoding.
"""
