r"""An OpenAI-compatible server on loopback for any of our models, with or without an adapter.

    python -m gemma_cot.serve --adapter=runs/tiny/adapter --port=8000
    curl -s localhost:8000/v1/chat/completions -H 'Content-Type: application/json' \
        -d '{"model": "adapter", "messages": [{"role": "user", "content": "What is 12 * 34?"}]}'

Needs the extra `serve`. Routes: /v1/chat/completions (streamed or not) and /v1/models. Waiting
requests are answered together, `--batch` completions at a time, in shapes that are compiled once,
at the start. The same prompt, seed and temperature give what `gemma_cot.generate` gives. A
`max_tokens` above the model's limit means the limit; `response_format` json_object is a hint that
nothing enforces. Only this machine can connect, and no key is asked for.
"""

import socket
import sys
from contextlib import suppress
from pathlib import Path

from absl import flags

from gemma_cot import cli
from gemma_cot.policy import define_policy_flags, load_policy
from gemma_cot.serve.app import make_app

FLAGS = flags.FLAGS


def main() -> None:
    """Load the model, compile, serve until Ctrl-C."""
    try:
        import starlette  # noqa: F401
        import uvicorn
    except ImportError as error:
        raise ValueError(f"{error.name}: must be installed to serve, got no such module; "
                         "pip install 'gemma_cot[serve]'") from None  # fmt: skip
    try:
        listener = socket.create_server(("127.0.0.1", FLAGS.port))
    except OSError as error:
        raise ValueError(f"--port: must be free, got {FLAGS.port} ({error.strerror}); set another "
                         "one, or 0 for any") from None  # fmt: skip
    policy = load_policy(FLAGS)
    name = FLAGS.served_name or Path(FLAGS.adapter or FLAGS.model or "tiny_model").name
    app = make_app(policy, name, FLAGS.batch, FLAGS.seed)
    address = f"http://127.0.0.1:{listener.getsockname()[1]}/v1"
    print(f"{name} at {address}", file=sys.stderr, flush=True)
    with suppress(KeyboardInterrupt):  # which uvicorn raises again when all is shut down
        uvicorn.Server(uvicorn.Config(app, log_level="warning")).run(sockets=[listener])


if __name__ == "__main__":
    define_policy_flags()
    flags.DEFINE_integer(
        "port", 8000, "Port on 127.0.0.1; 0: any.", lower_bound=0, upper_bound=65535
    )
    flags.DEFINE_integer("batch", 8, "Completions made together.", lower_bound=1)
    flags.DEFINE_string("served_name", "", "Model name of the API; empty: the folder's.")
    cli.run(main)
