"""Downloads from a server on this machine that speaks the protocols of the Hugging Face Hub and of a bucket."""

import functools
import hashlib
import http.server
import io
import json
import os
import shutil
import threading
import zipfile
from urllib.parse import unquote, urlsplit

import pytest

from nanochat_native import download as command
from nanochat_native.data import downloads

pytest.importorskip("huggingface_hub")

import huggingface_hub
from huggingface_hub import constants

COMMIT = "1234567890" * 4
CLIMBMIX = "karpathy/climbmix-400b-shuffle"


def git_hash(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class Server(http.server.ThreadingHTTPServer):
    """The Hub's API and files at /api and /datasets, and a bucket at /bucket.

    Attributes:
        hub: for each dataset, the content of each path.
        bucket: the content of each name.
        large: files of the Hub with at least so many bytes have a SHA-256, others the hash of git.
        faults: for each path of a URL, functions that answer its next requests of GET instead of the server.
        asked: (method, path, range) of each request.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.hub, self.bucket, self.faults, self.asked = {}, {}, {}, []
        self.gone = set()  # paths of URLs that the server lists, but does not have
        self.announced = {}  # path of a URL: another content, whose size and hash are announced
        self.large = 1000
        self.url = f"http://127.0.0.1:{self.server_port}"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        self.server.asked.append((self.command, path, self.headers.get("Range")))
        faults = self.server.faults.get(path, [])
        if faults and self.command == "GET":
            faults.pop(0)(self)
            return
        kind, _, rest = path.strip("/").partition("/")
        if kind == "bucket" and rest in self.server.bucket:
            content = self.server.bucket[rest]
            announced = self.server.announced.get(path, content)
            self.send(content, {"ETag": f'"{hashlib.md5(announced).hexdigest()}"'}, announced)
        elif kind == "api":
            self.answer_api(rest.removeprefix("datasets/"))
        elif kind == "datasets" and "/resolve/" in rest:
            repo, _, place = rest.partition("/resolve/")
            _, _, name = place.partition("/")
            content = self.server.hub.get(repo, {}).get(name)
            if content is None or path in self.server.gone:
                self.missing("EntryNotFound")
                return
            announced = self.server.announced.get(path, content)
            self.send(content, {"X-Repo-Commit": COMMIT, "ETag": f'"{self.hash_of(announced)}"'}, announced)
        else:
            self.missing("RepoNotFound")

    def hash_of(self, content):
        return hashlib.sha256(content).hexdigest() if len(content) >= self.server.large else git_hash(content)

    def answer_api(self, rest):
        repo = "/".join(rest.split("/")[:2])
        if repo not in self.server.hub:
            self.missing("RepoNotFound")
        elif "/tree/" in rest:
            found = []
            for name, content in self.server.hub[repo].items():
                announced = self.server.announced.get(f"/datasets/{repo}/resolve/{COMMIT}/{name}", content)
                entry = {"type": "file", "path": name, "size": len(announced), "oid": git_hash(announced)}
                if len(announced) >= self.server.large:
                    entry["lfs"] = {"oid": self.hash_of(announced), "size": len(announced), "pointerSize": 130}
                found.append(entry)
            self.send(json.dumps(found).encode(), {"Content-Type": "application/json"})
        else:
            body = {"id": repo, "sha": COMMIT, "siblings": [], "private": False, "tags": [], "downloads": 0}
            self.send(json.dumps(body).encode(), {"Content-Type": "application/json"})

    def missing(self, code):
        self.send(b"{}", {"X-Error-Code": code}, status=404)

    def send(self, content, headers, announced=None, status=200):
        start = 0
        if (wanted := self.headers.get("Range")) and self.command == "GET" and status == 200:
            start, status = int(wanted.removeprefix("bytes=").partition("-")[0]), 206
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            headers = headers | {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}"}
        self.send_response(status)
        size = len(content) - start if self.command == "GET" or announced is None else len(announced)
        for name, value in headers.items() | {("Content-Length", str(size)), ("Accept-Ranges", "bytes")}:
            self.send_header(name, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(content[start:])


def cut_after(count, content):
    """A fault: the connection ends after `count` of the bytes that were announced."""

    def fault(handler):
        start = int((handler.headers.get("Range") or "bytes=0-").removeprefix("bytes=").partition("-")[0])
        handler.send_response(206 if start else 200)
        handler.send_header("Content-Length", str(len(content) - start))
        handler.send_header("ETag", f'"{handler.hash_of(content)}"')
        handler.end_headers()
        handler.wfile.write(content[start : start + count])
        handler.wfile.flush()
        handler.close_connection = True
        handler.connection.shutdown(2)

    return fault


def status(number, **headers):
    def fault(handler):
        handler.send(b"{}", {name.replace("_", "-"): value for name, value in headers.items()}, status=number)

    return fault


@pytest.fixture
def server(monkeypatch):
    running = Server()
    thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    api = functools.partial(huggingface_hub.HfApi, endpoint=running.url)
    snapshot = functools.partial(huggingface_hub.snapshot_download, endpoint=running.url)
    monkeypatch.setattr(huggingface_hub, "HfApi", api)
    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_PROGRESS_BARS", True)
    monkeypatch.setenv("NANOCHAT_BUCKET", f"{running.url}/bucket")
    for name in ("FIRST_WAIT", "LONGEST_WAIT"):
        monkeypatch.setattr(downloads, name, 0.01)
    yield running
    running.shutdown()
    thread.join()
    running.server_close()


def run(*args):
    return command.main([*map(str, args), "--yes"])


def shards(count):
    return {f"shard_{i:05d}.parquet": bytes([i]) * (3000 + i) for i in range(count)} | {"README.md": b"about"}


def files_in(folder):
    found = {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: content for name, content in found.items() if not name.startswith(".")}


# --- what is downloaded ---


def test_shards_of_climbmix_and_the_last_one_for_validation(server, tmp_path, capsys):
    server.hub[CLIMBMIX] = shards(12)
    assert run("climbmix", "--out", tmp_path, "--shards", 2) == 0
    expected = {
        name: shards(12)[name] for name in ("shard_00000.parquet", "shard_00001.parquet", "shard_00011.parquet")
    }
    assert files_in(tmp_path / "climbmix") == expected
    fetched = [path for method, path, _ in server.asked if method == "GET" and "resolve" in path]
    assert fetched[0].endswith("shard_00011.parquet"), "a training may start when the first of the others is there"
    out = capsys.readouterr().out
    assert "3 files of karpathy/climbmix-400b-shuffle; 9.0 kB to download" in out
    content = json.loads((tmp_path / "climbmix/.download.json").read_text())
    assert content["revision"] == COMMIT
    entry = content["files"]["shard_00001.parquet"]
    assert entry["sha256"] == entry["hash"] == hashlib.sha256(expected["shard_00001.parquet"]).hexdigest()

    server.asked.clear()
    assert run("climbmix", "--out", tmp_path, "--shards", 4) == 0
    assert sorted(files_in(tmp_path / "climbmix")) == [f"shard_{i:05d}.parquet" for i in (0, 1, 2, 3, 11)]
    fetched = {path.rpartition("/")[2] for method, path, _ in server.asked if method == "GET" and "resolve" in path}
    assert fetched == {"shard_00002.parquet", "shard_00003.parquet"}, "what is there is not fetched again"

    server.asked.clear()
    assert run("climbmix", "--out", tmp_path, "--shards", 3) == 0
    assert not any("resolve" in path for _, path, _ in server.asked)
    assert run("climbmix", "--out", tmp_path, "--shards", 99) == 0
    assert len(files_in(tmp_path / "climbmix")) == 12


def test_any_dataset_of_the_hub_by_name_and_pattern(server, tmp_path):
    content = {"data/train-0.parquet": b"a" * 2000, "data/a[b]*.jsonl": b"{}\n", "notes.txt": b"x", "x/y.csv": b"1"}
    server.hub["some/set"] = content
    assert run("some/set", "--out", tmp_path) == 0
    assert files_in(tmp_path / "some--set") == {name: content[name] for name in list(content)[:2]}
    assert run("some/set", "--out", tmp_path, "--files", "*.csv", "notes.*") == 0
    assert files_in(tmp_path / "some--set") == content


@pytest.mark.parametrize("name", [dataset.name for dataset in downloads.DATASETS if not dataset.in_bucket])
def test_names_stand_for_datasets(server, tmp_path, name):
    dataset = downloads.find_dataset(name)
    files = [pattern.replace("*", "7") for pattern in dataset.patterns]
    server.hub[dataset.repo] = dict.fromkeys([*files, "other.bin"], b"content")
    assert run(name, "--out", tmp_path) == 0
    assert files_in(tmp_path / name) == dict.fromkeys(files, b"content")


def zipped(files):
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w") as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def test_files_of_the_bucket(server, tmp_path):
    server.bucket["identity_conversations.jsonl"] = b'{"messages": []}\n' * 9
    server.bucket["eval_bundle.zip"] = zipped({"eval_bundle/core.yaml": "tasks", "eval_bundle/data/a.jsonl": "{}"})
    assert run("identity", "eval-bundle", "--out", tmp_path) == 0
    assert (tmp_path / "identity/identity_conversations.jsonl").read_bytes() == b'{"messages": []}\n' * 9
    assert (tmp_path / "eval-bundle/eval_bundle/core.yaml").read_text() == "tasks"
    assert (tmp_path / "eval-bundle/eval_bundle/data/a.jsonl").read_text() == "{}"
    server.asked.clear()
    assert run("identity", "eval-bundle", "--out", tmp_path) == 0
    assert {method for method, *_ in server.asked} == {"HEAD"}


def test_what_is_no_archive_is_one_line(server, tmp_path, capsys):
    server.bucket["eval_bundle.zip"] = b"<html>"
    assert run("eval-bundle", "--out", tmp_path) == 2
    assert "eval_bundle.zip is no zip archive" in capsys.readouterr().err
    assert run("eval-bundle", "--out", tmp_path) == 2, "it does not count as there"
    server.bucket["eval_bundle.zip"] = zipped({"eval_bundle/core.yaml": "tasks", "__MACOSX/x": ""})
    assert run("eval-bundle", "--out", tmp_path) == 0
    assert [path.name for path in (tmp_path / "eval-bundle/eval_bundle").iterdir()] == ["core.yaml"]
    shutil.rmtree(tmp_path / "eval-bundle/eval_bundle")
    assert run("eval-bundle", "--out", tmp_path) == 0
    assert (tmp_path / "eval-bundle/eval_bundle/core.yaml").exists()


# --- what goes wrong ---


@pytest.mark.parametrize("step", ["extractall", "replace"])
def test_an_archive_is_unpacked_whole_or_not_at_all(server, tmp_path, monkeypatch, step):
    target = tmp_path / "eval-bundle/eval_bundle"
    server.bucket["eval_bundle.zip"] = zipped({"eval_bundle/core.yaml": "old", "eval_bundle/data/a.jsonl": "{}"})
    assert run("eval-bundle", "--out", tmp_path) == 0
    server.bucket["eval_bundle.zip"] = zipped({"eval_bundle/core.yaml": "new", "eval_bundle/data/a.jsonl": "[]"})

    def failing(archive, folder):
        archive.extract("eval_bundle/core.yaml", folder)
        raise OSError("the disk is gone")

    def replacing(source, place, real=os.replace):
        if place == target:
            raise OSError("the disk is gone")
        real(source, place)

    with monkeypatch.context() as patched:
        if step == "extractall":
            patched.setattr(zipfile.ZipFile, "extractall", failing)
        else:
            patched.setattr(downloads.os, "replace", replacing)
        assert run("eval-bundle", "--out", tmp_path) == 2
    if step == "extractall":
        assert (target / "core.yaml").read_text() == "old"
    else:
        assert not target.exists()
    assert run("eval-bundle", "--out", tmp_path) == 0
    assert [(target / name).read_text() for name in ("core.yaml", "data/a.jsonl")] == ["new", "[]"]
    assert sorted(path.name for path in target.parent.iterdir()) == [".download.json", "eval_bundle", "eval_bundle.zip"]


def test_a_cut_is_resumed_from_where_it_was(server, tmp_path, capsys):
    content = bytes(range(256)) * 4000
    server.bucket["identity_conversations.jsonl"] = content
    path = "/bucket/identity_conversations.jsonl"
    server.faults[path] = [cut_after(300_000, content), status(503), cut_after(5, content)]
    assert run("identity", "--out", tmp_path) == 0
    assert (tmp_path / "identity/identity_conversations.jsonl").read_bytes() == content
    starts = [given for method, asked, given in server.asked if method == "GET" and asked == path]
    assert starts == [None, "bytes=300000-", "bytes=300000-", "bytes=300005-"]
    assert capsys.readouterr().err.count("trying again") == 3


def test_a_cut_file_of_the_hub_comes_whole(server, tmp_path):
    content = bytes(range(256)) * 40
    server.hub["some/set"] = {"a.parquet": content}
    server.faults[f"/datasets/some/set/resolve/{COMMIT}/a.parquet"] = [cut_after(700, content), cut_after(9, content)]
    assert run("some/set", "--out", tmp_path) == 0
    assert files_in(tmp_path / "some--set") == {"a.parquet": content}


def end_the_connection(handler):
    """A fault: no answer."""
    handler.close_connection = True
    handler.connection.shutdown(2)


@pytest.mark.parametrize("fault", [status(429, Retry_After="7"), end_the_connection], ids=["busy", "cut"])
@pytest.mark.parametrize(
    "path", ["/api/datasets/some/set", f"/datasets/some/set/resolve/{COMMIT}/a.parquet"], ids=["list", "file"]
)
def test_the_hub_is_asked_again_after_what_may_pass(server, tmp_path, monkeypatch, capsys, path, fault):
    monkeypatch.setattr(constants, "DEFAULT_REQUEST_TIMEOUT", 5)
    content = bytes(range(256)) * 40
    server.hub["some/set"] = {"a.parquet": content}
    asked_by_the_hub = 6  # the attempts of huggingface_hub itself for a file
    server.faults[path] = [fault] * (1 if "/api/" in path else asked_by_the_hub)
    monkeypatch.setattr(downloads.time, "sleep", lambda seconds: None)
    assert run("some/set", "--out", tmp_path) == 0
    assert files_in(tmp_path / "some--set") == {"a.parquet": content}
    assert "trying again" in capsys.readouterr().err


def test_a_file_that_is_gone_is_named(server, tmp_path, capsys):
    server.hub["some/set"] = {"part 1/a.parquet": b"x"}
    server.gone.add(f"/datasets/some/set/resolve/{COMMIT}/part 1/a.parquet")
    assert run("some/set", "--out", tmp_path) == 2
    assert "error: some/set: part 1/a.parquet: the server answers 404" in capsys.readouterr().err


def test_a_run_that_ended_in_the_middle_keeps_what_came(server, tmp_path, capsys):
    content = bytes(range(256)) * 4000
    server.bucket["identity_conversations.jsonl"] = content
    path = "/bucket/identity_conversations.jsonl"
    server.faults[path] = [cut_after(1000, content)] * downloads.ATTEMPTS
    assert run("identity", "--out", tmp_path) == 2
    assert "what has come is kept, run the command again" in capsys.readouterr().err
    assert files_in(tmp_path / "identity") == {}
    server.asked.clear()
    assert run("identity", "--out", tmp_path) == 0
    assert server.asked[-1] == ("GET", path, f"bytes={1000 * downloads.ATTEMPTS}-")
    assert files_in(tmp_path / "identity") == {"identity_conversations.jsonl": content}


@pytest.mark.parametrize("repo", ["hub", "bucket"])
@pytest.mark.parametrize("other", [b"y" * 5000, b"x" * 4999, b"x" * 5001], ids=["bytes", "shorter", "longer"])
def test_other_bytes_than_announced_are_removed(server, tmp_path, capsys, repo, other):
    announced = b"x" * 5000
    if repo == "hub":
        server.hub["some/set"] = {"a.parquet": other}
        name, path, url = "some/set", tmp_path / "some--set", f"/datasets/some/set/resolve/{COMMIT}/a.parquet"
    else:
        server.bucket["identity_conversations.jsonl"] = other
        name, path, url = "identity", tmp_path / "identity", "/bucket/identity_conversations.jsonl"
    server.announced[url] = announced
    assert run(name, "--out", tmp_path) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    if other == b"y" * 5000:
        assert "came with other bytes than" in error
    assert files_in(path) == {}
    assert downloads.read_list(path) == {}
    if repo == "hub":
        server.hub["some/set"] = {"a.parquet": announced}
    else:
        server.bucket["identity_conversations.jsonl"] = announced
    assert run(name, "--out", tmp_path) == 0
    assert list(files_in(path).values()) == [announced]


def test_a_busy_server_is_asked_again_after_the_time_it_names(server, tmp_path, capsys, monkeypatch):
    waits = []
    monkeypatch.setattr(downloads, "LONGEST_WAIT", 60.0)
    monkeypatch.setattr(downloads.time, "sleep", waits.append)
    server.bucket["identity_conversations.jsonl"] = b"content"
    server.faults["/bucket/identity_conversations.jsonl"] = [status(429, Retry_After="7"), status(429, Retry_After="x")]
    assert run("identity", "--out", tmp_path) == 0
    assert waits == [7.0, 0.02]
    assert "the server answers 429; trying again in 7 s" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["no/such"], "no/such does not exist on the Hub, or is private and needs HF_TOKEN"),
        (["identity"], "/bucket/identity_conversations.jsonl: the server answers 404"),
        (["some/set", "--files", "*.csv"], "some/set has no file that fits *.csv"),
        (["wrong"], "a dataset must be one of climbmix, smoltalk, mmlu, gsm8k, arc, humaneval, identity, eval-bundle"),
        (["../x"], "a dataset must be one of"),
        (["a/b/c"], "a dataset must be one of"),
        (["some/set", "--shards", "0"], "--shards must be a whole number >= 1, got 0"),
        (["evil/set"], "evil/set has a file that is outside of its folder, '../../x.parquet'"),
    ],
)
def test_mistakes_are_one_line(server, tmp_path, capsys, args, message):
    server.hub["some/set"] = {"a.parquet": b"x"}
    server.hub["evil/set"] = {"../../x.parquet": b"x"}
    assert run(*args, "--out", tmp_path) == 2
    err = capsys.readouterr().err
    assert message in err
    assert err.splitlines()[-1].startswith("error: ")
    assert "Traceback" not in err
    assert not any(tmp_path.iterdir())


def test_a_gated_dataset_says_what_it_needs(server, tmp_path, capsys):
    server.faults["/api/datasets/some/set"] = [status(403, X_Error_Code="GatedRepo")]
    assert run("some/set", "--out", tmp_path) == 2
    assert "some/set must be unlocked on its page of the Hub, and needs HF_TOKEN" in capsys.readouterr().err


def test_no_network_is_one_line(server, tmp_path, capsys, monkeypatch):
    server.hub["some/set"] = {"a.parquet": b"x"}
    server.shutdown()
    server.server_close()
    for name in ("some/set", "identity"):
        assert run(name, "--out", tmp_path) == 2
        assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")


def test_a_disk_without_room_is_found_before(server, tmp_path, capsys, monkeypatch):
    server.hub["some/set"] = {"a.parquet": b"x" * 5000}
    usage = shutil.disk_usage(tmp_path)._replace(free=downloads.SPARE_BYTES + 4999)
    monkeypatch.setattr(downloads.shutil, "disk_usage", lambda folder: usage)
    assert run("some/set", "--out", tmp_path) == 2
    assert "free, but the files need 5.0 kB" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_a_disk_that_fills_up_is_one_line_and_what_came_stays(server, tmp_path, capsys, monkeypatch):
    server.hub["some/set"] = {f"{i}.parquet": bytes([i]) * 5000 for i in range(9)}

    def full(*args, allow_patterns, **given):
        if "8.parquet" in allow_patterns:
            raise OSError(28, "No space left on device", "8.parquet")
        return snapshot(*args, allow_patterns=allow_patterns, **given)

    snapshot = huggingface_hub.snapshot_download
    monkeypatch.setattr(huggingface_hub, "snapshot_download", full)
    assert run("some/set", "--out", tmp_path) == 2
    assert capsys.readouterr().err.splitlines()[-1] == "error: 8.parquet: No space left on device"
    assert len(downloads.read_list(tmp_path / "some--set")) == 8


# --- what is there ---


def test_offline_checks_what_is_there(server, tmp_path, capsys):
    server.hub["some/set"] = {"a.parquet": b"x" * 5000, "b.parquet": b"y" * 5000}
    assert run("some/set", "--out", tmp_path, "--offline") == 2
    assert "has no list of downloaded files: run download some/set once" in capsys.readouterr().err
    assert run("some/set", "--out", tmp_path) == 0
    server.asked.clear()
    assert run("some/set", "--out", tmp_path, "--offline") == 0
    assert "2 files are there and right" in capsys.readouterr().out
    assert server.asked == []
    path = tmp_path / "some--set/b.parquet"
    for damage in (b"y" * 4999, b"y" * 4999 + b"z"):
        path.write_bytes(damage)
        assert run("some/set", "--out", tmp_path, "--offline") == 2
        assert "b.parquet is missing or damaged" in capsys.readouterr().err
    path.unlink()
    assert run("some/set", "--out", tmp_path) == 0
    assert path.read_bytes() == b"y" * 5000


def test_the_names_are_listed_with_what_is_there(server, tmp_path, capsys):
    server.hub[CLIMBMIX] = shards(3)
    run("climbmix", "--out", tmp_path)
    capsys.readouterr()
    assert command.main(["--out", str(tmp_path)]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == len(downloads.DATASETS)
    assert lines[0].endswith(f": 3 files, 9.0 kB, in {tmp_path}/climbmix")
    assert lines[1].endswith(": not there")


@pytest.mark.parametrize(("answer", "comes"), [("y", True), ("", False), ("no", False), (EOFError(), False)], ids=str)
def test_the_size_is_asked_before(server, tmp_path, capsys, monkeypatch, answer, comes):
    server.hub["some/set"] = {"a.parquet": b"x" * 5000}
    assert command.main(["some/set", "--out", str(tmp_path)]) == 2
    assert "there is no terminal to ask on: give --yes to download" in capsys.readouterr().err
    monkeypatch.setattr(command.sys.stdin, "isatty", lambda: True, raising=False)

    def answers(prompt):
        if isinstance(answer, EOFError):
            raise answer
        return answer

    monkeypatch.setattr("builtins.input", answers)
    assert command.main(["some/set", "--out", str(tmp_path)]) == 0
    assert (tmp_path / "some--set/a.parquet").exists() == comes
    assert "5.0 kB to download" in capsys.readouterr().out
