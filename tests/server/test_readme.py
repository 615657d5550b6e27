"""Every snippet of the READMEs runs, and prints what they say it prints. One that nobody here runs is a failure."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[2]
URL = "http://127.0.0.1:30000"
# What differs from answer to answer.
VOLATILE = ("id", "created")
# Snippets that are commands of CI itself, of which this file is a part.
BY_CI = ("make serve\n", "make test\n", "cmake -S . -B build ")


def snippets(readme: Path) -> list[tuple[str, str]]:
    """(language, text) of every fenced block, in order."""
    return [(m[1], m[2]) for m in re.finditer(r"^```(\w*)\n(.*?)^```$", readme.read_text("utf-8"), re.S | re.M)]


MAIN = snippets(ROOT / "README.md")
SERVER = dict(snippets(ROOT / "python" / "sapwood" / "server" / "README.md"))


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    """`sapwood serve`, as the README starts it, on a free port."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    server = subprocess.Popen(
        [sys.executable, "-m", "sapwood", "serve", "--port", str(port)], stderr=subprocess.PIPE, text=True
    )
    assert server.stderr is not None
    try:
        log = ""
        while " ready after " not in log:
            line = server.stderr.readline()
            assert line, f"the server ended: {log}"
            log += line
        yield f"http://127.0.0.1:{port}"
    finally:
        server.terminate()
        server.communicate(timeout=60)
    assert server.returncode == 0


def run_shell(command: str, url: str) -> str:
    """What the command prints, with this interpreter in place of .venv's."""
    command = command.replace(URL, url).replace(".venv/bin/sapwood", f"{shlex.quote(sys.executable)} -m sapwood")
    done = subprocess.run(["bash", "-euc", command], capture_output=True, text=True, cwd=ROOT, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def run_python(source: str, url: str) -> tuple[str, dict[str, Any]]:
    """What the snippet prints, and its names."""
    printed, names = io.StringIO(), {"__name__": "__main__"}
    with contextlib.redirect_stdout(printed):
        exec(compile(source.replace(URL, url), "README.md", "exec"), names)
    return printed.getvalue(), names


def settled(answer: str) -> Any:
    return json.loads(answer) | dict.fromkeys(VOLATILE)


def test_every_snippet_has_somebody_who_runs_it() -> None:
    for language, text in MAIN:
        if language == "sh":
            first = text.split()[0]
            assert text.startswith(BY_CI) or first in ("curl", "make", "python", ".venv/bin/sapwood"), text
    kinds = [language for language, _ in MAIN]
    assert set(kinds) == {"", "sh", "json", "python", "text"}
    assert kinds.count("") == 2  # two drawings
    assert set(SERVER) == {"ini", "yaml", "nginx"}


def test_curl_prints_what_the_readme_says(url: str) -> None:
    ran = 0
    for (language, command), (next_language, printed) in zip(MAIN, MAIN[1:], strict=False):
        if language == "sh" and command.startswith("curl"):
            assert next_language == "json", "a curl example shows its answer"
            assert settled(run_shell(command, url)) == settled(printed)
            ran += 1
    assert ran == 1


def test_openai_client_prints_what_the_readme_says(url: str) -> None:
    ran = 0
    for (language, source), (next_language, printed) in zip(MAIN, MAIN[1:], strict=False):
        if language == "python" and next_language == "text":
            assert run_python(source, url)[0].rstrip("\n") == printed.rstrip("\n")
            ran += 1
    assert ran == 1


def test_embedding_snippets(url: str) -> None:
    """The Engine prints something; the Starlette app answers on its own route and on the mounted API."""
    from starlette.testclient import TestClient

    engines = [source for language, source in MAIN if language == "python" and "from sapwood import" in source]
    assert len(engines) == 2
    printed, names = run_python(engines[0], url)
    assert printed.startswith(names["out"].text)
    assert [output.index for output in names["many"]] == [0, 1, 2]
    app = run_python(engines[1], url)[1]["app"]
    with TestClient(app) as client:
        assert len(client.get("/story", params={"about": "a cat"}).text) > 20
        assert client.get("/llm/v1/models").json()["data"][0]["id"] == "sapling"
        body = {"messages": [{"role": "user", "content": "Hello!"}], "max_tokens": 4}
        assert client.post("/llm/v1/chat/completions", json=body).json()["usage"]["completion_tokens"] <= 4


def test_commands(url: str) -> None:
    for language, text in MAIN:
        if language != "sh" or text.startswith((*BY_CI, "curl")):
            continue
        for line in text.splitlines():
            words = shlex.split(line, comments=True)
            if words[0] == "make":
                plan = subprocess.run(["make", "-n", *words[1:]], capture_output=True, text=True, cwd=ROOT)
                assert plan.returncode == 0, plan.stderr
                arguments = dict(word.split("=", 1) for word in words[2:])
                assert f"sapwood serve {arguments['MODEL']} {arguments['ARGS']}" in plan.stdout
            elif words[0] == ".venv/bin/sapwood":
                assert len(run_shell(line, url)) > 20
            else:
                # A benchmark takes minutes: that it starts, and knows the flags that the README gives it.
                known = subprocess.run(
                    [sys.executable, words[1], "--help"],
                    capture_output=True,
                    text=True,
                    cwd=ROOT,
                    env=os.environ | {"COLUMNS": "200"},
                )
                assert known.returncode == 0, known.stderr
                for word in words[2:]:
                    assert not word.startswith("--") or word in known.stdout, f"{words[1]} has no {word}"


def test_settings_file_of_the_deployment_notes(tmp_path: Path) -> None:
    from sapwood.config import ServerConfig
    from sapwood.settings import collect

    file = tmp_path / "sapwood.yaml"
    file.write_text(SERVER["yaml"])
    config = ServerConfig.from_kwargs(**collect(ServerConfig, {}, str(file), {}).values)
    assert (config.max_queued_requests, config.drain_timeout_s, config.request_timeout_s) == (256, 90, 600)

    def number(pattern: str, text: str) -> int:
        found = re.search(pattern, text)
        assert found is not None, pattern
        return int(found[1])

    # The unit and the proxy allow for these.
    assert number(r"TimeoutStopSec=(\d+)", SERVER["ini"]) > config.drain_timeout_s
    assert number(r"proxy_read_timeout (\d+)s", SERVER["nginx"]) >= config.request_timeout_s
    assert number(r"client_max_body_size (\d+)m", SERVER["nginx"]) * 2**20 == config.max_body_bytes


def test_unit_file_is_valid(tmp_path: Path) -> None:
    """Its form, and systemd's own check where the machine has it."""
    assert re.findall(r"^\[(\w+)\]$", SERVER["ini"], re.M) == ["Unit", "Service", "Install"]
    assert all(re.match(r"[A-Z]\w*=|#|\[|$", line) for line in SERVER["ini"].splitlines())
    unit = tmp_path / "sapwood.service"
    unit.write_text(SERVER["ini"].replace("/opt/sapwood/bin/sapwood", "/bin/true"))
    with contextlib.suppress(FileNotFoundError):
        done = subprocess.run(["systemd-analyze", "verify", unit], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr


def test_documented_fields_are_the_accepted_ones() -> None:
    from sapwood.server.fields import HARMLESS
    from sapwood.server.routes import ROUTES

    text = (ROOT / "python" / "sapwood" / "server" / "README.md").read_text("utf-8")
    listed = re.search(r"because known clients send them:\n(.*?)\. A `null`", text, re.S)
    assert listed is not None
    assert set(re.findall(r"`(\w+)`", listed[1])) == HARMLESS
    for route in ROUTES:
        path = route.path.replace("{model:path}", "{id}").replace("/get_", "/")
        path = path.removeprefix("/v1") if "tokenize" in path else path
        assert f"{route.method} {path}`" in text, f"{route.method} {path} is not documented"


def test_routes_of_the_readmes_exist(url: str) -> None:
    text = "".join((ROOT / file).read_text("utf-8") for file in ("README.md", "python/sapwood/server/README.md"))
    found = set(re.findall(r"(GET|POST) (/[\w/.]+\w)", text))
    assert len(found) > 10
    for method, path in sorted(found):
        request = urllib.request.Request(url + path, method=method, data=b"{}" if method == "POST" else None)
        request.add_header("Content-Type", "application/json")
        try:
            with urllib.request.urlopen(request) as answer:
                status = answer.status
        except urllib.error.HTTPError as error:
            with error:
                status = error.code
        assert status not in (404, 405), f"{method} {path}"
