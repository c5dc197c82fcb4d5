"""Settings of a distillation, the teachers whose prices are known, and the key.

Knows no network and no file. The key is read from the environment, given on as an argument and
kept nowhere; `redact` takes it out of whatever the server says.
"""

import json
import math
import os
from dataclasses import dataclass, field
from datetime import datetime
from urllib.parse import urlsplit

from gemma_cot.config import TrainConfig


@dataclass(frozen=True)
class Price:
    """US dollars per million tokens, and by what they are multiplied in the peak hours."""

    cached_input: float
    input: float
    output: float
    peak_factor: float = 1.0


@dataclass(frozen=True)
class Teacher:
    """A model of a server. extra_body: what its requests say beyond OpenAI's fields."""

    base_url: str
    price: Price | None = None
    extra_body: dict = field(default_factory=dict)


# DeepSeek's models and prices as its pricing page had them on 2026-11-15. `deepseek-chat` is gone
# since July 2026. Both think unless told not to. `seed` is no parameter of DeepSeek's.
PRICES_AS_OF = "2026-11-15"
_DEEPSEEK = "https://api.deepseek.com"
_PLAIN = {"thinking": {"type": "disabled"}, "seed": None}
TEACHERS = {
    "deepseek-flash": Teacher(_DEEPSEEK, Price(0.003, 0.15, 0.60, 2.0), _PLAIN),
    "deepseek-v4-pro": Teacher(_DEEPSEEK, Price(0.022, 0.66, 1.98, 2.0), _PLAIN),
}
_PEAK_HOURS_UTC = (1, 2, 3, 6, 7, 8, 9)  # Monday to Friday; holidays are cheaper and not known here


@dataclass(frozen=True)
class Settings:
    """The flags."""

    input: tuple[str, ...]
    output: str
    teacher: str = "deepseek-flash"
    base_url: str = ""
    api_key_env: str = "DEEPSEEK_API_KEY"
    extra_body: str = ""
    price: str = ""
    max_usd: float = math.inf
    temperature: float = 0.3
    max_tokens: int = 1500
    seed: int = 0
    concurrency: int = 32
    timeout: float = 180
    attempts: int = 12
    patience: float = 1800
    max_rejects_in_row: int = 50
    backoff: float = 1.0
    limit: int = 0
    model: str = ""
    instruction: str = ""
    max_prompt_tokens: int = TrainConfig.max_prompt_tokens
    max_completion_tokens: int = TrainConfig.max_completion_tokens
    against: tuple[str, ...] = ()
    max_overlap: float = 0.0
    max_similarity: float = 0.8
    on_bad_row: str = "fail"


_AT_LEAST = {
    "max_tokens": 1, "concurrency": 1, "attempts": 1, "max_rejects_in_row": 1, "limit": 0,
    "seed": 0, "temperature": 0, "max_prompt_tokens": 1, "max_completion_tokens": 1,
}  # fmt: skip


def check_settings(cfg: Settings) -> None:
    """Raise ValueError naming the first setting that is missing, out of range or contradictory."""
    for name in ("input", "output", "teacher"):
        if not getattr(cfg, name):
            raise ValueError(f"--{name}: must be given, got nothing; set --{name}")
    for name, least in _AT_LEAST.items():
        if not getattr(cfg, name) >= least:
            got = getattr(cfg, name)
            raise ValueError(f"--{name}: must be at least {least}, got {got}; raise --{name}")
    for name in ("max_usd", "timeout", "patience", "backoff"):
        if not getattr(cfg, name) > 0:
            raise ValueError(f"--{name}: must be above 0, got {getattr(cfg, name)}; raise --{name}")
    for name in ("max_overlap", "max_similarity"):
        if not 0 <= getattr(cfg, name) <= 1:
            raise ValueError(f"--{name}: must be 0 to 1, got {getattr(cfg, name)}; change it")
    teacher = teacher_of(cfg)
    url = urlsplit(teacher.base_url)
    if url.scheme not in ("http", "https") or not url.hostname or url.username:
        raise ValueError(
            f"--base_url: must be an http(s) address without a user name, got "
            f"{url.hostname or 'no host'!r}; set --base_url=https://HOST/v1"
        )
    if url.scheme == "http" and cfg.api_key_env and not is_loopback(teacher.base_url):
        raise ValueError(
            f"--base_url: must be https where the key would cross a network, got {url.hostname!r} "
            "over http; write https, or set --api_key_env= where no key is needed"
        )
    if cfg.max_usd < math.inf and teacher.price is None:
        raise ValueError(
            f"--max_usd: must come with a price, got none for {cfg.teacher!r}; "
            "set --price=CACHED,INPUT,OUTPUT"
        )


def teacher_of(cfg: Settings) -> Teacher:
    """Return the teacher of the settings. Raises ValueError for what cannot be one."""
    known = TEACHERS.get(cfg.teacher)
    base_url = cfg.base_url or (known.base_url if known else "")
    if not base_url:
        raise ValueError(
            f"--base_url: must be given for a teacher other than {', '.join(TEACHERS)}, got "
            f"nothing for {cfg.teacher!r}; set --base_url=https://HOST/v1"
        )
    price = known.price if known and not cfg.base_url else None
    if cfg.price:
        try:
            price = Price(*map(float, cfg.price.split(",")))
        except (ValueError, TypeError):
            price = None
        if price is None or not min(price.cached_input, price.input, price.output) >= 0:
            raise ValueError(
                f"--price: must be CACHED,INPUT,OUTPUT in dollars per million tokens, got "
                f"{cfg.price!r}; set e.g. --price=0.003,0.15,0.6"
            )
    extra = known.extra_body if known and not cfg.base_url else {}
    if cfg.extra_body:
        try:
            given = json.loads(cfg.extra_body)
        except ValueError:
            given = None
        if not isinstance(given, dict):
            raise ValueError(
                f"--extra_body: must be a JSON object, got {cfg.extra_body!r:.60}; "
                """set e.g. --extra_body='{"top_p": 0.9}'"""
            )
        extra = extra | given
    return Teacher(base_url.rstrip("/"), price, extra)


def is_loopback(base_url: str) -> bool:
    """Return whether an address is on this machine."""
    return urlsplit(base_url).hostname in ("localhost", "127.0.0.1", "::1")


def key_from_environment(cfg: Settings) -> str:
    """Return the key, "" where none is needed: no --api_key_env, or a server on this machine.

    Raises ValueError, which never holds the key, when it is missing or no header can carry it.
    """
    key = os.environ.get(cfg.api_key_env, "").strip()
    if not key and cfg.api_key_env and not is_loopback(teacher_of(cfg).base_url):
        raise ValueError(
            f"{cfg.api_key_env}: the environment must hold the teacher's key, got nothing; "
            f"export {cfg.api_key_env}=..., or name another variable with --api_key_env"
        )
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise ValueError(
            f"{cfg.api_key_env}: the key must be printable ASCII without spaces, got other "
            "characters (not shown); copy it again"
        )
    return key


def redact(text: str, key: str) -> str:
    """Return `text` without the key."""
    return text.replace(key, "[key]") if key else text


def is_peak(when: datetime) -> bool:
    """Return whether DeepSeek's peak prices hold at a time in UTC."""
    return when.weekday() < 5 and when.hour in _PEAK_HOURS_UTC


def usd(price: Price | None, usage: dict, when: datetime) -> float:
    """Return what `usage` (prompt, cached and completion tokens) costs at a time, 0 unpriced."""
    if price is None:
        return 0.0
    fresh = usage["prompt_tokens"] - usage["cached_tokens"]
    total = usage["cached_tokens"] * price.cached_input + fresh * price.input
    total += usage["completion_tokens"] * price.output
    return total * (price.peak_factor if is_peak(when) else 1.0) / 1e6
