"""Bodies as other programs send them, after what their sources do, with the fields they have beside the usual ones."""

from typing import Any


def bodies(picture: str) -> dict[str, dict[str, Any]]:
    """A body for each program, by its name; `picture` is a `data:` address."""
    question = {"type": "text", "text": "How many shapes are there?"}
    shown = {"type": "image_url", "image_url": {"url": picture}}
    return {
        "Open WebUI": {
            "stream": True,
            "model": "tiny",
            "messages": [{"role": "user", "content": [question, shown]}],
            "stream_options": {"include_usage": True},
            "params": {},
            "tool_servers": [],
            "features": {"image_generation": False, "code_interpreter": False, "web_search": False, "memory": False},
            "variables": {"{{USER_NAME}}": "user", "{{CURRENT_DATE}}": "2026-11-25"},
            "session_id": "zQ1",
            "chat_id": "5b0c",
            "id": "f7a1",
            "background_tasks": {"title_generation": True, "tags_generation": True, "follow_up_generation": True},
        },
        "Open WebUI, a title": {
            "model": "tiny",
            "messages": [{"role": "user", "content": "### Task:\nGenerate a concise title.\n### Output:\nJSON format"}],
            "stream": False,
            "max_completion_tokens": 1000,
            "metadata": {"task": "title_generation", "chat_id": "5b0c"},
        },
        "LibreChat": {
            "model": "tiny",
            "user": "6721",
            "temperature": 0,
            "top_p": 1,
            "presence_penalty": 0,
            "frequency_penalty": 0,
            "stream": True,
            "stream_options": {"include_usage": True},
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": [question, {"type": "image_url", "image_url": {"url": picture, "detail": "auto"}}],
                },
            ],
        },
        "Continue": {
            "model": "tiny",
            "max_tokens": 4096,
            "stream": True,
            "temperature": 0,
            "messages": [
                {"role": "system", "content": "You are a helpful assistant."},
                {
                    "role": "user",
                    "content": [question, {"type": "image_url", "image_url": {"url": picture, "detail": "auto"}}],
                },
            ],
            "tools": [
                {
                    "type": "function",
                    "function": {
                        "name": "read_file",
                        "description": "Use this tool to view a file.",
                        "parameters": {"type": "object", "required": ["filepath"], "properties": {}},
                    },
                }
            ],
            "parallel_tool_calls": False,
        },
        "Cline": {
            "model": "tiny",
            "messages": [
                {"role": "system", "content": "You are Cline, a highly skilled software engineer.\n\n====\n\nTOOL USE"},
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": "<task>\nHow many shapes are there?\n</task>"},
                        shown,
                        {
                            "type": "text",
                            "text": "<environment_details>\n# Current Mode\nACT MODE\n</environment_details>",
                        },
                    ],
                },
                {"role": "assistant", "content": [{"type": "text", "text": "Three."}]},
                {"role": "user", "content": [{"type": "text", "text": "[ERROR] You did not use a tool."}]},
            ],
            "temperature": 0,
            "max_tokens": 200,
            "stream": True,
            "stream_options": {"include_usage": True},
        },
    }
