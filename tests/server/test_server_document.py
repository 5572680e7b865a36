"""The examples of docs/server.md, run one after the other as they stand."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import httpx
import pytest
from documents import ROOT, blocks, environment, shell
from servertest import Server, messages, until

PAGE = "docs/server.md"
DOCUMENT = ROOT / PAGE
ADDRESS = "http://127.0.0.1:4200"
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")


def sessions(section: str) -> str:
    (found,) = [block.code for block in blocks(PAGE, "sh") if block.section == section]
    return found


def test_the_examples_with_curl_print_what_the_document_says(serve: Callable[..., Server], tmp_path: Path) -> None:
    url = serve().url
    for block in blocks(PAGE, "bash"):
        done = subprocess.run(
            ["bash", "-uc", block.code.replace(ADDRESS, url)],
            cwd=tmp_path,
            env=os.environ,
            capture_output=True,
            text=True,
            timeout=200,
            check=False,
        )
        assert (done.stdout.replace("\r", ""), done.stderr) == (block.prints, ""), block


def test_the_server_starts_as_the_document_says(dsn: str, tmp_path: Path) -> None:
    script = sessions("Run it").replace("postgresql://app@db/app", f"'{dsn}'")
    for code in (script, sessions("Who may use it")):
        done = shell(code, environment(dsn), tmp_path)
        assert done.returncode == 0, (done.stdout, done.stderr)
        assert "Serving " in done.stdout


def test_the_server_is_measured_as_the_document_says(serve: Callable[..., Server], dsn: str, tmp_path: Path) -> None:
    code = sessions("What it can take").replace(ADDRESS, serve().url).replace("1000", "20")
    code = re.sub("$", " --seconds 0.1", code.rstrip("\n"), flags=re.MULTILINE)
    done = shell(code, environment(dsn), tmp_path)
    assert done.returncode == 0, (done.stdout, done.stderr)


def test_a_stream_begins_as_the_document_says(serve: Callable[..., Server]) -> None:
    command = sessions("A stream of changes").replace(ADDRESS, serve().url)
    with subprocess.Popen(["bash", "-c", f"exec {command}"], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as curl:
        assert curl.stdout is not None
        assert any(line.startswith(b"event: limits") for line in curl.stdout)
        curl.kill()


@pytest.mark.skipif(NGINX is None, reason="there is no nginx (Debian's package nginx-light)")
def test_nginx_shows_the_server_under_a_prefix(serve: Callable[..., Server], tmp_path: Path) -> None:
    (location,) = [block.code for block in blocks(PAGE, "nginx")]
    behind = serve("--root-path", "/pglimits")
    listens = tmp_path / "socket"  # a port that is free now may be taken when nginx wants it
    temporary = "".join(
        f"{kind}_temp_path {tmp_path}/{kind};" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    config = tmp_path / "nginx.conf"
    config.write_text(
        f"pid {tmp_path}/pid; error_log stderr; daemon off; worker_processes 1; events {{}}\n"
        f"http {{ access_log off; {temporary} server {{ listen unix:{listens};\n"
        f"{location.replace(ADDRESS, f'http://127.0.0.1:{behind.port}')}}} }}\n"
    )
    tmp_path.chmod(0o755)
    assert NGINX is not None
    through = httpx.HTTPTransport(uds=str(listens))
    with (
        behind.client(base_url="http://127.0.0.1/pglimits", transport=through) as http,
        subprocess.Popen([NGINX, "-c", str(config), "-p", str(tmp_path)], stderr=subprocess.PIPE, text=True) as nginx,
    ):
        try:

            def is_up() -> bool:
                assert nginx.poll() is None, nginx.communicate()[1]
                try:
                    return http.get("/healthz").status_code == 200
                except httpx.ConnectError:
                    return False

            until(is_up, "for nginx")
            assert http.post("/v1/limits", json={"name": "a", "limit": 1}).status_code == 201
            assert 'href="/pglimits/' in http.get("/").text
            with http.stream("GET", "/v1/changes") as stream:
                assert any(kind == "limits" for kind, _, _ in messages(stream))
        finally:
            nginx.terminate()
            nginx.communicate()


@pytest.mark.parametrize("option", re.findall(r"`(--[a-z-]+)", DOCUMENT.read_text(encoding="utf-8")))
def test_an_option_that_the_document_names_is_there(option: str) -> None:
    from pglimits_cli.serve import app
    from typer.main import get_command

    assert option in {name for parameter in get_command(app).params for name in parameter.opts}
