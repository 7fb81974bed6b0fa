"""The server's endpoints with the built-in model: what they answer, whole and as events; and that `generate` answers
the same.
"""

import json
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

import fastvlm_mlx
from fastvlm_mlx.decoding.answer import finish
from fastvlm_mlx.decoding.engine import Engine
from fastvlm_mlx.decoding.generate import stream
from fastvlm_mlx.decoding.request import Options
from fastvlm_mlx.serve.openapi import document
from tests.serving import SHAPES, SIGN, Server, asked, data_address, events_of, held, server, text_of, wait_until

QUESTION = "How many shapes are there?"


@pytest.fixture(scope="module")
def vlm() -> fastvlm_mlx.VLM:
    return fastvlm_mlx.load("tiny")


def test_an_answer_is_that_of_generate(served: Server, vlm: fastvlm_mlx.VLM) -> None:
    for pictures, text in (
        ([SHAPES], QUESTION),
        ([SIGN], "What does the text say?"),
        ([SHAPES, SIGN], "Describe them."),
    ):
        found = served.answer(asked(text, *pictures))
        expected = vlm.generate([str(path) for path in pictures], text)
        (choice,) = found["choices"]
        assert choice["message"] == {"role": "assistant", "content": expected.text, "refusal": None}
        assert choice["finish_reason"] == expected.finish_reason
        assert found["usage"]["prompt_tokens"] == expected.stats.prompt_tokens
        assert found["usage"]["completion_tokens"] == expected.stats.completion_tokens
        assert found["usage"]["total_tokens"] == expected.stats.prompt_tokens + expected.stats.completion_tokens
        assert (found["object"], found["model"]) == ("chat.completion", "tiny")


def test_drawn_answers_are_those_of_generate(served: Server, vlm: fastvlm_mlx.VLM) -> None:
    options: dict[str, Any] = {"temperature": 1.5, "top_p": 0.9, "seed": 5, "max_tokens": 12}
    found = served.answer(asked(QUESTION, SHAPES, n=3, **options))["choices"]
    expected = [vlm.generate(str(SHAPES), QUESTION, **{**options, "seed": 5 + i}).text for i in range(3)]
    assert [each["message"]["content"] for each in found] == expected
    assert [each["index"] for each in found] == [0, 1, 2]


def test_every_option_of_drawing(served: Server, vlm: fastvlm_mlx.VLM) -> None:
    every: tuple[dict[str, Any], ...] = (
        {"repetition_penalty": 1.8},
        {"temperature": 2.0, "top_k": 2, "seed": 1},
        {"temperature": 2.0, "min_p": 0.3, "seed": 2},
        {"temperature": 1.0, "repetition_penalty": 0.5, "seed": 3, "max_tokens": 8},
    )
    for options in every:
        found = served.answer(asked("Describe the image.", SHAPES, **options))["choices"][0]["message"]["content"]
        request = vlm.engine.prepare(str(SHAPES), "Describe the image.")
        assert found == finish(stream(vlm.engine, request, Options(**options))).text, options


def test_a_conversation_with_pictures_in_two_turns(served: Server, vlm: fastvlm_mlx.VLM) -> None:
    chat = vlm.chat()
    messages: list[dict[str, Any]] = []
    for picture, text in ((SHAPES, QUESTION), (SIGN, "What does the text say?"), (None, "What colour is the circle?")):
        expected = chat.ask(text, str(picture) if picture else None)
        messages.append(asked(text, *([picture] if picture else []))["messages"][0])
        found = served.answer({"messages": messages})["choices"][0]["message"]
        assert found["content"] == expected.text
        messages.append(found)


def test_events(served: Server) -> None:
    whole = served.answer(asked("Describe the image.", SHAPES))
    response = served.ask(asked("Describe the image.", SHAPES, stream=True))
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    *chunks, done = events_of(response.text)
    assert done == "[DONE]"
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {"index": 0, "delta": {}, "logprobs": None, "finish_reason": "stop"}
    assert text_of(chunks) == whole["choices"][0]["message"]["content"]
    assert {chunk["id"] for chunk in chunks} == {chunks[0]["id"]} and len(chunks) > 3
    assert all(chunk["object"] == "chat.completion.chunk" and len(chunk["choices"]) == 1 for chunk in chunks)
    assert all("usage" not in chunk for chunk in chunks), "only if asked: it confuses clients"


def test_usage_of_events_comes_when_it_is_asked_for(served: Server) -> None:
    body = asked(QUESTION, SHAPES, stream=True, stream_options={"include_usage": True}, n=2, temperature=1.0)
    *chunks, usage, _ = events_of(served.ask(body).text)
    assert usage["choices"] == []
    assert usage["usage"]["prompt_tokens"] == 43
    assert all(chunk["usage"] is None for chunk in chunks)
    assert {chunk["choices"][0]["index"] for chunk in chunks} == {0, 1}


def test_timings(served: Server) -> None:
    found = served.answer(asked(QUESTION, SHAPES))
    timings = found["timings"]
    assert timings["cache_n"] == found["usage"]["prompt_tokens_details"]["cached_tokens"]
    assert timings["cache_n"] + timings["prompt_n"] == found["usage"]["prompt_tokens"]
    assert timings["predicted_n"] == found["usage"]["completion_tokens"]
    assert timings["ttft_ms"] > 0 and timings["predicted_per_second"] > 0


def test_logprobs(served: Server) -> None:
    body = asked(QUESTION, SHAPES, logprobs=True, top_logprobs=3)
    (choice,) = served.answer(body)["choices"]
    content = choice["logprobs"]["content"]
    assert bytes(byte for token in content for byte in token["bytes"]).decode() == choice["message"]["content"]
    assert all(len(token["top_logprobs"]) == 3 and token["logprob"] <= 0 for token in content)
    assert [token["top_logprobs"][0]["token"] for token in content] == [token["token"] for token in content]
    chunks = events_of(served.ask({**body, "stream": True}).text)
    told = [chunk["choices"][0]["logprobs"] for chunk in chunks if chunk != "[DONE]"]
    assert [token for each in told if each for token in each["content"]] == content


def test_logprobs_end_before_a_stop_text(served: Server) -> None:
    body = asked("Describe the image.", SHAPES, stop=[" circle"], logprobs=True)
    (choice,) = served.answer(body)["choices"]
    assert choice["message"]["content"] and " circle" not in choice["message"]["content"]
    assert choice["finish_reason"] == "stop"
    tokens = "".join(token["token"] for token in choice["logprobs"]["content"])
    assert tokens == choice["message"]["content"]


def test_answers_are_cut_where_they_are_told_to_be(served: Server) -> None:
    (choice,) = served.answer(asked("Describe the image.", SHAPES, max_tokens=2))["choices"]
    assert choice["finish_reason"] == "length"


def test_json_by_a_schema(served: Server) -> None:
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    schema: dict[str, Any] = {"type": "object", "properties": {"shapes": {"enum": [2, 3, 4]}}, "required": ["shapes"]}
    schema["additionalProperties"] = False
    form = {"type": "json_schema", "json_schema": {"name": "count", "strict": True, "schema": schema}}
    found = served.answer(asked(QUESTION, SHAPES, response_format=form))["choices"][0]
    assert json.loads(found["message"]["content"])["shapes"] in (2, 3, 4)
    status, error = served.refusal(
        asked(
            QUESTION, response_format={"type": "json_schema", "json_schema": {"schema": {"$ref": "https://x.test/y"}}}
        )
    )
    assert (status, error["param"]) == (400, "response_format")


def test_without_v1_it_is_the_same(served: Server) -> None:
    assert (
        served.answer(asked(QUESTION, SHAPES), path="/chat/completions")["choices"][0]["message"]["content"] == "Three."
    )
    assert served.client.get("/models").json() == served.client.get("/v1/models").json()


def test_models(served: Server) -> None:
    (model,) = served.client.get("/v1/models").json()["data"]
    assert (model["id"], model["object"]) == ("tiny", "model")
    assert served.client.get("/v1/models/tiny").json() == model
    missing = served.client.get("/v1/models/apple/FastVLM-0.5B")
    assert (missing.status_code, missing.json()["error"]["code"]) == (404, "model_not_found")
    assert str(Path(fastvlm_mlx.__file__).parent) not in served.client.get("/v1/models").text


def test_health_and_paths_that_are_not_there(served: Server) -> None:
    assert served.client.get("/health").json() == {"status": "ok"}
    assert served.client.head("/health").status_code == 200
    for method, path, status in (
        ("GET", "/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("DELETE", "/v1/models", 405),
        ("OPTIONS", "/v1/chat/completions", 405),
        ("GET", "/v1/models/", 404),
        ("GET", "/../../etc/passwd", 404),
        ("GET", "/static/%2e%2e/%2e%2e/etc/passwd", 404),
    ):
        found = served.client.request(method, path)
        assert (found.status_code, set(found.json()["error"])) == (status, {"message", "type", "param", "code"}), path


def test_the_openapi_document(served: Server) -> None:
    found = served.client.get("/openapi.json").json()
    assert {path for path in found["paths"] if "{" not in path} == {
        "/health", "/metrics", "/v1/chat/completions", "/v1/live", "/v1/models", "/v1/responses",
    }  # fmt: skip
    for path in ("/v1/chat/completions", "/v1/responses"):
        example = found["paths"][path]["post"]["requestBody"]["content"]["application/json"]["example"]
        assert served.answer(example, path=path)
    assert "/metrics" not in document("tiny", with_metrics=False)["paths"]


def test_a_model_that_is_not_loaded_yet(tiny: Engine) -> None:
    with server(tiny) as found:
        scheduler, found.serving.service.scheduler = found.serving.service.scheduler, None
        health = found.client.get("/health")
        assert (health.status_code, health.json()) == (503, {"status": "loading"})
        refused = found.ask(asked(QUESTION))
        assert (refused.status_code, refused.json()["error"]["code"]) == (503, "loading")
        assert int(refused.headers["retry-after"]) > 0
        found.serving.service.scheduler = scheduler
        assert found.client.get("/health").json() == {"status": "ok"}


def test_responses(served: Server) -> None:
    parts = [
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": data_address(SHAPES), "detail": "auto"},
    ]
    body = {"model": "tiny", "input": [{"role": "user", "content": parts}], "store": True, "metadata": {"a": "b"}}
    found = served.answer(body, path="/v1/responses")
    assert found["output"][0]["content"][0]["text"] == "Three."
    assert (found["status"], found["store"], found["metadata"]) == ("completed", False, {"a": "b"})
    assert found["usage"]["input_tokens"] == 43 and found["usage"]["output_tokens"] == 3
    again = served.answer({**body, "max_output_tokens": 1}, path="/v1/responses")
    assert (again["status"], again["incomplete_details"]) == ("incomplete", {"reason": "max_output_tokens"})


def test_responses_as_events(served: Server) -> None:
    response = served.ask({"input": "Hello", "stream": True}, path="/v1/responses")
    events = events_of(response.text)
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    kinds = [event["type"] for event in events]
    assert kinds[:4] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.content_part.added",
    ]
    assert kinds[-1] == "response.completed"
    text = "".join(event["delta"] for event in events if event["type"] == "response.output_text.delta")
    assert events[-1]["response"]["output"][0]["content"][0]["text"] == text != ""
    assert [line for line in response.text.splitlines() if line.startswith("event: ")] == [f"event: {k}" for k in kinds]


def test_live(served: Server) -> None:
    frame = SHAPES.read_bytes()
    kind = {"Content-Type": "image/png"}
    found = served.client.post("/v1/live", params={"prompt": QUESTION}, content=frame, headers=kind)
    *chunks, usage, done = events_of(found.text)
    assert (text_of(chunks), done) == ("Three.", "[DONE]")
    assert usage["usage"]["prompt_tokens"] == 43
    header = {**kind, "X-Prompt": "How%20many%20shapes%20are%20there%3F"}
    assert text_of(events_of(served.client.post("/v1/live", content=frame, headers=header).text)) == "Three."
    cut = served.client.post("/v1/live?max_tokens=1&temperature=0.5&seed=3", content=frame, headers=kind)
    assert events_of(cut.text)[-2]["usage"]["completion_tokens"] == 1


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("max_tokens=x", 400),
        ("max_tokens=0", 400),
        ("model=gpt", 404),
        ("prompt=%ff", 400),
        ("session=" + "x" * 200, 400),
        ("&".join(f"a{i}=1" for i in range(50)), 400),
    ],
)
def test_live_refused(served: Server, query: str, status: int) -> None:
    found = served.client.post(f"/v1/live?{query}", content=SHAPES.read_bytes(), headers={"Content-Type": "image/png"})
    assert found.status_code == status, found.text
    empty = served.client.post("/v1/live", content=b"", headers={"Content-Type": "image/png"})
    assert (empty.status_code, empty.json()["error"]["param"]) == (400, "body")


def test_only_the_newest_frame_of_a_session_waits(tiny: Engine) -> None:
    """Five frames while the first is being answered: three are superseded; the first and the last are answered."""
    with server(tiny, metrics=True) as found, held(found) as scheduler, ThreadPoolExecutor(6) as pool:

        def frame(session: str) -> httpx.Response:
            params = {"prompt": QUESTION, "session": session}
            kind = {"Content-Type": "image/png"}
            return httpx.post(
                f"{found.url}/v1/live", params=params, content=SHAPES.read_bytes(), headers=kind, timeout=30
            )

        answers = [pool.submit(frame, "camera")]
        wait_until(lambda: len(scheduler.waiting) == 1)
        other = pool.submit(frame, "another camera")
        wait_until(lambda: len(scheduler.waiting) == 2)
        for number in range(4):
            answers.append(pool.submit(frame, "camera"))
            wait_until(lambda: f"superseded_total {max(0, number)}\n" in found.client.get("/metrics").text)  # noqa: B023
        scheduler.release()
        responses = [answer.result() for answer in answers]
        assert [response.status_code for response in responses] == [200, 409, 409, 409, 200]
        assert {response.json()["error"]["code"] for response in responses[1:4]} == {"superseded"}
        assert text_of(events_of(responses[4].text)) == text_of(events_of(other.result().text)) == "Three."


def test_metrics_count(tiny: Engine) -> None:
    with server(tiny, metrics=True) as found:
        for _ in range(2):
            found.answer(asked(QUESTION, SHAPES))
        found.refusal({})
        lines = found.client.get("/metrics").text.splitlines()
        values = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    assert values['fastvlm_requests_total{route="/v1/chat/completions",status="200"}'] == "2"
    assert values['fastvlm_requests_total{route="/v1/chat/completions",status="400"}'] == "1"
    assert values['fastvlm_tokens_total{kind="completion"}'] == "6"
    assert values['fastvlm_tokens_total{kind="cached"}'] == "42"
    assert values["fastvlm_first_token_seconds_count"] == "2"
    assert values['fastvlm_first_token_seconds_bucket{le="+Inf"}'] == "2"
    assert (values["fastvlm_rows"], values["fastvlm_queue"], values["fastvlm_bodies_bytes"]) == ("0", "0", "0")
    assert int(values["fastvlm_prefix_pool_bytes"]) > 0 and values["fastvlm_prefix_pool_hits_total"] == "1"


def test_metrics_are_for_those_who_want_them(tiny: Engine) -> None:
    with server(tiny) as found:
        assert found.client.get("/metrics").status_code == 404
