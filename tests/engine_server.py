"""Our own engine behind OpenAI's protocol, on a port of this machine.

What it answers is a function of the request alone, so a conversation that is broken off
and taken up again goes on as if nothing had been.
"""

import hashlib
import http.server
import json
import threading
import time
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np

from jaxplan.models.heads import lm_logits
from jaxplan.models.llama import forward
from jaxplan.plan import grammar as plan_grammar
from jaxplan.rollout.sample import sample_token
from tests.fakes import plain_meta

WINDOW = 192  # tokens of a conversation the engine looks at


@partial(jax.jit, static_argnames="model")
def next_token(llama, grammar, tokens, length, state, remaining, key, *, model):
    hidden = forward(llama, tokens[None], plain_meta(1, WINDOW), model, history=1)
    logits = lm_logits(llama, hidden[0, length - 1])
    # A coin chooses to plan: weights made by chance might never.
    token, _, _ = sample_token(key, grammar, logits, state, decide_explore=1.0)
    state, remaining = plan_grammar.advance(grammar, state, token, remaining)
    return token, state, remaining


class Engine:
    """A model that answers a conversation with a turn of the plan grammar."""

    def __init__(self, setting):
        self._setting = setting

    def answer(self, messages):
        setting, words = self._setting, json.dumps(messages)
        digest = hashlib.sha256(words.encode()).digest()
        key = jax.random.key(int.from_bytes(digest[:4], "big"))
        ids = setting.tokenizer.encode(words)[-(WINDOW - 16) :]
        tokens = np.zeros(WINDOW, np.int32)
        tokens[: len(ids)] = ids
        length, said = len(ids), []
        state = jnp.int32(plan_grammar.DECIDE)
        remaining = jnp.int32(setting.plan.budget)
        grammar = setting.language.grammar
        while not plan_grammar.is_finished(grammar, state):
            key, subkey = jax.random.split(key)
            token, state, remaining = next_token(
                setting.params.llama,
                grammar,
                jnp.asarray(tokens),
                jnp.int32(length),
                state,
                remaining,
                subkey,
                model=setting.model,
            )
            tokens[length], length = int(token), length + 1
            said.append(int(token))
        return setting.tokenizer.decode(said), len(ids), len(said)


class EngineServer:
    """The engine in a thread; a context manager.

    Attributes:
        requests: the bodies received, in order.
        answers: what was answered, by the text of the request's messages.
        most_at_once: requests that were open at the same time.
    """

    def __init__(self, setting, failures=0, sleeps=(), pause=0.0):
        self._engine, self._lock = Engine(setting), threading.Lock()
        self._failures, self._sleeps, self._pause = failures, list(sleeps), pause
        self.requests, self.answers = [], {}
        self.open = self.most_at_once = 0
        server = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(self):
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                status, answer = server.respond(self.path, body)
                text = json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(text)))
                self.end_headers()
                self.wfile.write(text)

            def log_message(self, *_):
                pass

        self._http = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._http.server_port}/v1"

    def __enter__(self):
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_):
        self._http.shutdown()
        self._http.server_close()

    def respond(self, path, body):
        assert path == "/v1/chat/completions"
        with self._lock:
            self.requests.append(body)
            self.open += 1
            self.most_at_once = max(self.most_at_once, self.open)
            sleep = self._sleeps.pop(0) if self._sleeps else self._pause
            fails = self._failures > 0
            self._failures -= fails
        time.sleep(sleep)
        with self._lock:
            self.open -= 1
            if fails:
                return 500, {"error": {"message": "overloaded", "type": "server"}}
            text, asked, said = self._engine.answer(body["messages"])
            self.answers[json.dumps(body["messages"])] = text
        return 200, {
            "id": "1",
            "object": "chat.completion",
            "created": 0,
            "model": body["model"],
            "choices": [
                {
                    "index": 0,
                    "finish_reason": "stop",
                    "message": {"role": "assistant", "content": text},
                }
            ],
            "usage": {
                "prompt_tokens": asked,
                "completion_tokens": said,
                "total_tokens": asked + said,
            },
        }
