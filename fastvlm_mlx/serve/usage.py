"""What an answer took, in OpenAI's words (`usage`) and in llama.cpp's (`timings`)."""

from typing import Any

from ..decoding.answer import Answer
from .reply import Reply


def usage(reply: Reply) -> dict[str, Any]:
    """Tokens of a finished reply: the prompt's once, those of all answers together."""
    answers = reply.given
    first = answers[0].stats
    completion = sum(answer.stats.completion_tokens for answer in answers)
    return {
        "prompt_tokens": first.prompt_tokens,
        "completion_tokens": completion,
        "total_tokens": first.prompt_tokens + completion,
        "prompt_tokens_details": {"cached_tokens": first.reused_tokens},
    }


def response_usage(reply: Reply) -> dict[str, Any]:
    """Tokens of a finished reply, in the words of responses."""
    found = usage(reply)
    return {
        "input_tokens": found["prompt_tokens"],
        "input_tokens_details": found["prompt_tokens_details"],
        "output_tokens": found["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": found["total_tokens"],
    }


def timings(reply: Reply, answer: Answer) -> dict[str, float]:
    """Milliseconds and rates of one answer. `prompt_n` tokens were computed, `cache_n` found; `vision_ms` is in
    `prompt_ms`.

    `ttft_ms` is from the arrival of the request to its first token, `engine_ttft_ms` what of it pictures and engine
    take.
    """
    stats = answer.stats
    computed = stats.prompt_tokens - stats.reused_tokens
    prompt_ms = (stats.vision_seconds + stats.prefill_seconds) * 1e3
    rate = stats.decode_tokens_per_second
    predicted_ms = (stats.completion_tokens - 1) / rate * 1e3 if rate > 0 else 0.0
    found = {
        "cache_n": stats.reused_tokens,
        "prompt_n": computed,
        "prompt_ms": prompt_ms,
        "prompt_per_token_ms": prompt_ms / max(computed, 1),
        "prompt_per_second": computed / max(prompt_ms / 1e3, 1e-9),
        "predicted_n": stats.completion_tokens,
        "predicted_ms": predicted_ms,
        "predicted_per_token_ms": predicted_ms / max(stats.completion_tokens - 1, 1),
        "predicted_per_second": rate,
        "vision_ms": stats.vision_seconds * 1e3,
        "engine_ttft_ms": stats.ttft_seconds * 1e3,
        "ttft_ms": (reply.first_token_seconds or 0.0) * 1e3,
    }
    return {name: value if isinstance(value, int) else round(value, 3) for name, value in found.items()}
