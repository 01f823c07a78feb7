"""A judge model that is asked in words: over an OpenAI-compatible HTTP interface, or loaded here.

A judge that cannot be reached, or whose answer cannot be used, is an error: nothing ever takes the place of its answer. The
key comes from the environment alone and is in no configuration, log or result.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from typing import Any, Literal, Protocol

from pydantic import Field, model_validator

from tribunal.core.config import NO_EFFECT_ON_RESULTS, ModelConfig, Section
from tribunal.core.errors import UserError

BUSY = frozenset({408, 409, 429, 500, 502, 503, 504, 529})
"""HTTP codes that may pass."""
MOST_BYTES = 4 << 20


class JudgeError(UserError):
    """The judge cannot be reached, or what it says cannot be used."""


class CutOff(JudgeError):
    """The answer ran out of tokens; another attempt may be shorter."""


class JudgeSettings(Section):
    """Which model judges."""

    kind: Literal["http", "local"] = Field("http", description="http: an OpenAI-compatible server; local: a model loaded here")
    url: str = Field(
        "http://localhost:8000/v1", description="http: base address; /chat/completions is added", json_schema_extra=NO_EFFECT_ON_RESULTS
    )
    model: str | None = Field(None, description="http: the model's name on the server")
    api_key_env: str = Field(
        "OPENAI_API_KEY",
        description="http: environment variable with the key; unset: no key is sent",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )
    local: ModelConfig | None = Field(None, description="local: the model, as in the experiment's model block")
    max_new_tokens: int = Field(1024, ge=1, description="tokens of an answer, its thought included; one that is cut off is not used")
    timeout_s: float = Field(120, gt=0, description="http: seconds to wait for an answer", json_schema_extra=NO_EFFECT_ON_RESULTS)
    attempts: int = Field(
        4,
        ge=1,
        description="times a question is put before the job gives up; waits 1, 2, 4, ... s where the server is busy",
        json_schema_extra=NO_EFFECT_ON_RESULTS,
    )

    @model_validator(mode="after")
    def _complete(self) -> JudgeSettings:
        if self.kind == "http" and not self.model:
            raise ValueError("judge.model is missing: the model's name on the server")
        if self.kind == "local" and self.local is None:
            raise ValueError("judge.local is missing: the model to load, e.g. {name: Qwen/Qwen3-8B}")
        if not self.url.startswith(("http://", "https://")):
            raise ValueError(f"judge.url must begin with http:// or https://, not {self.url!r}")
        return self


class Judge(Protocol):
    """Something that answers a question in words."""

    name: str
    attempts: int

    def ask(self, question: str, attempt: int = 0) -> str:
        """The answer. Greedy at the first attempt; at later ones drawn anew, so that a useless answer is not simply repeated.

        Raises:
            JudgeError: there is none.
            CutOff: it is longer than ``max_new_tokens``.
        """


def open_judge(settings: JudgeSettings) -> Judge:
    """The judge, reached or loaded.

    Raises:
        JudgeError: it cannot be reached, or refuses.
        ModelError: the local model cannot be loaded.
    """
    if settings.kind == "local":
        return LocalJudge(settings)
    judge = HttpJudge(settings)
    judge.ask("Reply with the word ready.")
    return judge


class HttpJudge:
    """An OpenAI-compatible server (vLLM, SGLang, llama.cpp, a provider).

    Args:
        sleep: waits between attempts; replaced in tests.
    """

    def __init__(self, settings: JudgeSettings, sleep: Callable[[float], None] = time.sleep) -> None:
        self.settings = settings
        self.name = f"{settings.model} at {settings.url}"
        self.attempts = settings.attempts
        self._sleep = sleep
        self._address = f"{settings.url.rstrip('/')}/chat/completions"

    def ask(self, question: str, attempt: int = 0) -> str:
        problem = ""
        for turn in range(self.settings.attempts):
            if turn:
                self._sleep(min(60.0, 2.0 ** (turn - 1)))
            try:
                return self._once(question, attempt)
            except urllib.error.HTTPError as error:
                problem = f"HTTP {error.code} {error.reason}"
                if error.code in (401, 403):  # what it says may repeat the key
                    raise JudgeError(
                        f"judge {self.name} refuses the key ({problem}); put a valid one into the environment variable "
                        f"{self.settings.api_key_env} ({'set' if os.environ.get(self.settings.api_key_env) else 'not set'} now)"
                    ) from None
                problem += _said(error)
                if error.code not in BUSY:
                    raise JudgeError(f"judge {self.name} refuses the question ({problem}); check judge.url and judge.model") from None
            except (OSError, http.client.HTTPException) as error:
                problem = str(getattr(error, "reason", None) or error or type(error).__name__)
        raise JudgeError(
            f"judge {self.name} cannot be reached ({problem}, {self.settings.attempts} attempts); start it or check judge.url, then run "
            "the same command again: what is labelled already is kept"
        )

    def _once(self, question: str, attempt: int) -> str:
        body = {
            "model": self.settings.model,
            "messages": [{"role": "user", "content": question}],
            "temperature": 0.0 if attempt == 0 else 0.7,
            "seed": attempt,
            "max_tokens": self.settings.max_new_tokens,
        }
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get(self.settings.api_key_env):
            headers["Authorization"] = f"Bearer {key}"
        request = urllib.request.Request(self._address, json.dumps(body).encode(), headers)
        with urllib.request.urlopen(request, timeout=self.settings.timeout_s) as response:
            reply = response.read(MOST_BYTES)
        try:
            choice: Any = json.loads(reply)["choices"][0]
            text, finish = choice["message"]["content"], choice.get("finish_reason")
        except (ValueError, LookupError, TypeError, AttributeError):
            text = finish = None
        if finish == "length":
            raise _cut_off(self)
        if not isinstance(text, str):
            raise JudgeError(f"judge {self.name} sent no chat completion ({reply[:120]!r}); is judge.url an OpenAI-compatible server?")
        return text


class LocalJudge:
    """A model loaded in this process; a thought is left out of its answer."""

    def __init__(self, settings: JudgeSettings) -> None:
        from tribunal.models.loading import load_model

        assert settings.local is not None
        self.settings = settings
        self.name = settings.local.name
        self.attempts = settings.attempts
        self._loaded = load_model(settings.local)

    def ask(self, question: str, attempt: int = 0) -> str:
        from tribunal.core.records import Problem
        from tribunal.models.draws import stream
        from tribunal.models.generation import Request, Sampler

        loaded = self._loaded
        prompt_ids = loaded.format.prompt_ids(Problem(id="judge", question=question, answer="-", dataset="judge", revision="judge"))
        sampler = Sampler(loaded.model, eos_ids=loaded.eos_ids, slots=1, temperature=0.0 if attempt == 0 else 0.7)
        request = Request("judge", prompt_ids, self.settings.max_new_tokens, stream(0, question, attempt))
        [done] = [finished for step in sampler.run([request]) for finished in step]
        if done.finish_reason == "length":
            raise _cut_off(self)
        return loaded.format.read(done.tokens, prompt_ids).response


def _cut_off(judge: HttpJudge | LocalJudge) -> CutOff:
    return CutOff(
        f"judge {judge.name} ran out of tokens: its thought and answer are longer than judge.max_new_tokens "
        f"({judge.settings.max_new_tokens}); raise that, or let it answer without a thought"
    )


def _said(error: urllib.error.HTTPError) -> str:
    """The first 200 characters of what the server says of its refusal, in one line."""
    body = b""
    with contextlib.suppress(OSError, http.client.HTTPException):
        body = error.read(2000)
    text = " ".join(body.decode(errors="replace").split())[:200]
    return f": {text}" if text else ""
