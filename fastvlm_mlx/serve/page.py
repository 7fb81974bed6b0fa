"""`GET /`: a page that says what this is, and nothing of what it serves to whom."""

from html import escape

from ..version import __version__

POLICY = (
    "default-src 'self'; img-src 'self' blob: data:; media-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; "
    "form-action 'none'"
)
HEADERS = {"Content-Security-Policy": POLICY, "Referrer-Policy": "no-referrer"}


def page(model: str) -> bytes:
    """The page, in HTML, for a server of a model of this name."""
    return f"""<!doctype html>
<html lang="en">
<head><meta charset="utf-8"><title>fastvlm-mlx</title></head>
<body>
<h1>fastvlm-mlx {escape(__version__)}</h1>
<p>This server answers questions about pictures with the model <strong>{escape(model)}</strong>, in the form of OpenAI's
API:</p> <ul>
<li><code>POST /v1/chat/completions</code></li>
<li><code>POST /v1/responses</code></li>
<li><code>POST /v1/live</code></li>
<li><code>GET /v1/models</code></li>
<li><code>GET /openapi.json</code></li>
</ul>
</body>
</html>
""".encode()
