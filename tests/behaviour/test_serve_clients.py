"""Real clients against the server: openai-python here; openai for node, llm, LiteLLM and schemathesis in environments
of their own (tests/clients/install), where they are; and bodies of other programs, replayed."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("uvicorn", reason="the extra serve is not installed")

from fastvlm_mlx.decoding.engine import Engine
from tests.clients.recorded import bodies
from tests.serving import SHAPES, Server, asked, data_address, events_of, held, server, text_of

ROOT = Path(__file__).parents[2]
CLIENTS = ROOT / ".clients"
QUESTION = "How many shapes are there?"
MESSAGES: Any = asked(QUESTION, SHAPES)["messages"]


def client_of(found: Server, **options: Any) -> Any:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    return openai.OpenAI(base_url=f"{found.url}/v1", api_key=options.pop("api_key", "none"), max_retries=0, **options)


def installed(name: str) -> str:
    """The program of a client, or the test is skipped."""
    for found in (CLIENTS / "venv" / "bin" / name, Path(sys.executable).with_name(name)):
        if found.exists():
            return str(found)
    pytest.skip(f"{name} is not installed: run tests/clients/install")


def ran(*command: str, **options: Any) -> str:
    done: subprocess.CompletedProcess[str] = subprocess.run(
        command, capture_output=True, text=True, timeout=300, **options
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    return done.stdout


@pytest.mark.slow
def test_openai_python(served: Server) -> None:
    with client_of(served) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        whole = client.chat.completions.create(model="tiny", messages=MESSAGES, logprobs=True, top_logprobs=2)
        assert whole.choices[0].message.content == "Three."
        assert "".join(token.token for token in whole.choices[0].logprobs.content) == "Three."
        assert whole.usage.prompt_tokens == 43
        assert (
            client.chat.completions.create(model="tiny", messages=MESSAGES).usage.prompt_tokens_details.cached_tokens
            == 42
        )
        chunks = list(
            client.chat.completions.create(
                model="tiny", messages=MESSAGES, stream=True, stream_options={"include_usage": True}, n=2
            )
        )
        for choice in (0, 1):
            deltas = [c.choices[0] for c in chunks if c.choices and c.choices[0].index == choice]
            assert "".join(each.delta.content or "" for each in deltas) == "Three."
        assert chunks[-1].usage.completion_tokens == 6


def test_openai_python_with_a_schema(served: Server) -> None:
    pytest.importorskip("llguidance", reason="the extra schema is not installed")
    pydantic = pytest.importorskip("pydantic")
    kind = pydantic.create_model("Count", shapes=(int, pydantic.Field(ge=2, le=4)))
    with client_of(served) as client:
        found = client.chat.completions.parse(model="tiny", messages=MESSAGES, response_format=kind)
        assert found.choices[0].message.parsed.shapes in (2, 3, 4)


def test_openai_python_gets_errors_by_their_kind(tiny: Engine) -> None:
    openai = pytest.importorskip("openai", reason="openai is not installed")
    with server(tiny, keys=["sk-0123456789"]) as found:
        with client_of(found, api_key="sk-wrong-key") as client, pytest.raises(openai.AuthenticationError):
            client.chat.completions.create(model="tiny", messages=MESSAGES)
        with client_of(found, api_key="sk-0123456789") as client:
            with pytest.raises(openai.NotFoundError) as missing:
                client.chat.completions.create(model="gpt", messages=MESSAGES)
            assert (missing.value.code, missing.value.param) == ("model_not_found", "model")
            with pytest.raises(openai.BadRequestError) as wrong:
                client.chat.completions.create(model="tiny", messages=MESSAGES, presence_penalty=1)
            assert wrong.value.param == "presence_penalty" and wrong.value.request_id
            with held(found) as scheduler, pytest.raises(openai.APIError, match="stopping"):
                for chunk in client.chat.completions.create(model="tiny", messages=MESSAGES, stream=True):
                    assert not chunk.choices[0].delta.content and len(scheduler.waiting) == 1
                    found.serving.stop()


@pytest.mark.slow
def test_openai_python_responses(served: Server) -> None:
    content = [
        {"type": "input_text", "text": QUESTION},
        {"type": "input_image", "image_url": data_address(SHAPES), "detail": "auto"},
    ]
    asked_for: Any = {"model": "tiny", "input": [{"role": "user", "content": content}]}
    with client_of(served) as client:
        found = client.responses.create(**asked_for)
        assert (found.output_text, found.status, found.store) == ("Three.", "completed", False)
        with client.responses.stream(**asked_for) as stream:
            text = "".join(event.delta for event in stream if event.type == "response.output_text.delta")
            assert text == stream.get_final_response().output_text == "Three."


@pytest.mark.parametrize("program", list(bodies("")))
def test_bodies_of_other_programs(served: Server, program: str) -> None:
    response = served.ask(bodies(data_address(SHAPES))[program])
    assert response.status_code == 200, response.text
    if program in ("Open WebUI", "LibreChat", "Continue"):
        assert text_of(events_of(response.text)) == "Three."
    if program != "Open WebUI, a title":
        assert events_of(response.text)[-1] == "[DONE]"


@pytest.mark.slow
def test_openai_for_node(served: Server) -> None:
    node = shutil.which("node")
    modules = CLIENTS / "node"
    if node is None or not (modules / "node_modules" / "openai").is_dir():
        pytest.skip("node or its openai is not installed: run tests/clients/install")
    out = json.loads(ran(node, str(ROOT / "tests" / "clients" / "chat.mjs"), served.url, str(SHAPES), str(modules)))
    assert (out["whole"], out["streamed"], out["response"], out["events"]) == ("Three.",) * 4
    assert out["logprobs"] == "Three." and out["models"] == ["tiny"]
    assert out["usage"]["prompt_tokens"] == out["streamUsage"]["prompt_tokens"] == 43
    assert out["error"] == ["NotFoundError", 404, "model_not_found", "model"]
    assert out["json"]["shapes"] in (2, 3, 4) if isinstance(out["json"], dict) else "llguidance" in out["json"]


@pytest.mark.slow
def test_llm(served: Server, tmp_path: Path) -> None:
    llm = installed("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f'- model_id: tiny\n  model_name: tiny\n  api_base: "{served.url}/v1"\n  vision: true\n'
    )
    environment = {**os.environ, "LLM_USER_PATH": str(tmp_path)}

    def ask(*arguments: str) -> str:
        return ran(llm, *arguments, env=environment, stdin=subprocess.DEVNULL).strip()

    assert ask("-m", "tiny", QUESTION, "-a", str(SHAPES)) == "Three."
    assert (
        ask("-m", "tiny", QUESTION, "-a", str(SHAPES), "--no-stream", "-s", "You are a helpful assistant.") == "Three."
    )
    assert ask("-c", "What colour is the circle?") == "The circle is yellow."


LITELLM = """
import json, os, sys
os.environ["LITELLM_LOCAL_MODEL_COST_MAP"] = "True"
import litellm
address, messages = sys.argv[1], json.loads(sys.stdin.read())
how = dict(model="openai/tiny", api_base=address + "/v1", api_key="none", messages=messages)
whole = litellm.completion(**how)
streamed = "".join(chunk.choices[0].delta.content or "" for chunk in litellm.completion(stream=True, **how))
errors = []
for more in ({"temperature": -1}, {"model": "openai/gpt"}):
    try:
        litellm.completion(**{**how, **more})
    except Exception as error:
        errors.append([type(error).__name__, error.status_code])
print("\\n" + json.dumps([whole.choices[0].message.content, whole.usage.prompt_tokens, streamed, errors]))
"""


@pytest.mark.slow
def test_litellm(served: Server) -> None:
    out = ran(
        str(Path(installed("litellm")).with_name("python")), "-c", LITELLM, served.url, input=json.dumps(MESSAGES)
    )
    assert json.loads(out.splitlines()[-1]) == [
        "Three.", 43, "Three.", [["BadRequestError", 400], ["NotFoundError", 404]],
    ]  # fmt: skip


CHECKS = (
    "not_a_server_error", "status_code_conformance", "content_type_conformance", "response_schema_conformance",
    "negative_data_rejection", "unsupported_method",
)  # fmt: skip


@pytest.mark.slow
def test_schemathesis(served: Server, tmp_path: Path) -> None:
    """Requests made from our own OpenAPI document, right and wrong ones: every answer is one that the document
    describes.
    """
    out = ran(
        installed("schemathesis"), "run", f"{served.url}/openapi.json", "--checks", ",".join(CHECKS), "--seed", "1",
        "--max-examples", "15", "--request-timeout", "120", "--no-color", cwd=tmp_path,
    )  # fmt: skip
    assert "No issues found" in out, out[-4000:]
    assert served.client.get("/health").json() == {"status": "ok"}
